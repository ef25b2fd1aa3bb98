"""A network cut until one forward pass takes a given time: on a named device as modelled, here as timed."""

import argparse
import copy
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

import cup
from cup import ChannelGroup, PlanOptions, PrunePlan
from train.checkpoint.network import StoredNetwork
from train.errors import ConfigError, TrainError
from train.export.about import about
from train.network.calibration import known_device, measured_device
from train.network.models import build_model
from train.network.precision import Precision
from train.network.state import MEMORY_FORMAT
from train.prune import Cut

TURNS, TURN_SECONDS = 10, 0.1
"""Networks are timed in so many turns each, for so long at least; the fastest pass counts."""


def seconds(text: str) -> float:
    """The `type` of --latency: 12ms, 800us, 0.5s."""
    found = re.fullmatch(r"([0-9.]+)\s*(s|ms|us)", text.strip())
    try:
        number = float(found[1]) if found else 0.0
    except ValueError:
        number = 0.0
    if number <= 0:
        raise argparse.ArgumentTypeError(f"found {text!r}, allowed: a time as 12ms, 800us or 0.5s")
    return number * {"s": 1.0, "ms": 1e-3, "us": 1e-6}[found[2]]


@dataclass(frozen=True)
class Latency:
    """What a forward pass may take, and on what.

    cost: the model of one forward pass. here: the device that can be timed; None where it is only modelled.
    before_s: the network as it was, timed here.
    """

    target_s: float
    cost: cup.DeviceCost
    precision: Precision | None
    here: torch.device | None
    before_s: float | None

    @staticmethod
    def of(options: argparse.Namespace, network: StoredNetwork) -> "Latency":
        """On the device here: time the network, then layers for the model.

        Raises ConfigError for a device that is not here or a network that is as fast already, CupError for a precision
        that a named device lacks.
        """
        batch, precision_name = options.batch or 1, options.precision or "fp32"
        if options.device not in ("cpu", "cuda"):
            device = known_device(options.device, precision_name)
            cost = cup.device_cost(device, batch_size=batch, training=False)
            return Latency(options.latency, cost, None, None, None)
        if options.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device cuda: found no GPU here; allowed: cpu, or a name, whose time is modelled")
        here = torch.device(options.device)
        precision = Precision(precision_name, here)
        (before_s,) = _timed_in_turns([network.model], _input_shape(network), precision, here, batch)
        _check_target(options.latency, before_s)
        print("timing layers on this device, about half a minute", flush=True)
        device = measured_device(precision, batch, _input_shape(network)[-1], here)
        cost = cup.device_cost(device, batch_size=batch, training=False)
        return Latency(options.latency, cost, precision, here, before_s)

    def timed_in_turns(self, models: Sequence[nn.Module], network: StoredNetwork) -> list[float]:
        """Seconds of one forward pass of each, on the device here, of images as the network takes them."""
        return _timed_in_turns(models, _input_shape(network), self.precision, self.here, self.cost.batch_size)


def latency_plan(
    latency: Latency,
    network: StoredNetwork,
    groups: Sequence[ChannelGroup],
    options: PlanOptions,
    drop_blocks: bool,
) -> PrunePlan:
    """The cut after which a forward pass takes the target: as timed where the device is here (`cup.plan_by_clock`),
    else as modelled.

    drop_blocks: whether whole residual blocks may go, too.

    Raises ConfigError where the modelled time is below the target already, TrainError where no cut saves any time.
    """
    groups = _at_evaluation(network, groups)
    now_s = latency.cost.of(network.model, groups).now if latency.before_s is None else latency.before_s
    _check_target(latency.target_s, now_s)
    asked = (network.model, groups, now_s / latency.target_s, options)
    settings = {"cost": latency.cost, "drop_blocks": drop_blocks}
    if latency.here is None:
        plan = cup.plan_by_time(*asked, **settings)
    else:
        print("timing cuts on this device, each by 20 passes or more", flush=True)

        def speedup(cut: nn.Module) -> float:
            # Against the target and not the network beside it: a pass that was timed slow at first would ask for more.
            (cut_s,) = latency.timed_in_turns([cut], network)
            return now_s / cut_s

        plan = cup.plan_by_clock(*asked, **settings, speedup=speedup)
    if plan.changes_nothing:
        blocks = "" if drop_blocks else "; --drop-blocks lets whole blocks go"
        raise TrainError(
            f"no narrower width is faster on {latency.cost.device.name} (kernel launches bound it, or --scope, "
            f"--round-to and --min-channels allow none{blocks}); nothing was written"
        )
    return plan


def _check_target(target_s: float, now_s: float) -> None:
    if now_s <= target_s:
        raise ConfigError(
            f"--latency: found {_in_ms(target_s)}, but it takes {_in_ms(now_s)} already; allowed: below that"
        )


def report_latency(latency: Latency, cut: Cut, before: nn.Module) -> str:
    """One line: what it takes now, modelled, and timed where the device is here.

    before: the network's model before the cut.
    """
    cost, model = latency.cost, cut.network.model
    modelled = _in_ms(cost.of(model, _at_evaluation(cut.network, cut.network.groups)).now)
    what = (
        f"a forward pass of {cost.batch_size} at {_input_shape(cut.network)[-1]} pixels on {cost.device.name}, "
        f"{cost.device.precision}"
    )
    if latency.here is None:
        return f"{what}: {modelled} as modelled, {_in_ms(latency.target_s)} asked for"
    before_s, after_s = latency.timed_in_turns([before, model], cut.network)
    missed = f", missed by {after_s / latency.target_s - 1:.1%}" if after_s > latency.target_s else ""
    return (
        f"{what}: timed {_in_ms(before_s)} before, {_in_ms(after_s)} now, {_in_ms(latency.target_s)} asked for{missed} "
        f"(modelled {modelled})"
    )


@torch.no_grad()
def _timed_in_turns(
    models: Sequence[nn.Module], shape: tuple[int, ...], precision: Precision, here: torch.device, batch: int
) -> list[float]:
    """Seconds of one forward pass of each in evaluation, the fastest of several: the models are only read.

    They take turns, so that a machine that slows down slows all of them.
    """
    copies = [copy.deepcopy(model).to(here, memory_format=MEMORY_FORMAT).eval() for model in models]
    images = torch.randn(batch, *shape, device=here).contiguous(memory_format=MEMORY_FORMAT)

    def seconds_of_a_pass(model: nn.Module) -> float:
        _wait(here)
        start = time.perf_counter()
        with precision.autocast():
            model(images)
        _wait(here)
        return time.perf_counter() - start

    def turn(model: nn.Module) -> float:
        seconds_of_a_pass(model)  # caches hold the others' weights still
        elapsed = [seconds_of_a_pass(model)]
        while sum(elapsed) < TURN_SECONDS:
            elapsed.append(seconds_of_a_pass(model))
        return min(elapsed)

    turns = [[turn(model) for model in copies] for _ in range(TURNS)]
    return [min(own) for own in zip(*turns, strict=True)]


def _input_shape(network: StoredNetwork) -> tuple[int, ...]:
    """Of an image, as evaluation and exported files take it: training may have had smaller ones."""
    return about(network).input_size


def _at_evaluation(network: StoredNetwork, groups: Sequence[ChannelGroup]) -> Sequence[ChannelGroup]:
    """The groups, traced with images of that size: a cost is that of the size of the trace.

    From the full network on, as all cuts are planned: a trace of the cut one would free what a block had frozen before
    it was dropped.
    """
    shape, architecture = _input_shape(network), network.architecture
    if shape == tuple(architecture.input_shape):
        return groups
    full = build_model(architecture.name, architecture.num_classes, architecture.input_shape[-1])
    traced = cup.channel_groups(full, torch.zeros(1, *shape))
    for plan in network.plans:
        traced = cup.apply_plan(full, plan, traced).groups
    return traced


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _in_ms(value: float) -> str:
    return f"{1e3 * value:.3g} ms"
