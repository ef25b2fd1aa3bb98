"""Checkpoints: written whole or not at all, read without executing anything.

One file holds, in the order in which they are needed: which network it is and the plans so far (they rebuild its
shape), then tensors and the state of everything that has some. A run writes all of it (saving.py); what
launch/prune.py writes is a network alone: no optimizer, and no configuration where no run trained it.

The file is torch.save's zip archive with a checksum as the archive's comment (`unzip -z last.pt` shows it): a file of
its own could be lost or outlive its checkpoint. It is verified before anything is unpickled.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

import cup
from cup import ChannelGroup, Complexity, CupError, PrunePlan
from train.errors import TrainError
from train.network.models import Architecture, build_model

FORMAT = 3
COMMENT = re.compile(rb"sha256:([0-9a-f]{64})")
COMMENT_BYTES = 71

Weights = Mapping[str, torch.Tensor]

# What every checkpoint holds, a run's and a network's alone; a file without was made or changed by something else.
NETWORK_PARTS = {
    "architecture": dict,
    "config": dict | None,
    "plans": str,
    "gpu_hours": float | int | None,
    "model": dict,
    "ema": dict | None,
}


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


def save_checkpoint(path: Path, content: dict[str, Any], keep: int = 1) -> None:
    """Write `content` (tensors and plain data) to `path`: a crash or a full disk leaves the old file or the new one.

    keep: how many checkpoints stay, this one included; those before it are NAME-1.pt (the newest of them), NAME-2.pt.
    Raises CheckpointError if the file cannot be written.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        with temporary.open("wb") as file:
            _write(file, {"format": FORMAT, **content})
            file.flush()
            os.fsync(file.fileno())
        for number in range(keep - 1, 0, -1):  # between two of these a crash leaves a gap, which a resume steps over
            if (younger := earlier_checkpoint(path, number - 1)).exists():
                younger.replace(earlier_checkpoint(path, number))
        temporary.replace(path)
        _sync_directory(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise CheckpointError(f"could not write {path}: {error}; the file before it, if any, is untouched") from error


def earlier_checkpoint(path: Path, number: int) -> Path:
    """The checkpoint that `path` was `number` saves ago: last.pt, last-1.pt, last-2.pt."""
    return path.with_name(f"{path.stem}-{number}{path.suffix}") if number else path


def newest_checkpoint(path: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest of `path` and those before it that can be read; None where there is none at all.

    Also returns the newer ones, and why they cannot, in words for the user. Raises CheckpointError if none of them can.
    """
    numbered = re.compile(rf"{re.escape(path.stem)}-([1-9]\d*){re.escape(path.suffix)}")
    matches = (numbered.fullmatch(file.name) for file in path.parent.glob("*"))
    numbers = [0, *sorted(int(match[1]) for match in matches if match)]
    found = [file for number in numbers if (file := earlier_checkpoint(path, number)).exists()]
    damaged: dict[Path, str] = {}
    for file in found:
        try:
            load_checkpoint(file)
        except CheckpointError as error:
            damaged[file] = str(error)
        else:
            return file, damaged
    if damaged:
        raise CheckpointError("; ".join(damaged.values()))
    return None, {}


def put_aside(damaged: Sequence[Path]) -> None:
    """Rename damaged checkpoints to NAME.damaged: among the others they would push a good one out at the next save."""
    for path in damaged:
        try:
            path.replace(path.with_name(path.name + ".damaged"))
        except OSError as error:
            raise CheckpointError(f"{path} is damaged and cannot be renamed: {error}") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, tensors and plain data only (`weights_only`), after its checksum.

    Raises CheckpointError if it is damaged, another program's or another version's.
    """
    content = _load(path, "is damaged or no checkpoint of this program")
    if not isinstance(content, dict) or "format" not in content:
        raise CheckpointError(f"{path} is no checkpoint of this program; launch/prune.py takes weights with --weights")
    if content["format"] != FORMAT:
        raise CheckpointError(f"{path}: found format {content['format']!r}, allowed: {FORMAT}, this version's own")
    wrong = [key for key, kind in NETWORK_PARTS.items() if key not in content or not isinstance(content[key], kind)]
    wrong += [key for key in ("model", "ema") if not _are_tensors(content.get(key) or {})]
    if wrong:
        raise CheckpointError(f"{path} is no checkpoint of this program: {_first_few(wrong)} missing or not as written")
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


def _are_tensors(weights: Any) -> bool:
    """Whether these are names and tensors, as state_dict() gives them."""
    named = weights.items() if isinstance(weights, Mapping) else [(None, None)]
    return all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in named)


def _write(file: BinaryIO, content: dict[str, Any]) -> None:
    """The archive, and behind it its comment: the checksum of the archive as it was without."""
    hashing = _Hashing(file)
    torch.save(content, hashing)
    comment = b"sha256:" + hashing.digest.hexdigest().encode()
    file.seek(-2, os.SEEK_END)  # a zip archive ends with its comment's length, here still 0, and the comment
    file.write(len(comment).to_bytes(2, "little") + comment)


class _Hashing:
    """A file to write to that keeps the checksum of what it was given."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def _is_intact(path: Path) -> bool:
    """Whether the checksum agrees; what has none (torch.save's own files) is left to torch.load."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - COMMENT_BYTES))
        stored = COMMENT.fullmatch(file.read())
        if stored is None:
            return True
        file.seek(0)
        digest, left = hashlib.sha256(), size - COMMENT_BYTES - 2
        while left > 0 and (block := file.read(min(left, 1 << 22))):
            digest.update(block)
            left -= len(block)
    digest.update(b"\0\0")
    return digest.hexdigest().encode() == stored[1]


def _sync_directory(path: Path) -> None:
    """Make the new name as lasting as the file's content."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _load(path: Path, otherwise: str) -> Any:
    try:
        if not _is_intact(path):
            raise CheckpointError(f"{path} is damaged: its content does not have the checksum that it was written with")
        return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
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
