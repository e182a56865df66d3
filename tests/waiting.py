"""Waiting for events. A test asks whether something comes, never how soon."""

import time

HANG_SECONDS = 300  # many times what anything here takes beside three busy processes: it only ends what hangs


def wait_until(holds, do=lambda: None):
    """Looks, and does something in between, until it holds."""
    deadline = time.monotonic() + HANG_SECONDS
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        do()
        time.sleep(0.01)
