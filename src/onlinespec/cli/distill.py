"""`onlinespec distill`: a first drafter, how far it is, and what it brought."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from onlinespec.cli.arguments import Distill
from onlinespec.cli.checks import check_parent, load, use
from onlinespec.cli.terminal import err, interrupts_raised, out
from onlinespec.config import Tuning
from onlinespec.distill import Distillation, Distilling, Outcome, Progress

_SECONDS_BETWEEN_LINES = 15.0


def distill(command: Distill) -> int:
    """Refuses what would fail later, loads, answers, trains."""
    use(command.machine)
    settings = Distillation(
        drafter=command.drafter,
        data=command.data,
        num_requests=command.num_requests,
        temperature=command.temperature,
        max_new_tokens=command.max_new_tokens,
        num_draft_tokens=command.num_draft_tokens,
        holdout=command.holdout,
        epochs=command.epochs,
        patience=command.patience,
        batch_requests=command.batch_requests,
        step_size=command.step_size,
        loss=command.loss,
        tuning=Tuning(command.tune, command.adapter_rank) if command.tune else None,
        seed=command.machine.seed,
    )
    check_parent(command.out, "--out")
    return _run(command, Distilling(load(command.target, command.machine), settings, command.out, command.restart))


@interrupts_raised()
def _run(command: Distill, distilling: Distilling) -> int:
    if distilling.is_resumed:
        err.print(f"going on with what is in {distilling.work}", highlight=False, soft_wrap=True)
    try:
        with _shown() as on_progress:
            outcome = distilling.run(on_progress, command.keep_text)
    except KeyboardInterrupt:
        message = f"stopped; the same command goes on with what is in {distilling.work}"
        err.print(message, highlight=False, soft_wrap=True)
        return 130
    _show(command, outcome)
    return 0


def _show(command: Distill, outcome: Outcome) -> None:
    table = Table(title=f"on {outcome.num_held_out} answers left out, {command.num_draft_tokens} tokens drafted")
    for title in ("", "acceptance length", "loss, nats per token"):
        table.add_column(title, justify="right" if title else "left")
    for score in outcome.scores:
        name = f"after epoch {score.epoch}" if score.epoch else "before"
        mark = " (saved)" if score == outcome.best else ""
        table.add_row(name + mark, f"{score.acceptance_length:.2f}", f"{score.loss:.2f}")
    out.print(table)
    skipped = f", {outcome.num_skipped} skipped as too long" if outcome.num_skipped else ""
    spent = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in outcome.seconds.items())
    for line in (
        f"{outcome.num_prompts} prompts answered in {outcome.num_tokens} tokens{skipped}; {spent}",
        f"the drafter: {command.out}",
        f"to see it learn on: onlinespec compare {command.target} --drafter {command.out} --data {command.data[0]}",
    ):
        out.print(line, highlight=False, soft_wrap=True)


@contextmanager
def _shown() -> Iterator[Callable[[Progress], None]]:
    """Gives what takes the events: a bar in a terminal, else a line now and then."""
    if not err.is_interactive:
        yield _Lines().take
        return
    name, told = TextColumn("{task.description}"), TextColumn("{task.fields[told]}")
    with Bar(name, BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn(), told, console=err) as bar:
        tasks: dict[str, TaskID] = {}

        def take(event: Progress) -> None:
            if event.phase not in tasks:
                tasks[event.phase] = bar.add_task(event.phase, total=event.total, told="")
            bar.update(tasks[event.phase], completed=event.done, total=event.total, told=_told(event))

        yield take


class _Lines:
    """For logs: a line when a phase begins to tell, when time has passed, and when it ends."""

    def __init__(self) -> None:
        self._phase, self._told = "", 0.0

    def take(self, event: Progress) -> None:
        is_due = event.phase != self._phase or monotonic() - self._told > _SECONDS_BETWEEN_LINES
        if event.phase == "scoring" or not (is_due or event.done == event.total):
            return
        self._phase, self._told = event.phase, monotonic()
        err.print(f"{event.phase} {event.done}/{event.total} {_told(event)}", highlight=False, soft_wrap=True)


def _told(event: Progress) -> str:
    parts = [event.rate] if event.rate else []
    if event.scores:
        parts.append(f"acceptance length {event.scores[-1].acceptance_length:.2f} ({len(event.scores) - 1} epochs)")
    return ", ".join(parts)
