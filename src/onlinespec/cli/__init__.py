"""The command line. The only place that sees argv, prints, or turns an error into a message.

What a command needs takes seconds to import. So this file and `dispatch` import little, help and mistakes are answered
at once, and Ctrl-C ends the process in one line from its first moments on.
"""

import os
import signal


def main() -> None:
    """The entry point of the process."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as under nohup
        signal.signal(signal.SIGINT, stop)
    from onlinespec.cli import dispatch

    try:
        dispatch.main()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # there is nothing left to stop, only Python's own end


def stop(*_: object) -> None:
    """Ctrl-C while nothing has to be put in order. No exception: amid an import or in a `__del__` it gets swallowed."""
    if os.isatty(2):
        os.write(2, b"\r\x1b[K\x1b[?25h")  # over what a spinner wrote, and the cursor it hid
    os.write(2, b"stopped\n")
    os._exit(130)
