"""How far learning has come by the last third of each segment, from the folder that `onlinespec compare` wrote.

    python benchmarks/thirds.py runs/compare-20261121-081500 > benchmarks/results/abrupt.md

Markdown: what was run, on what, and per segment acceptance length over all of it and in the last third of its
requests, that against frozen, the whole segment against where the same data was left (the last third of its visit
before), and net speed-ups. Ends with the whole stream, with lowest and highest of the repeats where there are several.
Repeats are pooled; each temperature has a table.
"""

import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import msgspec

from onlinespec.core import DecodeStats
from onlinespec.experiments.metrics import speedup, total
from onlinespec.experiments.report_schema import Report, RequestRecord, read_report

HEADER = (
    "segment", "learner", "length", "last third", "over `frozen`'s", "over where it was left",
    "net / `none`", "net / `frozen`", "learning",
)  # fmt: skip

Runs = dict[str, list[RequestRecord]]  # by learner


def main(folder: Path) -> None:
    """Prints it all."""
    report = read_report(folder / "report.json")
    lines = (folder / "requests.jsonl").read_bytes().splitlines()
    records = [msgspec.json.decode(line, type=RequestRecord) for line in lines]
    print("\n".join(_told(report, records)))
    for temperature in sorted({record.temperature for record in records}):
        print(f"\n### Temperature {temperature:g}\n")
        print(_row(HEADER))
        print("|" + "---|" * len(HEADER))
        _print_table([record for record in records if record.temperature == temperature])


def _told(report: Report, records: list[RequestRecord]) -> Iterable[str]:
    """What was run and on what; paths of the machine cut to their names."""
    said = report.provenance
    words = [word.rpartition("/")[2] if word.startswith(("/", ".")) else word for word in said["command"].split()]
    checked = [record.identical_to_plain for record in records if record.identical_to_plain is not None]
    yield f"# onlinespec {' '.join(words)}\n"
    yield "Written by `python benchmarks/thirds.py DIR` from that run's folder."
    machine = f"{said['processor']}, {said['num_threads']} thread, torch {said['torch']}"
    yield f"Commit {said['commit']}, {machine}, {said['started'][:10]}."
    for costs in said.get("learn_costs", []):
        a_round, a_row = costs["round_cost"], costs["row_cost"]
        yield f"A round costs {a_round} drafted steps and {a_row} for each of its rows, as measured at the start."
    if checked:
        yield f"Identical to plain decoding: {sum(checked)} of {len(checked)} answers, `none`'s own included."


def _print_table(records: list[RequestRecord]) -> None:
    segments: dict[tuple[int, str], Runs] = defaultdict(lambda: defaultdict(list))
    whole: Runs = defaultdict(list)
    for record in records:
        segments[record.segment, record.data][record.learner].append(record)
        whole[record.learner].append(record)
    left: dict[tuple[str, str], float] = {}
    for (number, data), runs in sorted(segments.items()):
        thirds = {learner: _last_third(own).acceptance_length for learner, own in runs.items()}
        for learner, own in runs.items():
            length = _stats(own).acceptance_length
            print(
                _row(
                    (
                        f"{number + 1} {data}", f"`{learner}`", f"{length:.2f}", f"{thirds[learner]:.2f}",
                        _ratio(thirds[learner], thirds.get("frozen")), _ratio(length, left.get((learner, data))),
                        *_net(own, runs),
                    )
                )
            )  # fmt: skip
            left[learner, data] = thirds[learner]
    for learner, own in whole.items():
        length = f"{_stats(own).acceptance_length:.2f}"
        print(_row(("whole stream", f"`{learner}`", length, "", "", "", *_net(own, whole))))


def _net(own: list[RequestRecord], runs: Runs) -> tuple[str, str, str]:
    """Net speed against none and frozen, and learning's share of decode time."""
    stats = _stats(own)
    share = stats.learn_seconds / stats.decode_seconds if stats.decode_seconds else 0.0
    return _against(own, runs.get("none", [])), _against(own, runs.get("frozen", [])), f"{100 * share:.1f} %"


def _against(own: list[RequestRecord], control: list[RequestRecord]) -> str:
    """Of all repeats together; in brackets the lowest and the highest."""
    pooled = speedup(_stats(own), _stats(control))
    repeats = sorted({record.repeat for record in own})
    each = [speedup(*(_stats(r for r in records if r.repeat == n) for records in (own, control))) for n in repeats]
    known = [ratio for ratio in each if ratio is not None]
    if pooled is None:
        return ""
    return f"{pooled:.2f}" + (f" [{min(known):.2f}–{max(known):.2f}]" if len(known) > 1 else "")


def _stats(records: Iterable[RequestRecord]) -> DecodeStats:
    """Lines of requests.jsonl as counts."""
    return total(
        [
            DecodeStats(
                requests=1,
                tokens=record.tokens,
                steps=record.steps,
                drafted=record.drafted,
                accepted=record.accepted,
                decode_seconds=record.decode_seconds,
                learn_seconds=record.learn_seconds,
            )
            for record in records
        ]
    )


def _last_third(records: list[RequestRecord]) -> DecodeStats:
    """The last third of the requests in stream order, all repeats of them."""
    indices = sorted({record.index for record in records})
    late = set(indices[len(indices) - len(indices) // 3 :])
    return _stats(record for record in records if record.index in late)


def _ratio(value: float, control: float | None) -> str:
    return f"{value / control:.2f}" if control else ""


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "requests.jsonl").is_file():
        sys.exit("usage: python benchmarks/thirds.py DIR    (a folder that `onlinespec compare --out DIR` wrote)")
    main(Path(sys.argv[1]))
