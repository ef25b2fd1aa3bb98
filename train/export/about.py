"""What every exported form says of its network: classes, images, licence, cost."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from cup import Complexity, CupError, SavedNetwork
from data.batch import NORMALISATION
from train.checkpoint.network import StoredNetwork
from train.errors import TrainError

COSTS = ("flops", "macs", "params")
"""What a file's metadata holds of `Complexity`."""


def about(network: StoredNetwork, image_size: int | None = None, licence: str | None = None) -> SavedNetwork:
    """What is known of a network that is to be exported. image_size: of its images in place of its own, pixels."""
    channels, height, width = network.architecture.input_shape
    cut = {name for plan in network.plans for name in plan.removed}
    return SavedNetwork(
        name=network.architecture.name,
        num_classes=network.architecture.num_classes,
        widths={group.name: group.width for group in network.groups if group.name in cut},
        input_size=(channels, image_size or height, image_size or width),
        classes=network.classes,
        licence=licence,
        **_preprocessing(network, image_size or width),
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


def _preprocessing(network: StoredNetwork, image_size: int) -> dict[str, Any]:
    """What the weights want of an image, as SavedNetwork's fields. The one place that knows it."""
    mean, std = NORMALISATION[network.architecture.input_shape[0]]
    if network.config is not None:
        data = network.config["data"]
        resize_size = round(data["resize_size"] * image_size / data["image_size"])
    else:
        resize_size = usual_resize_size(image_size)
    return {"resize_size": resize_size, "mean": mean, "std": std}


def usual_resize_size(image_size: int) -> int:
    """ImageNet's custom, the centre 224 of 256 pixels; small images have no margin to spare."""
    return image_size + (image_size // 7 if image_size >= 224 else 0)
