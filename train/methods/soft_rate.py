"""Zero the same share of every group after each epoch, let it grow back, remove it for good at the end.

SFP (He et al., 2018, arXiv 1808.06866) is this with the criterion `l2`, FPGM (He et al., 2019, arXiv 1811.00250) with
`gm`. Until the end nothing gets smaller, so nothing gets faster.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

import cup
from cup import PrunePlan, View
from train.methods.method import Action, Method
from train.methods.options import SharedOptions


@dataclass(frozen=True, kw_only=True)
class SoftRateConfig:
    """How many filters are zeroed, and what becomes of them."""

    rate: float | None = None
    """Share of each group's channels. null = the share that lands on prune.target_reduction."""
    grad_mask: bool = False
    """Hold the zeroed filters at zero, so that the first choice stays (as in FPGM's released code)."""

    def __post_init__(self) -> None:
        """Raises ValueError naming the field, the value found and what is allowed."""
        if self.rate is not None and not 0 < self.rate < 1:
            raise ValueError(f"rate: found {self.rate!r}, allowed: above 0, below 1, or null")


class SoftRate(Method):
    """Zeroes softly before epoch 1 and after every epoch; cuts physically after the last one."""

    def __init__(
        self,
        config: SoftRateConfig,
        shared: SharedOptions,
        epochs: int,
        measured: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """Arguments as of HardRamp. Raises ValueError unless exactly one of rate and target is given."""
        if shared.target_speedup is not None:
            raise ValueError(f"target_speedup: found {shared.target_speedup}, allowed with soft_rate: null")
        if shared.fold:  # the mean of a cluster would be one with filters at zero
            raise ValueError("fold: found true, allowed with soft_rate: false")
        if (config.rate is None) == (shared.target_reduction is None):
            found = f"rate {config.rate} and target_reduction {shared.target_reduction}"
            raise ValueError(f"soft_rate.rate: found {found}, allowed: one of them, the other null")
        self._rate, self._grad_mask = config.rate, config.grad_mask
        self._options = shared.plan_options(measured)
        self._target, self._every = shared.target_reduction, shared.every
        self._last_epoch = min(shared.last_epoch or epochs, epochs)
        self._chosen: PrunePlan | None = None
        self._held_at_zero: dict[str, Tensor] = {}
        name = {"l2": "SFP", "gm": "FPGM"}.get(shared.criterion, f"{shared.criterion}, soft")
        self.label = name + (" (gradients masked)" if config.grad_mask else "")

    def begin(self, view: View) -> None:
        self._groups, self._device = view.groups, next(view.model.parameters()).device

    def may_resize(self, epoch: int, view: View) -> bool:
        return epoch == self._last_epoch + 1

    def epoch_start(self, epoch: int, view: View) -> Action | None:
        return Action(self._plan(view), soft=True) if epoch == 1 else None

    def epoch_end(self, epoch: int, view: View) -> Action | None:
        if epoch == self._last_epoch:
            return Action(self._plan(view))
        due = epoch < self._last_epoch and epoch % self._every == 0
        return Action(self._plan(view), soft=True) if due else None

    def after_action(self, action: Action, view: View) -> None:
        self._groups = view.groups
        if self._grad_mask:
            self._hold(action.plan if action.soft else None)

    def after_backward(self, model: nn.Module) -> None:
        cup.mask_gradients(model, self._held_at_zero)

    def state_dict(self) -> dict[str, Any]:
        return {"chosen": None if self._chosen is None else self._chosen.to_json()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._hold(None if state["chosen"] is None else PrunePlan.from_json(state["chosen"]))

    def _plan(self, view: View) -> PrunePlan:
        if self._chosen is not None:
            return self._chosen
        if self._target is None:
            widths = cup.uniform_widths(view.groups, self._rate, self._options)
        else:
            widths = cup.uniform_widths_at(view, self._target, self._options)
        return cup.plan_by_counts(view.model, view.groups, widths, self._options)

    def _hold(self, plan: PrunePlan | None) -> None:
        """Stay with this choice; None = hold nothing."""
        self._chosen = plan
        filters = {} if plan is None else cup.filters_that_go(plan, self._groups)
        self._held_at_zero = {name: indices.to(self._device) for name, indices in filters.items()}
