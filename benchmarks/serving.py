"""What serving over HTTP is like: for who waits for tokens, for who pays for the machine.

    python benchmarks/serving.py stream        net tokens per second of none, frozen and learned along a shifting stream
    python benchmarks/serving.py interference  to the first token, between chunks: learning off, in a thread, a process
    python benchmarks/serving.py load          many streams for minutes: errors, memory, every greedy answer checked
    python benchmarks/serving.py never-slower  with a drafter that knows nothing, and against fixed draft lengths
    python benchmarks/serving.py peers         beside transformers' continuous batching and vLLM, speculation off and on

Each arm is a server of its own, `onlinespec serve` with other flags. All run at once and take turns, block by block, so
that a machine whose speed drifts hurts all alike; one that is not asked sleeps. A server decodes with one thread on
core 0, its learning process goes where there is room. Rows go to --out as JSON lines, with provenance in the first.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import tyro
from peers.servers import GenerateBatch, vllm
from served import Common, Rows, Server, Told, ask_all, interval, plain_texts, quantile, served, texts

from onlinespec.models.checkpoint import find_folder
from onlinespec.models.loading import Target, load_target
from onlinespec.registry import SHIPPED_DRAFTERS

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
    still = ("--learner", "online_gradient/step_size=0", "--learn-budget", str(command.learn_budget))
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
    """For each start of the servers."""
    requests_per_stream: int = 3
    starts: int = 1
    """Of all servers, so that what one start happens to give is drawn too."""
    twin: bool = False
    """A second `none`: how much differs where nothing does."""


def never_slower(command: NeverSlower) -> None:
    """Paired by block: tokens per second of the chosen length over the others'."""
    rows = Rows(command, command)
    flags = ("--learner", "frozen", "--drafter", "eagle") if command.hopeless else ("--learner", "frozen")
    none = (*flags, "--num-draft-tokens", "0")
    arms = {"none": none, "chosen": flags} | ({"none again": none} if command.twin else {})
    arms |= {f"fixed {K}": (*flags, "--fixed-draft-length", "--num-draft-tokens", str(K)) for K in command.fixed}
    count = command.starts * (1 + command.blocks) * command.requests_per_stream
    prompts = {n: iter(texts(command.data, count * n, command.seed)) for n in command.streams}
    rates: dict[int, dict[str, list[float]]] = {n: {name: [] for name in arms} for n in command.streams}
    for start in range(command.starts):
        with ExitStack() as stack:
            servers = [stack.enter_context(served(name, command, flags)) for name, flags in arms.items()]
            for streams in command.streams:
                for block in range(1 + command.blocks):
                    chosen = list(islice(prompts[streams], streams * command.requests_per_stream))
                    for server in servers[block % len(arms) :] + servers[: block % len(arms)]:
                        told, seconds = asyncio.run(ask_all(server.url, chosen, streams, command.max_tokens))
                        if block:
                            rates[streams][server.name].append(sum(one.tokens for one in told) / seconds)
                if start == command.starts - 1:
                    _over_the_others(rows, streams, rates[streams])


def _over_the_others(rows: Rows, streams: int, rates: dict[str, list[float]]) -> None:
    """The chosen length beside each arm, block by block."""
    for name, own in rates.items():
        median, low, high = interval([chosen / other for chosen, other in zip(rates["chosen"], own, strict=True)])
        rows.add(
            streams=streams,
            arm=name,
            tokens_per_second=statistics.median(own),
            chosen_over_it=median,
            low=low,
            high=high,
            blocks=[round(rate, 1) for rate in own],
        )


# --- peers ------------------------------------------------------------------------------------------------------------

PLAIN = "transformers"  # its `generate_batch`: what the others are set against
Ask = Callable[[Sequence[Sequence[int]], int], tuple[list[str], int, float]]
"""Prompts and how many at once; answers, their tokens, and seconds."""


@dataclass(frozen=True)
class Peers(Common):
    """Arms take turns, block by block: others' servers and ours, speculation off and on, the same token ids."""

    data: tuple[str, ...] = ("builtin:prose",)
    vllm: Path | None = None
    """The virtual environment that vLLM is installed in; left out without it."""
    num_draft_tokens: int = 4
    """Of vLLM's; ours are chosen."""
    streams: tuple[int, ...] = (1, 4, 16)
    blocks: int = 6
    requests_per_stream: int = 3


def peers(command: Peers) -> None:
    """Paired by block: tokens per second over those of `generate_batch`, and how many answers are `none`'s."""
    rows = Rows(command, command)
    target = load_target(command.target)
    folder, small = Path(find_folder(command.target)), Path(SHIPPED_DRAFTERS["demo/small_lm"])
    most = max(command.streams)

    def over_http(server: Server, prompts: Sequence[Sequence[int]], streams: int) -> tuple[list[str], int, float]:
        told, seconds = asyncio.run(ask_all(server.url, prompts, streams, command.max_tokens))
        if errors := {one.error for one in told if one.error}:
            raise RuntimeError(f"{server.name}: {errors}")
        return [one.text for one in told], sum(one.tokens for one in told), seconds

    def by_pipe(worker: GenerateBatch, prompts: Sequence[Sequence[int]], streams: int) -> tuple[list[str], int, float]:
        answers, seconds = worker.answers(prompts, streams, command.max_tokens)
        said = [target.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
        return said, sum(map(len, answers)), seconds

    with ExitStack() as stack:
        arms: dict[str, Ask] = {}
        worker = stack.enter_context(closing(GenerateBatch(folder, sorted(target.end_token_ids))))
        arms[PLAIN] = partial(by_pipe, worker)
        methods = {"": None, "eagle": Path(SHIPPED_DRAFTERS["demo"]), "draft_model": small} if command.vllm else {}
        for method, model in methods.items():
            name = f"vllm/{method or 'plain'}"
            started = vllm(command.vllm, folder, most, method, model, command.num_draft_tokens)
            arms[name] = partial(over_http, Server(name, *stack.enter_context(started)))
        for name, flags in {"none": NONE, "frozen": FROZEN, "learned": ()}.items():
            arms[name] = partial(over_http, stack.enter_context(served(name, command, flags)))
        small_lm = replace(command, drafter="demo/small_lm")
        arms["small_lm"] = partial(over_http, stack.enter_context(served("small_lm", small_lm, FROZEN)))
        for data in command.data:
            for streams in command.streams:
                _beside(rows, arms, command, data, streams, target)


def _beside(rows: Rows, arms: dict[str, Ask], command: Peers, data: str, streams: int, target: Target) -> None:
    """One stream of prompts at so many at once."""
    size, names = streams * command.requests_per_stream, list(arms)
    prompts = iter([target.encode(text) for text in texts(data, (1 + command.blocks) * size, command.seed)])
    rates: dict[str, list[float]] = {name: [] for name in arms}
    answers: dict[str, list[str]] = {name: [] for name in arms}
    for block in range(1 + command.blocks):
        chosen = list(islice(prompts, size))
        shift = block % len(arms)
        for name in names[shift:] + names[:shift]:
            said, num_tokens, seconds = arms[name](chosen, streams)
            answers[name] += said
            if block:  # the first warms up
                rates[name].append(num_tokens / seconds)
    for name in arms:
        median, low, high = interval([own / other for own, other in zip(rates[name], rates[PLAIN], strict=True)])
        same = sum(own == other for own, other in zip(answers[name], answers["none"], strict=True))
        rows.add(
            data=data,
            streams=streams,
            arm=name,
            tokens_per_second=statistics.median(rates[name]),
            over_transformers=median,
            low=low,
            high=high,
            same_as_none=f"{same}/{len(answers[name])}",
        )


COMMANDS = {"stream": Stream, "interference": Interference, "load": Load, "never-slower": NeverSlower, "peers": Peers}
RUN = {Stream: stream, Interference: interference, Load: load, NeverSlower: never_slower, Peers: peers}


def main() -> None:
    command = tyro.extras.subcommand_cli_from_dict(COMMANDS, description=__doc__)
    RUN[type(command)](command)


if __name__ == "__main__":
    main()
