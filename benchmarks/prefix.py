"""What does it cost to know which prompts begin alike? Bookkeeping alone, without a model.

    python benchmarks/prefix.py [--num-tokens 12500 25000 50000 100000]

A stand-in for the model writes nothing, so that what is left of `DecodeLoop.prefill` is choosing pieces, hashing
blocks, looking them up and keeping them. A prompt is prefilled in pieces, as in a server: into an empty cache (first),
as one that another prompt has filled (again), and beside another that begins alike (beside). CPU seconds.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import tyro
from torch import Tensor

from onlinespec.config import GenerationParams
from onlinespec.core import Features
from onlinespec.engine.prefix_cache import PrefixCache
from onlinespec.engine.step import DecodeLoop
from onlinespec.experiments.provenance import provenance
from onlinespec.models.base import Output
from onlinespec.models.kv_cache import KVCache

_CPU = torch.device("cpu")
_HIDDEN = 2  # as little to copy as can be
_VOCAB = 50_000


@dataclass(frozen=True)
class Prefix:
    """Read long prompts with a model that computes nothing."""

    num_tokens: tuple[int, ...] = (12_500, 25_000, 50_000, 100_000)
    piece: int = 128
    """Tokens of a prompt between two steps of others, as `serve` reads."""
    seed: int = 0
    out: Path | None = None


class NoModel:
    """Takes tokens into its cache and returns states that mean nothing."""

    device, dtype = _CPU, torch.float32

    def __init__(self, context: int) -> None:
        layer = SimpleNamespace(hidden_size=_HIDDEN, rope=SimpleNamespace(length_of=lambda capacity: 0))
        self.config = SimpleNamespace(layer=layer, max_positions=context, vocab_size=_VOCAB)
        self._states = torch.zeros(context, _HIDDEN)

    def new_cache(self) -> KVCache:
        return KVCache(1, 1, _HIDDEN, _CPU, torch.float32)

    def forward(
        self, token_ids_N: Tensor, slots: Sequence[int], counts: Sequence[int], cache: KVCache, **_: Any
    ) -> Output:
        for slot, count in zip(slots, counts, strict=True):
            cache.extend(slot, count)
        return Output(torch.empty(0, _VOCAB), Features(self._states[: len(token_ids_N)]))


def main(command: Prefix) -> None:
    """Seconds by length and case."""
    torch.set_num_threads(1)
    rows = [row for num_tokens in command.num_tokens for row in measured(command, num_tokens)]
    for row in rows:
        print(f"{row['num_tokens']:>8,} tokens, {row['case']:<6}  {row['seconds']:8.3f} s")
    if command.out:
        line = " ".join(["python", "benchmarks/prefix.py", *sys.argv[1:]])
        told = provenance(line, "none", "none", "none", asdict(command))
        command.out.write_text("\n".join(json.dumps(row, default=str) for row in (told, *rows)) + "\n")


def measured(command: Prefix, num_tokens: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(command.seed)
    ids = torch.randint(_VOCAB, (num_tokens + 1,), generator=generator).tolist()
    target: Any = SimpleNamespace(decoder=NoModel(num_tokens + 1000), tokenizer=None, name="none")
    rows = []
    loop = DecodeLoop(target, prefixes=PrefixCache(10**10))
    for case, prompts in (("first", [ids]), ("again", [[*ids, 1]]), ("beside", [ids, [*ids[:-1], 1]])):
        if case == "beside":
            loop = DecodeLoop(target, prefixes=PrefixCache(10**10))
        requests = [loop.open(prompt, GenerationParams(8)) for prompt in prompts]
        for request in requests:
            loop.admit(request)
        began = time.process_time()
        while unread := [request for request in requests if not request.is_ready]:
            loop.prefill(unread, command.piece)
        rows.append({"num_tokens": num_tokens, "case": case, "seconds": time.process_time() - began})
        for request in requests:
            loop.finish(request)
    return rows


if __name__ == "__main__":
    main(tyro.cli(Prefix))
