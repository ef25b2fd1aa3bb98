"""What a run knows of its network before any cut, and networks by name with errors of the configuration."""

from dataclasses import dataclass

import torch
from torch import nn

from cup import CupError
from cup.networks import OWN_MODELS, build_network, check_network_name
from train.errors import ConfigError
from train.network.own import build_own, is_factory
from train.network.published import published, timm


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Which network, before any channel is gone: enough to build it again.

    input_shape: one image as the network takes it, (channels, height, width).
    """

    name: str
    num_classes: int
    input_shape: tuple[int, int, int]

    def example_input(self) -> torch.Tensor:
        """A zero image, (1, channels, height, width)."""
        return torch.zeros(1, *self.input_shape)


def build_model(name: str, num_classes: int, image_size: int | None = None) -> nn.Module:
    """What `cup.networks.build_network` builds, or `package.module:factory`, a network of the user's own.

    Raises ConfigError for an unknown name, and for a factory that gives no network.
    """
    check_model_name(name)
    if is_factory(name):
        return build_own(name, num_classes)
    return build_network(name, num_classes, image_size)


def check_model_name(name: str) -> None:
    """Raise ConfigError for a name that `build_model` does not know; builds nothing, and imports no factory."""
    if is_factory(name):
        return
    try:
        check_network_name(name)
    except CupError as error:
        raise ConfigError(f"model.name: {error}; or package.module:factory, a network of your own") from error


def native_input_shape(name: str) -> tuple[int, int, int]:
    """The images that the network called `name` was made for, as published: (channels, height, width)."""
    check_model_name(name)
    if name in ("lenet", "mlp"):
        return 1, 28, 28
    if name in OWN_MODELS:
        return 3, 32, 32
    if is_factory(name):
        return 3, 224, 224
    if name.startswith("timm:"):
        if (config := timm().get_pretrained_cfg(name.removeprefix("timm:"))) is not None:
            return tuple(config.input_size)
        with torch.device("meta"):  # a name that timm once gave: it is in no table, but still builds the network
            return tuple(timm().create_model(name.removeprefix("timm:")).pretrained_cfg["input_size"])
    side = 224 if name.startswith("vit_") else published(name).preprocessing.image_size  # a ViT is built for its side
    return 3, side, side
