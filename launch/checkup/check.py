"""What a check is: a function of the machine that gives a figure, or says why it failed or cannot be asked here.

All ranks run all checks in one order, so a check may use collectives. A check that fails on one rank has failed. What
one rank alone may find wrong is raised after the last collective or through `World.on_every_rank`: else others wait.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from train.world import RankFailed, World

Status = Literal["pass", "fail", "skipped"]


class Failed(Exception):
    """Something is wrong; the message says what was found and what to do."""


class Skipped(Exception):
    """The check makes no sense here; the message says why."""


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    network: as in model.name. image_side: pixels. batch_sizes: images a step of one rank, ascending. steps: timed at
    each setting. photos: of one rank, for training in the loaders' checks. threads: decoding threads that are compared.
    deaths: how a rank dies in a pair of them (ranks.py).
    """

    network: str
    image_side: int
    batch_sizes: tuple[int, ...]
    steps: int
    photos: int
    threads: tuple[int, ...]
    deaths: tuple[str, ...] = ("error", "kill")


EFFORTS = {
    ("cpu", "quick"): Effort("resnet20_cifar", 32, (16,), steps=5, photos=96, threads=(1, 2), deaths=("kill",)),
    ("cpu", "full"): Effort("resnet18", 64, (4, 8, 16), steps=3, photos=192, threads=(1, 2, 4)),
    ("cuda", "quick"): Effort("resnet50", 224, (32, 256), steps=20, photos=2048, threads=(4,), deaths=("kill",)),
    ("cuda", "full"): Effort("resnet50", 224, (32, 128, 256), steps=50, photos=8192, threads=(2, 4, 8)),
}


@dataclass(frozen=True)
class Machine:
    """What a check is given. folder: empty at first, seen by all ranks, removed in the end."""

    world: World
    effort: Effort
    folder: Path

    @property
    def device(self) -> torch.device:
        return self.world.device

    def require_gpu(self, why: str) -> None:
        """Raises Skipped on the CPU."""
        if self.device.type != "cuda":
            raise Skipped(f"no GPU: {why}")


@dataclass(frozen=True)
class Figure:
    """What a check found. text: for its line. numbers: what JSON can hold, for the file."""

    text: str
    numbers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """name: in a few words. is_quick: whether --quick has the time for it."""

    name: str
    look: Callable[[Machine], Figure]
    is_quick: bool = True


@dataclass(frozen=True)
class Result:
    """Of one check, all ranks together. text: the figure of rank 0, or the reason of the first rank that failed.

    numbers: one entry a rank. seconds: of rank 0.
    """

    name: str
    status: Status
    text: str
    seconds: float
    numbers: Sequence[Mapping[str, Any]] = ()


def perform(checks: Sequence[Check], machine: Machine, begin: Callable[[int, Check], None]) -> Iterator[Result]:
    """The results, one by one. All ranks call it. begin: called before each check, with its number from 1."""
    for number, check in enumerate(checks, start=1):
        begin(number, check)
        started = time.perf_counter()
        own = _looked(check, machine)
        yield _together(check.name, machine.world.all_gather(own), time.perf_counter() - started)


def _looked(check: Check, machine: Machine) -> tuple[Status, str, dict[str, Any]]:
    try:
        figure = check.look(machine)
    except Skipped as reason:
        return "skipped", str(reason), {}
    except (Failed, RankFailed) as what:
        return "fail", str(what), {}
    except Exception as error:  # one that nobody thought of is what a check-up is there to find
        return "fail", f"{type(error).__name__}: {' '.join(str(error).split())[:400]}", {}
    return "pass", figure.text, dict(figure.numbers)


def _together(name: str, ranks: Sequence[tuple[Status, str, dict[str, Any]]], seconds: float) -> Result:
    for rank, (status, text, _) in enumerate(ranks):
        if status == "fail":
            return Result(name, "fail", f"rank {rank}: {text}" if len(ranks) > 1 else text, seconds)
    status, text, _ = ranks[0]
    return Result(name, status, text, seconds, [numbers for _, _, numbers in ranks])
