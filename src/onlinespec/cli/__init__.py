"""The command line. The only place that sees argv, prints, or turns an error into a message.

What a command needs takes seconds to import. So this file and `dispatch` import little, help and mistakes are answered
at once, and Ctrl-C ends the process in one line from its first moments on.
"""

import signal

from onlinespec.cli.interrupt import stop


def main() -> None:
    """The entry point of the process."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as under nohup
        signal.signal(signal.SIGINT, stop)
    from onlinespec.cli import dispatch

    try:
        dispatch.main()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # there is nothing left to stop, only Python's own end
