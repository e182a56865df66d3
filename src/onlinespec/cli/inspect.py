"""The command `onlinespec inspect`: prints what a model or drafter directory holds."""

from __future__ import annotations

from rich.table import Table

from onlinespec.cli.commands import Inspect
from onlinespec.cli.terminal import escaped, out
from onlinespec.offline.inspection import describe, folders_of, history_of
from onlinespec.publishing.protocol import Event

_NEWEST = 20  # number of events shown


def inspect(command: Inspect) -> int:
    """Prints a table of facts (for a pair, target first), then the event history of a version folder.

    Returns:
        The exit status, 0.
    """
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for folder in folders_of(command.path):
        if table.row_count:
            table.add_row()
        for name, value in describe(folder).items():
            table.add_row(f"[bold]{escaped(name)}[/]", escaped(str(value)))
    out.print(table)
    for folder in folders_of(command.path):
        if events := history_of(folder):
            _print_history(events)
    return 0


def _print_history(events: list[Event]) -> None:
    """Prints the newest events in order of time."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("when (UTC)", "what", "version", "acceptance length", "on", "why"):
        table.add_column(heading, justify="right" if heading == "version" else "left", overflow="fold")
    for event in events[-_NEWEST:]:
        table.add_row(*map(escaped, _row(event)))
    out.print()
    if len(events) > _NEWEST:
        out.print(f"history, the newest {_NEWEST} of {len(events)}:")
    out.print(table)


def _row(event: Event) -> tuple[str, ...]:
    when, result = event.at.replace("T", " ").partition("+")[0], event.paired
    what = f"{event.kind} to {event.restores}" if event.restores is not None else event.kind
    version = str(event.version) if event.parent is None else f"{event.parent} → {event.version}"
    if result is None:
        return when, what, version, "", "", event.reason
    others = {"promoted": "candidate", "refused": "candidate", "returned": "the first"}
    other = others.get(event.kind, "version before")
    lengths = f"served {result.served_length:.2f}, {other} {result.other_length:.2f}"
    why = f"{result.difference:+.3f} ± {result.standard_error:.3f}"
    return when, what, version, lengths, f"{result.num_requests} requests", why
