"""Which of two sets of weights drafts better, on what is served.

Judged by what serving is paid for, the drafts that a step keeps, and never by the loss, which can fall while acceptance
falls. Two sets of weights are compared on the same rows of the same requests, and those are held back from both: they
began after both were made. So nothing is lost to learning, which goes on with other weights meanwhile, and a judgement
comes after a few requests, however small a share of the traffic one would care to keep from learning.

Acceptance is taken at every position of a text, not at the positions where steps began: those are where the drafter
that served had just failed, so that it would look worse than an equal one that failed elsewhere.

Axis letters: E sets of weights, N positions of a request, V vocabulary.
"""

from __future__ import annotations

import math
import statistics
import weakref
from collections import deque
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import torch

from onlinespec.core import Feedback, Params
from onlinespec.drafters.agreement import agrees
from onlinespec.drafters.contract import Drafter
from onlinespec.host import to_host
from onlinespec.learning.replay import Stored, Unfinished, detached, run_around
from onlinespec.publishing.protocol import Paired
from onlinespec.publishing.settings import PublishConfig

_LEAST_DIFFERENCE = 1e-3  # in drafts kept per step; less may be rounding, and is not worth a swap
_COLLAPSED = 0.5  # of the acceptance that the weights should have ...
_COLLAPSE_STEPS = 64  # ... over at least so many steps ...
_COLLAPSE_REQUESTS = 4  # ... of so many requests: one odd text is no collapse ...
_COLLAPSE_ERRORS = 3.0  # ... and by so many standard errors


# --- what weights would have kept ---------------------------------------------------------------------------------


class Lengths(NamedTuple):
    """What sets of weights keep of the drafts at every position of one request, summed."""

    num_anchors: int
    accepted: tuple[float, ...]  # drafts kept, by set of weights
    first: tuple[float, ...]  # of these the first ones


@torch.no_grad()
def lengths_of(
    drafter: Drafter, candidates: Sequence[Params], records: Sequence[Feedback], num_draft_tokens: int
) -> Lengths | None:
    """How many drafts would have been kept, summed over the positions of a run of one request's rows.

    The noise that each token was chosen with is replayed (`agreement`), so these are the drafts that serving would have
    kept, cuts and penalties of the target's rows included, and no estimate. A position near the end drafts only as far
    as the rows go, whatever the weights.

    Returns:
        None if the drafter has nothing to learn from these rows.
    """
    batch = drafter.batch(records)
    if not batch:
        return None
    depths = drafter.rows(candidates, batch, num_draft_tokens)
    num_anchors = len(depths[0][1].token_ids_N)
    first_E = accepted_E = reached_EN = torch.zeros(())
    for depth, (logits_ENV, target) in enumerate(depths):
        if len(target.token_ids_N) != num_anchors - depth:
            raise ValueError(
                f"depth {depth} has {len(target.token_ids_N)} rows for {num_anchors} positions; give the records of "
                "one request that continue each other"
            )
        is_kept_EN = agrees(logits_ENV, target)
        if depth:
            is_kept_EN = is_kept_EN & reached_EN[:, : num_anchors - depth]
        else:
            first_E = is_kept_EN.sum(-1)
        accepted_E, reached_EN = accepted_E + is_kept_EN.sum(-1), is_kept_EN
    accepted, first = to_host(accepted_E, first_E)
    return Lengths(num_anchors, tuple(accepted), tuple(first))


def paired(lengths: Sequence[Lengths], level: float) -> Paired:
    """Two sets of weights by their lengths on the same requests: the served one first, the other second.

    Requests are the independent draws, positions of one are not; each counts by its positions. The difference is judged
    by Student's t, one-sided, both ways; where sizes differ there are fewer degrees of freedom than requests.

    Reference: Kish (1965), on the effective number of draws.
    """
    num_requests, num_anchors = len(lengths), sum(each.num_anchors for each in lengths)
    served, other = (math.fsum(each.accepted[i] for each in lengths) / num_anchors for i in (0, 1))
    difference = other - served
    residuals = (each.accepted[1] - each.accepted[0] - each.num_anchors * difference for each in lengths)
    spread = math.fsum(residual**2 for residual in residuals) * num_requests / (num_requests - 1)
    error = math.sqrt(spread) / num_anchors
    num_alike = num_anchors**2 / sum(each.num_anchors**2 for each in lengths)  # requests of one size that say as much
    least = max(student_quantile(level, max(num_alike - 1, 1)) * error, _LEAST_DIFFERENCE)
    probs = (math.fsum(each.first[i] for each in lengths) / num_anchors for i in (0, 1))
    served_prob, other_prob = probs
    return Paired(
        num_requests=num_requests,
        num_anchors=num_anchors,
        served_length=1 + served,
        other_length=1 + other,
        served_acceptance_prob=served_prob,
        other_acceptance_prob=other_prob,
        difference=difference,
        standard_error=error,
        level=level,
        is_other_better=difference > least,
        is_served_better=-difference > least,
    )


def run_of(records: Sequence[Feedback], max_rows: int) -> list[Feedback]:
    """Some records of a request that continue each other, from where its id and length say, up to max_rows rows.

    Where records were lost on the way only those behind the gap are looked at.
    """
    begins = [i for i in range(1, len(records)) if records[i - 1].start + records[i - 1].num_rows != records[i].start]
    whole = records[begins[-1] if begins else 0 :]
    first = Random(f"{whole[0].request_id}/{whole[-1].start}").randrange(len(whole))
    return run_around(whole, first, max_rows)


# --- trials ---------------------------------------------------------------------------------------------------------


class RequestOrder:
    """In what order requests began, as far as learning has seen them.

    Weights have learned from the beginnings of requests that were running when they were made, so that only those that
    began afterwards can tell them from others.
    """

    def __init__(self) -> None:
        self.num_begun = 0  # so far
        self._numbers: dict[int, int] = {}  # by the id of a trace that others keep alive

    def number_of(self, record: Feedback) -> int:
        """The number of a record's request, counted from 0; it begins with the first record of it that comes here."""
        trace = record.trace
        if id(trace) not in self._numbers:
            weakref.finalize(trace, self._numbers.pop, id(trace), None).atexit = False
            self._numbers[id(trace)] = self.num_begun
            self.num_begun += 1
        return self._numbers[id(trace)]

    def since(self, number: int, records: Sequence[Feedback]) -> list[Feedback]:
        """The records of requests with this number or a later one, without any but the first choice of each.

        Other choices (n > 1) begin no earlier than the first and are no news of the traffic: the same prompt, and often
        the same words.
        """
        numbers = [self.number_of(record) for record in records]
        return [each for each, own in zip(records, numbers, strict=True) if own >= number and not each.choice]


class PairedTest:
    """Two sets of weights on requests that began when both were made: neither has learned from any part of them.

    There are a few looks, at growing numbers of requests, each at its share of the level: the chance that any of them
    takes for better what is not stays within it.

    Args:
        served, other: What is compared.
        order: Knows when requests began.
        since: The number of the first request that counts; as many had begun when the newer weights were made.
        version: Only rows that this version drafted count; None for all.
    """

    def __init__(
        self,
        drafter: Drafter,
        served: Params,
        other: Params,
        looks: Sequence[int],
        config: PublishConfig,
        order: RequestOrder,
        since: int,
        version: int | None = None,
    ) -> None:
        self.served, self.other, self.since = served, other, since
        self._drafter, self._config, self._order, self._version = drafter, config, order, version
        self._looks = deque(looks)
        self._level = config.level / len(looks)
        self._unfinished = Unfinished()
        self._waiting: deque[Stored] = deque()
        self._lengths: list[Lengths] = []

    def offer(self, records: Sequence[Feedback]) -> None:
        """Takes what was served; a request counts when it has ended."""
        for trace, seen in self._unfinished.ended(self._order.since(self.since, records)):
            own = [record for record in seen if self._version in (None, record.weights_version)]
            if own and self._has_room:
                self._waiting.append(detached(trace, run_of(own, self._config.max_rows)))

    @property
    def _has_room(self) -> bool:
        num_bytes = sum(request.num_bytes for request in self._waiting)
        num_requests = len(self._lengths) + len(self._waiting)
        return num_bytes < self._config.megabytes * 1e6 and not self.is_over and num_requests < self._looks[-1]

    def look(self) -> Paired | None:
        """Compares on one more of the requests that came, and gives the comparison of all, if a look is due.

        One at a time: each costs about as much as a round, and whoever calls may have other use for the time.
        """
        if self._waiting:
            request, versions = self._waiting.popleft(), [self.served, self.other]
            lengths = lengths_of(self._drafter, versions, request.records, self._config.num_draft_tokens)
            self._lengths += [lengths] if lengths else []
        if self.is_over or len(self._lengths) < self._looks[0]:
            return None
        while self._looks and len(self._lengths) >= self._looks[0]:
            self._looks.popleft()
        return paired(self._lengths, self._level)

    @property
    def num_requests(self) -> int:
        """Compared so far."""
        return len(self._lengths)

    @property
    def served_acceptance_prob(self) -> float:
        """Of the first drafted token, by the weights that are served; 0 as long as nothing was compared."""
        num_anchors = sum(each.num_anchors for each in self._lengths)
        return math.fsum(each.first[0] for each in self._lengths) / max(num_anchors, 1)

    @property
    def is_over(self) -> bool:
        """Whether there is no look left."""
        return not self._looks


class HealthCheck:
    """A blunt check that asks no model: drafts as they are served, against what these weights would have kept there.

    It shows a swap that went wrong, where weights look well on paper. Both are of the same requests: where the traffic
    moves, both fall.

    Args:
        order, since: Which requests count; as for the trial that says what the weights would have kept.
    """

    def __init__(self, version: int, order: RequestOrder, since: int) -> None:
        self._version, self._order, self._since = version, order, since
        self.num_steps = self._num_kept = 0  # steps that drafted, and those of them whose first draft was kept
        self._requests: set[int] = set()  # that these steps are of

    def offer(self, records: Sequence[Feedback]) -> None:
        """Takes what was served, by whatever version."""
        for record in self._order.since(self._since, records):
            if record.weights_version == self._version and record.num_draft_tokens:
                self.num_steps += 1
                self._num_kept += record.num_accepted > 0
                self._requests.add(self._order.number_of(record))

    def reason(self, predicted: float) -> str:
        """What speaks against the version, in words; empty if nothing.

        Args:
            predicted: acceptance_prob of the first drafted token, by the weights.
        """
        if self.num_steps < _COLLAPSE_STEPS or len(self._requests) < _COLLAPSE_REQUESTS:
            return ""
        least = _COLLAPSED * predicted
        error = math.sqrt(least * (1 - least) / self.num_steps)
        measured = self._num_kept / self.num_steps
        if measured >= least - _COLLAPSE_ERRORS * error:
            return ""
        return (
            f"the first draft was kept in {measured:.0%} of {self.num_steps} steps, where these weights should have "
            f"kept {predicted:.0%}"
        )


def student_quantile(tail: float, degrees: float) -> float:
    """What Student's t exceeds with chance `tail`: Cornish and Fisher's series, to 1 % from 15 degrees of freedom on.

    >>> student_quantile(0.025, 15), student_quantile(0.005, 30)
    (2.131, 2.750)

    Reference: Abramowitz and Stegun, 26.7.5.
    """
    z, n = statistics.NormalDist().inv_cdf(1 - tail), degrees
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return math.fsum(term / n**power for power, term in enumerate(terms))
