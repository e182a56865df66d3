"""The progress display of a comparison: a bar in a terminal; elsewhere, such as in a log, a line per segment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import mean

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column

from onlinespec.cli.terminal import err, escaped
from onlinespec.experiments.compare import Progress
from onlinespec.registry import NONE


@contextmanager
def shown() -> Iterator[Callable[[Progress], None]]:
    """Gives a callback for the progress events of `Comparing.run`."""
    if err.is_interactive:
        with _bar() as bar:
            yield lambda event: _update(bar, event)
            (task,) = bar.tasks
            bar.update(task.id, total=task.completed)  # fewer than expected if a file was short or time ran out
    else:
        stretch = _Stretch()
        try:
            yield stretch.take
        finally:
            stretch.tell()


def _bar() -> Bar:
    """A progress bar. In a narrow terminal the name of the data is shortened, the acceptance lengths are not."""
    err.print("acceptance length of the latest answer, by learner", highlight=False)
    name = TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))
    figures = TextColumn("{task.fields[lengths]}", table_column=Column(no_wrap=True, overflow="ellipsis"))
    bar = Bar(
        BarColumn(bar_width=8), MofNCompleteColumn(), TimeRemainingColumn(), name, figures, console=err, expand=True
    )
    bar.add_task("the first prompt", total=None, lengths="")
    return bar


def _update(bar: Bar, event: Progress) -> None:
    lengths = "  ".join(f"{name} {length:.2f}" for name, length in event.acceptance_lengths.items() if name != NONE)
    (task,) = bar.tasks
    bar.update(
        task.id, completed=event.done, total=event.expected, description=escaped(event.data), lengths=escaped(lengths)
    )


class _Stretch:
    """Collects the requests of one segment, and prints them as one line when the next segment begins."""

    def __init__(self) -> None:
        self._events: list[Progress] = []

    def take(self, event: Progress) -> None:
        if self._events and event.segment != self._events[-1].segment:
            self.tell()
        self._events.append(event)

    def tell(self) -> None:
        if not self._events:
            return
        last = self._events[-1]
        answered = [event.acceptance_lengths for event in self._events if any(event.acceptance_lengths.values())]
        line = f"{last.done}/{last.expected or '?'}  {last.data}: {len(answered)} request{'s' * (len(answered) != 1)}"
        if skipped := len(self._events) - len(answered):
            line += f" ({skipped} skipped)"
        names = [name for name in last.acceptance_lengths if name != NONE]
        if answered and names:
            means = (f"{name} {mean(lengths[name] for lengths in answered):.2f}" for name in names)
            line += f", mean acceptance length {', '.join(means)}"
        err.print(line, highlight=False, markup=False, soft_wrap=True)
        self._events = []
