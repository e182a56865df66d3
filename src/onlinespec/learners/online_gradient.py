"""Online gradient descent in any geometry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from onlinespec.learners.base import Evaluate, Learner, Params
from onlinespec.learners.geometry import Geometry, Point, Preconditioned, clip_by_norm


class OnlineGradientState(NamedTuple):
    """The weights that play, and the state of the geometry."""

    point: Point
    geometry: Any


@dataclass(frozen=True)
class OnlineGradient(Learner):
    """Moves against each round's gradient at the weights that played:

        w_next = w - step_size * direction(clip(grad f(w)))

    The step size is constant, because a stream has no known end, and a decaying rate would stop following a drift.

    Reference: Zinkevich (2003); OnlineSpec, arXiv:2603.12617, corollary 1 (Euclidean geometry, without projection).
    """

    step_size: float
    geometry: Geometry = Preconditioned()
    clip_norm: float = 1.0

    def init(self, params: Params) -> OnlineGradientState:
        return OnlineGradientState(Point.at(params), self.geometry.init(params))

    def played(self, state: OnlineGradientState) -> Params:
        return state.point.played

    def update(self, evaluate: Evaluate, state: OnlineGradientState) -> OnlineGradientState:
        (evaluation,) = evaluate(state.point.played)
        grads = clip_by_norm(evaluation.grads, self.clip_norm)
        direction, geometry = self.geometry.direction(grads, evaluation.total_loss, state.geometry)
        return OnlineGradientState(state.point.moved(direction, self.step_size), geometry)
