"""Find the channel groups of a network by tracing it with torch.fx.

Every channel that a layer produces gets a label of its own (an integer). The labels travel through the graph as an
array, one entry for each index of a tensor's channel axis: a flatten repeats each of them, a concatenation strings
arrays together, an addition ties two labels into one. What the trace does not understand freezes the labels it
touches, with the reason; it never guesses.

Labels stand in int64 arrays named `_C`: one entry for each index of the channel axis.
"""

import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import fx, nn

from cup.errors import CupError
from cup.groups import AxisName, Call, ChannelGroup, Network, Place
from cup.meta import find_input_shape, meta_copy, meta_input


def channel_groups(model: nn.Module, example_input: torch.Tensor | None = None) -> list[ChannelGroup]:
    """Trace `model` and return its channel groups in network order, frozen ones included.

    example_input: tensor (N, ...) of the shape that the network takes; only its shape matters. Without one, common
        shapes are tried on the meta device. The model is neither run nor changed.
    Raises CupError where torch.fx cannot trace the network or the input does not fit.
    """
    # In training mode, so that auxiliary heads are part of the graph; two samples, so that batch norm accepts 1x1 maps.
    twin = meta_copy(model).train()
    shape = find_input_shape(model) if example_input is None else tuple(example_input.shape[1:])
    try:
        graph = fx.symbolic_trace(twin)
    except Exception as error:  # torch.fx raises many types for what it cannot follow
        raise CupError(f"torch.fx cannot trace {type(model).__name__}: {_first_line(error)}") from error
    try:
        with torch.no_grad():
            _Shapes(graph).run(meta_input(shape, batch=2))
    except Exception as error:
        raise CupError(f"{type(model).__name__} does not take inputs of shape {shape}: {_first_line(error)}") from error
    return _Tracer(graph, shape).groups()


@dataclass(frozen=True, eq=False)
class _Channels:
    """A tensor's channel axis: which dimension it is, and the label at each of its indices."""

    dim: int
    labels_C: np.ndarray


@dataclass
class _Tracer:
    """Walks the traced graph once and carries labels from producers to consumers."""

    graph: fx.GraphModule
    input_shape: tuple[int, ...]
    next_label: int = 0
    ties: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    frozen: list[tuple[np.ndarray, str]] = field(default_factory=list)
    residual: list[np.ndarray] = field(default_factory=list)
    producers: list[tuple[str, np.ndarray]] = field(default_factory=list)
    followers: list[tuple[str, np.ndarray]] = field(default_factory=list)
    consumers: list[tuple[str, np.ndarray]] = field(default_factory=list)
    calls: list[tuple[fx.Node, _Channels | None, _Channels | None]] = field(default_factory=list)

    def groups(self) -> list[ChannelGroup]:
        shared = self._shared_modules()
        channels: dict[fx.Node, _Channels | None] = {}
        for node in self.graph.graph.nodes:
            channels[node] = self._visit(node, channels, shared)
            if node.op == "call_module" and node.args and _shape(node.args[0]) and _shape(node):
                self.calls.append((node, channels[node.args[0]], channels[node]))
        return self._assemble()

    # --- the walk ---

    def _visit(self, node: fx.Node, channels: dict, shared: set[str]) -> _Channels | None:
        inputs = [channels[n] for n in node.all_input_nodes if channels[n] is not None]
        if node.op == "output":
            self._freeze(inputs, "it is an output of the network")
            return None
        if _shape(node) is None or node.op in ("placeholder", "get_attr"):
            if node.meta.get("unknown"):  # several tensors in one value: a chunk, a split, attention
                self._freeze(inputs, f"{_describe(node)} is not followed")
            return None  # the network's input, a free parameter, a size: no channels that could go
        if node.op == "call_module":
            module = self.graph.get_submodule(node.target)
            if node.target in shared:
                self._freeze(inputs, f"{node.target} is used more than once or shares a parameter")
                return self._fresh_frozen(node, f"{node.target} is used more than once or shares a parameter")
            if _tensor_keywords(node):
                self._freeze(inputs, f"{_describe(node)} is called with keywords")
                return self._fresh_frozen(node, f"{_describe(node)} is called with keywords")
            rule = _module_rule(module)
            if rule is not None:
                return rule(self, node, module, channels)
        elif (rule := _RULES.get(node.target)) is not None and not _tensor_keywords(node):
            return rule(self, node, channels)
        self._freeze(inputs, f"{_describe(node)} is not followed")
        return None

    def _shared_modules(self) -> set[str]:
        """Modules with parameters that run twice, or that share a parameter with another module."""
        calls: dict[str, int] = {}
        for node in self.graph.graph.nodes:
            if node.op == "call_module":
                calls[node.target] = calls.get(node.target, 0) + 1
        users: dict[int, set[str]] = {}
        for name in calls:
            for parameter in self.graph.get_submodule(name).parameters():
                users.setdefault(id(parameter), set()).add(name)
        for node in self.graph.graph.nodes:
            if node.op == "get_attr":
                parameter = operator.attrgetter(node.target)(self.graph)
                if id(parameter) in users:
                    users[id(parameter)].add("read as a tensor")
        twice = {name for name, n in calls.items() if n > 1 and self.graph.get_submodule(name).state_dict()}
        return twice | {name for names in users.values() if len(names) > 1 for name in names}

    def _fresh(self, count: int) -> np.ndarray:
        self.next_label += count
        return np.arange(self.next_label - count, self.next_label)

    def _fresh_frozen(self, node: fx.Node, reason: str) -> None:
        """The output of a layer that is not followed: nothing behind it can be pruned through it."""
        module = self.graph.get_submodule(node.target)
        width = getattr(module, "out_channels", getattr(module, "out_features", None))
        if width is not None and all(name != node.target for name, _ in self.producers):
            labels_C = self._fresh(width)
            self.producers.append((node.target, labels_C))
            self.frozen.append((labels_C, reason))

    def _freeze(self, inputs: Iterable[_Channels | None], reason: str) -> None:
        self.frozen.extend((value.labels_C, reason) for value in inputs if value is not None)

    # --- rules for modules ---

    def _conv(self, node: fx.Node, conv: nn.Module, channels: dict) -> _Channels | None:
        value = channels[node.args[0]]
        if value is not None and (value.dim != 1 or len(_shape(node)) != conv.weight.dim()):
            self._freeze([value], f"{node.target} works across another axis than the channels")
            value = None
        if conv.groups == 1:
            return self._weight_layer(node, value, conv.out_channels)
        if conv.groups == conv.in_channels and value is not None and value.dim == 1:
            labels_C = np.repeat(value.labels_C, conv.out_channels // conv.in_channels)
            self.followers.append((node.target, labels_C))
            return _Channels(1, labels_C)
        reason = f"{node.target} is a grouped convolution"
        self._freeze([value], reason)
        return self._fresh_frozen(node, reason)

    def _linear(self, node: fx.Node, linear: nn.Linear, channels: dict) -> _Channels | None:
        value = channels[node.args[0]]
        last = len(_shape(node)) - 1
        if value is not None and value.dim != last:
            self._freeze([value], f"{node.target} mixes another axis than the channels")
            value = None
        return self._weight_layer(node, value, linear.out_features, dim=last)

    def _weight_layer(self, node: fx.Node, value: _Channels | None, width: int, dim: int = 1) -> _Channels:
        if value is not None:
            self.consumers.append((node.target, value.labels_C))
        labels_C = self._fresh(width)
        self.producers.append((node.target, labels_C))
        return _Channels(dim, labels_C)

    def _batch_norm(self, node: fx.Node, norm: nn.Module, channels: dict) -> _Channels | None:
        value = channels[node.args[0]]
        if value is not None and value.dim != 1:
            self._freeze([value], f"{node.target} normalises another axis than the channels")
            return None
        if value is not None:
            self.followers.append((node.target, value.labels_C))
        return value

    # --- rules shared by modules, functions and methods ---

    def _same(self, node: fx.Node, channels: dict) -> _Channels | None:
        return channels[node.args[0]]

    def _spatial(self, node: fx.Node, channels: dict) -> _Channels | None:
        """Pooling and resampling: every axis behind the channels may change."""
        value = channels[node.args[0]]
        # One sample less a dimension is what pooling takes for one image without a batch.
        kind = type(self.graph.get_submodule(node.target)).__name__ if node.op == "call_module" else _describe(node)
        rank = 4 if "2d" in kind else 3
        if value is not None and (value.dim != 1 or _shape(node)[1] != len(value.labels_C) or len(_shape(node)) < rank):
            self._freeze([value], f"{_describe(node)} works across channels")
            return None
        return value

    def _reshape(self, node: fx.Node, channels: dict) -> _Channels | None:
        """Flatten, view, reshape: (N, C, ...) -> (N, C * ...), each channel a block of columns; or no change at all."""
        value = channels[node.args[0]]
        before, after = _shape(node.args[0]), _shape(node)
        if value is None:
            return None
        if node.target in _SIZED:
            sizes = node.args[1] if isinstance(node.args[1], list | tuple) else node.args[1:]
            if value.dim < len(sizes) and isinstance(sizes[value.dim], int) and sizes[value.dim] != -1:
                self._freeze([value], f"{_describe(node)} to a fixed size {sizes[value.dim]}")
                return None
        if before == after:
            return value
        if value.dim == 1 and len(after) == 2 and before[0] == after[0]:
            return _Channels(1, np.repeat(value.labels_C, math.prod(before[2:])))
        self._freeze([value], f"{_describe(node)} from {before[1:]} to {after[1:]} is not followed")
        return None

    def _mean(self, node: fx.Node, channels: dict) -> _Channels | None:
        value = channels[node.args[0]]
        dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        dims = [dims] if isinstance(dims, int) else dims
        if value is None:
            return None
        rank = len(_shape(node.args[0]))
        if dims is None or value.dim != 1 or any(d % rank < 2 for d in dims):
            self._freeze([value], f"{_describe(node)} works across channels")
            return None
        return value

    def _add(self, node: fx.Node, channels: dict) -> _Channels | None:
        value = self._elementwise(node, channels)
        operands = [n for n in node.args if isinstance(n, fx.Node) and channels[n] is not None]
        if len([n for n in node.args if isinstance(n, fx.Node) and _shape(n) is not None]) > 1:
            self.residual.extend(channels[n].labels_C for n in operands)
        return value

    def _elementwise(self, node: fx.Node, channels: dict) -> _Channels | None:
        """Binary operations: the operands' channels become the same channels."""
        operands = [n for n in node.args[:2] if isinstance(n, fx.Node) and _shape(n) is not None]
        values = [channels[n] for n in operands]
        if len(operands) == 1:
            if any(isinstance(n, fx.Node) and n is not operands[0] for n in node.args[:2]):
                self._freeze(values, f"{_describe(node)} uses a size of a tensor as a number")
                return None
            return values[0]
        first, second = values
        same_axis = (
            first is not None
            and second is not None
            and first.dim == second.dim
            and len(_shape(operands[0])) == len(_shape(operands[1]))
            and len(first.labels_C) == len(second.labels_C)
        )
        if not same_axis:
            self._freeze(values, f"{_describe(node)} combines it with values that are not followed")
            return None
        self.ties.append((first.labels_C, second.labels_C))
        return first

    def _cat(self, node: fx.Node, channels: dict) -> _Channels | None:
        if isinstance(node.args[0], fx.Node):
            return None  # the parts of a value that is not followed
        parts = list(node.args[0])
        values = [channels[n] for n in parts]
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        dim %= len(_shape(node))
        if any(value is None or value.dim != dim for value in values):
            self._freeze(values, f"{_describe(node)} joins it with values that are not followed")
            return None
        return _Channels(dim, np.concatenate([value.labels_C for value in values]))

    def _getitem(self, node: fx.Node, channels: dict) -> _Channels | None:
        value, index = channels[node.args[0]], node.args[1]
        if value is None:
            return None
        index = index if isinstance(index, tuple) else (index,)
        takes_all = value.dim >= len(index) or index[value.dim] == slice(None)
        if takes_all and all(_is_constant_slice(entry) for entry in index):
            return value
        self._freeze([value], f"{_describe(node)} is not followed")
        return None

    def _pad(self, node: fx.Node, channels: dict) -> _Channels | None:
        """F.pad: zero channels (CIFAR ResNets' shortcuts) are channels nobody produces, so they cannot go."""
        value = channels[node.args[0]]
        pad = node.args[1] if len(node.args) > 1 else node.kwargs["pad"]
        if value is None or not all(isinstance(width, int) for width in pad):
            self._freeze([value], f"{_describe(node)} is not followed")
            return None
        from_last = len(_shape(node)) - 1 - value.dim
        before, after = pad[2 * from_last : 2 * from_last + 2] or (0, 0)
        if before == after == 0:
            return value
        if before < 0 or after < 0:
            self._freeze([value], f"{_describe(node)} crops channels")
            return None
        zeros_C = self._fresh(before + after)
        self.frozen.append((zeros_C, "a shortcut pads it with zero channels"))
        return _Channels(value.dim, np.concatenate([zeros_C[:before], value.labels_C, zeros_C[before:]]))

    # --- from labels to groups ---

    def _assemble(self) -> list[ChannelGroup]:
        channel_of = _connected(self.next_label, self.ties)
        blocks = [(np.broadcast_to(labels_C[:1], labels_C.shape), labels_C) for _, labels_C in self.producers]
        group_of = _connected(self.next_label, self.ties + blocks)
        reasons = {int(group_of[label]): reason for labels, reason in reversed(self.frozen) for label in labels}
        residual = {int(group_of[label]) for labels in self.residual for label in labels}

        members: dict[int, list[tuple[str, np.ndarray]]] = {}
        for module, labels_C in self.producers:
            members.setdefault(int(group_of[labels_C[0]]), []).append((module, labels_C))
        network = self._network(channel_of)
        return [
            self._group(producers, channel_of, reasons.get(group, ""), group not in residual, network)
            for group, producers in members.items()
        ]

    def _network(self, channel_of: np.ndarray) -> Network:
        def axis(value: _Channels | None) -> tuple[np.ndarray | None, int]:
            return (None, 1) if value is None else (channel_of[value.labels_C], value.dim)

        calls = tuple(
            Call(node.target, (1, *_shape(node.args[0])[1:]), (1, *_shape(node)[1:]), *axis(value), *axis(result))
            for node, value, result in self.calls
        )
        return Network(self.input_shape, calls, np.ones(channel_of.max(initial=-1) + 1, dtype=bool))

    def _group(
        self,
        producers: list[tuple[str, np.ndarray]],
        channel_of: np.ndarray,
        reason: str,
        inner: bool,
        network: Network,
    ) -> ChannelGroup:
        name, first_C = producers[0]
        channels = channel_of[first_C]
        number = {int(channel): index for index, channel in enumerate(channels)}
        if not reason and len(number) < len(channels):
            reason = "its channels are tied to each other"
        for module, labels_C in producers[1:]:
            if not reason and sorted(channel_of[labels_C]) != sorted(channels):
                reason = f"it shares only some of its channels with {module}"

        def places(axis: AxisName, entries: list[tuple[str, np.ndarray]]) -> tuple[Place, ...]:
            found = []
            for module, labels_C in entries:
                index = np.array([number.get(int(channel), -1) for channel in channel_of[labels_C]], dtype=np.int64)
                if (index >= 0).any():
                    found.append(Place(module, axis, index))
            return tuple(found)

        return ChannelGroup(
            name=name,
            width=len(first_C),
            producers=places("out", producers),
            followers=places("out", self.followers),
            consumers=places("in", self.consumers),
            inner=inner,
            frozen=reason,
            numbers=channels,
            network=network,
        )


def _connected(count: int, ties: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """int (count,): the connected component of each label, given arrays of label pairs that belong together."""
    rows = np.concatenate([np.empty(0, dtype=np.int64), *(first for first, _ in ties)])
    columns = np.concatenate([np.empty(0, dtype=np.int64), *(second for _, second in ties)])
    edges = coo_array((np.ones(len(rows), dtype=np.int8), (rows, columns)), shape=(count, count))
    return connected_components(edges, directed=False)[1]


# What a size query or arithmetic on sizes gives; any other value that is no tensor may hold tensors.
_PLAIN = (torch.Size, int, float, str, torch.dtype, torch.device, type(None))


class _Shapes(fx.Interpreter):
    """Runs the graph and notes the shape of every tensor at its node."""

    extra_traceback = False

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        if isinstance(value, torch.Tensor):
            node.meta["shape"] = tuple(value.shape)
        elif node.op != "output" and not isinstance(value, _PLAIN):
            node.meta["unknown"] = True
        return value


def _shape(node: Any) -> tuple[int, ...] | None:
    """Shape of the tensor at a graph node; None for what is no tensor."""
    return node.meta.get("shape") if isinstance(node, fx.Node) else None


def _tensor_keywords(node: fx.Node) -> bool:
    """Whether a tensor is passed by keyword: the rules look at positions."""
    found: list[fx.Node] = []
    fx.map_arg(node.kwargs, found.append)
    return any(_shape(n) is not None or n.meta.get("unknown") for n in found)


def _is_constant_slice(entry: Any) -> bool:
    if not isinstance(entry, slice):
        return False
    return all(part is None or isinstance(part, int) for part in (entry.start, entry.stop, entry.step))


def _describe(node: fx.Node) -> str:
    if node.op == "call_module":
        return node.target
    return getattr(node.target, "__name__", str(node.target))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


_SIZED = (torch.reshape, "view", "reshape")
_CONVS = (nn.Conv1d, nn.Conv2d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
_SAME_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Softplus),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d),
)
_SPATIAL_MODULES = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.Upsample),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
)


def _module_rule(module: nn.Module) -> Callable[..., _Channels | None] | None:
    # Exact types: a subclass may do anything in its forward.
    kind = type(module)
    if kind in _CONVS:
        return _Tracer._conv
    if kind is nn.Linear:
        return _Tracer._linear
    if kind in _NORMS:
        return _Tracer._batch_norm
    if kind in _SAME_MODULES:
        return lambda tracer, node, _, channels: tracer._same(node, channels)
    if kind in _SPATIAL_MODULES:
        return lambda tracer, node, _, channels: tracer._spatial(node, channels)
    if kind is nn.Flatten:
        return lambda tracer, node, _, channels: tracer._reshape(node, channels)
    return None


_RULES: dict[Any, Callable[[_Tracer, fx.Node, dict], _Channels | None]] = {
    **dict.fromkeys(
        (
            *(F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish, F.hardswish, F.hardsigmoid, F.hardtanh),
            *(torch.relu, torch.sigmoid, torch.tanh, F.sigmoid, F.tanh, F.dropout, F.dropout2d),
            *("relu", "relu_", "sigmoid", "tanh", "contiguous", "clone", "float"),
        ),
        _Tracer._same,
    ),
    **dict.fromkeys(
        (F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.interpolate),
        _Tracer._spatial,
    ),
    **dict.fromkeys((torch.flatten, torch.reshape, "flatten", "view", "reshape"), _Tracer._reshape),
    **dict.fromkeys((torch.mean, "mean"), _Tracer._mean),
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), _Tracer._add),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_"), _Tracer._elementwise),
    **dict.fromkeys((torch.cat, torch.concat), _Tracer._cat),
    operator.getitem: _Tracer._getitem,
    F.pad: _Tracer._pad,
}
