"""The command line: the only package that reads argv, prints, and turns errors into messages.

A command's dependencies take seconds to import. This file and `dispatch` import little, so that `--help` and usage
errors answer at once, and Ctrl-C ends the process cleanly from the start.
"""

import signal

from onlinespec.cli.interrupt import stop


def main() -> None:
    """Entry point of the `onlinespec` command."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored on purpose, as under nohup
        signal.signal(signal.SIGINT, stop)
    from onlinespec.cli import dispatch

    try:
        dispatch.main()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # only the interpreter's shutdown is left
