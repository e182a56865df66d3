"""What a round costs: the update of each learner against online gradient's, on the same rows, interleaved.

    python benchmarks/rounds.py [--repeats 31]

All learn from the same steps, those of one frozen drafter on the target's own answers, so their rounds have the same
rows and come one after the other; the first ones are not counted. Times are medians, ratios medians of ratios round by
round with their quartiles, so that a machine whose speed drifts hurts all alike.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import tyro

from onlinespec.config import GenerationParams
from onlinespec.core import Feedback
from onlinespec.drafters.loading import load_drafter
from onlinespec.experiments.provenance import provenance
from onlinespec.learning.learner_spec import parse_learner
from onlinespec.learning.settings import LearnConfig
from onlinespec.learning.update import InlineLearning
from onlinespec.models.loading import load_target
from onlinespec.offline.replay_stream import Replaying, record
from onlinespec.workloads import load_workload

METHODS = (
    "online_gradient",
    "optimistic",
    "momentum",
    "ensemble/step_size_pool=3e-4:1e-3",
    "ensemble",
    "ensemble/with_frozen=true",
    "ensemble/step_size_pool=1e-4:3e-4:1e-3:3e-3:1e-2",
    "surrogate_ensemble",
    "reset_to_merged",
)


@dataclass(frozen=True)
class Rounds:
    """Time rounds."""

    target: str = "demo"
    drafter: str = "demo"
    data: str = "builtin:sql"
    rows: int = 48
    repeats: int = 31
    out: Path | None = None


class Timed(InlineLearning):
    """Learning that keeps the time of each round."""

    def __init__(self, *arguments: object, **settings: object) -> None:
        super().__init__(*arguments, **settings)  # type: ignore[arg-type]
        self.seconds: list[float] = []

    def _round(self) -> None:
        began = time.perf_counter()
        super()._round()
        self.seconds.append(time.perf_counter() - began)


class Together:
    """Several learnings that hear of the same steps."""

    diagnostic_seconds = 0.0

    def __init__(self, learnings: Sequence[InlineLearning]) -> None:
        self._learnings = learnings

    def offer(self, feedback: Sequence[Feedback]) -> None:
        for learning in self._learnings:
            learning.offer(feedback)


def run(options: Rounds) -> None:
    """Prints a table, and adds a line of JSON to `out`."""
    torch.set_num_threads(1)
    target = load_target(options.target)
    prompts = islice(load_workload(options.data).prompts(0), 2 + options.repeats // 2)
    answers = list(record(target, prompts, GenerationParams(96)))
    config = LearnConfig(max_rows=options.rows, min_interval=24, max_interval=24, replay_every=0, budget=float("inf"))
    runs = {m: Timed(load_drafter(options.drafter, target), config=parse_learner(m, config)) for m in METHODS}
    replaying = Replaying(target, load_drafter(options.drafter, target), Together(list(runs.values())), 2)
    for answer in answers:
        replaying.replay(answer)
    base = runs["online_gradient"].seconds
    figures = {}
    for method, learning in runs.items():
        pairs = list(zip(learning.seconds, base, strict=False))[2:]
        ratios = sorted(one / other for one, other in pairs)
        figures[method] = {
            "milliseconds": 1e3 * statistics.median(one for one, _ in pairs),
            "ratio": statistics.median(ratios),
            "quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
            "rounds": len(pairs),
        }
        row = figures[method]
        low, high = row["quartiles"]
        print(f"{method:55s} {row['milliseconds']:6.1f} ms {row['ratio']:5.2f} [{low:.2f}–{high:.2f}]")
    if options.out:
        said = provenance(" ".join(sys.argv), options.target, options.drafter, target.fingerprint, {})
        with options.out.open("a") as lines:
            lines.write(json.dumps({"rounds": figures, "rows": options.rows, "provenance": said}) + "\n")


if __name__ == "__main__":
    run(tyro.cli(Rounds))
