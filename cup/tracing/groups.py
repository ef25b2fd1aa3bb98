"""Channel groups: which places of a network share one channel axis, as plain data, and arithmetic on it.

Every index of every weight's axis knows its channel, and that is all that surgery has to know.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from cup.errors import CupError
from cup.tracing.layers import AxisName, axis_length, find_layer

Masks = dict[tuple[str, AxisName], np.ndarray]
"""(module, axis) -> bool over the axis, False where the channel at that index goes; axes that lose none are absent."""


OUTSIDE = "(products outside of layers)"
"""What a `Call` and a `LayerCost` name as the module of attention's products."""


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module in the forward pass, or one product of attention, for counting its cost at other widths.

    input_shape, output_shape: of one sample, at the widths of the trace; mostly (1, ...), but (tokens, ...) where those
        of all samples are in one dimension.
    reads, writes: int64, the trace's number of the channel at each index of the input's and the output's channel
        axis; None where no channel can go.
    macs: of a product outside of layers: multiply-adds for one sample at the widths of the trace.
    within: dotted name of the innermost module that does it; `module` itself, but for products outside of layers.
    """

    module: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    reads: np.ndarray | None
    writes: np.ndarray | None
    macs: int = 0
    within: str = ""


@dataclass(frozen=True, eq=False)
class Value:
    """One tensor of the forward pass, at the widths of the trace.

    shape: of so many `samples` together; 0 samples for what does not depend on the input (a parameter, a buffer).
    dim, numbers: the channel axis, and int64, the trace's number of the channel at each of its indices; None where
        no channel can go.
    parameter: dotted name of the parameter or buffer that it is, else "".
    """

    shape: tuple[int, ...]
    samples: int
    dim: int | None = None
    numbers: np.ndarray | None = None
    parameter: str = ""


@dataclass(frozen=True, eq=False)
class TracedOp:
    """One operation of the forward pass, a module's or a function's, for estimating how long it takes.

    name: of the module's class or the function, in lower case without underscores (conv2d, batchnorm2d, relu, iadd).
    module: dotted name of the innermost module that does it.
    reads, writes: positions in `Network.values`; writes is None where the result is no single tensor.
    in_evaluation: False for what only training runs (auxiliary heads).
    """

    name: str
    module: str
    reads: tuple[int, ...]
    writes: int | None
    in_evaluation: bool = True


@dataclass(frozen=True, eq=False)
class Dense:
    """What the trace saw before any block was dropped.

    gone: name of each dropped block -> its modules, on meta. wrote: its name -> the groups that stayed -> how many of
    its layers wrote them.
    """

    calls: tuple[Call, ...]
    operations: tuple[TracedOp, ...]
    gone: Mapping[str, nn.Module]
    wrote: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True, eq=False)
class Network:
    """What the trace saw of the network as a whole; its groups share one.

    input_shape: one sample's shape, without the batch. alive: bool, one entry for each channel that the trace numbered.
    values, operations: every tensor, and what is done to it, in the order of the forward pass in training; of
        `values` also those that were in blocks which have been dropped since.
    dense: what was there before a block was dropped; None where none was.
    """

    input_shape: tuple[int, ...]
    calls: tuple[Call, ...]
    alive: np.ndarray
    values: tuple[Value, ...] = ()
    operations: tuple[TracedOp, ...] = ()
    dense: Dense | None = None

    @property
    def before_drops(self) -> "Network":
        """The same with the calls and operations of the blocks that have been dropped; `find` still knows these."""
        if self.dense is None:
            return self
        return replace(self, calls=self.dense.calls, operations=self.dense.operations)

    def find(self, model: nn.Module, name: str) -> nn.Module:
        """The module of this name; of a dropped block, as it was."""
        gone = {} if self.dense is None else self.dense.gone
        # Of a block that was dropped inside another, the inner one: the outer one has an identity in its place.
        block = max((block for block in gone if is_within(name, block)), key=len, default=None)
        return model.get_submodule(name) if block is None else gone[block].get_submodule(name[len(block) + 1 :])


@dataclass(frozen=True, eq=False)
class Place:
    """One axis of one layer that carries (some of) a group's channels.

    module: dotted name in the model, of a layer or of a free parameter (a layer scale).
    axis: "out" (filters of a conv or linear layer, the entries of a norm) or "in" (what it reads).
    channel_of_index: int64 (axis length,): the group's channel that sits at each index, -1 where another group's does.
        Arange for a plain layer; each channel repeated for a linear layer behind a flatten; offset behind a concat.
    """

    module: str
    axis: AxisName
    channel_of_index: np.ndarray


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """All the places that share one channel axis; they keep or lose a channel together.

    name: dotted name of the first producer in network order.
    width: channels. Where a grouped convolution or group norm binds several filters together, they are one channel.
    producers: conv and linear layers that write these channels (axis "out").
    followers: norms, grouped and depthwise convolutions, PReLUs, layer scales: entries of their own for each channel
        (axis "out").
    consumers: conv and linear layers that read these channels (axis "in").
    inner: no residual addition touches the group; the paper prunes inner groups only.
    frozen: why the group must keep its width, or "" where it may shrink.
    numbers: int64 (width,), the trace's number of each channel.
    full_width: channels that the group had in the trace, before any cut.
    network: what the trace saw of the whole network.
    """

    name: str
    width: int
    producers: tuple[Place, ...]
    followers: tuple[Place, ...]
    consumers: tuple[Place, ...]
    inner: bool
    frozen: str
    numbers: np.ndarray
    full_width: int
    network: Network

    @property
    def places(self) -> tuple[Place, ...]:
        return self.producers + self.followers + self.consumers


def is_within(name: str, module: str) -> bool:
    """Whether the dotted name is the module's, or of something in it."""
    return name == module or name.startswith(f"{module}.")


def prunable_groups(groups: Iterable[ChannelGroup], scope: str = "inner") -> list[ChannelGroup]:
    """The groups that a planner with this scope (of `PlanOptions`) cuts, in network order."""
    return [group for group in groups if not group.frozen and (group.inner or scope == "all")]


def check_groups(model: nn.Module, groups: Sequence[ChannelGroup]) -> None:
    """Raise CupError unless the groups describe the model as it is now, all their places included."""
    for group in groups:
        for place in group.places:
            width = axis_length(find_layer(model, place.module), place.axis)
            if width is None:
                raise CupError(f"these groups are another network's: {place.module} is no layer with channels")
            if width != len(place.channel_of_index):
                raise CupError(
                    f"these groups are out of date: {place.module} has {width} channels, they say "
                    f"{len(place.channel_of_index)}; trace again, or take the groups that apply_plan returned"
                )


def keep_masks(kept: Iterable[tuple[ChannelGroup, Sequence[int]]]) -> Masks:
    """The masks of all places of the given groups when only the given channels stay."""
    masks: Masks = {}
    for group, channels in kept:
        add_masks(masks, group, channels)
    return masks


def add_masks(masks: Masks, group: ChannelGroup, channels: Sequence[int]) -> None:
    """Take one more group into `masks`, in place; the arrays that were there stay as they are."""
    stays = np.zeros(group.width, dtype=bool)
    stays[list(channels)] = True
    for place in group.places:
        mine = np.where(place.channel_of_index >= 0, stays[place.channel_of_index], True)
        key = (place.module, place.axis)
        masks[key] = masks[key] & mine if key in masks else mine


def narrow_groups(groups: Iterable[ChannelGroup], kept: Mapping[str, Sequence[int]]) -> list[ChannelGroup]:
    """The groups as a new trace would find them after surgery, by arithmetic alone.

    But for one thing: where a grouped convolution or group norm is down to one group, its filters stay bound together,
    while a new trace would see an ordinary layer and let them go one by one.

    kept: group name -> channels that stay; groups that it does not name keep their width.
    """
    groups = list(groups)
    if not groups:
        return []
    masks = keep_masks((group, kept[group.name]) for group in groups if group.name in kept)
    network = replace(groups[0].network, alive=alive_after(groups, kept))
    return [_narrow_group(group, kept.get(group.name, range(group.width)), masks, network) for group in groups]


def without_blocks(groups: Sequence[ChannelGroup], dropped: Mapping[str, nn.Module]) -> list[ChannelGroup]:
    """The groups as a new trace would find them once these blocks give back what they read, by arithmetic alone.

    But what a block has frozen, bound together or made residual stays so. dropped: names of blocks, none in another
    one, -> their modules, on meta.
    """
    gone = {group.name: () for group in groups if all(_is_in_one(place, dropped) for place in group.producers)}
    network = replace(_without(groups[0].network, dropped), alive=alive_after(groups, gone))
    staying = [group for group in groups if group.name not in gone]
    wrote = {block: _written_by(block, staying) for block in dropped}
    network = replace(network, dense=replace(network.dense, wrote={**network.dense.wrote, **wrote}))
    return [_outside(group, dropped, network) for group in staying]


def _is_in_one(place: Place, blocks: Iterable[str]) -> bool:
    return any(is_within(place.module, block) for block in blocks)


def _written_by(block: str, groups: Iterable[ChannelGroup]) -> dict[str, int]:
    """Group -> how many of the block's layers write it, of those that any does."""
    counts = {group.name: sum(is_within(place.module, block) for place in group.producers) for group in groups}
    return {name: count for name, count in counts.items() if count}


def _outside(group: ChannelGroup, blocks: Iterable[str], network: Network) -> ChannelGroup:
    """The group without its places in these blocks."""
    roles = ("producers", "followers", "consumers")
    places = {role: tuple(one for one in getattr(group, role) if not _is_in_one(one, blocks)) for role in roles}
    return replace(group, **places, network=network)


def _without(network: Network, dropped: Mapping[str, nn.Module]) -> Network:
    """The network whose blocks of these names give back what they read."""
    calls, operations = network.calls, network.operations
    for block in dropped:
        calls = tuple(call for call in calls if not is_within(call.within, block))
        inside = [op for op in operations if is_within(op.module, block)]
        rest = [op for op in operations if not is_within(op.module, block)]
        written = {op.writes for op in inside}
        own = (position for op in inside for position in op.reads if position not in written)
        # The first one: what the block reads is there before all that it makes, parts of tuples included.
        read = min((position for position in own if network.values[position].samples), default=None)
        operations = tuple(
            replace(op, reads=tuple(read if position in written else position for position in op.reads)) for op in rest
        )
    before = network.dense or Dense(network.calls, network.operations, {}, {})
    dense = replace(before, gone={**before.gone, **dropped})
    return replace(network, calls=calls, operations=operations, dense=dense)


def alive_after(groups: Sequence[ChannelGroup], kept: Mapping[str, Sequence[int]]) -> np.ndarray:
    """bool, one entry for each channel that the trace numbered: whether it is there once only `kept` channels are."""
    alive = groups[0].network.alive.copy()
    for group in groups:
        if group.name in kept:
            alive[group.numbers] = False
            alive[group.numbers[list(kept[group.name])]] = True
    return alive


def _narrow_group(group: ChannelGroup, channels: Sequence[int], masks: Masks, network: Network) -> ChannelGroup:
    new_channel = np.full(group.width + 1, -1, dtype=np.int64)  # the last entry maps -1 to -1
    new_channel[list(channels)] = np.arange(len(channels))

    def narrow(place: Place) -> Place:
        mask = masks.get((place.module, place.axis), slice(None))
        return replace(place, channel_of_index=new_channel[place.channel_of_index[mask]])

    return replace(
        group,
        width=len(channels),
        producers=tuple(map(narrow, group.producers)),
        followers=tuple(map(narrow, group.followers)),
        consumers=tuple(map(narrow, group.consumers)),
        numbers=group.numbers[list(channels)],
        network=network,
    )
