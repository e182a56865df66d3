"""How fast a drafter is trained offline: step sizes, their schedule, and a clock that goes on over interruptions."""

from __future__ import annotations

import time

import torch

from onlinespec.core import Params
from onlinespec.learners.step_sizes import step_size_for

OFFLINE_STEP = 2.0  # times the step of online rounds: it falls to zero at the end, where theirs stays


class Clock:
    """Seconds of training: those of earlier processes and of this one."""

    def __init__(self, before: float) -> None:
        self._before, self._began = before, time.monotonic()

    @property
    def since_start(self) -> float:
        return time.monotonic() - self._began

    @property
    def now(self) -> float:
        return self._before + self.since_start


def schedule(progress: float) -> float:
    """Warm up over 2 %, stay, then fall linearly to zero from 60 % on."""
    return min(1.0, progress / 0.02, max(0.0, (1 - progress) / 0.4))


def make_optimizer(params: Params, step_size: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params.values(), lr=step_size, betas=(0.9, 0.99), weight_decay=0.0)


def offline_step_size(params: Params) -> float:
    """By how many weights learn: 2e-3 up to two million, 2.8e-4 for a hundred million."""
    return OFFLINE_STEP * step_size_for(params)
