"""Read by pytest before any test, and so before torch."""

import gc
import os
import random
import signal
import sys

import pytest

# The networks of the tests are too small for two threads, which wait for each other where several processes share the
# cores: beside two other processes a run of tests/helpers/tiny.yaml took 9 s with two threads and 3 s with one.
for _threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_threads, "1")

# A shell that starts pytest in the background has it ignore SIGINT, nohup SIGHUP, and runs leave ignored signals alone.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, _handler)


def pytest_collection_finish() -> None:
    """What is imported by now stays: collections, and apply_plan's search for DDP, pass a million objects by."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)  # before fixtures, those of a module included
def pytest_runtest_setup() -> None:
    """Every test draws the same numbers at every run, whichever tests its process has run before."""
    random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
