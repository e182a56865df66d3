"""How far learning has come by the last third of each segment, from the folder that `onlinespec compare` wrote.

    python benchmarks/thirds.py runs/compare-20261121-081500

Per segment: acceptance length in the last third of its requests, its ratio to frozen, and the net speed-ups over the
whole segment; repeats are pooled. Ends with the whole stream.
"""

import sys
from collections import defaultdict
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from onlinespec.core import DecodeStats
from onlinespec.metrics import speedup, total
from onlinespec.records import RequestRecord


def stats_of(record: RequestRecord) -> DecodeStats:
    """A line of requests.jsonl as counts."""
    return DecodeStats(
        requests=1,
        tokens=record.tokens,
        steps=record.steps,
        drafted=record.drafted,
        accepted=record.accepted,
        decode_seconds=record.decode_seconds,
        learn_seconds=record.learn_seconds,
    )


def last_third(stats: list[tuple[int, DecodeStats]]) -> DecodeStats:
    """The last third of the requests in stream order, all repeats of them."""
    indices = sorted({index for index, _ in stats})
    late = set(indices[len(indices) - len(indices) // 3 :])
    return total([one for index, one in stats if index in late])


def main(folder: Path) -> None:
    """Prints the table."""
    lines = (folder / "requests.jsonl").read_bytes().splitlines()
    records = [msgspec.json.decode(line, type=RequestRecord) for line in lines]
    segments: dict[tuple[int, str], dict[str, list[tuple[int, DecodeStats]]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        segments[record.segment, record.data][record.learner].append((record.index, stats_of(record)))
    table = Table(title=f"{folder}: acceptance length in the last third, net speed over the whole segment")
    for column in ("segment", "learner", "last third", "vs frozen", "net vs none", "net vs frozen", "learning"):
        table.add_column(column, justify="left" if column in ("segment", "learner") else "right")
    whole: dict[str, list[DecodeStats]] = defaultdict(list)
    for (number, data), by_learner in sorted(segments.items()):
        totals = {learner: total([one for _, one in stats]) for learner, stats in by_learner.items()}
        lengths = {learner: last_third(stats).acceptance_length for learner, stats in by_learner.items()}
        for learner, stats in totals.items():
            whole[learner].append(stats)
            relative = lengths[learner] / lengths["frozen"] if "frozen" in lengths else None
            add_row(table, f"{number + 1} {data}", learner, f"{lengths[learner]:.2f}", relative, stats, totals)
        table.add_section()
    totals = {learner: total(stats) for learner, stats in whole.items()}
    for learner, stats in totals.items():
        add_row(table, "whole stream", learner, f"({stats.acceptance_length:.2f})", None, stats, totals)
    Console().print(table)


def add_row(
    table: Table,
    segment: str,
    learner: str,
    length: str,
    relative: float | None,
    stats: DecodeStats,
    totals: dict[str, DecodeStats],
) -> None:
    """One learner's line; speed-ups are of net tokens per second."""

    def times(ratio: float | None) -> str:
        return f"{ratio:.2f}x" if ratio is not None else ""

    none, frozen = (speedup(stats, totals.get(name)) for name in ("none", "frozen"))
    share = stats.learn_seconds / stats.decode_seconds if stats.decode_seconds else 0.0
    table.add_row(segment, learner, length, times(relative), times(none), times(frozen), f"{share:.1%}")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "requests.jsonl").is_file():
        sys.exit("usage: python benchmarks/thirds.py DIR    (a folder that `onlinespec compare --out DIR` wrote)")
    main(Path(sys.argv[1]))
