"""The cost model against the clock: training steps of eight networks, dense and at random widths, on this device.

First the device is measured (train/network/calibration.py): that sees layers only, none of these networks. Then each
network's steps are timed, dense and random widths in turn, and compared with what the model says.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from scipy.stats import spearmanr

import cup
from cup.planning import round_up
from launch.benches.measure import machine, rounds_in_turn, write_result
from launch.benches.step import StepBench, add_batch_size, default_batch_size
from train.cli import positive_int
from train.errors import TrainError
from train.loop.config import TrainConfig
from train.loop.step import training_step
from train.network.calibration import measured_device
from train.network.precision import Precision
from train.network.state import TrainState
from train.world import open_world

NETWORKS = (
    *("resnet18", "resnet34", "resnet50", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "convnext_tiny"),
    "vgg16",
)
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models",
        nargs="*",
        default=NETWORKS,
        metavar="NAME",
        help="as in model.name (default: eight); none after it: the device alone is measured",
    )
    parser.add_argument("--widths", type=positive_int, default=20, metavar="N", help="random ones each (default: 20)")
    parser.add_argument(
        "--round-to",
        type=positive_int,
        default=1,
        metavar="N",
        help="of which the random widths are multiples; planners take those that pay on the device (default: 1)",
    )
    add_batch_size(parser)
    parser.add_argument("--image-size", type=positive_int, default=128, metavar="PIXELS", help="default: 128")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="default: fp32")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto = GPU if any")
    parser.add_argument("--rounds", type=positive_int, default=3, metavar="N", help="the fastest counts (default: 3)")
    parser.add_argument(
        "--clock",
        choices=tuple(CLOCKS),
        default="wall",
        help="processor = seconds of one thread of the processor, which other work does not stretch (default: wall)",
    )
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="FILE",
        help="an earlier --out: its device is taken, its networks are not run again",
    )


@dataclass(frozen=True)
class Row:
    """One network. timed_s, modelled_s: of a step, dense first. flops_reduction: at the same widths."""

    name: str
    timed_s: list[float]
    modelled_s: list[float]
    flops_reduction: list[float]

    @property
    def errors(self) -> list[float]:
        """Modelled over timed, less 1."""
        return [ours / clock - 1 for ours, clock in zip(self.modelled_s, self.timed_s, strict=True)]

    @property
    def rank_correlation(self) -> float:
        return float(spearmanr(self.timed_s, self.modelled_s).statistic) if len(self.timed_s) > 2 else 1.0

    @property
    def speed_up_errors(self) -> list[float]:
        """The same of the speed-up over the dense step, in which an error that all share is gone."""
        return [
            (self.modelled_s[0] / ours) / (self.timed_s[0] / clock) - 1
            for ours, clock in zip(self.modelled_s[1:], self.timed_s[1:], strict=True)
        ]


def measure(options: argparse.Namespace) -> None:
    """Measure, print the table, write the result after each network."""
    if options.clock == "processor":
        torch.set_num_threads(1)
    world = open_world(options.device)
    torch.backends.cudnn.benchmark = world.device.type == "cuda"  # as the trainer
    options.batch_size = options.batch_size or default_batch_size(world.device)
    names = ("batch_size", "image_size", "precision", "widths", "round_to", "clock")
    asked = {name: getattr(options, name) for name in names}
    device, rows = _earlier(options.resume, asked) if options.resume else (None, [])
    if device is None:
        precision = Precision(options.precision, world.device)
        clock = CLOCKS[options.clock]
        device = measured_device(precision, options.batch_size, options.image_size, world.device, clock, passes=3)
    _print_device(device)
    cost = cup.device_cost(device, batch_size=options.batch_size)
    what = {"benchmark": "cost: modelled against timed", **asked, "machine": machine("torchvision")}
    what["device"] = device.to_dict()
    if options.out:
        write_result(options.out, _content(what, rows))
    if options.models:
        print("| network | dense step (s) | modelled (s) | median error | of the speed-up | rank correlation |")
        print("|---|---:|---:|---:|---:|---:|", flush=True)
    for name in options.models:
        if all(row.name != name for row in rows):
            config = TrainConfig(precision=options.precision)
            rows.append(
                _row(StepBench(name, 1000, options.image_size, options.batch_size, config, world), cost, options)
            )
            _print_row(rows[-1])
            if options.out:
                write_result(options.out, _content(what, rows))
    if rows:
        _print_summary(rows)


def _content(what: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """Of the file: the device, even before any network was timed."""
    return {**what, "rows": [asdict(row) for row in rows], "summary": _summary(rows) if rows else {}}


def random_widths(groups: Sequence[cup.ChannelGroup], count: int, round_to: int) -> list[dict[str, int]]:
    """So many networks, of every group a quarter of its channels to all: by one share and by one of its own, mixed.

    Rounded up to the widths that `prune.round_to` allows.
    """
    rng = random.Random(0)
    allowed = {group.name: cup.PlanOptions(round_to=round_to).allowed_widths(group) for group in groups}
    networks = []
    for _ in range(count):
        common, mixing = rng.uniform(0.25, 1), rng.random()
        shares = {group.name: mixing * common + (1 - mixing) * rng.uniform(0.25, 1) for group in groups}
        wanted = {group.name: max(1, round(shares[group.name] * group.width)) for group in groups}
        networks.append({name: round_up(width, allowed[name]) for name, width in wanted.items()})
    return networks


def _row(bench: StepBench, cost: cup.DeviceCost, options: argparse.Namespace) -> Row:
    groups = cup.prunable_groups(bench.groups, "all")
    networks = [bench.dense_widths, *random_widths(groups, options.widths, options.round_to)]
    states = [bench.state(widths) for widths in networks]
    contenders = {str(index): turn_timer(bench, state, CLOCKS[options.clock]) for index, state in enumerate(states)}
    seconds = rounds_in_turn(contenders, options.rounds)
    modelled = cost.of(bench.model, bench.groups)
    return Row(
        bench.name,
        timed_s=[min(seconds[str(index)]) for index in range(len(networks))],
        modelled_s=[modelled.at(widths) for widths in networks],
        flops_reduction=[bench.dense.flops / bench.cost(widths).flops for widths in networks],
    )


def turn_timer(
    bench: StepBench, state: TrainState, clock: Callable[[], float] = time.perf_counter
) -> Callable[[], float]:
    """Seconds of one step of several in a row, after one that is not timed.

    oneDNN keeps the kernels of the last 1,024 shapes that it compiled: twenty other networks have had their turn since
    this one's, and each of its layers would be compiled anew (a ResNet-18's step then takes twice as long).
    """
    steps = 10 if bench.world.device.type == "cuda" else 3

    def seconds() -> float:
        training_step(state, bench.images, bench.labels, bench.config)
        bench.world.synchronize()
        start = clock()
        for _ in range(steps):
            training_step(state, bench.images, bench.labels, bench.config)
        bench.world.synchronize()
        return (clock() - start) / steps

    return seconds


def _earlier(path: Path, asked: Mapping[str, Any]) -> tuple[cup.Device, list[Row]]:
    """Device and rows of an earlier result that was asked for the same. Raises TrainError for any other file."""
    try:
        stored = json.loads(path.read_text())
        device, rows = cup.Device.from_dict(stored["device"]), [Row(**row) for row in stored["rows"]]
        found = {key: stored[key] for key in asked}
    except (OSError, ValueError, TypeError, KeyError, cup.CupError) as error:
        raise TrainError(f"--resume {path}: found {error}, allowed: a result of this benchmark") from error
    if found != asked:
        raise TrainError(f"--resume {path}: found {found}, asked for {dict(asked)}: give the same, or start anew")
    return device, rows


def _summary(rows: Sequence[Row]) -> dict[str, float]:
    timed = [seconds for row in rows for seconds in row.timed_s]
    modelled = [seconds for row in rows for seconds in row.modelled_s]
    return {
        "median_abs_error": median(abs(error) for row in rows for error in row.errors),
        "median_abs_error_of_speed_up": median([abs(error) for row in rows for error in row.speed_up_errors] or [0.0]),
        "rank_correlation": float(spearmanr(timed, modelled).statistic) if len(timed) > 2 else 1.0,
        "least_rank_correlation_within": min(row.rank_correlation for row in rows),
    }


def _print_device(device: cup.Device) -> None:
    print(
        f"{device.name}, {device.precision}: {device.source}; widths pay in multiples of {device.granularity}, "
        f"a launch takes {1e6 * device.launch_s:.1f} us"
    )
    for kernel, rate in device.rates.items():
        print(f"  {kernel:<22} {rate.flops_per_s / 1e9:12.1f} GFLOP/s {rate.bytes_per_s / 1e9:10.1f} GB/s")


def _print_row(row: Row) -> None:
    errors, of_speed_up = (median(map(abs, errors)) for errors in (row.errors, row.speed_up_errors or [0.0]))
    print(
        f"| {row.name} | {row.timed_s[0]:.3f} | {row.modelled_s[0]:.3f} | {errors:.1%} (mean "
        f"{sum(row.errors) / len(row.errors):+.1%}) | {of_speed_up:.1%} | {row.rank_correlation:.3f} |",
        flush=True,
    )


def _print_summary(rows: Sequence[Row]) -> None:
    found = _summary(rows)
    print(
        f"{sum(len(row.timed_s) for row in rows)} networks: median error {found['median_abs_error']:.1%}, of the "
        f"speed-up {found['median_abs_error_of_speed_up']:.1%}; rank correlation {found['rank_correlation']:.3f} over "
        f"all, at least {found['least_rank_correlation_within']:.3f} within one network"
    )
