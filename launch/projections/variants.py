"""What a recipe may be trained as, and what each of these takes: hours, memory, images a second."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

import cup
from data.batch import preprocessing_of, train_size
from launch.projections.memory import StepMemory, step_memory
from launch.projections.network import ModelledCosts, Moment, Network
from launch.projections.ramps import Ramp, dense_ramp, ramp_to_target
from launch.projections.schedule import Schedule, Segment, hours, segments
from train.config import RunConfig
from train.errors import ConfigError
from train.methods import PruneConfig


@dataclass(frozen=True)
class Variant:
    """One way to train. grows: whether images grow, as `data.start_size` says."""

    label: str
    ramp: Ramp
    grows: bool


@dataclass(frozen=True)
class Estimate:
    """What a variant takes. segments: of one device that does all the work, so that their hours are GPU hours.

    flops_reduction, speedup: at the end. images_per_s: of one device, at its fastest. memory: at its highest.
    """

    label: str
    segments: Sequence[Segment]
    flops_reduction: float
    speedup: float
    images_per_s: float
    memory: StepMemory
    note: str

    @property
    def gpu_hours(self) -> float:
        return hours(self.segments)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        names = ("label", "flops_reduction", "speedup", "images_per_s", "note", "gpu_hours")
        parts = [vars(part) | {"hours": part.hours} for part in self.segments]
        memory = vars(self.memory) | {"total": self.memory.total}
        return {name: getattr(self, name) for name in names} | {"memory_bytes": memory, "segments": parts}


class Projection:
    """A recipe's training on devices of one kind.

    config: with nothing left open of its images. network: the full one. cost: of one device's step, at the images of
    one forward pass. images, val_images: of the data set.
    """

    def __init__(self, config: RunConfig, network: Network, cost: cup.DeviceCost, images: int, val_images: int) -> None:
        self._config, self._network, self._cost = config, network, cost
        self._costs = ModelledCosts(network, cost, preprocessing_of(config.data).validation.image_size)
        self._full_s = self._costs.at(Moment(network.dense_widths, config.data.image_size)).step_s
        epochs, step_images = config.train.epochs, config.data.batch_size
        if images < step_images:
            raise ConfigError(f"--images: found {images}, allowed: from a step's, data.batch_size ({step_images})")
        evaluations = 2 if config.train.ema_decay > 0 else 1
        self._schedule = Schedule(epochs, images, val_images, step_images, cost.batch_size, evaluations)

    def dense(self) -> Variant:
        return Variant("dense", dense_ramp(self._network, self._config.train.epochs), grows=False)

    def to_target(self, label: str, prune: PruneConfig) -> Variant:
        """Images of one size, and the straight ramp to the target of `prune`."""
        if prune.round_to == "measured" or (prune.round_to == 1 and prune.target_speedup is not None):
            prune = replace(prune, round_to=self._cost.granularity)  # as the time planner does
        return Variant(label, ramp_to_target(self._network, prune, self._config.train.epochs, self._cost), grows=False)

    def growing(self, variant: Variant) -> Variant:
        """The same with images that grow."""
        return replace(variant, label=f"{variant.label}, growing images", grows=True)

    def estimate(self, variant: Variant) -> Estimate:
        """Raises CupError where the network does not take the smallest images."""
        path = list(self._path(variant))
        parts = segments(path, self._costs.at, self._reduction, self._schedule, resize_s=0)
        full_side = replace(path[-1], side=self._config.data.image_size)
        return Estimate(
            label=variant.label,
            segments=parts,
            flops_reduction=parts[-1].flops_reduction,
            speedup=self._full_s / self._costs.at(full_side).step_s,
            images_per_s=self._cost.batch_size / min(part.step_s for part in parts),
            memory=max((self._memory_at(moment) for moment in _widest(path)), key=lambda memory: memory.total),
            note=variant.ramp.note,
        )

    def _reduction(self, moment: Moment) -> float:
        return self._network.reduction(moment.widths, moment.dropped)

    def _path(self, variant: Variant) -> Iterator[Moment]:
        ramp = variant.ramp
        for epoch, (widths, dropped) in enumerate(zip(ramp.widths, ramp.dropped, strict=True)):
            side = train_size(self._config.data, epoch) if variant.grows else self._config.data.image_size
            yield Moment(widths, side, dropped)

    def _memory_at(self, moment: Moment) -> StepMemory:
        model = copy.deepcopy(self._network.model)
        if moment.widths != self._network.dense_widths:
            example = torch.zeros(1, *self._network.shape)
            cup.shrink_to(model, moment.widths, example, dropped=moment.dropped)
        images = (self._cost.batch_size, self._network.shape[0], moment.side, moment.side)
        return step_memory(model, images, self._config)


def to_reduction(prune: PruneConfig, target: float) -> PruneConfig:
    """The same settings to an FR, with the paper's inner groups."""
    changes = {"method": "hard_ramp", "scope": "inner", "target_reduction": target, "target_speedup": None}
    changes["drop_blocks"] = False
    return replace(prune, **changes, hard_ramp=replace(prune.hard_ramp, kind="reduction"))


def to_speedup(prune: PruneConfig, target: float) -> PruneConfig:
    """The same settings to a speed-up of the step, with all groups."""
    changes = {"method": "hard_ramp", "scope": "all", "target_reduction": None, "target_speedup": target}
    return replace(prune, **changes, hard_ramp=replace(prune.hard_ramp, kind="speedup"))


def _widest(path: Sequence[Moment]) -> list[Moment]:
    """The first epoch of each image size: while that stays, a network that shrinks needs ever less."""
    return [moment for index, moment in enumerate(path) if index == 0 or moment.side != path[index - 1].side]
