"""Weights for a network by name: where they come from, under its own names, and of how many classes they are."""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from train.checkpoint.weights import Weights, fit_names, load_weights, read_weights_file
from train.errors import ConfigError
from train.network.models import Architecture, build_model
from train.network.own import is_factory
from train.network.published import Published, published, timm
from train.network.sources import HUB, TIMM, TORCHVISION, from_timm, from_torchvision

PROBE_CLASSES = 7
COUNTER = "num_batches_tracked"
"""Of batch norm; weights published before torch 0.4.1 do not have it."""


@dataclass(frozen=True, eq=False)
class GivenWeights:
    """What `model.weights` stands for.

    source: as configured. name: of the network. weights: under its own names. num_classes: that they tell apart; None
    where they hold no classifier.
    published: what is known of them; None where nothing is. note: what of a file was not taken; empty if all was.
    """

    source: str
    name: str
    weights: Weights
    num_classes: int | None
    published: Published | None
    note: str


def read_given(source: str, name: str | None) -> GivenWeights:
    """Read or fetch them. name: of the network, as configured; None where only the hub knows it.

    Raises TrainError where they cannot be had, ConfigError where the source is another network's.
    """
    note = ""
    if source.startswith(TORCHVISION):
        weights, known = from_torchvision(source)
    elif source.startswith((TIMM, HUB)):
        weights, known, name = from_timm(source, name)
    else:
        file = read_weights_file(Path(source))
        weights, known, note = file.weights, published(name, Path(source)), file.note
    weights, num_classes = fitted_weights(name, weights)
    return GivenWeights(source, name, weights, num_classes, known, note)


def start_from_weights(model: nn.Module, given: GivenWeights, architecture: Architecture) -> list[str]:
    """Load them into the full network, in place; a classifier for other classes stays as it is. Returns notes.

    Raises CheckpointError where they are another network's.
    """
    classes, notes = architecture.num_classes, [f"starts from {given.source}: {architecture.name}"]
    head = classifier_names(architecture.name, classes)
    is_new = given.num_classes != classes or not set(head) <= given.weights.keys()
    if is_new:
        there = f"{given.num_classes} classes" if set(head) & given.weights.keys() else "no classifier"
        notes.append(f"{given.source}: {there} there, {classes} classes here: {', '.join(head)} begin anew")
        fresh = model.state_dict()
        weights = OrderedDict(given.weights)
        weights.update({key: fresh[key] for key in head})
        if hasattr(given.weights, "_metadata"):
            weights._metadata = given.weights._metadata
        load_weights(model, weights)
    else:
        notes.append(f"{given.source}: its {classes} classes are taken to be those of the data, in its order")
        load_weights(model, given.weights)
    return [*notes, *filter(None, [given.note])]


def classifier_names(name: str, num_classes: int) -> list[str]:
    """Names of the weights whose shapes depend on the number of classes."""
    ours, others = shapes_of(name, num_classes), shapes_of(name, num_classes + 1)
    return [key for key, shape in ours.items() if shape != others[key]]


def fitted_weights(name: str, weights: Weights) -> tuple[Weights, int | None]:
    """The weights under the names that the network gives them today, and for how many classes they are.

    None for weights without a classifier. What does not fit stays as it is: `load_weights` names it. Raises
    ConfigError for an unknown network and where parts of the classifier are for different numbers of classes.
    """
    own = shapes_of(name, PROBE_CLASSES)
    weights = fit_names(weights, own)
    absent = own.keys() - weights.keys()
    if name.startswith("timm:") and any(not key.endswith(COUNTER) for key in absent):
        weights = _as_timm_reads(name.removeprefix("timm:"), weights)
    return weights, _classes_in(weights, own, classifier_names(name, PROBE_CLASSES))


def shapes_of(name: str, num_classes: int) -> dict[str, torch.Size]:
    """The names and shapes of a network's weights; takes no memory for them, where the network can be built so."""
    try:
        with torch.device("cpu" if is_factory(name) else "meta"):
            model = build_model(name, num_classes)
    except NotImplementedError:  # torchvision's RegNets compute their widths with tensors
        model = build_model(name, num_classes)
    return {key: tensor.shape for key, tensor in model.state_dict().items()}


def _as_timm_reads(name: str, weights: Weights) -> Weights:
    """What timm's own loader makes of them: it knows many models' original names and layouts."""
    try:
        return (
            timm()
            .create_model(name, pretrained=True, pretrained_cfg_overlay={"state_dict": dict(weights)})
            .state_dict()
        )
    except Exception:  # its filters raise many types for weights that they do not know
        return weights


def _classes_in(weights: Weights, own: dict[str, torch.Size], head: list[str]) -> int | None:
    """The number of classes that the weights tell apart: the one size in which they differ from a probing network's.

    None without any of the classifier's weights, whose names are `head`.
    """
    differing = {
        len(weights[key])
        for key, shape in own.items()
        if key in weights and _differ_in_rows(weights[key].shape, shape) and shape[0] == PROBE_CLASSES
    }
    if len(differing) > 1:
        raise ConfigError(f"the weights do not say how many classes they tell apart ({differing}): give --num-classes")
    if differing:
        return differing.pop()
    return PROBE_CLASSES if weights.keys() & set(head) else None


def _differ_in_rows(one: torch.Size, other: torch.Size) -> bool:
    return len(one) == len(other) > 0 and one[1:] == other[1:] and one[0] != other[0]
