"""What learners are worth: acceptance and regret on five streams, greedy and sampled, several seeds.

    python benchmarks/learners.py record --work DIR [--data DIR]          # the target's answers, once: half an hour
    python benchmarks/learners.py replay --work DIR --out learners.jsonl  # methods, streams, seeds: hours on one core
    python benchmarks/learners.py tables learners.jsonl                   # results/learners.md, in the end

Acceptance doesn't hang on time, so the target's answers are recorded and only drafting and learning run
(`offline/replay_stream.py`). Both first commands go on where they were stopped. Without --data the built-in sql,
arithmetic and code stand in for Spider, GSM8K and CodeSearchNet. Net speed is another matter: `onlinespec compare`,
interleaved.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
import tyro
from tyro.conf import Positional

from onlinespec.config import GenerationParams, SamplingParams
from onlinespec.core import DecodeStats
from onlinespec.drafters.loading import load_drafter
from onlinespec.experiments.metrics import total
from onlinespec.experiments.provenance import provenance
from onlinespec.learning.learner_spec import parse_learner
from onlinespec.learning.rounds import summarise
from onlinespec.learning.settings import LearnConfig
from onlinespec.learning.update import InlineLearning
from onlinespec.models.loading import load_target
from onlinespec.offline.replay_stream import Recorded, Replaying, record
from onlinespec.workloads import load_workload

NUM_DRAFT_TOKENS = 2
PER_VISIT = 50  # requests of a domain per visit
INTERVAL = 32  # steps between rounds, for all alike: what is compared is what a round does, not when it comes
REPLAY_EVERY = 3  # rounds, twice as often as by default, so that what memory does can be seen
TEMPERATURES = (0.0, 0.8)
SEEDS = (0, 1, 2)

FIXED = (  # one step size each
    "online_gradient/step_size=1e-4",
    "online_gradient/step_size=3e-4",
    "online_gradient",
    "online_gradient/step_size=3e-3",
    "online_gradient/step_size=1e-2",
)
TESTED = ("ensemble", "optimistic")
MAIN = ("frozen", *FIXED, *TESTED)  # on every stream
OTHERS = (  # on the abrupt stream, where memory and step size matter most
    "surrogate_ensemble",
    "ensemble/with_frozen=true",
    "osd",
    "osd/step_size=1e-3",
    f"osd/replay_every={REPLAY_EVERY}",
    "momentum",
    "online_gradient/step_size=5.42e-3",  # momentum's effective step
    "reset_to_merged",
    "online_gradient/step_size=1.444e-3",  # reset_to_merged's effective step
    "momentum/step_size=1e-4",
    "optimistic/step_size=1e-4",
    "online_gradient/step_size=5.42e-4",
    "optimistic/step_size=5e-4",
    "optimistic/hint_decay=0.9",
    "online_gradient/geometry=diagonal",
    "optimistic/geometry=diagonal",
    "online_gradient/step_size=3e-4/replay_every=0",
    "online_gradient/replay_every=0",
    "online_gradient/step_size=3e-3/replay_every=0",
    "optimistic/replay_every=0",
    "ensemble/replay_every=0",
    "momentum/replay_every=0",
    "online_gradient/step_size=5.42e-3/replay_every=0",
    "reset_to_merged/replay_every=0",
    "online_gradient/step_size=1.444e-3/replay_every=0",
)

ABRUPT = ("all", "first visit, last third", "return, first tenth", "return", "kept", "learning", "net, computed")
REGRETS = ("regret_upper", "regret_vs_frozen", "regret_vs_best_expert")  # sums: divided before they are compared
HINTS = ("hint_error_ratio", "direction_hint_error_ratio", "gradient_cosine")

STEP_COST = 1.2  # of a step at K = 2, in plain steps, on the Intel Xeon of docs/log.md; next, of a round and its rows,
COSTS = {0.0: (1.0, 0.007), 0.8: (1.25, 0.016)}  # in such steps, by temperature

Cells = dict[tuple[float, str, str], list[dict[str, Any]]]  # by temperature, method, stream: one row a seed


def streams(domains: Sequence[str]) -> dict[str, list[tuple[str, int]]]:
    """(domain, place in its recording) of every request of every stream.

    Segments of a stream are cut where the report does: at each change of domain, for the streams that have visits.
    """
    a, b, c = domains
    n, rng = PER_VISIT, Random("streams")
    abrupt = [(a, i) for i in range(n)] + [(b, i) for i in range(n)] + [(c, i) for i in range(n)]
    abrupt += [(a, n + i) for i in range(n)]
    order = [domain for domain in domains for _ in range(n)]
    rng.shuffle(order)
    blend = [b if rng.random() < i / (2 * n) else a for i in range(2 * n)]
    return {
        "abrupt": abrupt,
        "interleaved": _numbered(order),
        "gradual": _numbered(blend),
        "stationary": [(b, i) for i in range(2 * n)],
        "strong": [("prose", i) for i in range(2 * n)],
    }


def _numbered(order: Sequence[str]) -> list[tuple[str, int]]:
    seen: dict[str, int] = defaultdict(int)
    places = []
    for domain in order:
        places.append((domain, seen[domain]))
        seen[domain] += 1
    return places


@dataclass(frozen=True)
class Record:
    """Record the target's answers.

    Attributes:
        data: Folder of spider, gsm8k and code_search .stream.jsonl.gz files; without it the built-ins stand in.
    """

    work: Path
    data: Path | None = None
    target: str = "demo"
    max_new_tokens: int = 96
    seeds: tuple[int, ...] = SEEDS


@dataclass(frozen=True)
class Replay:
    """Run methods on the recorded streams.

    Attributes:
        out: Rows are added to it; those that are there already are not run again.
        methods: Instead of MAIN, and of OTHERS on the abrupt stream.
        part: Every so-manieth cell only, as 0/2 and 1/2: for several processes.
    """

    work: Path
    out: Path
    target: str = "demo"
    drafter: str = "demo"
    methods: tuple[str, ...] = ()
    streams: tuple[str, ...] = ("abrupt", "strong", "stationary", "interleaved", "gradual")
    temperatures: tuple[float, ...] = TEMPERATURES
    seeds: tuple[int, ...] = SEEDS
    part: str = "0/1"


@dataclass(frozen=True)
class Tables:
    """Write the tables in markdown to standard output."""

    rows: Positional[tuple[Path, ...]]


def domains_of(data: Path | None) -> dict[str, str]:
    """What to load for each domain; the first three make the streams."""
    if data is None:
        return {name: f"builtin:{name}" for name in ("sql", "arithmetic", "code", "prose")}
    files = {name: str(data / f"{name}.stream.jsonl.gz") for name in ("spider", "gsm8k", "code_search")}
    return files | {"prose": "builtin:prose"}


def run_record(options: Record) -> None:
    """One file per domain, temperature and seed. Greedy answers of files don't hang on the seed: other prompts do."""
    torch.set_num_threads(1)
    target = load_target(options.target)
    options.work.mkdir(parents=True, exist_ok=True)
    (options.work / "domains.json").write_text(json.dumps(list(domains_of(options.data))))
    for seed in options.seeds:
        for name, spec in domains_of(options.data).items():
            for temperature in TEMPERATURES:
                path = options.work / f"{name}-{temperature:g}-{seed}.pt"
                if path.exists():
                    continue
                began = time.monotonic()
                prompts = islice(load_workload(spec).prompts(seed), seed * 2 * PER_VISIT, (seed + 1) * 2 * PER_VISIT)
                if spec.startswith("builtin:"):
                    prompts = islice(load_workload(spec).prompts(seed), 2 * PER_VISIT)
                params = GenerationParams(options.max_new_tokens, 0, SamplingParams(temperature))
                answers = [replace(answer, domain=name) for answer in record(target, prompts, params, seed)]
                torch.save(answers, path.with_suffix(".new"))
                path.with_suffix(".new").rename(path)
                print(f"{path.name}: {len(answers)} answers in {time.monotonic() - began:.0f} s", flush=True)


def run_replay(options: Replay) -> None:
    """A line of JSON per cell."""
    torch.set_num_threads(1)
    target = load_target(options.target)
    domains = json.loads((options.work / "domains.json").read_text())
    done = {_key(row) for row in _read([options.out])} if options.out.exists() else set()
    part, num_parts = map(int, options.part.split("/"))
    cells = [
        (stream, temperature, seed, method)
        for seed in options.seeds
        for stream in options.streams
        for temperature in options.temperatures
        for method in options.methods or (MAIN + OTHERS if stream == "abrupt" else MAIN)
    ]
    said = provenance(" ".join(sys.argv), options.target, options.drafter, target.fingerprint, {})
    for number, (stream, temperature, seed, method) in enumerate(cells):
        key = dict(stream=stream, temperature=temperature, seed=seed, method=method)
        if number % num_parts != part or _key(key) in done:
            continue
        answers = _answers(options.work, streams(domains[:3])[stream], temperature, seed)
        drafter = load_drafter(options.drafter, target, seed)
        round_cost, row_cost = COSTS.get(temperature, COSTS[0.8])
        even = LearnConfig(
            telemetry=True,
            budget=math.inf,
            min_interval=INTERVAL,
            max_interval=INTERVAL,
            replay_every=REPLAY_EVERY,
            round_cost=round_cost,
            row_cost=row_cost,
        )
        config = parse_learner(method, even)
        learning = InlineLearning(drafter, config=config, seed=seed)
        replaying = Replaying(target, drafter, learning, NUM_DRAFT_TOKENS)
        began = time.monotonic()
        stats = [replaying.replay(answer) for answer in answers]
        row = key | _figures(stats, [answer.domain for answer in answers], learning)
        row |= {"seconds": time.monotonic() - began, "commit": said["commit"], "processor": said["processor"]}
        row |= {"settings": {name: "inf" if value == math.inf else value for name, value in asdict(config).items()}}
        with options.out.open("a") as lines:
            lines.write(json.dumps(row) + "\n")
        print(f"{stream} T={temperature:g} seed {seed} {method}: {row['acceptance_length']:.3f}", flush=True)


def _answers(work: Path, places: Sequence[tuple[str, int]], temperature: float, seed: int) -> list[Recorded]:
    files: dict[str, list[Recorded]] = {}
    for domain, _ in places:
        if domain not in files:
            files[domain] = torch.load(work / f"{domain}-{temperature:g}-{seed}.pt", weights_only=False)
    return [files[domain][place] for domain, place in places if place < len(files[domain])]


def _figures(stats: Sequence[DecodeStats], domains: Sequence[str], learning: InlineLearning) -> dict[str, Any]:
    whole, seen = total(stats), summarise(learning.measured())
    visits = _visits(domains)
    figures: dict[str, Any] = {
        "acceptance_length": whole.acceptance_length,
        "tokens": whole.tokens,
        "steps": whole.steps,
        "rounds": learning.num_rounds,
        "rows": learning.num_rows,
        "work": learning.work,
        "visits": [
            {
                "domain": domain,
                "acceptance_length": total(stats[first:last]).acceptance_length,
                "first_tenth": total(stats[first : first + (last - first) // 10 or 1]).acceptance_length,
                "last_third": total(stats[last - (last - first) // 3 or -1 : last]).acceptance_length,
            }
            for domain, first, last in visits
        ],
    }
    if seen:
        names = ("regret_upper", "regret_vs_frozen", "regret_vs_best_expert", "hint_error_ratio")
        names += ("direction_hint_error_ratio", "gradient_cosine", "acceptance_length_bound")
        names += ("kl_per_row", "regret_vs_frozen_per_row", "regret_vs_best_expert_per_row")
        figures |= {name: getattr(seen, name) for name in names}
    return figures


def _visits(domains: Sequence[str]) -> list[tuple[str, int, int]]:
    """(domain, first, last) of each run of requests of one domain that is long enough to be a visit."""
    runs: list[tuple[str, int, int]] = []
    for i, domain in enumerate(domains):
        if runs and runs[-1][0] == domain:
            runs[-1] = (domain, runs[-1][1], i + 1)
        else:
            runs.append((domain, i, i + 1))
    return [run for run in runs if run[2] - run[1] >= PER_VISIT // 2]


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("stream", "temperature", "seed", "method"))


def _read(paths: Sequence[Path]) -> Iterator[dict[str, Any]]:
    for path in paths:
        yield from map(json.loads, path.read_text().splitlines())


def run_tables(options: Tables) -> None:
    """Acceptance length by method and stream, mean and standard deviation over seeds; hindsight; returns; regret."""
    cells: Cells = defaultdict(list)
    rows = list(_read(options.rows))
    for row in rows:
        cells[row["temperature"], row["method"], row["stream"]].append(row)
    print("# Learners: acceptance, hindsight, returns, regret\n")
    print(f"Written by `python benchmarks/learners.py tables {' '.join(map(str, options.rows))}`.")
    print("Mean ± standard deviation over the seeds.")
    print(f"A round every {INTERVAL} steps for all; memory, where it is on, joins one round in {REPLAY_EVERY}.\n")
    print(f"{len(rows)} rows; " + "; ".join(_told(rows, name) for name in ("commit", "processor", "seed")))
    for temperature in TEMPERATURES:
        methods = [m for m in MAIN + OTHERS if cells.get((temperature, m, "abrupt"))]
        names = [s for s in Replay.streams if any(cells.get((temperature, m, s)) for m in methods)]
        print(f"\n### Temperature {temperature:g}: acceptance length\n")
        _print_table(
            ["method", *names],
            [
                [f"`{m}`", *(_spread(cells[temperature, m, s], "acceptance_length") for s in names)]
                for m in methods
                if m in MAIN
            ],
        )
        print(f"\n### Temperature {temperature:g}: against `online_gradient` at one step size, chosen in hindsight\n")
        _print_table(
            [
                "stream",
                "seeds",
                "best",
                "worst of five",
                *(f"`{m}` / best, / worst" for m in TESTED),
                "`optimistic` / same step",
            ],
            [_hindsight_row(cells, temperature, s) for s in names],
        )
        abrupt = {m: cells[temperature, m, "abrupt"] for m in methods}
        print(f"\n### Temperature {temperature:g}: the abrupt stream\n")
        _print_table(["method", *ABRUPT], [_abrupt_row(m, rows) for m, rows in abrupt.items()])
        print(f"\n### Temperature {temperature:g}: regret, means over the rounds, and hints on the abrupt stream\n")
        hints = [name for name in HINTS if any(row.get(name) is not None for rows in abrupt.values() for row in rows)]
        _print_table(
            ["method", *REGRETS, *hints],
            [
                [
                    f"`{m}`",
                    *(
                        _mean_sd([one for row in rows if (one := _per_round(row, name)) is not None])
                        for name in REGRETS
                    ),
                    *(_spread(rows, name, digits=2) for name in hints),
                ]
                for m, rows in abrupt.items()
            ],
        )


def _per_round(row: dict[str, Any], name: str) -> float | None:
    """A sum over rounds as their mean: `osd` has a tenth of the others' rounds, and its sums would look ten times as
    good. (By the row, which is what telemetry compares by, older rows of the file can't be told.)"""
    return None if row.get(name) is None else row[name] / row["rounds"]


def _told(rows: Sequence[dict[str, Any]], name: str) -> str:
    return f"{name} " + ", ".join(str(value) for value in sorted({row[name] for row in rows}))


def _hindsight_row(cells: Cells, temperature: float, stream: str) -> list[str]:
    """Seed by seed: what the best and the worst fixed step size reach, and what the others are of that.

    Sampled answers may differ between processors; seeds whose methods did not all see the same are left out.
    """
    by_seed: dict[int, dict[str, float]] = defaultdict(dict)
    tokens: dict[int, set[int]] = defaultdict(set)
    for (t, method, s), rows in cells.items():
        if (t, s) == (temperature, stream):
            for row in rows:
                by_seed[row["seed"]][method] = row["acceptance_length"]
                if method in (*TESTED, *FIXED):
                    tokens[row["seed"]].add(row["tokens"])
    whole = [of for seed, of in by_seed.items() if {*TESTED, *FIXED} <= of.keys() and len(tokens[seed]) == 1]
    if not whole:
        return [stream, *["–"] * (4 + len(TESTED))]
    means = {method: statistics.mean(seed[method] for seed in whole) for method in FIXED}
    best, worst = max(means, key=means.__getitem__), min(means, key=means.__getitem__)

    def over(method: str, other: str) -> str:
        return _mean_sd([seed[method] / seed[other] for seed in whole])

    named = (f"{means[m]:.3f} ({_step_size(m)})" for m in (best, worst))
    ratios = (f"{over(m, best)}, {over(m, worst)}" for m in TESTED)
    return [stream, str(len(whole)), *named, *ratios, over("optimistic", "online_gradient")]


def _step_size(method: str) -> str:
    step_size = parse_learner(method).step_size
    return f"{1e-3 if step_size is None else step_size:g}"  # what a drafter of a million weights has by default


def _abrupt_row(method: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    visits = [row["visits"] for row in rows]
    steps = [row["steps"] * STEP_COST for row in rows]  # in plain ones; what learning costs is in drafted ones
    times = [drafted + row["work"] * STEP_COST for drafted, row in zip(steps, rows, strict=True)]
    return [
        f"`{method}`",
        _spread(rows, "acceptance_length"),
        _mean_sd([v[0]["last_third"] for v in visits]),
        _mean_sd([v[-1]["first_tenth"] for v in visits]),
        _mean_sd([v[-1]["acceptance_length"] for v in visits]),
        f"{statistics.mean(v[-1]['acceptance_length'] / v[0]['last_third'] for v in visits):.2f}",
        f"{statistics.mean(row['work'] / row['steps'] for row in rows):.1%}",
        _mean_sd([row["tokens"] / time for row, time in zip(rows, times, strict=True)]),
    ]


def _spread(rows: Sequence[dict[str, Any]], name: str, digits: int = 3) -> str:
    return _mean_sd([row[name] for row in rows if row.get(name) is not None], digits)


def _mean_sd(values: Sequence[float], digits: int = 3) -> str:
    if not values:
        return "–"
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.{digits}f}" + ("" if math.isnan(deviation) else f" ± {deviation:.{digits}f}")


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def main() -> None:
    """The benchmark's own command line."""
    step = tyro.extras.subcommand_cli_from_dict({"record": Record, "replay": Replay, "tables": Tables})
    {Record: run_record, Replay: run_replay, Tables: run_tables}[type(step)](step)


if __name__ == "__main__":
    main()
