"""Momentum: what the released code of OnlineSpec runs as optimistic learning. For comparisons only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from onlinespec.learners.base import Evaluate, Learner, Params
from onlinespec.learners.geometry import Geometry, Point, Preconditioned, clip_by_norm


class MomentumState(NamedTuple):
    """The weights that play, their velocity, and the number of rounds."""

    point: Point
    velocity: Params
    geometry: Any
    num_rounds: int


@dataclass(frozen=True)
class Momentum(Learner):
    """Accumulates directions in a velocity; there is no hint and no second sequence:

        velocity = momentum * velocity + direction(clip(grad f(w)));  w_next = w - step_size * velocity

    Under a constant gradient it moves `effective_step` per round, so compare it with online gradient at that step size.

    Args:
        restart_every: Rounds after which the velocity is reset; 16 is about what the released code does (once per
            chunk). 0 never resets.

    Reference: the code released with OnlineSpec, arXiv:2603.12617 (SGD with momentum 0.9 for Hydra).
    """

    step_size: float
    geometry: Geometry = Preconditioned()
    clip_norm: float = 1.0
    momentum: float = 0.9
    restart_every: int = 16

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}; it must be at least 0 and below 1")
        if self.restart_every < 0:
            raise ValueError(f"restart_every is {self.restart_every}; it must be 0 (never) or a number of rounds")

    @property
    def effective_step(self) -> float:
        """The step size at which online gradient moves as far under a constant gradient, on average over a chunk."""
        n, mu = self.restart_every, self.momentum
        lost = mu * (1 - mu**n) / (n * (1 - mu)) if n else 0.0  # from rest: the mean of 1 - mu^k over k = 1..n
        return self.step_size / (1 - mu) * (1 - lost)

    def init(self, params: Params) -> MomentumState:
        return MomentumState(Point.at(params), {}, self.geometry.init(params), 0)

    def played(self, state: MomentumState) -> Params:
        return state.point.played

    def update(self, evaluate: Evaluate, state: MomentumState) -> MomentumState:
        (evaluation,) = evaluate(state.point.played)
        grads = clip_by_norm(evaluation.grads, self.clip_norm)
        direction, geometry = self.geometry.direction(grads, evaluation.total_loss, state.geometry)
        is_new_chunk = self.restart_every and state.num_rounds % self.restart_every == 0
        velocity = {name: d.to(state.point.masters[name].dtype) for name, d in direction.items()}
        if state.velocity and not is_new_chunk:
            velocity = {name: d + self.momentum * state.velocity[name] for name, d in velocity.items()}
        return MomentumState(state.point.moved(velocity, self.step_size), velocity, geometry, state.num_rounds + 1)
