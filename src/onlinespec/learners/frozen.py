"""The control: weights that never move."""

from __future__ import annotations

from dataclasses import dataclass

from onlinespec.learners.base import Evaluate, Learner, Params
from onlinespec.learners.geometry import Geometry, Preconditioned


@dataclass(frozen=True)
class Frozen(Learner):
    """Always plays the initial weights and asks for no gradient. All other learners are compared with it."""

    step_size: float = 0.0
    geometry: Geometry = Preconditioned()
    clip_norm: float = 1.0

    needs_gradient = False

    def init(self, params: Params) -> Params:
        return params

    def played(self, state: Params) -> Params:
        return state

    def update(self, evaluate: Evaluate, state: Params) -> Params:
        return state
