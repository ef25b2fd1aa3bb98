"""PruneTrain: a penalty empties channels, and empty ones go every few epochs (Lym et al., 2019, arXiv 1901.09290)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

import cup
from cup import GroupLasso, View
from train.methods.landing import has_landed, plan_to_threshold
from train.methods.method import Action, Method
from train.methods.options import SharedOptions


@dataclass(frozen=True, kw_only=True)
class PruneTrainConfig:
    """The penalty, and what counts as empty."""

    share: float = 0.2
    """The penalty's share of loss and penalty together in the first step, which fixes its weight for the run."""
    below: float = 1e-4
    """A channel goes when none of its weights, in any layer that writes or reads it, is above this."""

    def __post_init__(self) -> None:
        """Raises ValueError naming the field, the value found and what is allowed."""
        if not 0 < self.share < 1:
            raise ValueError(f"share: found {self.share!r}, allowed: above 0, below 1")
        if not self.below > 0:
            raise ValueError(f"below: found {self.below!r}, allowed: a number above 0")


class PruneTrain(Method):
    """A group lasso on the channels that may go; a cut after every `every` epochs and after the last one.

    With a target the last cut lands on it, and the penalty ends there.
    """

    label = "PruneTrain"

    def __init__(
        self,
        config: PruneTrainConfig,
        shared: SharedOptions,
        epochs: int,
        measured: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """Arguments as of HardRamp; the criterion is always `max_abs`."""
        self._config = config
        self._options = replace(shared.plan_options(measured), criterion="max_abs")
        self._target, self._every = shared.target, shared.every
        self._last_epoch = min(shared.last_epoch or epochs, epochs)
        self._weight: float | None = None
        self._first_lasso: Tensor | None = None

    def begin(self, view: View) -> None:
        groups = cup.prunable_groups(view.groups, self._options.scope)
        self._lasso = GroupLasso(groups)
        self._has_landed = has_landed(view, self._target) or not groups  # dropped blocks may take all of them along

    def may_resize(self, epoch: int, view: View) -> bool:
        return epoch > 1 and self._is_due(epoch - 1) and not has_landed(view, self._target)

    def epoch_end(self, epoch: int, view: View) -> Action | None:
        if not self._is_due(epoch) or has_landed(view, self._target):
            return None
        plan = plan_to_threshold(view, self._config.below, self._target, self._options)
        return Action(plan) if plan.removed else None

    def after_action(self, action: Action, view: View) -> None:
        self.begin(view)

    def penalty(self, model: nn.Module) -> Tensor | None:
        """The lasso times its weight; None in the step that fixes the weight, and once the target is reached."""
        if self._has_landed:
            return None
        lasso = self._lasso(model)
        if self._weight is None:
            self._first_lasso = lasso.detach()
            return None
        return self._weight * lasso

    @property
    def wants_loss(self) -> bool:
        return self._weight is None and not self._has_landed

    def saw_loss(self, loss: float) -> None:
        if math.isfinite(loss):
            share = self._config.share
            self._weight = share / (1 - share) * loss / self._first_lasso.item()

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self._weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._weight = state["weight"]

    def _is_due(self, epoch: int) -> bool:
        """Whether there is a cut after this epoch."""
        return epoch == self._last_epoch or (epoch < self._last_epoch and epoch % self._every == 0)
