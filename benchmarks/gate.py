"""What the promotion gate lets through of what is learned, on a recorded stream: no clock, the same every time.

    python benchmarks/gate.py [--show] [--looks 4 8 16 32]

The target answers a shifting stream once; then drafters draft along its answers. `frozen` never learns, `inline` plays
what each round leaves, `gated` serves what a `Trainer` publishes, as a server does. Budgets are counted in steps. The
gap between the last two is what judging costs, and what it saves where old traffic comes back.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import torch
import tyro

from onlinespec.config import GenerationParams
from onlinespec.core import DecodeStats, Feedback
from onlinespec.drafters.contract import Drafter
from onlinespec.drafters.loading import load_drafter
from onlinespec.engine.step import Learning
from onlinespec.experiments.provenance import provenance
from onlinespec.learning.budget import Budget, StepMeter
from onlinespec.learning.learner_spec import parse_learner
from onlinespec.learning.settings import LearnConfig
from onlinespec.learning.update import InlineLearning
from onlinespec.models.loading import load_target
from onlinespec.offline.replay_stream import Replaying, record
from onlinespec.publishing.settings import PublishConfig
from onlinespec.publishing.trainer import Trainer
from onlinespec.workloads import load_workload


@dataclass(frozen=True)
class Gate:
    """Replay a stream through learning, with its gate and without."""

    target: str = "demo"
    drafter: str = "demo"
    data: tuple[str, ...] = ("builtin:prose", "builtin:code", "builtin:sql", "builtin:arithmetic", "builtin:prose")
    num_requests: tuple[int, ...] = (16, 50, 80, 80, 48)
    max_tokens: int = 64
    num_draft_tokens: int = 4
    learner: str = LearnConfig.learner
    budget: float = 0.24
    """Of decoding, in steps."""
    looks: tuple[int, ...] = PublishConfig().test_looks
    show: bool = False
    """What became of every candidate."""
    seed: int = 0
    out: Path | None = None


class Gated:
    """Beside the drafter that serves: a trainer, whose versions it takes over."""

    diagnostic_seconds = 0.0

    def __init__(self, command: Gate, serving: Drafter, learning: Drafter, config: LearnConfig) -> None:
        publishing = replace(PublishConfig(), test_looks=command.looks)
        self.trainer = Trainer(learning, config, command.seed, budget_of(config), publishing)
        self._serving, self._show, self.num_published = serving, command.show, 0

    def offer(self, feedback: Sequence[Feedback]) -> None:
        publisher, before = self.trainer.publisher, self.trainer.publisher.num_events
        if weights := self.trainer.offer(feedback):
            self._serving.swap(weights)
            self.num_published += 1
        if self._show and publisher.num_events > before:
            print(f"{feedback[0].request_id}: {publisher.history[-1].summary}")

    def set_share(self, share: float) -> None:
        """The budget is fixed here."""


def budget_of(config: LearnConfig) -> Budget:
    return Budget(config.budget, StepMeter(config.round_cost, config.row_cost, config.max_rows))


def main(command: Gate) -> None:
    """Tokens per step, by segment and arm."""
    torch.set_num_threads(1)
    target = load_target(command.target)
    params = GenerationParams(command.max_tokens, command.num_draft_tokens)
    stream = []
    for index, (data, count) in enumerate(zip(command.data, command.num_requests, strict=True)):
        prompts = islice(load_workload(data).prompts(command.seed + index), count)
        stream += [(f"{index} {data}", one) for one in record(target, prompts, params, command.seed)]

    def fresh() -> Drafter:
        return load_drafter(command.drafter, target, command.seed)

    config = replace(parse_learner(command.learner), budget=command.budget)
    inline, serving = fresh(), fresh()
    gated = Gated(command, serving, fresh(), config)
    arms: dict[str, tuple[Drafter, Learning | None]] = {
        "frozen": (fresh(), None),
        "inline": (inline, InlineLearning(inline, config=config, seed=command.seed)),
        "gated": (serving, gated),
    }
    counts: dict[str, list[DecodeStats]] = {}
    for name, (drafter, learning) in arms.items():
        replaying = Replaying(target, drafter, learning, command.num_draft_tokens)
        counts[name] = [replaying.replay(one) for _, one in stream]
    rows: list[dict[str, object]] = []
    for segment in dict.fromkeys(segment for segment, _ in stream):
        places = [i for i, (where, _) in enumerate(stream) if where == segment]
        for part, chosen in (("all", places), ("last third", places[-(len(places) // 3) :])):
            rows.append({"segment": segment, "part": part, **{name: length(counts[name], chosen) for name in arms}})
    kinds = [event.kind for event in gated.trainer.publisher.history]
    rows.append({kind: kinds.count(kind) for kind in dict.fromkeys(kinds)})
    for row in rows:
        print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    if command.out:
        line = " ".join(["python", "benchmarks/gate.py", *sys.argv[1:]])
        told = provenance(line, command.target, command.drafter, target.fingerprint, asdict(command))
        command.out.write_text("\n".join(json.dumps(row, default=str) for row in (told, *rows)) + "\n")


def length(counts: Sequence[DecodeStats], chosen: Sequence[int]) -> float:
    """Acceptance length of some requests."""
    return sum((counts[i] for i in chosen), DecodeStats()).acceptance_length


if __name__ == "__main__":
    main(tyro.cli(Gate))
