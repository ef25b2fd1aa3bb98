"""A network cut until one forward pass takes a given time: on a named device as modelled, here as measured."""

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
from train.network.calibration import measured_device
from train.network.models import build_model
from train.network.precision import Precision
from train.network.state import MEMORY_FORMAT
from train.prune import Cut

MIN_CALLS, MIN_SECONDS = 10, 1.0
"""A network is timed so often, and for so long, at least; the fastest pass counts."""


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
            cost = cup.device_cost(options.device, precision=precision_name, batch_size=batch, training=False)
            return Latency(options.latency, cost, None, None, None)
        if options.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device cuda: found no GPU here; allowed: cpu, or a name, whose time is modelled")
        here = torch.device(options.device)
        precision = Precision(precision_name, here)
        before_s = _timed(network, precision, here, batch)
        _check_target(options.latency, before_s)
        print("timing layers on this device, about half a minute", flush=True)
        device = measured_device(precision, batch, _input_shape(network)[-1], here)
        cost = cup.device_cost(device, batch_size=batch, training=False)
        return Latency(options.latency, cost, precision, here, before_s)


def latency_plan(
    latency: Latency,
    network: StoredNetwork,
    groups: Sequence[ChannelGroup],
    options: PlanOptions,
    drop_blocks: bool,
) -> PrunePlan:
    """The cut after which a forward pass takes the target. Where it can be timed, the model's share is what counts: by
    how much the network has to get faster than it was timed.

    drop_blocks: whether whole residual blocks may go, too.

    Raises ConfigError where the modelled time is below the target already, TrainError where no cut saves any time.
    """
    groups = _at_evaluation(network, groups)
    now_s = latency.cost.of(network.model, groups).now if latency.before_s is None else latency.before_s
    _check_target(latency.target_s, now_s)
    settings = {"cost": latency.cost, "drop_blocks": drop_blocks}
    plan = cup.plan_by_time(network.model, groups, now_s / latency.target_s, options, **settings)
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


def report_latency(latency: Latency, cut: Cut) -> str:
    """One line: what it takes now, modelled, and timed where the device is here."""
    cost, model = latency.cost, cut.network.model
    modelled = _in_ms(cost.of(model, _at_evaluation(cut.network, cut.network.groups)).now)
    what = (
        f"a forward pass of {cost.batch_size} at {_input_shape(cut.network)[-1]} pixels on {cost.device.name}, "
        f"{cost.device.precision}"
    )
    if latency.here is None:
        return f"{what}: {modelled} as modelled, {_in_ms(latency.target_s)} asked for"
    after_s = _timed(cut.network, latency.precision, latency.here, cost.batch_size)
    return (
        f"{what}: timed {_in_ms(latency.before_s)} before, {_in_ms(after_s)} now, {_in_ms(latency.target_s)} asked for "
        f"(modelled {modelled})"
    )


@torch.no_grad()
def _timed(network: StoredNetwork, precision: Precision, here: torch.device, batch: int) -> float:
    """Seconds of one forward pass in evaluation, the fastest of several."""
    model: nn.Module = copy.deepcopy(network.model).to(here, memory_format=MEMORY_FORMAT).eval()
    images = torch.randn(batch, *_input_shape(network), device=here).contiguous(memory_format=MEMORY_FORMAT)
    elapsed: list[float] = []
    while len(elapsed) < MIN_CALLS or sum(elapsed) < MIN_SECONDS:
        _wait(here)
        start = time.perf_counter()
        with precision.autocast():
            model(images)
        _wait(here)
        elapsed.append(time.perf_counter() - start)
    return min(elapsed)


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
