"""Networks that are narrow from their first step: the controls of every pruning method.

They begin as the full network with its first channels alone, so FLOPs reduction is measured against the full one.
"""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from torch import nn

import cup
from cup import ChannelGroup, CupError, PlanOptions, PrunePlan
from cup.blocks import blocks_named
from train.checkpoint.file import load_checkpoint
from train.checkpoint.network import stored_architecture, stored_plans
from train.config import ModelConfig
from train.errors import ConfigError
from train.files import open_regular
from train.prune import read_counts


def plan_narrowing(
    config: ModelConfig, model: nn.Module, groups: Sequence[ChannelGroup], scope: Literal["inner", "all"]
) -> PrunePlan | None:
    """The plan that brings the full network to `model.width` or `model.widths`; None where neither is asked for.

    model, groups: of the full network, only read. Raises ConfigError for a file that is not about this network,
    CupError where nothing may be narrowed.
    """
    if config.widths is None:
        if config.width == 1:
            return None
        return cup.plan_first_channels(groups, cup.uniform_widths(groups, 1 - config.width, PlanOptions(scope=scope)))
    try:
        widths, dropped = read_widths(Path(config.widths), config.name)
        return cup.plan_first_channels(groups, widths, blocks_named(model, groups, dropped))
    except CupError as error:
        raise ConfigError(f"model.widths: {config.widths}: {error}") from error


def read_widths(path: Path, network: str) -> tuple[Mapping[str, int], list[str]]:
    """Group -> channels, and dropped blocks: what a checkpoint of this network ended with; or the channels in a file
    of JSON or YAML.

    Raises ConfigError for another network's checkpoint and for a file that holds no widths.
    """
    try:
        with open_regular(path) as file:
            is_checkpoint = zipfile.is_zipfile(file)
    except OSError as error:
        raise ConfigError(f"model.widths: cannot read {path}: {error.strerror}") from error
    if not is_checkpoint:
        return read_counts(path), []
    content = load_checkpoint(path)
    if (found := stored_architecture(content).name) != network:
        raise ConfigError(f"model.widths: {path} holds {found}, allowed: a checkpoint of {network}")
    widths: dict[str, int] = {}
    dropped: list[str] = []
    for plan in stored_plans(content):
        widths |= plan.new_widths
        dropped += plan.dropped
    if not widths:
        raise ConfigError(f"model.widths: {path} holds the full network, which was never cut")
    return widths, dropped
