"""Which weights are served: a candidate must draft better than they do, and is taken back if it turns out not to.

Judged by what serving is paid for, the drafts that a step keeps, and never by the loss, which can fall while acceptance
falls. Two sets of weights are compared on the same rows of the same requests, and those are held back from both: they
came after both were made. So nothing is lost to learning, which goes on with other weights meanwhile, and a judgement
comes after a few requests, however small a share of the traffic one would care to keep from learning.

Acceptance is taken at every position of a text, not at the positions where steps began: those are where the drafter
that served had just failed, so that it would look worse than an equal one that failed elsewhere.

Single-threaded. Axis letters: E sets of weights, N positions of a request, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from datetime import UTC, datetime
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from onlinespec.config import PublishConfig
from onlinespec.core import DrafterWeights, Feedback, Params
from onlinespec.drafters.base import Drafter
from onlinespec.learners.geometry import is_finite
from onlinespec.losses import TargetRows
from onlinespec.metrics import student_quantile
from onlinespec.records import Event, EventKind, Paired
from onlinespec.replay import Stored, Unfinished, detached, run_around

log = logging.getLogger(__name__)

_LEAST_DIFFERENCE = 1e-3  # in drafts kept per step; less may be rounding, and is not worth a swap
_COLLAPSED = 0.5  # of the acceptance that the weights should have ...
_COLLAPSE_STEPS = 64  # ... over at least so many steps ...
_COLLAPSE_REQUESTS = 4  # ... of so many requests: one odd text is no collapse ...
_COLLAPSE_ERRORS = 3.0  # ... and by so many standard errors
_FAIR_TRIAL = 8  # requests, after which a newer candidate may take the place of one that is neither better nor worse
_STAY = 24  # requests, from one comparison with what learning began with to the next
_MOST_EVENTS = 1000  # kept in memory
_NOT_FINITE = "the candidate's weights are not finite"


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
    """The expected number of drafts kept, summed over the positions of a run of one request's rows.

    Given a text drawn by the target, a chain of drafts comes past depth j with chance prod min(1, draft(y) / target(y))
    over its first j tokens y, and the next draft is kept with chance sum_v min(draft(v), target(v)): together the
    expectation, without bias. Greedy, both are 1 where the likeliest draft is the token that was committed. The
    request's temperature counts; cuts (top-p and the like) and penalties are not known here. A position near the end
    drafts only as far as the rows go, whatever the weights.

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
        kept_EN, passed_EN = _acceptance(logits_ENV, target, records[0].temperature)
        if depth:
            kept_EN = kept_EN * reached_EN[:, : num_anchors - depth]
            passed_EN = passed_EN * reached_EN[:, : num_anchors - depth]
        else:
            first_E = kept_EN.double().sum(-1)
        accepted_E, reached_EN = accepted_E + kept_EN.double().sum(-1), passed_EN
    return Lengths(num_anchors, tuple(accepted_E.tolist()), tuple(first_E.tolist()))


def _acceptance(logits_ENV: Tensor, target: TargetRows, temperature: float) -> tuple[Tensor, Tensor]:
    """Chances that a draft is kept, and that it is kept and the text's own token; 0 where logits are not finite."""
    is_usable_EN = logits_ENV.amax(-1).isfinite()  # a token may be ruled out (-inf)
    if temperature == 0:
        is_kept_EN = ((logits_ENV.argmax(-1) == target.token_ids_N) & is_usable_EN).float()
        return is_kept_EN, is_kept_EN
    draft_ENV = (logits_ENV.float() / temperature).softmax(-1)
    target_NV = (target.probs_NV.log() / temperature).softmax(-1)
    ids_EN1 = target.token_ids_N.expand(draft_ENV.shape[:-1]).unsqueeze(-1)
    own_N = target_NV.gather(-1, target.token_ids_N[:, None])[:, 0].clamp_min(torch.finfo(torch.float32).tiny)
    passed_EN = (draft_ENV.gather(-1, ids_EN1)[..., 0] / own_N).clamp_max(1)
    kept_EN = torch.minimum(draft_ENV, target_NV).sum(-1)
    return kept_EN.where(is_usable_EN, 0), passed_EN.where(is_usable_EN, 0)


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


class Trial:
    """Two sets of weights on the requests that come, which are newer than both: neither has learned from them.

    There are a few looks, at growing numbers of requests, each at its share of the level: the chance that any of them
    takes for better what is not stays within it.

    Args:
        served, other: What is compared.
        version: Only rows that this version drafted count; None for all.
    """

    def __init__(
        self,
        drafter: Drafter,
        served: Params,
        other: Params,
        looks: Sequence[int],
        config: PublishConfig,
        version: int | None = None,
    ) -> None:
        self.served, self.other = served, other
        self._drafter, self._config, self._version = drafter, config, version
        self._looks = deque(looks)
        self._level = config.level / len(looks)
        self._unfinished = Unfinished()
        self._waiting: deque[Stored] = deque()
        self._lengths: list[Lengths] = []
        self._names: set[str] = set()  # of the requests that count

    def offer(self, records: Sequence[Feedback]) -> None:
        """Takes what was served; a request counts when it has ended."""
        for trace, seen in self._unfinished.ended(records):
            own = [record for record in seen if self._version in (None, record.weights_version)]
            name = seen[0].request_id
            is_new = not name or name not in self._names  # several choices of one request are no news of the traffic
            if own and is_new and self._has_room:
                self._names.add(name)
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


class Collapse:
    """A blunt check that asks no model: drafts as they are served, against what these weights would have kept there.

    It shows a swap that went wrong, where weights look well on paper. Both are of the same requests: where the traffic
    moves, both fall.
    """

    def __init__(self, version: int) -> None:
        self._version = version
        self._num_steps = self._num_kept = 0  # steps that drafted, and those of them whose first draft was kept
        self._names: set[str] = set()  # of the requests that these steps are of

    def offer(self, records: Sequence[Feedback]) -> None:
        """Takes what was served, by whatever version."""
        for record in records:
            if record.weights_version == self._version and record.num_draft_tokens:
                self._num_steps += 1
                self._num_kept += record.num_accepted > 0
                self._names.add(record.request_id or str(id(record.trace)))

    def reason(self, predicted: float) -> str:
        """What speaks against the version, in words; empty if nothing.

        Args:
            predicted: acceptance_prob of the first drafted token, by the weights.
        """
        if self._num_steps < _COLLAPSE_STEPS or len(self._names) < _COLLAPSE_REQUESTS:
            return ""
        least = _COLLAPSED * predicted
        error = math.sqrt(least * (1 - least) / self._num_steps)
        measured = self._num_kept / self._num_steps
        if measured >= least - _COLLAPSE_ERRORS * error:
            return ""
        return (
            f"the first draft was kept in {measured:.0%} of {self._num_steps} steps, where these weights should have "
            f"kept {predicted:.0%}"
        )


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
        self._origin = origin or self.served
        self._is_origin = _equal(self.served.params, self._origin.params)  # what is served
        self._way_back: Trial | None = None  # to what learning began with
        self._stay = 0  # requests until the next
        self._has_moved = False  # the traffic, since what is served was published
        self._trial: Trial | None = None
        self._watch: Trial | None = None
        self._collapse: Collapse | None = None
        self._num_refused = 0  # since the last promotion
        self._pause = 0  # requests until the next trial
        self._events: deque[Event] = deque(maxlen=_MOST_EVENTS)
        self.num_events = 0  # ever
        if promoted and previous and promoted.kind == "promoted":
            self._begin_watch(previous)

    @property
    def history(self) -> tuple[Event, ...]:
        """What happened since the start, the oldest first."""
        return tuple(self._events)

    @property
    def is_watching(self) -> bool:
        """Whether the served version may still be rolled back."""
        return self._watch is not None

    @property
    def wants_candidate(self) -> bool:
        """Whether a trial may begin: none is under way, and after one that was refused some time has passed."""
        return self._trial is None and self._pause <= 0

    def offer(self, records: Sequence[Feedback]) -> None:
        """Takes what was served."""
        num_ended = sum(record.is_last for record in records)
        self._pause -= num_ended
        self._stay -= num_ended
        if self._may_go_back and not self._way_back and self._stay <= 0:
            self._way_back = self._against(self._origin.params, self.config.trial_looks[:2])
        for judge in (self._trial, self._way_back, self._watch, self._collapse):
            if judge:
                judge.offer(records)

    @property
    def is_undecided(self) -> bool:
        """Whether a candidate had its chance and was found neither better nor worse, so that its trial goes on."""
        return self._trial is not None and self._trial.num_requests >= _FAIR_TRIAL

    def propose(self, candidate: Params) -> None:
        """Begins a trial of a candidate, in place of one that is on trial, unless its weights are not finite.

        Raises:
            ValueError: if its tensors are not those of what is served.
        """
        _check_alike(self.served.params, candidate)
        if is_finite(candidate):
            self._trial = self._against(candidate, self.config.trial_looks)
        elif not self._events or self._events[-1].reason != _NOT_FINITE:  # once, however often it is offered
            self._refuse(_NOT_FINITE)

    def begin_anew(self) -> None:
        """The traffic has moved: what is on trial was not made for it, and refusals were of another time."""
        self._trial, self._num_refused, self._pause = None, 0, 0
        self._has_moved, self._way_back, self._stay = True, None, 0

    def check(self) -> DrafterWeights | None:
        """A new version to serve, if there is one: a candidate that drafts better, or an older one again."""
        return self._check_watch() or self._check_way_back() or self._check_trial()

    def _against(self, other: Params, looks: Sequence[int], version: int | None = None) -> Trial:
        """A trial of other weights against those that are served."""
        return Trial(self._drafter, self.served.params, other, looks, self.config, version)

    def _check_trial(self) -> DrafterWeights | None:
        figures = self._trial.look() if self._trial else None
        if not self._trial or not figures:
            return None
        if figures.is_other_better:
            previous = self.served if self.previous is None or not self._watch else self.previous
            parent = self.served.version
            self._serve(self._trial.other)
            self._note("promoted", _compared(figures, "the candidate", "better"), figures, parent)
            self._begin_watch(previous)
            self._num_refused = 0
            return self.served
        if figures.is_served_better or self._trial.is_over:
            verdict = "worse" if figures.is_served_better else "no better"
            self._refuse(_compared(figures, "the candidate", verdict), figures)
        return None

    def _refuse(self, reason: str, figures: Paired | None = None) -> None:
        self._note("refused", reason, figures)
        self._trial = None
        self._pause = min(8 * self._num_refused, self.config.most_pause)
        self._num_refused += 1

    def _check_watch(self) -> DrafterWeights | None:
        """The weights before, as a new version, if the one promoted is worse."""
        if not self._watch or not self._collapse:
            return None
        figures = self._watch.look()
        if reason := self._collapse.reason(self._watch.served_acceptance_prob):
            return self._roll_back(reason)
        if figures and figures.is_other_better:
            return self._roll_back(_compared(figures, "the version before", "better"), figures)
        if figures and (figures.is_served_better or self._watch.is_over):
            verdict = "worse" if figures.is_served_better else "no better"
            self._note("confirmed", _compared(figures, "the version before", verdict), figures)
            self._watch = self._collapse = None
        return None

    @property
    def _may_go_back(self) -> bool:
        """Whether what is served is to be compared with what learning began with.

        A watch may do so already, and longer; unless the traffic has moved meanwhile, which makes its evidence old.
        """
        is_watched = self._watch is not None and self.previous is self._origin
        return not self._is_origin and (self._has_moved or not is_watched)

    def _check_way_back(self) -> DrafterWeights | None:
        """What learning began with, as a new version, if it drafts better: old traffic may have come back."""
        figures = self._way_back.look() if self._way_back else None
        if not self._way_back or not figures:
            return None
        if figures.is_other_better:
            parent = self.served.version
            self._serve(self._origin.params)
            reason = _compared(figures, f"version {self._origin.version}", "better")
            self._note("returned", reason, figures, parent, self._origin.version)
            self.previous = self._watch = self._collapse = None
            return self.served
        if figures.is_served_better or self._way_back.is_over:
            self._way_back, self._stay = None, _STAY
        return None

    def _begin_watch(self, previous: DrafterWeights) -> None:
        """Of what is served against the newest version that is not itself still watched."""
        self.previous, version = previous, self.served.version
        self._collapse = Collapse(version)
        self._watch = self._against(previous.params, self.config.watch_looks, version)

    def _roll_back(self, reason: str, figures: Paired | None = None) -> DrafterWeights:
        assert self.previous is not None
        bad, restored = self.served, self.previous
        self._serve(restored.params)
        self._note("rolled back", reason, figures, bad.version, restored.version)
        self.previous = self._watch = self._collapse = None
        return self.served

    def _serve(self, params: Params) -> None:
        self.served = DrafterWeights(params, self.next_version)
        self.next_version += 1
        self._trial = self._way_back = None  # against what is served no more
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
        log.log(logging.WARNING if kind == "rolled back" else logging.INFO, "%s", event.told)


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
