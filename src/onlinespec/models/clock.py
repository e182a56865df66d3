"""Clocks that measure how long work on a device takes.

An accelerator's work is queued, so the host's clock can't measure it. On a CPU a mark is the current time. On an
accelerator a mark is an event in the queue, and the device records the time when it reaches the event. The time between
two marks is that of the work queued between them, and of the host's work in between if the device waited for it. Only
`seconds` waits, so a step makes marks as it runs and calls `seconds` at its end, when its results are copied to the
host anyway.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Makes marks, and measures the time between them."""

    def mark(self) -> Any:
        """Returns a mark after all work queued so far."""

    def seconds(self, start: Any, end: Any) -> float:
        """Returns the seconds between two marks. Waits until the device has reached the later one."""


class HostClock:
    """The clock of a CPU, where work is finished when the call returns."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start


class EventClock:
    """The clock of a device with timed events."""

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
    """The clock of a device without timed events: each mark waits for all queued work."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> float:
        torch.accelerator.synchronize(self._device)
        return super().mark()


def clock_for(device: torch.device) -> Clock:
    """Returns the clock of a device. Timed events are tried once, because not every accelerator has them."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or device.type != accelerator.type:
        return HostClock()
    clock = EventClock(device)
    try:
        clock.seconds(clock.mark(), clock.mark())
    except (RuntimeError, NotImplementedError):
        return WaitingClock(device)
    return clock
