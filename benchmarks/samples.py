"""What the demo target answers: the samples of its model card, and how many greedy answers are distinct.

    python benchmarks/samples.py [--data DIR]

Writes markdown to standard output. With --data, a folder of spider, gsm8k and code_search .stream.jsonl.gz files, those
are counted too.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import tyro

from onlinespec.config import GenerationParams
from onlinespec.engine.step import DecodeLoop
from onlinespec.models.loading import load_target
from onlinespec.workloads import load_workload

BUILTINS = ("prose", "sql", "arithmetic", "code")
FILES = ("spider", "gsm8k", "code_search")


@dataclass(frozen=True)
class Samples:
    """Answer prompts greedily, show the first and count the distinct."""

    target: str = "demo"
    data: Path | None = None
    seed: int = 7
    shown: int = 2  # of each built-in
    counted: int = 20  # of each domain
    max_new_tokens: int = 96


def run(options: Samples) -> None:
    """Samples first, then one line of counts."""
    torch.set_num_threads(1)
    target = load_target(options.target)
    loop, params = DecodeLoop(target), GenerationParams(options.max_new_tokens, 0)
    domains = {name: f"builtin:{name}" for name in BUILTINS}
    if options.data:
        domains |= {name: str(options.data / f"{name}.stream.jsonl.gz") for name in FILES}
    counts = []
    for name, spec in domains.items():
        prompts = list(islice(load_workload(spec).prompts(options.seed), options.counted))
        answers = [loop.complete(target.encode(prompt.text), params).text.text for prompt in prompts]
        counts.append(f"{name} {len(set(answers))}")
        for prompt, answer in list(zip(prompts, answers, strict=True))[: options.shown if name in BUILTINS else 0]:
            print(f"**{name}**: {prompt.text!r}\n\n```\n{answer.strip()}\n```\n")
    print(f"Distinct greedy answers to {options.counted} distinct prompts: {', '.join(counts)}.")


if __name__ == "__main__":
    run(tyro.cli(Samples))
