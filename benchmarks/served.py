"""Servers that are measured over HTTP, what asks them, and where figures go: for serving.py."""

from __future__ import annotations

import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from random import Random

import httpx
import psutil

from onlinespec.config import GenerationParams
from onlinespec.engine.step import DecodeLoop
from onlinespec.experiments.provenance import provenance
from onlinespec.models.loading import load_target
from onlinespec.workloads import load_workload

PIN = ["taskset", "-c", "0"]


@dataclass(frozen=True)
class Common:
    """What all of them share."""

    target: str = "demo"
    drafter: str = "demo"
    max_tokens: int = 64
    seed: int = 0
    out: Path | None = None


# --- servers and clients ----------------------------------------------------------------------------------------------


@dataclass
class Server:
    """One that runs."""

    name: str
    url: str
    process: subprocess.Popen[str]

    def live(self) -> dict:
        """What its page shows."""
        return httpx.get(f"{self.url}/live", timeout=60).json()

    def megabytes(self) -> tuple[float, float]:
        """Resident memory of the server, and of its learning process."""
        own = psutil.Process(self.process.pid)
        parts = own.children(recursive=True)
        return own.memory_info().rss / 1e6, sum(part.memory_info().rss for part in parts) / 1e6


@contextmanager
def served(name: str, common: Common, flags: Sequence[str]) -> Iterator[Server]:
    """A server for as long as the block lasts."""
    command = [*PIN, sys.executable, "-m", "onlinespec.cli", "serve", common.target, "--drafter", common.drafter]
    command += ["--port", "0", "--seed", str(common.seed), *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.stderr
    for line in process.stderr:
        if found := re.search(r"serving .* at (http\S+);", line):
            break
        print(f"{name}: {line.rstrip()}", file=sys.stderr)
    else:
        raise RuntimeError(f"{name} did not start: {' '.join(command)}")
    for pid in psutil.Process(process.pid).children(recursive=True):
        pid.cpu_affinity(list(range(os.cpu_count() or 1)))  # learning: wherever there is room
    try:
        yield Server(name, found[1], process)
    finally:
        process.terminate()
        process.communicate(timeout=60)


@dataclass
class Told:
    """What a client saw of one answer; seconds."""

    text: str = ""
    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    first: float = 0.0
    gaps: list[float] = field(default_factory=list)
    error: str = ""


async def ask(client: httpx.AsyncClient, url: str, prompt: str | Sequence[int], max_tokens: int) -> Told:
    """One streamed answer: to a text as a conversation, to token ids as they are."""
    told, began, last = Told(), time.perf_counter(), 0.0
    is_chat = isinstance(prompt, str)
    path = "chat/completions" if is_chat else "completions"
    body = {"messages": [{"role": "user", "content": prompt}]} if is_chat else {"prompt": list(prompt)}
    body |= {
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    try:
        async with client.stream("POST", f"{url}/v1/{path}", json=body) as response:
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk, now = json.loads(line[6:]), time.perf_counter()
                if "error" in chunk:
                    told.error = chunk["error"]["message"]
                if usage := chunk.get("usage"):
                    told.tokens, told.steps = usage["completion_tokens"], usage.get("speculation", {}).get("steps", 0)
                for choice in chunk.get("choices", []):
                    told.text += (choice["delta"].get("content") if is_chat else choice["text"]) or ""
                    if last:
                        told.gaps.append(now - last)
                    else:
                        told.first = now - began
                    last = now
            if response.status_code != httpx.codes.OK:
                told.error = f"status {response.status_code}"
    except httpx.HTTPError as error:
        told.error = f"{type(error).__name__}: {error}"
    told.seconds = time.perf_counter() - began
    return told


async def ask_all(
    url: str, prompts: Sequence[str] | Sequence[Sequence[int]], streams: int, max_tokens: int
) -> tuple[list[Told], float]:
    """Answers to all prompts, so many at once, and the seconds that took."""
    waiting, told = list(enumerate(prompts))[::-1], {}

    async def work(client: httpx.AsyncClient) -> None:
        while waiting:
            place, prompt = waiting.pop()
            told[place] = await ask(client, url, prompt, max_tokens)

    began = time.perf_counter()
    async with httpx.AsyncClient(timeout=600) as client:
        await asyncio.gather(*(work(client) for _ in range(streams)))
    return [told[i] for i in range(len(prompts))], time.perf_counter() - began


def texts(data: str, count: int, seed: int) -> list[str]:
    """The first prompts of a stream."""
    return [prompt.text for prompt in islice(load_workload(data).prompts(seed), count)]


def plain_texts(common: Common, prompts: Sequence[str]) -> list[str]:
    """What the target says without a drafter."""
    target = load_target(common.target)
    loop, params = DecodeLoop(target), GenerationParams(common.max_tokens, 0)
    return [loop.complete(target.encode(prompt), params).text.text for prompt in prompts]


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


class Rows:
    """Where results go: a table on the terminal, lines in a file."""

    def __init__(self, common: Common, settings: object) -> None:
        self._out = common.out
        if self._out:
            self._out.parent.mkdir(parents=True, exist_ok=True)
            command = " ".join(["python", "benchmarks/serving.py", *sys.argv[1:]])
            first = provenance(command, common.target, common.drafter, "", asdict(settings))  # type: ignore[call-overload]
            self._out.write_text(json.dumps(first, default=str) + "\n")

    def add(self, **row: object) -> None:
        print(
            "  ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            ),
            flush=True,
        )
        if self._out:
            with self._out.open("a") as file:
                file.write(json.dumps(row, default=str) + "\n")


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Median of ratios and a 95 % interval of it, by drawing blocks again."""
    rng = Random(0)
    drawn = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(2000))
    return statistics.median(ratios), drawn[50], drawn[-51]
