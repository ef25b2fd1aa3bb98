"""A network as a checkpoint holds it, with or without a run around it."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

from torch import nn

import cup
from cup import ChannelGroup, Complexity, CupError, PrunePlan
from data import Preprocessing
from data.batch import MAX_PIXELS
from train.checkpoint.archive import CheckpointError
from train.checkpoint.file import load_checkpoint, save_checkpoint
from train.checkpoint.weights import Weights, load_weights, without_prefix
from train.network.models import Architecture, build_model
from train.network.own import is_factory
from train.schema import first_misfit, fits


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
    classes: their names, in the order of the logits; None where unknown.
    top1: exact accuracy of these weights in the run that wrote them, percent; None where they were not evaluated in it.
    preprocessing: the images that the weights want; None where unknown.
    """

    architecture: Architecture
    dense: Complexity
    model: nn.Module
    plans: tuple[PrunePlan, ...]
    groups: Sequence[ChannelGroup]
    config: dict[str, Any] | None
    gpu_hours: float | None
    classes: Sequence[str] | None = None
    top1: float | None = None
    preprocessing: Preprocessing | None = None


def save_network(path: Path, network: StoredNetwork, widths: dict[str, int]) -> None:
    """Write a network alone, as `save_checkpoint` does. widths: group -> channels, for readers of the file."""
    content = {
        "architecture": asdict(network.architecture),
        "config": network.config,
        "classes": network.classes and list(network.classes),
        "preprocessing": network.preprocessing and asdict(network.preprocessing),
        "plans": plans_to_store(network.plans),
        "widths": widths,
        "gpu_hours": network.gpu_hours,
        "model": network.model.state_dict(),
        "ema": None,
    }
    save_checkpoint(path, content)


def load_network(path: Path, factory: str | None = None) -> StoredNetwork:
    """Build the network of a checkpoint at its stored widths.

    factory: the `package.module:factory` that may be imported for it. Raises CheckpointError if the file's parts do not
    fit, or if it names another factory.
    """
    content = load_checkpoint(path)
    try:
        refuse_pruning_net(content)
        architecture = stored_architecture(content)
        _require_trusted(architecture.name, factory)
        model = build_model(architecture.name, architecture.num_classes, architecture.input_shape[-1])
        dense = cup.complexity(model, architecture.example_input())
        plans = stored_plans(content)
        preprocessing = stored_preprocessing(content)
        # Only a network that was cut has to be one that can be traced.
        groups = cup.channel_groups(model, architecture.example_input()) if plans else []
        for plan in plans:
            groups = cup.apply_plan(model, plan, groups).groups
        load_weights(model, stored_weights(content))
    except (CupError, CheckpointError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return StoredNetwork(
        architecture,
        dense,
        model,
        tuple(plans),
        groups,
        config=content["config"],
        gpu_hours=content["gpu_hours"],
        classes=content["classes"],
        top1=_stored_top1(content),
        preprocessing=preprocessing,
    )


def _require_trusted(name: str, factory: str | None) -> None:
    """Raises CheckpointError for a network whose code nobody but the file asked for, and for another than was asked."""
    if factory is None and is_factory(name):
        raise CheckpointError(f"holds {name}, whose code is not in the file: give --model {name} to have it imported")
    if factory not in (None, name):
        raise CheckpointError(f"holds {name}, not {factory}, as --model says")


def stored_architecture(content: dict[str, Any]) -> Architecture:
    """The network before any cut. Raises CheckpointError for one that is not as written, or too large for its weights.

    To build a network takes memory and time that nothing but these numbers decide.
    """
    stored = content["architecture"]
    kinds = {"name": str, "num_classes": int, "input_shape": list[range(1, MAX_PIXELS + 1)]}
    if stored.keys() != kinds.keys() or first_misfit(stored, kinds) or len(stored["input_shape"]) != 3:
        raise CheckpointError(f"the stored network is not one of this version's: found {str(stored)[:200]}")
    classes, names = stored["num_classes"], content["classes"]
    said = f"the stored network is said to tell {classes} classes apart"
    if not any(len(weight) == classes for weight in content["model"].values() if weight.dim() > 0):
        raise CheckpointError(f"{said}, and no weight is for so many")
    if names is not None and len(names) != classes:
        raise CheckpointError(f"{said}, but names {len(names)}")
    return Architecture(name=stored["name"], num_classes=classes, input_shape=tuple(stored["input_shape"]))


def stored_preprocessing(content: dict[str, Any]) -> Preprocessing | None:
    """The images that the weights want; None where the file does not say. CheckpointError for what no run writes."""
    stored = content["preprocessing"]
    if stored is None:
        return None
    sides = range(1, MAX_PIXELS + 1)
    kinds = get_type_hints(Preprocessing) | dict.fromkeys(("image_size", "resize_size"), sides)
    wrong = stored.keys() != kinds.keys() or first_misfit(stored, kinds) is not None
    wrong = wrong or (stored["val_size"] is not None and stored["val_size"] not in sides)
    if wrong or len(stored["mean"]) != len(stored["std"]) or not all(value > 0 for value in stored["std"]):
        raise CheckpointError(f"the stored preprocessing is not as any run writes it: found {str(stored)[:200]}")
    return Preprocessing(**stored | {name: tuple(stored[name]) for name in ("mean", "std")})


def stored_plans(content: dict[str, Any]) -> list[PrunePlan]:
    """The plans that led to the stored widths, in order."""
    try:
        return [PrunePlan.from_json(text) for text in json.loads(content["plans"])]
    except (CupError, TypeError, KeyError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"the stored plans cannot be read: {type(error).__name__}: {error}") from error


def plans_to_store(plans: Sequence[PrunePlan]) -> str:
    return json.dumps([plan.to_json() for plan in plans])


def holds_pruning_net(content: dict[str, Any]) -> bool:
    """Whether a run of MetaPruning's first stage wrote it, so that its weights are those of a PruningNet."""
    method = content.get("method")
    return isinstance(method, dict) and method.get("name") == "meta_pruning"


def refuse_pruning_net(content: dict[str, Any]) -> None:
    """CheckpointError for a PruningNet, which is no network of its own."""
    if holds_pruning_net(content):
        raise CheckpointError("it holds a PruningNet, in which launch/search.py finds widths for model.widths")


def stored_weights(content: dict[str, Any]) -> Weights:
    """The weights that were evaluated: the moving average's where there is one."""
    if content["ema"] is None:
        return content["model"]
    return without_prefix(content["ema"], "module.")


def _stored_top1(content: dict[str, Any]) -> float | None:
    """Of the weights as they are: in the middle of an epoch nobody has evaluated them."""
    try:
        top1 = content["progress"]["last_line"]["top1"] if content["ranks"][0]["so_far"] is None else None
    except (KeyError, IndexError, TypeError):  # a network alone, or not as a run writes it
        return None
    return top1 if fits(top1, float | None) else None
