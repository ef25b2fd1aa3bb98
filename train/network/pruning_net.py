"""A network whose weights are generated from its widths: MetaPruning's PruningNet (Liu et al., ICCV 2019, arXiv
1903.10258), around any network that can be traced.

Every convolution and linear layer that carries a searched group has two fully connected layers of its own, which make
its whole weight from the shares of channels that it reads and writes; of that weight the first channels are taken. All
other parameters are shared by all widths. Batch norm has no factors and no offsets, and running statistics of its own
for each scale, as in the authors' program; a search recomputes them for every network that it looks at.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from cup import ChannelGroup, CupError, Place, PlanOptions
from cup.planning import round_up
from cup.tracing.groups import Masks, keep_masks
from cup.tracing.layers import CONVS, find_layer, weight_dim


class PruningNet(nn.Module):
    """In training mode it is the network at the widths that were drawn last, in evaluation mode at the middle scale.

    One step of training is `draw`, then forward and backward as of any network.
    """

    def __init__(
        self,
        network: nn.Module,
        groups: Sequence[ChannelGroup],
        widths_at_scales: Mapping[str, Sequence[int]],
        hidden: int,
        seed: int,
    ) -> None:
        """network: at full width, freshly initialised; it is taken over and changed.

        groups: of the network, those whose widths vary. widths_at_scales: group -> its width at each scale, ascending,
        equally many for all groups. hidden: neurons between the two fully connected layers. seed: of the widths that
        are drawn. Raises CupError for a layer whose weight cannot be generated.
        """
        super().__init__()
        self.network = network
        self._groups, self._widths_at_scales, self._seed = tuple(groups), dict(widths_at_scales), seed
        self._scales = len(next(iter(widths_at_scales.values())))
        self._drawn = self._middle = (self._scales // 2,) * len(self._groups)
        self._generated, self._norms = _layers_of(network, self._groups)
        self._shapes = {name: find_layer(network, name).weight.shape for name in self._generated}
        self._grouped = {
            name: (layer.groups, layer.out_channels)
            for name in self._generated
            if getattr(layer := find_layer(network, name), "groups", 1) > 1
        }
        self.generators = nn.ModuleList(_generator(find_layer(network, name), hidden) for name in self._generated)
        for name in self._generated:
            find_layer(network, name).weight = None
        for layer in network.modules():
            if isinstance(layer, _BatchNorm):
                layer.affine, layer.weight, layer.bias = False, None, None
        for name in self._norms:
            norm = find_layer(network, name)
            for key in ("running_mean", "running_var"):
                setattr(norm, key, getattr(norm, key).repeat(self._scales, 1))

    @property
    def groups(self) -> tuple[ChannelGroup, ...]:
        return self._groups

    def draw(self, epoch: int, step: int) -> None:
        """Draw a scale for each group, each as likely as any other; the same on every rank and after a resume."""
        rng = np.random.Generator(np.random.PCG64([self._seed, epoch, step]))
        self._drawn = tuple(rng.integers(self._scales, size=len(self._groups)).tolist())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, channels, side, side) -> logits (N, classes)."""
        scales = dict(zip((g.name for g in self._groups), self._drawn if self.training else self._middle, strict=True))
        widths = {name: self._widths_at_scales[name][scale] for name, scale in scales.items()}
        tensors = self.weights_at(widths)
        for name, (group, place) in self._norms.items():
            norm = find_layer(self.network, name)
            entries = int((place.channel_of_index < widths[group.name]).sum())
            for key in ("running_mean", "running_var"):  # a view, which batch norm updates
                tensors[f"{name}.{key}"] = getattr(norm, key)[scales[group.name], :entries]
        for name, (count, filters) in self._grouped.items():
            find_layer(self.network, name).groups = count * len(tensors[f"{name}.weight"]) // filters
        return functional_call(self.network, tensors, (images,))

    def weights_at(self, widths: Mapping[str, int]) -> dict[str, torch.Tensor]:
        """Name of a parameter of the network -> what it is at these widths, for all parameters that depend on them.

        widths: group -> channels, for all groups.
        """
        masks = keep_masks((group, range(widths[group.name])) for group in self._groups)
        whole = np.ones(1)
        shares = [[masks.get((name, axis), whole).mean() for axis in ("in", "out")] for name in self._generated]
        encodings_L2 = torch.tensor(shares, dtype=torch.float32, device=self.generators[0][0].weight.device)
        tensors = {}
        for name, generator, encoding in zip(self._generated, self.generators, encodings_L2, strict=True):
            layer = find_layer(self.network, name)
            tensors[f"{name}.weight"] = _cropped(generator(encoding).view(self._shapes[name]), layer, name, masks)
            if layer.bias is not None and (name, "out") in masks:
                tensors[f"{name}.bias"] = _first(layer.bias, 0, masks[name, "out"])
        return tensors

    @torch.no_grad()
    def fill(self, network: nn.Module, widths: Mapping[str, int]) -> None:
        """Give an ordinary network at these widths the weights that this one has there, in place.

        Batch norm gets factors of one and offsets of zero; its running statistics stay as they are.
        """
        stored = dict(self.network.named_parameters()) | self.weights_at(widths)
        for name, layer in network.named_modules():
            for key, parameter in layer.named_parameters(recurse=False):
                if isinstance(layer, _BatchNorm):
                    parameter.fill_(1.0 if key == "weight" else 0.0)
                else:
                    parameter.copy_(stored[f"{name}.{key}".removeprefix(".")])


def widths_at_scales(
    groups: Sequence[ChannelGroup], narrowest: float, scales: int, options: PlanOptions
) -> dict[str, tuple[int, ...]]:
    """Group -> its width at each of so many scales, evenly from `narrowest` to 1: a share of its channels, rounded down
    to whole ones and then up to the widths that the options allow.
    """
    shares = np.linspace(narrowest, 1, scales)
    return {
        group.name: tuple(
            round_up(max(1, int(group.width * share + 1e-9)), options.allowed_widths(group)) for share in shares
        )
        for group in groups
    }


def _layers_of(
    network: nn.Module, groups: Sequence[ChannelGroup]
) -> tuple[list[str], dict[str, tuple[ChannelGroup, Place]]]:
    """(layers whose weights depend on widths; batch norms, and the group and the place of each).

    CupError for any other layer with channels of its own, and for a batch norm over channels of several groups.
    """
    generated: dict[str, None] = {}
    norms: dict[str, tuple[ChannelGroup, Place]] = {}
    for group in groups:
        for place in group.places:
            layer = find_layer(network, place.module)
            if isinstance(layer, (*CONVS, nn.Linear)):
                generated[place.module] = None
            elif isinstance(layer, _BatchNorm) and layer.track_running_stats and (place.channel_of_index >= 0).all():
                norms[place.module] = group, place
            else:
                raise CupError(
                    f"{place.module} ({type(layer).__name__}) cannot be part of a PruningNet; allowed: convolutions, "
                    "linear layers, and batch norms over one channel group each; prune.scope inner leaves streams alone"
                )
    return list(generated), norms


def _generator(layer: nn.Module, hidden: int) -> nn.Sequential:
    """Shares of channels read and written (2,) -> the layer's whole weight, flat.

    It begins as the layer's own initial weight, to which the widths add about a third of its size: networks without
    batch norm cannot do with the default initialisation, as which the authors leave it.
    """
    generator = nn.Sequential(nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, layer.weight.numel()))
    with torch.no_grad():
        nn.init.normal_(generator[2].weight, std=float(layer.weight.std()) / hidden**0.5)
        generator[2].bias.copy_(layer.weight.flatten())
    return generator


def _cropped(weight: torch.Tensor, layer: nn.Module, name: str, masks: Masks) -> torch.Tensor:
    for axis in ("in", "out"):
        if (name, axis) in masks:
            weight = _first(weight, weight_dim(layer, axis), masks[name, axis])
    return weight


def _first(tensor: torch.Tensor, dim: int, mask: np.ndarray) -> torch.Tensor:
    """What the mask keeps of a dimension; a view where these are the first entries, as they mostly are."""
    count = int(mask.sum())
    if mask[:count].all():
        return tensor.narrow(dim, 0, count)
    return tensor.index_select(dim, torch.from_numpy(mask.nonzero()[0]).to(tensor.device))
