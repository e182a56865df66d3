"""Learners by name. A new one is a file and a line here."""

from onlinespec.learners.base import Evaluate, Evaluation, Learner, Params
from onlinespec.learners.geometry import GEOMETRIES, Diagonal, Euclidean, Geometry
from onlinespec.tables import resolve

LEARNERS = {
    "frozen": "onlinespec.learners.frozen:Frozen",
    "online_gradient": "onlinespec.learners.online_gradient:OnlineGradient",
}


def make_learner(name: str, step_size: float, geometry: str = "diagonal", clip_norm: float = 1.0) -> Learner:
    """A learner from its table name, or from "pkg.module:Class".

    >>> make_learner("momentun", 1e-3)
    Traceback (most recent call last):
    ...
    ValueError: unknown learner "momentun"; known: frozen, online_gradient; or give "pkg.module:Class"
    """
    learner: Learner = resolve(LEARNERS, name, "learner")(
        step_size=step_size, geometry=resolve(GEOMETRIES, geometry, "geometry")(), clip_norm=clip_norm
    )
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
