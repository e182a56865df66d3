"""Geometries: how a gradient becomes a direction. Also the arithmetic on sets of tensors that learners share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self

import torch

from onlinespec.host import to_host
from onlinespec.learners.base import Params


class Geometry(Protocol):
    """Turns gradients into directions of descent. Each expert has its own state of it."""

    def init(self, params: Params) -> Any:
        """Returns the state before the first gradient."""

    def direction(self, grads: Params, loss: float, state: Any) -> tuple[Params, Any]:
        """Returns what to subtract per unit of step size, and the next state.

        Args:
            loss: The loss that the gradients are of.
        """


@dataclass(frozen=True)
class Euclidean:
    """The gradient itself. The regret bounds of OnlineSpec are stated for it."""

    def init(self, params: Params) -> None:
        return None

    def direction(self, grads: Params, loss: float, state: None) -> tuple[Params, None]:
        return grads, None


class DiagonalState(NamedTuple):
    """First and second moments of the gradients, and the number of rounds."""

    first: Params
    second: Params
    num_rounds: int


@dataclass(frozen=True)
class Diagonal:
    """Adam's direction: averaged gradients over the root of their averaged squares, both bias-corrected.

    Each weight has its own scale, so that one step size fits layers of different size. The bounds of online gradient
    descent do not apply (Adam has no such guarantee).

    Args:
        first_decay: Decay of the averaged gradients; 0 uses the gradient itself.
        second_decay: Decay of the averaged squares.
        epsilon: Added to the root.
        full_loss: Below this loss, directions shorten in proportion to the loss, like a capped Polyak step. Without
        that,
            weights move as far for a small loss as for a large one, which harms a drafter that starts well. A NaN loss
            moves nothing, unless the gradients are NaN too. 0 turns it off.

    Reference: Adam, arXiv:1412.6980; the capped Polyak step, arXiv:2002.10542.
    """

    first_decay: float = 0.9
    second_decay: float = 0.99
    epsilon: float = 1e-8
    full_loss: float = 0.0

    def init(self, params: Params) -> DiagonalState:
        zeros = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in params.items()}
        return DiagonalState(zeros, dict(zeros), num_rounds=0)

    def direction(self, grads: Params, loss: float, state: DiagonalState) -> tuple[Params, DiagonalState]:
        num_rounds = state.num_rounds + 1
        first_scale = 1 - self.first_decay**num_rounds
        second_scale = (1 - self.second_decay**num_rounds) ** 0.5
        length = max(0.0, min(loss / self.full_loss, 1.0)) if self.full_loss else 1.0
        first, second, moves = {}, {}, {}
        for name, g in grads.items():
            g = g.float()
            first[name] = torch.lerp(state.first[name], g, 1 - self.first_decay) if self.first_decay else g
            second[name] = (state.second[name] * self.second_decay).addcmul_(g, g, value=1 - self.second_decay)
            # (first / first_scale) / (sqrt(second) / second_scale + epsilon), without a temporary for each operation
            root = second[name].sqrt().add_(self.epsilon * second_scale)
            moves[name] = torch.div(first[name], root, out=root).mul_(length * second_scale / first_scale)
        return moves, DiagonalState(first, second, num_rounds)


@dataclass(frozen=True)
class Preconditioned(Diagonal):
    """RMSprop's direction: the gradient over the root of its averaged squares, bias-corrected.

    The gradient is not averaged, so `optimistic` is not mixed with momentum in it. On shifting streams it learned more
    than `diagonal` (docs/log.md, 2026-11-22).
    """

    first_decay: float = 0.0


def clip_by_norm(grads: Params, max_norm: float) -> Params:
    """Scales all gradients down together if their joint Euclidean norm exceeds max_norm.

    >>> clip_by_norm({"a": torch.tensor([3.0, 4.0])}, 1.0)["a"]
    tensor([0.6000, 0.8000])
    """
    norm = torch.stack([g.float().norm() for g in grads.values()]).norm()
    (scale,) = to_host(torch.where(norm > max_norm, max_norm / norm, 1.0))
    return grads if scale == 1.0 else {name: g * scale for name, g in grads.items()}


class Point(NamedTuple):
    """A learner's weights: masters in float32 or better, and copies in the dtypes that draft.

    A bfloat16 weight would ignore updates below some 0.4 % of its size; its master accumulates them.
    """

    masters: Params
    played: Params

    @classmethod
    def at(cls, params: Params) -> Self:
        """Returns a point at the given weights, by reference if they are float32 already."""
        return cls({name: p.to(torch.promote_types(p.dtype, torch.float32)) for name, p in params.items()}, params)

    def moved(self, direction: Params, step_size: float) -> Self:
        """Returns the point at masters - step_size * direction."""
        masters = {name: torch.sub(p, direction[name], alpha=step_size) for name, p in self.masters.items()}
        return type(self)(masters, {name: p.to(self.played[name].dtype) for name, p in masters.items()})


def averaged(points: Sequence[Params], weights: Sequence[float]) -> Params:
    """Returns the weighted mean, in each tensor's dtype. A point of weight 0 is left out, even if it holds NaN.

    Computed relative to the first point, for weights that sum to 1, so that the mean of equal points is equal to the
    bit.
    """
    (origin, _), *others = [(point, weight) for point, weight in zip(points, weights, strict=True) if weight]
    mean = {}
    for name, first in origin.items():
        start = first.to(torch.promote_types(first.dtype, torch.float32))
        total = start.clone()
        for point, weight in others:
            total = total.add_(point[name] - start, alpha=weight)
        mean[name] = total.to(first.dtype)
    return mean


def check_pool(step_sizes: Sequence[float]) -> None:
    """Raises ValueError unless all step sizes are positive and different."""
    sizes = ", ".join(f"{size:g}" for size in step_sizes)
    if not all(0 < size < math.inf for size in step_sizes):
        raise ValueError(f"step_size_pool is {sizes}; all must be positive numbers")
    if len({f"{size:.3g}" for size in step_sizes}) < len(step_sizes):
        raise ValueError(f"step_size_pool is {sizes}; it names one twice")


def squared_norm(params: Params) -> float:
    """Returns the squared Euclidean norm of all tensors together."""
    return math.fsum(to_host(*(p.float().square().sum() for p in params.values())))


def squared_distance(one: Params, other: Params) -> float:
    """Returns the squared Euclidean distance between two sets of tensors."""
    return math.fsum(to_host(*((p.float() - other[name].float()).square().sum() for name, p in one.items())))


def inner_product(grads: Params, params: Params, origin: Params) -> float:
    """Returns <grads, params - origin>."""
    sums = ((g.float() * (params[name].float() - origin[name].float())).sum() for name, g in grads.items())
    return math.fsum(to_host(*sums))


def cosine(one: Params, other: Params) -> float | None:
    """Returns the cosine of the angle between two sets of tensors; None if either is zero or not finite.

    >>> cosine({"a": torch.tensor([3.0, 4.0])}, {"a": torch.tensor([1.0, 0.0])})
    0.6
    """
    size = math.sqrt(squared_norm(one)) * math.sqrt(squared_norm(other))
    if not 0 < size < math.inf:
        return None
    return math.fsum(to_host(*((p.float() * other[name].float()).sum() for name, p in one.items()))) / size


def is_finite(params: Params) -> bool:
    """Whether no tensor holds NaN or infinity, tested by their sums, in a third of the time of isfinite().all()."""
    sums = [p.sum(dtype=_SUMMED_AS.get(p.dtype)) for p in params.values()]
    return all(map(math.isfinite, to_host(*sums)))


_SUMMED_AS = {torch.float16: torch.float32}  # dtypes in which a sum of finite numbers may overflow
