"""Checkpoints: written whole or not at all, read without executing anything.

One file holds, in the order in which they are needed: the configuration and the plans so far (they rebuild the
network's shape from its name), then tensors and the state of everything that has some.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

import cup
from cup import CupError, PrunePlan
from train.errors import TrainError

FORMAT = 1


class CheckpointError(TrainError):
    """A checkpoint that cannot be read or does not belong here."""


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
        raise CheckpointError(f"could not write {path}: {error}; the file before it, if any, is untouched") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, tensors and plain data only (`weights_only`)."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"no checkpoint at {path}") from error
    except Exception as error:  # torch.load raises many types for a file that is damaged or not its own
        raise CheckpointError(f"{path} is damaged or no checkpoint of this program; nothing in it was run") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{path}: found format {found!r}, allowed: {FORMAT}")
    return content


def stored_plans(content: dict[str, Any]) -> list[PrunePlan]:
    """The plans that led to the stored widths, in order."""
    return [PrunePlan.from_json(text) for text in json.loads(content["plans"])]


def plans_to_store(plans: list[PrunePlan]) -> str:
    return json.dumps([plan.to_json() for plan in plans])


def load_network(model: nn.Module, content: dict[str, Any], example_input: torch.Tensor) -> None:
    """Shrink a full-width `model` to the stored widths and load the stored weights, EMA's where there are some."""
    try:
        groups = cup.channel_groups(model, example_input)
        for plan in stored_plans(content):
            groups = cup.apply_plan(model, plan, groups).groups
        model.load_state_dict(_weights(content))
    except (CupError, RuntimeError) as error:
        raise CheckpointError(f"the stored weights do not fit {type(model).__name__}: {error}") from error


def _weights(content: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights that were evaluated: the moving average's where there is one."""
    if content["ema"] is None:
        return content["model"]
    prefix = "module."
    return {key.removeprefix(prefix): value for key, value in content["ema"].items() if key.startswith(prefix)}
