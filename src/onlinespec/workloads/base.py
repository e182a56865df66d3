"""The workload contract: a stream of prompts from one domain."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

Split = Literal["stream", "train"]
SPLITS: tuple[Split, ...] = ("stream", "train")


@dataclass(frozen=True)
class Prompt:
    """One prompt of a stream."""

    id: str  # unique in its workload
    text: str
    domain: str  # the workload's name: "sql", or the stem of a file
    reference: str | None = None  # a reference answer, if the data has one


class Workload(Protocol):
    """A stream of prompts from one domain."""

    name: str  # the domain tag

    def prompts(self, seed: int, split: Split = "stream") -> Iterator[Prompt]:
        """Yields prompts. The same seed and split give the same prompts in the same order; no prompt comes twice.

        Raises:
            ValueError: for an unknown split.
        """
        ...


def check_split(split: str) -> None:
    """Raises ValueError unless the split is "stream" or "train"."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
