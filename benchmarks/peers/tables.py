"""Ratios of tokens per second, with spread, from the rows that run.py and vllm_peer.py wrote.

    python benchmarks/peers/tables.py ROWS.jsonl [MORE.jsonl] > benchmarks/results/peers.md

For every segment: tokens per second of each arm over transformers' plain `generate`, over its assisted generation at
constant length, and over our `none`, on all prompts and on the last third (once learned). A ratio is of sums over the
same prompts; in brackets what nine of ten redrawings of whole blocks of ten prompts gave.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from pathlib import Path
from random import Random
from statistics import fmean

REFERENCES = {
    "transformers": "transformers",
    "its assisted": "transformers assisted, constant",
    "`none`": "none",
}
BLOCK, REDRAWINGS = 10, 1000

Key = tuple[int, int]  # repeat and index
Rows = dict[Key, dict]


def main(paths: list[Path]) -> None:
    """Prints markdown."""
    said, arms = read(paths)
    for one in said:
        print(
            f"Commit {one['commit']}, {one['processor']}, {one['num_threads']} thread, torch {one['torch']}, ", end=""
        )
        print(f"transformers {one['transformers']}, K = {one['num_draft_tokens']}, {one['started'][:10]}.")
    data = said[0]["data"]
    for segment, name in enumerate(data):
        print(f"\n### {name}\n")
        table(select(arms, segment))
    print("\n### Answers beside our plain decoding\n")
    print("| arm | same | near tie | differs |\n|---|---|---|---|")
    for arm, rows in arms.items():
        counts = Counter(row["verdict"] for row in rows.values())
        print(f"| {arm} | {counts['same']} | {counts['tie']} | {counts['differs']} |")


def read(paths: list[Path]) -> tuple[list[dict], dict[str, Rows]]:
    """Provenance of each file, and every arm's rows."""
    said, arms = [], defaultdict(dict)
    for path in paths:
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if "provenance" in row:
                said.append(row["provenance"])
            else:
                arms[row["arm"]][row["repeat"], row["index"]] = row
    return said, dict(arms)


def select(arms: dict[str, Rows], segment: int) -> dict[str, Rows]:
    """One segment's rows."""
    return {arm: {key: row for key, row in rows.items() if row["segment"] == segment} for arm, rows in arms.items()}


def table(arms: dict[str, Rows]) -> None:
    """A line per arm."""
    heads = [f"over {name}" for name in REFERENCES]
    titles = ["arm", "tokens/s", "acceptance length", *heads, *(f"{head}, last third" for head in heads)]
    print("| " + " | ".join(titles) + " |\n|" + "---|" * len(titles))
    for arm, rows in arms.items():
        lengths = [row["acceptance_length"] for row in rows.values() if row["acceptance_length"] is not None]
        cells = [arm, f"{speed(rows.values()):.0f}", f"{fmean(lengths):.2f}" if lengths else ""]
        for is_late in (False, True):
            cells += [ratio(rows, arms.get(reference, {}), is_late) for reference in REFERENCES.values()]
        print("| " + " | ".join(cells) + " |")


def ratio(rows: Rows, reference: Rows, is_late: bool) -> str:
    """Speed over the reference's on the prompts that both have, and its spread."""
    keys = sorted(rows.keys() & reference.keys())
    if is_late:
        indices = sorted({index for _, index in keys})
        late = set(indices[-(len(indices) // 3) :])
        keys = [key for key in keys if key[1] in late]
    if not keys:
        return ""
    blocks = [keys[i : i + BLOCK] for i in range(0, len(keys), BLOCK)]
    rng = Random(0)
    drawn = sorted(of([key for _ in blocks for key in rng.choice(blocks)], rows, reference) for _ in range(REDRAWINGS))
    low, high = drawn[REDRAWINGS // 20], drawn[-REDRAWINGS // 20]
    return f"{of(keys, rows, reference):.2f} [{low:.2f}–{high:.2f}]"


def of(keys: list[Key], rows: Rows, reference: Rows) -> float:
    """Speed of one over the other."""
    return speed([rows[key] for key in keys]) / speed([reference[key] for key in keys])


def speed(rows) -> float:
    """Tokens per second."""
    rows = list(rows)
    return sum(row["tokens"] for row in rows) / sum(row["seconds"] for row in rows)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python benchmarks/peers/tables.py ROWS.jsonl [MORE.jsonl]")
    main([Path(name) for name in sys.argv[1:]])
