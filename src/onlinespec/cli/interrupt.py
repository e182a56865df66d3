"""The SIGINT handler while there is nothing to clean up. Imported first, so that Ctrl-C works during slow imports."""

import os


def stop(*_: object) -> None:
    """Prints "stopped" and exits with status 130. Does not raise: Python may swallow it in an import or `__del__`."""
    if os.isatty(2):
        os.write(2, b"\r\x1b[K\x1b[?25h")  # clears a spinner's line, and shows the cursor it hid
    os.write(2, b"stopped\n")
    os._exit(130)
