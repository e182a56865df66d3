"""The built-in workloads: frozen files with up to a thousand prompts of each kind to serve, and as many to train on.

They need no download and are the same on every machine. `tools/demo_pair` has their generators, and `freeze.py` there
writes the files.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from importlib.resources import files
from random import Random

from onlinespec.workloads.base import Prompt, Split, check_split

_SITTING = 20  # about so many consecutive prompts share a subject: a database schema, a kind of problem, a module


class Builtin:
    """Prompts of one kind. Seed 0 gives the order of the file; other seeds shuffle blocks of 20 prompts."""

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
    """Write a paragraph about a person, a place and an event, from some facts."""

    name = "prose"


class Code(Builtin):
    """Write a function of Python's standard library from its docstring."""

    name = "code"


class Sql(Builtin):
    """Write an SQL query from a schema and a question."""

    name = "sql"


class Arithmetic(Builtin):
    """Solve a word problem step by step."""

    name = "arithmetic"
