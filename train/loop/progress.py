"""How far a run is: what it has finished, and the epoch that it is in the middle of."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch

from train.log.ledger import Ledger
from train.world import World


@dataclass
class Progress:
    """How far a run is, and how well it did; goes into the checkpoint. A new field needs a step in upgrade.py."""

    epoch: int = 0
    """Epochs finished."""
    step: int = 0
    """Optimizer steps made."""
    resizes: int = 0
    wrapped_at: int = 0
    """`step` at which an undisturbed run last wrapped the network in DDP: 0, or the last resize."""
    compiled: bool = False
    """Whether the network's blocks ran compiled in the last epoch that began."""
    gpu_hours_before: float | None = 0.0
    """Spent on the weights before this run started from them; None where unknown."""
    best_top1: float = -1.0
    best_top5: float = -1.0
    last_line: dict[str, Any] = field(default_factory=dict)
    """The epoch event of the last finished epoch."""

    @property
    def just_resized(self) -> bool:
        """Whether the network was resized after the last step."""
        return self.resizes > 0 and self.step == self.wrapped_at


@dataclass
class EpochSoFar:
    """The epoch that a run is in the middle of, on one rank; goes into the checkpoint, so that a resume goes on there.

    A new field needs a step in train/checkpoint/upgrade.py.
    """

    threshold: float | None
    """Height t of the cut at its start, None where there was none."""
    seconds_before: dict[str, float]
    """The ledger at its start."""
    loss_sum: torch.Tensor
    """Of this rank's steps, float32 scalar."""
    skipped: torch.Tensor
    """Steps left out because they were not finite, float32 scalar; equal on all ranks."""
    step: int = 0
    """Steps of the epoch that are made."""
    images: int = 0
    """In these steps, all ranks together."""
    is_trained: bool = False
    """Whether only the evaluation is left: batch-norm statistics are averaged, the method's epoch_end is done."""

    @classmethod
    def beginning(cls, ledger: Ledger, device: torch.device, threshold: float | None = None) -> "EpochSoFar":
        zero = torch.zeros((), device=device)
        return cls(threshold, ledger.seconds, zero, zero.clone())

    @staticmethod
    def restored(ranks: Sequence["EpochSoFar"], world: World, batch_ratio: Fraction, steps: int) -> "EpochSoFar":
        """This rank's part of an epoch that `ranks` were in the middle of, which may have been fewer or more.

        batch_ratio: images a step now over images a step then. steps: of the epoch, now. The same images are done, to
        within a batch, and the mean of the losses so far stays what it is.
        """
        so_far = ranks[min(world.rank, len(ranks) - 1)]
        so_far = replace(so_far, loss_sum=so_far.loss_sum.to(world.device), skipped=so_far.skipped.to(world.device))
        # Once an epoch's training has ended, its method has acted: no step comes after that.
        step = steps if so_far.is_trained else min(math.floor(so_far.step / batch_ratio), steps)
        if (len(ranks), step) != (world.size, so_far.step):  # other ranks, another batch, or images lost or added
            kept = max(so_far.step - float(so_far.skipped), 1)
            mean = sum(float(rank.loss_sum) for rank in ranks) / (kept * len(ranks))
            so_far.step = step
            so_far.skipped = (so_far.skipped / float(batch_ratio)).floor().clamp(max=so_far.step)
            kept = so_far.step - float(so_far.skipped)
            so_far.loss_sum.fill_(mean * kept * world.size if world.is_main else 0.0)
        return so_far

    def state_dict(self) -> dict[str, Any]:
        return vars(self) | {"loss_sum": self.loss_sum.cpu(), "skipped": self.skipped.cpu()}
