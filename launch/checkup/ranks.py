"""Two ranks of which one dies: how long until both have ended, and what the other says of it."""

import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from launch.checkup.check import Failed, Figure, Machine
from train.cli import ROOT, end_with, exit_code_of
from train.errors import TrainError
from train.loop.config import TrainConfig
from train.loop.step import training_step
from train.network.models import build_model
from train.network.optim import OptimConfig, build_optimizer
from train.network.precision import Precision
from train.network.state import TrainState
from train.peers import Peers
from train.world import open_world

NETWORK, SIDE, BATCH_SIZE = "resnet20_cifar", 32, 16
DIES_AT_STEP = 3
CAUSE = "made by the check-up"
WAYS = {"error": CAUSE, "kill": "rank 1 ended without a word"}
"""How a rank ends in the middle of a backward pass -> what the other has to give as its first error."""
SAYS_ERROR = "error:"
"""In the lines that count: NCCL and gloo may write others before."""
SILENCE_S = 60.0
"""As in run.silence_s."""
MAX_WORD_S, MAX_END_S = 10.0, 20.0
"""From the death of one rank to the other's line, and to the end of both."""
POLL_S = 0.02
GIVE_UP_S = 300.0
DIED = re.compile(r"^died at (\d+\.\d+)$", re.MULTILINE)


def dead_rank(machine: Machine) -> Figure:
    """One of two ranks fails, or is killed, in a backward pass. Rank 0 of the check-up starts them, with gloo on the
    CPU, or with NCCL where there are two GPUs."""
    if not machine.world.is_main:
        return Figure("")
    device = "cuda" if torch.cuda.device_count() >= 2 else "cpu"
    rows = [_ended_pair(way, device, machine.folder) for way in machine.effort.deaths]
    for row in rows:
        if not row["first_error_is_cause"]:
            raise Failed(f"after a rank's {row['way']} the other's first error is: {row['first_error'] or 'none'}")
        for key, allowed in (("told_after_s", MAX_WORD_S), ("ended_after_s", MAX_END_S)):
            if row[key] > allowed:
                raise Failed(f"after a rank's {row['way']}, {key} is {row[key]:.1f}, allowed {allowed:.0f}")
    times = "; ".join(f"{row['way']}: {row['told_after_s']:.1f} and {row['ended_after_s']:.1f} s" for row in rows)
    return Figure(f"until the other tells the cause, and both have ended ({device}): {times}", {"rows": rows})


def _ended_pair(way: str, device: str, folder: Path) -> dict[str, object]:
    """Seconds from the death of rank 1 to the end of both, and the first error of rank 0."""
    with _held_port() as port:
        return _ended_pair_at(port, way, device, folder)


@contextmanager
def _held_port() -> Iterator[int]:
    """A port that nobody else is given meanwhile. Rank 0 may listen on it, as this socket never does."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def _ended_pair_at(port: int, way: str, device: str, folder: Path) -> dict[str, object]:
    ours = {key: value for key, value in os.environ.items() if not key.startswith(("TORCHELASTIC", "SLURM"))}
    ours |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    says = [folder / f"{way}-{rank}.txt" for rank in range(2)]
    processes = []
    for rank, path in enumerate(says):
        with path.open("w") as output:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", __name__, way, device],
                    cwd=ROOT,
                    env=ours | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
                    stdout=output,
                    stderr=output,
                )
            )
    try:
        told, ended = _told_and_ended(processes, says[0])
    except TimeoutError as error:
        raise Failed(f"after a rank's {way} the other still waits, {GIVE_UP_S:.0f} s after their start") from error
    finally:
        for process in processes:
            process.kill()
            process.wait()
    died = DIED.search(says[1].read_text())
    if died is None:
        raise Failed(f"the rank that was to die ended before: {' '.join(says[1].read_text().split())[-300:]}")
    errors = [line for line in says[0].read_text().splitlines() if SAYS_ERROR in line]
    return {
        "way": way,
        "told_after_s": told - float(died[1]),
        "ended_after_s": ended - float(died[1]),
        "first_error": errors[0] if errors else "",
        "first_error_is_cause": bool(errors) and WAYS[way] in errors[0],
        "exit_codes": [process.returncode for process in processes],
    }


def _told_and_ended(processes: Sequence[subprocess.Popen], says: Path) -> tuple[float, float]:
    """When (time.time()) the file had its first error, and when all processes had ended. TimeoutError if they hang."""
    told, give_up = math.inf, time.monotonic() + GIVE_UP_S
    while any(process.poll() is None for process in processes):
        if told == math.inf and SAYS_ERROR in says.read_text():
            told = time.time()
        if time.monotonic() > give_up:
            raise TimeoutError
        time.sleep(POLL_S)
    return min(told, time.time()), time.time()


def _be_rank(way: str, device: str) -> None:
    """Train until rank 1 ends in the middle of a backward pass."""
    world = open_world(device)
    torch.manual_seed(0)
    model = build_model(NETWORK, 10).to(world.device)
    precision = Precision("fp32", world.device)
    state = TrainState(model, world.wrap(model), build_optimizer(model, OptimConfig(lr=0.01)), precision)
    images = torch.randn(BATCH_SIZE, 3, SIDE, SIDE, device=world.device)
    labels = torch.zeros(BATCH_SIZE, dtype=torch.int64, device=world.device)
    with Peers(world, SILENCE_S):
        for step in range(1, 1000):
            if step == DIES_AT_STEP and world.rank == 1:
                next(model.parameters()).register_hook(lambda gradient: _die(way))  # the last of a backward pass
            training_step(state, images, labels, TrainConfig())


def _die(way: str) -> None:
    print(f"died at {time.time()}", flush=True)
    if way == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise TrainError(CAUSE)


if __name__ == "__main__":
    end_with(lambda argv: exit_code_of(lambda: _be_rank(*argv), debug=False))
