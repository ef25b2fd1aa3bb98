"""Training steps: a network dense and at given widths, and our loop beside a bare PyTorch loop.

What is timed is the trainer's own step on one device: forward, backward, optimizer, gradients cleared; batches are
made, so nothing waits for a disk. The widths come from a run's log, from a file, or from a plan to a FLOPs reduction.
"""

import argparse
import functools
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.amp import GradScaler
from torch.optim import SGD

import cup
from cup.planning import round_up
from cup.tracing.groups import alive_after
from data import DataConfig, Loader, build_loaders
from launch.benches.measure import machine, rounds_in_turn, summary, timed, with_spread, write_result
from train.cli import positive_int
from train.errors import ConfigError, TrainError
from train.log.ledger import Ledger
from train.log.rundir import RunDir, read_log
from train.log.sinks import ConsoleSink
from train.loop.config import TrainConfig
from train.loop.engine import train_epoch
from train.loop.mixing import build_mixing
from train.loop.progress import EpochSoFar
from train.loop.step import training_step
from train.loop.trainer import TrainLoop
from train.loop.watch import Watch
from train.methods import Dense
from train.network.compiling import repeated_blocks
from train.network.models import build_model, native_input_shape
from train.network.optim import OptimConfig, build_optimizer
from train.network.precision import Precision
from train.network.state import MEMORY_FORMAT, TrainState
from train.network.widths import measured_widths
from train.prune import read_counts
from train.world import World, open_world

RoundTo = int | str
Table = int | dict[str, list[int]]
Widths = Mapping[str, int]

LOCAL = ("auto", "cpu", "cuda")
"""Devices that can be timed."""

OUR_LOOP, BARE_LOOP, TORCHVISION_LOOP = "our train_epoch", "bare PyTorch loop", "torchvision-style loop"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="NAME", help="as in model.name (default: that of --run, else resnet50)")
    widths = parser.add_mutually_exclusive_group()
    widths.add_argument("--run", type=Path, metavar="DIR", help="the widths after each resize of this run")
    widths.add_argument("--widths", type=Path, metavar="FILE", help="JSON or YAML: `layer1.0.conv1: 12`")
    widths.add_argument("--reduction", type=float, metavar="FR", help="a plan to this FLOPs reduction, fresh weights")
    add_device_arguments(parser)
    add_batch_size(parser)
    parser.add_argument("--classes", type=positive_int, default=1000, metavar="N", help="default: 1000")
    parser.add_argument("--steps", type=positive_int, metavar="N", help="a measurement (default: 1; 20 on a GPU)")


def add_device_arguments(parser: argparse.ArgumentParser, devices: Sequence[str] = LOCAL) -> None:
    """What `step` and `savings` have in common: how a step is made and measured, and on which devices."""
    parser.add_argument(
        "--round-to",
        type=round_to,
        nargs="+",
        default=[1],
        metavar="N",
        help="widths, rounded up; `measured` as in prune.round_to; several are shown beside each other (default: 1)",
    )
    parser.add_argument(
        "--image-size", type=positive_int, metavar="PIXELS", help="default: what the network is made for"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="default: fp32")
    parser.add_argument(
        "--compile", choices=("none", "blocks"), default="none", help="as train.compile (default: none)"
    )
    parser.add_argument("--device", choices=devices, default="auto", help="auto = GPU if any")
    parser.add_argument("--rounds", type=positive_int, default=5, metavar="N", help="after a warm-up (default: 5)")


def add_batch_size(parser: argparse.ArgumentParser, name: str = "--batch-size") -> None:
    """Images of a step on one device; `default_batch_size` says how many, if not given."""
    parser.add_argument(name, type=positive_int, metavar="N", help="images at once (default: 256 on a GPU, 8 on a CPU)")


def default_batch_size(device: torch.device) -> int:
    """What a GPU is trained with, whose launches a smaller batch would time; what a CPU does in seconds."""
    return 256 if device.type == "cuda" else 8


def round_to(text: str) -> RoundTo:
    """The `type` of --round-to."""
    return text if text == "measured" else positive_int(text)


def measure(options: argparse.Namespace) -> None:
    """Measure, print the tables, write the result."""
    world = open_world(options.device)
    torch.backends.cudnn.benchmark = world.device.type == "cuda"  # as the trainer
    steps = options.steps or steps_at_once(world)
    bench = StepBench(
        options.model or (model_of_run(options.run) if options.run else "resnet50"),
        options.classes,
        options.image_size,
        options.batch_size or default_batch_size(world.device),
        TrainConfig(precision=options.precision, compile=options.compile),
        world,
    )
    networks = {"dense": bench.dense_widths, **_networks(options, bench)}
    states = {name: bench.state(widths) for name, widths in networks.items()}
    contenders = {name: bench.step_timer(state, steps) for name, state in states.items()}
    loops = _Loops(bench, steps)
    contenders |= {OUR_LOOP: loops.ours, BARE_LOOP: loops.bare, TORCHVISION_LOOP: loops.torchvision_style}
    contenders |= {"matmul": bench.matmul_seconds, "copy": bench.copy_seconds}
    seconds = rounds_in_turn(contenders, options.rounds)
    loops.close()

    rates = bench.rates(min(seconds["matmul"]), min(seconds["copy"]))
    print(f"{bench.title}, {options.rounds} rounds of {steps} step(s): median (spread)")
    rows = []
    for name, widths in networks.items():
        rows.append(bench.row(name, widths, seconds[name], seconds["dense"], rates))
        print_row(rows[-1], bench.batch_size)
    print("loops, dense network: seconds a step, median (spread); over the bare loop")
    over = {name: ratios(seconds[name], seconds[BARE_LOOP]) for name in (OUR_LOOP, TORCHVISION_LOOP)}
    for name in (OUR_LOOP, BARE_LOOP, TORCHVISION_LOOP):
        more = f"  {with_spread([100 * (ratio - 1) for ratio in over[name]], digits=2)} %" if name in over else ""
        print(f"  {name:<24} {with_spread(seconds[name], digits=4)}{more}")
    print(
        f"this device: {rates.flops_per_s / 1e12:.3f} TFLOP/s in a large matrix product ({options.precision}), "
        f"{rates.bytes_per_s / 1e9:.1f} GB/s in a large copy"
    )
    if options.out:
        content = {
            "benchmark": f"step, {bench.title}",
            "machine": machine("torchvision"),
            "networks": rows,
            "loops_s": {name: summary(seconds[name]) for name in (OUR_LOOP, BARE_LOOP, TORCHVISION_LOOP)},
            "over_bare_loop": {name: summary(values) for name, values in over.items()},
            "matmul_flops_per_s": rates.flops_per_s,
            "copy_bytes_per_s": rates.bytes_per_s,
        }
        write_result(options.out, content)


def steps_at_once(world: World) -> int:
    """How many steps one measurement takes: on a GPU so many that its queue is full, as training keeps it."""
    return 20 if world.device.type == "cuda" else 1


@dataclass(frozen=True)
class Rates:
    """What this device reaches: floating point operations a second of a matrix product, bytes a second of a copy."""

    flops_per_s: float
    bytes_per_s: float


class StepBench:
    """Builds networks at given widths and times the trainer's step on them, one device, made batches."""

    def __init__(
        self, name: str, classes: int, image_size: int | None, batch_size: int, config: TrainConfig, world: World
    ) -> None:
        """config: its precision and `compile` count; compiled are all networks, however few steps they make here."""
        channels, side, _ = native_input_shape(name)
        self.name, self.classes, self.batch_size, self.world = name, classes, batch_size, world
        self.config = config
        self.shape = (channels, image_size or side, image_size or side)
        self.example = torch.zeros(1, *self.shape)
        model = build_model(name, classes)
        self.groups = cup.channel_groups(model, self.example)
        self.dense = cup.complexity(model, self.example)
        self.model = model
        made = {"generator": torch.Generator(world.device).manual_seed(0), "device": world.device}
        self.images = torch.randn(batch_size, *self.shape, **made).contiguous(memory_format=MEMORY_FORMAT)
        self.labels = torch.randint(classes, (batch_size,), **made)
        self._compiled = 0

    @property
    def title(self) -> str:
        device = torch.cuda.get_device_name() if self.world.device.type == "cuda" else "CPU"
        side = self.shape[1]
        how = self.config.precision + (", compiled blocks" if self.config.compile == "blocks" else "")
        what = f"{self.name}, {self.classes} classes, batch {self.batch_size}, {side} x {side} pixels"
        return f"{what}, {how}, {device}"

    @property
    def dense_widths(self) -> dict[str, int]:
        return {group.name: group.width for group in cup.prunable_groups(self.groups, "all")}

    def measured(self, names: Collection[str]) -> dict[str, list[int]]:
        """The allowed widths that `prune.round_to: measured` would find here for these groups."""
        groups = [group for group in self.groups if group.name in names]
        table, scattered = measured_widths(self.model, groups, self.batch_size, self._precision(), self.world.device)
        if scattered:
            print(f"round_to measured is unsure: the times of {len(scattered)} of {len(groups)} layers do not repeat")
        return table

    def rounded(self, widths: Widths, round_to: Table) -> dict[str, int]:
        """These widths rounded up as a planner would, and those of all other groups that may shrink.

        Raises ConfigError where they are not this network's.
        """
        options = cup.PlanOptions(round_to=round_to)
        groups = {group.name: group for group in self.groups}
        for name, width in widths.items():
            if name not in groups:
                raise ConfigError(f"{self.name} has no channel group {name!r}: are these another network's widths?")
            if not 1 <= width <= groups[name].width:
                raise ConfigError(
                    f"{self.name}, {name}: found width {width}, allowed: 1 to {groups[name].width}; are these another "
                    "network's widths?"
                )
        rounded = {name: round_up(width, options.allowed_widths(groups[name])) for name, width in widths.items()}
        return self.dense_widths | rounded

    def state(self, widths: Widths, compiled: bool = True) -> TrainState:
        """A fresh network at these widths, as the trainer holds it. compiled: False leaves its blocks eager."""
        model = build_model(self.name, self.classes)
        cup.shrink_to(model, widths, self.example)
        return self.state_of(model, compiled)

    def state_of(self, model: nn.Module, compiled: bool = True) -> TrainState:
        """This network as the trainer holds it; the model is changed in place."""
        model.to(self.world.device, memory_format=MEMORY_FORMAT).train()
        if compiled and self.config.compile == "blocks":
            self._compile(model)
        return TrainState(model, model, build_optimizer(model, OptimConfig()), self._precision())

    def step_timer(self, state: TrainState, steps: int = 1) -> Callable[[], float]:
        """A contender: seconds of one training step, the mean of so many."""

        def run() -> None:
            for _ in range(steps):
                training_step(state, self.images, self.labels, self.config)

        return lambda: timed(run, self.world) / steps

    def forward_timer(self, state: TrainState, batches: int = 1) -> Callable[[], float]:
        """A contender: seconds of one batch of an evaluation, the mean of so many."""

        def run() -> None:
            state.model.eval()
            eagerly = torch.compiler.set_stance("force_eager")  # as the trainer evaluates
            with torch.no_grad(), state.precision.autocast(), eagerly:
                for _ in range(batches):
                    state.model(self.images)
            state.model.train()

        return lambda: timed(run, self.world) / batches

    def cost(self, widths: Widths) -> cup.Complexity:
        """FLOPs, MACs and parameters at these widths, by arithmetic."""
        kept = {name: tuple(range(width)) for name, width in widths.items()}
        plan = cup.PrunePlan(kept, {group.name: group.width for group in self.groups if group.name in widths})
        return cup.complexity_after(self.model, self.groups, plan, self.dense)

    def row(self, name: str, widths: Widths, seconds: list[float], dense: list[float], rates: Rates) -> dict[str, Any]:
        """One line of the table as plain data."""
        cost = self.cost(widths)
        reduction = self.dense.flops / cost.flops
        speed_up = ratios(dense, seconds)
        step_s = summary(seconds)["median"]
        # Backward costs twice the forward pass: once for the weights, once for what the layer before it needs.
        return {
            "name": name,
            "flops_reduction": reduction,
            "macs": cost.macs,
            "params": cost.params,
            "step_s": summary(seconds),
            "images_per_s": self.batch_size / step_s,
            "speed_up": summary(speed_up),
            "speed_up_over_fr": summary(speed_up)["median"] / reduction,
            "share_of_matmul": 6 * cost.macs * self.batch_size / step_s / rates.flops_per_s,
            "share_of_copy": self._bytes(widths) / step_s / rates.bytes_per_s,
            "widths": dict(widths),
        }

    # --- what the device can do ---

    def matmul_seconds(self) -> float:
        """Seconds of one large matrix product in the run's precision."""
        one = self._matrix
        return timed(lambda: [one @ one for _ in range(self._repeats)], self.world) / self._repeats

    def copy_seconds(self) -> float:
        """Seconds of one large copy on the device."""
        one, other = self._buffers
        return timed(lambda: [other.copy_(one) for _ in range(self._repeats)], self.world) / self._repeats

    def rates(self, matmul_s: float, copy_s: float) -> Rates:
        return Rates(2 * len(self._matrix) ** 3 / matmul_s, 2 * self._buffers[0].nbytes / copy_s)

    @property
    def _repeats(self) -> int:
        return 20 if self.world.device.type == "cuda" else 1

    @functools.cached_property
    def _matrix(self) -> torch.Tensor:
        side = 8192 if self.world.device.type == "cuda" else 1024
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.config.precision]
        return torch.randn(side, side, device=self.world.device).to(dtype)

    @functools.cached_property
    def _buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Two that no cache holds."""
        mib = 1024 if self.world.device.type == "cuda" else 128
        one = torch.ones(mib << 20, dtype=torch.uint8, device=self.world.device)
        return one, one.clone()

    def _bytes(self, widths: Widths) -> int:
        """What a step moves at least if each layer of the trace is a kernel of its own.

        Forward reads the input and writes the output; backward reads the output's gradient and the input and writes the
        input's gradient; the optimizer reads weight, gradient and momentum and writes weight and momentum, in fp32.
        """
        alive = alive_after(self.groups, {name: range(width) for name, width in widths.items()})
        elements = 0
        for call in self.groups[0].network.calls:
            for shape, channels, times in ((call.input_shape, call.reads, 3), (call.output_shape, call.writes, 2)):
                share = 1.0 if channels is None else alive[channels].mean()
                elements += times * int(torch.Size(shape).numel() * share)
        size = 4 if self.config.precision == "fp32" else 2
        return elements * self.batch_size * size + 5 * 4 * self.cost(widths).params

    def _precision(self) -> Precision:
        return Precision(self.config.precision, self.world.device)

    def _compile(self, model: nn.Module) -> None:
        """As the trainer does. Blocks of all networks share code, and torch counts what it compiles by code."""
        blocks = repeated_blocks(model)
        if not blocks:
            raise ConfigError(f"--compile: found blocks, but {self.name} has none that repeat; allowed for it: none")
        self._compiled += len(blocks)
        for limit in ("recompile_limit", "accumulated_recompile_limit"):
            setattr(torch._dynamo.config, limit, max(getattr(torch._dynamo.config, limit), 2 * self._compiled))
        for block in blocks:
            block.compile(fullgraph=True, dynamic=False)


class _Loops:
    """An epoch of so many steps in our loop and in two that know nothing of ours; each method gives seconds a step.

    All of them run eagerly, for it is the loops that are compared.
    """

    def __init__(self, bench: StepBench, steps: int) -> None:
        self.bench, self.world = bench, bench.world
        try:
            self.config = DataConfig(
                loader="synthetic",
                batch_size=bench.batch_size,
                channels=bench.shape[0],
                image_size=bench.shape[1],
                resize_size=bench.shape[1],
                synthetic_images=max(4, bench.batch_size * steps),
                synthetic_classes=max(2, bench.classes),
            )
        except ValueError as error:
            raise ConfigError(f"no batches can be made for it: {error}") from error
        self.epochs: Counter[str] = Counter()
        self.loop = self._loop()
        self.console, self.watch = ConsoleSink(), Watch(self.world, lambda: False)
        self.steps = len(self.loop.loader)
        self.networks = {memory_format: self._network(memory_format) for memory_format in (MEMORY_FORMAT, None)}

    def ours(self) -> float:
        epoch = self._next_epoch(OUR_LOOP)
        so_far = EpochSoFar.beginning(self.loop.ledger, self.world.device)

        def after_step() -> None:
            self.console.progress("epoch", so_far.step, self.steps)
            self.watch.step(lambda: not bool(torch.isfinite(so_far.loss_sum)))

        def run() -> None:
            self.watch.restart()
            train_epoch(self.loop, epoch, so_far, after_step=after_step)

        return timed(run, self.world) / self.steps

    def bare(self) -> float:
        """What anybody would write for the same work: the same memory format, precision and fused SGD."""
        epoch = self._next_epoch(BARE_LOOP)
        return timed(lambda: self._plain_epoch(MEMORY_FORMAT, epoch), self.world) / self.steps

    def torchvision_style(self) -> float:
        """As torchvision's references/classification: default memory format, SGD as torch chooses."""
        epoch = self._next_epoch(TORCHVISION_LOOP)
        return timed(lambda: self._plain_epoch(None, epoch), self.world) / self.steps

    def close(self) -> None:
        self.console.close()

    def _next_epoch(self, loop: str) -> int:
        """From 1; a loader goes on where it was left, so each loop has its own and every epoch is a new one."""
        self.epochs[loop] += 1
        return self.epochs[loop]

    def _loaders(self) -> list[Loader]:
        return build_loaders(self.config, rank=0, world_size=1, device=self.world.device, seed=0)

    def _loop(self) -> TrainLoop:
        return TrainLoop(
            config=TrainConfig(epochs=1, precision=self.bench.config.precision),
            optim=OptimConfig(),
            world=self.world,
            loader=self._loaders()[0],
            mix=build_mixing(0.0, 0.0, self.bench.classes),
            state=self.bench.state({}, compiled=False),
            method=Dense(),
            ledger=Ledger(),
        )

    def _network(self, memory_format: torch.memory_format | None) -> tuple[nn.Module, SGD, GradScaler, Loader]:
        model = build_model(self.bench.name, self.bench.classes)
        model.to(self.world.device, memory_format=memory_format).train()
        fused = True if memory_format is not None else None
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, fused=fused)
        scaler = GradScaler(self.world.device.type, enabled=self.bench.config.precision == "fp16")
        return model, optimizer, scaler, self._loaders()[0]

    def _plain_epoch(self, memory_format: torch.memory_format | None, epoch: int) -> None:
        model, optimizer, scaler, loader = self.networks[memory_format]
        device, precision = self.world.device.type, self.bench.config.precision
        dtype = torch.float16 if precision == "fp16" else torch.bfloat16
        loader.go_to(epoch - 1)
        for images, labels, _ in loader:
            if memory_format is not None:
                images = images.contiguous(memory_format=memory_format)
            with torch.autocast(device, dtype=dtype, enabled=precision != "fp32"):
                loss = F.cross_entropy(model(images), labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)


def ratios(ones: list[float], others: list[float]) -> list[float]:
    """One over the other, round by round: what slows a round down slows both."""
    return [one / other for one, other in zip(ones, others, strict=True)]


def print_row(row: Mapping[str, Any], batch_size: int) -> None:
    step_s, speed_up = row["step_s"], row["speed_up"]
    print(
        f"  {row['name']:<40} FR {row['flops_reduction']:5.2f}  step {with_spread(step_s['runs'])} s  "
        f"{row['images_per_s']:8.1f} images/s  speed-up {with_spread(speed_up['runs'], digits=2)}, "
        f"of FR {row['speed_up_over_fr']:.2f}  matmul {row['share_of_matmul']:.0%}  copy {row['share_of_copy']:.0%}"
    )


def model_of_run(run: Path) -> str:
    """The network that a run trains. TrainError where its log does not say."""
    first = next((event for event in read_log(RunDir(run).log) if event.get("event") == "run"), None)
    if first is None:
        raise TrainError(f"{run}/log.jsonl: no line of the event `run`, which names the network: is this a run?")
    return first["model"]


def epochs_of_run(run: Path) -> list[dict[str, Any]]:
    """The epoch lines of a run, in order. TrainError where there is none."""
    epochs = [event for event in read_log(RunDir(run).log) if event.get("event") == "epoch"]
    if not epochs:
        raise TrainError(f"{run}/log.jsonl holds no epoch: let the run finish one first")
    return epochs


def tables(round_tos: Sequence[RoundTo], bench: StepBench, names: Collection[str]) -> dict[RoundTo, Table]:
    """What a planner takes, for each --round-to; `measured` measures these groups here."""
    return {found: bench.measured(names) if found == "measured" else found for found in round_tos}


def _networks(options: argparse.Namespace, bench: StepBench) -> dict[str, dict[str, int]]:
    """Name -> widths, every network once; those that come out dense are left out."""
    asked = _widths_asked_for(options)
    names = {name for widths in asked.values() for name in widths}
    inner = {group.name for group in cup.prunable_groups(bench.groups)}
    networks: dict[str, dict[str, int]] = {}
    for found, table in tables(options.round_to, bench, names or inner).items():
        paths = {name: bench.rounded(widths, table) for name, widths in asked.items()}
        if options.reduction:
            plan = cup.plan_by_reduction(bench.model, bench.groups, options.reduction, cup.PlanOptions(round_to=table))
            if plan.note:
                print(f"--reduction {options.reduction:g}, round_to {found}: {plan.note}")
            paths = {f"planned to FR {options.reduction:g}": bench.rounded(plan.new_widths, 1)}
        for name, widths in paths.items():
            if widths not in (bench.dense_widths, *networks.values()):
                networks[name + ("" if found == 1 else f", round_to {found}")] = widths
    return networks


def _widths_asked_for(options: argparse.Namespace) -> dict[str, dict[str, int]]:
    """Name -> widths of a run or a file, before they are rounded up."""
    if options.run:
        return {f"from epoch {event['epoch']}": event["widths"] for event in epochs_of_run(options.run)}
    return {options.widths.name: read_counts(options.widths)} if options.widths else {}
