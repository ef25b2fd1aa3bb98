"""Carry what belongs to the parameters, optimizer state and moving averages, through a resize."""

import torch
from torch import nn

from cup.errors import CupError
from cup.surgery import ParameterChange, Resized, apply_plan, select


def carry_optimizer(optimizer: torch.optim.Optimizer, resized: Resized) -> None:
    """Point the optimizer at the new parameters and slice its state along with them, in place.

    Every state tensor shaped like its parameter (momentum, Adam's moments) keeps the entries of the channels that
    stay; numbers and tensors without dimensions (step counts) move over unchanged. The order of the parameter groups
    and of the parameters in them stays. Parameters that the optimizer does not hold are passed over.
    Raises CupError, with the optimizer left as it was, for state that is shaped otherwise.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    changes = [change for change in resized.changes if id(change.old) in held]
    carried = {id(change.old): _carried_state(optimizer.state.get(change.old, {}), change) for change in changes}
    new_parameter = {id(change.old): change.new for change in changes}
    for group in optimizer.param_groups:
        group["params"] = [new_parameter.get(id(parameter), parameter) for parameter in group["params"]]
    for change in changes:
        if optimizer.state.pop(change.old, None) is not None:
            optimizer.state[change.new] = carried[id(change.old)]


def carry_ema(ema: nn.Module, resized: Resized) -> None:
    """Remove the same channels from a moving average of the model, in place.

    ema: a copy of the model, or torch.optim.swa_utils.AveragedModel around one. Raises CupError if it is not at the
    widths that the model had before the resize; it is then left as it was.
    """
    module = ema.module if isinstance(ema, torch.optim.swa_utils.AveragedModel) else ema
    apply_plan(module, resized.plan, resized.groups_before)


def _carried_state(state: dict, change: ParameterChange) -> dict:
    carried = {}
    for key, value in state.items():
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            carried[key] = value
        elif value.shape == change.old.shape:
            carried[key] = select(value, change.axes)
        else:
            raise CupError(
                f"optimizer state {key!r} of {change.name} has shape {tuple(value.shape)}, its parameter "
                f"{tuple(change.old.shape)}: only state shaped like its parameter can be carried through a resize"
            )
    return carried
