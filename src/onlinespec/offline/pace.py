"""Optimizer, step size schedule and clock of offline training."""

from __future__ import annotations

import time

import torch

from onlinespec.core import Params
from onlinespec.learners.step_sizes import step_size_for

OFFLINE_STEP = 2.0  # times the online step size; can be larger because it falls to zero at the end


class Clock:
    """Counts seconds of training across interruptions.

    Args:
        before: Seconds of training in earlier processes.
    """

    def __init__(self, before: float) -> None:
        self._before, self._began = before, time.monotonic()

    @property
    def since_start(self) -> float:
        """Seconds in this process."""
        return time.monotonic() - self._began

    @property
    def now(self) -> float:
        """Seconds in all processes."""
        return self._before + self.since_start


def schedule(progress: float) -> float:
    """Returns the factor of the step size at a progress of 0..1.

    It rises linearly over the first 2 %, stays at 1 until 60 %, then falls linearly to zero.
    """
    return min(1.0, progress / 0.02, max(0.0, (1 - progress) / 0.4))


def make_optimizer(params: Params, step_size: float) -> torch.optim.Optimizer:
    """Returns AdamW with betas (0.9, 0.99) and no weight decay."""
    return torch.optim.AdamW(params.values(), lr=step_size, betas=(0.9, 0.99), weight_decay=0.0)


def offline_step_size(params: Params) -> float:
    """The default step size, by the number of trainable weights: 2e-3 up to 2 million, 2.8e-4 for 100 million."""
    return OFFLINE_STEP * step_size_for(params)
