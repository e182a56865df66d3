"""Background learning, the serving side: decoding puts Feedback in and takes new weights out, without waiting.

Learning runs in a thread (here) or a process (`learning_process.py`). Records go through a bounded queue, which drops
the oldest ones and counts them. A new version is swapped in by `offer`, which decoding calls between steps. If learning
fails (an exception, a NaN, a killed process), the drafter stays at the newest version received and one error is logged.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from onlinespec.core import DrafterWeights, Feedback
from onlinespec.drafters.loading import load_drafter
from onlinespec.drafters.settings import Tuning
from onlinespec.learning.budget import Budget, ClockMeter
from onlinespec.learning.settings import LearnConfig
from onlinespec.models.loading import Target
from onlinespec.publishing.settings import PublishConfig
from onlinespec.publishing.store import Versions
from onlinespec.publishing.trainer import StoreOptions, Trainer

log = logging.getLogger(__name__)

NO_STATISTICS: dict[str, Any] = {  # statistics before the first report
    "rounds": 0,
    "rows": 0,
    "left_out": 0,
    "loss": None,
    "interval": None,
    "drifts": 0,
    "undone": 0,
    "learner": {},
    "memory_bytes": 0,
    "memory_requests": 0,
    "unsaved": 0,
    "num_events": 0,
    "events": [],
    "has_canary": False,
    "share_spent": 0.0,
}


@dataclass(frozen=True)
class TrainerSpec:
    """Everything needed to create a `Trainer`, in a form that can be sent to another process.

    Args:
        drafter: Name or path, as for `load_drafter`. The trainer loads a drafter of its own, and gives it the weights
            that are served.
        learner: The learner spec that `config` was parsed from; stored with versions.
        config: Settings of the learning rounds.
        seed: Seed of a fresh drafter and of replay sampling.
        tuning: Which of the drafter's weights learn; None for its default.
        share: Share of elapsed time that learning may take; inf for no limit.
        niceness: Increment of a learning process's nice value, so that serving has priority where cores are scarce.
        publishing: Settings of the gate.
        versions: Folder to save versions in; empty to save none. If the served weights are the newest good version in
            that folder, learning continues from its saved state.
    """

    drafter: str
    learner: str = "online_gradient"
    config: LearnConfig = field(default_factory=LearnConfig)
    seed: int = 0
    tuning: Tuning | None = None
    share: float = 0.25
    niceness: int = 10
    publishing: PublishConfig = field(default_factory=PublishConfig)
    versions: str = ""

    def trainer(self, target: Target, serving: DrafterWeights, budget: Budget) -> Trainer:
        """Creates the trainer.

        Raises:
            FileNotFoundError, ValueError: as `load_drafter` and `Trainer`.
        """
        drafter = load_drafter(self.drafter, target, self.seed, self.tuning)
        origin = drafter.weights
        drafter.swap(serving)
        store = StoreOptions(Versions(self.versions), target.fingerprint, self.learner) if self.versions else None
        return Trainer(drafter, self.config, self.seed, budget, self.publishing, store, origin)


class BackgroundLearning(ABC):
    """Base class of learning that runs in a thread or a process beside decoding.

    Args:
        serving: The weights served now.
        publish: Callback that swaps a new version in, to draft with from the next step on. Called only within `offer`,
            by the decoding thread.
        queue_capacity: Capacity of the queue in records. When it is full, the oldest are dropped.
    """

    diagnostic_seconds = 0.0

    def __init__(
        self, serving: DrafterWeights, publish: Callable[[DrafterWeights], None], queue_capacity: int = 4096
    ) -> None:
        self._version, self._take_over, self._queue_capacity = serving.version, publish, queue_capacity
        self._waiting: deque[Feedback] = deque()
        self._changed = threading.Condition()  # guards the attributes below
        self._newest: DrafterWeights | None = None
        self._is_stopping = False
        self._statistics: dict[str, Any] = NO_STATISTICS | {"published": serving.version}
        self.num_dropped = self.num_offered = 0
        self.num_published = 0
        self.failure = ""  # why learning has stopped; empty while it runs

    # --- for decoding -------------------------------------------------------------------------------------------

    def offer(self, feedback: Sequence[Feedback]) -> None:
        """Queues a step's records, and swaps in a version that arrived since the last call. Never raises."""
        with self._changed:
            newest, self._newest = self._newest, None
            if not self.failure:
                self._waiting.extend(feedback)
                self.num_offered += len(feedback)
                while len(self._waiting) > self._queue_capacity:
                    self._waiting.popleft()
                    self.num_dropped += 1
                self._changed.notify_all()
        if newest and newest.version != self._version:
            try:
                self._take_over(newest)
            except Exception as error:  # serving goes on with the old version
                self._fail(f"version {newest.version} could not be taken over, {type(error).__name__}: {error}")
                return
            self._version = newest.version
            self.num_published += 1

    def statistics(self) -> dict[str, Any]:
        """Returns the trainer's statistics and the queue's counters, for the live page and the metrics."""
        with self._changed:
            return {
                **self._statistics,
                "weights_version": self._version,
                "waiting": len(self._waiting),
                "offered": self.num_offered,
                "dropped": self.num_dropped,
                "swaps": self.num_published,
                "failure": self.failure,
            }

    @abstractmethod
    def start(self) -> None:
        """Starts learning."""

    @abstractmethod
    def set_share(self, share: float) -> None:
        """Caps training and evaluation time, as a share of elapsed time.

        In process mode the cap applies only after updates stop helping. A process takes no time from decoding, and
        when drafting is switched off because it does not help, learning is what makes it useful again.
        """

    @abstractmethod
    def stop(self, seconds: float = 10.0) -> None:
        """Stops learning, and waits up to `seconds` for the work in progress."""

    # --- for background threads ---------------------------------------------------------------------------------

    def _take(self) -> list[Feedback]:
        """Waits for records and takes all that are queued. Returns an empty list when it is time to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_stopping)
            taken = [] if self._is_stopping else list(self._waiting)
            self._waiting.clear()
        return taken

    def _offer_version(self, weights: DrafterWeights) -> None:
        with self._changed:
            self._newest = weights

    def _fail(self, reason: str) -> None:
        """Marks learning as stopped, and logs the reason once."""
        with self._changed:
            if self.failure or self._is_stopping:
                return
            self.failure = reason
            self._waiting.clear()
        log.error(
            "learning stopped (%s); the drafter stays at weights version %d and serving goes on",
            reason, self._version,
        )  # fmt: skip

    def _end(self) -> None:
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()


class ThreadLearning(BackgroundLearning):
    """Learning in a thread of the serving process, on the target's device.

    Args:
        spec: How to create the trainer. For the rest see `BackgroundLearning`.

    Raises:
        FolderLocked: if another writer holds the spec's versions folder.
        FileNotFoundError, ValueError: as `TrainerSpec.trainer`.
    """

    def __init__(
        self,
        target: Target,
        spec: TrainerSpec,
        serving: DrafterWeights,
        publish: Callable[[DrafterWeights], None],
        queue_capacity: int = 4096,
    ) -> None:
        super().__init__(serving, publish, queue_capacity)
        self._budget = Budget(spec.share, ClockMeter(taken=time.thread_time))
        self._share_spent = 0.0
        self.trainer = spec.trainer(target, serving, self._budget)
        self._thread = threading.Thread(target=self._run, name="onlinespec-learning", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def set_share(self, share: float) -> None:
        self._budget.set_share(share)

    def statistics(self) -> dict[str, Any]:
        self._statistics = self.trainer.statistics() | {"share_spent": self._share_spent}
        return super().statistics()

    def stop(self, seconds: float = 10.0) -> None:
        self._end()
        if self._thread.ident:
            self._thread.join(seconds)
        if not self._thread.is_alive():  # otherwise it may still be writing a version
            self.trainer.close()

    def _run(self) -> None:
        torch.get_num_threads()  # this call sets the thread's own thread count; see `Engine._run`
        self._budget.begin()
        try:
            while records := self._take():
                for record in records:  # one at a time: each may trigger a round
                    if published := self.trainer.offer([record]):
                        self._offer_version(published)
                self._share_spent = self._budget.share_spent
                if reason := self.trainer.failure:
                    return self._fail(reason)
        except Exception as error:  # no failure of learning may reach serving
            self._fail(f"{type(error).__name__}: {error}")
