"""The command line. The only file that sees argv, prints, or turns an error into a message."""

from __future__ import annotations

import logging
import sys
import traceback
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from tyro.conf import Positional, arg

from onlinespec import __version__
from onlinespec.compare import Comparing, Comparison
from onlinespec.compare import Progress as StreamProgress
from onlinespec.config import GenerationParams, LearnConfig, SamplingParams
from onlinespec.core import DecodeStats
from onlinespec.decode import DecodeLoop
from onlinespec.drafters import load_drafter
from onlinespec.inspection import describe
from onlinespec.learn import InlineLearning
from onlinespec.learners import LEARNERS, make_learner
from onlinespec.models.loading import Target, load_target
from onlinespec.records import Report
from onlinespec.report import summary_table, write_html

out, err = Console(), Console(stderr=True)

DEMO_STREAM = ("builtin:prose", "builtin:code", "builtin:sql", "builtin:arithmetic", "builtin:prose")


@dataclass(frozen=True)
class Machine:
    """Where and how precisely to compute."""

    device: str = "cpu"
    """Torch device the models live on: cpu, cuda, mps."""
    dtype: str = "float32"
    """Precision of the target: float32 (exact on a CPU), bfloat16 or float16."""
    num_threads: int = 1
    """CPU threads. One is best for small models and when other programs run; try all cores above 100M parameters."""
    seed: int = 0
    """Seed of prompts, fresh drafters and sampling."""
    debug: bool = False
    """Show Python's traceback when something goes wrong."""


@dataclass(frozen=True)
class Decoding:
    """How answers are drafted and chosen."""

    num_draft_tokens: int = 4
    """Tokens drafted per step, 0 to 16; 0 is plain decoding."""
    max_new_tokens: int = 96
    """Longest answer, in tokens."""
    top_k: int = 0
    """Sample among the k likeliest tokens; 0 is off."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that make up this probability; 1 is off."""
    min_p: float = 0.0
    """Sample among tokens at least this likely, relative to the likeliest; 0 is off."""
    repetition_penalty: float = 1.0
    """Above 1 discourages tokens that occurred before; 1 is off."""

    def params(self, temperature: float, **more: object) -> GenerationParams:
        """As the library takes them."""
        sampling = SamplingParams(temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)
        return GenerationParams(self.max_new_tokens, self.num_draft_tokens, sampling, **more)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Learning:
    """How the drafter learns."""

    step_size: float = LearnConfig.step_size
    """Rate of learning; 1e-3 suits drafters of about a million parameters, 1e-4 of a hundred million."""
    geometry: str = LearnConfig.geometry
    """Norm of the updates: diagonal (Adam-like) or euclidean (plain gradient)."""
    max_interval: int = LearnConfig.max_interval
    """Most committed tokens between two updates once the loss is flat."""

    def config(self) -> LearnConfig:
        """As the library takes it."""
        return LearnConfig(step_size=self.step_size, geometry=self.geometry, max_interval=self.max_interval)


@dataclass(frozen=True)
class Generate:
    """Answer a prompt; the text appears as it comes, the figures after it."""

    target: Positional[str]
    """Directory or Hub id of a Hugging Face checkpoint, or `demo`."""
    prompt: Annotated[str, arg(aliases=["-p"])]
    """What to ask; `-` reads it from standard input."""
    drafter: str = "ngram"
    """Directory or Hub id of a drafter, `demo`, or the name of a fresh one: ngram, eagle."""
    learner: str = "frozen"
    """How the drafter learns while it serves: frozen, online_gradient."""
    temperature: float | None = None
    """0 is greedy; by default what the checkpoint recommends."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; they are not part of it."""
    raw: bool = False
    """Give the prompt as it stands, without the chat template."""
    save: Path | None = None
    """Write the adapted drafter to this directory."""
    decoding: tyro.conf.OmitArgPrefixes[Decoding] = Decoding()
    learning: tyro.conf.OmitArgPrefixes[Learning] = Learning()
    machine: tyro.conf.OmitArgPrefixes[Machine] = Machine()


@dataclass(frozen=True)
class Compare:
    """Compare learners over a stream of prompts: a table, report.json, and a page with plots."""

    target: Positional[str]
    """Directory or Hub id of a Hugging Face checkpoint, or `demo`."""
    data: tuple[str, ...]
    """The stream's segments in order: files (.jsonl, .jsonl.gz) with a `prompt` per row, hf:dataset[:split], or
    builtin:prose, builtin:code, builtin:sql, builtin:arithmetic. One named twice goes on where it was left."""
    drafter: str = "demo"
    """Directory or Hub id of a drafter, `demo`, or the name of a fresh one: ngram, eagle."""
    learners: str = "none,frozen,online_gradient"
    """Separated by commas: none (plain decoding), frozen, online_gradient."""
    out: Path | None = None
    """Folder for report.json, report.html and requests.jsonl; runs/compare-<time> by default."""
    num_requests: int = 50
    """Requests per segment; 0 takes all of a file."""
    temperature: tuple[float, ...] = (0.0,)
    """0 is greedy; several are run one after the other."""
    repeats: int = 1
    """Repeat everything, to show the spread of the timings."""
    window: int = 5
    """Requests per point of the plots."""
    save: Path | None = None
    """Write every learner's adapted drafter to a directory of its name in here."""
    decoding: tyro.conf.OmitArgPrefixes[Decoding] = Decoding()
    learning: tyro.conf.OmitArgPrefixes[Learning] = Learning()
    machine: tyro.conf.OmitArgPrefixes[Machine] = Machine()


@dataclass(frozen=True)
class Demo:
    """Watch the shipped drafter learn: a stream of prose, code, SQL, arithmetic, and prose again."""

    num_requests: int = 25
    """Requests per stretch of the stream."""
    out: Path | None = None
    """Folder for report.json, report.html and requests.jsonl; runs/demo-<time> by default."""
    temperature: float = 0.0
    """0 is greedy."""
    save: Path | None = None
    """Write every learner's adapted drafter to a directory of its name in here."""
    decoding: tyro.conf.OmitArgPrefixes[Decoding] = Decoding()
    learning: tyro.conf.OmitArgPrefixes[Learning] = Learning()
    machine: tyro.conf.OmitArgPrefixes[Machine] = Machine()


@dataclass(frozen=True)
class Inspect:
    """Say what a drafter or target directory is: format, shape, size, version, whom it fits."""

    path: Positional[str]
    """Directory or Hub id; `demo` for the shipped drafter."""
    debug: bool = False
    """Show Python's traceback when something goes wrong."""


def main() -> None:
    """The entry point: exit status 0, 1 for a failed check, 2 for a mistake in what was asked, 130 for Ctrl-C."""
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=err, show_path=False)]
    )
    command = tyro.extras.subcommand_cli_from_dict(
        {"demo": Demo, "generate": Generate, "compare": Compare, "inspect": Inspect},
        prog="onlinespec",
        description=f"Speculative decoding whose drafter learns while it serves. Version {__version__}.",
    )
    is_debugging = command.debug if isinstance(command, Inspect) else command.machine.debug
    try:
        sys.exit(_run(command))
    except KeyboardInterrupt:
        err.print("stopped")
        sys.exit(130)
    except (ValueError, OSError, TypeError, FloatingPointError, MemoryError, RuntimeError) as error:
        if is_debugging:
            traceback.print_exc()
        err.print(
            f"[bold red]error:[/] {_escaped(str(error) or type(error).__name__)}", highlight=False, soft_wrap=True
        )
        sys.exit(2)


def _run(command: Generate | Compare | Demo | Inspect) -> int:
    if isinstance(command, Inspect):
        return inspect(command)
    if command.machine.num_threads < 1:
        raise ValueError(f"num_threads is {command.machine.num_threads}; it must be at least 1")
    torch.set_num_threads(command.machine.num_threads)
    if isinstance(command, Generate):
        return generate(command)
    return compare(demo_comparison(command) if isinstance(command, Demo) else command)


def generate(command: Generate) -> int:
    """Streams one answer to standard output, figures to standard error."""
    _check_choices(command.learner)
    prompt = sys.stdin.read() if command.prompt == "-" else command.prompt
    target = _load(command.target, command.machine)
    temperature = target.sampling.temperature if command.temperature is None else command.temperature
    params = command.decoding.params(temperature, stop_strings=command.stop, seed=command.machine.seed)
    drafter = load_drafter(command.drafter, target, command.machine.seed)
    if command.learner != "frozen" and not drafter.is_trainable:
        raise ValueError(f"drafter {command.drafter} does not learn; leave out --learner {command.learner}")
    learn = command.learning.config()
    learner = make_learner(command.learner, learn.step_size, learn.geometry, learn.clip_norm)
    loop = DecodeLoop(target, drafter, InlineLearning(drafter, learner, learn))
    stats = DecodeStats()
    try:
        for request in loop.generate(target.encode(prompt, is_chat=not command.raw), params):
            out.print(request.text.take(), end="", markup=False, highlight=False, soft_wrap=True, emoji=False)
            out.file.flush()
            stats = request.stats
    finally:
        out.print()
        out.file.flush()
        _print_figures(stats)
        if command.save:
            drafter.save(command.save)
            err.print(f"drafter (weights version {drafter.weights.version}) saved to {command.save}", highlight=False)
    return 0


def demo_comparison(command: Demo) -> Compare:
    """The demo as the comparison it is: every learner of the table."""
    return Compare(
        target="demo",
        data=DEMO_STREAM,
        learners=",".join(["none", *LEARNERS]),
        out=command.out or _new_folder("demo"),
        num_requests=command.num_requests,
        temperature=(command.temperature,),
        save=command.save,
        decoding=command.decoding,
        learning=command.learning,
        machine=command.machine,
    )


def compare(command: Compare) -> int:
    """Runs the comparison with a progress bar; whatever is finished when it ends is written and shown."""
    folder = command.out or _new_folder("compare")
    learners = tuple(name.strip() for name in command.learners.split(",") if name.strip())
    for name in learners:
        _check_choices(name, also=("none",))
    comparison = Comparison(
        drafter=command.drafter,
        learners=learners,
        data=command.data,
        num_requests=command.num_requests,
        temperatures=command.temperature,
        seed=command.machine.seed,
        repeats=command.repeats,
        window=command.window,
        generation=command.decoding.params(command.temperature[0] if command.temperature else 0.0),
        learn=command.learning.config(),
    )
    for temperature in command.temperature:
        replace(comparison.generation.sampling, temperature=temperature)  # refused now, not after the first run
    comparing = Comparing(_load(command.target, command.machine), comparison, folder, " ".join(sys.argv[1:]))
    status = 0
    try:
        _run_with_progress(comparing)
    except KeyboardInterrupt:
        err.print("stopped; what was finished is kept")
        status = 130
    report = comparing.report()
    _show(report, folder)
    if command.save:
        _save_all(comparing, command.save)
    is_exact = all(run.totals.identical_to_plain is not False for run in report.runs)
    return status or (0 if is_exact else 1)


def inspect(command: Inspect) -> int:
    """Prints what a directory holds."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in describe(command.path).items():
        table.add_row(f"[bold]{_escaped(name)}[/]", _escaped(str(value)))
    out.print(table)
    return 0


def _run_with_progress(comparing: Comparing) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err) as progress:
        task = progress.add_task("loading the stream", total=None)

        def on_progress(event: StreamProgress) -> None:
            lengths = "  ".join(f"{name} {length:.2f}" for name, length in event.acceptance_lengths.items())
            description = f"{_escaped(event.data)}: acceptance length {lengths}"
            progress.update(task, completed=event.done, total=event.expected, description=description)

        comparing.run(on_progress)


def _show(report: Report, folder: Path) -> None:
    write_html(report, folder / "report.html")
    out.print(summary_table(report))
    out.print(
        f"the page: {folder / 'report.html'}    the figures: {folder / 'report.json'}", highlight=False, soft_wrap=True
    )


def _save_all(comparing: Comparing, folder: Path) -> None:
    for learner, loop in comparing.drafters.items():
        if loop.drafter:
            loop.drafter.save(folder / learner)
            err.print(f"drafter of {learner} saved to {folder / learner}", highlight=False)


def _load(name: str, machine: Machine) -> Target:
    with err.status(f"loading {name}"):
        return load_target(name, machine.device, machine.dtype)


def _print_figures(stats: DecodeStats) -> None:
    if stats.tokens:
        err.print(
            f"{stats.tokens} tokens in {stats.steps} steps, acceptance length {stats.acceptance_length:.2f}, "
            f"{stats.tokens_per_second:.0f} tokens/s (decoding {stats.decode_seconds:.2f} s, "
            f"learning {stats.learn_seconds:.2f} s)",
            highlight=False,
            soft_wrap=True,
        )


def _check_choices(learner: str, also: tuple[str, ...] = ()) -> None:
    known = (*also, *LEARNERS)
    if learner not in known and ":" not in learner:
        raise ValueError(f'unknown learner "{learner}"; known: {", ".join(known)}; or give "pkg.module:Class"')


def _new_folder(command: str) -> Path:
    return Path("runs") / f"{command}-{datetime.now():%Y%m%d-%H%M%S}"


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")


if __name__ == "__main__":
    main()
