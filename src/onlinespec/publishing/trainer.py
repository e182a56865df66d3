"""The learning end: records of Feedback in, weights worth serving out. Knows neither who serves nor where it runs.

Learning moves a drafter of its own and goes on whatever is served. Every so often its weights are proposed; what is
better on requests that came afterwards is published, watched, and taken back if it disappoints (`publishing/gate.py`).
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgspec

from onlinespec.core import DrafterWeights, Feedback
from onlinespec.drafters.contract import Drafter
from onlinespec.drafters.draft_vocab import DraftVocab
from onlinespec.learning.budget import Budget
from onlinespec.learning.settings import LearnConfig
from onlinespec.learning.update import InlineLearning
from onlinespec.publishing.gate import Publisher, started
from onlinespec.publishing.protocol import Event
from onlinespec.publishing.settings import PublishConfig
from onlinespec.publishing.store import NotSaved, Versions

log = logging.getLogger(__name__)


_SHOWN_EVENTS = 50
_ROUNDS_AFTER_DRIFT = 4
_ROUNDS_NEWER = 4  # that make a candidate worth more than one which a look could not tell from what is served


@dataclass(frozen=True)
class StoreOptions:
    """Where versions go, and what is to be noted with them.

    Args:
        learner: The line of the learner; see `parse_learner`. Another one begins anew from the same weights.
    """

    versions: Versions
    target_fingerprint: str
    learner: str


class Trainer:
    """Learns with a drafter of its own, and says what to serve.

    Args:
        drafter: Of the kind that serves, with its weights. It is never asked for a draft.
        budget: Of time; kept by whatever clock it has.
        store: Where versions go; None to keep none.
        origin: What learning began with, if the drafter's weights are later ones.

    Raises:
        FolderTaken: if another one keeps its versions in the folder.
        ValueError: as `Versions.latest_good` and `Versions.resume`.
    """

    def __init__(
        self,
        drafter: Drafter,
        config: LearnConfig | None = None,
        seed: int = 0,
        budget: Budget | None = None,
        publishing: PublishConfig | None = None,
        store: StoreOptions | None = None,
        origin: DrafterWeights | None = None,
    ) -> None:
        drafter.drafts = False
        self._drafter, self._store = drafter, store
        self.num_unsaved = 0  # versions that could not be written
        self.learning = InlineLearning(drafter, config=config, seed=seed, budget=budget, on_failure=self._fail)
        try:
            self.publisher = (
                self._resumed(publishing, origin) if store else Publisher(drafter, publishing, origin=origin)
            )
        except BaseException:
            self.close()
            raise
        self._proposed = self.learning.num_rounds  # when a candidate was last proposed
        self._judged = self.learning.num_rounds  # when weights were last compared
        self._num_drifts = 0  # noticed so far
        self._num_observed: dict[int, int] = {}  # tokens of each text, by the id of a trace that others keep alive
        self.failure = ""  # why nothing is learned any more

    def offer(self, records: Sequence[Feedback]) -> DrafterWeights | None:
        """Takes what was served, learns if it is time, and returns a version to serve from now on, if there is one."""
        before = self.publisher.num_events
        if vocab := self._drafter.draft_vocab:
            for record in records:
                self._observe_tokens(vocab, record)
        records = self.learning.finite.of(records)
        self.publisher.offer(records)
        # where time is scarce, rounds and judging take turns: each alone could take all of it
        version = self._judge() if self.learning.num_rounds > self._judged else None
        self.learning.offer(records)
        if version is None:
            self._propose()
            version = self._judge()
        num_new = self.publisher.num_events - before
        events = self.publisher.history[-num_new:] if num_new else ()
        if version and events[-1].kind == "rolled back":
            self.learning.restart(version.params)
        if self._store:
            self._keep(self._store, events, version)
        return version

    def _judge(self) -> DrafterWeights | None:
        """A version to serve from now on, if there is time to compare and one drafts better."""
        if not self.learning.budget.has_room_to_compare():
            return None
        self._judged = self.learning.num_rounds
        version = self.publisher.check()
        self.learning.budget.spend()
        return version

    def _propose(self) -> None:
        """A candidate, when there is something new to it; after a drift one that has learned of it."""
        learning = self.learning
        if learning.schedule.num_drifts > self._num_drifts:
            self._num_drifts = learning.schedule.num_drifts
            self._proposed = learning.num_rounds + _ROUNDS_AFTER_DRIFT - 1
            self.publisher.begin_anew()
        num_newer = learning.num_rounds - self._proposed
        is_outdated = self.publisher.is_undecided and num_newer >= _ROUNDS_NEWER
        if is_outdated or (self.publisher.wants_candidate and num_newer > 0):
            self._proposed = learning.num_rounds
            self.publisher.propose(self.learning.settled)

    def close(self) -> None:
        """Lets others write to the folder of versions. Nothing is to be offered any more."""
        if self._store:
            self._store.versions.close()

    def statistics(self) -> dict[str, Any]:
        """How it fares, in plain numbers and words."""
        learning, memory = self.learning, self.learning.replay
        return {
            "rounds": learning.num_rounds,
            "rows": learning.num_rows,
            "left_out": learning.finite.num_left_out,
            "loss": None if math.isnan(learning.last_loss) else learning.last_loss,
            "interval": learning.schedule.interval,
            "drifts": learning.schedule.num_drifts,
            "undone": learning.num_undone,
            "learner": learning.report(),
            "memory_bytes": memory.num_bytes if memory else 0,
            "memory_requests": len(memory) if memory else 0,
            "published": self.publisher.served.version,
            "unsaved": self.num_unsaved,
            "num_events": self.publisher.num_events,
            "events": [msgspec.to_builtins(event) for event in self.publisher.history[-_SHOWN_EVENTS:]],
            "is_watching": self.publisher.is_watching,
            "failure": self.failure,
        }

    def _resumed(self, publishing: PublishConfig | None, origin: DrafterWeights | None) -> Publisher:
        """Goes on with what lies on disk, if that is what is served; else what is served is the first to be kept."""
        assert self._store
        served, versions = self._drafter.weights, self._store.versions
        with suppress(OSError):  # said when the first version can't be saved
            versions.hold()
        found = versions.latest_good(self._store.target_fingerprint)
        if found is None or found.version != served.version:
            next_version = max(served.version + 1, versions.next_version)
            publisher = Publisher(self._drafter, publishing, next_version=next_version, origin=origin)
            self._keep(self._store, [started(served.version)], served)
            return publisher
        state, served = versions.resume(found, self._drafter, self._store.learner), self._drafter.weights
        if state is not None:
            self.learning.resume(state)
        return Publisher(
            self._drafter,
            publishing,
            served=served,
            next_version=versions.next_version,
            origin=origin,
            promoted=found.event,
            previous=versions.watched(found),
        )

    def _keep(self, store: StoreOptions, events: Sequence[Event], version: DrafterWeights | None) -> None:
        """Writes down what happened; a version that can't be written is served all the same, and the next one tried."""
        versions = store.versions
        try:
            for event in events[:-1] if version else events:
                versions.note(event)
            if version:
                versions.save(
                    self._drafter,
                    version,
                    events[-1],
                    store.target_fingerprint,
                    store.learner,
                    self.learning.state,
                )
        except (NotSaved, ValueError) as error:
            log.log(logging.DEBUG if self.num_unsaved else logging.ERROR, "%s; this is said once", error)
            self.num_unsaved += 1

    def _observe_tokens(self, vocab: DraftVocab, record: Feedback) -> None:
        """The tokens of a text, each once, as the drafter that serves counts them."""
        trace, end = record.trace, record.start + record.num_rows + 1
        if id(trace) not in self._num_observed:
            weakref.finalize(trace, self._num_observed.pop, id(trace), None).atexit = False
            self._num_observed[id(trace)] = record.start + 1
            vocab.begin_request(trace.token_ids[: record.start + 1])
        vocab.observe_tokens(trace.token_ids[self._num_observed[id(trace)] : end])
        self._num_observed[id(trace)] = end

    def _fail(self, reason: str) -> None:
        self.failure = reason
