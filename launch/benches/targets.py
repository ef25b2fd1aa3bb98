"""Plans to a speed-up of this device against the clock, beside plans by FLOPs at the same FLOPs reduction.

By time twice: as the cost model has it, and corrected by the clock, whose FLOPs reduction the plans by FLOPs take.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import cup
from launch.benches.cost import CLOCKS, turn_timer
from launch.benches.measure import machine, rounds_in_turn, with_spread, write_result
from launch.benches.step import StepBench, ratios
from train.cli import positive_int
from train.errors import TrainError
from train.loop.config import TrainConfig
from train.world import open_world

MODELLED, CLOCKED = "time, as modelled", "time, by the clock"
NETWORKS = ("resnet18", "resnet50", "mobilenet_v2")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibration", type=Path, required=True, metavar="FILE", help="this device, as bench.py cost --out wrote it"
    )
    parser.add_argument(
        "--models", nargs="+", default=NETWORKS, metavar="NAME", help="as in model.name (default: three)"
    )
    parser.add_argument("--speed-up", type=float, default=1.8, metavar="S", help="of a training step (default: 1.8)")
    parser.add_argument("--criterion", choices=cup.CRITERIA, default="cup", help="default: cup")
    parser.add_argument("--rounds", type=positive_int, default=5, metavar="N", help="after a warm-up (default: 5)")


@dataclass(frozen=True)
class Plan:
    """speed_ups: timed, dense over this network's step, round by round; modelled: what the cost model says of it.

    note: the planner's.
    """

    flops_reduction: float
    modelled: float
    speed_ups: list[float]
    note: str


def measure(options: argparse.Namespace) -> None:
    """Measure, print the table, write the result after each network."""
    device, settings = _calibration(options.calibration)
    if settings["clock"] == "processor":
        torch.set_num_threads(1)
    world = open_world("cpu" if device.name.endswith("(cpu)") else "cuda")
    torch.backends.cudnn.benchmark = world.device.type == "cuda"  # as the trainer
    cost = cup.device_cost(device, batch_size=settings["batch_size"])
    print(
        f"training steps, {device.precision}, batch {settings['batch_size']}, {settings['image_size']} pixels, fresh "
        f"weights, criterion {options.criterion}; timed speed-up over the dense step, median of {options.rounds} "
        "rounds (spread)"
    )
    print("| network | plan | FR | modelled | timed | off the target |")
    print("|---|---|---:|---:|---:|---:|", flush=True)
    rows = {}
    for name in options.models:
        config = TrainConfig(precision=device.precision)
        bench = StepBench(name, 1000, settings["image_size"], settings["batch_size"], config, world)
        rows[name] = _plans(bench, cost, options, CLOCKS[settings["clock"]])
        _print(name, rows[name], options.speed_up)
        if options.out:
            content = {
                "benchmark": f"targets: a training step {options.speed_up:g} times as fast",
                "machine": machine("torchvision"),
                **settings,
                "rounds": options.rounds,
                "rows": {name: {plan: asdict(one) for plan, one in plans.items()} for name, plans in rows.items()},
            }
            write_result(options.out, content)
    for name, plans in rows.items():
        print(f"{name}, {CLOCKED}: {plans[CLOCKED].note}")


def _plans(
    bench: StepBench, cost: cup.DeviceCost, options: argparse.Namespace, clock: Callable[[], float]
) -> dict[str, Plan]:
    """By time over all groups, as modelled and by the clock; at the FR of the second by FLOPs, over the paper's inner
    groups and over all.
    """
    inner = cup.PlanOptions(criterion=options.criterion)
    everywhere = cup.PlanOptions(scope="all", criterion=options.criterion)
    dense = turn_timer(bench, bench.state(bench.dense_widths), clock)

    def speedup(network: nn.Module) -> float:
        own = turn_timer(bench, bench.state_of(network), clock)
        return median(ratios(**rounds_in_turn({"ones": dense, "others": own}, options.rounds)))

    asked = (bench.model, bench.groups, options.speed_up, everywhere)
    plans = {
        MODELLED: cup.plan_by_time(*asked, cost=cost),
        CLOCKED: cup.plan_by_clock(*asked, cost=cost, speedup=speedup),
    }
    reduction = bench.dense.flops / bench.cost(plans[CLOCKED].new_widths).flops
    plans["FLOPs, inner groups"] = cup.plan_by_reduction(bench.model, bench.groups, reduction, inner)
    widths: dict[str, Mapping[str, int]] = {name: plan.new_widths for name, plan in plans.items()}
    view = cup.View(bench.model, bench.groups, bench.dense, bench.dense)
    widths["FLOPs, all groups, one factor"] = cup.uniform_widths_at(view, reduction, everywhere)
    timers = {
        plan: turn_timer(bench, bench.state(bench.dense_widths | dict(one)), clock) for plan, one in widths.items()
    }
    seconds = rounds_in_turn({"dense": dense, **timers}, options.rounds)
    modelled = cost.of(bench.model, bench.groups)
    return {
        plan: Plan(
            flops_reduction=bench.dense.flops / bench.cost(one).flops,
            modelled=modelled.now / modelled.at(one),
            speed_ups=ratios(seconds["dense"], seconds[plan]),
            note=plans[plan].note if plan in plans else "",
        )
        for plan, one in widths.items()
    }


def _calibration(path: Path) -> tuple[cup.Device, dict[str, Any]]:
    """The device, and for which batch and images it was measured, by which clock. TrainError for any other file."""
    try:
        stored = json.loads(path.read_text())
        device = cup.Device.from_dict(stored["device"])
        settings = {name: int(stored[name]) for name in ("batch_size", "image_size")}
        return device, settings | {"clock": {name: name for name in CLOCKS}[stored["clock"]]}
    except (OSError, ValueError, TypeError, KeyError, cup.CupError) as error:
        raise TrainError(f"--calibration {path}: found {error}, allowed: a result of bench.py cost") from error


def _print(name: str, plans: Mapping[str, Plan], target: float) -> None:
    for plan, one in plans.items():
        off = median(one.speed_ups) / target - 1
        print(
            f"| {name} | {plan} | {one.flops_reduction:.2f} | {one.modelled:.2f} | {with_spread(one.speed_ups)} | "
            f"{off:+.1%} |",
            flush=True,
        )
