"""Chooses how many tokens each request drafts, 0 included, and how much time learning may take.

The aim is to be never slower than plain decoding. `choose` is called before a step, `observe` after it, `forget` when a
request ends. No clock is read: seconds come with the records, and the same records give the same choices.
Axis letters: B requests, K drafted tokens.

**Lossless.** Sampling is coupled (`lossless/noise.py`), so the text stays the same whatever the choice depends on, even
discarded drafts or the noise of tokens to come. Under the papers' rejection rule it might not; there the number of
drafted tokens is fixed.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from onlinespec.control.acceptance import Acceptance
from onlinespec.control.costs import StepCosts, TrackedCosts

__all__ = ["Choice", "Controller", "FixedController", "StepCosts", "StepRecord", "most_per_second"]


class StepRecord(NamedTuple):
    """The outcome and the time of a step. The scheduler passes one in after every step."""

    request_ids: Sequence[Hashable]
    num_draft_tokens_B: Sequence[int]  # as drafted; a drafter may draft fewer than it was asked for
    num_accepted_B: Sequence[int]
    draft_seconds: float  # 0 if nothing was drafted
    verify_seconds: float  # the target's forward pass, verification, commit; learning is not included


class Choice(NamedTuple):
    """The draft lengths of a step."""

    num_draft_tokens_B: list[int]
    goodput: float  # expected committed tokens per second; 0 if there was nothing to choose


def most_per_second(
    survival_BK: Sequence[Sequence[float]], verify_by_rows: Sequence[float], draft_by_depth: Sequence[Sequence[float]]
) -> Choice:
    """Returns the draft lengths with the highest expected goodput; at least one token is drafted.

    For each maximum depth, the tokens of all requests are sorted by their probability to be kept, and every prefix of
    that order is evaluated. This is optimal if each depth costs a fixed time and a constant per request, and close to
    optimal otherwise.

    Args:
        survival_BK: For each request, P(the first k tokens are kept) for each k that it may draft.
        verify_by_rows: Verify seconds by total number of drafted tokens.
        draft_by_depth: Seconds that the d-th token adds if n requests draft it, at [d - 1][n].

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
    """Always drafts the same number of tokens, and gives learning its whole budget (`--fixed-draft-length`)."""

    def __init__(self, num_draft_tokens: int, learn_budget: float) -> None:
        self._num_draft_tokens = num_draft_tokens
        self.learn_share = learn_budget

    def choose(self, request_ids: Sequence[Hashable], limits_B: Sequence[int]) -> list[int]:
        """Returns the fixed number for each request, at most its limit."""
        return [min(self._num_draft_tokens, limit) for limit in limits_B]

    def observe(self, record: StepRecord) -> None:
        """Does nothing."""

    def forget(self, request_id: Hashable) -> None:
        """Does nothing."""

    def on_new_weights(self) -> None:
        """Does nothing."""

    def report(self) -> dict[str, Any]:
        """Returns its state, for metrics and the live page."""
        return {"is_drafting": self._num_draft_tokens > 0, "num_draft_tokens": self._num_draft_tokens}


class Controller:
    """Drafts while that has a higher goodput than plain decoding, with the draft lengths of the highest goodput.

    Goodput is expected tokens over expected seconds: acceptance by position and request, costs by shape. The ratio of
    measured to expected goodput of recent drafting steps corrects it, because both models may be wrong. (A step counts
    as at most 1.5 times its expected time, so that outliers change little.)

    Exploring is paid from fixed shares of time. While drafting is on, `_EXPLORE_SHARE` goes into steps of the shape
    that was seen longest ago, plain decoding included. While it is off, drafting is tried for some steps, a probe: soon
    at first, then rarer as probes fail, down to `_LEAST_PROBE_SHARE`, because the drafter may have learned. A
    successful probe simply continues. A newly admitted request also ends a pause if the pooled acceptance estimate
    predicts a gain.

    Args:
        costs: From `control.costs.profile`, measured before serving.
        max_draft_tokens: Maximum number of drafted tokens per request and step.
        learn_budget: Share of decoding time that learning may take while drafting gains that much.

    Raises:
        ValueError: if max_draft_tokens is not between 1 and the deepest draft that was profiled.
    """

    OFF_LEARN_SHARE = 0.01  # learning's maximum share of time while drafting is off, or gains less than this

    _STAY, _RETURN = 0.99, 1.02  # goodput over plain decoding: off below the first, a probe succeeds above the second
    _LEAST_STEPS, _LEAST_DRAFTS = 2, 4  # before drafting is judged; a draft is one request's in one step
    _LOSING_STEPS = 8  # consecutive losing choices (decoded plainly) before drafting is off: ends of answers are short
    _RETURN_STEPS, _PROBE_STEPS = 16, 32  # drafting steps after which a probe has succeeded: with a clear gain, without

    _FIRST_PROBE_SHARE, _LEAST_PROBE_SHARE = 0.02, 0.004  # of time while off; halved by each failed probe
    _PROBE_REQUESTS = 2  # requests that draft in a step of a probe
    _LEAST_PROBE_COST, _MOST_DEBT = 0.25, 4.0  # bounds of what a probe counts as having cost, in plain steps
    _LASTING, _BRIEF_COST = 32, 0.1  # a return of fewer drafting steps counts as failed, at this cost per step
    _PARDON = 0.1  # each probe moves measured/expected 10 % towards 1: an old underestimate must not disable drafting
    _KEPT_IN_PROBE = 24.0  # tokens at each position that the acceptance estimate is worth when a probe begins
    _EXPLORE_SHARE = 0.003  # of time while on
    _EXPLORE_STEPS = 2  # consecutive steps of a shape, because costs need two measurements that agree

    _FEW_MISSED = 4  # steps without drafts whose tokens a drafter can process later without a measurable delay
    _FADING = 1 - 1 / 256  # decay of measured and expected sums, per drafting step
    _FIRM = 64.0  # steps exactly as expected that the sums start with
    _LONGEST, _LONGEST_CATCHING_UP = 1.5, 20.0  # a step's maximum ratio of measured to expected time; after a pause
    _LEAST_LOSS = 0.05  # minimum cost of an exploring step, in plain steps, so that they stay rare

    def __init__(self, costs: StepCosts, max_draft_tokens: int, learn_budget: float = 0.08) -> None:
        if not 1 <= max_draft_tokens <= costs.max_draft_tokens:
            raise ValueError(
                f"max_draft_tokens is {max_draft_tokens}, but costs are known from 1 to {costs.max_draft_tokens}; "
                "profile deeper drafts or draft fewer tokens"
            )
        self._costs, self._acceptance = TrackedCosts(costs), Acceptance(max_draft_tokens)
        self._max, self._learn_budget = max_draft_tokens, learn_budget
        self._is_on, self._is_probing = True, False  # probing: on until the probe is decided
        self._num_drafted_steps = self._num_drafts = 0  # since drafting was last switched on
        self._saved = -0.3 * costs.verify_seconds[0][0]  # seconds that exploring may cost, at the profiled speed
        self._explore_depth, self._explore_steps_left, self._is_exploring = 0, 0, False
        self._num_failed = self._num_probes = self._num_switches = 0
        self._measured, self._expected = _Sums(self._FIRM, self._FIRM), _Sums(self._FIRM, self._FIRM)
        self._best = Choice([], 0.0)
        self._plain_seconds = costs.verify_seconds[0][0]  # of a step without drafts
        self._batch = 0  # requests in the last step
        self._num_losing = 0  # consecutive choices for which plain decoding was better
        self._known: set[Hashable] = set()  # requests
        self._missed: dict[Hashable, int] = {}  # steps since a request last drafted

    @property
    def learn_share(self) -> float:
        """Share of decoding time that learning may take now: at most what drafting gains; 1 % while it is off."""
        if not self._best.num_draft_tokens_B:  # before the first choice
            return self._learn_budget
        gained = 1 - 1 / self._gain if self._is_on and not self._is_probing else 0.0
        return min(self._learn_budget, max(gained, self.OFF_LEARN_SHARE))

    # --- before a step ------------------------------------------------------------------------------------------

    def choose(self, request_ids: Sequence[Hashable], limits_B: Sequence[int]) -> list[int]:
        """Returns how many tokens each request drafts in the next step.

        Args:
            limits_B: The maximum for each request.
        """
        limits = [max(0, min(limit, self._max)) for limit in limits_B]
        self._batch = len(limits)
        plain = [0] * len(limits)
        self._is_exploring = False
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
        if self._is_exploring_due:
            return self._explore(limits)
        return self._probe(request_ids, limits) if self._is_probing else self._best.num_draft_tokens_B

    def _weigh(self, request_ids: Sequence[Hashable], limits: Sequence[int]) -> None:
        """Finds the best drafting step, and the time of a plain one."""
        batch = len(limits)
        verify_by_rows = self._costs.verify_by_rows(batch, sum(limits))
        draft_by_depth = self._costs.draft_by_depth(batch, max(limits))
        survival = [self._acceptance.survival(*one) for one in zip(request_ids, limits, strict=True)]
        best = most_per_second(survival, verify_by_rows, draft_by_depth)
        self._best = best._replace(goodput=best.goodput * self._measured_over_expected)
        self._plain_seconds = verify_by_rows[0]

    @property
    def _gain(self) -> float:
        """Goodput of the best drafting step, relative to plain decoding."""
        return self._best.goodput * self._plain_seconds / len(self._best.num_draft_tokens_B)

    def _is_losing(self) -> bool:
        """Whether plain decoding is better now. Switches drafting off, or ends a good probe, once that is clear."""
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
        self._explore_steps_left = 0

    def _return(self) -> None:
        self._is_probing, self._saved = False, 0.0
        self._num_switches += 1

    @property
    def _is_probe_due(self) -> bool:
        return self._saved >= 0

    @property
    def _is_in_debt(self) -> bool:
        """Whether probes have cost so much that even a new request does not start one."""
        return self._saved < -0.5 * self._MOST_DEBT * self._plain_seconds

    @property
    def _is_exploring_due(self) -> bool:
        return not self._is_probing and (self._saved >= 0 or self._explore_steps_left > 0)

    def _explore(self, limits: Sequence[int]) -> list[int]:
        if not self._explore_steps_left:
            self._explore_depth = self._costs.stalest(len(limits), max(limits))
            self._explore_steps_left = self._EXPLORE_STEPS
        self._explore_steps_left -= 1
        self._is_exploring = True
        return [min(self._explore_depth, limit) for limit in limits]

    def _probe(self, request_ids: Sequence[Hashable], limits: Sequence[int]) -> list[int]:
        """Drafts for the two requests with the fewest steps since their last draft: they cost least to catch up."""
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
        """Updates all estimates with a step, whether `choose` chose its shape or not."""
        drafted, is_exploring = sum(record.num_draft_tokens_B), self._is_exploring
        self._is_exploring = False
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
                self._num_drafts = 0  # judge drafting anew
        if self._is_on and drafted and not (is_exploring or self._is_probing or catches_up):
            self._measured = self._measured.plus(tokens / len(record.request_ids), ratio, self._FADING)
            self._expected = self._expected.plus(expected_tokens / len(record.request_ids), 1.0, self._FADING)
        self._account(seconds, tokens / len(record.request_ids), expected_tokens, is_exploring)

    def on_new_weights(self) -> None:
        """Reacts to new drafter weights: if drafting is off, a probe starts at once."""
        if not self._is_on:
            self._num_failed, self._saved = 0, max(self._saved, 0.0)

    def forget(self, request_id: Hashable) -> None:
        """Drops what is known of a request that has ended."""
        self._acceptance.forget(request_id)
        self._missed.pop(request_id, None)
        self._known.discard(request_id)

    def report(self) -> dict[str, Any]:
        """Returns its state, for metrics and the live page; goodputs are in committed tokens per second."""
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
        """Whether the drafter first had to process tokens of steps without drafts, so that this time is not typical."""
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

    def _account(self, seconds: float, tokens_each: float, expected_tokens: float, is_exploring: bool) -> None:
        """Earns and spends the time for exploring."""
        if not self._is_on:
            share = self._FIRST_PROBE_SHARE * 0.5 ** min(self._num_failed, 10)
            self._saved += max(share, self._LEAST_PROBE_SHARE) * seconds
        elif self._is_probing:
            self._saved -= seconds - tokens_each * self._plain_seconds
        elif is_exploring:
            self._saved -= max(seconds - expected_tokens / self._best.goodput, self._LEAST_LOSS * self._plain_seconds)
        else:
            self._saved += self._EXPLORE_SHARE * seconds


class _Sums(NamedTuple):
    """Sums of tokens and seconds, in any units."""

    tokens: float
    seconds: float

    @property
    def goodput(self) -> float:
        return self.tokens / self.seconds

    def plus(self, tokens: float, seconds: float, fading: float) -> _Sums:
        return _Sums(fading * self.tokens + tokens, fading * self.seconds + seconds)
