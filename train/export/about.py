"""What every exported form says of its network: classes, images, licence, cost."""

import dataclasses
import json
from collections.abc import Mapping
from typing import get_args

from cup import Complexity, CupError, SavedNetwork
from data import Preprocessing
from data.batch import NORMALISATION, Interpolation
from train.checkpoint.network import StoredNetwork
from train.errors import TrainError
from train.preprocessing import own_preprocessing, usual_preprocessing

CROP_MODES = {"shorter": "center", "both": "squash", "longer": "border"}
"""`Preprocessing.resized_side` in timm's words."""

COSTS = ("flops", "macs", "params")
"""What a file's metadata holds of `Complexity`."""


def about(network: StoredNetwork, image_size: int | None = None, licence: str | None = None) -> SavedNetwork:
    """What is known of a network that is to be exported.

    image_size: of its images, pixels, in place of that which it was validated with.
    """
    channels = network.architecture.input_shape[0]
    own = _preprocessing(network, image_size)
    cut = {name for plan in network.plans for name in plan.removed}
    return SavedNetwork(
        name=network.architecture.name,
        num_classes=network.architecture.num_classes,
        widths={group.name: group.width for group in network.groups if group.name in cut},
        dropped=[name for plan in network.plans for name in plan.dropped],
        input_size=(channels, own.image_size, own.image_size),
        classes=network.classes,
        licence=licence,
        resize_size=own.resize_size,
        crop_mode=CROP_MODES[own.resized_side],
        interpolation=own.interpolation,
        mean=own.mean,
        std=own.std,
    )


def to_metadata(saved: SavedNetwork, cost: Complexity) -> dict[str, str]:
    """Field -> JSON, as ONNX files and exported programs hold it. cost: of one image of that size."""
    known = {name: value for name, value in dataclasses.asdict(saved).items() if value is not None}
    return {name: json.dumps(value) for name, value in (known | {name: getattr(cost, name) for name in COSTS}).items()}


def from_metadata(metadata: Mapping[str, str]) -> tuple[SavedNetwork | None, dict[str, int]]:
    """What `to_metadata` wrote: the network, and its cost; (None, {}) for a file of others.

    Raises TrainError for metadata that is like ours, and is not.
    """
    fields = [field.name for field in dataclasses.fields(SavedNetwork)]
    if not {"name", "num_classes", "input_size", "widths", *COSTS} <= metadata.keys():
        return None, {}
    try:
        values = {name: json.loads(metadata[name]) for name in (*fields, *COSTS) if name in metadata}
        cost = {name: int(values.pop(name)) for name in COSTS}
        tuples = {name: tuple(values[name]) for name in ("input_size", "mean", "std")}
        return SavedNetwork(**values | tuples), cost
    except (CupError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise TrainError(f"its metadata is not as launch/export.py writes it: {error}") from error


def preprocessing_of_saved(saved: SavedNetwork) -> Preprocessing:
    """The images that a saved network wants, in our words. Raises TrainError for images that no loader makes."""
    channels, height, width = saved.input_size
    if channels not in NORMALISATION or height != width:
        raise TrainError(
            f"input_size: found {saved.input_size}, allowed: 1 or 3 channels, height equal to width, in evaluation"
        )
    if saved.interpolation not in get_args(Interpolation):
        raise TrainError(
            f"interpolation: found {saved.interpolation[:100]!r}, allowed in evaluation: "
            f"{' or '.join(get_args(Interpolation))}"
        )
    [resized_side] = [side for side, mode in CROP_MODES.items() if mode == saved.crop_mode]
    return Preprocessing(
        image_size=saved.input_size[-1],
        resize_size=saved.resize_size,
        resized_side=resized_side,
        interpolation=saved.interpolation,
        mean=saved.mean,
        std=saved.std,
    )


def _preprocessing(network: StoredNetwork, image_size: int | None) -> Preprocessing:
    """What the weights want of an image, of the side that is asked for or else their own. The one place that knows."""
    own, _ = own_preprocessing(network.architecture, network.preprocessing, "the checkpoint")
    own = own or usual_preprocessing(network.architecture.input_shape)
    return own.validation if image_size is None else own.at_size(image_size)
