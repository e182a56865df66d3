"""The learning end: records of Feedback in, weights worth serving out. Knows neither who serves nor where it runs.

Learning moves a drafter of its own and goes on whatever is served. Every so often its weights are proposed; what is
better on requests that came afterwards is published, watched, and taken back if it disappoints (`publish.py`).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

from onlinespec.cadence import ClockBudget
from onlinespec.config import LearnConfig, PublishConfig
from onlinespec.core import DrafterWeights, Feedback
from onlinespec.drafters.base import Drafter
from onlinespec.learn import InlineLearning
from onlinespec.publish import Publisher


class Trainer:
    """Learns with a drafter of its own, and says what to serve.

    Args:
        drafter: Of the kind that serves, with its weights. It is never asked for a draft.
        budget: Of time; kept by whatever clock it has.
    """

    def __init__(
        self,
        drafter: Drafter,
        config: LearnConfig | None = None,
        seed: int = 0,
        budget: ClockBudget | None = None,
        publishing: PublishConfig | None = None,
    ) -> None:
        drafter.drafts = False
        self._drafter = drafter
        self.publisher = Publisher(drafter, publishing)
        self.learning = InlineLearning(drafter, config=config, seed=seed, budget=budget, on_failure=self._fail)
        self._proposed = self.learning.num_rounds  # when a candidate was last proposed
        self._heard: dict[int, int] = {}  # tokens of each text, by the id of a trace that others keep alive
        self.failure = ""  # why nothing is learned any more

    def offer(self, records: Sequence[Feedback]) -> DrafterWeights | None:
        """Takes what was served, learns if it is time, and returns a version to serve from now on, if there is one."""
        for record in records:
            self._hear(record)
        self.publisher.offer(records)
        self.learning.offer(records)
        if self.publisher.wants_candidate and self.learning.num_rounds > self._proposed:
            self._proposed = self.learning.num_rounds
            self.publisher.propose(self._drafter.weights.params)
        version = self.publisher.check()
        if version and self.publisher.history[-1].kind == "rolled back":
            self.learning.restart(version.params)
        return version

    def figures(self) -> dict[str, Any]:
        """How it fares, in plain numbers and words."""
        learning, memory = self.learning, self.learning.replay
        return {
            "rounds": learning.num_rounds,
            "rows": learning.num_rows,
            "loss": None if math.isnan(learning.last_loss) else learning.last_loss,
            "interval": learning.cadence.interval,
            "memory_bytes": memory.num_bytes if memory else 0,
            "memory_requests": len(memory) if memory else 0,
            "published": self.publisher.served.version,
            "is_watching": self.publisher.is_watching,
            "failure": self.failure,
        }

    def close(self) -> None:
        """Serving is over."""

    def _hear(self, record: Feedback) -> None:
        """Lets the drafter know of the tokens, as the one that serves does."""
        trace, end = record.trace, record.start + record.num_rows + 1
        if id(trace) not in self._heard:
            weakref.finalize(trace, self._heard.pop, id(trace), None).atexit = False
            self._heard[id(trace)] = record.start + 1
            self._drafter.hear(trace.token_ids[: record.start + 1], is_start=True)
        self._drafter.hear(trace.token_ids[self._heard[id(trace)] : end], is_start=False)
        self._heard[id(trace)] = end

    def _fail(self, reason: str) -> None:
        self.failure = reason
