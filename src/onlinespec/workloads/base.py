"""What a workload is: a stream of prompts from one domain."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

Split = Literal["stream", "train"]
SPLITS: tuple[Split, ...] = ("stream", "train")


@dataclass(frozen=True)
class Prompt:
    """One request of a stream."""

    id: str  # unique inside its workload
    text: str  # what the user asks
    domain: str  # "sql", or the stem of a file
    reference: str | None = None  # an answer, where there is one


class Workload(Protocol):
    """A stream of prompts from one domain."""

    name: str  # the domain tag

    def prompts(self, seed: int, split: Split = "stream") -> Iterator[Prompt]:
        """The same seed and split give the same prompts, in the same order, none of them twice; splits share none."""
        ...


def check_split(split: str) -> None:
    """Raises ValueError unless it is a split we know."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
