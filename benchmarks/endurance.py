"""Does memory stay flat? Thousands of requests through one loop, learning on, as a server would run them.

    python benchmarks/endurance.py [--num-requests 2000] [--drafter demo/small_lm]

Prompts of all built-in streams in random turns, four requests at a time; one in three sampled, one in five with a stop
string, one in ten given up in its middle. Every hundred requests: resident memory, live tensors, the replay buffer.
Memory fills until that buffer is full, which its small size lets happen early; from then on it must not grow. The exit
status is 1 if the last fifth after warm-up holds more than `--tolerance` above the first fifth in resident memory, if
learning stopped, or if a greedy answer differs from plain decoding (one in twenty is decoded again).
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import chain, count
from pathlib import Path
from random import Random

import torch
import tyro

from onlinespec.config import GenerationParams, SamplingParams
from onlinespec.drafters.loading import load_drafter
from onlinespec.engine.request import ContextOverflow, Request
from onlinespec.engine.step import DecodeLoop
from onlinespec.experiments.provenance import provenance
from onlinespec.learning.settings import LearnConfig
from onlinespec.learning.update import InlineLearning
from onlinespec.models.loading import Target, load_target
from onlinespec.registry import WORKLOADS
from onlinespec.workloads import load_workload

EVERY = 100  # requests between two looks at memory
WARM_UP = 400  # requests: buffer, tables and the allocator's pools are full
LEAST = WARM_UP + 5 * EVERY
SIDE_BY_SIDE = 4
KERNELS = 64  # torch and oneDNN keep 1,024 products each, five for each prompt length: they would hide a leak
CHECKED = 20  # one greedy answer in so many is decoded again without a drafter


@dataclass(frozen=True)
class Endurance:
    """Run many requests and watch memory."""

    target: str = "demo"
    drafter: str = "demo"
    num_requests: int = 2000
    max_new_tokens: int = 64
    replay_megabytes: float = 8.0
    tolerance: float = 0.02
    seed: int = 0
    out: Path | None = None


@dataclass(frozen=True)
class Look:
    """What memory held after so many requests."""

    requests: int
    seconds: float
    resident_megabytes: float
    live_tensors: int
    replay_megabytes: float
    rounds: int
    acceptance_length: float  # since the last look


def main(options: Endurance) -> int:
    if options.num_requests < LEAST:
        raise SystemExit(f"num_requests is {options.num_requests}; give at least {LEAST}, or nothing can be concluded")
    for cache in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):  # read when the first product is made
        os.environ.setdefault(cache, str(KERNELS))
    torch.set_num_threads(1)
    target = load_target(options.target)
    drafter = load_drafter(options.drafter, target)
    learning = InlineLearning(drafter, config=LearnConfig(replay_megabytes=options.replay_megabytes))
    loop = DecodeLoop(target, drafter, learning)
    looks: list[Look] = []
    finished: list[Request] = []
    wrong, began = 0, time.monotonic()
    for request in served(loop, options):
        finished.append(request)
        if len(finished) < EVERY:
            continue
        wrong += sum(is_wrong(target, one) for one in finished[::CHECKED])
        steps, accepted = (sum(getattr(one.stats, name) for one in finished) for name in ("steps", "accepted"))
        finished.clear()
        del request
        look = Look(
            requests=EVERY * (len(looks) + 1),
            seconds=round(time.monotonic() - began, 1),
            resident_megabytes=round(resident_megabytes(), 1),
            live_tensors=live_tensors(),
            replay_megabytes=round(learning.replay.num_bytes / 1e6, 2) if learning.replay else 0.0,
            rounds=learning.num_rounds,
            acceptance_length=round(1 + accepted / steps, 3),
        )
        looks.append(look)
        print(json.dumps(asdict(look)), flush=True)
    return verdict(looks, wrong, learning.is_frozen, options, target)


def served(loop: DecodeLoop, options: Endurance) -> Iterator[Request]:
    """Requests as they end, finished or given up."""
    jobs, rng, running = drawn(options), Random(f"given up/{options.seed}"), list[Request]()
    for number in range(options.num_requests):
        while len(running) < SIDE_BY_SIDE:
            text, params, domain = next(jobs)
            with suppress(ContextOverflow):
                running.append(loop.start(loop.target.encode(text), params, domain=domain))
        leaving = rng.choice(running) if number % 10 == 9 else None
        while not leaving:
            leaving = next((one for one in running if one.finish_reason), None)
            if not leaving:
                loop.step(running)
        running.remove(leaving)
        loop.finish(leaving)
        yield leaving
    for one in running:
        loop.finish(one)


def drawn(options: Endurance) -> Iterator[tuple[str, GenerationParams, str]]:
    """Prompts of all built-in streams, each with a request's parameters."""
    rng = Random(options.seed)
    workloads = {name: load_workload(f"builtin:{name}") for name in WORKLOADS}
    streams = {name: chain.from_iterable(w.prompts(options.seed) for _ in count()) for name, w in workloads.items()}
    for number in count():
        prompt = next(streams[rng.choice(list(streams))])
        params = GenerationParams(
            max_new_tokens=rng.randint(1, options.max_new_tokens),
            num_draft_tokens=rng.choice((0, 2, 2, 4)),
            sampling=SamplingParams(temperature=0.8) if rng.random() < 1 / 3 else SamplingParams(),
            stop_strings=(" the", "\n\n") if rng.random() < 1 / 5 else (),
            seed=number,
        )
        yield prompt.text, params, prompt.domain


def is_wrong(target: Target, request: Request) -> bool:
    """Whether a greedy answer, as far as it came, is not what plain decoding gives."""
    if not request.params.sampling.is_greedy:
        return False
    prompt_ids = request.trace.token_ids[: request.num_prompt_tokens]
    plain = DecodeLoop(target).complete(prompt_ids, request.params).output_ids
    return request.output_ids != plain[: len(request.output_ids)]


def resident_megabytes() -> float:
    """Of this process, as Linux counts it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1e3


def live_tensors() -> int:
    gc.collect()
    return sum(type(one) is torch.Tensor for one in gc.get_objects())


def verdict(looks: list[Look], wrong: int, is_frozen: bool, options: Endurance, target: Target) -> int:
    """Prints the end's figures and keeps them if asked to; the exit status."""
    settled = [look.resident_megabytes for look in looks if look.requests > WARM_UP]
    fifth = len(settled) // 5
    before, after = statistics.median(settled[:fifth]), statistics.median(settled[-fifth:])
    growth = after / before - 1
    settings = {name: value for name, value in asdict(options).items() if name != "out"}
    said = provenance("", options.target, options.drafter, target.fingerprint, settings)
    ending = {"before_megabytes": before, "after_megabytes": after, "growth": round(growth, 4), "wrong_answers": wrong}
    print(json.dumps(ending | {"learning_stopped": is_frozen}), flush=True)
    if options.out:
        rows = [*map(asdict, looks), ending | {key: said[key] for key in ("settings", "commit", "processor")}]
        options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return int(growth > options.tolerance or wrong > 0 or is_frozen)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Endurance)))
