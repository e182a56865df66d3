"""Several step sizes at once: independent experts, weighed by how well each would have served."""

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
_LEAST_GAP = 1e-4  # nats; less is rounding
_MOVE_COST = 0.33  # of a round, for another expert on the same gradient; 0.19 to 0.33 in benchmarks/rounds.py


@dataclass(frozen=True)
class Hedge:
    """Weights over experts from their losses: exponential, on losses scaled into [0, 1].

    What all experts lose alike changes nothing, so losses count from the round's best; differences beyond `loss_range`
    nats count as that many. With discount 1 the regret of N experts against the best one is over T rounds, in units of
    loss_range, at most

        ln(N) / meta_step_size + meta_step_size * T / 8

    which says something while it is below T, what can be lost at most. **At the defaults it says nothing**: a
    meta_step_size of 10, OnlineSpec's, is above 8, and a discount below 1 gives up the comparison with one expert over
    the whole stream. The weights then follow whichever expert did best in the last twenty rounds or so, and losses that
    swing can make that the wrong one each time. The bound is least at meta_step_size = sqrt(8 ln(N) / T), where it is
    sqrt(T ln(N) / 2): for three experts and 220 rounds at 0.2, with 0.05 of a loss_range a round. With that
    meta_step_size it says something from the sixth round on.

    Args:
        discount: Share of the old losses kept each round; below 1 an expert's past is forgiven, as after a drift.

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
        """Nats over all rounds that the experts' losses, averaged by these weights, exceed the best expert's, at most.

        None where a bound says nothing: it is no smaller than a loss_range for every round, or there is none at all.

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
        """Costs after a round. A loss that is not finite is charged for ever."""
        best = min((loss for loss in losses if math.isfinite(loss)), default=0.0)
        return tuple(
            self.discount * cost + (min((loss - best) / self.loss_range, 1.0) if math.isfinite(loss) else math.inf)
            for cost, loss in zip(costs, losses, strict=True)
        )

    def weights(self, costs: Sequence[float]) -> tuple[float, ...]:
        """The simplex: exp(-meta_step_size * cost), normalised.

        >>> Hedge(meta_step_size=math.log(3)).weights([1.0, 0.0])
        (0.25, 0.75)
        """
        least = min(costs)
        raw = [math.exp(-self.meta_step_size * (cost - least)) if math.isfinite(cost) else 0.0 for cost in costs]
        total = sum(raw) or math.nan  # no expert is left
        return tuple(weight / total for weight in raw)


class EnsembleState(NamedTuple):
    """The experts' own states, what each has cost, and what plays."""

    experts: tuple[Any, ...]
    costs: tuple[float, ...]  # infinite for an expert that blew up: it is out for good
    meta_weights: tuple[float, ...]
    mean: Params  # of the experts' weights, by meta weight
    best: int | None  # the expert that plays alone; None: the mean plays
    losses: tuple[float, ...]  # of the last round, before the update
    averaging_gap: float  # moving average of f(mean of weights) - mean of f(weights); above 0, averaging hurts
    num_rounds: int = 0


@dataclass(frozen=True)
class Ensemble(Learner):
    """Experts that learn apart, on the same feedback; what drafts is the mean of their weights.

    Each expert is charged for its loss before its own update (prequential) and never sees the mean. While the mean of
    the weights scores worse than the mean of the scores, the expert with the largest meta weight plays instead.

    Its regret bound is `Hedge`'s, by convexity, where that says something: at `meta_step_size=0.2/discount=1`, say,
    and not at the defaults. The losses of a drafter are not convex in its weights: what is bounded there is the mean of
    the experts' losses, which the mean of their weights may exceed by the averaging gap.

    Args:
        step_size_pool: The experts' step sizes; by default a third of `step_size`, `step_size`, and three times it.
        base: The experts' learner, by name.
        gap_every: Score the mean, for the averaging gap, at every so-manieth round; no expert needs it.
        with_frozen: Add an expert that never moves, so that the meta weights can return to the start.
        meta_step_size, discount, loss_range: As `Hedge` has them.

    Raises:
        ValueError: for a name that is not known or a number out of range.

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
        _ = self.hedge  # what it refuses is refused now

    @property
    def names(self) -> tuple[str, ...]:
        """What telemetry calls the experts: their step sizes, and `frozen`."""
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
        """As what plays, of what each expert has learned."""
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
        """The experts are put back; what they have cost since then is not forgotten, or the worst would lead again."""
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
        """Nats a round above the best expert, at most; None where no bound says anything."""
        if not all(map(math.isfinite, state.costs)):  # a loss that is not finite is out of every range
            return None
        bound = self.hedge.regret_bound(len(self.experts), state.num_rounds)
        return bound / state.num_rounds if bound is not None else None

    def _evaluations(
        self, evaluate: Evaluate, state: EnsembleState
    ) -> tuple[list[Evaluation | None], Evaluation | None]:
        """One for each expert still in, and now and then one for the mean of their weights; all asked for at once."""
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
        """The averaging gap after a round; one in which a loss that counts is not finite or unknown says nothing."""
        if merged is None:
            return state.averaging_gap
        decay = _GAP_DECAY**self.gap_every
        gap = sum(w * (merged.fresh_loss - loss) for w, loss in zip(state.meta_weights, losses, strict=True) if w)
        return decay * state.averaging_gap + (1 - decay) * gap if math.isfinite(gap) else state.averaging_gap

    def _playing(self, state: EnsembleState) -> EnsembleState:
        """The state with the meta weights that its costs call for, and what they make play."""
        plays = [expert.played(own) for expert, own in zip(self.experts, state.experts, strict=True)]
        costs = [cost if is_finite(params) else math.inf for cost, params in zip(state.costs, plays, strict=True)]
        meta_weights = self.hedge.weights(costs)
        mean = averaged(plays, meta_weights)
        best = meta_weights.index(max(meta_weights)) if state.averaging_gap > _LEAST_GAP else None
        return state._replace(costs=tuple(costs), meta_weights=meta_weights, mean=mean, best=best)


@dataclass(frozen=True)
class SurrogateEnsemble(Ensemble):
    """Experts that all follow the one gradient of the mean, charged for its linear model: <gradient, weights - mean>.

    One gradient a round whatever the number of experts; not what OnlineSpec does. By linearity the averaging gap is 0.
    That gradient is of all rows, replayed ones and deeper ones included, and so is what experts are charged: their
    reported losses compare with each other and with nothing else.
    Experts that share a gradient never come back together, so a meta step that is large swings from one end of the pool
    to the other; hence the small default.

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
        return 0.0  # what rounding leaves of it must not choose what plays


def _answer(evaluation: Evaluation, evaluate: Evaluate) -> Evaluate:
    """An `evaluate` that knows the one gradient an expert may ask for: at its own weights, already asked for."""

    def answer(*candidates: Params, scored: Sequence[Params] = ()) -> list[Evaluation]:
        return [evaluation] * len(candidates) + (evaluate(scored=scored) if scored else [])

    return answer
