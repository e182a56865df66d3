"""What serving over HTTP is like: for who waits for tokens, for who pays for the machine.

    python benchmarks/serving.py stream        net tokens per second of none, frozen and learned along a shifting stream
    python benchmarks/serving.py interference  to the first token, between chunks: learning off, in a thread, a process
    python benchmarks/serving.py load          many streams for minutes: errors, memory, every greedy answer checked
    python benchmarks/serving.py never-slower  with a drafter that knows nothing, and against fixed draft lengths

Each arm is a server of its own, `onlinespec serve` with other flags. All run at once and take turns, block by block, so
that a machine whose speed drifts hurts all alike; one that is not asked sleeps. A server decodes with one thread on
core 0, its learning process goes where there is room. Rows go to --out as JSON lines, with provenance in the first.
"""

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
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from pathlib import Path
from random import Random

import httpx
import psutil
import tyro

from onlinespec.config import GenerationParams
from onlinespec.decode import DecodeLoop
from onlinespec.models.loading import load_target
from onlinespec.provenance import provenance
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


async def ask(client: httpx.AsyncClient, url: str, prompt: str, max_tokens: int) -> Told:
    """One streamed answer."""
    told, began, last = Told(), time.perf_counter(), 0.0
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    try:
        async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk, now = json.loads(line[6:]), time.perf_counter()
                if "error" in chunk:
                    told.error = chunk["error"]["message"]
                if usage := chunk.get("usage"):
                    told.tokens, told.steps = usage["completion_tokens"], usage["speculation"]["steps"]
                for choice in chunk.get("choices", []):
                    told.text += choice["delta"].get("content") or ""
                    if last:
                        told.gaps.append(now - last)
                    else:
                        told.first = now - began
                    last = now
    except httpx.HTTPError as error:
        told.error = f"{type(error).__name__}: {error}"
    told.seconds = time.perf_counter() - began
    return told


async def ask_all(url: str, prompts: Sequence[str], streams: int, max_tokens: int) -> tuple[list[Told], float]:
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


# --- net tokens per second along a stream -----------------------------------------------------------------------------

NONE = ("--learner", "frozen", "--num-draft-tokens", "0")
FROZEN = ("--learner", "frozen")


@dataclass(frozen=True)
class Stream(Common):
    """none, frozen and learned take turns, prompt by prompt."""

    data: tuple[str, ...] = ("builtin:prose", "builtin:code", "builtin:sql", "builtin:arithmetic", "builtin:prose")
    num_requests: tuple[int, ...] = (16, 50, 80, 80, 16)
    learn_budget: float = 0.08
    """Of a core, all the time: three times as much of the time in which the learned server has its turn."""


def stream(command: Stream) -> None:
    """Tokens over the seconds that a client waited, prompts included."""
    rows = Rows(command, command)
    arms = {"none": NONE, "frozen": FROZEN, "learned": ("--learn-budget", str(command.learn_budget))}
    told: dict[str, list[tuple[str, Told]]] = {name: [] for name in arms}
    with ExitStack() as stack:
        servers = [stack.enter_context(served(name, command, flags)) for name, flags in arms.items()]
        for index, (data, count) in enumerate(zip(command.data, command.num_requests, strict=True)):
            for prompt in texts(data, count, command.seed + index):
                for server in servers:
                    (one,), _ = asyncio.run(ask_all(server.url, [prompt], 1, command.max_tokens))
                    told[server.name].append((f"{index} {data}", one))
        learned = servers[-1].live()
    for segment in dict.fromkeys(segment for segment, _ in told["none"]):
        for part in ("all", "last third"):
            rates = {}
            for name in arms:
                own = [one for where, one in told[name] if where == segment]
                own = own if part == "all" else own[-(len(own) // 3) :]
                rates[name] = sum(one.tokens for one in own) / sum(one.seconds for one in own)
            rows.add(
                segment=segment,
                part=part,
                **rates,
                over_none=rates["learned"] / rates["none"],
                over_frozen=rates["learned"] / rates["frozen"],
            )
    whole = {name: sum(o.tokens for _, o in told[name]) / sum(o.seconds for _, o in told[name]) for name in arms}
    same = all(len({told[name][i][1].text for name in arms}) == 1 for i in range(len(told["none"])))
    rows.add(
        segment="whole",
        part="all",
        **whole,
        over_none=whole["learned"] / whole["none"],
        over_frozen=whole["learned"] / whole["frozen"],
    )
    kinds = [mark["kind"] for mark in learned["marks"]]
    rows.add(
        identical=same,
        share_spent=learned["learning"]["share_spent"],
        **{kind: kinds.count(kind) for kind in sorted(set(kinds))},
    )


# --- interference -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interference(Common):
    """Learning off, in a thread and in a process take turns, block by block. Its steps are 0: only its work differs."""

    data: str = "builtin:sql"
    streams: tuple[int, ...] = (1, 4, 16)
    blocks: int = 8
    requests_per_stream: int = 3
    learn_budget: float = 0.25
    num_draft_tokens: int = 2


def interference(command: Interference) -> None:
    """Quantiles over all chunks of an arm, and the median over blocks of paired ratios."""
    rows = Rows(command, command)
    fixed = ("--fixed-draft-length", "--num-draft-tokens", str(command.num_draft_tokens))
    still = ("--learner", "optimistic/step_size=0", "--learn-budget", str(command.learn_budget))
    arms = {
        "off": (*fixed, "--learner", "frozen"),
        "thread": (*fixed, *still, "--learn-in", "thread"),
        "process": (*fixed, *still, "--learn-in", "process"),
    }
    with ExitStack() as stack:
        servers = [stack.enter_context(served(name, command, flags)) for name, flags in arms.items()]
        for streams in command.streams:
            prompts = iter(
                texts(command.data, (1 + command.blocks) * streams * command.requests_per_stream, command.seed)
            )
            blocks: dict[str, list[list[Told]]] = {name: [] for name in arms}
            for block in range(1 + command.blocks):
                chosen = list(islice(prompts, streams * command.requests_per_stream))
                for server in servers[block % 3 :] + servers[: block % 3]:
                    told, _ = asyncio.run(ask_all(server.url, chosen, streams, command.max_tokens))
                    if block:  # the first warms up
                        blocks[server.name].append(told)
            for name in arms:
                firsts = [one.first for told in blocks[name] for one in told]
                gaps = [gap for told in blocks[name] for one in told for gap in one.gaps]
                figures = {f"first_p{int(100 * q)}_ms": 1e3 * quantile(firsts, q) for q in (0.5, 0.95, 0.99)}
                figures |= {f"gap_p{int(100 * q)}_ms": 1e3 * quantile(gaps, q) for q in (0.5, 0.95, 0.99)}
                ratios = [
                    quantile([g for one in own for g in one.gaps], 0.95)
                    / quantile([g for one in off for g in one.gaps], 0.95)
                    for own, off in zip(blocks[name], blocks["off"], strict=True)
                ]
                median, low, high = interval(ratios)
                rows.add(streams=streams, arm=name, **figures, gap_p95_ratio=median, low=low, high=high)
        for server in servers[1:]:
            rows.add(
                arm=server.name,
                share_spent=server.live()["learning"]["share_spent"],
                rounds=server.live()["learning"]["rounds"],
            )


# --- load -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Load(Common):
    """Many streams for minutes, learning on; prompts of all built-in streams in turn."""

    minutes: float = 10.0
    streams: int = 16
    num_prompts: int = 400
    """Different ones; each is answered again and again, and compared with plain decoding."""


def load(command: Load) -> None:
    """Exit status 1 for an error, a wrong answer, or memory that grows after the first third by more than 3 %."""
    rows = Rows(command, command)
    data = ("builtin:prose", "builtin:code", "builtin:sql", "builtin:arithmetic")
    prompts = [prompt for name in data for prompt in texts(name, command.num_prompts // len(data), command.seed)]
    expected = dict(zip(prompts, plain_texts(command, prompts), strict=True))
    errors, wrong, total, memory = [], 0, 0, []
    with served("learned", command, ()) as server:
        began, turns = time.monotonic(), cycle(prompts)
        while time.monotonic() - began < 60 * command.minutes:
            chosen = list(islice(turns, 8 * command.streams))
            told, seconds = asyncio.run(ask_all(server.url, chosen, command.streams, command.max_tokens))
            errors += [one.error for one in told if one.error]
            wrong += sum(
                one.text != expected[prompt] for prompt, one in zip(chosen, told, strict=True) if not one.error
            )
            total += len(told)
            own, learning = server.megabytes()
            memory.append((time.monotonic() - began, own, learning))
            rows.add(
                seconds=memory[-1][0],
                requests=total,
                tokens_per_second=sum(o.tokens for o in told) / seconds,
                errors=len(errors),
                wrong=wrong,
                megabytes=own,
                learning_megabytes=learning,
            )
        shown = server.live()
    late = [both for at, *both in memory if at > 20 * command.minutes]
    size = max(1, len(late) // 5)
    growth = [
        statistics.median(m[i] for m in late[-size:]) / statistics.median(m[i] for m in late[:size]) - 1 for i in (0, 1)
    ]
    rows.add(
        requests=total,
        errors=len(errors),
        wrong=wrong,
        growth=growth[0],
        learning_growth=growth[1],
        dropped=shown["learning"]["dropped"],
        version=shown["learning"]["weights_version"],
        failure=shown["learning"]["failure"],
    )
    sys.exit(bool(errors or wrong or max(growth) > 0.03))


# --- never slower -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NeverSlower(Common):
    """Arms take turns: none, fixed lengths, and the length that is chosen."""

    data: str = "builtin:prose"
    hopeless: bool = False
    """A fresh drafter, which knows nothing, with learning off."""
    streams: tuple[int, ...] = (1, 4, 16)
    fixed: tuple[int, ...] = (1, 2, 4)
    blocks: int = 10
    requests_per_stream: int = 3


def never_slower(command: NeverSlower) -> None:
    """Paired by block: tokens per second of the chosen length over the others'."""
    rows = Rows(command, command)
    flags = ("--learner", "frozen", "--drafter", "eagle") if command.hopeless else ("--learner", "frozen")
    arms = {"none": (*flags, "--num-draft-tokens", "0"), "chosen": flags}
    arms |= {f"fixed {K}": (*flags, "--fixed-draft-length", "--num-draft-tokens", str(K)) for K in command.fixed}
    with ExitStack() as stack:
        servers = [stack.enter_context(served(name, command, flags)) for name, flags in arms.items()]
        for streams in command.streams:
            prompts = iter(
                texts(command.data, (1 + command.blocks) * streams * command.requests_per_stream, command.seed)
            )
            rates: dict[str, list[float]] = {name: [] for name in arms}
            for block in range(1 + command.blocks):
                chosen = list(islice(prompts, streams * command.requests_per_stream))
                for server in servers[block % len(arms) :] + servers[: block % len(arms)]:
                    told, seconds = asyncio.run(ask_all(server.url, chosen, streams, command.max_tokens))
                    if block:
                        rates[server.name].append(sum(one.tokens for one in told) / seconds)
            for name in arms:
                ratios = [own / other for own, other in zip(rates["chosen"], rates[name], strict=True)]
                median, low, high = interval(ratios)
                rows.add(
                    streams=streams,
                    arm=name,
                    tokens_per_second=statistics.median(rates[name]),
                    chosen_over_it=median,
                    low=low,
                    high=high,
                )


COMMANDS = {"stream": Stream, "interference": Interference, "load": Load, "never-slower": NeverSlower}
RUN = {Stream: stream, Interference: interference, Load: load, NeverSlower: never_slower}


def main() -> None:
    command = tyro.extras.subcommand_cli_from_dict(COMMANDS, description=__doc__)
    RUN[type(command)](command)


if __name__ == "__main__":
    main()
