"""What is published about a network's weights: the images that they want. Nothing is fetched for it.

torchvision and timm ship this with their code. What a network wants that they build with `transform_input=True`, such
as torchvision's GoogLeNet and Inception v3, is said here in means and deviations: their first layer turns ImageNet's
into 0.5, and our networks are built without it.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torchvision
from torchvision.models import GoogLeNet_Weights, Inception_V3_Weights, WeightsEnum

from data import Preprocessing
from train.errors import ConfigError

TRANSFORMING_INPUT = (GoogLeNet_Weights, Inception_V3_Weights)


@dataclass(frozen=True)
class Published:
    """What is known of published weights without having them.

    label: their name. preprocessing: the images that they want.
    """

    label: str
    preprocessing: Preprocessing


def published(name: str, file: Path | None = None) -> Published | None:
    """Of the network's weights in `file`, which is known by the name that it was published under, or the usual ones.

    None for a network that nobody published weights of. Raises ConfigError for images that no loader here makes.
    """
    if name.startswith("timm:"):
        config = timm().get_pretrained_cfg(name.removeprefix("timm:"))
        return None if config is None else of_timm(config.to_dict())
    if name not in torchvision.models.list_models(module=torchvision.models):
        return None
    weights = torchvision.models.get_model_weights(name)
    of_file = [entry for entry in weights if file is not None and entry.url.endswith(f"/{file.name}")]
    return of_torchvision(of_file[0] if of_file else weights.DEFAULT)


def of_torchvision(weights: WeightsEnum) -> Published:
    """What torchvision says of one of its weights."""
    transform = weights.transforms()
    [resize_size], [image_size] = transform.resize_size, transform.crop_size
    preprocessing = Preprocessing(
        image_size=image_size,
        resize_size=resize_size,
        interpolation=transform.interpolation.value,
        mean=tuple(transform.mean),
        std=tuple(transform.std),
    )
    if isinstance(weights, TRANSFORMING_INPUT):
        preprocessing = replace(preprocessing, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return Published(f"torchvision's {type(weights).__name__}.{weights.name}", preprocessing)


def of_timm(config: dict[str, Any]) -> Published:
    """What timm says of weights. config: its `pretrained_cfg` of them. ConfigError for images that are not square."""
    wanted = timm().data.resolve_data_config(pretrained_cfg=config)
    name = config["architecture"] + (f".{config['tag']}" if config.get("tag") else "")
    _, height, width = wanted["input_size"]
    if height != width:
        raise ConfigError(f"timm:{name}: found images of {height} x {width} pixels, allowed: square ones")
    sides = {"center": "shorter", "squash": "both", "border": "longer"}
    preprocessing = Preprocessing(
        image_size=height,
        resize_size=math.floor(height / wanted["crop_pct"]),
        resized_side=sides[wanted["crop_mode"]],
        interpolation=wanted["interpolation"],
        mean=tuple(wanted["mean"]),
        std=tuple(wanted["std"]),
    )
    return Published(f"timm's {name}", preprocessing)


def timm() -> ModuleType:
    """The package. Raises ConfigError where it is not installed."""
    try:
        import timm
    except ImportError as error:
        raise ConfigError("model.name: timm:NAME needs timm, which is not installed: pip install timm") from error
    return timm
