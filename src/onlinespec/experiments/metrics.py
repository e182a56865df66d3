"""The statistics of a report: sums and windows of `DecodeStats`, and ratios between runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onlinespec.core import DecodeStats
from onlinespec.experiments.report_schema import Window


def total(stats: Sequence[DecodeStats]) -> DecodeStats:
    """Returns the sum of all statistics."""
    return sum(stats, start=DecodeStats())


def speedup(stats: DecodeStats, control: DecodeStats | None) -> float | None:
    """Returns the ratio of net tokens per second to the control's; None if there is no control or it has no time."""
    if control is None or not control.tokens_per_second:
        return None
    return stats.tokens_per_second / control.tokens_per_second


def totals_of(
    stats: DecodeStats, none: DecodeStats | None, frozen: DecodeStats | None, identical_to_plain: bool | None
) -> dict[str, Any]:
    """Returns the fields of `Totals`, which a run and each of its segments have in report.json.

    Args:
        none: The same requests of the run of plain decoding, if there is one.
        frozen: The same requests of the run without learning, if there is one.
    """
    return {
        "requests": stats.requests,
        "skipped": stats.skipped,
        "tokens": stats.tokens,
        "steps": stats.steps,
        "acceptance_length": stats.acceptance_length,
        "acceptance_rate": stats.acceptance_rate,
        "acceptance_by_position": stats.acceptance_by_position,
        "decode_seconds": stats.decode_seconds,
        "learn_seconds": stats.learn_seconds,
        "diagnostic_seconds": stats.diagnostic_seconds,
        "tokens_per_second": stats.tokens_per_second,
        "speedup_vs_none": speedup(stats, none),
        "speedup_vs_frozen": speedup(stats, frozen),
        "identical_to_plain": identical_to_plain,
        "ties": stats.ties,
    }


def windows(stats: Sequence[DecodeStats], size: int) -> tuple[Window, ...]:
    """Returns statistics of consecutive groups of `size` requests; the last group may be smaller."""
    groups = [total(stats[i : i + size]) for i in range(0, len(stats), size)]
    return tuple(
        Window(
            requests=group.requests,
            acceptance_length=group.acceptance_length,
            tokens_per_second=group.tokens_per_second,
        )
        for group in groups
    )
