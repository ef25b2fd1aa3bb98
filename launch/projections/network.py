"""A full network, its FLOPs at any widths, and its seconds at any widths and image size."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import nn

import cup
from cup import ChannelGroup, Complexity
from launch.projections.schedule import Costs

Widths = Mapping[str, int]


@dataclass(frozen=True, eq=False)
class Network:
    """A full network whose widths are looked for; it is only read. groups, dense: for images of `shape`, (C, H, W)."""

    model: nn.Module
    groups: list[ChannelGroup]
    dense: Complexity
    shape: tuple[int, int, int]

    @staticmethod
    def of(model: nn.Module, shape: tuple[int, int, int]) -> "Network":
        """Raises CupError for a network that cannot be traced with such images."""
        example = torch.zeros(1, *shape)
        return Network(model, cup.channel_groups(model, example), cup.complexity(model, example), shape)

    @property
    def dense_widths(self) -> dict[str, int]:
        return {group.name: group.width for group in self.groups if not group.frozen}

    def reduction(self, widths: Widths, dropped: Collection[str] = ()) -> float:
        """FR at these widths, without these blocks; groups that are not named keep theirs."""
        kept = {name: range(width) for name, width in widths.items()}
        return self.dense.flops / cup.FlopsByWidths(self.model, self.groups, self.dense).after(kept, dropped)


@dataclass(frozen=True)
class Moment:
    """What decides the cost of an epoch. widths: of all groups that may shrink. side: of the images, pixels.

    dropped: names of the residual blocks that are gone.
    """

    widths: Widths
    side: int
    dropped: tuple[str, ...] = ()


class ModelledCosts:
    """Seconds of a network's steps on one device. Each image size is traced once.

    cost: of a training step; its batch size counts for validation, too. val_side: of validation images, pixels.
    Raises CupError where the network does not take these.
    """

    def __init__(self, network: Network, cost: cup.DeviceCost, val_side: int) -> None:
        self._network, self._cost = network, cost
        validation = cup.device_cost(cost.device, batch_size=cost.batch_size, training=False, fused=cost.fused)
        self._validation = validation.of(network.model, self._groups(val_side))
        self._by_side: dict[int, cup.StepSeconds] = {}

    def at(self, moment: Moment) -> Costs:
        """Raises CupError where the network does not take such small images."""
        if moment.side not in self._by_side:
            self._by_side[moment.side] = self._cost.of(self._network.model, self._groups(moment.side))
        step_s = self._by_side[moment.side].at(moment.widths, moment.dropped)
        return Costs(step_s=step_s, val_s=self._validation.at(moment.widths, moment.dropped), first_s=step_s)

    def _groups(self, side: int) -> list[ChannelGroup]:
        return cup.channel_groups(self._network.model, torch.zeros(1, self._network.shape[0], side, side))
