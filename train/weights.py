"""Weights for a network by name: under its own names, and of how many classes they are."""

import torch

from train.checkpoint.weights import Weights, fit_names
from train.errors import ConfigError
from train.network.models import build_model
from train.network.published import timm

PROBE_CLASSES = 7
COUNTER = "num_batches_tracked"
"""Of batch norm; weights published before torch 0.4.1 do not have it."""


def fitted_weights(name: str, weights: Weights) -> tuple[Weights, int]:
    """The weights under the names that the network gives them today, and for how many classes they are.

    What does not fit stays as it is: `load_weights` names it. Raises ConfigError for an unknown network and where the
    number of classes cannot be told.
    """
    own = shapes_of(name, PROBE_CLASSES)
    weights = fit_names(weights, own)
    absent = own.keys() - weights.keys()
    if name.startswith("timm:") and any(not key.endswith(COUNTER) for key in absent):
        weights = _as_timm_reads(name.removeprefix("timm:"), weights)
    return weights, _classes_in(weights, own)


def shapes_of(name: str, num_classes: int) -> dict[str, torch.Size]:
    """The names and shapes of a network's weights; takes no memory for them, where the network can be built so."""
    try:
        with torch.device("meta"):
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


def _classes_in(weights: Weights, own: dict[str, torch.Size]) -> int:
    """The number of classes that the weights tell apart: the one size in which they differ from a probing network's."""
    differing = {
        len(weights[key])
        for key, shape in own.items()
        if key in weights and _differ_in_rows(weights[key].shape, shape) and shape[0] == PROBE_CLASSES
    }
    if len(differing) > 1:
        raise ConfigError(f"the weights do not say how many classes they tell apart ({differing}): give --num-classes")
    return differing.pop() if differing else PROBE_CLASSES


def _differ_in_rows(one: torch.Size, other: torch.Size) -> bool:
    return len(one) == len(other) > 0 and one[1:] == other[1:] and one[0] != other[0]
