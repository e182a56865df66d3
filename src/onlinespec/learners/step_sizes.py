"""The default step size, by the number of weights that learn."""

from __future__ import annotations

import math

from onlinespec.learners.base import Params

_LARGEST = 1e-3  # measured on drafters of about a million weights: a third learns less, three times forgets what fitted
_LARGEST_UP_TO = 2e6  # weights; above that, the step size falls with the square root of their number


def step_size_for(params: Params) -> float:
    """Returns the step size of online rounds: 1e-3 up to two million weights, 1.4e-4 for a hundred million.

    In the diagonal geometries every weight moves by about the step size, so the norm of the update grows with the
    square root of their number. Above two million weights the norm is kept constant.

    >>> import torch
    >>> step_size_for({"fc.weight": torch.empty(1000, 1000)})
    0.001
    """
    num_weights = sum(p.numel() for p in params.values())
    return _LARGEST / max(1.0, math.sqrt(num_weights / _LARGEST_UP_TO))
