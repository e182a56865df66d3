"""The trainer: takes Feedback, runs learning rounds, and returns weights to serve. Independent of thread or process.

Learning updates a drafter of its own, whatever is served. Its weights are proposed to the gate from time to time. If
they draft better on later requests they are published, and rolled back if they turn out worse (`publishing/gate.py`).
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
_ROUNDS_NEWER = 4  # after so many more rounds, newer weights replace a candidate whose test is undecided


@dataclass(frozen=True)
class StoreOptions:
    """Where versions are saved, and what is recorded with them.

    Args:
        versions: The store.
        target_fingerprint: Fingerprint of the served target.
        learner: The learner spec; see `parse_learner`. If a saved version has a different one, its weights are used but
            not its learner state.
    """

    versions: Versions
    target_fingerprint: str
    learner: str


class Trainer:
    """Learns with a drafter of its own, and decides through the gate which weights to serve.

    Args:
        drafter: A drafter like the serving one, with the served weights. It is never asked for a draft.
        config: Settings of the learning rounds.
        seed: Seed of replay sampling.
        budget: What learning may cost; by default counted in work, as `config` says.
        publishing: Settings of the gate.
        store: Where versions are saved; None to save none.
        origin: The weights that learning began with, if the drafter's weights are later ones.

    Raises:
        FolderLocked: if another writer holds the versions folder.
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
        self._num_drifts = 0  # drifts detected so far
        self._num_observed: dict[int, int] = {}  # tokens counted of each text, by id(trace)
        self.failure = ""  # why learning has stopped; empty while it runs

    def offer(self, records: Sequence[Feedback]) -> DrafterWeights | None:
        """Takes Feedback, runs a learning round if one is due, and returns a new version to serve, if there is one."""
        before = self.publisher.num_events
        if vocab := self._drafter.draft_vocab:
            for record in records:
                self._observe_tokens(vocab, record)
        records = self.learning.finite.of(records)
        self.publisher.offer(records)
        # rounds and comparisons take turns: under a tight budget either could use up all of it
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
        """Advances the gate's tests if the budget allows, and returns a new version to serve, if there is one."""
        if not self.learning.budget.has_room_to_compare():
            return None
        self._judged = self.learning.num_rounds
        version = self.publisher.check()
        self.learning.budget.spend()
        return version

    def _propose(self) -> None:
        """Proposes the newest weights if a test may start, or if they are 4 rounds newer than an undecided candidate.

        After a drift the next candidate comes 4 rounds later, so that it has learned from the new traffic.
        """
        learning = self.learning
        if learning.schedule.num_drifts > self._num_drifts:
            self._num_drifts = learning.schedule.num_drifts
            self._proposed = learning.num_rounds + _ROUNDS_AFTER_DRIFT - 1
            self.publisher.on_drift()
        num_newer = learning.num_rounds - self._proposed
        is_outdated = self.publisher.is_undecided and num_newer >= _ROUNDS_NEWER
        if is_outdated or (self.publisher.wants_candidate and num_newer > 0):
            self._proposed = learning.num_rounds
            self.publisher.propose(self.learning.settled)

    def close(self) -> None:
        """Releases the versions folder. `offer` must not be called afterwards."""
        if self._store:
            self._store.versions.close()

    def statistics(self) -> dict[str, Any]:
        """Returns statistics of learning and of the gate, as numbers, strings, lists and dicts."""
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
            "has_canary": self.publisher.has_canary,
            "failure": self.failure,
        }

    def _resumed(self, publishing: PublishConfig | None, origin: DrafterWeights | None) -> Publisher:
        """Creates the gate, and continues from the saved learner state if the newest good version is the served one.

        Otherwise the served weights are saved as the first version.
        """
        assert self._store
        served, versions = self._drafter.weights, self._store.versions
        with suppress(OSError):  # reported when saving the first version fails
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
            previous=versions.canary_reference(found),
        )

    def _keep(self, store: StoreOptions, events: Sequence[Event], version: DrafterWeights | None) -> None:
        """Saves events and the new version. If that fails it is logged, and the version is served anyway."""
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
        """Counts a record's new tokens for the draft vocabulary, each once, as the serving drafter does."""
        trace, end = record.trace, record.start + record.num_rows + 1
        if id(trace) not in self._num_observed:
            weakref.finalize(trace, self._num_observed.pop, id(trace), None).atexit = False
            self._num_observed[id(trace)] = record.start + 1
            vocab.begin_request(trace.token_ids[: record.start + 1])
        vocab.observe_tokens(trace.token_ids[self._num_observed[id(trace)] : end])
        self._num_observed[id(trace)] = end

    def _fail(self, reason: str) -> None:
        self.failure = reason
