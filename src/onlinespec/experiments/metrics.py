"""From counts to the figures of a report. The ratios of one run are `DecodeStats`' own; those between runs are here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onlinespec.core import DecodeStats
from onlinespec.experiments.report_schema import Window


def total(stats: Sequence[DecodeStats]) -> DecodeStats:
    """All of it added up."""
    return sum(stats, start=DecodeStats())


def speedup(stats: DecodeStats, control: DecodeStats | None) -> float | None:
    """Ratio of net tokens per second; None without a control that measured something."""
    if control is None or not control.tokens_per_second:
        return None
    return stats.tokens_per_second / control.tokens_per_second


def figures(
    stats: DecodeStats, none: DecodeStats | None, frozen: DecodeStats | None, identical_to_plain: bool | None
) -> dict[str, Any]:
    """The fields that a run's totals and each of its segments share in report.json."""
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
    """Consecutive groups of `size` requests; the last may be smaller."""
    groups = [total(stats[i : i + size]) for i in range(0, len(stats), size)]
    return tuple(
        Window(
            requests=group.requests,
            acceptance_length=group.acceptance_length,
            tokens_per_second=group.tokens_per_second,
        )
        for group in groups
    )
