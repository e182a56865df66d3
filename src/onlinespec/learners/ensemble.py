"""Ensembles: experts with different step sizes, weighted by Hedge on their losses before each update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from onlinespec.learners import make_learner
from onlinespec.learners.base import Evaluate, Evaluation, Learner, Params
from onlinespec.learners.geometry import Geometry, Preconditioned, averaged, check_pool, inner_product, is_finite

_GAP_DECAY = 0.8  # of the averaging gap's moving average, per round
_LEAST_GAP = 1e-4  # nats; a smaller gap is rounding
_MOVE_COST = 0.33  # cost of another expert on the same gradient, in rounds; 0.19 to 0.33 in benchmarks/rounds.py


@dataclass(frozen=True)
class Hedge:
    """Hedge: exponential weights over experts, on losses scaled into [0, 1].

    Losses are taken relative to the round's best, because a common offset has no influence, and cut at `loss_range`
    nats. With discount 1 the regret of N experts against the best one over T rounds, in units of loss_range, is at most

        ln(N) / meta_step_size + meta_step_size * T / 8

    The bound is only useful below T, the largest possible regret. **At the defaults it is not**: the meta_step_size of
    10, OnlineSpec's, is above 8, and a discount below 1 gives up the comparison with one expert over the whole stream.
    The weights then follow whichever expert did best in the last twenty rounds or so, which may be the wrong one each
    time if losses swing. The bound is smallest at meta_step_size = sqrt(8 ln(N) / T), where it is sqrt(T ln(N) / 2):
    for three experts and 220 rounds at 0.2, with 0.05 of a loss_range per round. At 0.2 it is useful from the sixth
    round on.

    Args:
        meta_step_size: The rate of the exponential weights.
        discount: Share of old losses that is kept in each round; below 1, an expert's past is forgotten.
        loss_range: Maximum difference between losses that counts, in nats.

    Raises:
        ValueError: for numbers out of range.

    Reference: Freund and Schapire (1997); Cesa-Bianchi and Lugosi (2006), theorem 2.2; OnlineSpec, arXiv:2603.12617,
    section on the ensemble.
    """

    meta_step_size: float = 10.0
    discount: float = 0.95
    loss_range: float = 1.0

    def __post_init__(self) -> None:
        for name in ("meta_step_size", "discount", "loss_range"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a positive number")
        if self.discount > 1:
            raise ValueError(f"discount is {self.discount}; it must be at most 1")

    def regret_bound(self, num_experts: int, num_rounds: int) -> float | None:
        """Returns the regret bound over all rounds, in nats.

        That is how much the weighted mean of the experts' losses may exceed the best expert's. None if there is no
        bound, or if it is not below one loss_range per round.

        >>> Hedge(meta_step_size=0.2, discount=1.0).regret_bound(num_experts=3, num_rounds=220)
        10.9931
        >>> Hedge().regret_bound(num_experts=3, num_rounds=220) is None
        True
        """
        if self.discount < 1:
            return None
        bound = math.log(num_experts) / self.meta_step_size + self.meta_step_size * num_rounds / 8
        return self.loss_range * bound if bound < num_rounds else None

    def charged(self, costs: Sequence[float], losses: Sequence[float]) -> tuple[float, ...]:
        """Returns the costs after a round. A loss that is not finite makes a cost infinite, for good."""
        best = min((loss for loss in losses if math.isfinite(loss)), default=0.0)
        return tuple(
            self.discount * cost + (min((loss - best) / self.loss_range, 1.0) if math.isfinite(loss) else math.inf)
            for cost, loss in zip(costs, losses, strict=True)
        )

    def weights(self, costs: Sequence[float]) -> tuple[float, ...]:
        """Returns exp(-meta_step_size * cost), normalised.

        >>> Hedge(meta_step_size=math.log(3)).weights([1.0, 0.0])
        (0.25, 0.75)
        """
        least = min(costs)
        raw = [math.exp(-self.meta_step_size * (cost - least)) if math.isfinite(cost) else 0.0 for cost in costs]
        total = sum(raw) or math.nan  # NaN if no expert is left
        return tuple(weight / total for weight in raw)


class EnsembleState(NamedTuple):
    """The experts' states, their costs, and the weights that play."""

    experts: tuple[Any, ...]
    costs: tuple[float, ...]  # discounted losses; infinite for an expert that diverged, which is out for good
    meta_weights: tuple[float, ...]
    mean: Params  # mean of the experts' weights, by meta weight
    best: int | None  # index of the expert that plays alone; None if the mean plays
    losses: tuple[float, ...]  # of the last round, before the update
    averaging_gap: float  # moving average of f(mean of weights) - mean of f(weights); above 0, averaging hurts
    num_rounds: int = 0


@dataclass(frozen=True)
class Ensemble(Learner):
    """Independent experts on the same feedback. The mean of their weights, by meta weight, plays.

    Each expert is charged its loss before its own update (prequential) and never sees the mean. While the mean of the
    weights has a higher loss than the mean of the losses, the expert with the largest meta weight plays instead.

    For convex losses its regret bound is `Hedge`'s, which is useful at `meta_step_size=0.2/discount=1`, for instance,
    but not at the defaults. A drafter's loss is not convex in its weights: then the bound is for the mean of the
    experts' losses, which the loss of the mean weights may exceed by the averaging gap.

    Args:
        step_size_pool: The experts' step sizes; by default a third of `step_size`, `step_size`, and three times it.
        base: The learner of the experts, by name.
        with_frozen: Adds an expert that never moves, so that the meta weights can return to the initial weights.
        meta_step_size, discount, loss_range: See `Hedge`.
        gap_every: Evaluates the mean weights, for the averaging gap, once in this many rounds.

    Raises:
        ValueError: for an unknown name or a number out of range.

    Reference: OnlineSpec, arXiv:2603.12617, corollary 3 (theirs without the averaging gap).
    """

    step_size: float
    geometry: Geometry = Preconditioned()
    clip_norm: float = 1.0
    step_size_pool: tuple[float, ...] = ()
    base: str = "online_gradient"
    with_frozen: bool = False
    meta_step_size: float = Hedge.meta_step_size
    discount: float = Hedge.discount
    loss_range: float = Hedge.loss_range
    gap_every: int = 4

    def __post_init__(self) -> None:
        if self.gap_every < 1:
            raise ValueError(f"gap_every is {self.gap_every}; it must be at least 1")
        check_pool(self._pool)
        if any(type(expert) is Ensemble for expert in self.experts):
            raise ValueError(f"base is {self.base}; an expert asks for one gradient a round, an ensemble for several")
        _ = self.hedge  # checks its settings

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the experts in telemetry: their step sizes, and `frozen`."""
        return tuple(f"{size:.3g}" for size in self._pool) + ("frozen",) * self.with_frozen

    @cached_property
    def experts(self) -> tuple[Learner, ...]:
        learning = (make_learner(self.base, size, self.geometry, self.clip_norm) for size in self._pool)
        return (*learning, *[make_learner("frozen", 0.0)] * self.with_frozen)

    @cached_property
    def hedge(self) -> Hedge:
        return Hedge(self.meta_step_size, self.discount, self.loss_range)

    @property
    def _pool(self) -> tuple[float, ...]:
        return self.step_size_pool or (self.step_size / 3, self.step_size, self.step_size * 3)

    def init(self, params: Params) -> EnsembleState:
        n = len(self.experts)
        states = tuple(expert.init(params) for expert in self.experts)
        return EnsembleState(states, (0.0,) * n, (1 / n,) * n, params, None, (math.nan,) * n, averaging_gap=0.0)

    @property
    def plays_ahead(self) -> bool:
        return any(expert.plays_ahead for expert in self.experts)

    def played(self, state: EnsembleState) -> Params:
        return state.mean if state.best is None else self.experts[state.best].played(state.experts[state.best])

    def settled(self, state: EnsembleState) -> Params:
        """Returns the same combination as `played`, of the experts' settled weights."""
        if not self.plays_ahead:
            return self.played(state)
        settled = [expert.settled(own) for expert, own in zip(self.experts, state.experts, strict=True)]
        return averaged(settled, state.meta_weights) if state.best is None else settled[state.best]

    def update(self, evaluate: Evaluate, state: EnsembleState) -> EnsembleState:
        evaluations, merged = self._evaluations(evaluate, state)
        losses = tuple(evaluation.fresh_loss if evaluation else math.nan for evaluation in evaluations)
        experts = tuple(
            expert.update(_answer(evaluation, evaluate), own)
            if evaluation and math.isfinite(evaluation.total_loss)
            else own
            for expert, evaluation, own in zip(self.experts, evaluations, state.experts, strict=True)
        )
        next_state = state._replace(
            experts=experts,
            costs=self.hedge.charged(state.costs, losses),
            losses=losses,
            averaging_gap=self._gap(state, losses, merged),
            num_rounds=state.num_rounds + 1,
        )
        return self._playing(next_state)

    def expect(self, domain: str, state: EnsembleState) -> EnsembleState:
        pairs = zip(self.experts, state.experts, strict=True)
        experts = tuple(expert.expect(domain, own) for expert, own in pairs)
        if all(new is old for new, old in zip(experts, state.experts, strict=True)):
            return state
        return self._playing(state._replace(experts=experts))

    def undone(self, earlier: EnsembleState, state: EnsembleState) -> EnsembleState:
        """Restores the experts, but keeps their costs: otherwise the expert that did harm would lead again."""
        return self._playing(state._replace(experts=earlier.experts))

    def report(self, state: EnsembleState) -> dict[str, Any]:
        return {
            "expert_losses": dict(zip(self.names, state.losses, strict=True)),
            "meta_weights": dict(zip(self.names, state.meta_weights, strict=True)),
            "averaging_gap": state.averaging_gap,
            "is_best_played": state.best is not None,
            "regret_bound_per_round": self._bound(state),
        }

    def _bound(self, state: EnsembleState) -> float | None:
        """The regret bound per round, in nats; None if there is no useful bound."""
        if not all(map(math.isfinite, state.costs)):  # an infinite loss is outside of every range
            return None
        bound = self.hedge.regret_bound(len(self.experts), state.num_rounds)
        return bound / state.num_rounds if bound is not None else None

    def _evaluations(
        self, evaluate: Evaluate, state: EnsembleState
    ) -> tuple[list[Evaluation | None], Evaluation | None]:
        """Evaluates all experts that are not out, and in some rounds the mean weights, in one call."""
        alive = [i for i, cost in enumerate(state.costs) if math.isfinite(cost)]
        asked = [i for i in alive if self.experts[i].needs_gradient]
        scored = [i for i in alive if not self.experts[i].needs_gradient]
        plays = {i: self.experts[i].played(state.experts[i]) for i in alive}
        means = [state.mean] if state.num_rounds % self.gap_every == 0 else []
        own = evaluate(*(plays[i] for i in asked), scored=[*(plays[i] for i in scored), *means])
        merged = own.pop() if means else None
        by_expert = dict(zip(asked + scored, own, strict=True))
        return [by_expert.get(i) for i in range(len(self.experts))], merged

    def _gap(self, state: EnsembleState, losses: Sequence[float], merged: Evaluation | None) -> float:
        """The averaging gap after a round; unchanged if a loss that counts is unknown or not finite."""
        if merged is None:
            return state.averaging_gap
        decay = _GAP_DECAY**self.gap_every
        gap = sum(w * (merged.fresh_loss - loss) for w, loss in zip(state.meta_weights, losses, strict=True) if w)
        return decay * state.averaging_gap + (1 - decay) * gap if math.isfinite(gap) else state.averaging_gap

    def _playing(self, state: EnsembleState) -> EnsembleState:
        """The state with meta weights from its costs, and the weights that play."""
        plays = [expert.played(own) for expert, own in zip(self.experts, state.experts, strict=True)]
        costs = [cost if is_finite(params) else math.inf for cost, params in zip(state.costs, plays, strict=True)]
        meta_weights = self.hedge.weights(costs)
        mean = averaged(plays, meta_weights)
        best = meta_weights.index(max(meta_weights)) if state.averaging_gap > _LEAST_GAP else None
        return state._replace(costs=tuple(costs), meta_weights=meta_weights, mean=mean, best=best)


@dataclass(frozen=True)
class SurrogateEnsemble(Ensemble):
    """Experts that all follow the gradient at the mean, and are charged its linear model, <gradient, weights - mean>.

    It needs one gradient per round, whatever the number of experts. OnlineSpec does not do this. By linearity the
    averaging gap is 0. The gradient is of all rows, replayed and deeper ones included, so the reported losses of
    experts can be compared with each other only. Experts that share a gradient drift apart and never meet again, so a
    large meta step would jump between the ends of the pool; therefore the default is small.

    Reference: Ader, arXiv:1810.10815.
    """

    meta_step_size: float = 0.1

    @property
    def extra_work(self) -> float:
        return _MOVE_COST * (len(self.experts) - 1)

    def _evaluations(
        self, evaluate: Evaluate, state: EnsembleState
    ) -> tuple[list[Evaluation | None], Evaluation | None]:
        (merged,) = evaluate(state.mean)
        plays = (expert.played(own) for expert, own in zip(self.experts, state.experts, strict=True))
        moved = (inner_product(merged.grads, params, state.mean) for params in plays)
        losses = [
            merged.fresh_loss + m if math.isfinite(cost) else None for m, cost in zip(moved, state.costs, strict=True)
        ]
        return [None if loss is None else merged._replace(fresh_loss=loss) for loss in losses], merged

    def _gap(self, state: EnsembleState, losses: Sequence[float], merged: Evaluation | None) -> float:
        return 0.0  # exactly, so that rounding can't make the best expert play


def _answer(evaluation: Evaluation, evaluate: Evaluate) -> Evaluate:
    """An `evaluate` for one expert: it returns the gradient at its own weights, which is known already."""

    def answer(*candidates: Params, scored: Sequence[Params] = ()) -> list[Evaluation]:
        return [evaluation] * len(candidates) + (evaluate(scored=scored) if scored else [])

    return answer
