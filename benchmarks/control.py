"""How far is the controller from the best fixed number of drafted tokens? In a simulator, so that there is an answer.

    python benchmarks/control.py > benchmarks/results/control.md

Costs are formulas and acceptance is known (`tests/simulator.py`): the best fixed number is found by trying them all on
the same tokens. Markdown: goodput over it and over plain decoding, switches, regret over time, and what a choice costs.
"""

import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import tyro

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from simulator import DRAFTERS, GOOD, HOPELESS, MAX_DRAFT_TOKENS, Fixed, Machine, Prob, Run, always, simulate

from onlinespec.control.chooser import Controller, StepRecord
from onlinespec.experiments.provenance import provenance

MACHINES = {"exact": Machine(), "noisy": Machine(noise=0.1, hiccup=0.01)}
TIMES = (1, 5, 10, 25, 50, 75, 100)  # hundredths of the tokens


@dataclass(frozen=True)
class Options:
    """Compare the controller with fixed numbers in the simulator."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Of acceptance and noise."""
    steps: int = 5_000
    """Of plain decoding, as long as which a run is."""
    batches: tuple[int, ...] = (1, 4, 16)
    """Requests at once."""


def mixed(progress: float, request: int, position: int) -> float:
    """Every second request is hopeless."""
    return (GOOD if request % 2 else HOPELESS)(progress, request, position)


KINDS: dict[str, Prob] = {**DRAFTERS, "every second request": mixed, "a quarter kept": always(0.25)}


@dataclass(frozen=True)
class Cell:
    """The controller and its rivals on the same tokens."""

    controlled: Run
    report: dict[str, float]
    fixed: list[Run]  # by number of drafted tokens
    learned: Run  # the same with learning's time

    @property
    def best(self) -> Run:
        return min(self.fixed, key=lambda run: run.seconds)


def measure(machine: Machine, prob: Prob, batch: int, seed: int, options: Options) -> Cell:
    """Runs them all."""
    length = {"batch": batch, "num_tokens": options.steps * batch, "seed": seed}
    controller = Controller(machine.profile(), MAX_DRAFT_TOKENS)
    run = simulate(controller, machine, prob, **length)
    learned = simulate(Controller(machine.profile(), MAX_DRAFT_TOKENS), machine, prob, **length, learning=True)
    fixed = [simulate(Fixed(depth), machine, prob, **length) for depth in range(MAX_DRAFT_TOKENS + 1)]
    return Cell(run, controller.report(), fixed, learned)


def tables(options: Options) -> Iterator[str]:
    """Both tables, a row a machine, batch and drafter; the mean of the seeds, lowest of them in brackets."""
    goodput = ["| costs | batch | drafter | best K | / best fixed | / plain | with learning | switches | probes |"]
    regret = ["| costs | batch | drafter | " + " | ".join(f"{time} %" for time in TIMES) + " |"]
    goodput.append("|" + "---|" * 9)
    regret.append("|" + "---|" * (3 + len(TIMES)))
    for name, machine in MACHINES.items():
        for batch in options.batches:
            for kind, prob in KINDS.items():
                cells = [measure(machine, prob, batch, seed, options) for seed in options.seeds]
                head = f"| {name} | {batch} | {kind} |"
                goodput.append(f"{head} {' | '.join(goodput_cells(cells))} |")
                regret.append(f"{head} {' | '.join(regret_cells(cells))} |")
    yield from ("", "## Goodput", "", *goodput, "", "## Regret, in steps of plain decoding", "", *regret)


def goodput_cells(cells: list[Cell]) -> list[str]:
    """What the first table says of a drafter."""

    def spread(ratios: list[float]) -> str:
        return f"{statistics.fmean(ratios):.3f} ({min(ratios):.3f})"

    return [
        "/".join(str(depth) for depth in sorted({cell.fixed.index(cell.best) for cell in cells})),
        spread([cell.best.seconds / cell.controlled.seconds for cell in cells]),
        spread([cell.fixed[0].seconds / cell.controlled.seconds for cell in cells]),
        spread([cell.fixed[0].seconds / cell.learned.seconds for cell in cells]),
        f"{statistics.fmean(cell.report['num_switches'] for cell in cells):.0f}",
        f"{statistics.fmean(cell.report['num_probes'] for cell in cells):.0f}",
    ]


def regret_cells(cells: list[Cell]) -> list[str]:
    """Steps of plain decoding lost on the way against the number that is best in the end, by share of the tokens."""
    lost = []
    for time in TIMES:
        behind = [
            (cell.controlled.seconds_at[time - 1] - cell.best.seconds_at[time - 1])
            / (cell.fixed[0].seconds / cell.fixed[0].steps)
            for cell in cells
        ]
        lost.append(f"{statistics.fmean(behind):.1f}")
    return lost


def choice_costs(repeats: int = 300) -> Iterator[str]:
    """Wall time of `choose` and `observe`, medians."""
    yield from ("", "## What it costs", "", "| batch | choose, µs | observe, µs |", "|---|---|---|")
    machine = Machine()
    for batch in (1, 4, 16):
        controller, ids, shape = Controller(machine.profile(), MAX_DRAFT_TOKENS), list(range(batch)), [4] * batch
        record = StepRecord(ids, shape, [3] * batch, machine.draft_seconds(shape), machine.verify_seconds(shape))
        times: list[tuple[float, float]] = []
        for _ in range(repeats):
            began = perf_counter()
            controller.choose(ids, [100] * batch)
            chosen = perf_counter()
            controller.observe(record)
            times.append((chosen - began, perf_counter() - chosen))
        choose, observe = (statistics.median(part) * 1e6 for part in zip(*times, strict=True))
        yield f"| {batch} | {choose:.0f} | {observe:.0f} |"


def main(options: Options) -> None:
    """Prints it all."""
    said = provenance("", "", "", "", {})
    machine = MACHINES["exact"]
    command = " ".join(["python benchmarks/control.py", *sys.argv[1:]])
    print("# Control in a simulator\n")
    print(f"Written by `{command}`, seeds {', '.join(map(str, options.seeds))}. Commit {said['commit']},")
    print(f"{said['processor']}, {said['started'][:10]}; only the last table hangs on the machine.\n")
    print(
        f"A run is {options.steps} steps of plain decoding long, in answers of 200 tokens. A step of one row costs "
        f"{machine.target * 1e3:g} ms, each further row {machine.row * 1e3:g}, a drafting depth "
        f"{machine.draft * 1e3:g} and {machine.draft_row * 1e3:g} for each request, a token to read after a pause "
        f"{machine.missed * 1e3:g}. *Noisy*: what the controller sees has 10 % of noise, and one step in a hundred "
        "takes ten times as long; what is counted has neither. *Hopeless* keeps 5 % of its tokens, *good* 80, 75, "
        "70 % by position; a change comes at half of the tokens. *With learning*: over plain decoding, when learning "
        "takes all that it may, at most 8 %, and brings nothing. Mean of the seeds (worst of them)."
    )
    for line in (*tables(options), *choice_costs()):
        print(line)


if __name__ == "__main__":
    main(tyro.cli(Options))
