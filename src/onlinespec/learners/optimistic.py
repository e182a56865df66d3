"""Optimistic online gradient descent: plays one step ahead of the learned weights, along a hint of the next
gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from onlinespec.learners.base import Evaluate, Learner, Params
from onlinespec.learners.geometry import Geometry, Point, Preconditioned, clip_by_norm, squared_distance, squared_norm

_MOST_DOMAINS = 16


class Hint(NamedTuple):
    """A guess of the next gradient: the raw gradient, and its direction in the geometry."""

    grads: Params
    direction: Params


class OptimisticState(NamedTuple):
    """Both sequences: the learned weights (`point`), and those that play, a step ahead."""

    point: Point
    played: Params
    geometry: Any
    hints: dict[str, Hint]  # by domain, or by "" if there is one for all
    followed: str | None  # key of the hint that `played` follows; None for no hint
    met: Hint | None  # the gradient of the last round ...
    missed: Hint | None  # ... and the hint that was used for it; None in round 0


@dataclass(frozen=True)
class OptimisticGradient(Learner):
    """Keeps two sequences. The gradient is taken at the weights that played, and is the next round's hint:

        played    w = v - step_size * direction(hint)        no hint in round 0
        learned   v_next = v - step_size * direction(clip(grad f(w)))
        hint_next = the last gradient

    This is not momentum: over T rounds it moves as far as online gradient descent, plus one look-ahead. In the
    `diagonal` geometry the hint's direction is the last direction, which is Optimistic Adam (arXiv:1711.00141). In
    `preconditioned` both lines use the same scale and no average, which is the pure form.

    Args:
        hint_decay: Share of the old hint in a running average: less noise, more lag. 0 uses the last gradient.
        hint_by_domain: Keep one hint per domain tag, for interleaved traffic.

    Raises:
        ValueError: if hint_decay is not in [0, 1).

    Reference: OnlineSpec, arXiv:2603.12617, corollary 2 (Euclidean geometry, without projection).
    """

    step_size: float
    geometry: Geometry = Preconditioned()
    clip_norm: float = 1.0
    hint_decay: float = 0.0
    hint_by_domain: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.hint_decay < 1:
            raise ValueError(f"hint_decay is {self.hint_decay}; it must be 0 (the last gradient) or below 1")

    def init(self, params: Params) -> OptimisticState:
        point = Point.at(params)
        return OptimisticState(point, point.played, self.geometry.init(params), {}, None, None, None)

    @property
    def plays_ahead(self) -> bool:
        return True

    def played(self, state: OptimisticState) -> Params:
        return state.played

    def settled(self, state: OptimisticState) -> Params:
        """Returns the learned sequence, without the look-ahead, which only helps in the next round."""
        return state.point.played

    def update(self, evaluate: Evaluate, state: OptimisticState) -> OptimisticState:
        (evaluation,) = evaluate(state.played)
        grads = clip_by_norm(evaluation.grads, self.clip_norm)
        direction, geometry = self.geometry.direction(grads, evaluation.total_loss, state.geometry)
        came, domain = Hint(evaluation.grads, direction), evaluation.domain if self.hint_by_domain else ""
        next_state = OptimisticState(
            point=state.point.moved(direction, self.step_size),
            played=state.played,
            geometry=geometry,
            hints=_newest(state.hints, domain, self._averaged(state.hints.get(domain), came)),
            followed=None,
            met=came,
            missed=None if state.followed is None else state.hints[state.followed],
        )
        return self.expect(domain, next_state)

    def expect(self, domain: str, state: OptimisticState) -> OptimisticState:
        key = domain if self.hint_by_domain else ""
        following = key if key in state.hints else None
        if following == state.followed:
            return state
        ahead = state.point if following is None else state.point.moved(state.hints[key].direction, self.step_size)
        return state._replace(played=ahead.played, followed=following)

    def report(self, state: OptimisticState) -> dict[str, Any]:
        """Returns squared norms, raw and in the geometry: the error of the hint, and the gradient itself.

        A hint helps while its error is smaller than the gradient; without a hint they are equal.
        """
        if state.met is None:
            return {}
        pairs = zip(("", "direction_"), state.met, state.missed or (None, None), strict=True)
        return {
            f"{prefix}{name}": value
            for prefix, met, hint in pairs
            for name, value in (
                ("hint_error", squared_distance(hint, met) if hint else squared_norm(met)),
                ("gradient_norm", squared_norm(met)),
            )
        }

    def _averaged(self, old: Hint | None, new: Hint) -> Hint:
        if old is None or not self.hint_decay:
            return new
        return Hint(*(_lerp(a, b, 1 - self.hint_decay) for a, b in zip(old, new, strict=True)))


def _newest(hints: dict[str, Hint], domain: str, hint: Hint) -> dict[str, Hint]:
    """Adds a hint, and drops the oldest beyond 16, because each holds two tensors per weight."""
    others = [(name, old) for name, old in hints.items() if name != domain]
    return dict([*others[1 - _MOST_DOMAINS :], (domain, hint)])


def _lerp(old: Params, new: Params, share: float) -> Params:
    return {name: torch.lerp(old[name].float(), p.float(), share) for name, p in new.items()}
