"""Checkpoints: written whole or not at all, read without executing anything.

One file holds, in the order in which they are needed: which network it is and the plans so far (they rebuild its
shape), then tensors and the state of everything that has some. A run writes all of it (train/run.py); what
launch/prune.py writes is a network alone: no optimizer, and no configuration where no run trained it.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

import cup
from cup import ChannelGroup, Complexity, CupError, PrunePlan
from train.errors import TrainError
from train.models import Architecture, build_model

FORMAT = 2

Weights = Mapping[str, torch.Tensor]


class CheckpointError(TrainError):
    """A checkpoint that cannot be read or does not belong here."""


@dataclass(frozen=True, eq=False)
class StoredNetwork:
    """A network as a checkpoint holds it, without what only training needs.

    architecture: the network before any cut. dense: its cost then.
    model: at the stored widths, on the CPU, with the weights that were evaluated (the moving average's, if any).
    plans: the cuts so far, in order.
    groups: the channel groups that they left, from which the next cut is planned, so that all of them can be replayed
        one after another; empty where there was none.
    config: the configuration of the run that trained it, as plain data; None for weights from elsewhere.
    gpu_hours: spent on these weights, runs before a cut included; None where nobody knows.
    """

    architecture: Architecture
    dense: Complexity
    model: nn.Module
    plans: tuple[PrunePlan, ...]
    groups: Sequence[ChannelGroup]
    config: dict[str, Any] | None
    gpu_hours: float | None


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write `content` (tensors and plain data) to `path` in one step: a crash leaves the old file or the new one."""
    temporary = path.with_name(path.name + ".part")
    try:
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"could not write {path}: {error}; the file before it, if any, is untouched") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, tensors and plain data only (`weights_only`)."""
    content = _load(path, "is damaged or no checkpoint of this program")
    if not isinstance(content, dict) or "format" not in content:
        raise CheckpointError(f"{path} is no checkpoint of this program; launch/prune.py takes weights with --weights")
    if content["format"] != FORMAT:
        raise CheckpointError(f"{path}: found format {content['format']!r}, allowed: {FORMAT}, this version's own")
    return content


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
    return Architecture(**content["architecture"])


def stored_plans(content: dict[str, Any]) -> list[PrunePlan]:
    """The plans that led to the stored widths, in order."""
    return [PrunePlan.from_json(text) for text in json.loads(content["plans"])]


def plans_to_store(plans: Sequence[PrunePlan]) -> str:
    return json.dumps([plan.to_json() for plan in plans])


def stored_weights(content: dict[str, Any]) -> Weights:
    """The weights that were evaluated: the moving average's where there is one."""
    if content["ema"] is None:
        return content["model"]
    prefix = "module."
    return {key.removeprefix(prefix): value for key, value in content["ema"].items() if key.startswith(prefix)}


def load_weights(model: nn.Module, weights: Weights) -> None:
    """Copy `weights` into the model, in place. CheckpointError names the first tensors that do not fit."""
    own = model.state_dict()
    # Weights published before torch 0.4.1 do not have this counter; no evaluation reads it.
    missing = [key for key in own if key not in weights and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in weights if key not in own]
    reshaped = [
        f"{key} {tuple(weights[key].shape)} in place of {tuple(own[key].shape)}"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    found = (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
    misfits = [f"{what}: {_first_few(keys)}" for what, keys in found if keys]
    if misfits:
        raise CheckpointError(f"the weights do not fit {type(model).__name__}; {'; '.join(misfits)}")
    model.load_state_dict(weights, strict=False)


def read_weights_file(path: Path) -> Weights:
    """Weights as torchvision and timm publish them: name -> tensor, a .safetensors file or one of torch.save.

    One level of wrapping ("state_dict" or "model") and DDP's prefix "module." are taken off. Raises CheckpointError
    for anything else.
    """
    content = _load_safetensors(path) if path.suffix == ".safetensors" else _load(path, "is no file of weights")
    if isinstance(content, dict) and "format" in content and "plans" in content:
        raise CheckpointError(f"{path} is a checkpoint of this program, which names its network: no model name needed")
    for wrapping in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapping), dict):
            content = content[wrapping]
    if not isinstance(content, dict) or not content or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise CheckpointError(f"{path}: found no weights, allowed: names and tensors, as state_dict() gives them")
    wrapped = all(key.startswith("module.") for key in content)
    return {key.removeprefix("module.") if wrapped else key: tensor for key, tensor in content.items()}


def _load(path: Path, otherwise: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"no file at {path}") from error
    except Exception as error:  # torch.load raises many types for a file that is damaged or not its own
        raise CheckpointError(f"{path} {otherwise}; nothing in it was run") from error


def _load_safetensors(path: Path) -> Weights:
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"no file at {path}") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}") from error


def _first_few(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
