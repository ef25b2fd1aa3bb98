"""Cut once, early: as soon as the widths that a cut would leave have stopped changing.

After Shen et al., When to Prune? A Policy towards Early Structural Pruning (CVPR 2022, arXiv 2110.12007), whose Early
Pruning Indicator compares the would-be networks of successive epochs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cup
from cup import View
from train.methods.landing import has_landed, plan_to_target
from train.methods.method import Action, Method
from train.methods.options import SharedOptions


@dataclass(frozen=True, kw_only=True)
class EarlyConfig:
    """When the widths count as settled."""

    patience: int = 5
    """Compare what an epoch would choose with the choices of so many epochs before it."""
    similarity: float = 0.98
    """Settled = at least so alike on average, from 0 to 1: 1 - |a - b| / (a + b), the mean over groups."""
    first_epoch: int = 2
    """No cut before this epoch."""

    def __post_init__(self) -> None:
        """Raises ValueError naming the field, the value found and what is allowed."""
        checks = [
            ("patience", self.patience >= 1, "a whole number from 1"),
            ("similarity", 0 < self.similarity <= 1, "above 0, up to 1"),
            ("first_epoch", self.first_epoch >= 1, "a whole number from 1"),
        ]
        for name, ok, allowed in checks:
            if not ok:
                raise ValueError(f"{name}: found {getattr(self, name)!r}, allowed: {allowed}")


class Early(Method):
    """One cut to the target, at the start of the first epoch that finds the widths settled, or of the last one."""

    def __init__(
        self,
        config: EarlyConfig,
        shared: SharedOptions,
        epochs: int,
        measured: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """Arguments as of HardRamp. Raises ValueError without a target, or for epochs at odds."""
        if shared.target is None:
            raise ValueError("target_reduction: found None, allowed: a number above 1 (prune.method: early needs it)")
        if shared.last_epoch is not None and config.first_epoch > shared.last_epoch:
            raise ValueError(
                f"early.first_epoch: found {config.first_epoch}, allowed: up to last_epoch ({shared.last_epoch})"
            )
        self._config, self._options = config, shared.plan_options(measured)
        self._target, self._every = shared.target, shared.every
        self._last_epoch = min(shared.last_epoch or epochs, epochs)
        self._choices: list[dict[str, int]] = []
        self._has_cut = False
        self.label = f"{'CUP' if shared.criterion == 'cup' else shared.criterion}, once, early"

    def may_resize(self, epoch: int, view: View) -> bool:
        """Also before first_epoch, when the method only looks: when the widths will settle is not known."""
        is_over = self._has_cut or has_landed(view, self._target)
        return cup.is_cut_epoch(epoch, self._every, self._last_epoch) and not is_over

    def epoch_start(self, epoch: int, view: View) -> Action | None:
        if not self.may_resize(epoch, view):
            return None
        plan = plan_to_target(view, self._target, self._options)
        alike = [similarity(plan.new_widths, before) for before in self._choices[-self._config.patience :]]
        self._choices = [*self._choices, plan.new_widths][-self._config.patience :]
        mean = sum(alike) / len(alike) if alike else 0.0
        is_settled = len(alike) == self._config.patience and mean >= self._config.similarity
        if epoch < self._last_epoch and not (is_settled and epoch >= self._config.first_epoch):
            return None
        what = "have settled" if is_settled else f"have not settled by epoch {epoch}, the last one for a cut"
        note = f"the widths {what}: {mean:.3f} alike over {len(alike)} choices"
        return Action(replace(plan, note="; ".join(filter(None, [note, plan.note]))))

    def after_action(self, action: Action, view: View) -> None:
        self._has_cut = True  # once, even where the target is out of reach

    def state_dict(self) -> dict[str, Any]:
        return {"choices": self._choices, "has_cut": self._has_cut}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._has_cut = state["has_cut"]
        self._choices = [dict(widths) for widths in state["choices"]]


def similarity(one: Mapping[str, int], other: Mapping[str, int]) -> float:
    """How alike two networks' widths are, from 0 to 1; groups of dropped blocks have a width of 0."""
    return sum(1 - abs(one[name] - other[name]) / max(1, one[name] + other[name]) for name in one) / len(one)
