"""`onlinespec inspect`: what a directory holds."""

from __future__ import annotations

from rich.table import Table

from onlinespec.cli.arguments import Inspect
from onlinespec.cli.terminal import escaped, out
from onlinespec.inspection import describe, folders_of


def inspect(command: Inspect) -> int:
    """Prints the facts, of a pair the target's first."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for folder in folders_of(command.path):
        if table.row_count:
            table.add_row()
        for name, value in describe(folder).items():
            table.add_row(f"[bold]{escaped(name)}[/]", escaped(str(value)))
    out.print(table)
    return 0
