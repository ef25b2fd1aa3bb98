"""Three ranks of which FAULT befalls one while the others wait for it; for tests/run/test_peers.py.

WAIT: all_reduce, or kernel: what NCCL's is to Python, a call that neither returns nor fails.
"""

import os
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import torch  # noqa: E402

from train.cli import exit_code_of  # noqa: E402
from train.errors import TrainError  # noqa: E402
from train.peers import Peers  # noqa: E402
from train.world import World, open_world  # noqa: E402

STOPPED_FOR_S = 12
"""Then it is killed, so that nobody stays behind; the others are to be gone by then."""


def befall(fault: str) -> None:
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "stopped":
        own = os.getpid()
        if os.fork() == 0:
            time.sleep(STOPPED_FOR_S)
            os.kill(own, signal.SIGKILL)
            os._exit(0)
        os.kill(own, signal.SIGSTOP)
    raise TrainError("the disk has gone up in smoke")


def wait(world: World) -> None:
    if os.environ["WAIT"] == "kernel":
        time.sleep(600)
    while True:
        world.all_reduce(torch.ones(1000))


def main() -> None:
    world = open_world("cpu")
    with Peers(world, silence_s=2):
        world.all_reduce(torch.ones(1))
        if world.rank == int(os.environ["VICTIM"]):
            time.sleep(0.3)
            befall(os.environ["FAULT"])
        wait(world)


sys.exit(exit_code_of(main, debug=False))
