"""Weights as others publish them, and weights into a model."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from train.checkpoint.archive import CheckpointError, load_archive
from train.checkpoint.file import first_few
from train.files import open_regular

Weights = Mapping[str, torch.Tensor]


def read_weights_file(path: Path) -> Weights:
    """Weights as torchvision and timm publish them: name -> tensor, a .safetensors file or one of torch.save.

    One level of wrapping ("state_dict" or "model") and DDP's prefix "module." are taken off. Raises CheckpointError
    for anything else.
    """
    is_archive = path.suffix != ".safetensors"
    content = load_archive(path, "is no file of weights")[0] if is_archive else _load_safetensors(path)
    if isinstance(content, dict) and "format" in content and "plans" in content:
        raise CheckpointError(f"{path} is a checkpoint of this program, which names its network: no model name needed")
    for wrapping in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapping), dict):
            content = content[wrapping]
    if not isinstance(content, dict) or not content or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise CheckpointError(f"{path}: found no weights, allowed: names and tensors, as state_dict() gives them")
    wrapped = all(key.startswith("module.") for key in content)
    return {key.removeprefix("module.") if wrapped else key: tensor for key, tensor in content.items()}


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
    misfits = [f"{what}: {first_few(keys)}" for what, keys in found if keys]
    if misfits:
        raise CheckpointError(f"the weights do not fit {type(model).__name__}; {'; '.join(misfits)}")
    model.load_state_dict(weights, strict=False)


def _load_safetensors(path: Path) -> Weights:
    try:
        with open_regular(path):  # the library would read a device or a pipe for ever
            return load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"no file at {path}") from error
    except (SafetensorError, OSError, KeyError) as error:  # KeyError for a type of numbers that torch lacks
        raise CheckpointError(f"{path} is no safetensors file: {error}") from error
