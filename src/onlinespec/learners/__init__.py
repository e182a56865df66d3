"""Learners by name. A new one is a file here and a line in `registry.LEARNERS`."""

from typing import Any

from onlinespec.learners.base import Evaluate, Evaluation, Learner, Params
from onlinespec.learners.geometry import Diagonal, Euclidean, Geometry
from onlinespec.registry import GEOMETRIES, LEARNERS, resolve


def make_learner(
    name: str, step_size: float, geometry: str | Geometry = "preconditioned", clip_norm: float = 1.0, **options: Any
) -> Learner:
    """Returns a learner by its table name or "pkg.module:Class".

    Args:
        step_size: The learning rate.
        geometry: A table name or a `Geometry`.
        clip_norm: Maximum norm of all gradients together; inf for no limit.
        options: Further settings of this learner, such as `hint_decay` of `optimistic`.

    Raises:
        ValueError: for an unknown name, a number out of range, or a class that is no learner.
        TypeError: for an option that this learner does not have.

    >>> make_learner("optimistic", 1e-3, hint_decay=0.5).hint_decay
    0.5
    """
    if isinstance(geometry, str):
        geometry = resolve(GEOMETRIES, geometry, "geometry")()
    factory = resolve(LEARNERS, name, "learner")
    learner: Learner = factory(step_size=step_size, geometry=geometry, clip_norm=clip_norm, **options)
    parts = ("init", "played", "settled", "update", "extra_work", "expect", "undone", "report")
    if missing := [part for part in parts if not hasattr(learner, part)]:
        raise ValueError(f'learner "{name}" has no {", ".join(missing)}; make it a subclass of onlinespec.Learner')
    return learner


__all__ = [
    "GEOMETRIES",
    "LEARNERS",
    "Diagonal",
    "Euclidean",
    "Evaluate",
    "Evaluation",
    "Geometry",
    "Learner",
    "Params",
    "make_learner",
]
