"""How many tokens to draft, zero included, and how much to learn, so that speculation is never slower than without.

`choose` before a step, `observe` after it, `forget` when a request ends. No clock is read: time comes in with the
records, and the same records give the same choices. Axis letters: B requests, K drafted tokens.

**Lossless.** Sampling is coupled (see `randomness`), so the choice may depend on anything: what was drafted and
discarded, what another drafter would have said, even the noise of the tokens to come. The text stays the same. (Under
the papers' rejection rule it might not; there the number of drafted tokens is fixed.)
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from onlinespec.control.acceptance import Acceptance
from onlinespec.control.costs import StepCosts, TrackedCosts

__all__ = ["Choice", "Controller", "FixedController", "StepCosts", "StepRecord", "most_per_second"]


class StepRecord(NamedTuple):
    """What a step did and what it cost; the scheduler hands one in after every step."""

    request_ids: Sequence[Hashable]
    num_draft_tokens_B: Sequence[int]  # really drafted; a drafter may draft fewer than asked
    num_accepted_B: Sequence[int]
    draft_seconds: float  # 0 where nothing was drafted
    verify_seconds: float  # all the rest of the step: target forward, verification, commit; learning is no part of it


class Choice(NamedTuple):
    """A shape for the next step."""

    num_draft_tokens_B: list[int]
    goodput: float  # committed tokens per second to be expected; 0 where there was nothing to choose


def most_per_second(
    survival_BK: Sequence[Sequence[float]], verify_by_rows: Sequence[float], draft_by_depth: Sequence[Sequence[float]]
) -> Choice:
    """The drafting step with the most expected tokens per second; at least one token is drafted.

    For each depth, tokens down to it join in order of how likely they are to be kept, whoever's they are, and every
    prefix of that order is weighed. That is the best there is where a draft costs the same whoever drafts it, as far as
    each depth costs a constant for each request beside its fixed part, and else close to it.

    Args:
        survival_BK: P(the first k tokens are kept), as many k as the request may draft.
        verify_by_rows: Seconds by number of drafted tokens in all.
        draft_by_depth: Seconds that the d-th token adds by number of requests that draft it, at [d - 1][n].

    >>> most_per_second([[0.9, 0.8], [0.1]], [1.0, 1.1, 1.2, 1.3], [[0.0, 0.1, 0.2], [0.0, 0.1, 0.2]])
    Choice(num_draft_tokens_B=[2, 0], goodput=2.64...)
    """
    order = sorted(
        (-prob, depth, request) for request, row in enumerate(survival_BK) for depth, prob in enumerate(row, start=1)
    )
    best, best_depth, best_rows = 0.0, 0, 0
    for deepest in range(1, 1 + max(map(len, survival_BK))):
        tokens, seconds, rows = float(len(survival_BK)), 0.0, 0
        num_drafting = [0] * (deepest + 1)
        for minus_prob, depth, _ in order:
            if depth > deepest:
                continue
            tokens -= minus_prob
            rows += 1
            added = draft_by_depth[depth - 1]
            count = num_drafting[depth] = num_drafting[depth] + 1
            seconds += added[count] - added[count - 1]
            goodput = tokens / (seconds + verify_by_rows[rows])
            if goodput > best:
                best, best_depth, best_rows = goodput, deepest, rows
    chosen = [0] * len(survival_BK)
    for _, _, request in [token for token in order if token[1] <= best_depth][:best_rows]:
        chosen[request] += 1
    return Choice(chosen, best)


class FixedController:
    """Always the same number of drafted tokens, and all of the learning budget: what a user asked for by number."""

    def __init__(self, num_draft_tokens: int, learn_budget: float) -> None:
        self._num_draft_tokens = num_draft_tokens
        self.learn_share = learn_budget

    def choose(self, request_ids: Sequence[Hashable], limits_B: Sequence[int]) -> list[int]:
        """The number asked for, as far as each request may."""
        return [min(self._num_draft_tokens, limit) for limit in limits_B]

    def observe(self, record: StepRecord) -> None:
        """Nothing that is seen changes it."""

    def forget(self, request_id: Hashable) -> None:
        """Nothing was kept."""

    def on_new_weights(self) -> None:
        """Nothing is believed of the weights."""

    def report(self) -> dict[str, Any]:
        """What it is doing."""
        return {"is_drafting": self._num_draft_tokens > 0, "num_draft_tokens": self._num_draft_tokens}


class Controller:
    """Drafts while that brings more committed tokens per second than plain decoding, and as deep as brings the most.

    Expected tokens over expected seconds, both from what was measured: acceptance by position and request, costs by
    shape. What the drafting steps of late really brought, against what was expected of them, corrects the estimate, for
    the model of either may be mistaken. (A step counts as at most half as long again as expected: hiccups are no news.)

    Everything tried for the sake of knowing is paid for out of shares of time. While drafting, `_TRIAL_SHARE` goes into
    steps of the shape that was seen longest ago, plain decoding among them. While it is off, drafting is tried again
    for a few steps, a probe: soon at first, then rarer as probes fail, until they take `_LEAST_PROBE_SHARE` and no
    less, for a drafter may have learned. A probe that looks well is not ended, and so becomes the return. A new
    request ends a pause too, if by what is known of all requests drafting pays: that some miss says little of it.

    Args:
        costs: Measured at start, by `step_costs.profile`.
        max_draft_tokens: Most that a request drafts in a step.
        learn_budget: Share of decoding time that learning may take while drafting pays.
    """

    OFF_LEARN_SHARE = 0.01  # most of the time that learning may take while drafting is off or gains less than that

    _STAY, _RETURN = 0.99, 1.02  # drafting goodput over plain: off below the one, back for good above the other
    _LEAST_STEPS, _LEAST_DRAFTS = 2, 4  # until drafting is judged; a draft is one request's in one step
    _LOSING_STEPS = 8  # in a row, plain all of them, until it is off: an answer's last few may be too short for drafts
    _RETURN_STEPS, _PROBE_STEPS = 16, 32  # with drafts, before a probe is won, and after which it is if it is not lost

    _FIRST_PROBE_SHARE, _LEAST_PROBE_SHARE = 0.02, 0.004  # of time while off; halved by each probe that fails
    _PROBE_REQUESTS = 2  # that draft in a step
    _LEAST_PROBE_COST, _MOST_DEBT = 0.25, 4.0  # plain steps that a probe is taken to have lost, which bounds the wait
    _LASTING, _BRIEF_COST = 32, 0.1  # drafting steps of a return that was none, and plain steps that each has lost
    _PARDON = 0.1  # of what drafting fell short of, in each probe: old mistakes must not keep it off
    _KEPT_IN_PROBE = 24.0  # tokens: what is still believed of a drafter that was off
    _TRIAL_SHARE = 0.003  # of time while on
    _TRIAL_STEPS = 2  # in a row: costs believe what two visits agree on

    _FEW_MISSED = 4  # steps without drafts that a drafter makes up for unnoticed
    _FADING = 1 - 1 / 256  # of measured against expected, by a drafting step
    _FIRM = 64.0  # steps as expected that these start with
    _LONGEST, _LONGEST_CATCHING_UP = 1.5, 20.0  # times its expected seconds, what a step can count as; after a pause
    _LEAST_LOSS = 0.05  # of a plain step: what a trial is taken to lose at least, so that trials stay rare

    def __init__(self, costs: StepCosts, max_draft_tokens: int, learn_budget: float = 0.08) -> None:
        if not 1 <= max_draft_tokens <= costs.max_draft_tokens:
            raise ValueError(
                f"max_draft_tokens is {max_draft_tokens}, but costs are known from 1 to {costs.max_draft_tokens}; "
                "profile deeper drafts or draft fewer tokens"
            )
        self._costs, self._acceptance = TrackedCosts(costs), Acceptance(max_draft_tokens)
        self._max, self._learn_budget = max_draft_tokens, learn_budget
        self._is_on, self._is_probing = True, False  # probing: on for now, as long as it takes to tell
        self._num_drafted_steps = self._num_drafts = 0  # since drafting was last switched on
        self._saved = -0.3 * costs.verify_seconds[0][0]  # what trials may lose, in seconds of the profile's machine
        self._trial_depth, self._trial_steps_left, self._is_trial = 0, 0, False
        self._num_failed = self._num_probes = self._num_switches = 0
        self._measured, self._expected = _Sums(self._FIRM, self._FIRM), _Sums(self._FIRM, self._FIRM)
        self._best = Choice([], 0.0)
        self._plain_seconds = costs.verify_seconds[0][0]  # of a step without drafts
        self._batch = 0  # requests in the step that was chosen last, whether or not drafting was weighed for it
        self._num_losing = 0  # choices in a row
        self._known: set[Hashable] = set()  # requests
        self._missed: dict[Hashable, int] = {}  # steps since a request last drafted

    @property
    def learn_share(self) -> float:
        """Share of decoding time that learning may take now: no more than drafting gains, little while it is off."""
        if not self._best.num_draft_tokens_B:  # nothing is known yet
            return self._learn_budget
        gained = 1 - 1 / self._gain if self._is_on and not self._is_probing else 0.0
        return min(self._learn_budget, max(gained, self.OFF_LEARN_SHARE))

    # --- before a step ------------------------------------------------------------------------------------------

    def choose(self, request_ids: Sequence[Hashable], limits_B: Sequence[int]) -> list[int]:
        """How many tokens each request is to draft in the next step.

        Args:
            limits_B: Most that each may; what is left to generate less one, say.
        """
        limits = [max(0, min(limit, self._max)) for limit in limits_B]
        self._batch = len(limits)
        plain = [0] * len(limits)
        self._is_trial = False
        has_new = not self._known.issuperset(request_ids)
        self._known.update(request_ids)
        if not any(limits) or not (self._is_on or self._is_probe_due or has_new):
            return plain
        self._weigh(request_ids, limits)
        if not self._is_on:
            if not self._is_probe_due and (self._gain < self._RETURN or self._is_in_debt):
                return plain
            self._begin_probe()
        if self._is_losing():
            return plain
        if self._is_trial_due:
            return self._paired_test(limits)
        return self._probe(request_ids, limits) if self._is_probing else self._best.num_draft_tokens_B

    def _weigh(self, request_ids: Sequence[Hashable], limits: Sequence[int]) -> None:
        """Looks for the best drafting step, and what plain decoding brings beside it."""
        batch = len(limits)
        verify_by_rows = self._costs.verify_by_rows(batch, sum(limits))
        draft_by_depth = self._costs.draft_by_depth(batch, max(limits))
        survival = [self._acceptance.survival(*one) for one in zip(request_ids, limits, strict=True)]
        best = most_per_second(survival, verify_by_rows, draft_by_depth)
        self._best = best._replace(goodput=best.goodput * self._measured_over_expected)
        self._plain_seconds = verify_by_rows[0]

    @property
    def _gain(self) -> float:
        """Goodput of the best drafting step over that of plain decoding."""
        return self._best.goodput * self._plain_seconds / len(self._best.num_draft_tokens_B)

    def _is_losing(self) -> bool:
        """Whether plain decoding is better now; switches drafting off, or a probe on for good, once that is certain."""
        if self._num_drafted_steps < self._LEAST_STEPS or self._num_drafts < self._LEAST_DRAFTS:
            return False
        gain = self._gain
        self._num_losing = self._num_losing + 1 if gain < self._STAY else 0
        if self._num_losing >= self._LOSING_STEPS:
            self._switch_off()
        elif self._is_probing and self._num_drafted_steps >= (
            self._RETURN_STEPS if gain > self._RETURN else self._PROBE_STEPS
        ):
            self._return()
        return self._num_losing > 0

    def _switch_off(self) -> None:
        if self._is_probing:
            self._num_failed += 1
        else:
            self._num_switches += 1
            is_brief = self._num_probes > 0 and self._num_drafted_steps < self._LASTING
            self._num_failed = self._num_failed + 1 if is_brief else 0
            self._saved = -self._BRIEF_COST * self._num_drafted_steps * self._plain_seconds if is_brief else 0.0
        dearest, cheapest = self._MOST_DEBT * self._plain_seconds, self._LEAST_PROBE_COST * self._plain_seconds
        self._saved = max(-dearest, min(self._saved, -cheapest))  # a probe has spent from it
        self._is_on = self._is_probing = False
        self._trial_steps_left = 0

    def _return(self) -> None:
        self._is_probing, self._saved = False, 0.0
        self._num_switches += 1

    @property
    def _is_probe_due(self) -> bool:
        return self._saved >= 0

    @property
    def _is_in_debt(self) -> bool:
        """Whether trials have lost so much that not even a new request is a reason for one."""
        return self._saved < -0.5 * self._MOST_DEBT * self._plain_seconds

    @property
    def _is_trial_due(self) -> bool:
        return not self._is_probing and (self._saved >= 0 or self._trial_steps_left > 0)

    def _paired_test(self, limits: Sequence[int]) -> list[int]:
        if not self._trial_steps_left:
            self._trial_depth, self._trial_steps_left = self._costs.stalest(len(limits), max(limits)), self._TRIAL_STEPS
        self._trial_steps_left -= 1
        self._is_trial = True
        return [min(self._trial_depth, limit) for limit in limits]

    def _probe(self, request_ids: Sequence[Hashable], limits: Sequence[int]) -> list[int]:
        """Drafts for the few requests that have missed least: what a drafter missed it must read first."""
        order = sorted((self._missed.get(request_ids[i], 0), i) for i, limit in enumerate(limits) if limit)
        chosen = [0] * len(limits)
        for _, i in order[: self._PROBE_REQUESTS]:
            chosen[i] = max(1, self._best.num_draft_tokens_B[i])
        return chosen

    def _begin_probe(self) -> None:
        self._is_on = self._is_probing = True
        self._num_drafted_steps = self._num_drafts = self._num_losing = 0
        self._num_probes += 1
        self._saved = min(self._saved, 0.0)
        self._acceptance.discount(self._KEPT_IN_PROBE)
        self._measured = _Sums(
            *(m + self._PARDON * (e - m) for m, e in zip(self._measured, self._expected, strict=True))
        )

    # --- after a step -------------------------------------------------------------------------------------------

    def observe(self, record: StepRecord) -> None:
        """Hears of a step: of every one, whoever chose its shape."""
        drafted, is_trial = sum(record.num_draft_tokens_B), self._is_trial
        self._is_trial = False
        catches_up, scale = self._catches_up(record), self._costs.scale
        draft_seconds = 0.0 if catches_up else record.draft_seconds
        expected_seconds = sum(self._costs.observe(record.num_draft_tokens_B, draft_seconds, record.verify_seconds))
        longest = self._LONGEST_CATCHING_UP if catches_up else self._LONGEST
        ratio = min((record.draft_seconds + record.verify_seconds) / expected_seconds, longest)
        seconds = ratio * expected_seconds / scale
        expected_tokens = tokens = float(len(record.request_ids))
        if drafted:
            expected_tokens += sum(
                sum(self._acceptance.survival(*one))
                for one in zip(record.request_ids, record.num_draft_tokens_B, strict=True)
            )
            tokens += sum(record.num_accepted_B)
            self._num_drafted_steps += 1
            self._num_drafts += sum(K > 0 for K in record.num_draft_tokens_B)
            if self._acceptance.observe(record.request_ids, record.num_draft_tokens_B, record.num_accepted_B):
                self._num_drafts = 0  # judge anew
        if self._is_on and drafted and not (is_trial or self._is_probing or catches_up):
            self._measured = self._measured.plus(tokens / len(record.request_ids), ratio, self._FADING)
            self._expected = self._expected.plus(expected_tokens / len(record.request_ids), 1.0, self._FADING)
        self._account(seconds, tokens / len(record.request_ids), expected_tokens, is_trial)

    def on_new_weights(self) -> None:
        """Better weights draft from now on: while drafting is off, they are tried at once."""
        if not self._is_on:
            self._num_failed, self._saved = 0, max(self._saved, 0.0)

    def forget(self, request_id: Hashable) -> None:
        """The request is over."""
        self._acceptance.forget(request_id)
        self._missed.pop(request_id, None)
        self._known.discard(request_id)

    def report(self) -> dict[str, Any]:
        """What it is doing and why, for metrics and a live page; goodputs in committed tokens a second."""
        drafted, batch = self._best.num_draft_tokens_B if self._is_on else [], self._batch
        return {
            "is_drafting": self._is_on,
            "is_probing": self._is_probing,
            "num_draft_tokens": sum(drafted) / len(drafted) if drafted else 0.0,
            "goodput_drafting": self._best.goodput / self._costs.scale,
            "goodput_plain": batch / self._costs.step_seconds([0] * batch)[1] if batch else 0.0,
            "measured_over_expected": self._measured_over_expected,
            "acceptance_by_position": tuple(self._acceptance.probs),
            "num_probes": self._num_probes,
            "num_switches": self._num_switches,
            "learn_share": self.learn_share,
        }

    def _catches_up(self, record: StepRecord) -> bool:
        """Whether the drafter had to read what it missed in a pause first, which says nothing of other steps."""
        most = 0
        for request_id, num_drafted in zip(record.request_ids, record.num_draft_tokens_B, strict=True):
            if num_drafted:
                most = max(most, self._missed.pop(request_id, 0))
            else:
                self._missed[request_id] = self._missed.get(request_id, 0) + 1
        return most > self._FEW_MISSED

    @property
    def _measured_over_expected(self) -> float:
        return self._measured.goodput / self._expected.goodput

    def _account(self, seconds: float, tokens_each: float, expected_tokens: float, is_trial: bool) -> None:
        """Earns and spends what may be lost on trials."""
        if not self._is_on:
            share = self._FIRST_PROBE_SHARE * 0.5 ** min(self._num_failed, 10)
            self._saved += max(share, self._LEAST_PROBE_SHARE) * seconds
        elif self._is_probing:
            self._saved -= seconds - tokens_each * self._plain_seconds
        elif is_trial:
            self._saved -= max(seconds - expected_tokens / self._best.goodput, self._LEAST_LOSS * self._plain_seconds)
        else:
            self._saved += self._TRIAL_SHARE * seconds


class _Sums(NamedTuple):
    """Tokens and seconds, in units of anything."""

    tokens: float
    seconds: float

    @property
    def goodput(self) -> float:
        return self.tokens / self.seconds

    def plus(self, tokens: float, seconds: float, fading: float) -> _Sums:
        return _Sums(fading * self.tokens + tokens, fading * self.seconds + seconds)
