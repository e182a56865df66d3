"""How long a learner's steps are, where no one has said: one rule, by how many weights learn."""

from __future__ import annotations

import math

from onlinespec.learners.base import Params

_LARGEST = (
    1e-3  # measured on drafters of about a million weights: a third of it learns less, three times loses what fits
)
_LARGEST_UP_TO = 2e6  # weights that learn; above, steps fall with the square root of their number


def step_size_for(params: Params) -> float:
    """The step size of online rounds: 1e-3 up to two million weights that learn, 1.4e-4 for a hundred million.

    In the diagonal geometries every weight moves by about the step size, so the move as a whole grows with the square
    root of their number: above two million it stays as long as it is there.

    >>> import torch
    >>> step_size_for({"fc.weight": torch.empty(1000, 1000)})
    0.001
    """
    num_weights = sum(p.numel() for p in params.values())
    return _LARGEST / max(1.0, math.sqrt(num_weights / _LARGEST_UP_TO))
