"""The built-in prompts: a thousand of each kind to serve and a thousand to train on, frozen as they were generated.

They need no download and are the same everywhere. `tools/demo_pair` has the generators, and `freeze.py` there writes
the files again.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from importlib.resources import files
from random import Random

from onlinespec.workloads.base import Prompt, Split, check_split

_SITTING = 20  # prompts of a stream that follow each other are of one subject, about so many


class Builtin:
    """One kind. Seed 0 gives the prompts as they lie in the file; another seed has the sittings in another order."""

    name: str

    def prompts(self, seed: int, split: Split = "stream") -> Iterator[Prompt]:
        """Raises ValueError for an unknown split."""
        check_split(split)
        rows = list(self._rows(split))
        sittings = [rows[i : i + _SITTING] for i in range(0, len(rows), _SITTING)]
        if seed:
            Random(f"{self.name}/{seed}").shuffle(sittings)
        return (prompt for sitting in sittings for prompt in sitting)

    def _rows(self, split: Split) -> Iterator[Prompt]:
        packed = files(__package__).joinpath("prompts", f"{self.name}.{split}.jsonl.gz").read_bytes()
        for line in gzip.decompress(packed).decode("utf-8").splitlines():
            row = json.loads(line)
            yield Prompt(row["id"], row["prompt"], self.name)


class Prose(Builtin):
    """A paragraph about somebody of a trade, somewhere, told from some facts."""

    name = "prose"


class Code(Builtin):
    """A function of Python's standard library from its docstring."""

    name = "code"


class Sql(Builtin):
    """A query from a question and a schema."""

    name = "sql"


class Arithmetic(Builtin):
    """A word problem, worked out step by step."""

    name = "arithmetic"
