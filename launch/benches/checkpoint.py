"""Seconds that training waits for a checkpoint, beside those that writing takes.

A network with its moving average and its momentum; the file lies where --folder says, on the disk of the runs.
"""

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import torch

from launch.benches.measure import machine, rounds_in_turn, summary, timed, with_spread, write_result
from train.checkpoint.file import copy_checkpoint, save_checkpoint
from train.checkpoint.snapshot import snapshot
from train.cli import positive_int
from train.network.ema import MovingAverage
from train.network.models import build_model
from train.network.optim import OptimConfig, build_optimizer
from train.network.state import MEMORY_FORMAT
from train.world import World, open_world


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="resnet50", metavar="NAME", help="as in model.name (default: resnet50)")
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to write to (default: here)")
    parser.add_argument("--rounds", type=positive_int, default=7, metavar="N", help="after one of warm-up (default: 7)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto = GPU if any")


def measure(options: argparse.Namespace) -> None:
    """Measure, print the table, write the result."""
    world = open_world(options.device)
    content = _state(options.model, world)
    copied = snapshot(content)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        last, best = Path(folder) / "last.pt", Path(folder) / "best.pt"

        def write_best() -> None:
            save_checkpoint(best, copied)
            copy_checkpoint(best, last)

        contenders = {
            "snapshot: training waits": lambda: timed(lambda: snapshot(content), world),
            "last.pt: on the thread": lambda: timed(lambda: save_checkpoint(last, copied), world),
            "best.pt and last.pt: on the thread": lambda: timed(write_best, world),
        }
        results = rounds_in_turn(contenders, options.rounds)
        size = last.stat().st_size
    print(f"{options.model}, EMA and momentum, {size / 1e6:.0f} MB, {options.rounds} rounds: seconds, median (spread)")
    for name, values in results.items():
        print(f"  {name:<36} {with_spread(values)}")
    if options.out:
        seconds = {name: summary(values) for name, values in results.items()}
        what = {"benchmark": "checkpoint", "model": options.model, "bytes": size, "machine": machine("torchvision")}
        write_result(options.out, {**what, "seconds": seconds})


def _state(name: str, world: World) -> dict[str, Any]:
    """What a checkpoint holds of tensors, after one step."""
    torch.manual_seed(0)
    model = build_model(name, 1000).to(world.device, memory_format=MEMORY_FORMAT)
    average = MovingAverage(copy.deepcopy(model), decay=0.9999)
    optimizer = build_optimizer(model, OptimConfig())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {"model": model.state_dict(), "ema": average.state_dict(), "optimizer": optimizer.state_dict()}
