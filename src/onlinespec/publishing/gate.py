"""Which weights are served: a candidate must draft better than they do, and is taken back if it turns out not to.

How two sets of weights are compared: `publishing/paired.py`. Single-threaded.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from datetime import UTC, datetime

import torch

from onlinespec.core import DrafterWeights, Feedback, Params
from onlinespec.drafters.contract import Drafter
from onlinespec.learners.geometry import is_finite
from onlinespec.publishing.paired import HealthCheck, PairedTest, RequestOrder
from onlinespec.publishing.protocol import Event, EventKind, Paired
from onlinespec.publishing.settings import PublishConfig

log = logging.getLogger(__name__)

_FAIR_TRIAL = 8  # requests, after which a newer candidate may take the place of one that is neither better nor worse
_STAY = 24  # requests, from one comparison with what learning began with to the next
_MOST_EVENTS = 1000  # kept in memory
_NOT_FINITE = "the candidate's weights are not finite"


class Publisher:
    """What is served, what was served before, and how it came to that.

    Feedback goes in by `offer`, candidates by `propose`; `check` says what to serve from now on. Versions are numbered
    upwards and no number is given twice: a rollback is a new version with the old weights.
    Never raises for weights that are not finite.

    Args:
        drafter: Its rows are asked for, with weights given; what it drafts with is left alone.
        served: What is served now; the drafter's own weights by default.
        next_version: The first number that was never used; `Versions.next_version` knows it after a restart.
        origin: What learning began with, which is never given up for good; what is served by default.
        promoted: How the served version came to be, if it is still to be watched after a restart ...
        previous: ... and the weights that it is to be compared with.
    """

    def __init__(
        self,
        drafter: Drafter,
        config: PublishConfig | None = None,
        served: DrafterWeights | None = None,
        next_version: int | None = None,
        origin: DrafterWeights | None = None,
        promoted: Event | None = None,
        previous: DrafterWeights | None = None,
    ) -> None:
        self.config = config or PublishConfig()
        self._drafter = drafter
        self.served = served or drafter.weights
        self.next_version = self.served.version + 1 if next_version is None else next_version
        if self.next_version <= self.served.version:
            raise ValueError(
                f"next_version is {self.next_version}, but version {self.served.version} is served already; "
                "give a number that was never used"
            )
        self.previous: DrafterWeights | None = None  # good, as far as known: what a rollback goes back to
        self._order = RequestOrder()
        self._since = 0  # requests that had begun when what is served was made
        self._origin = origin or self.served
        self._is_origin = _equal(self.served.params, self._origin.params)  # what is served
        self._fallback: PairedTest | None = None  # to what learning began with
        self._stay = 0  # requests until the next
        self._has_moved = False  # the traffic, since what is served was published
        self._paired_test: PairedTest | None = None
        self._canary: PairedTest | None = None
        self._health_check: HealthCheck | None = None
        self._num_refused = 0  # since the last promotion
        self._pause = 0  # requests until the next trial
        self._events: deque[Event] = deque(maxlen=_MOST_EVENTS)
        self.num_events = 0  # ever
        if promoted and previous and promoted.kind == "promoted":
            self._begin_canary(previous)

    @property
    def history(self) -> tuple[Event, ...]:
        """What happened since the start, the oldest first."""
        return tuple(self._events)

    @property
    def is_watching(self) -> bool:
        """Whether the served version may still be rolled back."""
        return self._canary is not None

    @property
    def wants_candidate(self) -> bool:
        """Whether a trial may begin: none is under way, and after one that was refused some time has passed."""
        return self._paired_test is None and self._pause <= 0

    def offer(self, records: Sequence[Feedback]) -> None:
        """Takes what was served."""
        for record in records:
            self._order.number_of(record)
        num_ended = sum(record.is_last for record in records)
        self._pause -= num_ended
        self._stay -= num_ended
        if self._may_go_back and not self._fallback and self._stay <= 0:
            self._fallback = self._against(self._origin.params, self.config.test_looks[:2], self._since)
        for judge in (self._paired_test, self._fallback, self._canary, self._health_check):
            if judge:
                judge.offer(records)

    @property
    def is_undecided(self) -> bool:
        """Whether a candidate had its chance and was found neither better nor worse, so that its trial goes on."""
        return self._paired_test is not None and self._paired_test.num_requests >= _FAIR_TRIAL

    def propose(self, candidate: Params) -> None:
        """Begins a trial of a candidate, in place of one that is on trial, unless its weights are not finite.

        Raises:
            ValueError: if its tensors are not those of what is served.
        """
        _check_alike(self.served.params, candidate)
        if is_finite(candidate):
            self._paired_test = self._against(candidate, self.config.test_looks, self._order.num_begun)
        elif not self._events or self._events[-1].reason != _NOT_FINITE:  # once, however often it is offered
            self._refuse(_NOT_FINITE)

    def begin_anew(self) -> None:
        """The traffic has moved: what is on trial was not made for it, and refusals were of another time."""
        self._paired_test, self._num_refused, self._pause = None, 0, 0
        self._has_moved, self._fallback, self._stay = True, None, 0

    def check(self) -> DrafterWeights | None:
        """A new version to serve, if there is one: a candidate that drafts better, or an older one again."""
        return self._check_canary() or self._check_fallback() or self._check_paired_test()

    def _against(self, other: Params, looks: Sequence[int], since: int, version: int | None = None) -> PairedTest:
        """A trial of other weights against those that are served, on the requests that began since then."""
        return PairedTest(self._drafter, self.served.params, other, looks, self.config, self._order, since, version)

    def _check_paired_test(self) -> DrafterWeights | None:
        figures = self._paired_test.look() if self._paired_test else None
        if not self._paired_test or not figures:
            return None
        if figures.is_other_better:
            previous = self.served if self.previous is None or not self._canary else self.previous
            parent, self._since = self.served.version, self._paired_test.since
            self._serve(self._paired_test.other)
            self._note("promoted", _compared(figures, "the candidate", "better"), figures, parent)
            self._begin_canary(previous)
            self._num_refused = 0
            return self.served
        if figures.is_served_better or self._paired_test.is_over:
            verdict = "worse" if figures.is_served_better else "no better"
            self._refuse(_compared(figures, "the candidate", verdict), figures)
        return None

    def _refuse(self, reason: str, figures: Paired | None = None) -> None:
        self._note("refused", reason, figures)
        self._paired_test = None
        self._pause = min(8 * self._num_refused, self.config.most_pause)
        self._num_refused += 1

    def _check_canary(self) -> DrafterWeights | None:
        """The weights before, as a new version, if the one promoted is worse."""
        if not self._canary or not self._health_check:
            return None
        figures = self._canary.look()
        if reason := self._health_check.reason(self._canary.served_acceptance_prob):
            return self._roll_back(reason)
        if figures and figures.is_other_better:
            return self._roll_back(_compared(figures, "the version before", "better"), figures)
        if figures and (figures.is_served_better or self._canary.is_over):
            verdict = "worse" if figures.is_served_better else "no better"
            self._note("confirmed", _compared(figures, "the version before", verdict), figures)
            self._canary = self._health_check = None
        return None

    @property
    def _may_go_back(self) -> bool:
        """Whether what is served is to be compared with what learning began with.

        A watch may do so already, and longer; unless the traffic has moved meanwhile, which makes its evidence old.
        """
        is_watched = self._canary is not None and self.previous is self._origin
        return not self._is_origin and (self._has_moved or not is_watched)

    def _check_fallback(self) -> DrafterWeights | None:
        """What learning began with, as a new version, if it drafts better: old traffic may have come back."""
        figures = self._fallback.look() if self._fallback else None
        if not self._fallback or not figures:
            return None
        if figures.is_other_better:
            parent = self.served.version
            self._serve(self._origin.params)
            reason = _compared(figures, f"version {self._origin.version}", "better")
            self._note("returned", reason, figures, parent, self._origin.version)
            self.previous = self._canary = self._health_check = None
            return self.served
        if figures.is_served_better or self._fallback.is_over:
            self._fallback, self._stay = None, _STAY
        return None

    def _begin_canary(self, previous: DrafterWeights) -> None:
        """Of what is served against the newest version that is not itself still watched."""
        self.previous, version = previous, self.served.version
        self._health_check = HealthCheck(version, self._order, self._since)
        self._canary = self._against(previous.params, self.config.canary_looks, self._since, version)

    def _roll_back(self, reason: str, figures: Paired | None = None) -> DrafterWeights:
        assert self.previous is not None
        bad, restored = self.served, self.previous
        self._serve(restored.params)
        self._note("rolled back", reason, figures, bad.version, restored.version)
        self.previous = self._canary = self._health_check = None
        return self.served

    def _serve(self, params: Params) -> None:
        self.served = DrafterWeights(params, self.next_version)
        self.next_version += 1
        self._paired_test = self._fallback = None  # against what is served no more
        self._is_origin, self._has_moved, self._stay = _equal(params, self._origin.params), False, 0

    def _note(
        self,
        kind: EventKind,
        reason: str,
        figures: Paired | None = None,
        parent: int | None = None,
        restores: int | None = None,
    ) -> None:
        at = datetime.now(UTC).isoformat(timespec="seconds")
        event = Event(
            kind=kind, at=at, version=self.served.version, parent=parent, restores=restores, reason=reason,
            paired=figures,
        )  # fmt: skip
        self._events.append(event)
        self.num_events += 1
        log.log(logging.WARNING if kind == "rolled back" else logging.INFO, "%s", event.summary)


def started(version: int) -> Event:
    """What is noted of the first version in a folder."""
    at = datetime.now(UTC).isoformat(timespec="seconds")
    return Event(kind="started", at=at, version=version)


def _compared(figures: Paired, other: str, verdict: str) -> str:
    """A judgement in words."""
    return (
        f"{other} is {verdict}: acceptance length {figures.other_length:.3f}, served {figures.served_length:.3f}, "
        f"difference {figures.difference:+.3f} ± {figures.standard_error:.3f} on {figures.num_requests} requests, "
        f"judged at {figures.level:.2g}"
    )


def _equal(one: Params, other: Params) -> bool:
    """Whether the numbers are the same."""
    is_alike = one.keys() == other.keys()
    return one is other or (is_alike and all(torch.equal(tensor, other[name]) for name, tensor in one.items()))


def _check_alike(served: Params, candidate: Params) -> None:
    """Raises ValueError naming the first tensor that differs in more than its numbers."""
    shapes = [{name: (tuple(p.shape), p.dtype) for name, p in params.items()} for params in (served, candidate)]
    for name in sorted({*shapes[0], *shapes[1]}):
        ours, theirs = (shape.get(name, "no such tensor") for shape in shapes)
        if ours != theirs:
            raise ValueError(
                f"{name} is {theirs} in the candidate and {ours} in what is served; a candidate must come from the "
                "drafter that is served, under the same --tune"
            )
