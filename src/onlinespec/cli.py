"""The command line. The only file that sees argv, prints, or turns an error into a message."""

from __future__ import annotations

import io
import logging
import os
import sys
import traceback
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.logging import RichHandler
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from tyro.conf import FlagCreatePairsOff, Positional, arg

from onlinespec import __version__, demo
from onlinespec.compare import FROZEN, NONE, Comparing, Comparison, check_results_folder, why_not_writable
from onlinespec.compare import Progress as StreamProgress
from onlinespec.config import GenerationParams, LearnConfig, SamplingParams
from onlinespec.core import DecodeStats
from onlinespec.decode import DecodeLoop
from onlinespec.drafters import load_drafter
from onlinespec.drafters.formats import SIDE_FILE
from onlinespec.inspection import describe
from onlinespec.learn import InlineLearning
from onlinespec.learners import LEARNERS, Learner, make_learner
from onlinespec.models.loading import Target, as_device, as_dtype, load_target
from onlinespec.records import Report
from onlinespec.report import summary_table, write_html
from onlinespec.workloads import load_workload

out, err = Console(), Console(stderr=True)

TargetName = Annotated[Positional[str], arg(metavar="TARGET")]
SaveFolder = Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: not saved)")]
Recommended = arg(metavar="NUMBER", help_behavior_hint="(default: the checkpoint's in generate, else off)")

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
    top_k: Annotated[int | None, Recommended] = None
    """Sample among the k likeliest tokens; 0 is off."""
    top_p: Annotated[float | None, Recommended] = None
    """Sample among the likeliest tokens that make up this probability; 1 is off."""
    min_p: Annotated[float | None, Recommended] = None
    """Sample among tokens at least this likely, relative to the likeliest; 0 is off."""
    repetition_penalty: Annotated[float | None, Recommended] = None
    """Above 1 discourages tokens that occurred before; 1 is off."""

    def params(
        self, temperature: float | None = None, defaults: SamplingParams = SamplingParams(), **more: Any
    ) -> GenerationParams:
        """As the library takes them; `defaults` stands in for what was not given."""
        names = ("top_k", "top_p", "min_p", "repetition_penalty")
        given = {"temperature": temperature} | {name: getattr(self, name) for name in names}
        sampling = replace(defaults, **{name: value for name, value in given.items() if value is not None})
        return GenerationParams(self.max_new_tokens, self.num_draft_tokens, sampling, **more)


@dataclass(frozen=True)
class Learning:
    """How the drafter learns."""

    step_size: float = LearnConfig.step_size
    """Rate of learning; 1e-3 suits drafters of about a million parameters, 1e-4 of a hundred million."""
    geometry: str = LearnConfig.geometry
    """Norm of the updates: diagonal (Adam-like) or euclidean (plain gradient)."""
    min_interval: int = LearnConfig.min_interval
    """Steps between two updates while the loss falls."""
    max_interval: int = LearnConfig.max_interval
    """Most steps between two updates once the loss is flat."""

    def config(self) -> LearnConfig:
        """As the library takes it."""
        return LearnConfig(
            step_size=self.step_size,
            geometry=self.geometry,
            min_interval=self.min_interval,
            max_interval=self.max_interval,
        )


@dataclass(frozen=True)
class Generate:
    """Answer a prompt; the text appears as it comes, the figures after it."""

    target: TargetName
    """Directory or Hub id of a Hugging Face checkpoint, or `demo`."""
    prompt: Annotated[str, arg(aliases=["-p"], metavar="TEXT")]
    """What to ask; `-` reads it from standard input."""
    drafter: Annotated[
        str | None, arg(metavar="DRAFTER", help_behavior_hint="(default: demo for demo, else ngram)")
    ] = None
    """Directory or Hub id of a drafter, `demo`, or the name of a fresh one: ngram, eagle."""
    learner: Annotated[str, arg(metavar="NAME")] = "frozen"
    """How the drafter learns while it serves: frozen, online_gradient."""
    temperature: Annotated[float | None, arg(metavar="NUMBER", help_behavior_hint="(default: the checkpoint's)")] = None
    """0 is greedy."""
    stop: Annotated[tuple[str, ...], arg(metavar="TEXT [TEXT ...]", help_behavior_hint="")] = ()
    """Strings that end the answer; they are not part of it."""
    raw: bool = False
    """Give the prompt as it stands, without the chat template."""
    save: SaveFolder = None
    """Write the adapted drafter to this directory."""
    decoding: tyro.conf.OmitArgPrefixes[Decoding] = Decoding()
    learning: tyro.conf.OmitArgPrefixes[Learning] = Learning()
    machine: tyro.conf.OmitArgPrefixes[Machine] = Machine()


@dataclass(frozen=True)
class Compare:
    """Compare learners over a stream of prompts: a table, report.json, and a page with plots."""

    target: TargetName
    """Directory or Hub id of a Hugging Face checkpoint, or `demo`."""
    data: Annotated[tuple[str, ...], arg(metavar="DATA [DATA ...]")]
    """What to ask, segment by segment: FILE.jsonl[.gz] with a `prompt` per row, hf:dataset[:split], or builtin:prose,
    builtin:code, builtin:sql, builtin:arithmetic. Data named twice goes on where it was left."""
    drafter: Annotated[
        str | None, arg(metavar="DRAFTER", help_behavior_hint="(default: demo for demo, else eagle)")
    ] = None
    """Directory or Hub id of a drafter, `demo`, or the name of a fresh one: ngram, eagle."""
    learners: Annotated[str, arg(metavar="NAMES")] = "none,frozen,online_gradient"
    """Separated by commas: none (plain decoding), frozen, online_gradient."""
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: runs/compare-<time>)")] = None
    """Folder for report.json, report.html and requests.jsonl."""
    num_requests: int = 50
    """Requests per segment; 0 takes all of a file."""
    temperature: Annotated[tuple[float, ...], arg(metavar="NUMBER [NUMBER ...]")] = (0.0,)
    """0 is greedy; several are run one after the other."""
    repeats: int = 1
    """Repeat everything, to show the spread of the timings."""
    window: int = 5
    """Requests per point of the plots."""
    save: SaveFolder = None
    """Write every learner's adapted drafter to a directory of its name in here."""
    decoding: tyro.conf.OmitArgPrefixes[Decoding] = Decoding()
    learning: tyro.conf.OmitArgPrefixes[Learning] = Learning()
    machine: tyro.conf.OmitArgPrefixes[Machine] = Machine()


@dataclass(frozen=True)
class Demo:
    """Watch the shipped drafter learn: a stream of prose, code, SQL, arithmetic, and prose again."""

    num_requests: int = 25
    """Requests per stretch of the stream."""
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: runs/demo-<time>)")] = None
    """Folder for report.json, report.html and requests.jsonl."""
    temperature: float = 0.0
    """0 is greedy."""
    save: SaveFolder = None
    """Write every learner's adapted drafter to a directory of its name in here."""
    decoding: tyro.conf.OmitArgPrefixes[Decoding] = Decoding(num_draft_tokens=3)  # pays best with this small pair
    learning: tyro.conf.OmitArgPrefixes[Learning] = Learning()
    machine: tyro.conf.OmitArgPrefixes[Machine] = Machine()


@dataclass(frozen=True)
class Inspect:
    """Say what a drafter or target directory is: format, shape, size, version, whom it fits."""

    path: Annotated[Positional[str], arg(metavar="PATH")]
    """Directory or Hub id; `demo` for the shipped drafter."""
    debug: bool = False
    """Show Python's traceback when something goes wrong."""


def main() -> None:
    """The entry point: exit status 0, 1 for a failed check, 2 for a mistake in what was asked, 130 for Ctrl-C."""
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=err, show_path=False)]
    )
    logging.getLogger("transformers").setLevel(logging.ERROR)  # its warnings speak of ways it is not used here
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an answer may hold what the terminal's encoding does not
    command = tyro.extras.subcommand_cli_from_dict(
        {"demo": Demo, "generate": Generate, "compare": Compare, "inspect": Inspect},
        prog="onlinespec",
        description=f"Speculative decoding whose drafter learns while it serves. Version {__version__}.",
        config=(FlagCreatePairsOff,),
    )
    is_debugging = command.debug if isinstance(command, Inspect) else command.machine.debug
    try:
        sys.exit(_run(command))
    except KeyboardInterrupt:
        err.print("stopped")
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at exit
        sys.exit(1)
    except (ValueError, OSError, ImportError, TypeError, ArithmeticError, MemoryError, RuntimeError) as error:
        if is_debugging:
            traceback.print_exc()
        _complain(str(error) or type(error).__name__)
        sys.exit(2)


def _run(command: Generate | Compare | Demo | Inspect) -> int:
    if isinstance(command, Inspect):
        _check_demo(command.path)
        return inspect(command)
    machine = command.machine
    if machine.num_threads < 1:
        raise ValueError(f"num_threads is {machine.num_threads}; it must be at least 1")
    if not -(2**63) <= machine.seed < 2**63:
        raise ValueError(f"seed is {machine.seed}; it must fit in 64 bits")
    as_device(machine.device)
    as_dtype(machine.dtype)
    torch.set_num_threads(machine.num_threads)
    if isinstance(command, Generate):
        return generate(command)
    return compare(demo_comparison(command) if isinstance(command, Demo) else command)


def generate(command: Generate) -> int:
    """Streams one answer to standard output, figures to standard error. Ctrl-C ends the answer; the rest goes on."""
    drafter_name = command.drafter or ("demo" if command.target == "demo" else "ngram")
    learner, learn = _make_learner(command.learner, command.learning), command.learning.config()
    more: dict[str, Any] = {"stop_strings": command.stop, "seed": command.machine.seed}
    command.decoding.params(command.temperature, **more)  # a mistake is refused before a target is loaded
    _check_demo(command.target, drafter_name)
    _check_save(command.save)
    prompt = sys.stdin.read().removesuffix("\n") if command.prompt == "-" else command.prompt
    if not prompt.strip():
        source = "standard input" if command.prompt == "-" else "--prompt"
        raise ValueError(f"the prompt is empty: {source} holds no text; give some")
    if any("\ud800" <= character <= "\udfff" for character in prompt):  # what Python makes of other bytes
        raise ValueError("the prompt is not UTF-8 text; convert it first")

    target = _load(command.target, command.machine)
    drafter = load_drafter(drafter_name, target, command.machine.seed)
    if command.learner != FROZEN and not drafter.is_trainable:
        raise ValueError(f"drafter {drafter_name} does not learn; leave out --learner {command.learner}")
    params = command.decoding.params(command.temperature, target.sampling, **more)
    learning = InlineLearning(drafter, learner, learn)
    loop = DecodeLoop(target, drafter, learning)
    stats = DecodeStats()
    stopped: BaseException | None = None
    try:
        for request in loop.generate(target.encode(prompt, is_chat=not command.raw), params):
            stats = request.stats
            sys.stdout.write(request.text.take())  # not by rich, which would turn tabs into spaces
            sys.stdout.flush()
        print(flush=True)
    except (KeyboardInterrupt, BrokenPipeError) as reason:
        stopped = reason
        err.print()
    _print_figures(stats, learning.num_rounds)
    if command.save:
        drafter.save(command.save.absolute())
        err.print(f"drafter (weights version {drafter.weights.version}) saved to {command.save}", highlight=False)
    if stopped:
        raise stopped
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
        if name != NONE:
            _make_learner(name, command.learning, also=(NONE,))
    comparison = Comparison(
        drafter=command.drafter or ("demo" if command.target == "demo" else "eagle"),
        learners=learners,
        data=command.data,
        num_requests=command.num_requests,
        temperatures=command.temperature,
        seed=command.machine.seed,
        repeats=command.repeats,
        window=command.window,
        generation=command.decoding.params(),
        learn=command.learning.config(),
    )
    _check_demo(command.target, comparison.drafter)
    check_results_folder(folder)
    for name in learners:
        if name != NONE:
            _check_save(command.save and command.save / name)
    for spec in command.data:
        load_workload(spec)  # a mistake is refused before a target is loaded
    comparing = Comparing(_load(command.target, command.machine), comparison, folder, " ".join(sys.argv[1:]))
    status = 0
    try:
        _run_with_progress(comparing)
    except KeyboardInterrupt:
        err.print("stopped; what was finished is kept")
        status = 130
    report = comparing.report()
    write_html(report, folder / "report.html")
    if command.save:
        _save_all(comparing, command.save)
    _show(report, folder)
    differing = [run.learner for run in report.runs if run.totals.identical_to_plain is False]
    if differing:
        _complain(f"answers of {', '.join(dict.fromkeys(differing))} differ from plain decoding: see requests.jsonl")
    return status or (1 if differing else 0)


def inspect(command: Inspect) -> int:
    """Prints what a directory holds."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in describe(command.path).items():
        table.add_row(f"[bold]{_escaped(name)}[/]", _escaped(str(value)))
    out.print(table)
    return 0


def _run_with_progress(comparing: Comparing) -> None:
    # only the text is cut off in a narrow terminal
    text = TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))
    columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn(), text)
    with Progress(*columns, console=err, expand=True) as progress:
        task = progress.add_task("the first prompt", total=None)

        def on_progress(event: StreamProgress) -> None:
            lengths = "  ".join(
                f"{name} {length:.2f}" for name, length in event.acceptance_lengths.items() if name != NONE
            )
            description = _escaped(f"{event.data}: acceptance length {lengths}")
            progress.update(task, completed=event.done, total=event.expected, description=description)

        comparing.run(on_progress)
        progress.update(task, total=progress.tasks[task].completed)  # a file may have had fewer rows than asked for


def _show(report: Report, folder: Path) -> None:
    table = summary_table(report)
    if not _fits(table):
        table.show_edge, table.pad_edge, table.padding = False, False, (0, 1, 0, 0)
    out.print(table if _fits(table) else _as_list(table))
    skipped = max((run.totals.skipped for run in report.runs), default=0)
    if skipped:
        out.print(f"{skipped} prompts were longer than the target's context, and skipped in every run", highlight=False)
    out.print(f"the page:    {folder / 'report.html'}", highlight=False, soft_wrap=True)
    out.print(f"the figures: {folder / 'report.json'}", highlight=False, soft_wrap=True)


def _fits(table: Table) -> bool:
    return Measurement.get(out, out.options.update(width=1000), table).maximum <= out.width


def _as_list(table: Table) -> Table:
    """A line per figure, for terminals narrower than the table."""
    titles = [str(column.header).replace("\n", " ") for column in table.columns]
    lines = Table(show_header=False, box=None, padding=(0, 2, 0, 0), caption=table.caption, caption_justify="left")
    for row in zip(*(column.cells for column in table.columns), strict=True):
        for title, cell in zip(titles, row, strict=True):
            lines.add_row(title, cell)
        lines.add_row()
    return lines


def _save_all(comparing: Comparing, folder: Path) -> None:
    for learner, loop in comparing.drafters.items():
        if loop.drafter:
            loop.drafter.save(folder / learner)
            err.print(f"drafter of {learner} saved to {folder / learner}", highlight=False)


def _load(name: str, machine: Machine) -> Target:
    with err.status(f"loading {name}"):
        return load_target(name, machine.device, machine.dtype)


def _print_figures(stats: DecodeStats, num_rounds: int) -> None:
    if stats.tokens:
        err.print(
            f"{stats.tokens} tokens in {stats.steps} steps, acceptance length {stats.acceptance_length:.2f}, "
            f"{stats.tokens_per_second:.0f} tokens/s (decoding {stats.decode_seconds:.2f} s, "
            f"learning {stats.learn_seconds:.2f} s in {num_rounds} rounds)",
            highlight=False,
            soft_wrap=True,
        )


def _make_learner(name: str, learning: Learning, also: tuple[str, ...] = ()) -> Learner:
    if name not in LEARNERS and ":" not in name:
        known = ", ".join((*also, *LEARNERS))
        raise ValueError(f'unknown learner "{name}"; known: {known}; or give "pkg.module:Class"')
    config = learning.config()
    return make_learner(name, config.step_size, config.geometry, config.clip_norm)


def _check_demo(*names: str) -> None:
    for name, folder in zip(names, (demo.TARGET, demo.DRAFTER), strict=False):
        if name == "demo" and not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"the demo pair did not come with this installation ({folder} is missing); "
                "name another TARGET and --drafter"
            )


def _check_save(folder: Path | None) -> None:
    """Refuses now what `save` would refuse when the work is done."""
    if folder is None:
        return
    is_taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if is_taken and not (folder / SIDE_FILE).is_file():
        raise ValueError(f"--save {folder} holds something that is no drafter of ours; choose another place")
    if reason := why_not_writable(folder.absolute().parent):
        raise ValueError(f"the drafter can't be saved to {folder}: {reason}; choose another --save")


def _complain(message: str) -> None:
    err.print(f"[bold red]error:[/] {_escaped(message)}", highlight=False, soft_wrap=True)


def _new_folder(command: str) -> Path:
    return Path("runs") / f"{command}-{datetime.now():%Y%m%d-%H%M%S}"


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")


if __name__ == "__main__":
    main()
