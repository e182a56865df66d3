"""Seconds of work on a device. An accelerator's work is queued: by Python's clock it is over before it has begun.

On a CPU a mark is the time. On an accelerator it is an event in the queue, whose time the device notes when it gets
there: two marks span the work queued between them, and what the host did meanwhile if the device waited for it. Nobody
waits until seconds are asked for, so a step makes its marks as it goes and asks at its end, when its results are read.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Makes marks, and says how long it was between two of them."""

    def mark(self) -> Any:
        """Now, behind all work queued so far."""

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks. Waits for the later one, where work is queued."""


class HostClock:
    """Where the work is done when Python goes on."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start


class EventClock:
    """Of a device whose queue takes events that note the time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> torch.Event:
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.Event, end: torch.Event) -> float:
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


class WaitingClock(HostClock):
    """Of a device without such events: each mark waits for all that was queued."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> float:
        torch.accelerator.synchronize(self._device)
        return super().mark()


def clock_for(device: torch.device) -> Clock:
    """The clock of a device, which is tried once: not every accelerator's events note the time."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or device.type != accelerator.type:
        return HostClock()
    clock = EventClock(device)
    try:
        clock.seconds(clock.mark(), clock.mark())
    except (RuntimeError, NotImplementedError):
        return WaitingClock(device)
    return clock
