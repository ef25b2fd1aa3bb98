"""GPU hours of a long training on a named device, dense and shrinking: modelled, nothing is timed.

The settings are those of the recipe resnet50_imagenet_fast, but for epochs, images and batch. Side by side, eager and
compiled: dense, the paper's inner groups, the time planner at the same FLOPs reduction, and that with growing images.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch

import cup
from launch.benches.devices import plan_at_reduction
from launch.benches.measure import write_result
from launch.projections.network import Network
from launch.projections.variants import Estimate, Projection, to_reduction, to_speedup
from train.config import RunConfig, parse_config
from train.network.models import build_model
from train.preprocessing import settled
from train.recipes import DEFAULT, with_recipe_first

RECIPE = "resnet50_imagenet_fast"
CLASSES = 1000


def measure_modelled(options: argparse.Namespace) -> None:
    """Print the arithmetic and the tables, write the result."""
    config = _config(options)
    side = config.data.image_size
    torch.manual_seed(config.run.seed)
    network = Network.of(build_model(config.model.name, CLASSES), (config.data.channels, side, side))
    content = {}
    for mode in ("none", "blocks"):
        fitted = replace(config, train=replace(config.train, compile=mode))
        estimates = _estimates(network, fitted, options)
        how = "compiled" if mode == "blocks" else "eager"
        _print(estimates, fitted, options.device, how)
        content[how] = [estimate.to_dict() | {"saving": _saving(estimate, estimates)} for estimate in estimates]
    if options.out:
        what = f"savings: modelled, not measured, {options.device}"
        write_result(options.out, {"benchmark": what, "config": config.to_dict(), "variants": content})


def _config(options: argparse.Namespace) -> RunConfig:
    """The recipe, in a precision that the device has."""
    precision = next(one for one in ("bf16", "fp16", "fp32") if one in cup.DEVICES[options.device].matrix)
    settings = {"train.epochs": options.epochs, "data.batch_size": options.batch_size, "train.precision": precision}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    config = parse_config(with_recipe_first(["--recipe", RECIPE, *words]), "launch/bench.py", DEFAULT)
    return replace(config, data=settled(config.data, None))


def _estimates(network: Network, config: RunConfig, options: argparse.Namespace) -> list[Estimate]:
    cost = cup.device_cost(
        options.device,
        precision=config.train.precision,
        batch_size=options.batch_size,
        fused=config.train.compile == "blocks",
    )
    projection = Projection(config, network, cost, options.images, options.val_images)
    seconds = cost.of(network.model, network.groups)
    speedup = round(seconds.now / seconds.at(plan_at_reduction(network, options.reduction, cost)), 2)
    paper, timed = to_reduction(config.prune, options.reduction), to_speedup(config.prune, speedup)
    timed_variant = projection.to_target(f"time planner, speed-up {speedup:g}, all groups", timed)
    variants = [
        projection.dense(),
        projection.to_target(f"paper's, FR {options.reduction:g}, inner groups", paper),
        timed_variant,
        projection.growing(timed_variant),
    ]
    return [projection.estimate(variant) for variant in variants]


def _saving(estimate: Estimate, estimates: Sequence[Estimate]) -> float:
    """Percent of the first one's hours."""
    return 100 * (1 - estimate.gpu_hours / estimates[0].gpu_hours)


def _print(estimates: Sequence[Estimate], config: RunConfig, device: str, how: str) -> None:
    print(
        f"Modelled, not measured: {config.model.name}, {config.train.epochs} epochs, one {device}, "
        f"{config.train.precision}, {how}, batch {config.data.batch_size}; ramps end at epoch "
        f"{config.prune.last_epoch}, images grow until epoch {config.data.grow_epochs}"
    )
    for estimate in estimates:
        print(estimate.label)
        for part in estimate.segments:
            print(
                f"  epochs {part.first:>3} to {part.last:>3}  FR {part.flops_reduction:4.2f}  "
                f"{1e3 * part.step_s:6.2f} ms x {part.steps} steps + {1e3 * part.val_s:5.2f} ms x "
                f"{part.val_steps} validation batches = {part.hours:.3f} h"
            )
    print("  | variant | final FR | final speed-up | GPU hours | saved |")
    print("  |---|---:|---:|---:|---:|")
    for estimate in estimates:
        print(
            f"  | {estimate.label} | {estimate.flops_reduction:.2f} | {estimate.speedup:.2f} | "
            f"{estimate.gpu_hours:.2f} | {_saving(estimate, estimates):.1f}% |"
        )
    for estimate in estimates:
        if estimate.note:
            print(f"  {estimate.label}: {estimate.note}")
