"""Paired tests: which of two sets of weights has more drafted tokens accepted on the served requests.

The criterion is acceptance and not the loss, which can fall while acceptance falls too. Both sets of weights are
evaluated on the same rows of the same requests, which began after both sets were fixed, so neither has learned from
them. No request has to be withheld from learning, which goes on with newer weights meanwhile, and a decision needs only
a few requests.

Acceptance is measured at every position of a text, and not only where steps began. Steps begin where the serving
drafter has just been rejected, so at those positions it would look worse than an equal drafter that fails elsewhere.

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

_LEAST_DIFFERENCE = 1e-3  # accepted drafts per position; less may be rounding, and is not worth a swap
_COLLAPSED = 0.5  # the health check fails below this share of the predicted acceptance ...
_COLLAPSE_STEPS = 64  # ... if measured over at least so many steps ...
_COLLAPSE_REQUESTS = 4  # ... of so many requests, so that one unusual text does not count ...
_COLLAPSE_ERRORS = 3.0  # ... and lower by more than so many standard errors


# --- acceptance of given weights ----------------------------------------------------------------------------------


class Lengths(NamedTuple):
    """Accepted drafts of several sets of weights, summed over the positions of one request."""

    num_anchors: int  # positions drafted from
    accepted: tuple[float, ...]  # accepted drafts, for each set of weights
    first: tuple[float, ...]  # accepted first drafts among them, for each set of weights


@torch.no_grad()
def lengths_of(
    drafter: Drafter, candidates: Sequence[Params], records: Sequence[Feedback], num_draft_tokens: int
) -> Lengths | None:
    """Counts the drafts that would have been accepted, summed over consecutive rows of one request.

    The noise that each token was sampled with is replayed (`agreement`), so the counts are exactly those of serving
    with these weights, cuts and penalties of the target included. Positions near the end draft only as far as the rows
    reach, for all weights alike.

    Args:
        candidates: The sets of weights to evaluate.
        records: Consecutive records of one request.
        num_draft_tokens: Tokens drafted from each position.

    Returns:
        The counts, with candidates in the given order; None if the drafter can make no training batch of these rows.

    Raises:
        ValueError: if the records are not consecutive records of one request.
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
    """Compares two sets of weights by their accepted drafts on the same requests, with a t-test.

    Requests are independent samples, positions within one are not, so the variance is over requests, weighted by
    their numbers of positions. Student's t is applied one-sided in both directions. Where requests differ in size, the
    degrees of freedom come from the effective sample size, which is below the number of requests.

    Args:
        lengths: One entry per request, at least two; each has the served weights first and the other weights second.
        level: False positive probability of each one-sided test.

    Reference: Kish (1965), on the effective sample size.
    """
    num_requests, num_anchors = len(lengths), sum(each.num_anchors for each in lengths)
    served, other = (math.fsum(each.accepted[i] for each in lengths) / num_anchors for i in (0, 1))
    difference = other - served
    residuals = (each.accepted[1] - each.accepted[0] - each.num_anchors * difference for each in lengths)
    spread = math.fsum(residual**2 for residual in residuals) * num_requests / (num_requests - 1)
    error = math.sqrt(spread) / num_anchors
    effective_sample_size = num_anchors**2 / sum(each.num_anchors**2 for each in lengths)
    least = max(student_quantile(level, max(effective_sample_size - 1, 1)) * error, _LEAST_DIFFERENCE)
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
    """Returns consecutive records of a request with at most max_rows rows in total, but at least one record.

    The starting record is pseudo-random, seeded by the request's id and length. If records were lost on the way, only
    those after the last gap are used.
    """
    begins = [i for i in range(1, len(records)) if records[i - 1].start + records[i - 1].num_rows != records[i].start]
    whole = records[begins[-1] if begins else 0 :]
    first = Random(f"{whole[0].request_id}/{whole[-1].start}").randrange(len(whole))
    return run_around(whole, first, max_rows)


# --- tests ----------------------------------------------------------------------------------------------------------


class RequestOrder:
    """Numbers requests in the order in which their first Feedback arrived.

    Weights may have learned from the beginnings of requests that were running when the weights were fixed. Only
    requests that began later give an unbiased comparison.
    """

    def __init__(self) -> None:
        self.num_begun = 0  # requests seen so far
        self._numbers: dict[int, int] = {}  # by the id of a trace that others keep alive

    def number_of(self, record: Feedback) -> int:
        """Returns the number of a record's request, counting from 0. A new request gets the next number."""
        trace = record.trace
        if id(trace) not in self._numbers:
            weakref.finalize(trace, self._numbers.pop, id(trace), None).atexit = False
            self._numbers[id(trace)] = self.num_begun
            self.num_begun += 1
        return self._numbers[id(trace)]

    def since(self, number: int, records: Sequence[Feedback]) -> list[Feedback]:
        """Returns the records of requests with this number or a later one, and of each only those with choice 0.

        Further choices of a request (n > 1) have the same prompt and often the same text, so they are no independent
        samples of the traffic.
        """
        numbers = [self.number_of(record) for record in records]
        return [each for each, own in zip(records, numbers, strict=True) if own >= number and not each.choice]


class PairedTest:
    """A sequential test of two sets of weights, on requests that began after both were fixed.

    The difference is tested at a few looks, after growing numbers of requests. Each look uses level / number of looks
    (Bonferroni), so that the probability of any false positive stays below the level.

    Args:
        drafter: Computes the draft logits of both.
        served: The weights that are served.
        other: The weights to compare them with.
        looks: Numbers of requests after which the difference is tested, ascending.
        config: Level, draft length and memory limits.
        order: Numbers the requests.
        since: Number of the first request that counts: how many had begun when the newer weights were fixed.
        version: Count only rows drafted by this version; None counts all.
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
        """Takes Feedback of served requests. Stores those that have ended, within the memory limit, for `look`."""
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
        """Evaluates one stored request, and returns the comparison over all evaluated requests if a look is due.

        Only one per call, because each costs about as much as a learning round and the caller may have to learn next.

        Returns:
            The comparison; None between looks and after the last one.
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
        """Requests evaluated so far."""
        return len(self._lengths)

    @property
    def served_acceptance_prob(self) -> float:
        """Mean acceptance_prob of the served weights' first drafted token; 0 before the first evaluation."""
        num_anchors = sum(each.num_anchors for each in self._lengths)
        return math.fsum(each.first[0] for each in self._lengths) / max(num_anchors, 1)

    @property
    def is_over(self) -> bool:
        """Whether all looks were used."""
        return not self._looks


class HealthCheck:
    """Compares the acceptance measured while serving with the acceptance that the canary test computes.

    It detects a swap that went wrong although the weights themselves are good. Both numbers are from the same range of
    requests, so a drift of the traffic lowers both. No model is evaluated.

    Args:
        version: The served version to check.
        order: Numbers the requests; the same object as the canary test's.
        since: Number of the first request that counts; the same as the canary test's.
    """

    def __init__(self, version: int, order: RequestOrder, since: int) -> None:
        self._version, self._order, self._since = version, order, since
        self.num_steps = self._num_kept = 0  # steps with a draft; those whose first draft was accepted
        self._requests: set[int] = set()  # numbers of the requests of these steps

    def offer(self, records: Sequence[Feedback]) -> None:
        """Takes Feedback of served requests; steps drafted by other versions are ignored."""
        for record in self._order.since(self._since, records):
            if record.weights_version == self._version and record.num_draft_tokens:
                self.num_steps += 1
                self._num_kept += record.num_accepted > 0
                self._requests.add(self._order.number_of(record))

    def reason(self, predicted: float) -> str:
        """Returns why the version fails the check, as text; empty if it passes or has too few steps yet.

        Args:
            predicted: acceptance_prob of the first drafted token, as computed for the version's weights.
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
    """The value that Student's t exceeds with probability `tail`, by the Cornish-Fisher series.

    Accurate to 1 % from 15 degrees of freedom on.

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
