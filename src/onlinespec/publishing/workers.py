"""Learning beside serving, in a thread or a process of its own: serving puts records in and takes versions out.

Nothing here waits for learning. Records go through a bounded queue that drops the oldest and counts them; a new version
is taken over in `offer`, which decoding calls between steps. Whatever becomes of the learner (an exception, a NaN, a
killed process), the drafter stays at the newest version that came, and it is said once.
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

NO_FIGURES: dict[str, Any] = {  # before the first report
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
    "is_watching": False,
    "share_spent": 0.0,
}


@dataclass(frozen=True)
class TrainerSpec:
    """How a trainer is made: a drafter of its own, like the one that serves, and how it learns.

    Args:
        drafter: Name or path, as for `load_drafter`; the weights that serve take the place of its own.
        share: Of the time that passes, learning may take this much.
        niceness: Of a process that learns: where cores are short, serving goes first.
        learner: The line that `config` was read from; noted with versions.
        versions: Folder to keep versions in; empty to keep none. Learning goes on from the newest good one there if
            that is what serves.
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
        """Raises as `load_drafter`."""
        drafter = load_drafter(self.drafter, target, self.seed, self.tuning)
        origin = drafter.weights
        drafter.swap(serving)
        store = StoreOptions(Versions(self.versions), target.fingerprint, self.learner) if self.versions else None
        return Trainer(drafter, self.config, self.seed, budget, self.publishing, store, origin)


class BackgroundLearning(ABC):
    """What decoding sees of learning that runs beside it.

    Args:
        serving: The weights that serve now.
        publish: Takes over a version to serve from the next step on; called in `offer`, and nowhere else.
        most_waiting: Records in the queue; of more the oldest are dropped.
    """

    diagnostic_seconds = 0.0

    def __init__(
        self, serving: DrafterWeights, publish: Callable[[DrafterWeights], None], most_waiting: int = 4096
    ) -> None:
        self._version, self._take_over, self._most_waiting = serving.version, publish, most_waiting
        self._waiting: deque[Feedback] = deque()
        self._changed = threading.Condition()  # guards what is shared below
        self._newest: DrafterWeights | None = None
        self._is_stopping = False
        self._figures: dict[str, Any] = NO_FIGURES | {"published": serving.version}
        self.num_dropped = self.num_offered = 0
        self.num_published = 0
        self.failure = ""  # why nothing is learned any more

    # --- for decoding -------------------------------------------------------------------------------------------

    def offer(self, feedback: Sequence[Feedback]) -> None:
        """Takes a step's records, and takes over a version that came since the last one."""
        with self._changed:
            newest, self._newest = self._newest, None
            if not self.failure:
                self._waiting.extend(feedback)
                self.num_offered += len(feedback)
                while len(self._waiting) > self._most_waiting:
                    self._waiting.popleft()
                    self.num_dropped += 1
                self._changed.notify_all()
        if newest and newest.version != self._version:
            try:
                self._take_over(newest)
            except Exception as error:  # a version that can't be taken over is not served, and serving goes on
                self._fail(f"version {newest.version} could not be taken over, {type(error).__name__}: {error}")
                return
            self._version = newest.version
            self.num_published += 1

    def statistics(self) -> dict[str, Any]:
        """How learning fares, for a page and for metrics."""
        with self._changed:
            return {
                **self._figures,
                "weights_version": self._version,
                "waiting": len(self._waiting),
                "offered": self.num_offered,
                "dropped": self.num_dropped,
                "swaps": self.num_published,
                "failure": self.failure,
            }

    @abstractmethod
    def start(self) -> None:
        """Begins to learn."""

    @abstractmethod
    def set_share(self, share: float) -> None:
        """Rounds and comparisons may take this share of time from now on; in a process, once rounds bring nothing.

        A process takes no time from decoding, and what is learned while drafts do not pay is what makes them pay again.
        """

    @abstractmethod
    def stop(self, seconds: float = 10.0) -> None:
        """Ends learning; what it has under way is given so many seconds."""

    # --- for the threads beside it ------------------------------------------------------------------------------

    def _take(self) -> list[Feedback]:
        """Waits for records, and takes all; none says that it is time to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_stopping)
            taken = [] if self._is_stopping else list(self._waiting)
            self._waiting.clear()
        return taken

    def _offer_version(self, weights: DrafterWeights) -> None:
        with self._changed:
            self._newest = weights

    def _fail(self, reason: str) -> None:
        """No more learning; said once."""
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
    """Learns in a thread of this process, on the target's own device.

    Raises:
        FolderTaken: if another one keeps its versions in the spec's folder.
    """

    def __init__(
        self,
        target: Target,
        spec: TrainerSpec,
        serving: DrafterWeights,
        publish: Callable[[DrafterWeights], None],
        most_waiting: int = 4096,
    ) -> None:
        super().__init__(serving, publish, most_waiting)
        self._budget = Budget(spec.share, ClockMeter(taken=time.thread_time))
        self._share_spent = 0.0
        self.trainer = spec.trainer(target, serving, self._budget)
        self._thread = threading.Thread(target=self._run, name="onlinespec-learning", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def set_share(self, share: float) -> None:
        self._budget.set_share(share)

    def statistics(self) -> dict[str, Any]:
        self._figures = self.trainer.statistics() | {"share_spent": self._share_spent}
        return super().statistics()

    def stop(self, seconds: float = 10.0) -> None:
        self._end()
        if self._thread.ident:
            self._thread.join(seconds)
        if not self._thread.is_alive():  # else it may be writing
            self.trainer.close()

    def _run(self) -> None:
        torch.get_num_threads()  # which sets this thread's; see `Engine._run`
        self._budget.begin()
        try:
            while records := self._take():
                for record in records:  # one by one: each may bring a round
                    if published := self.trainer.offer([record]):
                        self._offer_version(published)
                self._share_spent = self._budget.share_spent
                if reason := self.trainer.failure:
                    return self._fail(reason)
        except Exception as error:  # as in learn.py: nothing that fails here may reach serving
            self._fail(f"{type(error).__name__}: {error}")


# --- in the process ---------------------------------------------------------------------------------------------
