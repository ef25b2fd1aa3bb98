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

from train import cli  # noqa: E402
from train.errors import TrainError  # noqa: E402
from train.peers import Peers  # noqa: E402
from train.world import World, open_world  # noqa: E402

SILENCE_S = 4
"""Enough for a rank that is alive on a busy machine."""
STOPPED_FOR_S = 60
"""At the latest it is killed then, and at once where the others are gone, so that nobody stays behind."""


def befall(fault: str, others: list[int]) -> None:
    """others: the processes of the other ranks."""
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "stopped":
        own = os.getpid()
        if os.fork() == 0:
            until = time.monotonic() + STOPPED_FOR_S
            while time.monotonic() < until and any(Path(f"/proc/{other}").exists() for other in others):
                time.sleep(0.05)
            os.kill(own, signal.SIGKILL)
            os._exit(0)
        os.kill(own, signal.SIGSTOP)
    cli.EXIT_DELAY_S = 3.0  # as ever, unlike where no torchrun ends the others: they are to hear it from the store
    raise TrainError("the disk has gone up in smoke")


def wait(world: World) -> None:
    if os.environ["WAIT"] == "kernel":
        time.sleep(600)
    while True:
        world.all_reduce(torch.ones(1000))


def main() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which comes some seconds after the first end: this one has its own
    world = open_world("cpu")
    fault = os.environ["FAULT"]
    with Peers(world, silence_s=SILENCE_S if fault == "stopped" else 60):
        pids = world.all_gather(os.getpid())
        if world.rank == int(os.environ["VICTIM"]):
            time.sleep(0.3)
            befall(fault, [pid for pid in pids if pid != os.getpid()])
        wait(world)


sys.exit(cli.exit_code_of(main, debug=False))
