"""GPU hours of a long training, dense and shrinking: a projection from step times measured on this device.

The widths are those of a real run, epoch by epoch. Its epochs are spread over the schedule in proportion: epoch j of E
has the widths of the run's epoch 1 + floor((j - 1) R / E), R being the epochs of the run. The hours are then

    for each stretch of epochs at equal widths: training steps x seconds of a step, validation batches x seconds of one,
    for each change of widths: a resize as the run measured it, and what the first step takes more than the others

A step of the whole batch counts as many steps of the measured one as there are images in it: the hours are those of one
device. With --compile blocks every stretch runs compiled, whatever train.compile_steps says. Not in it: all-reduce,
waiting for data, startup, checkpoints, a moving average and its evaluation. They come on top of the dense run's hours
as well as the shrinking one's.

With --device and a name of cup.DEVICES nothing is timed, and no run is read: savings_modelled.py.
"""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

import cup
from launch.benches.measure import machine, rounds_in_turn, write_result
from launch.benches.savings_modelled import measure_modelled
from launch.benches.step import (
    LOCAL,
    StepBench,
    Table,
    Widths,
    add_batch_size,
    add_device_arguments,
    default_batch_size,
    epochs_of_run,
    model_of_run,
    steps_at_once,
    tables,
)
from launch.projections.schedule import Costs, Schedule, Segment, hours, segments
from train.checkpoint.file import load_checkpoint
from train.checkpoint.network import stored_architecture
from train.cli import non_negative_int, positive_int
from train.errors import ConfigError, TrainError
from train.log.rundir import RunDir, read_log
from train.loop.config import TrainConfig
from train.world import open_world


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, metavar="DIR", help="the CUP-SS run whose widths are taken")
    parser.add_argument(
        "--images", type=positive_int, default=1281167, metavar="N", help="default: 1281167, ImageNet's"
    )
    parser.add_argument("--val-images", type=non_negative_int, default=50000, metavar="N", help="default: 50000")
    parser.add_argument("--epochs", type=positive_int, default=90, metavar="N", help="default: 90")
    parser.add_argument("--batch-size", type=positive_int, default=256, metavar="N", help="a step's (default: 256)")
    add_batch_size(parser, "--measure-batch-size")
    parser.add_argument("--classes", type=positive_int, metavar="N", help="default: those of the run's last.pt")
    parser.add_argument(
        "--keep-fr",
        action="store_true",
        help="project also with the run's FR brought back after rounding, all groups narrowed by one factor: about "
        "what a run with that round_to and the same target comes to",
    )
    parser.add_argument("--reduction", type=float, default=2.2, metavar="FR", help="of a named device (default: 2.2)")
    add_device_arguments(parser, (*LOCAL, *cup.DEVICES))


def measure(options: argparse.Namespace) -> None:
    """Measure, print the arithmetic and the table, write the result.

    Raises TrainError for a run that is not finished or never shrank.
    """
    if options.images < options.batch_size:
        raise ConfigError(f"--images: found {options.images}, allowed: from --batch-size ({options.batch_size})")
    if options.device not in LOCAL:
        if options.run is not None:
            raise ConfigError(f"--run: found {options.run}, allowed: none with --device {options.device}, for it plans")
        measure_modelled(options)
        return
    if options.run is None:
        raise ConfigError(f"--run: found none, allowed: a run's directory; or --device {', '.join(cup.DEVICES)}")
    lines = epochs_of_run(options.run)
    _check_path(options.run)
    world = open_world(options.device)
    torch.backends.cudnn.benchmark = world.device.type == "cuda"  # as the trainer
    name, classes = model_of_run(options.run), options.classes or _classes_of_run(options.run)
    config = TrainConfig(precision=options.precision, compile=options.compile)
    at_once = options.measure_batch_size or default_batch_size(world.device)
    bench = StepBench(name, classes, options.image_size, at_once, config, world)
    schedule = Schedule(options.epochs, options.images, options.val_images, options.batch_size, at_once)
    path = spread([line["widths"] for line in lines], options.epochs)
    allowed = tables(options.round_to, bench, path[0].keys())
    paths = {f"round_to {key}": [bench.rounded(widths, table) for widths in path] for key, table in allowed.items()}
    if options.keep_fr:
        for key, table in allowed.items():
            paths[f"round_to {key}, FR kept"] = [at_equal_reduction(bench, widths, table) for widths in path]
    paths = {"dense": [bench.dense_widths] * options.epochs, **paths}
    costs = _measured(bench, [widths for path in paths.values() for widths in path], options)
    resize_s = mean_resize_s(options.run)

    def projected(name: str, costs: Callable[[Widths], Costs]) -> list[Segment]:
        return segments(paths[name], costs, lambda w: bench.dense.flops / bench.cost(w).flops, schedule, resize_s)

    found = {name: projected(name, costs.medians) for name in paths}
    by_round = {name: [hours(projected(name, costs.of_round(r))) for r in range(options.rounds)] for name in paths}
    print(
        f"A projection, not a training: {bench.title}; {options.epochs} epochs of {options.images:,} images, "
        f"{options.val_images:,} to validate, widths of {options.run} ({len(lines)} epochs), {resize_s:.2f} s a resize"
    )
    for name, parts in found.items():
        _print_segments(name, parts)
    dense = found.pop("dense")
    rows = []
    for name, parts in found.items():
        savings = [100 * (1 - mine / full) for mine, full in zip(by_round[name], by_round["dense"], strict=True)]
        rows.append({**_row(name, parts, dense), "savings_by_round": savings})
    _print_rows(rows, dense)
    if options.out:
        content = {
            "benchmark": "savings: a projection from measured step times",
            "what": bench.title,
            "schedule": asdict(schedule),
            "run_epochs": len(lines),
            "resize_s": resize_s,
            "allowed_widths": allowed.get("measured"),
            "machine": machine("torchvision"),
            "rows": rows,
            "dense_hours": hours(dense),
            "segments": {name: [asdict(part) for part in parts] for name, parts in {"dense": dense, **found}.items()},
        }
        write_result(options.out, content)


def spread(path: Sequence[Widths], epochs: int) -> list[Widths]:
    """The widths of each of so many epochs: epoch j's are those of the run's epoch 1 + floor((j - 1) R / epochs)."""
    return [path[j * len(path) // epochs] for j in range(epochs)]


def at_equal_reduction(bench: StepBench, widths: Widths, table: Table) -> dict[str, int]:
    """Rounded widths near the FR of these: all groups narrowed by one factor before they are rounded up."""
    wanted = bench.cost(widths).flops
    low, high, nearest = 0.0, 1.0, bench.rounded(widths, table)
    for _ in range(30):
        factor = (low + high) / 2
        narrowed = bench.rounded({name: max(1, math.ceil(factor * width)) for name, width in widths.items()}, table)
        flops = bench.cost(narrowed).flops
        low, high = (factor, high) if flops <= wanted else (low, factor)
        if abs(flops - wanted) < abs(bench.cost(nearest).flops - wanted):
            nearest = narrowed
    return nearest


def mean_resize_s(run: Path) -> float:
    """Seconds of one resize as the run measured it, the mean; times its ranks, for all of them wait. 0 without any."""
    events = read_log(RunDir(run).log)
    ranks = next(event["world_size"] for event in events if event["event"] == "run")
    seconds = [event["seconds"] for event in events if event["event"] == "resize"]
    return ranks * mean(seconds) if seconds else 0.0


def _check_path(run: Path) -> None:
    """Only a run that shrank, and came to its end, has the widths of a whole schedule."""
    events = {event.get("event") for event in read_log(RunDir(run).log)}
    if "done" not in events:
        raise TrainError(f"{run} is not finished, so its widths are not those of a whole schedule: let it go on first")
    if "resize" not in events:
        raise TrainError(f"{run} never shrank, so there is nothing to project: take a run with prune.method hard_ramp")


def _classes_of_run(run: Path) -> int:
    return stored_architecture(load_checkpoint(RunDir(run).last)).num_classes


@dataclass(frozen=True)
class _Measured:
    """What was measured of each network, in every round. first_s: key -> seconds of the first step."""

    step_s: Mapping[str, list[float]]
    val_s: Mapping[str, list[float]]
    first_s: Mapping[str, float]

    def medians(self, widths: Widths) -> Costs:
        key = _key(widths)
        return Costs(median(self.step_s[key]), median(self.val_s[key]), self.first_s[key])

    def of_round(self, number: int) -> Callable[[Widths], Costs]:
        return lambda widths: Costs(
            self.step_s[_key(widths)][number], self.val_s[_key(widths)][number], self.first_s[_key(widths)]
        )


def _measured(bench: StepBench, networks: Sequence[Widths], options: argparse.Namespace) -> _Measured:
    """The costs of these widths, each network once, all of them in turn.

    So all of them are held at once: 8 bytes a parameter, weights and momentum (a full ResNet-50: 0.2 GB). Built anew
    for each round, they would have to make that first slow step each time, and to compile.
    """
    distinct = {_key(widths): widths for widths in networks}
    contenders: dict[str, Callable[[], float]] = {}
    first_s: dict[str, float] = {}
    steps = steps_at_once(bench.world)
    for key, widths in distinct.items():
        state = bench.state(widths)
        first_s[key] = bench.step_timer(state)()
        contenders[f"step {key}"] = bench.step_timer(state, steps)
        contenders[f"val {key}"] = bench.forward_timer(state, steps)
    seconds = rounds_in_turn(contenders, options.rounds)
    return _Measured(
        step_s={key: seconds[f"step {key}"] for key in distinct},
        val_s={key: seconds[f"val {key}"] for key in distinct},
        first_s=first_s,
    )


def _key(widths: Widths) -> str:
    return " ".join(f"{name}:{width}" for name, width in sorted(widths.items()))


def _row(name: str, parts: Sequence[Segment], dense: Sequence[Segment]) -> dict[str, Any]:
    """What a way of rounding saves in percent, and step by step what becomes of that which its FLOPs promise."""
    last, dense_step_s = parts[-1], dense[0].step_s
    steps = sum(part.steps for part in parts)
    in_steps = sum(part.steps * part.step_s for part in parts) / (steps * dense_step_s)
    return {
        "widths": name,
        "final_flops_reduction": last.flops_reduction,
        "final_speed_up": dense_step_s / last.step_s,
        "saving_if_time_were_flops": 100 * (1 - 1 / last.flops_reduction),
        "saving_at_the_final_step": 100 * (1 - last.step_s / dense_step_s),
        "saving_in_steps": 100 * (1 - in_steps),
        "saving": 100 * (1 - hours(parts) / hours(dense)),
        "hours": hours(parts),
    }


def _print_segments(name: str, parts: Sequence[Segment]) -> None:
    """The arithmetic, line by line."""
    print(name)
    for part in parts:
        print(
            f"  epochs {part.first:>3} to {part.last:>3}  FR {part.flops_reduction:4.2f}  "
            f"{part.step_s:.4f} s x {part.steps} steps + {part.val_s:.4f} s x {part.val_steps} validation batches "
            f"+ {part.resize_s:.2f} s to resize and warm up = {part.hours:.2f} h"
        )
    print(f"  together {hours(parts):.2f} h")


def _print_rows(rows: Sequence[Mapping[str, Any]], dense: Sequence[Segment]) -> None:
    print(f"projected hours of one device; dense {hours(dense):.2f}. Saving in percent of it:")
    print("  | widths | final FR | speed-up there | hours | saving (spread) | FLOPs promise | final step | with ramp |")
    print("  |---|---:|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        lowest, highest = min(row["savings_by_round"]), max(row["savings_by_round"])
        numbers = [row["saving_if_time_were_flops"], row["saving_at_the_final_step"], row["saving_in_steps"]]
        print(
            f"  | {row['widths']} | {row['final_flops_reduction']:.2f} | {row['final_speed_up']:.2f} | "
            f"{row['hours']:.2f} | {row['saving']:.1f} ({lowest:.1f} to {highest:.1f}) | "
            f"{' | '.join(f'{number:.1f}' for number in numbers)} |"
        )
    print(
        "  FLOPs promise: if time followed FLOPs and all epochs had the final widths; final step: at its measured "
        "time; with ramp: the epochs before it counted as they are; saving: with evaluation, resizes and warm-up"
    )
