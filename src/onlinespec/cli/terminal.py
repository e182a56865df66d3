"""The consoles that commands print to, and what Ctrl-C does.

Answers and tables go to standard output, everything else to standard error.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from onlinespec.cli.interrupt import stop

_FILE_WIDTH = 160  # characters, if the output is no terminal: wide enough that table rows and log lines are not wrapped


def _console(stderr: bool) -> Console:
    console = Console(stderr=stderr)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _FILE_WIDTH
    return console


out, err = _console(stderr=False), _console(stderr=True)


@contextmanager
def raise_on_ctrl_c() -> Iterator[None]:
    """Makes Ctrl-C raise KeyboardInterrupt inside the block, for work that must clean up; elsewhere it exits."""
    is_stopping = signal.getsignal(signal.SIGINT) is stop
    if is_stopping:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if is_stopping:
            signal.signal(signal.SIGINT, stop)


def complain(message: str) -> None:
    """Prints an error as one line on standard error."""
    err.print(f"[bold red]error:[/] {escaped(message)}", highlight=False, soft_wrap=True)


def escaped(text: str) -> str:
    """Escapes text so that rich does not take brackets for markup."""
    return text.replace("[", r"\[")
