"""What each operation does to the channel axis: one rule for each kind of layer, function and method.

A rule gets the operation and the labels, and returns where the channels are in the operation's output; None where
none can be followed any more. What a rule is not sure of it freezes, with the reason.
"""

import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from cup.tracing.heads import CutAttention, head_count
from cup.tracing.labels import Channels, Labels
from cup.tracing.layers import only_counts_heads, pads_channels, tensor_names


def shape_of(node: Any) -> tuple[int, ...] | None:
    """Shape of the tensor at a graph node; None for what is no tensor."""
    return node.meta.get("shape") if isinstance(node, fx.Node) else None


@dataclass(frozen=True, eq=False)
class Operation:
    """One node of the graph, as the rules see it.

    name: dotted name of the layer whose work it is, else of the function, for reasons.
    layer: that layer, or None.
    channels: what is known of the channel axis of every value so far.
    model: the traced network, to look parameters up.
    """

    node: fx.Node
    name: str
    layer: nn.Module | None
    channels: Mapping[fx.Node, Channels | None]
    model: nn.Module

    @property
    def value(self) -> Channels | None:
        """The channel axis of the first operand."""
        return self.channels[self.node.args[0]]

    @property
    def input_shape(self) -> tuple[int, ...]:
        return shape_of(self.node.args[0])

    @property
    def output_shape(self) -> tuple[int, ...]:
        return shape_of(self.node)

    def argument(self, position: int, keyword: str, default: Any = None) -> Any:
        return self.node.args[position] if len(self.node.args) > position else self.node.kwargs.get(keyword, default)


def _is_view(node: fx.Node) -> bool:
    """Whether the node is a view or reshape to sizes that it names."""
    return node.op != "call_module" and node.target in _SIZED


def _spelt_out(node: fx.Node) -> tuple[Any, ...]:
    """The sizes or dimensions that a view or permute was given: one list, or one argument each.

    For an unflatten as a view would be: -1, which follows, for the dimensions that it leaves alone.
    """
    if node.target in _UNFLATTENS:
        dim, sizes = (*node.args[1:], *node.kwargs.values())
        before = len(shape_of(node.args[0]))
        return (-1,) * (dim % before) + tuple(sizes) + (-1,) * (before - 1 - dim % before)
    rest = node.args[1:] or tuple(node.kwargs.values())
    return tuple(rest[0]) if rest and isinstance(rest[0], list | tuple) else rest


def _size_at(node: fx.Node, dim: int) -> Any:
    """The size that a view asks for at a dimension; None where its sizes are not spelt out one by one."""
    sizes = _spelt_out(node)
    return sizes[dim] if len(sizes) == len(shape_of(node)) else None


def is_constant(node: fx.Node) -> bool:
    """Whether the value is computed from parameters and buffers alone."""
    return node.meta.get("constant", False)


Rule = Callable[[Operation, Labels], Channels | None]


def find_rule(operation: Operation) -> Rule | None:
    """The rule for an operation, or None where it is not understood."""
    node, layer = operation.node, operation.layer
    if layer is None:
        rule = _FUNCTIONS.get(node.target)
        operands = [n for n in node.all_input_nodes if shape_of(n) is not None or n.meta.get("unknown")]
        return rule if len(operands) == 1 or rule in _JOINING else None  # x.clamp(y): more than the rule looks at
    computed = [name for name in tensor_names(layer) if hasattr(layer, name) and name not in layer._parameters]
    if has_width(layer) and computed:
        return None  # by a parametrization or a hook, on the fly
    if node.op == "call_function":  # a subclass of a known layer, whose forward calls the function on its weights
        return next(rule for kind, rule in _LAYERS.items() if isinstance(layer, kind))
    # Exact types: a subclass may do anything in its forward.
    return _LAYERS.get(type(layer)) or _MODULES.get(type(layer)) or _FOREIGN_MODULES.get(_qualified_name(layer))


def layer_at(node: fx.Node, model: nn.Module) -> str | None:
    """Dotted name of the module whose work this node is: a module call, or a subclass's own call of the function.

    Only inside that module's forward, and with its own groups or shape: elsewhere, or with others, the function may do
    anything with the weights.
    """
    if node.op == "call_module":
        return node.target
    kind = LAYER_FUNCTIONS.get(node.target) if node.op == "call_function" else None
    value = node.args[0] if node.args else None
    if kind is None or not node.meta.get("nn_module_stack") or shape_of(value) is None or value.op == "get_attr":
        return None
    owner = owner_of(node)
    layer = model.get_submodule(owner)
    read = {n.target for n in map(unscaled, node.all_input_nodes) if n.op == "get_attr"}
    own = {f"{owner}.{name}" for name in (*tensor_names(layer), "running_mean", "running_var")}
    if not isinstance(layer, kind) or f"{owner}.{tensor_names(layer)[0]}" not in read or not read <= own:
        return None
    position, name = _WIDTH_ARGUMENTS.get(node.target, (None, ""))
    given = node.args[position] if position is not None and len(node.args) > position else node.kwargs.get(name)
    wanted = getattr(layer, name, None)
    as_layer = given == wanted or (isinstance(given, list | tuple) and tuple(given) == tuple(wanted))
    return owner if as_layer or (given is None and wanted == 1) else None


def owner_of(node: fx.Node) -> str:
    """Dotted name of the innermost module in whose forward pass the node is; "" for the network itself."""
    # The keys are no names: those of a module's second call end in @1.
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return node.target if node.op == "call_module" else stack[-1][0] if stack else ""


def unscaled(node: fx.Node) -> fx.Node:
    """A parameter that is multiplied with numbers (an equalised learning rate), or any other value itself."""
    while node.target in _SCALINGS and len(node.all_input_nodes) == 1 and is_constant(node):
        node = node.all_input_nodes[0]
    return node


def arguments_besides_width(node: fx.Node, model: nn.Module, following: int | None) -> str:
    """A node's arguments as text, without the number of groups or the shape that a layer hands to its function.

    That number follows the layer's weights. following: at a view, the dimension whose size follows a module's heads; it
    is left out, too: with equal other lengths of the result it can only be the right one.
    """
    if (dim := following) is not None and _is_view(node):
        others = [(*sizes[:dim], *sizes[dim + 1 :]) for sizes in (_spelt_out(node), shape_of(node))]
        return f"{node.args[0]} {others}"
    args, kwargs = list(node.args), dict(node.kwargs)
    position, name = _WIDTH_ARGUMENTS.get(node.target, (None, ""))
    if position is not None and layer_at(node, model) is not None:
        del args[position : position + 1]
        kwargs.pop(name, None)
    return f"{args} {kwargs}"


def has_width(module: nn.Module) -> bool:
    """Whether surgery changes something about the module, be it only an attribute."""
    if pads_channels(module):
        return True
    return isinstance(module, tuple(_LAYERS)) and getattr(module, "num_parameters", 2) > 1  # a PReLU of one slope


def reads_no_width(node: fx.Node) -> bool:
    """Whether a node that gives no tensor cannot depend on the widths of the tensors it looks at.

    Sizes are looked after by `freeze_what_is_counted`.
    """
    return _sizes_read(node)[0] is not None or answers_no_width(node)


def answers_no_width(node: fx.Node) -> bool:
    """Whether a node asks for something that is the same at every width: a rank, a type, a device."""
    name = node.args[1] if node.target is getattr else node.target
    return node.op in ("call_function", "call_method") and name in _WIDTHLESS


def gives_parts(node: fx.Node) -> bool:
    """Whether a node's several tensors are parts of its input, as a rule follows them."""
    return node.target in (*_SPLITS, *_UNBINDS)


def is_known(module: nn.Module) -> bool:
    """Whether a module that is not torch's own has a rule as a whole."""
    return _qualified_name(module) in _FOREIGN_MODULES


def _qualified_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"


def freeze_what_is_counted(
    nodes: Iterable[fx.Node],
    asked: Iterable[fx.Node],
    channels: Mapping[fx.Node, Channels | None],
    labels: Labels,
) -> None:
    """Freeze what has its width read as a number: nobody knows what the number is for.

    A view that asks for just this width is no such reader; it has been checked by its rule.
    asked: values that the network's own code took as numbers, to branch on or to count with.
    """
    for node in asked:
        source, dims = _sizes_read(node)
        known = channels.get(source)
        if known is not None and known.dim in dims:
            labels.freeze([known], "the code uses its width as a number")
    for node in nodes:
        source, dims = _sizes_read(node)
        known = channels.get(source)
        if known is None or known.dim not in dims:
            continue
        for user in node.users:
            if not _follows_size(user, node, channels) and _sizes_read(user)[0] is None:
                labels.freeze([known], f"{getattr(user.target, '__name__', user.target)} uses its width as a number")


def _follows_size(user: fx.Node, size: fx.Node, channels: Mapping[fx.Node, Channels | None]) -> bool:
    """Whether the user takes the size for its result's channels, as its rule has checked."""
    if _share_read(user)[0] is not None:
        return all(_follows_size(one, user, channels) for one in user.users)
    result = channels.get(user)
    if result is None or not _is_view(user):
        return result is not None and user.target in (operator.getitem, *_SPLITS)
    return _size_at(user, result.dim) is size and _spelt_out(user).count(size) == 1


# --- layers with parameters ---


def _conv(op: Operation, labels: Labels) -> Channels | None:
    conv, value = op.layer, op.value
    if value is not None and (value.dim != 1 or len(op.output_shape) != conv.weight.dim()):
        labels.freeze([value], f"{op.name} works across another axis than the channels")
        value = None
    if conv.groups == 1:
        return _produce(op, labels, value, conv.out_channels, dim=1)
    if value is not None and not isinstance(conv, _TRANSPOSED):
        # Whole groups go or stay: their input channels and output channels are one bundle.
        bundles = labels.bundle(value.labels_C, conv.groups)
        labels_C = np.repeat(bundles, conv.out_channels // conv.groups)
        labels.followers.append((op.name, labels_C))
        return Channels(1, labels_C)
    reason = f"{op.name} is a grouped convolution whose input is not followed"
    labels.freeze([value], reason)
    labels_C = labels.fresh(conv.out_channels)
    labels.producers.append((op.name, labels_C))
    labels.frozen.append((labels_C, reason))
    return None


def _linear(op: Operation, labels: Labels) -> Channels | None:
    value, last = op.value, len(op.output_shape) - 1
    if value is not None and value.dim != last:
        labels.freeze([value], f"{op.name} mixes another axis than the channels")
        value = None
    return _produce(op, labels, value, op.output_shape[last], dim=last)


def _produce(op: Operation, labels: Labels, value: Channels | None, width: int, dim: int) -> Channels:
    if value is not None:
        labels.consumers.append((op.name, value.labels_C))
    labels_C = labels.fresh(width)
    labels.producers.append((op.name, labels_C))
    return Channels(dim, labels_C)


def _norm(op: Operation, labels: Labels) -> Channels | None:
    """Batch and instance norm: one entry for each channel."""
    value = op.value
    if value is not None and value.dim != 1:
        labels.freeze([value], f"{op.name} normalises another axis than the channels")
        return None
    if value is not None:
        labels.followers.append((op.name, value.labels_C))
    return value


def _group_norm(op: Operation, labels: Labels) -> Channels | None:
    """Whole groups go or stay, so that the statistics of the others do not change; one group is a layer norm."""
    value = _norm(op, labels)
    if value is not None and op.layer.num_groups > 1:
        labels.bundle(value.labels_C, op.layer.num_groups)
    return value


def _layer_norm(op: Operation, labels: Labels) -> Channels | None:
    """Over the channels alone; its statistics are then those of the channels that stay."""
    value = op.value
    if value is None:
        return None
    if len(op.layer.normalized_shape) > 1 or value.dim != len(op.input_shape) - 1:
        labels.freeze([value], f"{op.name} normalises another axis than the channels")
        return None
    labels.followers.append((op.name, value.labels_C))
    return value


def _prelu(op: Operation, labels: Labels) -> Channels | None:
    return op.value if op.layer.num_parameters == 1 else _norm(op, labels)


# --- what keeps, moves or joins channels ---


def _same(op: Operation, labels: Labels) -> Channels | None:
    return op.value


def _spatial(op: Operation, labels: Labels) -> Channels | None:
    """Pooling, padding and resampling: every axis behind the channels may change."""
    value = op.value
    # One sample less a dimension is what pooling takes for one image without a batch.
    kind = type(op.layer).__name__ if op.layer is not None else op.name
    rank = next((2 + int(digit) for digit in "123" if f"{digit}d" in kind), 3)
    if value is not None and (
        value.dim != 1 or op.output_shape[1] != len(value.labels_C) or len(op.output_shape) < rank
    ):
        labels.freeze([value], f"{op.name} works across channels")
        return None
    return value


def _reshape(op: Operation, labels: Labels) -> Channels | None:
    """Flatten, view, reshape: the channel axis stays whole, is joined with its neighbours, or is split in two."""
    value, before, after = op.value, op.input_shape, op.output_shape
    if value is None:
        return None
    if (heads := _split_into_heads(op, labels)) is not None:
        return heads
    ways = list(_joined(value, before, after))
    if not _is_view(op.node):
        if not ways:
            labels.freeze([value], f"{op.name} from {before[1:]} to {after[1:]} is not followed")
        return ways[0] if ways else None
    for channels in ways:
        if _size_follows(op, labels, _size_at(op.node, channels.dim), channels) or _joins_heads(op, channels.dim):
            return channels
    if (halves := _split_in_two(op, labels)) is not None:
        return halves
    size = _size_at(op.node, ways[0].dim) if ways else None
    what = "a size that is computed" if isinstance(size, fx.Node) or size is None else f"a fixed size {size}"
    shapes = f"from {before[1:]} to {after[1:]} is not followed"
    labels.freeze([value], f"{op.name} to {what}" if ways else f"{op.name} {shapes}")
    return None


def _reshape_as(op: Operation, labels: Labels) -> Channels | None:
    """To another tensor's sizes: where its channels come to lie on channels, they are the same ones."""
    value, other = op.value, op.node.args[1]
    for channels in () if value is None else _joined(value, op.input_shape, op.output_shape):
        if _is_width(op, labels, other, [channels.dim], channels):
            return channels
    labels.freeze([value, op.channels[other]], f"{op.name} is not followed")
    return None


def _split_into_heads(op: Operation, labels: Labels) -> Channels | None:
    """A view of the channels as the heads that the module counts, in front of each head's channels: whole heads go.

    x.view(batch, tokens, 3, self.num_heads, self.head_dim), or -1 for any of the sizes.
    """
    value, after, owner = op.value, op.output_shape, owner_of(op.node)
    heads, in_front = head_count(op.model.get_submodule(owner)), math.prod(op.input_shape[: value.dim])
    if heads is None or not _is_view(op.node):
        return None
    for first, last in itertools.combinations(range(len(after)), 2):
        if math.prod(after[:first]) != in_front or math.prod(after[first : last + 1]) != len(value.labels_C):
            continue
        sizes = [_size_at(op.node, dim) for dim in range(first, last + 1)]
        counted = [dim for dim in range(first, last) if after[dim] == heads]
        if not counted or not all(isinstance(size, int) for size in sizes):
            continue
        dim = counted[-1]
        by_head_HX = np.moveaxis(value.labels_C.reshape(after[first : last + 1]), dim - first, 0).reshape(heads, -1)
        labels_H = labels.bundle(by_head_HX.reshape(-1), heads)
        if only_counts_heads(op.model.get_submodule(owner)):
            labels.followers.append((owner, labels_H))
        _note_follower(op.node, dim)
        return Channels(dim, labels_H)
    return None


def _joins_heads(op: Operation, dim: int) -> bool:
    """Whether a view joins the heads that the module counts to channels again, by a number of the module's."""
    heads, size = head_count(op.model.get_submodule(owner_of(op.node))), _size_at(op.node, dim)
    if not isinstance(size, int) or heads is None or op.input_shape[op.value.dim] != heads:
        return False
    _note_follower(op.node, dim)
    return True


def _note_follower(node: fx.Node, dim: int) -> None:
    """The size that a view names there follows a module's number of heads; narrower copies show whether it does."""
    node.meta["following"] = dim


def _joined(value: Channels, before: tuple[int, ...], after: tuple[int, ...]) -> Iterator[Channels]:
    """Each way to find the channel axis again after a change of shape: alone, or joined with its neighbours."""
    rank = len(before)
    ranges = [(first, last) for first in range(value.dim + 1) for last in range(value.dim, rank)]
    for first, last in sorted(ranges, key=lambda found: found[1] - found[0]):
        length = math.prod(before[first : last + 1])
        behind, in_front = math.prod(before[value.dim + 1 : last + 1]), math.prod(before[first : value.dim])
        for dim, size in enumerate(after):
            if size == length and math.prod(after[:dim]) == math.prod(before[:first]):
                yield Channels(dim, np.tile(np.repeat(value.labels_C, behind), in_front))


def _split_in_two(op: Operation, labels: Labels) -> Channels | None:
    """A view of the channels as rows: of their rows or of their columns one number is fixed, and whole ones go.

    x.view(batch, 2, channels // 2, ...), x.view(batch, -1, 4, ...).
    """
    value, after = op.value, op.output_shape
    in_front, width = math.prod(op.input_shape[: value.dim]), len(value.labels_C)
    for dim in range(len(after) - 1):
        if math.prod(after[:dim]) != in_front or after[dim] * after[dim + 1] != width:
            continue
        rows, columns = _size_at(op.node, dim), _size_at(op.node, dim + 1)
        if isinstance(rows, int) and rows > 0 and _share_follows(op, labels, columns, rows):
            return Channels(dim + 1, labels.tie_runs(value.labels_C, rows))
        if isinstance(columns, int) and columns > 0 and _share_follows(op, labels, rows, columns):
            return Channels(dim, labels.bundle(value.labels_C, width // columns))
    return None


def _share_follows(op: Operation, labels: Labels, size: Any, parts: int) -> bool:
    """Whether a size is the channels' number divided by that of the parts: -1 says so, too."""
    if not isinstance(size, fx.Node):
        return size == -1
    source, dim, divisor = _share_read(size)
    return divisor == parts and _is_width(op, labels, source, [dim], op.value)


def _size_follows(op: Operation, labels: Labels, size: Any, value: Channels) -> bool:
    """Whether the size asked for shrinks with the channels: -1, or the width of a tensor."""
    if not isinstance(size, fx.Node):
        return size == -1
    return _is_width(op, labels, *_sizes_read(size), value)


def _is_width(op: Operation, labels: Labels, source: fx.Node | None, dims: Sequence[int], value: Channels) -> bool:
    """Whether a size that was read is that of these channels, in every cut.

    Where it is another tensor's (a squeeze-excite gate that is brought to its input's shape), their channels are tied,
    unless they are the same ones in another order.
    """
    known = op.channels.get(source)
    if known is None or list(dims) != [known.dim] or len(known.labels_C) != len(value.labels_C):
        return False
    if not np.array_equal(known.labels_C, value.labels_C):
        channel_of = labels.channels()
        if sorted(channel_of[known.labels_C]) != sorted(channel_of[value.labels_C]):
            labels.ties.append((known.labels_C, value.labels_C))
    return True


def _share_read(node: fx.Node) -> tuple[fx.Node | None, int, int]:
    """(tensor, dimension, divisor) where a node holds a size divided by a number; (None, 0, 0) for any other node."""
    if node.target is operator.floordiv and isinstance(node.args[0], fx.Node) and isinstance(node.args[1], int):
        source, dims = _sizes_read(node.args[0])
        if source is not None and len(dims) == 1 and node.args[0].meta["value"] == shape_of(source)[dims[0]]:
            return source, dims[0], node.args[1]
    return None, 0, 0


def _sizes_read(node: fx.Node) -> tuple[fx.Node | None, list[int]]:
    """The tensor whose sizes this node holds, and of which dimensions, in order; (None, []) for any other node."""
    source = node.args[0] if node.args else None
    shape = shape_of(source)
    if shape is not None and node.op == "call_method" and node.target == "size" and not node.kwargs:
        every = list(range(len(shape)))
        return source, [every[node.args[1]]] if len(node.args) > 1 else every
    if shape is not None and node.target is getattr and node.args[1] == "shape":
        return source, list(range(len(shape)))
    if node.target is operator.getitem and isinstance(source, fx.Node) and shape is None:
        tensor, dims = _sizes_read(source)
        if tensor is not None and isinstance(node.args[1], int):
            return tensor, [dims[node.args[1]]]
        if tensor is not None and isinstance(node.args[1], slice) and _is_constant(node.args[1]):
            return tensor, dims[node.args[1]]
    return None, []


def _squeeze(op: Operation, labels: Labels) -> Channels | None:
    """Only of axes that are named and are not the channels': those would go as well once one channel is left."""
    dims = op.argument(1, "dim")
    dims = (dims,) if isinstance(dims, int) else dims
    if op.value is not None and (dims is None or op.value.dim in [dim % len(op.input_shape) for dim in dims]):
        labels.freeze([op.value], f"{op.name} may drop the channel axis")
        return None
    return _reshape(op, labels)


def _permute(op: Operation, labels: Labels) -> Channels | None:
    value, order = op.value, _spelt_out(op.node)
    if value is None or not all(isinstance(dim, int) for dim in order):
        labels.freeze([value], f"{op.name} is not followed")
        return None
    return Channels([dim % len(order) for dim in order].index(value.dim), value.labels_C)


def _transpose(op: Operation, labels: Labels) -> Channels | None:
    value, dims = op.value, (op.argument(1, "dim0"), op.argument(2, "dim1"))
    if value is None or not all(isinstance(dim, int) for dim in dims):
        labels.freeze([value], f"{op.name} is not followed")
        return None
    one, other = (dim % len(op.input_shape) for dim in dims)
    return Channels({one: other, other: one}.get(value.dim, value.dim), value.labels_C)


def _reduce(op: Operation, labels: Labels) -> Channels | None:
    """Mean, sum or maximum over other dimensions than the channels."""
    value, rank = op.value, len(op.input_shape)
    dims = op.argument(1, "dim", op.node.kwargs.get("axis"))
    if value is None:
        return None
    dims = {dim % rank for dim in ([dims] if isinstance(dims, int) else dims or range(rank))}
    if value.dim in dims:
        if op.node.users:  # the mean of attention's weights, which hardly anybody reads
            labels.freeze([value], f"{op.name} works across channels")
        return None
    kept = len(op.output_shape) == rank
    return value if kept else Channels(value.dim - sum(dim < value.dim for dim in dims), value.labels_C)


def _add(op: Operation, labels: Labels) -> Channels | None:
    """Addition and subtraction: of two tensors with channels it is a residual, of a parameter or a number it is not."""
    value = _elementwise(op, labels)
    computed = [n for n in _operands(op) if op.channels[n] is not None and not is_constant(n)]
    whole = [op.channels[n] for n in computed if not _is_spread(op, n)]
    if len(whole) > 1:
        labels.residual.extend(one.labels_C for one in whole)
    return value


def _operands(op: Operation) -> list[fx.Node]:
    return [node for node in (*op.node.args, *op.node.kwargs.values()) if shape_of(node) is not None]


def _elementwise(op: Operation, labels: Labels) -> Channels | None:
    """Operations on tensors of equal or broadcast shapes: the operands' channels become the same channels.

    So a free parameter with an entry for each channel goes along. What has one entry for all channels (a map over
    pixels, a number) changes nothing.
    """
    operands = _operands(op)
    known, axis = _on_one_axis(op, labels, operands)
    followed = [n for n in operands if known[n] is not None]
    if axis is None:
        return None
    labels.freeze([known[n] for n in followed if _is_spread(op, n)], f"{op.name} spreads it over other channels")
    whole = [known[n] for n in followed if not _is_spread(op, n)]
    if not whole:
        return None
    for operand in operands:
        if known[operand] is None and _length_at(op, operand, axis) > 1:
            other = f"{operand.target}, which is" if operand.op == "get_attr" else "values that are"
            labels.freeze([known[n] for n in followed], f"{op.name} combines it with {other} not followed")
            return None
    labels.ties.extend((whole[0].labels_C, other.labels_C) for other in whole[1:])
    return Channels(axis, whole[0].labels_C)


def _on_one_axis(
    op: Operation, labels: Labels, operands: Sequence[fx.Node]
) -> tuple[dict[fx.Node, Channels | None], int | None]:
    """What is known of each operand's channels, and the dimension of the output that they all lie on.

    A parameter whose entries lie on another (a profile over rows) keeps them all. None for the dimension where nothing
    is known, or where the operands do not agree, which freezes them.
    """
    known = {n: op.channels[n] for n in operands}
    rank = len(op.output_shape)
    axis_of = {n: value.dim + rank - len(shape_of(n)) for n, value in known.items() if value is not None}
    axes = {axis for n, axis in axis_of.items() if not is_constant(n)} or set(axis_of.values())
    if len(axes) != 1:
        labels.freeze(known.values(), f"{op.name} combines channels with another axis")
        return known, None
    (axis,) = axes
    for n in [n for n, other in axis_of.items() if other != axis]:
        labels.freeze([known[n]], f"{op.name} combines it with another axis")
        known[n] = None
    return known, axis


def _length_at(op: Operation, operand: fx.Node, dim: int) -> int:
    """The operand's length along a dimension of the output: shapes are aligned at their ends."""
    shape = shape_of(operand)
    dim -= len(op.output_shape) - len(shape)
    return shape[dim] if dim >= 0 else 1


def _is_spread(op: Operation, operand: fx.Node) -> bool:
    """Whether the operand's one channel is combined with each of several."""
    value = op.channels[operand]
    dim = value.dim + len(op.output_shape) - len(shape_of(operand))
    return len(value.labels_C) == 1 < op.output_shape[dim]


def _expand(op: Operation, labels: Labels) -> Channels | None:
    """To named sizes, aligned at their ends; -1 keeps a size."""
    value, sizes = op.value, _spelt_out(op.node)
    if value is None:
        return None
    dim = value.dim + len(op.output_shape) - len(op.input_shape)
    if len(sizes) != len(op.output_shape) or not _size_follows(op, labels, sizes[dim], value):
        labels.freeze([value], f"{op.name} to a size that does not follow it")
        return None
    return Channels(dim, value.labels_C)


def _retyped(op: Operation, labels: Labels) -> Channels | None:
    """The first operand in the second's type, or on its device."""
    return op.value


def _softmax(op: Operation, labels: Labels) -> Channels | None:
    value, dim = op.value, op.argument(1, "dim")
    if value is not None and (not isinstance(dim, int) or dim % len(op.input_shape) == value.dim):
        labels.freeze([value], f"{op.name} works across channels")
        return None
    return value


def _product(op: Operation, labels: Labels) -> Channels | None:
    """A product of matrices, or attention: heads among the dimensions in front of the matrices are the same heads."""
    known = [(op.channels[n], len(shape_of(n))) for n in _operands(op)]
    inside = [value for value, rank in known if value is not None and value.dim >= rank - 2]
    has_vector = op.node.target is not F.scaled_dot_product_attention and min(rank for _, rank in known) < 2
    if inside or has_vector or op.node.kwargs.get("enable_gqa"):
        labels.freeze([value for value, _ in known], f"{op.name} works across channels")
        return None
    return _elementwise(op, labels)


def product_macs(node: fx.Node) -> int:
    """Multiply-adds of a product of matrices, or of attention's two; 0 for any other node, and for named operands."""
    if _FUNCTIONS.get(node.target) is not _product or shape_of(node) is None or len(node.args) < 2:
        return 0
    written = math.prod(shape_of(node))
    if node.target is F.scaled_dot_product_attention:
        query, key = shape_of(node.args[0]), shape_of(node.args[1])
        return key[-2] * (math.prod(query) + written)
    return written * shape_of(node.args[0])[-1]


def _unbind(op: Operation, labels: Labels) -> Channels | None:
    """Tensors along one dimension, each with all the channels of the others; `_getitem` takes one."""
    value, dim = op.value, op.argument(1, "dim", 0) % len(op.input_shape)
    if value is None or dim == value.dim:
        labels.freeze([value], f"{op.name} takes channels apart")
        return None
    return Channels(value.dim - (dim < value.dim), value.labels_C)


def _stack(op: Operation, labels: Labels) -> Channels | None:
    """Along a new axis: the parts' channels become the same channels."""
    if isinstance(op.node.args[0], fx.Node):
        labels.freeze([op.value], f"{op.name} joins all parts of a value")
        return None
    values = [op.channels[n] for n in op.node.args[0]]
    if None in values or len({value.dim for value in values}) > 1:
        labels.freeze(values, f"{op.name} joins it with values that are not followed")
        return None
    dim = op.argument(1, "dim", 0) % len(op.output_shape)
    labels.ties.extend((values[0].labels_C, other.labels_C) for other in values[1:])
    return Channels(values[0].dim + (dim <= values[0].dim), values[0].labels_C)


def _cat(op: Operation, labels: Labels) -> Channels | None:
    """Along the channels they stand one behind the other, with those that nobody produces (the image, a buffer) frozen;
    along another axis they become the same channels.
    """
    if isinstance(op.node.args[0], fx.Node):
        labels.freeze([op.value], f"{op.name} joins all parts of a value")
        return None
    parts = list(op.node.args[0])
    dim = op.argument(1, "dim", 0) % len(op.output_shape)
    known, axis = _on_one_axis(op, labels, parts)
    values = [known[part] for part in parts]
    if axis is None:
        return None
    if axis != dim and None in values:
        labels.freeze(values, f"{op.name} joins it with values that are not followed")
        return None
    if axis != dim:
        labels.ties.extend((values[0].labels_C, other.labels_C) for other in values[1:])
        return values[0]
    reason = f"{op.name} takes channels that no layer produces"
    parts_C = [
        labels.frozen_fresh(shape_of(part)[dim], reason) if value is None else value.labels_C
        for part, value in zip(parts, values, strict=True)
    ]
    return Channels(dim, np.concatenate(parts_C))


def _split(op: Operation, labels: Labels) -> Channels | None:
    """Chunk and split, into equal parts: channels at equal places of all parts go together.

    The value of several tensors has the channels of them all; `_getitem` takes a part.
    """
    value, count = op.value, len(op.node.meta["value"])
    if value is None or op.argument(2, "dim", 0) % len(op.input_shape) != value.dim:
        return value
    size, width = op.argument(1, "chunks", op.node.kwargs.get("split_size")), len(value.labels_C)
    chunked = op.node.target in _CHUNKS and size == count
    if width % count or not (chunked or (isinstance(size, fx.Node) and _share_follows(op, labels, size, count))):
        labels.freeze([value], f"{op.name} into parts of a fixed size, or of several")
        return None
    labels.tie_runs(value.labels_C, count)
    return value


def _glu(op: Operation, labels: Labels) -> Channels | None:
    """Its second half gates the first."""
    value = op.value
    dim = op.layer.dim if op.layer is not None else op.argument(1, "dim", -1)
    if value is None or dim % len(op.input_shape) != value.dim:
        return value
    return Channels(value.dim, labels.tie_runs(value.labels_C, 2))


def _channel_shuffle(op: Operation, labels: Labels) -> Channels | None:
    value = op.value
    groups = op.layer.groups if op.layer is not None else op.argument(1, "groups")
    if value is None or value.dim != 1 or not isinstance(groups, int):
        labels.freeze([value], f"{op.name} is not followed")
        return None
    return Channels(1, np.repeat(labels.tie_runs(value.labels_C, groups), groups))


def _pixel_shuffle(op: Operation, labels: Labels) -> Channels | None:
    """Channels become pixels: those of one block go together."""
    value = op.value
    if value is None or value.dim != len(op.input_shape) - 3:
        labels.freeze([value], f"{op.name} is not followed")
        return None
    return Channels(value.dim, labels.bundle(value.labels_C, op.output_shape[value.dim]))


def _pixel_unshuffle(op: Operation, labels: Labels) -> Channels | None:
    """Pixels become channels: a block of them for each channel that was there."""
    value = op.value
    if value is None or value.dim != len(op.input_shape) - 3:
        labels.freeze([value], f"{op.name} is not followed")
        return None
    return Channels(value.dim, np.repeat(value.labels_C, op.output_shape[value.dim] // len(value.labels_C)))


def _flip(op: Operation, labels: Labels) -> Channels | None:
    value, dims = op.value, _spelt_out(op.node)
    if value is None or not all(isinstance(dim, int) for dim in dims):
        labels.freeze([value], f"{op.name} is not followed")
        return None
    turned = value.dim in [dim % len(op.input_shape) for dim in dims]
    return Channels(value.dim, value.labels_C[::-1]) if turned else value


def _getitem(op: Operation, labels: Labels) -> Channels | None:
    """Slices, single indices of other axes, and new axes of length one: x[:, :4], x[:, :, 0], x[..., None].

    Of a value of several tensors, the one at an index.
    """
    value, index = op.value, op.node.args[1]
    if value is None:
        return None
    if op.input_shape is None:
        return _part(op, labels)
    entries = list(index) if isinstance(index, tuple) else [index]
    if any(entry is ... for entry in entries):
        at = next(position for position, entry in enumerate(entries) if entry is ...)
        named = sum(entry is not None for entry in entries) - 1
        entries[at : at + 1] = [slice(None)] * (len(op.input_shape) - named)
    axis, dim = 0, value.dim  # the axis of the input that an entry speaks of, and where the channels come to lie
    labels_C = value.labels_C
    for entry in entries:
        if entry is None:
            dim += axis <= value.dim
            continue
        if axis == value.dim:
            labels_C = _sliced(op, labels, entry)
        if labels_C is None or not (axis == value.dim or _is_constant(entry)):
            labels.freeze([value], f"{op.name} is not followed")
            return None
        dim -= isinstance(entry, int) and axis < value.dim
        axis += 1
    return Channels(dim, labels_C)


def _part(op: Operation, labels: Labels) -> Channels | None:
    """One of several tensors, which share the channels out among them or have all of them each."""
    value, index, tensors = op.value, op.node.args[1], op.node.args[0].meta["value"]
    if not isinstance(index, int):
        labels.freeze([value], f"{op.name} is not followed")
        return None
    lengths = [tensor.shape[value.dim] for tensor in tensors]
    if sum(lengths) != len(value.labels_C):
        return value
    ends = np.cumsum(lengths)
    return Channels(value.dim, value.labels_C[ends[index] - lengths[index] : ends[index]])


def _sliced(op: Operation, labels: Labels, entry: Any) -> np.ndarray | None:
    """The labels of a slice of the channels; what it counts, from the front or from the back, must stay.

    x[:, : x.shape[1] // 2] takes a share: channels at equal places of all shares go together. None for what is neither.
    """
    labels_C = op.value.labels_C
    if not isinstance(entry, slice) or entry.step not in (None, 1):
        return None
    ends = [end for end in (entry.start, entry.stop) if end is not None]
    if len(ends) == 1 and isinstance(ends[0], fx.Node):
        parts = _share_read(ends[0])[2]
        if not parts or len(labels_C) % parts or not _share_follows(op, labels, ends[0], parts):
            return None
        labels.tie_runs(labels_C, parts)
        length = len(labels_C) // parts
        return labels_C[:length] if entry.start is None else labels_C[length:]
    if not _is_constant(entry):
        return None
    start, stop, _ = entry.indices(len(labels_C))
    for end in ends:
        if -len(labels_C) < end < len(labels_C):
            counted_C = labels_C[:end] if end >= 0 else labels_C[end:]
            labels.frozen.append((counted_C, f"{op.name} counts on its width"))
    return labels_C[start:stop] if start < stop else None


def _is_constant(entry: Any) -> bool:
    parts = (entry.start, entry.stop, entry.step) if isinstance(entry, slice) else (entry,)
    return all(part is None or isinstance(part, int) for part in parts)


def _pad(op: Operation, labels: Labels) -> Channels | None:
    """F.pad: how many zero channels there are (CIFAR ResNets' shortcuts) stands in the code, so they cannot go."""
    value, pad = op.value, op.argument(1, "pad")
    if value is None:
        return None
    from_last = len(op.output_shape) - 1 - value.dim
    widths = pad[2 * from_last : 2 * from_last + 2] if isinstance(pad, list | tuple) else None
    if widths is None or not all(isinstance(width, int) for width in widths):
        labels.freeze([value], f"{op.name} is not followed")
        return None
    before, after = widths or (0, 0)
    if before == after == 0:
        return value
    if before < 0 or after < 0 or op.argument(2, "mode", "constant") != "constant":
        labels.freeze([value], f"{op.name} crops channels or repeats them")
        return None
    zeros_C = labels.frozen_fresh(before + after, "a shortcut pads it with zero channels")
    return Channels(value.dim, np.concatenate([zeros_C[:before], value.labels_C, zeros_C[before:]]))


def _pad_channels(op: Operation, labels: Labels) -> Channels | None:
    """nn.ZeroPad3d of images: the module's numbers follow, so zero channels can go, two by two from both sides."""
    value = op.value
    if value is None or value.dim != 1 or len(op.output_shape) != 4 or not pads_channels(op.layer):
        return _spatial(op, labels)
    if op.layer.padding[-1] == 0:
        return value
    zeros_C = labels.fresh(op.layer.padding[-1])
    labels.followers.append((op.name, np.concatenate([zeros_C, zeros_C])))
    return Channels(value.dim, np.concatenate([zeros_C, value.labels_C, zeros_C]))


# --- which rule for what ---

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)

_LAYERS: dict[type[nn.Module], Rule] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED), _conv),
    **dict.fromkeys((*_BATCH_NORMS, *_INSTANCE_NORMS), _norm),
    **dict.fromkeys((nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear, CutAttention), _linear),
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.PReLU: _prelu,
}

LAYER_FUNCTIONS: dict[Any, tuple[type[nn.Module], ...]] = {
    F.conv1d: (nn.Conv1d,),
    F.conv2d: (nn.Conv2d,),
    F.conv3d: (nn.Conv3d,),
    F.linear: (nn.Linear, CutAttention),
    F.batch_norm: _BATCH_NORMS,
    F.group_norm: (nn.GroupNorm,),
    F.layer_norm: (nn.LayerNorm,),
    F.prelu: (nn.PReLU,),
}
"""Functions that do a layer's work, with the layers whose own weights they may be given (by a subclass's forward)."""

_SCALINGS = (operator.mul, operator.truediv, torch.mul, torch.div, "mul", "div")

_WIDTH_ARGUMENTS: dict[Any, tuple[int, str]] = {
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), (6, "groups")),
    F.group_norm: (1, "num_groups"),
    F.layer_norm: (1, "normalized_shape"),
}
"""The argument of a layer's function that changes with the layer's width: its position, and its name in both."""

_SAME_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Softsign),
    *(nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Threshold, nn.Identity),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
)
_SPATIAL_MODULES = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.LPPool2d, nn.Upsample),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
    *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReplicationPad1d, nn.ReplicationPad2d),
    *(nn.ConstantPad1d, nn.ConstantPad2d, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d),
)
_MODULES: dict[type[nn.Module], Rule] = {
    **dict.fromkeys(_SAME_MODULES, _same),
    **dict.fromkeys(_SPATIAL_MODULES, _spatial),
    nn.Flatten: _reshape,
    **dict.fromkeys((nn.ZeroPad3d, nn.ConstantPad3d), _pad_channels),
    nn.GLU: _glu,
    nn.ChannelShuffle: _channel_shuffle,
    nn.PixelShuffle: _pixel_shuffle,
    nn.PixelUnshuffle: _pixel_unshuffle,
}

# By name, so that nothing here imports them. The walk does not look inside.
_FOREIGN_MODULES: dict[str, Rule] = {
    "torchvision.ops.stochastic_depth.StochasticDepth": _same,
    "timm.layers.drop.DropPath": _same,
}

_WIDTHLESS = (
    *("dim", "ndim", "ndimension", "dtype", "device", "layout", "requires_grad", "is_cuda", "is_nested", "training"),
    *("is_floating_point", "is_complex", torch.is_floating_point, torch.is_complex, torch._assert),
)
_JOINING = (_add, _elementwise, _product, _cat, _stack, _expand, _retyped, _reshape_as)
_UNFLATTENS = (torch.unflatten, "unflatten")
_SIZED = (torch.reshape, "view", "reshape", *_UNFLATTENS)
_CHUNKS = (torch.chunk, "chunk")
_UNBINDS = (torch.unbind, "unbind")
_SPLITS = (*_CHUNKS, torch.split, "split")
KEYWORD_OPERANDS = (F.scaled_dot_product_attention,)
"""Functions whose rule looks at tensors that are passed by keyword, too."""
_FUNCTIONS: dict[Any, Rule] = {
    **dict.fromkeys(
        (
            *(F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.softplus, F.logsigmoid),
            *(F.hardswish, F.hardsigmoid, F.hardtanh, F.sigmoid, F.tanh, F.dropout, F.dropout1d, F.dropout2d),
            *(torch.relu, torch.sigmoid, torch.tanh, torch.exp, torch.abs, torch.sqrt, torch.clamp, operator.neg),
            *("relu", "relu_", "sigmoid", "sigmoid_", "tanh", "exp", "abs", "sqrt", "clamp", "clamp_", "neg"),
            *(
                torch.sin,
                torch.cos,
                torch.log,
                torch.log1p,
                torch.rsqrt,
                torch.square,
                torch.erf,
                torch.sign,
                torch.tanh,
            ),
            *("sin", "cos", "log", "log1p", "rsqrt", "square", "erf", "sign", "abs_", "neg_", "tanh_", "sqrt_", "exp_"),
            *(F.softsign, F.hardtanh, F.threshold, F.alpha_dropout, F.dropout3d, torch.clamp_min, "clamp_min"),
            *("contiguous", "clone", "float", "double", "half", "bfloat16", "detach", operator.pos),
        ),
        _same,
    ),
    **dict.fromkeys(
        (
            *(F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.lp_pool2d),
            *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_max_pool1d, F.adaptive_max_pool2d),
            *(F.interpolate, F.upsample),
        ),
        _spatial,
    ),
    **dict.fromkeys((torch.flatten, "flatten", torch.unsqueeze, "unsqueeze", *_SIZED), _reshape),
    **dict.fromkeys(("reshape_as", "view_as"), _reshape_as),
    **dict.fromkeys((torch.squeeze, "squeeze"), _squeeze),
    **dict.fromkeys((torch.permute, "permute"), _permute),
    **dict.fromkeys((torch.transpose, "transpose", torch.swapaxes, "swapaxes"), _transpose),
    **dict.fromkeys((torch.mean, "mean", torch.sum, "sum", torch.amax, "amax", torch.amin, "amin"), _reduce),
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), _add),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, "sub", "sub_"), _add),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_"), _elementwise),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div, "div", "div_"), _elementwise),
    **dict.fromkeys((operator.pow, operator.ipow, torch.pow, "pow", "pow_"), _elementwise),
    **dict.fromkeys((torch.maximum, torch.minimum, "maximum", "minimum"), _elementwise),
    **dict.fromkeys((operator.gt, operator.ge, operator.lt, operator.le), _elementwise),
    **dict.fromkeys((torch.where, torch.lerp, "lerp", "where"), _elementwise),
    **dict.fromkeys((torch.addcmul, torch.addcdiv, "addcmul", "addcdiv"), _add),
    **dict.fromkeys(("expand_as",), _elementwise),
    "expand": _expand,
    **dict.fromkeys(("to", "type_as"), _retyped),
    **dict.fromkeys((F.softmax, torch.softmax, "softmax", F.log_softmax, "log_softmax"), _softmax),
    **dict.fromkeys((torch.cat, torch.concat), _cat),
    torch.stack: _stack,
    operator.getitem: _getitem,
    **dict.fromkeys(_SPLITS, _split),
    **dict.fromkeys(_UNBINDS, _unbind),
    **dict.fromkeys((torch.matmul, operator.matmul, torch.bmm, "matmul", "bmm"), _product),
    F.scaled_dot_product_attention: _product,
    F.glu: _glu,
    F.channel_shuffle: _channel_shuffle,
    F.pixel_shuffle: _pixel_shuffle,
    F.pixel_unshuffle: _pixel_unshuffle,
    **dict.fromkeys((torch.flip, "flip"), _flip),
    F.pad: _pad,
}
