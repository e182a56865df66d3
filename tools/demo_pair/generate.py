"""How a grammar's draws become a seeded stream of distinct prompts, in two splits that share none."""

from collections.abc import Callable, Iterator
from hashlib import sha256
from random import Random

from onlinespec.workloads.base import Prompt, Split, check_split

DRAWS_PER_SITTING = {"stream": 160, "train": 1}  # one in eight draws is of the stream: about twenty a sitting
MAX_FRUITLESS_DRAWS = 20_000  # repeats in a row after which a grammar counts as exhausted


def split_of(text: str) -> Split:
    """The split a prompt belongs to, by its text alone: one in eight is "stream", whatever the seed."""
    return "stream" if _digest(text) % 8 == 0 else "train"


Draw = Callable[[Random], tuple[str, str]]  # gives (text, reference)


def endless(name: str, sit_down: Callable[[Random], Draw], seed: int, split: Split) -> Iterator[Prompt]:
    """Distinct prompts of one split, sitting by sitting.

    People ask several things about one database, and solve several exercises of one kind, before they go on to the
    next; so do the prompts of a stream. Training prompts are independent of each other.

    Ends only if the draws run dry: MAX_FRUITLESS_DRAWS in a row that were seen before.

    Args:
        sit_down: Chooses what a sitting is about, and returns what draws its prompts.
    """
    check_split(split)
    return _distinct(name, _draws(sit_down, Random(f"{name}/{seed}"), DRAWS_PER_SITTING[split]), split)


def _draws(sit_down: Callable[[Random], Draw], rng: Random, draws_per_sitting: int) -> Iterator[tuple[str, str]]:
    while True:
        draw = sit_down(rng)
        for _ in range(draws_per_sitting):
            yield draw(rng)


def _distinct(name: str, drawn: Iterator[tuple[str, str]], split: Split) -> Iterator[Prompt]:
    seen: set[int] = set()
    last_new = 0
    for number, (text, reference) in enumerate(drawn):
        digest = _digest(text)
        if digest not in seen:
            seen.add(digest)
            last_new = number
            if split_of(text) == split:
                yield Prompt(f"{name}-{digest:016x}", text, name, reference)
        elif number - last_new > MAX_FRUITLESS_DRAWS:
            return


def _digest(text: str) -> int:
    return int.from_bytes(sha256(text.encode()).digest()[-8:])  # the last 64 bits: small to keep, same value mod 8
