import gc
import os
import signal

import pytest

# Threads that wait for one another sleep. They would spin, which beside other busy processes costs many times the work
# itself. Set before torch is imported, and for processes of the tests too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_collection_finish():
    """What was imported by now stays: the garbage collector need not go through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_works():
    """Also where whoever runs the tests ignores it, as a shell's job in the background does; processes inherit that."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
