"""The text the demo target is trained on: a seeded mix of the built-in workloads and, if given, jsonl files.

A file is named by its stem (`gsm8k.train.jsonl.gz` is `gsm8k`); its rows hold `prompt` and `response`, or
`text`. Only permissively licensed text belongs here: the shipped pair's licence depends on it (see MODEL_CARD.md).
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from demo_pair.freeze import GENERATORS

# Share of each source among the training documents' tokens; sources that were not given drop out.
MIX = {
    "prose": 0.10,
    "sql": 0.14,
    "arithmetic": 0.14,
    "code": 0.08,
    "spider": 0.16,
    "gsm8k": 0.16,
    "doc2code_py": 0.13,
    "mbpp": 0.01,
    "finance_10k": 0.03,
    "text_python": 0.05,
}


@dataclass(frozen=True)
class Document:
    """A prompt with its answer, or plain text (then the prompt is empty)."""

    prompt: str
    answer: str


def builtin_documents(name: str, seed: int) -> Iterator[Document]:
    """The training split of a built-in, over and over; finite ones start again with the next seed."""
    workload = GENERATORS[name]()
    while True:
        for prompt in workload.prompts(seed, split="train"):
            if prompt.reference:
                yield Document(prompt.text, prompt.reference)
        seed += 1


def file_documents(path: Path, seed: int, chars: int = 1_600) -> Iterator[Document]:
    """The rows of a jsonl file, shuffled anew each time round; long texts give a random piece each time."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rows = [json.loads(line) for line in content.decode("utf-8").split("\n") if line.strip()]
    rng = random.Random(seed)
    while True:
        rng.shuffle(rows)
        for row in rows:
            if "text" in row:
                start = rng.randrange(max(1, len(row["text"]) - chars))
                yield Document("", row["text"][start : start + chars])
            else:
                yield Document(row["prompt"], row["response"])


class Corpus:
    """Draws documents from the sources by their shares of tokens, reproducibly for a seed."""

    def __init__(self, data: Path | None, seed: int) -> None:
        files = {path.name.split(".")[0]: path for path in sorted(data.glob("*.train.jsonl*"))} if data else {}
        self.sources = {
            name: builtin_documents(name, seed) if name in GENERATORS else file_documents(files[name], seed)
            for name in MIX
            if name in GENERATORS or name in files
        }
        self.num_tokens = dict.fromkeys(self.sources, 1)

    def documents(self) -> Iterator[tuple[str, Document]]:
        """Endless (source, document) pairs from the source that lags furthest behind its share."""
        while True:
            name = min(self.sources, key=lambda source: self.num_tokens[source] / MIX[source])
            document = next(self.sources[name])
            self.num_tokens[name] += (len(document.prompt) + len(document.answer)) // 3 + 1
            yield name, document


def packed_rows(
    corpus: Corpus,
    encode: Callable[[Document], tuple[list[int], list[float]]],
    row_length: Callable[[], int],
) -> Iterator[tuple[list[int], list[float]]]:
    """Rows of token ids and loss weights, documents one after the other, cut where a row is full."""
    ids: list[int] = []
    weights: list[float] = []
    for _, document in corpus.documents():
        new_ids, new_weights = encode(document)
        ids += new_ids
        weights += new_weights
        while len(ids) > row_length():
            n = row_length() + 1
            yield ids[:n], weights[:n]
            ids, weights = ids[n:], weights[n:]
