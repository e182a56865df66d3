"""A serving machine made of formulas: known costs, known acceptance, no clock. For `control`.

A token's fate hangs on its place alone: a uniform number per request and position decides whether a draft of it is
kept, so that contenders differ by what they choose and not by luck. Time is counted, not taken; noise is in what the
controller sees and not in what is counted, where the luck of hiccups would drown the differences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from onlinespec.control.chooser import StepRecord
from onlinespec.control.costs import StepCosts, profile

BATCH_SIZES, DEPTHS = (1, 2, 4, 8, 16), (0, 1, 2, 3, 4, 6, 8)
MAX_DRAFT_TOKENS = 8

Prob = Callable[[float, int, int], float]  # of progress 0..1, request number and position: P(kept | reached)


@dataclass(frozen=True)
class Machine:
    """Seconds by formula. By default a target of 8 M on a CPU with a drafter of a tenth."""

    target: float = 3e-3  # a step of one row
    row: float = 1.5e-4  # each further row
    draft: float = 3e-4  # a depth, whoever drafts ...
    draft_row: float = 3e-5  # ... and each request that does
    missed: float = 2e-5  # each token that a drafter must read after a pause
    noise: float = 0.0  # standard deviation of the logarithm of seconds
    hiccup: float = 0.0  # probability that a step takes ten times as long

    def draft_seconds(self, num_draft_tokens_B: Sequence[int], num_missed: int = 0) -> float:
        depths = [sum(d < K for K in num_draft_tokens_B) for d in range(max(num_draft_tokens_B))]
        return sum(self.draft + self.draft_row * n for n in depths) + self.missed * num_missed

    def verify_seconds(self, num_draft_tokens_B: Sequence[int]) -> float:
        rows = len(num_draft_tokens_B) + sum(num_draft_tokens_B)
        return self.target + self.row * (rows - 1)

    def profile(self) -> StepCosts:
        def measure(batch: int, depth: int) -> tuple[float, float]:
            shape = [depth] * batch
            return self.draft_seconds(shape), self.verify_seconds(shape)

        return profile(measure, BATCH_SIZES, DEPTHS, repeats=1)


@dataclass
class Run:
    """What a contender did with a run's tokens."""

    seconds: float = 0.0  # learning included
    tokens: int = 0
    steps: int = 0
    drafted_steps: int = 0
    switches: int = 0  # between steps with drafts and steps without
    shares: list[float] = field(default_factory=list)  # learn_share, after each step
    depths: list[float] = field(default_factory=list)  # mean drafted tokens, of each step
    seconds_at: list[float] = field(default_factory=list)  # at every hundredth of the tokens


class Fixed:
    """The same number of drafted tokens for all requests, in every step."""

    learn_share = 0.0

    def __init__(self, num_draft_tokens: int) -> None:
        self.num_draft_tokens = num_draft_tokens

    def choose(self, request_ids, limits_B):
        return [min(self.num_draft_tokens, limit) for limit in limits_B]

    def observe(self, record):
        pass

    def forget(self, request_id):
        pass


def simulate(
    controller,
    machine: Machine,
    prob: Prob,
    batch: int = 1,
    num_tokens: int = 20_000,
    answer: int = 200,
    seed: int = 0,
    learning: bool = False,
) -> Run:
    """Serves `num_tokens` tokens, always `batch` requests at once, each of `answer` tokens."""
    rng, run = np.random.default_rng(seed + 1_000_000), Run()
    uniforms = np.random.default_rng(seed).random((num_tokens // answer + batch + 1, answer + MAX_DRAFT_TOKENS + 1))
    numbers, places, missed = list(range(batch)), [i * answer // batch for i in range(batch)], [0] * batch
    was_drafting = True
    while run.tokens < num_tokens:
        limits = [answer - place - 1 for place in places]
        depths = controller.choose(numbers, limits)
        assert all(0 <= depth <= max(0, limit) for depth, limit in zip(depths, limits, strict=True))
        progress = run.tokens / num_tokens
        accepted = []
        for i, depth in enumerate(depths):
            row, kept = uniforms[numbers[i]], 0
            while kept < depth and row[places[i] + kept] < prob(progress, numbers[i], kept):
                kept += 1
            accepted.append(kept)
        late = sum(count for count, depth in zip(missed, depths, strict=True) if depth)
        hiccup = 10.0 if machine.hiccup and rng.random() < machine.hiccup else 1.0
        noise = hiccup * np.exp(machine.noise * rng.standard_normal(2)) if machine.noise else (1.0, 1.0)
        draft, verify = machine.draft_seconds(depths, late), machine.verify_seconds(depths)
        noisy = draft * float(noise[0]), verify * float(noise[1])
        controller.observe(StepRecord(list(numbers), depths, accepted, *noisy))
        run.seconds += (draft + verify) * (1 + controller.learn_share * learning)
        run.steps += 1
        is_drafting = any(depths)
        run.drafted_steps += is_drafting
        run.switches += is_drafting != was_drafting
        was_drafting = is_drafting
        run.shares.append(controller.learn_share)
        run.depths.append(sum(depths) / batch)
        for i, kept in enumerate(accepted):
            run.tokens += kept + 1
            places[i] += kept + 1
            missed[i] = 0 if depths[i] else missed[i] + 1
            if places[i] >= answer:
                controller.forget(numbers[i])
                numbers[i], places[i], missed[i] = max(numbers) + 1, 0, 0
        while len(run.seconds_at) < 100 * run.tokens // num_tokens:
            run.seconds_at.append(run.seconds)
    return run


def best_fixed(*args, **kwargs) -> tuple[int, Run]:
    """The fixed number of drafted tokens that is fastest in hindsight, and its run."""
    runs = {depth: simulate(Fixed(depth), *args, **kwargs) for depth in range(MAX_DRAFT_TOKENS + 1)}
    return min(runs.items(), key=lambda one: one[1].seconds)


def always(*probs: float) -> Prob:
    """A drafter whose tokens are kept with these probabilities; the last one holds for all further positions."""
    return lambda progress, request, position: probs[min(position, len(probs) - 1)]


def turning(before: Prob, after: Prob, at: float = 0.5) -> Prob:
    """One drafter, and from that share of the tokens on another."""
    return lambda progress, *place: before(progress, *place) if progress < at else after(progress, *place)


HOPELESS, GOOD = always(0.05), always(0.8, 0.75, 0.7)
DRAFTERS = {
    "hopeless": HOPELESS,
    "good": GOOD,
    "becomes good": turning(HOPELESS, GOOD),
    "goes bad": turning(GOOD, HOPELESS),
}
