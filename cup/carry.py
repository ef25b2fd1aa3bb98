"""Carry what belongs to the parameters, optimizer state and moving averages, through a resize."""

import torch
from torch import nn

from cup.errors import CupError
from cup.surgery import ParameterChange, Resized, apply_plan, select


def carry_optimizer(optimizer: torch.optim.Optimizer, resized: Resized) -> None:
    """Point the optimizer at the new parameters and slice its state along with them, in place.

    Every state tensor shaped like its parameter (momentum, Adam's moments) keeps the entries of the channels that
    stay; numbers and tensors of one element (step counts, trust ratios) move over unchanged. The order of the
    parameter groups and of the parameters in them stays. Parameters that the optimizer does not hold are passed over.
    Raises CupError, with the optimizer left as it was, for any other state: factored moments (Adafactor), histories
    of the whole network (L-BFGS).
    """
    _refuse_histories(optimizer)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    changes = [change for change in resized.changes if id(change.old) in held]
    carried = {id(change.old): _carried_state(optimizer, change) for change in changes}
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


def _refuse_histories(optimizer: torch.optim.Optimizer) -> None:
    """Lists of tensors in the state are about the network as a whole, whichever parameter they are stored under."""
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, list | tuple | dict):
                raise CupError(
                    f"{type(optimizer).__name__} keeps a {type(value).__name__} in its state ({key!r}): only tensors "
                    "and numbers of each parameter can be carried through a resize"
                )


def _carried_state(optimizer: torch.optim.Optimizer, change: ParameterChange) -> dict:
    carried = {}
    for key, value in optimizer.state.get(change.old, {}).items():
        if not isinstance(value, torch.Tensor) or value.numel() == 1:
            carried[key] = value
        elif value.shape == change.old.shape:
            carried[key] = select(value, change.axes)
        else:
            raise CupError(
                f"{type(optimizer).__name__} state {key!r} of {change.name} has shape {tuple(value.shape)}, its "
                f"parameter {tuple(change.old.shape)}: only state shaped like its parameter can be carried through a "
                "resize"
            )
    return carried
