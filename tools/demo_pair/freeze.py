"""Writes the built-in prompts of the package from the generators.

PYTHONPATH=tools python -m demo_pair.freeze src/onlinespec/workloads/prompts
"""

from __future__ import annotations

import gzip
import json
import sys
from itertools import islice
from pathlib import Path

from demo_pair.arithmetic import Arithmetic
from demo_pair.code import Code
from demo_pair.prose import Prose
from demo_pair.sql import Sql
from onlinespec.workloads.base import SPLITS

GENERATORS = {kind.name: kind for kind in (Prose, Code, Sql, Arithmetic)}
COUNT = 1000  # of each kind and split, or all that there are


def main(folder: Path) -> None:
    """A file for every kind and split."""
    for name, kind in GENERATORS.items():
        for split in SPLITS:
            prompts = islice(kind().prompts(0, split), COUNT)
            rows = [json.dumps({"id": one.id, "prompt": one.text}, ensure_ascii=False) for one in prompts]
            packed = gzip.compress("".join(row + "\n" for row in rows).encode(), mtime=0)
            (folder / f"{name}.{split}.jsonl.gz").write_bytes(packed)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
