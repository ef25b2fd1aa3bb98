"""Carry what belongs to the parameters, optimizer state and moving averages, through a resize."""

from typing import Any

import torch
from torch import nn

from cup.errors import CupError
from cup.surgery import Resized, apply_to
from cup.tracing.groups import check_groups
from cup.tracing.narrowing import ParameterChange, select


def carry_optimizer(optimizer: torch.optim.Optimizer, resized: Resized) -> None:
    """Point the optimizer at the new parameters and slice its state along with them, in place.

    Every state tensor shaped like its parameter (momentum, Adam's moments) keeps the entries of the channels that
    stay; numbers and tensors of one element (step counts, trust ratios) move over unchanged. Where a plan folds
    channels, state is merged as its parameter is: momentum leads the folded weights on as it would have led the others,
    folded later. Parameters of dropped blocks go, with their state. The order of the parameter groups and of the
    parameters in them stays, and so does a group that is left without any. Parameters that the optimizer does not hold
    are passed over.
    Raises CupError, with the optimizer left as it was, where `check_optimizer` does.
    """
    check_optimizer(optimizer)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    changes = [change for change in resized.changes if id(change.old) in held]
    new_parameter = {id(change.old): change.new for change in changes}
    gone = {id(parameter) for parameter in resized.gone}
    for group in optimizer.param_groups:
        staying = [parameter for parameter in group["params"] if id(parameter) not in gone]
        group["params"] = [new_parameter.get(id(parameter), parameter) for parameter in staying]
    for parameter in resized.gone:
        optimizer.state.pop(parameter, None)
    for change in changes:
        state = optimizer.state.pop(change.old, None)
        if state is not None:
            optimizer.state[change.new] = {key: _carried(value, change) for key, value in state.items()}


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise CupError if the optimizer keeps state that cannot go through a resize; to ask before the model is changed.

    That is any tensor shaped unlike its parameter (Adafactor's factored moments), and any list of tensors (L-BFGS's
    history of the whole network).
    """
    kind = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):  # before its first step, too: it holds on to the parameters itself
        raise CupError("LBFGS keeps a history of the whole network, which cannot be carried through a resize")
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, list | tuple | dict):
                raise CupError(
                    f"{kind} keeps a {type(value).__name__} in its state ({key!r}): only numbers and tensors shaped "
                    "like their parameter can be carried through a resize"
                )
            if isinstance(value, torch.Tensor) and value.numel() != 1 and value.shape != parameter.shape:
                raise CupError(
                    f"{kind} keeps {key!r} of shape {tuple(value.shape)} for a parameter of shape "
                    f"{tuple(parameter.shape)}: only numbers and tensors shaped like their parameter can be carried "
                    "through a resize"
                )


def carry_ema(ema: nn.Module, resized: Resized) -> None:
    """Remove the same channels and blocks from a moving average of the model, in place.

    ema: a copy of the model, or torch.optim.swa_utils.AveragedModel around one. Raises CupError if it is not at the
    widths that the model had before the resize; it is then left as it was.
    """
    module = ema.module if isinstance(ema, torch.optim.swa_utils.AveragedModel) else ema
    check_groups(module, resized.groups_before)
    apply_to(module, resized.plan, resized.groups_before, resized.blocks)


def _carried(value: Any, change: ParameterChange) -> Any:
    shaped_alike = isinstance(value, torch.Tensor) and value.shape == change.old.shape
    return select(value, change.axes, change.merges) if shaped_alike else value
