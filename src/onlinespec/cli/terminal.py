"""The terminal: where to write, and what Ctrl-C does. Answers and tables go to standard output, the rest to error."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from onlinespec.cli.interrupt import stop

_FILE_WIDTH = 160  # characters, where no terminal says how many it has: a row of a table, a line of the log stay whole


def _console(stderr: bool) -> Console:
    console = Console(stderr=stderr)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _FILE_WIDTH
    return console


out, err = _console(stderr=False), _console(stderr=True)


@contextmanager
def interrupts_raised() -> Iterator[None]:
    """Ctrl-C is a KeyboardInterrupt, as usual, for work that leaves something to put in order."""
    is_stopping = signal.getsignal(signal.SIGINT) is stop
    if is_stopping:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if is_stopping:
            signal.signal(signal.SIGINT, stop)


def complain(message: str) -> None:
    """An error, in one line on standard error."""
    err.print(f"[bold red]error:[/] {escaped(message)}", highlight=False, soft_wrap=True)


def escaped(text: str) -> str:
    """Text as it stands, in what rich would read for markup."""
    return text.replace("[", r"\[")
