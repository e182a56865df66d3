"""Rows of the peers as markdown: tokens per second against transformers' plain `generate` and against our `none`.

A ratio is of pooled rates: tokens of all counted requests over their seconds, the arm's over the control's. Its figure
is the median of the repeats. In brackets the lowest and the highest repeat, in parentheses 95 % of bootstrap samples,
which draw prompts (the same for arm and control, all repeats of one together).
"""

from __future__ import annotations

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

from tyro.conf import Positional

PLAIN, NONE = "transformers", "none"
ASSISTED = ("transformers/assisted", "transformers/assisted_heuristic", "transformers/assisted_default")
PAIRED = ("small_lm/frozen", "small_lm/online_gradient")  # ours with the model that assists there
NUM_SAMPLES = 1000
HEADER = (
    "arm", "tokens a step", "tokens/s", "/ `transformers`", "/ `none`",
    "last third: tokens a step", "/ `transformers`", "/ `none`", "learning", "identical, ties, differing",
)  # fmt: skip

Row = dict[str, Any]
Runs = dict[str, list[Row]]  # by arm, one row a repeat
Ratio = Callable[[int, Sequence[int]], float]  # of a repeat, over some of the requests


@dataclass(frozen=True)
class Tables:
    """Write the tables in markdown to standard output.

    Attributes:
        clock: `seconds` on the wall; or `cpu_seconds`, for a machine that others use, too.
    """

    rows: Positional[Path]
    clock: Literal["seconds", "cpu_seconds"] = "seconds"


def run_tables(options: Tables) -> None:
    """Prints it all."""
    rows = [_on(options.clock, json.loads(line)) for line in options.rows.read_text().splitlines()]
    streams: dict[str, Runs] = defaultdict(lambda: defaultdict(list))
    for row in sorted(rows, key=lambda row: row["repeat"]):
        streams[row["data"]][row["arm"]].append(row)
    print("\n".join(_told(rows, options.clock)))
    for data, runs in streams.items():
        print(f"\n## {data}\n")
        _print(HEADER, [_line(arm, runs) for arm in runs])
    print("\n## The same small model, ours over transformers'\n")
    header = ("stream", "ours", "over", "whole", "last third")
    _print(header, [line for data, runs in streams.items() for line in _paired(data, runs)])


def _on(clock: str, row: Row) -> Row:
    """A row whose seconds are of the clock asked for. Learning was timed on the wall: its share is of that alone."""
    if clock != "seconds":
        row = row | {"learn_seconds": [0.0] * len(row["seconds"])}
    return row | {
        f"{prefix}seconds": row[f"{prefix}{clock}"] for prefix in ("", "control_") if f"{prefix}{clock}" in row
    }


def _told(rows: list[Row], clock: str) -> Iterable[str]:
    """What ran on what."""
    origins = {json.dumps(row["provenance"], sort_keys=True): row["provenance"] for row in rows}
    repeats = Counter(row["repeat"] for row in rows)
    yield "# Peers\n"
    yield "Written by `python benchmarks/peers/peers.py tables`; what is compared: [peers](../peers/README.md)."
    yield from dict.fromkeys(line for said in origins.values() for line in _origin_lines(said))
    seconds = {"seconds": "seconds on the wall", "cpu_seconds": "processor seconds of all processes"}[clock]
    many = f"median of {len(repeats)} repeats [lowest–highest]" if len(repeats) > 1 else "of one repeat"
    yield f"\nSpeeds are tokens over {seconds}. Ratios: {many}"
    yield f"(95 % of {NUM_SAMPLES} bootstrap samples of prompts)."


def _origin_lines(said: dict[str, Any]) -> Iterable[str]:
    machine = f"{said['processor']}, {said['num_threads']} thread, torch {said['torch']}"
    engine = f"vLLM {said['vllm']}, " if "vllm" in said else f"commit {said['commit']}, "
    yield f"- `{said['command']}`: {engine}transformers {said['transformers']}, {machine}, {said['started'][:10]}."
    if costs := said["settings"].get("learn_costs"):
        each = (f"{name} {c['round_cost']} steps and {c['row_cost']} a row" for name, c in costs.items())
        yield f"  A round of learning costs, as measured at the start: {'; '.join(each)}."


def _line(arm: str, runs: Runs) -> list[str]:
    rows = runs[arm]
    whole, late = counted(rows[0]), last_third(rows[0])
    seconds = sum(row["seconds"][i] for row in rows for i in whole)
    learning = sum(row["learn_seconds"][i] for row in rows for i in whole) / seconds
    judged = (sum(row["identical"] for row in rows), sum(row["ties"] for row in rows))
    return [
        f"`{arm}`",
        f"{_per_step(rows, whole):.2f}",
        f"{statistics.median(_rate(row, whole) for row in rows):.0f}",
        *(_spread(rows, _ratio(arm, control, runs), whole) for control in (PLAIN, NONE)),
        f"{_per_step(rows, late):.2f}",
        *(_spread(rows, _ratio(arm, control, runs), late) for control in (PLAIN, NONE)),
        f"{learning:.1%}" if learning else "",
        f"{judged[0]}, {judged[1]}, {sum(len(row['differing']) for row in rows)}",
    ]


def _paired(data: str, runs: Runs) -> Iterable[list[str]]:
    """Ours against every way of transformers' with the same small model."""
    for ours in PAIRED:
        for control in (*ASSISTED, PLAIN):
            if ours in runs and control in runs:
                rows, ratio = runs[ours], _ratio(ours, control, runs)
                spreads = [_spread(rows, ratio, part(rows[0])) for part in (counted, last_third)]
                yield [data, f"`{ours}`", f"`{control}`", *spreads]


def counted(row: Row) -> range:
    """Indices of the requests behind the warm-up."""
    return range(row["warm_up"], len(row["tokens"]))


def last_third(row: Row) -> range:
    """Indices of the last third of the whole stream."""
    num_requests = len(row["tokens"])
    return range(num_requests - num_requests // 3, num_requests)


def _ratio(arm: str, control: str, runs: Runs) -> Ratio | None:
    """How much faster an arm is than a control; None where the control was not run.

    vLLM's arms took turns with transformers in their own environment, so they are set against that, and against
    `none` by way of transformers' plain generate in the main run.
    """
    rows, others = runs[arm], runs.get(control)
    if "control_seconds" not in rows[0]:
        return (lambda r, chosen: _rate(rows[r], chosen) / _rate(others[r], chosen)) if others else None

    def against_own(repeat: int, chosen: Sequence[int]) -> float:
        return _rate(rows[repeat], chosen) / _rate(rows[repeat], chosen, "control_")

    if control == PLAIN:
        return against_own
    plain = runs.get(PLAIN)
    if not plain or not others:
        return None
    return lambda r, chosen: (
        against_own(r, chosen)
        * statistics.median(_rate(one, chosen) / _rate(other, chosen) for one, other in zip(plain, others, strict=True))
    )


def _rate(row: Row, chosen: Sequence[int], prefix: str = "") -> float:
    tokens, seconds = row[prefix + "tokens"], row[prefix + "seconds"]
    return sum(tokens[i] for i in chosen) / sum(seconds[i] for i in chosen)


def _per_step(rows: list[Row], chosen: Sequence[int]) -> float:
    tokens, steps = (sum(row[name][i] for row in rows for i in chosen) for name in ("tokens", "steps"))
    return tokens / steps if steps else float("nan")


def _spread(rows: list[Row], ratio: Ratio | None, chosen: Sequence[int]) -> str:
    if ratio is None:
        return ""
    each = [ratio(r, chosen) for r in range(len(rows))]
    rng, samples = Random("peers"), []
    for _ in range(NUM_SAMPLES):
        drawn = rng.choices(chosen, k=len(chosen))
        samples.append(statistics.median(ratio(r, drawn) for r in range(len(rows))))
    samples.sort()
    low, high = samples[NUM_SAMPLES // 40], samples[-1 - NUM_SAMPLES // 40]
    between = f" [{min(each):.2f}–{max(each):.2f}]" if len(each) > 1 else ""
    return f"{statistics.median(each):.2f}{between} ({low:.2f}–{high:.2f})"


def _print(header: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for line in lines:
        print("| " + " | ".join(line) + " |")
