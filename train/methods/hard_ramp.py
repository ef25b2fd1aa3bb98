"""Cut for good at the start of an epoch, deeper each time, until a target is reached: CUP-SS over any criterion.

CUP-SS (arXiv 1911.08630, step 6) is this ramp over the criterion `cup`; a later version and the slides call it CUP-RF.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import cup
from cup import PrunePlan, View
from train.methods.landing import has_landed, plan_to_threshold
from train.methods.method import Action, Method
from train.methods.options import SharedOptions


@dataclass(frozen=True, kw_only=True)
class HardRampConfig:
    """How deep the cut at the start of each epoch is."""

    kind: Literal["threshold", "reduction", "speedup"] = "threshold"
    """threshold = cut at the height t(e) = slope (e - 1) + offset at the start of epoch e (the paper's);
    reduction = follow a straight line in FLOPs reduction from 1 at epoch 1 to target_reduction at last_epoch;
    speedup = the same in the step's modelled speed-up, to target_speedup."""
    slope: float = 0.03
    """k of the threshold ramp, per epoch."""
    offset: float = 0.3
    """b of the threshold ramp: t at epoch 1."""

    def __post_init__(self) -> None:
        """Raises ValueError naming the field, the value found and what is allowed."""
        for name in ("slope", "offset"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: found {getattr(self, name)!r}, allowed: a number from 0")


class HardRamp(Method):
    """Cuts physically at the start of an epoch, by a threshold, FR or speed-up that rises with the epochs."""

    def __init__(
        self,
        config: HardRampConfig,
        shared: SharedOptions,
        epochs: int,
        measured: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """epochs: of the whole run. measured: the allowed widths of each group, for `round_to: measured`.

        Raises ValueError for a ramp in FR or in speed-up without its target.
        """
        target = f"target_{config.kind}"
        if config.kind != "threshold" and getattr(shared, target) is None:
            raise ValueError(
                f"{target}: found None, allowed: a number above 1 (prune.hard_ramp.kind: {config.kind} needs it)"
            )
        self._config = config
        self._options = shared.plan_options(measured)
        self._target, self._every = shared.target, shared.every
        self._last_epoch = min(shared.last_epoch or epochs, epochs)
        name = "CUP-SS" if shared.criterion == "cup" else f"{shared.criterion}, hard ramp"
        changes = [("momentum reset", shared.momentum == "reset"), ("folded", shared.fold)]
        settings = ", ".join(change for change, is_made in changes if is_made)
        self.label = f"{name} ({settings})" if settings else name

    def may_resize(self, epoch: int, view: View) -> bool:
        return cup.is_cut_epoch(epoch, self._every, self._last_epoch) and not has_landed(view, self._target)

    def epoch_start(self, epoch: int, view: View) -> Action | None:
        plan = self._plan(epoch, view) if self.may_resize(epoch, view) else None
        return None if plan is None else Action(plan)

    def _plan(self, epoch: int, view: View) -> PrunePlan | None:
        if self._config.kind != "threshold":
            goal = cup.reduction_at(epoch, self._target.value, self._last_epoch)
            return self._target.plan(view, goal, self._options) if goal > self._target.found(view) else None
        t = cup.threshold_at(epoch, self._config.slope, self._config.offset)
        return plan_to_threshold(view, t, self._target, self._options) if t > 0 else None
