"""The norm a learner moves in: how a gradient becomes a direction. The step size is the learner's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from onlinespec.learners.base import Params


class Geometry(Protocol):
    """Turns gradients into directions of descent; keeps whatever state that takes, one per expert."""

    def init(self, params: Params) -> Any:
        """The state before the first gradient."""

    def direction(self, grads: Params, state: Any) -> tuple[Params, Any]:
        """What to subtract, per unit of step size, and the next state."""


@dataclass(frozen=True)
class Euclidean:
    """The gradient itself: what the regret bounds are stated for."""

    def init(self, params: Params) -> None:
        return None

    def direction(self, grads: Params, state: None) -> tuple[Params, None]:
        return grads, None


class DiagonalState(NamedTuple):
    """Moments of the gradients seen, and how many there were."""

    first: Params
    second: Params
    num_rounds: int


@dataclass(frozen=True)
class Diagonal:
    """Adam's direction: averaged gradients over the root of their averaged squares, both bias-corrected.

    A per-weight scale, so that one step size fits layers of unlike size. The online-gradient bounds do not carry over
    to it (Adam has no such guarantee); with first_decay = 0 it is the plain preconditioned gradient.

    Reference: Adam, arXiv:1412.6980.
    """

    first_decay: float = 0.9
    second_decay: float = 0.99
    epsilon: float = 1e-8

    def init(self, params: Params) -> DiagonalState:
        zeros = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in params.items()}
        return DiagonalState(zeros, dict(zeros), num_rounds=0)

    def direction(self, grads: Params, state: DiagonalState) -> tuple[Params, DiagonalState]:
        num_rounds = state.num_rounds + 1
        first_scale = 1 - self.first_decay**num_rounds
        second_scale = (1 - self.second_decay**num_rounds) ** 0.5
        first, second, moves = {}, {}, {}
        for name, g in grads.items():
            g = g.float()
            first[name] = torch.lerp(state.first[name], g, 1 - self.first_decay)
            second[name] = (state.second[name] * self.second_decay).addcmul_(g, g, value=1 - self.second_decay)
            # (first / first_scale) / (sqrt(second) / second_scale + epsilon), without a temporary for each operation
            root = second[name].sqrt().add_(self.epsilon * second_scale)
            moves[name] = torch.div(first[name], root, out=root).mul_(second_scale / first_scale)
        return moves, DiagonalState(first, second, num_rounds)


def clip_by_norm(grads: Params, max_norm: float) -> Params:
    """The gradients, scaled down together if their joint Euclidean norm exceeds max_norm.

    >>> clip_by_norm({"a": torch.tensor([3.0, 4.0])}, 1.0)["a"]
    tensor([0.6000, 0.8000])
    """
    norm = torch.stack([g.float().norm() for g in grads.values()]).norm()
    scale = float(max_norm / norm) if norm > max_norm else 1.0
    return grads if scale == 1.0 else {name: g * scale for name, g in grads.items()}


def descend(params: Params, direction: Params, step_size: float) -> Params:
    """params - step_size * direction, in each tensor's own dtype; params are left alone."""
    return {name: torch.sub(p.float(), direction[name], alpha=step_size).to(p.dtype) for name, p in params.items()}


GEOMETRIES = {
    "diagonal": "onlinespec.learners.geometry:Diagonal",
    "euclidean": "onlinespec.learners.geometry:Euclidean",
}
