"""What becomes of acceptance when weights are swapped while a request runs, whose draft cache the old ones wrote?

    python benchmarks/stale.py [--drafter demo/small_lm] [--out FILE]

A drafter learns from a stream. Then each prompt is answered three ways: with a swap after some tokens, keeping what the
old weights wrote into the draft cache (as serving does); with the same swap, the draft cache computed anew; and without
a swap, by the new weights from the start. Acceptance length behind the swap is compared, on the same prompts. Small
changes: one learning round. Large ones: all that was learned, in both directions.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
import tyro

from onlinespec.config import GenerationParams
from onlinespec.core import DecodeStats, DrafterWeights
from onlinespec.drafters.contract import Drafter
from onlinespec.drafters.loading import load_drafter
from onlinespec.engine.step import DecodeLoop
from onlinespec.experiments.provenance import provenance
from onlinespec.learning.learner_spec import parse_learner
from onlinespec.learning.update import InlineLearning
from onlinespec.models.loading import Target, load_target
from onlinespec.workloads import load_workload


@dataclass(frozen=True)
class Stale:
    """Learn, then swap in the middle of answers."""

    target: str = "demo"
    drafter: str = "demo"
    data: str = "builtin:sql"
    num_learned: int = 80
    num_requests: int = 60
    before: int = 32
    """Tokens of the answer before the swap."""
    after: int = 64
    """And behind it."""
    num_draft_tokens: int = 4
    seed: int = 0
    out: Path | None = None


def main(command: Stale) -> None:
    """A line for each change."""
    torch.set_num_threads(1)
    target = load_target(command.target)
    drafter = load_drafter(command.drafter, target, command.seed)
    texts = [prompt.text for prompt in islice(load_workload(command.data).prompts(command.seed), 10_000)]
    prompts = [target.encode(text) for text in texts[: command.num_learned + command.num_requests]]
    start = drafter.weights
    almost, learned = _learned(command, target, drafter, prompts[: command.num_learned])
    changes = {"one round": (almost, learned), "all": (start, learned), "all, back": (learned, start)}
    rows: list[dict[str, object]] = []
    for name, (old, new) in changes.items():
        rows.append({"change": name, **_compared(command, target, drafter, prompts[command.num_learned :], old, new)})
        print(rows[-1], flush=True)
    if command.out:
        line = " ".join(["python", "benchmarks/stale.py", *sys.argv[1:]])
        told = provenance(line, command.target, command.drafter, target.fingerprint, asdict(command))
        command.out.write_text("\n".join(json.dumps(row, default=str) for row in (told, *rows)) + "\n")


def _learned(
    command: Stale, target: Target, drafter: Drafter, prompts: list[list[int]]
) -> tuple[DrafterWeights, DrafterWeights]:
    """Weights before and after the last round of a stream."""
    config = parse_learner("online_gradient/budget=inf/min_interval=16/max_interval=16")
    loop = DecodeLoop(target, drafter, InlineLearning(drafter, config=config))
    before = after = drafter.weights
    for prompt in prompts:
        for _ in loop.generate(prompt, GenerationParams(command.after, command.num_draft_tokens)):
            if drafter.weights is not after:
                before, after = after, drafter.weights
    return before, after


def _compared(
    command: Stale,
    target: Target,
    drafter: Drafter,
    prompts: list[list[int]],
    old: DrafterWeights,
    new: DrafterWeights,
) -> dict[str, float]:
    """Acceptance length behind the swap, in the three ways, and the mean paired difference of the first two."""
    sums = {way: DecodeStats() for way in ("stale", "anew", "new from the start")}
    differences = []
    for prompt in prompts:
        one = {way: _behind(command, target, drafter, prompt, old, new, way) for way in sums}
        if all(stats.steps for stats in one.values()):
            sums = {way: sums[way] + one[way] for way in sums}
            differences.append(one["stale"].acceptance_length - one["anew"].acceptance_length)
    figures = {way: stats.acceptance_length for way, stats in sums.items()}
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return {**figures, "stale - anew": statistics.fmean(differences), "error": error, "requests": len(differences)}


def _behind(
    command: Stale,
    target: Target,
    drafter: Drafter,
    prompt: list[int],
    old: DrafterWeights,
    new: DrafterWeights,
    way: str,
) -> DecodeStats:
    """What was counted behind the swap."""
    drafter.swap(new if way == "new from the start" else old)
    loop = DecodeLoop(target, drafter)
    request = loop.start(prompt, GenerationParams(command.before + command.after, command.num_draft_tokens))
    counted = None
    while request.finish_reason is None:
        if counted is None and len(request.output_ids) >= command.before:
            counted = request.stats
            drafter.swap(new)
            if way == "anew":
                trace = request.trace
                drafter.release(request.slot, is_finished=False)
                drafter.start(request.slot, request.info, trace.token_ids, trace.features[: trace.num_features])
        loop.step([request])
    loop.finish(request)
    if counted is None:
        return DecodeStats()
    steps, accepted = request.stats.steps - counted.steps, request.stats.accepted - counted.accepted
    return DecodeStats(steps=steps, accepted=accepted)


if __name__ == "__main__":
    main(tyro.cli(Stale))
