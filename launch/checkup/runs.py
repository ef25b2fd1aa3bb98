"""Whole runs of a few steps: what a resume brings back, and whether the ledger's seconds are those of a clock."""

import contextlib
import io
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from data import DataConfig
from launch.checkup.check import Failed, Figure, Machine
from launch.checkup.images import PHOTOGRAPHS, training_loader
from launch.checkup.steps import new_state
from train.checkpoint.file import load_checkpoint
from train.config import ModelConfig, RunConfig, RunOptions
from train.log.ledger import Ledger
from train.log.rundir import RunDir
from train.loop.config import TrainConfig
from train.loop.engine import train_epoch
from train.loop.mixing import build_mixing
from train.loop.progress import EpochSoFar
from train.loop.trainer import TrainLoop
from train.methods import Dense, PruneConfig
from train.network.optim import OptimConfig
from train.run import run

NETWORK = "launch.checkup.runs:noisy"
COMPARED = ("model", "ema", "optimizer", "scaler")
OF_RANKS = ("rng", "cuda_rng", "train_loader", "buffers")
MAX_LEDGER_ERROR = 0.02
"""Of the ledger's sum against a clock."""
POLL_S = 0.005


def noisy(num_classes: int) -> nn.Module:
    """A small network with dropout and batch norm: a resume that forgets any of its state trains on other numbers."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, stride=2, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(32, num_classes)),
    )


def resumed(machine: Machine) -> Figure:
    """A run that was stopped after some step and taken up again ends with the bits of one that was not."""
    whole = _train(machine, "whole")
    with _stopped_once_saved(machine, "halves"):
        ending = _train(machine, "halves")
    if ending["event"] != "stopped":
        raise Failed("a run did not stop at SIGTERM")
    _train(machine, "halves")
    step = f"epoch {ending['epoch']}, step {ending['step']}"
    contents = [load_checkpoint(RunDir(machine.folder / "runs" / name).last) for name in ("whole", "halves")]
    differing = sorted(set(_differences(*(_compared(content) for content in contents))))
    if differing:
        raise Failed(f"stopped after {step} and resumed, these are other bits: {', '.join(differing[:5])}")
    text = f"stopped after {step} and resumed: weights, momentum, EMA, scaler, generators, loader bit-equal"
    return Figure(text, {"epoch": ending["epoch"], "step": ending["step"], "top1": whole["best_top1"]})


def ledger(machine: Machine) -> Figure:
    """The ledger charges an epoch the seconds of a clock beside it: of the GPU's own where there is one."""
    loop = _loop(machine)
    so_far = EpochSoFar.beginning(loop.ledger, machine.device)
    clock = _GpuClock() if machine.device.type == "cuda" else _SystemClock()
    before_s = loop.ledger.total_s
    clock.start()
    train_epoch(loop, 1, so_far)
    with loop.ledger.charge("step"):
        clock.stop()
    inside_s = loop.ledger.total_s - before_s
    loop.loader.close()
    error = abs(inside_s / clock.seconds - 1)
    text = f"{inside_s:.3f} s in the ledger, {clock.seconds:.3f} s by the clock: {100 * error:.2f}% apart"
    if error > MAX_LEDGER_ERROR:
        raise Failed(f"{text}, allowed {100 * MAX_LEDGER_ERROR:.0f}%: GPU hours would be wrong by as much")
    return Figure(text, {"ledger_s": inside_s, "clock_s": clock.seconds, "seconds": loop.ledger.seconds})


def _loop(machine: Machine) -> TrainLoop:
    world = machine.world
    loader = training_loader(machine)
    return TrainLoop(
        config=TrainConfig(epochs=1),
        optim=OptimConfig(lr=0.01),
        world=world,
        loader=loader,
        mix=build_mixing(0.0, 0.0, loader.num_classes),
        state=new_state(machine, "fp32", ema=True),
        method=Dense(),
        ledger=Ledger(world.size),
    )


class _SystemClock:
    """Another clock than the ledger's: the kernel's, which nobody sets or slews."""

    def start(self) -> None:
        self._began = time.clock_gettime(time.CLOCK_MONOTONIC_RAW)

    def stop(self) -> None:
        self.seconds = time.clock_gettime(time.CLOCK_MONOTONIC_RAW) - self._began


class _GpuClock:
    """Events in the GPU's own stream; it is idle when they start."""

    def start(self) -> None:
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda.synchronize()
        self._events[0].record()

    def stop(self) -> None:
        self._events[1].record()
        self._events[1].synchronize()
        self.seconds = self._events[0].elapsed_time(self._events[1]) / 1e3


def _config(machine: Machine, name: str) -> RunConfig:
    """A few steps with everything that a checkpoint has to hold: images from files, fp16's scaler, EMA, dropout."""
    batch_size, threads = 16 * machine.world.size, 2
    return RunConfig(
        run=RunOptions(
            name=name,
            root=str(machine.folder / "runs"),
            save_every_minutes=1e-9,
            device=machine.device.type,
            trackers=(),
        ),
        model=ModelConfig(name=NETWORK),
        data=DataConfig(
            path=str(machine.folder / PHOTOGRAPHS),
            batch_size=batch_size,
            image_size=32,
            resize_size=40,
            threads=threads,
        ),
        optim=OptimConfig(lr=0.01),
        train=TrainConfig(epochs=2, precision="fp16", ema_decay=0.9, nonfinite="skip", nonfinite_limit=100),
        prune=PruneConfig(method="none"),
    )


def _train(machine: Machine, name: str) -> dict[str, Any]:
    """The closing event of the run. Nothing of it is printed."""
    torch.manual_seed(time.time_ns() % 2**32)  # a run must not need the generators that it finds
    with _deterministic(), contextlib.redirect_stdout(io.StringIO()):
        return run(_config(machine, name), machine.world, Ledger(machine.world.size))


def _compared(content: dict[str, Any]) -> dict[str, Any]:
    """What of a checkpoint has to be equal, without times and names."""
    own = {part: content[part] for part in COMPARED}
    return own | {f"rank {n}": {part: rank[part] for part in OF_RANKS} for n, rank in enumerate(content["ranks"])}


def _differences(one: Any, other: Any, where: str = "") -> Iterator[str]:
    """Places at which two nested contents differ."""
    if isinstance(one, Mapping) and isinstance(other, Mapping) and one.keys() == other.keys():
        for key in one:
            yield from _differences(one[key], other[key], f"{where} {key}".strip())
    elif isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if not (one.shape == other.shape and torch.equal(one, other)):
            yield where
    elif one != other:
        yield where


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Without cuDNN, which chooses other kernels from run to run, and without those that add in any order."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def _stopped_once_saved(machine: Machine, name: str) -> Iterator[None]:
    """Inside, rank 0 is sent SIGTERM as soon as the run of that name has a checkpoint, on which all ranks stop.

    The others are not: one that saw the checkpoint late would be hit after its run, where SIGTERM ends a process.
    """
    if not machine.world.is_main:
        yield
        return
    last, over = RunDir(machine.folder / "runs" / name).last, threading.Event()

    def watch() -> None:
        while not over.wait(POLL_S):
            if last.exists():
                os.kill(os.getpid(), signal.SIGTERM)
                return

    watching = threading.Thread(target=watch, daemon=True)
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)  # one that the run does not hear ends nobody
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join()
        signal.signal(signal.SIGTERM, before)
