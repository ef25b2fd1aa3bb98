"""A network as a checkpoint holds it, with or without a run around it."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

import cup
from cup import ChannelGroup, Complexity, CupError, PrunePlan
from train.checkpoint.file import CheckpointError, load_checkpoint, save_checkpoint
from train.checkpoint.weights import Weights, load_weights
from train.network.models import Architecture, build_model


@dataclass(frozen=True, eq=False)
class StoredNetwork:
    """A network as a checkpoint holds it, without what only training needs.

    architecture: the network before any cut. dense: its cost then.
    model: at the stored widths, on the CPU, with the weights that were evaluated (the moving average's, if any).
    plans: the cuts so far, in order.
    groups: the channel groups that they left, from which the next cut is planned, so that all of them can be replayed
        one after another; empty where there was none.
    config: the configuration of the run that trained it, as plain data; None for weights from elsewhere.
    gpu_hours: spent on these weights, runs before a cut included; None where unknown.
    """

    architecture: Architecture
    dense: Complexity
    model: nn.Module
    plans: tuple[PrunePlan, ...]
    groups: Sequence[ChannelGroup]
    config: dict[str, Any] | None
    gpu_hours: float | None


def save_network(path: Path, network: StoredNetwork, widths: dict[str, int]) -> None:
    """Write a network alone, as `save_checkpoint` does. widths: group -> channels, for readers of the file."""
    content = {
        "architecture": asdict(network.architecture),
        "config": network.config,
        "plans": plans_to_store(network.plans),
        "widths": widths,
        "gpu_hours": network.gpu_hours,
        "model": network.model.state_dict(),
        "ema": None,
    }
    save_checkpoint(path, content)


def load_network(path: Path) -> StoredNetwork:
    """Build the network of a checkpoint at its stored widths. Raises CheckpointError if the file's parts do not fit."""
    content = load_checkpoint(path)
    architecture = stored_architecture(content)
    model = build_model(architecture.name, architecture.num_classes)
    dense = cup.complexity(model, architecture.example_input())
    plans = stored_plans(content)
    try:
        # Only a network that was cut has to be one that can be traced.
        groups = cup.channel_groups(model, architecture.example_input()) if plans else []
        for plan in plans:
            groups = cup.apply_plan(model, plan, groups).groups
        load_weights(model, stored_weights(content))
    except (CupError, CheckpointError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return StoredNetwork(architecture, dense, model, tuple(plans), groups, content["config"], content["gpu_hours"])


def stored_architecture(content: dict[str, Any]) -> Architecture:
    """The network before any cut."""
    try:
        architecture = Architecture(**content["architecture"])
        numbers = (architecture.num_classes, *architecture.input_shape)
        if not isinstance(architecture.name, str) or [type(number) for number in numbers] != [int] * 4:
            raise TypeError(f"found {architecture}")
    except TypeError as error:
        raise CheckpointError(f"the stored network is not one of this version's: {error}") from error
    return architecture


def stored_plans(content: dict[str, Any]) -> list[PrunePlan]:
    """The plans that led to the stored widths, in order."""
    try:
        return [PrunePlan.from_json(text) for text in json.loads(content["plans"])]
    except (CupError, TypeError, KeyError, ValueError, AttributeError) as error:
        raise CheckpointError(f"the stored plans cannot be read: {type(error).__name__}: {error}") from error


def plans_to_store(plans: Sequence[PrunePlan]) -> str:
    return json.dumps([plan.to_json() for plan in plans])


def stored_weights(content: dict[str, Any]) -> Weights:
    """The weights that were evaluated: the moving average's where there is one."""
    if content["ema"] is None:
        return content["model"]
    prefix = "module."
    return {key.removeprefix(prefix): value for key, value in content["ema"].items() if key.startswith(prefix)}
