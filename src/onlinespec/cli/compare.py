"""The commands `onlinespec compare` and `onlinespec demo`: run learners on a stream, print a table, write a report."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path

from rich.measure import Measurement
from rich.table import Table

from onlinespec.cli.checks import check_save, checked_learner, load, save, use
from onlinespec.cli.commands import Compare, Demo
from onlinespec.cli.progress import shown
from onlinespec.cli.terminal import complain, err, out, raise_on_ctrl_c
from onlinespec.experiments.compare import Comparing
from onlinespec.experiments.report.page import summary_table, write_html
from onlinespec.experiments.report_schema import Report
from onlinespec.experiments.results_folder import check_results_folder
from onlinespec.experiments.settings import Comparison
from onlinespec.learning.footprint import MemoryBeside
from onlinespec.models.loading import Target
from onlinespec.registry import FROZEN, NONE

DEMO_STREAM = ("builtin:prose", "builtin:code", "builtin:sql", "builtin:arithmetic", "builtin:prose")


def demo_comparison(command: Demo) -> Compare:
    """Returns the comparison that `onlinespec demo` runs."""
    return Compare(
        target="demo",
        data=DEMO_STREAM,
        out=command.out or _new_folder("demo"),
        num_requests=command.num_requests,
        minutes=command.minutes,
        temperature=(command.temperature,),
        save=command.save,
        decoding=command.decoding,
        learning=command.learning,
        machine=command.machine,
    )


def compare(command: Compare) -> int:
    """Checks the settings, loads the target and compares.

    Returns:
        The exit status: 1 if answers differ from plain decoding by more than a tie, 130 after Ctrl-C.

    Raises:
        ValueError: for settings that can't work.
    """
    use(command.machine)
    folder = command.out or _new_folder("compare")
    learners = tuple(name.strip() for name in command.learners.split(",") if name.strip())
    configs = {name: checked_learner(name, command.learning) for name in learners}
    comparison = Comparison(
        drafter=command.drafter_name,
        learners=learners,
        data=command.data,
        num_requests=command.num_requests,
        minutes=command.minutes,
        acceptance=command.acceptance,
        temperatures=command.temperature,
        seed=command.machine.seed,
        repeats=command.repeats,
        window=command.window,
        generation=command.decoding.params(),
        learn=command.learning.config(command.telemetry),
        tuning=command.learning.tuning(),
        measures_costs=command.learning.learn_costs is None,
    )
    check_results_folder(folder)
    for name, config in configs.items():
        if config:
            check_save(command.save and folder_for(command.save, name), config)
    learning = [config for config in configs.values() if config and config.learner != FROZEN]
    num_drafters = sum(config is not None for config in configs.values())
    beside = MemoryBeside(command.drafter_name, learning, num_drafters=num_drafters)
    return _run(load(command.target, command.machine, beside), comparison, folder, command.save)


@raise_on_ctrl_c()
def _run(target: Target, comparison: Comparison, folder: Path, save_to: Path | None) -> int:
    """Runs with a progress display. After Ctrl-C, the requests finished so far are still reported and saved."""
    comparing = Comparing(target, comparison, folder, " ".join(sys.argv[1:]))
    status = 0
    try:
        with shown() as on_progress:
            comparing.run(on_progress)
    except KeyboardInterrupt:
        err.print("stopped; what was finished is kept")
        status = 130
    report = comparing.report()
    write_html(report, folder / "report.html")
    if save_to:
        _save_all(comparing, save_to)
    _show(report, folder)
    _warn_if_slower(report)
    if report.provenance["cut_short"] and status == 0:
        _warn_if_cut_short(report, comparison)
    differing = [run.learner for run in report.runs if run.totals.identical_to_plain is False]
    if differing:
        complain(f"answers of {', '.join(dict.fromkeys(differing))} differ from plain decoding: see requests.jsonl")
    return status or (1 if differing else 0)


def _show(report: Report, folder: Path) -> None:
    table = summary_table(report)
    if not _fits(table):
        table.show_edge, table.pad_edge, table.padding = False, False, (0, 1, 0, 0)
    out.print(table if _fits(table) else _as_list(table))
    skipped = max((run.totals.skipped for run in report.runs), default=0)
    if skipped:
        told = f"{skipped} prompts don't fit the target (longer than its context, or with tokens it lacks)"
        out.print(f"{told}, and were skipped in every run", highlight=False, soft_wrap=True)
    out.print(f"the page:    {folder / 'report.html'}", highlight=False, soft_wrap=True)
    out.print(f"the figures: {folder / 'report.json'}", highlight=False, soft_wrap=True)


def _warn_if_slower(report: Report) -> None:
    """Prints a hint if no drafter was faster than plain decoding, which is easy to overlook in the table."""
    ratios = [run.totals.speedup_vs_none for run in report.runs if run.learner != NONE]
    known = [ratio for ratio in ratios if ratio is not None]
    if known and max(known) < 1:
        err.print(
            "no drafter was faster than plain decoding here: try a longer stream (--num-requests), fewer drafted "
            "tokens (--num-draft-tokens), or a drafter trained on such prompts (onlinespec distill)",
            highlight=False,
        )


def _warn_if_cut_short(report: Report, comparison: Comparison) -> None:
    done = sum(run.totals.requests + run.totals.skipped for run in report.runs) // len(report.runs)
    wanted = sum(count for _, count in comparison.segments)
    err.print(
        f"{comparison.minutes:g} minutes were enough for {done} of {wanted} requests, so stretches were cut short; "
        "--minutes 0 takes all of them",
        highlight=False,
    )


def _fits(table: Table) -> bool:
    return Measurement.get(out, out.options.update(width=1000), table).maximum <= out.width


def _as_list(table: Table) -> Table:
    """The table as a list with one cell per line, for terminals that are narrower than the table."""
    titles = [str(column.header).replace("\n", " ") for column in table.columns]
    lines = Table(show_header=False, box=None, padding=(0, 2, 0, 0), caption=table.caption, caption_justify="left")
    for row in zip(*(column.cells for column in table.columns), strict=True):
        for title, cell in zip(titles, row, strict=True):
            lines.add_row(title, cell)
        lines.add_row()
    return lines


def _save_all(comparing: Comparing, folder: Path) -> None:
    for learner, (drafter, has_learned) in comparing.drafters.items():
        save(drafter, folder_for(folder, learner), has_learned, f"drafter of {learner}")


def folder_for(folder: Path, learner: str) -> Path:
    """Returns the folder of a learner's drafter: named by its spec, with `/` replaced so that it is one folder."""
    return folder / learner.replace("/", ",")


def _new_folder(command: str) -> Path:
    return Path("runs") / f"{command}-{datetime.now():%Y%m%d-%H%M%S}"
