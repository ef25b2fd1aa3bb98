"""Where published weights come from: torchvision, timm, the Hugging Face hub. Fetched by those libraries themselves.

They keep what they fetched in their own caches, so that a second run needs no network.
"""

from collections.abc import Mapping

import torch
import torchvision
from torchvision.models import WeightsEnum

from train.errors import ConfigError, TrainError
from train.network.published import Published, of_timm, of_torchvision, timm

TORCHVISION, TIMM, HUB = "torchvision:", "timm:", "hf-hub:"


def names_network(source: str) -> bool:
    """Whether the source says which network its weights are of; a file does not."""
    return source.startswith((TORCHVISION, TIMM, HUB))


def network_of(source: str, name: str | None) -> str | None:
    """The network that weights of `source` are of; None for one that only the hub knows. Fetches nothing.

    name: as configured, if it is. Raises ConfigError for unknown weights, for those of another network, and for a file
    without a name.
    """
    if source.startswith(HUB):
        return name
    if source.startswith(TORCHVISION):
        found = _builder(_torchvision_weights(source))
    elif source.startswith(TIMM):
        if not timm().is_model(source.removeprefix(TIMM)):
            raise ConfigError(
                f"model.weights: found {source!r}, which timm does not know; timm.list_pretrained() names them"
            )
        found = source
    elif name is None:
        raise ConfigError(f"model.name: found null beside model.weights {source}, allowed: the network's name")
    else:
        return name
    if name is not None and name.partition(".")[0] != found.partition(".")[0]:
        raise ConfigError(
            f"model.name: found {name}, but model.weights {source} are of {found}; allowed: that, or null"
        )
    return name or found


def from_torchvision(source: str) -> tuple[Mapping[str, torch.Tensor], Published]:
    """The weights, their checksum verified, and what is known of them. TrainError where they cannot be had."""
    weights = _torchvision_weights(source)
    try:
        return weights.get_state_dict(progress=False, check_hash=True, weights_only=True), of_torchvision(weights)
    except Exception as error:  # of urllib, sockets and files, and for a wrong checksum
        raise _not_had(source, error) from error


def from_timm(source: str, name: str | None) -> tuple[Mapping[str, torch.Tensor], Published, str]:
    """The weights of `timm:NAME` or `hf-hub:ORG/NAME`, what is known of them, and their network.

    Raises TrainError where they cannot be had, ConfigError where the hub's are of another network than `name`.
    """
    try:
        model = timm().create_model(source.removeprefix(TIMM), pretrained=True)
    except Exception as error:  # of the hub, its HTTP library, sockets and files
        raise _not_had(source, error) from error
    found = name or f"timm:{model.pretrained_cfg['architecture']}"
    if found.removeprefix(TIMM).partition(".")[0] != model.pretrained_cfg["architecture"]:
        raise ConfigError(f"model.name: found {name}, but {source} is {model.pretrained_cfg['architecture']} of timm")
    return model.state_dict(), of_timm(model.pretrained_cfg), found


def _torchvision_weights(source: str) -> WeightsEnum:
    try:
        weights = torchvision.models.get_weight(source.removeprefix(TORCHVISION))
        _builder(weights)
    except (ValueError, KeyError, StopIteration) as error:
        raise ConfigError(
            f"model.weights: found {source!r}, allowed: weights of a classification model as torchvision names them, "
            "such as torchvision:ResNet50_Weights.IMAGENET1K_V2"
        ) from error
    return weights


def _builder(weights: WeightsEnum) -> str:
    """The name of the network that the weights are of; StopIteration where it is no classifier."""
    names = torchvision.models.list_models(module=torchvision.models)
    return next(name for name in names if torchvision.models.get_model_weights(name) is type(weights))


def _not_had(source: str, error: Exception) -> TrainError:
    why = str(error).strip().partition("\n")[0] or type(error).__name__
    return TrainError(
        f"model.weights: cannot fetch {source} ({why}): fetch them once where there is a network, or give a file"
    )
