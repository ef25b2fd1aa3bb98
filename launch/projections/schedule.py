"""Epochs at equal widths and image sizes -> steps, seconds, hours."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

State = TypeVar("State")
"""What decides the cost of a step: widths, or widths and an image size; compared with ==."""


@dataclass(frozen=True)
class Costs:
    """What one network takes: seconds of a training step, of a validation batch, of the very first step."""

    step_s: float
    val_s: float
    first_s: float


@dataclass(frozen=True)
class Segment:
    """Epochs first..last at equal widths and image size, and what they cost.

    resize_s: the resize before it, and its slow first step. steps, val_steps: of one device's batch size, all epochs of
    the segment together.
    """

    first: int
    last: int
    flops_reduction: float
    step_s: float
    steps: int
    val_s: float
    val_steps: int
    resize_s: float

    @property
    def hours(self) -> float:
        return (self.step_s * self.steps + self.val_s * self.val_steps + self.resize_s) / 3600


@dataclass(frozen=True)
class Schedule:
    """The training that is projected; batch_size is one device's, steps count in it.

    evaluations: passes over the validation images after each epoch; 2 with a moving average of the weights.
    """

    epochs: int
    images: int
    val_images: int
    step_images: int
    batch_size: int
    evaluations: int = 1

    @property
    def steps_per_epoch(self) -> int:
        """Training drops what does not fill a step of the whole batch."""
        return self.images // self.step_images * self.step_images // self.batch_size

    @property
    def val_steps_per_epoch(self) -> int:
        return self.evaluations * math.ceil(self.val_images / self.batch_size)


def segments(
    path: Sequence[State],
    costs: Callable[[State], Costs],
    reduction: Callable[[State], float],
    schedule: Schedule,
    resize_s: float,
) -> list[Segment]:
    """The epochs of a schedule, those in equal states together. path: the state of each epoch."""
    starts = [j for j in range(len(path)) if j == 0 or path[j] != path[j - 1]]
    found = []
    for start, end in zip(starts, [*starts[1:], len(path)], strict=True):
        cost = costs(path[start])
        found.append(
            Segment(
                first=start + 1,
                last=end,
                flops_reduction=reduction(path[start]),
                step_s=cost.step_s,
                steps=(end - start) * schedule.steps_per_epoch,
                val_s=cost.val_s,
                val_steps=(end - start) * schedule.val_steps_per_epoch,
                resize_s=max(0.0, cost.first_s - cost.step_s) + (resize_s if start > 0 else 0.0),
            )
        )
    return found


def hours(parts: Sequence[Segment]) -> float:
    return sum(part.hours for part in parts)
