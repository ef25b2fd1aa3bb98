"""From a traced graph to channel groups.

The walk visits the graph once and carries labels (labels.py) from producers to consumers by the rules of rules.py: a
flatten repeats each of them, a concatenation strings arrays together, an addition ties two labels into one. What the
rules do not cover freezes the labels it touches, with the reason; the walk never guesses.
"""

import operator
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from cup.tracing.groups import OUTSIDE, AxisName, Call, ChannelGroup, Network, Place, TracedOp, Value
from cup.tracing.labels import Channels, Labels
from cup.tracing.layers import weight_of
from cup.tracing.meta import Sample
from cup.tracing.rules import (
    KEYWORD_OPERANDS,
    LAYER_FUNCTIONS,
    Operation,
    find_rule,
    freeze_what_is_counted,
    gives_parts,
    has_width,
    is_constant,
    layer_at,
    owner_of,
    product_macs,
    reads_no_width,
    shape_of,
    unscaled,
)
from cup.tracing.tracer import TRACED_SAMPLES, Trace


def groups_of(trace: Trace, sample: Sample) -> list[ChannelGroup]:
    """The channel groups of a traced network, in network order."""
    return _Walk(trace).groups(sample)


Entries = list[tuple[str, np.ndarray]]
"""(layer or free parameter, int64: the channel at each of its indices, -1 for another group's)."""

IS_OUTPUT = "it is an output of the network"


class _Walk:
    """Visits every node once, in order; `channels` holds what is known of each value's channel axis."""

    def __init__(self, trace: Trace) -> None:
        self.trace, self.nodes, self.twin = trace, list(trace.graph.nodes), trace.root
        self.layer_of = {node: layer_at(node, self.twin) for node in self.nodes}
        self.shared, self.free = self._shared_layers(), self._free_tensors()
        self.labels = Labels()
        self.channels: dict[fx.Node, Channels | None] = {}
        self.calls: list[tuple[str, fx.Node, Channels | None, fx.Node, Channels | None]] = []
        self.first_use: dict[int | str, tuple[Channels | None, Channels | None]] = {}

    def groups(self, sample: Sample) -> list[ChannelGroup]:
        for node in self.nodes:
            self.channels[node] = self._visit(node)
            if (self.layer_of[node] is not None or product_macs(node)) and node.args and shape_of(node.args[0]):
                value = node.args[0]
                if shape_of(node):
                    self.calls.append((self.layer_of[node], value, self.channels[value], node, self.channels[node]))
        freeze_what_is_counted(self.nodes, self.trace.asked, self.channels, self.labels)
        for node, module in self.trace.hooked:
            self.labels.freeze([self.channels[node]], f"{module} has a forward hook, which may do anything")
        return self._assemble(sample)

    def _visit(self, node: fx.Node) -> Channels | None:
        inputs = [self.channels[n] for n in node.all_input_nodes if self.channels[n] is not None]
        layer = self.layer_of[node]
        if node.op == "output":
            self.labels.freeze(inputs, IS_OUTPUT)
            return None
        if node.op == "get_attr":
            return self._read(node)
        if node.op == "placeholder" or (shape_of(node) is None and not gives_parts(node)):
            if node.meta.get("unknown"):  # several tensors in one value: a chunk, a split, attention, several heads
                is_output = all(user.op == "output" for user in node.users)
                self.labels.freeze(inputs, IS_OUTPUT if is_output else f"{title(node)} is not followed")
            elif not reads_no_width(node):
                self.labels.freeze(inputs, f"{title(node)} may read its width as a number")
            return None  # the network's input, or a size: no channels that could go
        if layer in self.shared:
            reason = f"{layer} shares a parameter"
        elif _tensor_keywords(node):
            reason = f"{title(node)} is called with keywords"
        else:
            module = None if layer is None else self.twin.get_submodule(layer)
            operation = Operation(node, layer or title(node), module, self.channels, self.twin)
            if (rule := find_rule(operation)) is not None:
                result = rule(operation, self.labels)
                return self._as_before(layer, operation.value, result) if has_width(module) else result
            reason = f"{title(node)} is not followed"
        self.labels.freeze(inputs, reason)
        if layer is not None:
            self.labels.freeze(self.first_use.get(self._weight(layer), ()), reason)
            self.first_use[self._weight(layer)] = (None, None)
        self._freeze_output(layer, reason)
        return None

    def _weight(self, layer: str) -> int | str:
        """What tells the layer from all others, but for those that have its weight."""
        weight = weight_of(self.twin.get_submodule(layer))
        return layer if weight is None else id(weight)

    def _read(self, node: fx.Node) -> Channels | None:
        """A free parameter or buffer with one long axis has channels: those of the values that it is combined with."""
        if node.target not in self.free:
            return None
        known = self.free[node.target]
        if known is None:
            shape = shape_of(node)
            known = self.free[node.target] = Channels(shape.index(max(shape)), self.labels.fresh(max(shape)))
            self.labels.followers.append((node.target, known.labels_C))
        return known

    def _as_before(self, layer: str, value: Channels | None, result: Channels | None) -> Channels | None:
        """Where the layer, or another with its weight, ran before: tie what it reads and gives to what it did then."""
        key = self._weight(layer)
        if key not in self.first_use:
            self.first_use[key] = (value, result)
            return result
        for before, now in zip(self.first_use[key], (value, result), strict=True):
            if before is None or now is None or len(before.labels_C) != len(now.labels_C):
                self.labels.freeze([before, now], f"{layer} is used more than once, and not all of it is followed")
            else:
                self.labels.ties.append((before.labels_C, now.labels_C))
        return result

    def _freeze_output(self, layer: str | None, reason: str) -> None:
        """A layer that is not followed is a frozen group of its own: nothing can be pruned through it."""
        module = None if layer is None else self.twin.get_submodule(layer)
        width = getattr(module, "out_channels", getattr(module, "out_features", None))
        if isinstance(width, int) and all(name != layer for name, _ in self.labels.producers):
            labels_C = self.labels.frozen_fresh(width, reason)
            self.labels.producers.append((layer, labels_C))

    def _free_tensors(self) -> dict[str, Channels | None]:
        """Parameters and buffers with one long axis that belong to no layer and have one name only."""
        layers = set(self.layer_of.values())
        named = self._named_tensors()
        names = Counter(id(tensor) for _, tensor in named)
        return {
            name: None
            for name, tensor in named
            if name.rpartition(".")[0] not in layers
            and names[id(tensor)] == 1
            and tensor.dim() > 0
            and tensor.numel() == max(tensor.shape) > 1
        }

    def _named_tensors(self) -> list[tuple[str, torch.Tensor]]:
        return [
            *self.twin.named_parameters(remove_duplicate=False),
            *self.twin.named_buffers(remove_duplicate=False),
        ]

    def _shared_layers(self) -> set[str]:
        """Layers that share a parameter or buffer with something else than a layer of their kind with the same weight.

        Scalars (a batch norm's count of batches) are nothing to share: they have no channels.
        """
        layers = {layer: self.twin.get_submodule(layer) for layer in self.layer_of.values() if layer is not None}
        tensors = [(name, tensor) for name, tensor in self._named_tensors() if tensor.dim() > 0]
        users: dict[int, set[tuple[Any, ...]]] = {}
        for name, tensor in tensors:
            owner, _, attribute = name.rpartition(".")
            user = (type(layers[owner]), attribute, self._weight(owner)) if owner in layers else (name,)
            users.setdefault(id(tensor), set()).add(user)
        for node in self.nodes:
            if node.op == "get_attr" and not all(map(self._is_in_layer, node.users)):
                tensor = operator.attrgetter(node.target)(self.twin)
                users.setdefault(id(tensor), set()).add(("something that reads it as a tensor",))
        return {
            owner
            for name, tensor in tensors
            if (owner := name.rpartition(".")[0]) in layers and len(users[id(tensor)]) > 1
        }

    def _is_in_layer(self, reader: fx.Node) -> bool:
        """Whether what reads a parameter is a layer's work, or scales it for one."""
        if self.layer_of[reader] is not None:
            return True
        return unscaled(reader) is not reader and all(map(self._is_in_layer, reader.users))

    # --- from labels to groups ---

    def _assemble(self, sample: Sample) -> list[ChannelGroup]:
        channel_of, group_of = self.labels.channels(), self.labels.groups()
        frozen = reversed(self.labels.frozen)  # of several reasons the first
        reasons = {int(group_of[label]): reason for labels_C, reason in frozen for label in labels_C}
        residual = {int(group_of[label]) for labels_C in self.labels.residual for label in labels_C}

        found: dict[str, dict[int, Entries]] = {}
        for role in ("producers", "followers", "consumers"):
            found[role] = {}
            for layer, labels_C in getattr(self.labels, role):
                channel_C, group_C = channel_of[labels_C], group_of[labels_C]
                for group in np.unique(group_C).tolist():
                    if role == "producers" or group in found["producers"]:  # a long buffer's labels are a group each
                        own_C = np.where(group_C == group, channel_C, -1)
                        found[role].setdefault(group, []).append((layer, own_C))
        network = self._network(sample, channel_of)
        return [
            self._group(
                {role: groups.get(group, []) for role, groups in found.items()},
                reasons.get(group, ""),
                group not in residual,
                network,
            )
            for group in found["producers"]
        ]

    def _network(self, sample: Sample, channel_of: np.ndarray) -> Network:
        def numbers(value: Channels | None) -> np.ndarray | None:
            return None if value is None else channel_of[value.labels_C]

        calls = tuple(
            Call(
                OUTSIDE if layer is None else layer,
                _of_one_sample(read),
                _of_one_sample(written),
                numbers(value),
                numbers(result),
                0 if layer is not None else product_macs(written) // TRACED_SAMPLES,
                layer or owner_of(written),
            )
            for layer, read, value, written, result in self.calls
        )
        alive = np.ones(channel_of.max(initial=-1) + 1, dtype=bool)
        return Network(sample, calls, alive, *self._operations(channel_of))

    def _operations(self, channel_of: np.ndarray) -> tuple[tuple[Value, ...], tuple[TracedOp, ...]]:
        """Every tensor of the graph, and every operation that reads one."""
        position: dict[fx.Node, int] = {}
        values: list[Value] = []
        operations: list[TracedOp] = []
        for node in self.nodes:
            if (shape := shape_of(node)) is not None:
                position[node] = len(values)
                known = self.channels[node]
                axis = (None, None) if known is None else (known.dim, channel_of[known.labels_C])
                parameter = node.target if node.op == "get_attr" else ""
                values.append(Value(shape, 0 if is_constant(node) else TRACED_SAMPLES, *axis, parameter))
            reads = tuple(position[n] for n in node.all_input_nodes if n in position)
            if reads and node.op.startswith("call"):
                operations.append(TracedOp(_operation_name(node, self.twin), owner_of(node), reads, position.get(node)))
        return tuple(values), tuple(operations)

    def _group(self, entries: dict[str, Entries], reason: str, inner: bool, network: Network) -> ChannelGroup:
        name, first_C = entries["producers"][0]
        channels = np.array([one for one in dict.fromkeys(first_C.tolist()) if one >= 0], dtype=np.int64)
        if not reason and len(channels) == 1 < (first_C >= 0).sum():
            reason = "its channels are tied to each other"
        for layer, channels_C in entries["producers"]:
            if not reason and len(set(np.unique(channels_C[channels_C >= 0], return_counts=True)[1])) > 1:
                reason = f"{layer} has more filters for some of its channels than for others"
        for layer, channels_C in entries["producers"][1:]:
            if not reason and set(channels_C[channels_C >= 0].tolist()) != set(channels.tolist()):
                reason = f"it shares only some of its channels with {layer}"
        number = np.full(len(network.alive) + 1, -1, dtype=np.int64)  # the last entry maps -1 to -1
        number[channels] = np.arange(len(channels))

        def places(axis: AxisName, role: str) -> tuple[Place, ...]:
            once = dict(entries[role]).items()  # a layer that runs twice has two entries alike
            indices = ((layer, number[channels_C]) for layer, channels_C in once)
            return tuple(Place(layer, axis, index_C) for layer, index_C in indices if (index_C >= 0).any())

        return ChannelGroup(
            name=name,
            width=len(channels),
            producers=places("out", "producers"),
            followers=places("out", "followers"),
            consumers=places("in", "consumers"),
            inner=inner,
            frozen=reason,
            numbers=channels,
            full_width=len(channels),
            network=network,
        )


def _of_one_sample(node: fx.Node) -> tuple[int, ...]:
    """The shape for one of the samples that are traced together.

    They may be rows among others (tokens or windows of all samples in one dimension), or lie behind the tokens.
    """
    shape = shape_of(node)
    if is_constant(node):
        return shape
    if shape[0] % TRACED_SAMPLES == 0:
        return (shape[0] // TRACED_SAMPLES, *shape[1:])
    dim = shape.index(TRACED_SAMPLES) if TRACED_SAMPLES in shape[1:-1] else 0
    return (*shape[:dim], 1, *shape[dim + 1 :])


def _tensor_keywords(node: fx.Node) -> bool:
    """Whether a tensor is passed by keyword: the rules look at positions, and at a layer's own weights by name."""
    if node.target in KEYWORD_OPERANDS and len(node.args) >= 3:  # query, key and value; a mask may have a name
        return False
    found: list[fx.Node] = []
    fx.map_arg(node.kwargs, found.append)
    values = [n for n in found if not (n.op == "get_attr" and node.target in LAYER_FUNCTIONS)]
    return any(shape_of(n) is not None or n.meta.get("unknown") for n in values)


def _operation_name(node: fx.Node, twin: nn.Module) -> str:
    """As in `TracedOp.name`: one spelling for a module, a function and a method that do the same."""
    module = twin.get_submodule(node.target) if node.op == "call_module" else None
    if isinstance(module, nn.Linear):
        return "linear"
    return (title(node) if module is None else type(module).__name__).lower().replace("_", "")


def title(node: fx.Node) -> str:
    """What a node is called in a reason: a module's dotted name, or a function's."""
    if node.op == "call_module":
        return node.target
    return getattr(node.target, "__name__", str(node.target))
