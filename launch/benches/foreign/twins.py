"""The masked twin of a resized network: surgery without surgery, to compare with."""

import copy
import operator
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from cup import ChannelGroup


def silence(model: nn.Module, groups: Sequence[ChannelGroup], kept: Mapping[str, Sequence[int]]) -> nn.Module:
    """Change a model at full width, in place, so that no layer hears the channels that go: their columns are zero.

    A layer norm, which looks at all channels at once, does not see them either. Uses neither the masks nor the surgery
    of `cup`. kept: group name -> channels that stay; groups that it does not name keep all of theirs.
    """
    silent_in_norm: dict[str, torch.Tensor] = {}  # of several groups, behind a concatenation
    for group in groups:
        stay = set(kept.get(group.name, range(group.width))) | {-1}
        for place in (*group.followers, *group.consumers):
            silent = torch.tensor([channel not in stay for channel in place.channel_of_index.tolist()])
            layer = operator.attrgetter(place.module)(model)
            if place.axis == "in":
                weight = (layer.in_proj_weight if isinstance(layer, nn.MultiheadAttention) else layer.weight).data
                transposed = isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
                (weight if transposed else weight.transpose(0, 1))[silent] = 0
            elif isinstance(layer, nn.LayerNorm) or (isinstance(layer, nn.GroupNorm) and layer.num_groups == 1):
                silent_in_norm[place.module] = silent_in_norm.get(place.module, False) | silent
    for name, silent in silent_in_norm.items():
        hear_only(model.get_submodule(name), ~silent)
    return model


def hear_only(norm: nn.Module, heard_C: torch.Tensor) -> None:
    """Let a layer norm or a group norm take its statistics from these channels only, in place."""
    norm.forward = _under(NormOfSome(heard_C), norm.forward)


def silenced_copy(model: nn.Module, groups: Sequence[ChannelGroup], kept: Mapping[str, Sequence[int]]) -> nn.Module:
    """As `silence`, on a copy."""
    return silence(copy.deepcopy(model), groups, kept)


def _under(mode: TorchFunctionMode, forward: Callable) -> Callable:
    def run(*args, **kwargs):
        with mode:
            return forward(*args, **kwargs)

    return run


class NormOfSome(TorchFunctionMode):
    """Layer norm, and group norm, whose statistics leave some channels out, whoever calls the function.

    heard_C: bool, one entry a channel.
    """

    def __init__(self, heard_C: torch.Tensor) -> None:
        super().__init__()
        self.heard_C = heard_C

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.layer_norm:
            return self._norm(*args, **(kwargs or {}))
        if func is F.group_norm:
            return self._group_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _norm(self, x, _shape, weight=None, bias=None, eps=1e-5):
        return self._scaled(x, x[..., self.heard_C], (-1,), weight, bias, eps)

    def _group_norm(self, x, num_groups, weight=None, bias=None, eps=1e-5):
        """Each group of the channels that are heard, which need not be as many in each."""
        groups = zip(x.movedim(1, -1).chunk(num_groups, -1), self.heard_C.chunk(num_groups), strict=True)
        over = range(1, x.dim())
        normed = [self._scaled(group, group[..., heard], over, None, None, eps) for group, heard in groups]
        return self._affine(torch.cat(normed, -1), weight, bias).movedim(-1, 1)

    def _scaled(self, x, heard, over, weight, bias, eps):
        mean = heard.mean(tuple(over), keepdim=True)
        var = heard.var(tuple(over), keepdim=True, unbiased=False)
        return self._affine((x - mean) / torch.sqrt(var + eps), weight, bias)

    @staticmethod
    def _affine(x, weight, bias):
        x = x if weight is None else x * weight
        return x if bias is None else x + bias
