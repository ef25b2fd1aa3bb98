"""What a grid will cost, from a few measured steps of the dense network; and its plan in a table."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice

import torch

from data import Loader
from data.batch import preprocessing_of
from launch.grids.board import in_words
from launch.grids.disk import Disk
from launch.grids.grid import DENSE
from launch.grids.jobs import MADE_OF_ITS_COST, Job
from launch.grids.runner import State, Status, threads_of_a_rank
from train.config import RunConfig
from train.errors import ConfigError
from train.loaders import build_split_loaders
from train.log.cpu import cpu_seconds
from train.loop.step import training_step
from train.network.models import build_model
from train.network.optim import build_optimizer
from train.network.precision import Precision
from train.network.state import MEMORY_FORMAT, TrainState
from train.world import World, open_world

WARM_UP, TIMED = 3, 8
BEFORE = {
    "cut": "cut of {0} to FR {target:g} by {criterion}",
    "search": "search of widths at FR {target:g}",
    "thin": "widths at FR {target:g}",
    "shape": "shape of {0}",
    "equal_hours": "epochs of {0} that cost what {1} did",
}


@dataclass(frozen=True)
class Pace:
    """What the dense network takes on one rank, as the machine is now. Seconds; cpu_s: of the process's CPU time.

    evaluation: of a step, its forward pass alone.
    """

    step_s: float
    step_cpu_s: float
    evaluation_s: float
    evaluation_cpu_s: float
    steps: int
    val_steps: int
    threads: int
    device: str

    @property
    def an_epoch_s(self) -> float:
        return self.steps * self.step_s + self.val_steps * self.evaluation_s

    @property
    def an_epoch_cpu_s(self) -> float:
        return self.steps * self.step_cpu_s + self.val_steps * self.evaluation_cpu_s


def plan_in_words(
    jobs: Mapping[str, Job], statuses: Mapping[str, Status], disk: Disk, at_a_time: int, ranks: int
) -> str:
    """Every run with what comes before it and what it needs; what is left to do, and what that costs at most."""
    table = _table(
        [
            ("run", "state", "epochs", "before its training"),
            *(_line(job, jobs, statuses[job.name], disk) for job in jobs.values()),
        ]
    )
    left = {name: _epochs_left(jobs[name], jobs, disk) for name, one in statuses.items() if one.state is State.WAITING}
    if not left:
        return f"{table}\n\nnothing is left to run"
    dense = next(job for job in jobs.values() if job.entry.name == DENSE)
    pace = _measure(dense.config, at_a_time, ranks)
    return f"{table}\n\n{_cost(pace, sum(left.values()), len(left), at_a_time, ranks, dense)}"


def _line(job: Job, jobs: Mapping[str, Job], status: Status, disk: Disk) -> tuple[str, str, str, str]:
    options = job.options
    values = {"target": options.target_reduction, "criterion": options.criterion}
    before = BEFORE.get(job.entry.kind, "").format(*job.needs, **values)
    epochs = _epochs(job, jobs, disk)
    done = epochs - _epochs_left(job, jobs, disk)
    state = f"begun, {done} epochs" if status.state is State.WAITING and done else status.state.value
    return job.name, state if not status.why else f"{state}: {status.why}", str(epochs), before


def _epochs(job: Job, jobs: Mapping[str, Job], disk: Disk) -> int:
    """Of its training; where they follow from a method's cost and it has not begun, what that is in epochs of a dense
    network at most.
    """
    if job.entry.kind != "equal_hours":
        return job.config.train.epochs
    if begun := disk.events(job.name):
        return begun[0]["config"]["train"]["epochs"]
    method = jobs[job.needs[1]]
    counted = [method.name, *(method.needs if method.entry.kind in MADE_OF_ITS_COST else ())]
    return sum(_epochs(jobs[name], jobs, disk) for name in counted)


def _epochs_left(job: Job, jobs: Mapping[str, Job], disk: Disk) -> int:
    done = [event["epoch"] for event in disk.events(job.name) if event["event"] == "epoch"]
    return max(0, _epochs(job, jobs, disk) - max(done, default=0))


def _cost(pace: Pace, epochs: int, runs: int, at_a_time: int, ranks: int, dense: Job) -> str:
    wall, cpu = epochs * pace.an_epoch_s, ranks * epochs * pace.an_epoch_cpu_s
    currency = f"{cpu / 3600:,.2f} CPU hours" if pace.device == "cpu" else f"{ranks * wall / 3600:,.2f} GPU hours"
    together = "" if ranks == 1 else f" of {ranks} processes each, waiting for each other not counted,"
    return (
        f"measured: {TIMED} steps of {dense.config.model.name}, batch {dense.config.data.batch_size // ranks}, on one "
        "process, "
        f"{pace.device}, {pace.threads} threads, as the machine is now: {1000 * pace.step_s:.0f} ms each "
        f"({1000 * pace.step_cpu_s:.0f} ms of CPU time), data included; a forward pass "
        f"{1000 * pace.evaluation_s:.0f} ms\n"
        f"projected: {runs} runs,{together} {epochs:,} epochs of {pace.steps:,} steps and {pace.val_steps:,} "
        f"of validation, all counted as dense: at most {currency}, which take {in_words(wall / at_a_time)} with "
        f"{at_a_time} at a time and the machine as it is now\n"
        "Shrinking and thin networks need less. Not counted: starting the processes, and commands before a training."
    )


def _measure(config: RunConfig, at_a_time: int, ranks: int) -> Pace:
    """Of one rank of a run, the cores shared among the ranks of all runs of a time."""
    world = open_world(config.run.device, config.run.timeout_minutes)
    if world.device.type == "cpu" and (threads := threads_of_a_rank(at_a_time, ranks)) is not None:
        torch.set_num_threads(threads)
    if config.data.batch_size < ranks:
        raise ConfigError(f"data.batch_size: found {config.data.batch_size}, allowed: at least --ranks ({ranks})")
    config = replace(config, data=replace(config.data, batch_size=config.data.batch_size // ranks))
    train, val = build_split_loaders(config, world, ("train", "val"))
    try:
        pace = _timed(config, world, train, val)
        return replace(pace, steps=max(1, pace.steps // ranks), val_steps=-(-pace.val_steps // ranks))
    finally:
        train.close()
        val.close()


def _timed(config: RunConfig, world: World, train: Loader, val: Loader) -> Pace:
    torch.backends.cudnn.benchmark = world.device.type == "cuda"
    model = build_model(config.model.name, train.num_classes, preprocessing_of(config.data).image_size)
    model.to(world.device, memory_format=MEMORY_FORMAT)
    state = TrainState(
        model, model, build_optimizer(model, config.optim), Precision(config.train.precision, world.device)
    )
    train.go_to(0, 0)
    batches = iter(train)
    count = max(1, min(TIMED, len(train) - WARM_UP))
    for batch in islice(batches, len(train) - count if len(train) <= WARM_UP else WARM_UP):
        training_step(state, batch.images, batch.labels, config.train)
    world.synchronize()
    began = time.perf_counter(), cpu_seconds()
    for batch in islice(batches, count):
        training_step(state, batch.images, batch.labels, config.train)
    world.synchronize()
    step = time.perf_counter() - began[0], cpu_seconds() - began[1]
    began = time.perf_counter(), cpu_seconds()
    with torch.no_grad(), state.precision.autocast():
        model(batch.images.contiguous(memory_format=MEMORY_FORMAT))
    world.synchronize()
    evaluation = time.perf_counter() - began[0], cpu_seconds() - began[1]
    return Pace(
        step_s=step[0] / count,
        step_cpu_s=step[1] / count,
        evaluation_s=evaluation[0],
        evaluation_cpu_s=evaluation[1],
        steps=len(train),
        val_steps=len(val),
        threads=torch.get_num_threads(),
        device=world.device.type,
    )


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
