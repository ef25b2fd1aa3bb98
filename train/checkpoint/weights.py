"""Weights as others publish them, and weights into a model."""

import re
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torchvision.models import DenseNet, GoogLeNet, Inception3, MNASNet

from train.checkpoint.archive import CheckpointError, load_foreign_archive
from train.checkpoint.file import first_few
from train.files import open_regular

Weights = Mapping[str, torch.Tensor]

# Under which training scripts store weights: torchvision's and timm's own, Lightning's, tutorials'.
OF_AVERAGE = ("model_ema", "state_dict_ema", "ema_state_dict", "ema")
OF_MODEL = ("state_dict", "model_state_dict", "model")
WITHIN_AVERAGE = ("module", "shadow")
MAX_WRAPPINGS = 4

WRAPPERS = ("module.", "model.", "net.")
"""What DDP and AveragedModel, and Lightning's modules put before every name. torch.compile's is `_orig_mod.`."""

AUXILIARY = {GoogLeNet: ("aux1.", "aux2."), Inception3: ("AuxLogits.",)}
"""Heads that only training has, in torchvision's recipe, and that our networks are built without."""

OLD_DENSE_LAYER = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..*)$")
"""Names in torchvision's published DenseNets, as its own loader knows them: a module's name can have no dot today."""


@dataclass(frozen=True)
class WeightsFile:
    """What was read. note: what was taken and what was not, in words for the user; empty for weights alone."""

    weights: Weights
    note: str = ""


def read_weights_file(path: Path) -> WeightsFile:
    """Weights as others publish them: a .safetensors file, or one of torch.save with weights or a training state.

    Of a training state the moving average is taken where there is one. Raises CheckpointError for anything else.
    """
    if path.suffix == ".safetensors":
        content, strange = _load_safetensors(path), []
    else:
        content, strange = load_foreign_archive(path)
    if isinstance(content, dict) and "format" in content and "plans" in content:
        raise CheckpointError(
            f"{path} is a checkpoint of this program, which names its network: no model name needed (in training it is "
            "model.checkpoint)"
        )
    found = _unwrapped(content)
    if found is None:
        raise CheckpointError(f"{path}: found no weights, allowed: names and tensors, as state_dict() gives them")
    weights, taken, left_out = found
    if not taken:
        return WeightsFile(weights)
    average = " (the moving average)" if taken[0] in OF_AVERAGE else ""
    unread = f", unread: {', '.join(strange)}" if strange else ""
    rest = f", left out: {', '.join(left_out)}" if left_out else ""
    return WeightsFile(weights, f"{path}: took {'.'.join(taken)}{average}{rest}{unread}")


def fit_names(weights: Weights, own: Collection[str]) -> Weights:
    """The weights without what wrappers put before their names, until some are among a network's `own` names."""
    weights = renamed(weights, lambda name: name.replace("_orig_mod.", ""))
    while not weights.keys() & set(own):
        prefix = next((one for one in WRAPPERS if any(name.startswith(one) for name in weights)), None)
        if prefix is None:
            break
        weights = without_prefix(weights, prefix)
    return weights


def without_prefix(weights: Weights, prefix: str) -> Weights:
    """Those of the weights whose names begin so, without it."""
    return renamed(weights, lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None)


def renamed(weights: Weights, rename: Callable[[str], str | None]) -> Weights:
    """The weights under other names, and the versions of their modules with them; None leaves one out."""
    named = OrderedDict((new, tensor) for name, tensor in weights.items() if (new := rename(name)) is not None)
    versions = getattr(weights, "_metadata", None)
    if isinstance(versions, dict):
        modules = {name: rename(f"{name}." if name else "") for name in versions}
        named._metadata = OrderedDict(
            (new.rstrip("."), versions[name]) for name, new in modules.items() if new is not None
        )
    return named


def load_weights(model: nn.Module, weights: Weights) -> None:
    """Copy `weights` into the model, in place, under names of today or as its library called them before.

    CheckpointError names the first tensors that do not fit.
    """
    own = model.state_dict()
    weights = _as_named_today(model, weights)
    reshaped = {key for key in own if key in weights and weights[key].shape != own[key].shape}
    fitting = renamed(weights, lambda name: None if name in reshaped else name)
    try:
        result = model.load_state_dict(with_versions(model, fitting), strict=False)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:  # what modules' own loaders raise
        raise CheckpointError(f"the weights do not fit {type(model).__name__}: {error}") from error
    # Weights published before torch 0.4.1 do not have this counter; no evaluation reads it.
    missing = [key for key in result.missing_keys if key not in reshaped and not key.endswith("num_batches_tracked")]
    shapes = [
        f"{key} {tuple(weights[key].shape)} in place of {tuple(own[key].shape)}" for key in own if key in reshaped
    ]
    found = (("missing", missing), ("unexpected", result.unexpected_keys), ("of another shape", shapes))
    misfits = [f"{what}: {first_few(keys)}" for what, keys in found if keys]
    if misfits:
        raise CheckpointError(f"the weights do not fit {type(model).__name__}; {'; '.join(misfits)}")


def with_versions(model: nn.Module, weights: Weights) -> Weights:
    """The weights as `load_state_dict` wants them: MNASNet insists on its version, which not every file keeps."""
    if hasattr(weights, "_metadata") or not any(isinstance(module, MNASNet) for module in model.modules()):
        return weights
    versioned = OrderedDict(weights)
    versioned._metadata = model.state_dict()._metadata
    return versioned


def _as_named_today(model: nn.Module, weights: Weights) -> Weights:
    auxiliary = AUXILIARY.get(type(model), ())

    def rename(name: str) -> str | None:
        if auxiliary and name.startswith(auxiliary):
            return None
        old = OLD_DENSE_LAYER.match(name) if isinstance(model, DenseNet) else None
        return old[1] + old[2] if old else name

    return renamed(weights, rename)


def _unwrapped(content: Any, taken: tuple[str, ...] = ()) -> tuple[Any, tuple[str, ...], list[str]] | None:
    """The innermost weights of a training state, the keys that lead to them, and what lies beside them.

    A key that leads to no weights is passed over. None where none does. taken: the keys that led here.
    """
    if not isinstance(content, dict):
        return None
    if len(taken) < MAX_WRAPPINGS:
        within = WITHIN_AVERAGE if taken and taken[-1] in OF_AVERAGE else ()
        for key in (*OF_AVERAGE, *OF_MODEL, *within):
            found = _unwrapped(content.get(key), (*taken, key))
            if found is not None:
                weights, keys, left_out = found
                return weights, keys, [*(str(name) for name in content if name != key), *left_out]
    return (content, taken, []) if content and _are_tensors(content) else None


def _are_tensors(weights: dict[Any, Any]) -> bool:
    return all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in weights.items())


def _load_safetensors(path: Path) -> Weights:
    try:
        with open_regular(path):  # the library would read a device or a pipe for ever
            return load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"no file at {path}") from error
    except (SafetensorError, OSError, KeyError) as error:  # KeyError for a type of numbers that torch lacks
        raise CheckpointError(f"{path} is no safetensors file: {error}") from error
