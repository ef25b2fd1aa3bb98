"""One thread a process, as the ranks of a run have: the networks of the tests are small, and threads that find their
cores taken, by another rank or another program, wait for each other longer than they work."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch
