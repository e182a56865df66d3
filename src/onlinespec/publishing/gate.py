"""The gate between learning and serving: promotes candidates that draft better, rolls back those that don't.

`publishing/paired.py` compares two sets of weights. Nothing here is thread-safe: call it from one thread.
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

_MIN_TEST_REQUESTS = 8  # requests after which a newer candidate may replace one whose test is still undecided
_FALLBACK_INTERVAL = 24  # requests between two comparisons with the origin weights
_MOST_EVENTS = 1000  # events kept in memory
_NOT_FINITE = "the candidate's weights are not finite"


class Publisher:
    """Decides which weights are served, by paired tests of candidate, served and origin weights.

    `offer` takes Feedback, `propose` takes a candidate, and `check` returns a new version to serve if there is one.
    Version numbers only grow and are never reused: a rollback is a new version with the old weights. Weights that are
    not finite are refused without an exception.

    Three tests may run at once: the paired test of a candidate against the served weights; the canary test of a
    promoted version against the one before it; and the fallback test of the origin weights against the served ones.

    Args:
        drafter: Used to compute draft logits for given weights. Its own weights are not touched.
        served: The weights served now; by default the drafter's own.
        next_version: The smallest unused version number; by default the served version plus one. After a restart,
            `Versions.next_version`.
        origin: The weights that learning began with, which can always be served again; by default the served ones.
        promoted: After a restart, the event of the served version, if its canary test has to be resumed ...
        previous: ... and the weights to compare it with.

    Raises:
        ValueError: if next_version is not greater than the served version.
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
        self.previous: DrafterWeights | None = None  # the weights that a rollback restores
        self._order = RequestOrder()
        self._since = 0  # requests that had begun when the served weights were proposed
        self._origin = origin or self.served
        self._is_origin = _equal(self.served.params, self._origin.params)  # whether origin is served
        self._fallback: PairedTest | None = None  # origin against served
        self._requests_until_fallback = 0
        self._has_drifted = False  # whether the traffic has drifted since the served version was published
        self._paired_test: PairedTest | None = None
        self._canary: PairedTest | None = None
        self._follows_origin = False  # whether the canary test compares with the origin weights
        self._health_check: HealthCheck | None = None
        self._num_refused = 0  # candidates since the last promotion
        self._pause = 0  # requests until the next candidate may be tested
        self._events: deque[Event] = deque(maxlen=_MOST_EVENTS)
        self.num_events = 0  # since the start, including those no longer in memory
        if promoted and previous and promoted.kind == "promoted":
            self._begin_canary(previous)

    @property
    def history(self) -> tuple[Event, ...]:
        """The events since the start, oldest first; at most the newest 1,000."""
        return tuple(self._events)

    @property
    def has_canary(self) -> bool:
        """Whether a canary test of the served version is running, so that it may still be rolled back."""
        return self._canary is not None

    @property
    def wants_candidate(self) -> bool:
        """Whether a candidate may be tested now: no test is running, and the pause after a refusal is over."""
        return self._paired_test is None and self._pause <= 0

    def offer(self, records: Sequence[Feedback]) -> None:
        """Takes the Feedback of served requests and passes it to all running tests."""
        for record in records:
            self._order.number_of(record)
        num_ended = sum(record.is_last for record in records)
        self._pause -= num_ended
        self._requests_until_fallback -= num_ended
        if self._wants_fallback and not self._fallback and self._requests_until_fallback <= 0:
            self._fallback = self._against(self._origin.params, self.config.test_looks[:2], self._since)
        for judge in (self._paired_test, self._fallback, self._canary, self._health_check):
            if judge:
                judge.offer(records)

    @property
    def is_undecided(self) -> bool:
        """Whether the running test has compared 8 requests or more without a decision."""
        return self._paired_test is not None and self._paired_test.num_requests >= _MIN_TEST_REQUESTS

    def propose(self, candidate: Params) -> None:
        """Starts a paired test of a candidate, replacing any that is running. Refuses weights that are not finite.

        Raises:
            ValueError: if its tensors differ from the served ones in name, shape or dtype.
        """
        _check_alike(self.served.params, candidate)
        if is_finite(candidate):
            self._paired_test = self._against(candidate, self.config.test_looks, self._order.num_begun)
        elif not self._events or self._events[-1].reason != _NOT_FINITE:  # noted only once in a row
            self._refuse(_NOT_FINITE)

    def on_drift(self) -> None:
        """Reacts to a drift of the traffic: drops the running tests of candidate and origin, and ends any pause."""
        self._paired_test, self._num_refused, self._pause = None, 0, 0
        self._has_drifted, self._fallback, self._requests_until_fallback = True, None, 0

    def check(self) -> DrafterWeights | None:
        """Advances the tests, and returns a new version to serve if one of them decides so; else None.

        The new version has the candidate's weights (promotion), those before it (rollback), or the origin's.
        """
        return self._check_canary() or self._check_fallback() or self._check_paired_test()

    def _against(self, other: Params, looks: Sequence[int], since: int, version: int | None = None) -> PairedTest:
        """A test of other weights against the served ones, on the requests numbered `since` and later."""
        return PairedTest(self._drafter, self.served.params, other, looks, self.config, self._order, since, version)

    def _check_paired_test(self) -> DrafterWeights | None:
        result = self._paired_test.look() if self._paired_test else None
        if not self._paired_test or not result:
            return None
        if result.is_other_better:
            previous = self.served if self.previous is None or not self._canary else self.previous
            parent, self._since = self.served.version, self._paired_test.since
            self._serve(self._paired_test.other)
            self._note("promoted", _compared(result, "the candidate", "better"), result, parent)
            self._begin_canary(previous)
            self._num_refused = 0
            return self.served
        if result.is_served_better or self._paired_test.is_over:
            verdict = "worse" if result.is_served_better else "no better"
            self._refuse(_compared(result, "the candidate", verdict), result)
        return None

    def _refuse(self, reason: str, result: Paired | None = None) -> None:
        self._note("refused", reason, result)
        self._paired_test = None
        self._pause = min(8 * self._num_refused, self.config.max_pause)
        self._num_refused += 1

    def _check_canary(self) -> DrafterWeights | None:
        """Rolls back if the canary test or the health check fails; confirms the version when the test is over."""
        if not self._canary or not self._health_check:
            return None
        result = self._canary.look()
        if reason := self._health_check.reason(self._canary.served_acceptance_prob):
            return self._roll_back(reason)
        if result and result.is_other_better:
            return self._roll_back(_compared(result, "the version before", "better"), result)
        if result and (result.is_served_better or self._canary.is_over):
            verdict = "worse" if result.is_served_better else "no better"
            self._note("confirmed", _compared(result, "the version before", verdict), result)
            self._canary = self._health_check = None
        return None

    @property
    def _wants_fallback(self) -> bool:
        """Whether a fallback test makes sense: origin is not served, and no running canary test compares with it.

        After a drift the canary's evidence is from the old traffic, so a fallback test runs beside it.
        """
        is_watched = self._canary is not None and self._follows_origin
        return not self._is_origin and (self._has_drifted or not is_watched)

    def _check_fallback(self) -> DrafterWeights | None:
        """Serves the origin weights again if they draft better, for instance because old traffic has come back."""
        result = self._fallback.look() if self._fallback else None
        if not self._fallback or not result:
            return None
        if result.is_other_better:
            parent = self.served.version
            self._serve(self._origin.params)
            reason = _compared(result, f"version {self._origin.version}", "better")
            self._note("returned", reason, result, parent, self._origin.version)
            self.previous = self._canary = self._health_check = None
            return self.served
        if result.is_served_better or self._fallback.is_over:
            self._fallback, self._requests_until_fallback = None, _FALLBACK_INTERVAL
        return None

    def _begin_canary(self, previous: DrafterWeights) -> None:
        """Starts the canary test and the health check of the served version.

        `previous` is the newest earlier version whose own canary test is over.
        """
        self.previous, version = previous, self.served.version
        self._follows_origin = _equal(previous.params, self._origin.params)
        self._health_check = HealthCheck(version, self._order, self._since)
        self._canary = self._against(previous.params, self.config.canary_looks, self._since, version)

    def _roll_back(self, reason: str, result: Paired | None = None) -> DrafterWeights:
        assert self.previous is not None
        bad, restored = self.served, self.previous
        self._serve(restored.params)
        self._note("rolled back", reason, result, bad.version, restored.version)
        self.previous = self._canary = self._health_check = None
        return self.served

    def _serve(self, params: Params) -> None:
        self.served = DrafterWeights(params, self.next_version)
        self.next_version += 1
        self._paired_test = self._fallback = None  # they compared with the old served weights
        self._is_origin, self._has_drifted, self._requests_until_fallback = (
            _equal(params, self._origin.params),
            False,
            0,
        )

    def _note(
        self,
        kind: EventKind,
        reason: str,
        result: Paired | None = None,
        parent: int | None = None,
        restores: int | None = None,
    ) -> None:
        at = datetime.now(UTC).isoformat(timespec="seconds")
        event = Event(
            kind=kind, at=at, version=self.served.version, parent=parent, restores=restores, reason=reason,
            paired=result,
        )  # fmt: skip
        self._events.append(event)
        self.num_events += 1
        log.log(logging.WARNING if kind == "rolled back" else logging.INFO, "%s", event.summary)


def started(version: int) -> Event:
    """Returns the event that records the first version served in a folder."""
    at = datetime.now(UTC).isoformat(timespec="seconds")
    return Event(kind="started", at=at, version=version)


def _compared(result: Paired, other: str, verdict: str) -> str:
    """The result of a paired test as one line of text."""
    return (
        f"{other} is {verdict}: acceptance length {result.other_length:.3f}, served {result.served_length:.3f}, "
        f"difference {result.difference:+.3f} ± {result.standard_error:.3f} on {result.num_requests} requests, "
        f"judged at {result.level:.2g}"
    )


def _equal(one: Params, other: Params) -> bool:
    """Whether both have the same tensors with equal values."""
    is_alike = one.keys() == other.keys()
    return one is other or (is_alike and all(torch.equal(tensor, other[name]) for name, tensor in one.items()))


def _check_alike(served: Params, candidate: Params) -> None:
    """Raises ValueError naming the first tensor whose name, shape or dtype differs."""
    shapes = [{name: (tuple(p.shape), p.dtype) for name, p in params.items()} for params in (served, candidate)]
    for name in sorted({*shapes[0], *shapes[1]}):
        ours, theirs = (shape.get(name, "no such tensor") for shape in shapes)
        if ours != theirs:
            raise ValueError(
                f"{name} is {theirs} in the candidate and {ours} in what is served; a candidate must come from the "
                "drafter that is served, under the same --tune"
            )
