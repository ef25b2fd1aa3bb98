"""The interface of pruning methods: what a method may do while a network trains, and when it is called."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cup import PrunePlan, View


@dataclass(frozen=True)
class Action:
    """What a method wants done to the network now, on all ranks alike (train/resizer.py does it).

    plan: which channels stay. soft: zero the filters of the others and keep the shapes, so that they may grow back.
    """

    plan: PrunePlan
    soft: bool = False


class Method:
    """A pruning method. Every hook does nothing unless it is overridden.

    Decisions are made on rank 0 alone, where `epoch_start` and `epoch_end` are called; what follows from them reaches
    the other ranks as an Action; `after_action` is called on all ranks. Epochs count from 1. The state is rank 0's and
    is loaded on all ranks; statistics that a hook gathers on rank 0 are of that rank's share of the images.
    """

    label: str = "method"
    """What log, report and curves call it."""

    def begin(self, view: View) -> None:
        """The network as the run begins, or as it goes on, at its stored widths. Called once, on all ranks, first."""

    def may_resize(self, epoch: int, view: View) -> bool:
        """Whether widths may change right before `epoch`: at its start, or at the end of the one before.

        As things stand when it is called. Called on any rank, so read `view` and what is equal on all ranks alone, and
        change nothing. Blocks are compiled only where the widths are sure to stay (train/network/compiling.py), so a
        method that has come to its end says False.
        """
        return True

    def epoch_start(self, epoch: int, view: View) -> Action | None:
        """What is to be done before the first step of `epoch`. Called on rank 0 alone."""
        return None

    def epoch_end(self, epoch: int, view: View) -> Action | None:
        """What is to be done after the last step of `epoch`, before its evaluation. Called on rank 0 alone."""
        return None

    def after_action(self, action: Action, view: View) -> None:
        """An action has removed or zeroed channels; `view` shows the network after it. Called on all ranks."""

    def before_step(self, model: nn.Module, epoch: int, step: int) -> None:
        """A step is about to begin, the one after so many (0, 1, ...) of this epoch. Called on all ranks.

        model: the network itself, not its DDP wrapper.
        """

    def penalty(self, model: nn.Module) -> Tensor | None:
        """A scalar that is added to the loss of each step, or None. Called on all ranks; the logged loss is without it.

        model: the network itself, not its DDP wrapper.
        """
        return None

    def after_backward(self, model: nn.Module) -> None:
        """Change gradients in place, before they are clipped. Called on all ranks, once a step; all do the same.

        The ranks' gradients are reduced already. In fp16 they are still scaled, so multiply them and add nothing.
        """

    @property
    def wants_loss(self) -> bool:
        """Whether `saw_loss` is to be called after the next step. The same on all ranks; waiting for it costs time."""
        return False

    def saw_loss(self, loss: float) -> None:
        """The loss of the step that has just been made, the mean over all ranks, without the penalty. On all ranks."""

    def state_dict(self) -> dict[str, Any]:
        """Plain data and CPU tensors for the checkpoint. Called on rank 0 alone."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave. Called on all ranks, after `begin`."""


class Dense(Method):
    """No pruning: the network stays as it is."""

    label = "dense"

    def may_resize(self, epoch: int, view: View) -> bool:
        return False
