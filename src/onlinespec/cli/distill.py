"""The command `onlinespec distill`: trains a drafter offline, with progress, and prints its scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from time import monotonic

from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from onlinespec.cli.checks import check_parent, load, use
from onlinespec.cli.commands import Distill
from onlinespec.cli.terminal import err, out, raise_on_ctrl_c
from onlinespec.learning.footprint import MemoryBeside
from onlinespec.learning.settings import LearnConfig
from onlinespec.offline.distill import Distilling
from onlinespec.offline.outcome import Outcome, Progress, Score

_SECONDS_BETWEEN_LINES = 15.0
_ENDS = {
    "epochs": "",
    "patience": ", ended early: the last epochs brought nothing",
    "minutes": ", cut short by --minutes",
}


def distill(command: Distill) -> int:
    """Checks the settings, loads the target, has it answer the prompts, and trains the drafter on the answers.

    Returns:
        The exit status; 130 after Ctrl-C.

    Raises:
        ValueError: for settings that can't work.
    """
    use(command.machine)
    settings = command.settings
    check_parent(command.out, "--out")
    beside = MemoryBeside(command.drafter, [LearnConfig(geometry="diagonal")])  # trained by Adam
    return _run(
        command, Distilling(load(command.target, command.machine, beside), settings, command.out, command.restart)
    )


@raise_on_ctrl_c()
def _run(command: Distill, distilling: Distilling) -> int:
    if distilling.is_resumed:
        err.print(f"going on with what is in {distilling.work}", highlight=False, soft_wrap=True)
    try:
        with shown() as on_progress:
            outcome = distilling.run(on_progress, command.keep_text)
    except KeyboardInterrupt:
        without = " without --restart" * command.restart
        message = f"stopped; the same command{without} goes on with what is in {distilling.work}"
        err.print(message, highlight=False, soft_wrap=True)
        return 130
    _show(command, outcome)
    return 0


def _show(command: Distill, outcome: Outcome) -> None:
    table = Table(title=f"on {outcome.num_held_out} answers left out, {command.num_draft_tokens} tokens drafted")
    for title in ("", "acceptance length", "loss, nats per token"):
        table.add_column(title, justify="right" if title else "left")
    for score in outcome.scores:
        mark = " (saved)" if score == outcome.best else ""
        table.add_row(_when(score) + mark, f"{score.acceptance_length:.2f}", f"{score.loss:.2f}")
    out.print(table)
    left_out = {
        "skipped, too long or with tokens the target lacks": outcome.num_skipped,
        "left out as repetitions": outcome.num_repeated,
    }
    told = "".join(f", {count} {why}" for why, count in left_out.items() if count)
    answering, training = outcome.seconds["answering"], outcome.seconds["training"]
    for line in (
        f"answering: {outcome.num_prompts} prompts in {outcome.num_tokens} tokens, {answering:.0f} s{told}",
        f"training:  {outcome.num_steps} steps, {training:.0f} s, step size {outcome.step_size:.2g}"
        + _ENDS[outcome.ended_by],
        f"the drafter: {command.out}",
        f"to see it learn on: onlinespec compare {command.target} --drafter {command.out} --data {command.data[0]}",
    ):
        out.print(line, highlight=False, soft_wrap=True)
    if outcome.best == outcome.scores[0]:
        err.print(
            "training brought nothing on the answers left out, so the weights are what they were; give more prompts or "
            "--epochs, or another --step-size",
            highlight=False,
        )


def _when(score: Score) -> str:
    return f"after epoch {score.epoch}" if score.step else "before"


@contextmanager
def shown() -> Iterator[Callable[[Progress], None]]:
    """Gives a callback for progress events that draws bars in a terminal, and prints a line now and then elsewhere."""
    if not err.is_interactive:
        yield _Lines().take
        return
    err.print("acceptance length on answers left out, behind the rates", highlight=False)
    name, told = TextColumn("{task.description}"), TextColumn("{task.fields[told]}")
    with Bar(name, BarColumn(bar_width=16), MofNCompleteColumn(), TimeRemainingColumn(), told, console=err) as bar:
        tasks: dict[str, TaskID] = {}

        def take(event: Progress) -> None:
            if event.phase not in tasks:
                tasks[event.phase] = bar.add_task(event.phase, total=event.total, completed=event.done, told="")
            bar.update(tasks[event.phase], completed=event.done, total=event.total, told=_told(event, ""))

        yield take


class _Lines:
    """Progress for logs: a line when a phase starts and ends, for every score, and every 15 seconds between."""

    def __init__(self) -> None:
        self._begun: dict[str, tuple[float, int]] = {}  # per phase: start time, and what earlier runs had done
        self._said, self._num_scores = 0.0, -1

    def take(self, event: Progress) -> None:
        if event.phase == "scoring" or (event.done == event.total and event.phase not in self._begun):
            return  # the second case: a phase that an earlier run finished
        now, is_new = monotonic(), event.phase not in self._begun
        began, done_before = self._begun.setdefault(event.phase, (now, event.done))
        is_scored = event.phase == "training" and len(event.scores) > self._num_scores
        is_over = event.done == event.total
        if not (is_new or is_scored or is_over or now - self._said > _SECONDS_BETWEEN_LINES):
            return
        self._said = now
        if event.phase == "training":
            self._num_scores = len(event.scores)
        line = f"{event.phase} {event.done}/{event.total} {_told(event)}"
        if event.done > done_before and not is_over:
            seconds_left = (now - began) / (event.done - done_before) * (event.total - event.done)
            line += f", {timedelta(seconds=round(seconds_left))} left"
        err.print(line, highlight=False, soft_wrap=True)


def _told(event: Progress, name: str = "acceptance length ") -> str:
    parts = [event.rate] if event.rate else []
    if event.scores:
        parts.append(f"{name}{event.scores[-1].acceptance_length:.2f} {_when(event.scores[-1])}")
    return ", ".join(parts)
