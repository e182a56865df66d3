"""Which weights are served: a candidate must draft better than they do, and is taken back if it turns out not to.

Judged by what serving is paid for, the drafts that a step keeps, and never by the loss, which can fall while acceptance
falls. Two sets of weights are compared on the same rows of the same requests. Before a candidate is served those are
requests held back from learning; afterwards whatever is served, for its text is newer than both sets of weights.

Acceptance is taken at every position of a text, not at the positions where steps began: those are where the drafter
that served had just failed, so that it would look worse than an equal one that failed elsewhere.

Single-threaded. Axis letters: E sets of weights, N positions of a request, V vocabulary.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from onlinespec.config import PublishConfig
from onlinespec.core import DrafterWeights, Feedback, Params, Trace
from onlinespec.drafters.base import Drafter
from onlinespec.learners.geometry import is_finite
from onlinespec.losses import TargetRows
from onlinespec.metrics import student_quantile
from onlinespec.records import Event, EventKind, Paired
from onlinespec.replay import Stored, Unfinished, detached, run_around

log = logging.getLogger(__name__)

_LEAST_DIFFERENCE = 1e-3  # in drafts kept per step; less may be rounding, and is not worth a swap
_WATCHED = (1, 2, 4)  # times min_requests: after how many requests a promoted version is looked at
_COLLAPSED = 0.5  # of the acceptance that was predicted ...
_COLLAPSE_STEPS = 64  # ... over at least so many steps ...
_COLLAPSE_ERRORS = 3.0  # ... and by so many standard errors
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
    is_usable_EN = logits_ENV.sum(-1).isfinite()
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
    by Student's t, one-sided, both ways.
    """
    num_requests, num_anchors = len(lengths), sum(each.num_anchors for each in lengths)
    served, other = (math.fsum(each.accepted[i] for each in lengths) / num_anchors for i in (0, 1))
    difference = other - served
    residuals = (each.accepted[1] - each.accepted[0] - each.num_anchors * difference for each in lengths)
    spread = math.fsum(residual**2 for residual in residuals) * num_requests / (num_requests - 1)
    error = math.sqrt(spread) / num_anchors
    least = max(student_quantile(level, num_requests - 1) * error, _LEAST_DIFFERENCE)
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


# --- requests to judge by -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """A run of a finished request's rows, over a trace of its own."""

    records: tuple[Feedback, ...]
    num_bytes: int
    number: int  # of all that were ever held back, from 1


class HoldOut:
    """Keeps a share of the requests from learning: the newest, to judge weights by.

    Whether a request is held back hangs on its id and the seed alone, so that whoever asks is told the same; one
    without an id goes by its turn.
    """

    def __init__(self, config: PublishConfig, seed: int = 0) -> None:
        self._config, self._seed = config, seed
        self._turns: dict[int, int] = {}  # of requests without an id, by the id of a trace that others keep alive
        self._num_turns = 0
        self._unfinished = Unfinished()
        self._held: deque[Held] = deque()
        self.num_bytes = 0
        self.num_ever = 0  # held back, those that have gone included

    def __len__(self) -> int:
        return len(self._held)

    def holds(self, record: Feedback) -> bool:
        """Whether nothing may be learned from this record's request."""
        name = record.request_id or f"#{self._turn(record.trace)}"
        digest = blake2b(f"{self._seed}/{name}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % self._config.holdout_every == 0

    def offer(self, records: Sequence[Feedback]) -> list[Feedback]:
        """Takes what is held back; returns the rest, which may be learned from."""
        held: list[Feedback] = []
        rest: list[Feedback] = []
        for record in records:
            (held if self.holds(record) else rest).append(record)
        for trace, seen in self._unfinished.ended(held):
            self._keep(detached(trace, run_of(seen, self._config.max_rows)))
        return rest

    def newest(self) -> list[Held]:
        """The requests held back, the newest first."""
        return list(self._held)

    def _turn(self, trace: Trace) -> int:
        if id(trace) not in self._turns:
            self._turns[id(trace)] = self._num_turns
            self._num_turns += 1
            weakref.finalize(trace, self._turns.pop, id(trace), None)
        return self._turns[id(trace)]

    def _keep(self, request: Stored) -> None:
        most_bytes = int(self._config.holdout_megabytes * 1e6)
        if request.num_bytes > most_bytes:
            return
        self.num_ever += 1
        self._held.appendleft(Held(request.records, request.num_bytes, self.num_ever))
        self.num_bytes += request.num_bytes
        while self.num_bytes > most_bytes or len(self._held) > self._config.holdout_requests:
            self.num_bytes -= self._held.pop().num_bytes


class Gate:
    """Judges candidates for what is served.

    However many candidates come up against the same served weights, and however they hang together, the chance that any
    is taken for better that is not stays within `level`: the k-th is judged at level / (k (k + 1)), which sums to it.
    None is judged before new requests were held back, so that the level is not spent on what is known already.
    """

    def __init__(self, drafter: Drafter, config: PublishConfig) -> None:
        self._drafter, self._config = drafter, config
        self._num_judged = 0
        self._num_seen: int | None = None  # requests ever held back, when the last candidate was judged

    def begin(self) -> None:
        """Other weights are served from now on."""
        self._num_judged = 0

    def missing(self, holdout: HoldOut) -> int:
        """Requests that must be held back before a candidate is judged."""
        least = self._config.min_requests - len(holdout)
        seen = 0 if self._num_seen is None else self._num_seen + self._config.new_requests - holdout.num_ever
        return max(0, least, seen)

    def judge(self, served: Params, candidate: Params, holdout: HoldOut) -> Paired | None:
        """Both on what is held back; None while that is not enough."""
        if self.missing(holdout):
            return None
        every = [
            lengths_of(self._drafter, [served, candidate], held.records, self._config.num_draft_tokens)
            for held in holdout.newest()
        ]
        lengths = [each for each in every if each]
        if len(lengths) < self._config.min_requests:
            return None
        self._num_seen, self._num_judged = holdout.num_ever, self._num_judged + 1
        return paired(lengths, self._config.level / (self._num_judged * (self._num_judged + 1)))


class Watch:
    """Looks after a version that was just promoted, until enough was served to say that it is fine.

    Whatever is served after the promotion is newer than both it and the version before, held back or not; so each
    finished request is looked at, once, by both. There are a few looks, at growing numbers of requests, each at its
    share of the level. Beside it a blunt check that asks no model: drafts as they were served, against what was
    predicted. That shows a swap that went wrong, where both sets of weights look well on paper.

    Args:
        predicted: acceptance_prob of the first drafted token, as the gate saw it.
    """

    def __init__(
        self, drafter: Drafter, promoted: DrafterWeights, previous: Params, predicted: float, config: PublishConfig
    ) -> None:
        self._drafter, self._promoted, self._previous, self._config = drafter, promoted, previous, config
        self._predicted = predicted
        self._sizes = deque(config.min_requests * times for times in _WATCHED)
        self._level = config.level / len(_WATCHED)
        self._unfinished = Unfinished()
        self._waiting: list[Stored] = []
        self._lengths: list[Lengths] = []
        self._num_steps = self._num_kept = 0  # steps that drafted, and those of them whose first draft was kept

    def offer(self, records: Sequence[Feedback]) -> None:
        """Takes what was served, by whatever version."""
        for record in records:
            if record.weights_version == self._promoted.version and record.num_draft_tokens:
                self._num_steps += 1
                self._num_kept += record.num_accepted > 0
        for trace, seen in self._unfinished.ended(records):
            own = [record for record in seen if record.weights_version == self._promoted.version]
            if own and self._has_room:
                self._waiting.append(detached(trace, run_of(own, self._config.max_rows)))

    @property
    def _has_room(self) -> bool:
        num_bytes = sum(request.num_bytes for request in self._waiting)
        num_requests = len(self._lengths) + len(self._waiting)
        return num_bytes < self._config.holdout_megabytes * 1e6 and bool(self._sizes) and num_requests < self._sizes[-1]

    @property
    def collapse(self) -> str:
        """What the blunt check says against the version, in words; empty if nothing."""
        if self._num_steps < _COLLAPSE_STEPS:
            return ""
        least = _COLLAPSED * self._predicted
        error = math.sqrt(least * (1 - least) / self._num_steps)
        measured = self._num_kept / self._num_steps
        if measured >= least - _COLLAPSE_ERRORS * error:
            return ""
        return (
            f"the first draft was kept in {measured:.0%} of {self._num_steps} steps, where the gate had predicted "
            f"{self._predicted:.0%}"
        )

    def look(self) -> Paired | None:
        """Both versions on what was served since; None until a look is due."""
        while self._waiting:
            request = self._waiting.pop()
            versions = [self._promoted.params, self._previous]
            lengths = lengths_of(self._drafter, versions, request.records, self._config.num_draft_tokens)
            self._lengths += [lengths] if lengths else []
        if not self._sizes or len(self._lengths) < self._sizes[0]:
            return None
        while self._sizes and len(self._lengths) >= self._sizes[0]:
            self._sizes.popleft()
        return paired(self._lengths, self._level)

    @property
    def is_over(self) -> bool:
        """Whether there is no look left."""
        return not self._sizes


class Publisher:
    """What is served, what was served before, and how it came to that.

    Feedback goes in by `offer`, which says what may be learned from; `consider` and `check` say what to serve from now
    on. Versions are numbered upwards and no number is given twice: a rollback is a new version with the old weights.
    Never raises for weights that are not finite.

    Args:
        drafter: Its rows are asked for, with weights given; what it drafts with is left alone.
        served: What is served now; the drafter's own weights by default.
        next_version: The first number that was never used; `Versions.next_version` knows it after a restart.
        promoted: How the served version came to be, if it is still to be watched after a restart ...
        previous: ... and the weights that it is to be compared with.
        seed: Of what is held back.
    """

    def __init__(
        self,
        drafter: Drafter,
        config: PublishConfig | None = None,
        served: DrafterWeights | None = None,
        next_version: int | None = None,
        promoted: Event | None = None,
        previous: DrafterWeights | None = None,
        seed: int = 0,
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
        self.holdout = HoldOut(self.config, seed)
        self._gate = Gate(drafter, self.config)
        self._watch: Watch | None = None
        self._events: deque[Event] = deque(maxlen=_MOST_EVENTS)
        if promoted and previous and promoted.kind == "promoted" and promoted.paired:
            self._begin_watch(previous, promoted.paired)

    @property
    def history(self) -> tuple[Event, ...]:
        """What happened since the start, the oldest first."""
        return tuple(self._events)

    @property
    def is_watching(self) -> bool:
        """Whether the served version may still be rolled back."""
        return self._watch is not None

    def offer(self, records: Sequence[Feedback]) -> list[Feedback]:
        """Takes what was served; returns what may be learned from."""
        if self._watch:
            self._watch.offer(records)
        return self.holdout.offer(records)

    def consider(self, candidate: Params) -> DrafterWeights | None:
        """The candidate as a new version, if it drafts better than what is served; None if not, or if not known yet."""
        _check_alike(self.served.params, candidate)
        if not is_finite(candidate):
            if not self._events or self._events[-1].reason != _NOT_FINITE:  # once, however often it is offered
                self._note("refused", _NOT_FINITE)
            return None
        figures = self._gate.judge(self.served.params, candidate, self.holdout)
        if figures is None:
            return None
        if not figures.is_other_better:
            self._note("refused", _compared(figures, "the candidate", "no better"), figures)
            return None
        previous = self.served
        self._serve(candidate)
        self._note("promoted", _compared(figures, "the candidate", "better"), figures, previous.version)
        self._begin_watch(previous, figures)
        return self.served

    def check(self) -> DrafterWeights | None:
        """The weights to go back to, as a new version, if the one just promoted is worse than the one before."""
        if self._watch is None:
            return None
        if collapse := self._watch.collapse:
            return self._roll_back(collapse)
        figures = self._watch.look()
        if figures and figures.is_other_better:
            return self._roll_back(_compared(figures, "the version before", "better"), figures)
        if figures and (figures.is_served_better or self._watch.is_over):
            verdict = "worse" if figures.is_served_better else "no better"
            self._note("confirmed", _compared(figures, "the version before", verdict), figures)
            self._watch = None
        return None

    def _begin_watch(self, previous: DrafterWeights, figures: Paired) -> None:
        self.previous = previous
        predicted = figures.other_acceptance_prob
        self._watch = Watch(self._drafter, self.served, previous.params, predicted, self.config)

    def _roll_back(self, reason: str, figures: Paired | None = None) -> DrafterWeights:
        assert self.previous is not None
        bad, restored = self.served, self.previous
        self._serve(restored.params)
        self._note("rolled back", reason, figures, bad.version, restored.version)
        self.previous = self._watch = None
        return self.served

    def _serve(self, params: Params) -> None:
        self.served = DrafterWeights(params, self.next_version)
        self.next_version += 1
        self._gate.begin()

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
        log.log(logging.WARNING if kind == "rolled back" else logging.INFO, "%s", event.told)


def _compared(figures: Paired, other: str, verdict: str) -> str:
    """A judgement in words."""
    return (
        f"{other} is {verdict}: acceptance length {figures.other_length:.3f}, served {figures.served_length:.3f}, "
        f"difference {figures.difference:+.3f} ± {figures.standard_error:.3f} on {figures.num_requests} requests, "
        f"judged at {figures.level:.2g}"
    )


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
