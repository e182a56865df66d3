"""The ensemble of OnlineSpec's released code, whose experts restart at the merged weights. For comparisons only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from onlinespec.learners.base import Evaluate, Learner, Params
from onlinespec.learners.geometry import Geometry, Point, Preconditioned, averaged, check_pool, clip_by_norm


class ResetToMergedState(NamedTuple):
    """The merged weights, which play, and the shares of the experts in them."""

    point: Point
    geometry: Any
    meta_weights: tuple[float, ...]


@dataclass(frozen=True)
class ResetToMerged(Learner):
    """In every round all experts start at the merged weights, so they share one gradient; each takes its own step:

        w_i = w - step_size_i * direction(clip(grad f(w)))
        w_next = sum share_i * w_i    with share_i ~ exp(-f(w_i) / temperature)

    The shares come from losses on the data just trained on (in-sample) and are recomputed in every round, so this
    searches for a step size and is no ensemble. With equal shares it moves `effective_step` per unit of gradient.

    Args:
        step_size_pool: The experts' step sizes; by default a third of `step_size`, `step_size`, and three times it.
        temperature: Of the shares; the released code has 1.2 for EAGLE and 0.2 for EAGLE-3.

    Reference: the code released with OnlineSpec, arXiv:2603.12617.
    """

    step_size: float
    geometry: Geometry = Preconditioned()
    clip_norm: float = 1.0
    step_size_pool: tuple[float, ...] = ()
    temperature: float = 1.2

    def __post_init__(self) -> None:
        check_pool(self.pool)
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; it must be positive")

    @property
    def pool(self) -> tuple[float, ...]:
        return self.step_size_pool or (self.step_size / 3, self.step_size, self.step_size * 3)

    @property
    def effective_step(self) -> float:
        """The step size at which online gradient moves as far, if shares are equal."""
        return sum(self.pool) / len(self.pool)

    def init(self, params: Params) -> ResetToMergedState:
        return ResetToMergedState(Point.at(params), self.geometry.init(params), (1 / len(self.pool),) * len(self.pool))

    def played(self, state: ResetToMergedState) -> Params:
        return state.point.played

    def update(self, evaluate: Evaluate, state: ResetToMergedState) -> ResetToMergedState:
        (evaluation,) = evaluate(state.point.played)
        grads = clip_by_norm(evaluation.grads, self.clip_norm)
        direction, geometry = self.geometry.direction(grads, evaluation.total_loss, state.geometry)
        experts = [state.point.moved(direction, step_size) for step_size in self.pool]
        scores = [after.total_loss for after in evaluate(scored=[expert.played for expert in experts])]
        best = min((score for score in scores if math.isfinite(score)), default=math.nan)
        raw = [math.exp((best - score) / self.temperature) if math.isfinite(score) else 0.0 for score in scores]
        shares = tuple(weight / (sum(raw) or math.nan) for weight in raw)
        masters = averaged([expert.masters for expert in experts], shares)
        played = {name: p.to(state.point.played[name].dtype) for name, p in masters.items()}
        return ResetToMergedState(Point(masters, played), geometry, shares)

    def report(self, state: ResetToMergedState) -> dict[str, Any]:
        names = (f"{size:.3g}" for size in self.pool)
        return {"meta_weights": dict(zip(names, state.meta_weights, strict=True))}
