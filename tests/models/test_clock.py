"""Seconds of a step: of work that is done, or of work that a device was given and does later."""

from __future__ import annotations

import pytest
import torch

from onlinespec.models import clock
from onlinespec.models.clock import EventClock, HostClock, WaitingClock, clock_for

DEVICE = torch.device("cuda", 0)


class FakeDevice:
    """A queue that works while the host waits, and a clock that both go by."""

    def __init__(self, has_timing: bool = True) -> None:
        self.now, self.free_at, self.num_waits = 100.0, 0.0, 0
        fake = self

        class Event:
            def __init__(self, device: torch.device, enable_timing: bool) -> None:
                assert device == DEVICE
                assert enable_timing
                self.at = None

            def record(self) -> None:
                self.at = fake.free_at = max(fake.free_at, fake.now)

            def synchronize(self) -> None:
                fake.num_waits += 1
                fake.now = max(fake.now, self.at)

            def elapsed_time(self, other) -> float:
                if not has_timing:
                    raise RuntimeError("Backend doesn't support elapsedTime.")
                return 1e3 * (other.at - self.at)

        self.Event = Event

    def queue(self, seconds: float) -> None:
        self.free_at = max(self.free_at, self.now) + seconds

    def synchronize(self, device: torch.device) -> None:
        assert device == DEVICE
        self.num_waits += 1
        self.now = max(self.now, self.free_at)


@pytest.fixture
def fake(monkeypatch, request):
    device = FakeDevice(getattr(request, "param", True))
    monkeypatch.setattr(torch, "Event", device.Event)
    monkeypatch.setattr(torch.accelerator, "synchronize", device.synchronize)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(clock.time, "perf_counter", lambda: device.now)
    return device


def test_on_a_cpu_marks_are_the_hosts_time(fake):
    found = clock_for(torch.device("cpu"))
    assert type(found) is HostClock
    assert type(clock_for(torch.device("meta"))) is HostClock
    start = found.mark()
    fake.now += 0.25
    assert found.seconds(start, found.mark()) == 0.25


@pytest.mark.parametrize("fake", [True, False], indirect=True, ids=["events", "no events"])
def test_seconds_are_of_the_work_and_not_of_queueing_it(fake):
    found = clock_for(DEVICE)
    start = found.mark()
    fake.now += 0.001  # the host's own work
    fake.queue(0.5)
    drafted = found.mark()
    fake.now += 0.001
    fake.queue(2.0)
    verified = found.mark()
    assert found.seconds(start, drafted) == pytest.approx(0.501)
    assert found.seconds(drafted, verified) == pytest.approx(2.0, abs=0.002)


def test_where_events_note_the_time_no_mark_waits(fake):
    found = clock_for(DEVICE)
    assert type(found) is EventClock
    tried = fake.num_waits
    marks = []
    for _ in range(3):
        fake.queue(1.0)
        marks.append(found.mark())
    assert fake.num_waits == tried
    assert fake.now == 100.0
    assert found.seconds(marks[0], marks[2]) == 2.0
    assert fake.now == 103.0


@pytest.mark.parametrize("fake", [False], indirect=True)
def test_where_events_do_not_note_the_time_each_mark_waits(fake):
    found = clock_for(DEVICE)
    assert type(found) is WaitingClock
    fake.queue(1.0)
    found.mark()
    assert fake.now == 101.0


def test_what_the_host_does_while_the_device_waits_for_it_counts(fake):
    found = clock_for(DEVICE)
    start = found.mark()
    fake.now += 0.125  # looking drafts up in a text, say
    assert found.seconds(start, found.mark()) == 0.125


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="there is no accelerator here")
def test_a_real_device_takes_longer_for_more_work():
    device = torch.accelerator.current_accelerator()
    found, x = clock_for(device), torch.randn(2048, 2048, device=device)
    times = []
    for count in (2, 2, 64):
        start = found.mark()
        for _ in range(count):
            x @ x
        times.append(found.seconds(start, found.mark()))
    assert 0 < times[1] < times[2]
