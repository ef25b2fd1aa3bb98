"""Modelled step times of a network on named devices: dense, the paper's plan, and the planner that saves time.

Nothing is timed. At one FLOPs reduction stand side by side: the paper's (inner groups, one height), all groups narrowed
by one factor, and the time planner's, whose speed-up is looked for that has this FLOPs reduction on the device.
"""

import argparse
from collections.abc import Mapping
from typing import Any

import torch

import cup
from launch.benches.measure import write_result
from launch.projections.network import Network
from train.cli import positive_int
from train.network.models import build_model, native_input_shape


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="resnet50", metavar="NAME", help="as in model.name (default: resnet50)")
    parser.add_argument("--classes", type=positive_int, default=1000, metavar="N", help="default: 1000")
    parser.add_argument("--reduction", type=float, default=2.2, metavar="FR", help="FLOPs reduction (default: 2.2)")
    parser.add_argument("--batch-size", type=positive_int, default=256, metavar="N", help="default: 256")
    parser.add_argument("--devices", nargs="+", choices=tuple(cup.DEVICES), default=tuple(cup.DEVICES), metavar="NAME")
    parser.add_argument("--arithmetic", action="store_true", help="print the seconds of each kind of kernel, too")


def measure(options: argparse.Namespace) -> None:
    """Print the table, write the result."""
    torch.manual_seed(0)
    model = build_model(options.model, options.classes)
    network = Network.of(model, native_input_shape(options.model))
    inner = cup.plan_by_reduction(model, network.groups, options.reduction, cup.PlanOptions(round_to=8)).new_widths
    everywhere = cup.uniform_widths_at(
        cup.View(model, network.groups, network.dense, network.dense),
        options.reduction,
        cup.PlanOptions(scope="all", round_to=8),
    )
    rows = []
    print(
        f"modelled, not measured: a training step of {options.model}, batch {options.batch_size}, "
        f"{network.shape[-1]} pixels; times over the dense step, all plans at FR {options.reduction:g}"
    )
    print("| device | | dense, images/s | inner groups, one height | all groups, one factor | time planner | its FR |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for name in options.devices:
        precision = next(one for one in ("bf16", "fp16", "fp32") if one in cup.DEVICES[name].matrix)
        for fused in (False, True):
            cost = cup.device_cost(name, precision=precision, batch_size=options.batch_size, fused=fused)
            timed = plan_at_reduction(network, options.reduction, cost)
            seconds = cost.of(model, network.groups)
            rows.append(_row(network, seconds, cost, {"inner": inner, "one factor": everywhere, "time planner": timed}))
            _print_row(rows[-1], options.batch_size)
            if options.arithmetic:
                _print_arithmetic(seconds, timed)
    if options.out:
        write_result(options.out, {"benchmark": "devices: modelled step times", "rows": rows})


def plan_at_reduction(network: Network, reduction: float, cost: cup.DeviceCost) -> dict[str, int]:
    """The time planner's widths at the speed-up whose plan is the nearest to this FLOPs reduction."""
    # Ranked once for all speed-ups: only widths are asked for, not which channels.
    options = cup.PlanOptions(scope="all", criterion="l2", sequential=False)
    low, high, best = 1.0, 2 * reduction, {group.name: group.width for group in network.groups}
    for _ in range(12):
        target = (low + high) / 2
        widths = cup.plan_by_time(network.model, network.groups, target, options, cost=cost).new_widths
        found = network.reduction(widths)
        low, high = (target, high) if found < reduction else (low, target)
        best = min(best, widths, key=lambda one: abs(network.reduction(one) - reduction))
    return best


def _row(
    network: Network, seconds: cup.StepSeconds, cost: cup.DeviceCost, plans: Mapping[str, Mapping[str, int]]
) -> dict[str, Any]:
    return {
        "device": cost.device.name,
        "precision": cost.device.precision,
        "fused": cost.fused,
        "dense_s": seconds.now,
        "step_ratio": {name: seconds.at(widths) / seconds.now for name, widths in plans.items()},
        "flops_reduction": {name: network.reduction(widths) for name, widths in plans.items()},
        "widths": dict(plans["time planner"]),
    }


def _print_row(row: Mapping[str, Any], batch_size: int) -> None:
    how = f"{row['precision']}, {'fused' if row['fused'] else 'eager'}"
    ratios = " | ".join(f"{ratio:.3f}" for ratio in row["step_ratio"].values())
    images = batch_size / row["dense_s"]
    found = row["flops_reduction"]["time planner"]
    print(f"| {row['device']} | {how} | {images:,.0f} | {ratios} | {found:.2f} |", flush=True)


def _print_arithmetic(seconds: cup.StepSeconds, widths: Mapping[str, int]) -> None:
    dense, after = seconds.by_kind({}), seconds.by_kind(widths)
    for kind in sorted(dense, key=dense.get, reverse=True):
        print(f"    {kind:<20} {1e3 * dense[kind]:8.2f} ms -> {1e3 * after[kind]:8.2f} ms")
    print(f"    {'together':<20} {1e3 * sum(dense.values()):8.2f} ms -> {1e3 * sum(after.values()):8.2f} ms")
