"""Residual blocks that can be dropped: `x + branch(x)` becomes x.

A block is found in the traced graph, whatever its class: a module that reads one value x and gives one back, which is x
once the branches of its additions are silent. It is dropped by putting `nn.Identity` in its place. So nothing of it is
left to run, compile, export or load, and no code of the network sees a tensor of another shape; the parameters of all
other modules keep their names.

Exact means: the smaller network computes what the full one computes with the branch's result times zero, in training
and in evaluation, and its other parameters get the same gradients. What has to hold for that:

* The shortcut is bare: x itself, through `nn.Identity` at most. A ReLU behind the addition (ResNets) leaves x as it is
  where x came out of a ReLU; any other activation, norm or downsampling there, or on the shortcut, refuses the block.
* Nothing changes x in place once it is there, and nothing changes the block's result in place behind it, for both are
  then the same tensor. Every operation that is not known to write new memory may give its own operands back.
* None of its parameters or buffers is used elsewhere, it runs no hooks, nothing looks inside it from outside.
* The network's code does otherwise the same without it, which is tried out: a copy without it is traced again.
"""

import copy
import inspect
import itertools
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from cup.errors import CupError
from cup.tracing.groups import ChannelGroup, is_within, without_blocks
from cup.tracing.meta import Sample, check_model, meta_copy
from cup.tracing.rules import is_constant, owner_of, shape_of
from cup.tracing.tracer import CHANGES, Trace, trace_forward


@dataclass(frozen=True)
class ResidualBlock:
    """A block that a plan may drop.

    name: dotted name of the module that computes `x + branch(x)`.
    parameters: dotted names of those that go with it, in the module's order.
    groups: names of the channel groups that go with it, in network order: those that it alone writes.
    branches: how many go, where the module adds more than one to x (a transformer's attention and its perceptron).
    """

    name: str
    parameters: tuple[str, ...]
    groups: tuple[str, ...]
    branches: int = 1


def residual_blocks(model: nn.Module, groups: Sequence[ChannelGroup]) -> list[ResidualBlock]:
    """The residual blocks that can be dropped, in network order.

    groups: the model's, from `channel_groups` or a resize. The model is neither run nor changed; it is traced about
    four times (a second for ResNet-50).
    Raises CupError where torch.fx cannot trace the network, or the model is a wrapper around one.
    """
    check_model(model)
    return _found(model, meta_copy(model), groups)


def _found(model: nn.Module, twin: nn.Module, groups: Sequence[ChannelGroup]) -> list[ResidualBlock]:
    """`residual_blocks` of the twin. model: the network with its hooks; the twin, on meta, may lack blocks of it."""
    if not groups:
        return []
    sample = groups[0].network.input_shape
    hooked = {name for name, module in model.named_modules() if _has_hooks(module)}
    traces = [(mode, trace_forward(copy.deepcopy(twin.train(mode)), sample)) for mode in (True, False)]
    training, evaluation = (_Graph(trace).blocks() for _, trace in traces)
    blocks = [
        _described(model, name, branches, groups)
        for name, branches in training.items()
        if evaluation.get(name) == branches and not any(is_within(one, name) for one in hooked)
    ]
    sound = [block for block in blocks if block is not None]
    return _tried(sound, lambda some: all(_same_without(*each, twin, sample, some) for each in traces))


def drop(model: nn.Module, names: Iterable[str]) -> None:
    """Put an identity in the place of each of these modules, in place. names: of blocks that can be dropped."""
    for name in outermost(names):
        owner, _, attribute = name.rpartition(".")
        gone = model.get_submodule(name)
        model.get_submodule(owner).add_module(attribute, nn.Identity().train(gone.training))


def outermost(names: Iterable[str]) -> list[str]:
    """Those that are not inside another of them, in order."""
    names = list(dict.fromkeys(names))
    return [name for name in names if not any(is_within(name, other) for other in names if other != name)]


def groups_without(model: nn.Module, groups: Sequence[ChannelGroup], names: Iterable[str]) -> list[ChannelGroup]:
    """The groups that are left once these blocks are dropped (`without_blocks`). The model still has them."""
    skeletons = {name: meta_copy(model.get_submodule(name)) for name in outermost(names)}
    return without_blocks(groups, skeletons) if skeletons else list(groups)


def blocks_named(model: nn.Module, groups: Sequence[ChannelGroup], names: Iterable[str]) -> list[ResidualBlock]:
    """The blocks of these names, in their order; the model is only read.

    Names of several cuts after each other may stand in their order: a block may be one that can be dropped only once
    another has gone, so the network is looked at again without those that were found.
    Raises CupError for a name of no block that can be dropped.
    """
    check_model(model)
    left, found = list(names), []
    twin = meta_copy(model) if left else model
    while left:
        known = {block.name: block for block in _found(model, twin, groups)}
        now = list(itertools.takewhile(known.__contains__, left))
        if not now:
            there = ", ".join(known) or "none"
            raise CupError(f"no residual block {left[0]!r} that can be dropped; there are: {there}")
        found += [known[name] for name in now]
        left = left[len(now) :]
        if left:
            groups = groups_without(twin, groups, now)
            drop(twin, now)
    return found


def _has_hooks(module: nn.Module) -> bool:
    forward, backward = (module._forward_hooks, module._forward_pre_hooks), module._backward_hooks
    return any(map(len, (*forward, backward, module._backward_pre_hooks)))


def _described(model: nn.Module, name: str, branches: int, groups: Sequence[ChannelGroup]) -> ResidualBlock | None:
    """The block with what goes with it; None where something that it has is used elsewhere, or it has no parameter."""
    module = model.get_submodule(name)
    own = [f"{name}.{inner}" for inner, _ in module.named_parameters()]
    tensors = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    inside = {id(tensor) for inner, tensor in tensors if is_within(inner, name)}
    shared = any(id(tensor) in inside and not is_within(inner, name) for inner, tensor in tensors)
    twice = any(other is module for place, other in model.named_modules(remove_duplicate=False) if place != name)
    if not own or shared or twice:
        return None
    goes = []
    for group in groups:
        writes = [is_within(place.module, name) for place in group.producers]
        if all(writes):
            goes.append(group.name)
        elif is_within(group.name, name):
            return None  # it stays, and would lose the layer that it has its name from
    return ResidualBlock(name, tuple(own), tuple(goes), branches)


def _tried(blocks: list[ResidualBlock], holds: Callable[[Sequence[str]], bool]) -> list[ResidualBlock]:
    """The blocks without which, all together, the network's code does what it did: halved until the others show."""
    if not blocks or holds([block.name for block in blocks]):
        return blocks
    if len(blocks) == 1:
        return []
    middle = len(blocks) // 2
    halves = _tried(blocks[:middle], holds), _tried(blocks[middle:], holds)
    both = [*halves[0], *halves[1]]
    # Halves that hold alone and not together would be a network that counts its blocks: then only the first half.
    return both if not all(halves) or holds([block.name for block in both]) else halves[0]


def _same_without(mode: bool, full: Trace, twin: nn.Module, sample: Sample, names: Sequence[str]) -> bool:
    """Whether a copy without these blocks does what the full network does, step by step, but for what they do."""
    smaller = copy.deepcopy(twin.train(mode))
    drop(smaller, names)
    try:
        cut = trace_forward(smaller, sample)
    except CupError:
        return False
    gives = {node: node for node in full.graph.nodes}  # node -> what it gives once the blocks are identities
    graph = _Graph(full)
    for name in outermost(names):
        read, written = graph.ends(name)
        gives[written] = read
    kept = [node for node in full.graph.nodes if not any(is_within(owner_of(node), name) for name in names)]
    left = [node for node in cut.graph.nodes if node.target not in names]
    if len(kept) != len(left):
        return False
    place = {node: number for number, node in enumerate(kept)}
    place_left = {node: number for number, node in enumerate(left)}

    def read_by(node: fx.Node, numbers: Mapping[fx.Node, int], real: Callable[[fx.Node], fx.Node]) -> Any:
        # As text: an argument may be a number that is not equal to itself, or a type that nobody can compare.
        return str(fx.map_arg((node.args, node.kwargs), lambda one: f"step {numbers.get(real(one), 'gone')}"))

    def of_full(node: fx.Node) -> fx.Node:
        return node if gives[node] is node else of_full(gives[node])

    def of_cut(node: fx.Node) -> fx.Node:
        return of_cut(node.all_input_nodes[0]) if node.op == "call_module" and node.target in names else node

    return all(
        before.op == now.op
        and full.target_of(before) == cut.target_of(now)
        and read_by(before, place, of_full) == read_by(now, place_left, of_cut)
        for before, now in zip(kept, left, strict=True)
    )


class _Graph:
    """One traced forward pass, asked for its residual blocks."""

    def __init__(self, trace: Trace) -> None:
        self.root, self.nodes = trace.root, list(trace.graph.nodes)
        self.owners = {node: owner_of(node) for node in self.nodes}
        self.places = {node: number for number, node in enumerate(self.nodes)}

    def blocks(self) -> dict[str, int]:
        """The modules whose own code adds two tensors, and that give back what they read if the branches are silent;
        with the number of these.
        """
        adding = dict.fromkeys(self.owners[node] for node in self.nodes if _operands(node) is not None)
        counted = {name: self._branches(name) for name in adding if name}
        return {name: branches for name, branches in counted.items() if branches}

    def ends(self, name: str) -> tuple[fx.Node | None, fx.Node | None]:
        """(what the module reads from outside, what others read from it); None where that is not one value."""
        inside = {node for node in self.nodes if is_within(self.owners[node], name)}
        read = {one for node in inside for one in node.all_input_nodes if one not in inside}
        written = {node for node in inside if any(user not in inside for user in node.users)}
        return (*read,)[0] if len(read) == 1 else None, (*written,)[0] if len(written) == 1 else None

    def _branches(self, name: str) -> int:
        """How many branches are silent where the module gives back what it reads; 0 where it cannot be dropped."""
        read, written = self.ends(name)
        if read is None or written is None or not _are_alike(read, written):
            return 0
        path = self._path(written, read)
        if path is None or any(self._changed_later(value) for value in (read, self._source(read))):
            return 0
        if any(self._changed_later(value, but=path) for value in path):
            return 0
        return sum(_operands(node) is not None for node in path)

    def _path(self, node: fx.Node, read: fx.Node) -> list[fx.Node] | None:
        """The steps from `read` to the node, last one first, on which the value is that of `read` once the branches of
        the additions among them are silent; None where it is another.
        """
        if node is read:
            return []
        rectifier = self._rectifier(node)
        if self._is_kind(node, (nn.Identity,), ()) or rectifier is not None:
            if rectifier is not None and self._rectifier(self._source(read)) != rectifier:
                return None
            before = self._path(node.all_input_nodes[0], read)
            return None if before is None else [node, *before]
        operands = _operands(node)
        if operands is None or any(is_constant(one) for one in operands):
            return None
        found = [self._path(one, read) for one in operands if _are_alike(one, node)]
        bare = [path for path in found if path is not None]
        return [node, *bare[0]] if len(bare) == 1 else None

    def _source(self, node: fx.Node) -> fx.Node:
        """What a value was taken from, largest values of regions and identities left aside: its sign is no other."""
        passing = (nn.Identity, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
        while self._is_kind(node, passing, (F.max_pool1d, F.max_pool2d, F.max_pool3d)):
            node = node.all_input_nodes[0]
        return node

    def _rectifier(self, node: fx.Node) -> str | None:
        """Which function that leaves its own results, and their gradients, as they are made this; None for none."""
        for name, module, functions in _RECTIFIERS:
            if self._is_kind(node, (module,), functions):
                return name
        return None

    def _is_kind(self, node: fx.Node, modules: tuple[type[nn.Module], ...], functions: Collection[Any]) -> bool:
        if node.op == "call_module":
            return type(self.root.get_submodule(node.target)) in modules
        return node.op in ("call_function", "call_method") and node.target in functions

    def _changed_later(self, value: fx.Node, but: Collection[fx.Node] = ()) -> bool:
        """Whether anything but these writes into the value's memory after it is there."""
        return any(self.places[node] > self.places[value] and node not in but for node in self._changing(value))

    def _changing(self, value: fx.Node) -> list[fx.Node]:
        """The operations that write into memory in which the value may lie."""
        same, new = {value}, [value]
        while new:
            node = new.pop()
            around = {*self._given_back(node), *(user for user in node.users if node in self._given_back(user))}
            new += around - same
            same |= around
        return [user for node in same for user in node.users if node in self._written(user)]

    def _given_back(self, node: fx.Node) -> list[fx.Node]:
        """The operands in whose memory the node's value may lie; none where it is known to be new."""
        if not (node.op.startswith("call_") and _holds_tensors(node)):
            return []
        if written := self._written(node):
            return written
        if node.op == "call_module":
            is_new = type(self.root.get_submodule(node.target)).forward in _NEW_OF_MODULES
        else:
            is_new = node.target in _NEW
        return [] if is_new else [one for one in node.all_input_nodes if _holds_tensors(one)]

    def _written(self, node: fx.Node) -> list[fx.Node]:
        """The operands that the operation changes in place."""
        into = [node.kwargs.get("out")]
        if self._writes_into_first(node):
            into.append(node.args[0] if node.args else node.kwargs)  # one of those that are named
        found: list[fx.Node] = []
        fx.map_arg(into, found.append)
        return [one for one in found if _holds_tensors(one)]

    def _writes_into_first(self, node: fx.Node) -> bool:
        """Whether the operation changes its first operand in place."""
        if node.op == "call_module":
            return bool(getattr(self.root.get_submodule(node.target), "inplace", False))
        if not node.op.startswith("call_"):
            return False
        name = str(getattr(node.target, "__name__", node.target))
        if node.target in _IN_PLACE or (name.endswith("_") and not name.endswith("__")):
            return True
        if node.op == "call_method":
            return bool(node.kwargs.get("inplace", False))
        try:
            given = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments
        except (TypeError, ValueError):  # a function of torch's own that tells nothing
            given = node.kwargs
        return bool(given.get("inplace", False))


def _holds_tensors(node: fx.Node) -> bool:
    return shape_of(node) is not None or bool(node.meta.get("unknown"))


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two tensors that the node adds; None where it does anything else, or more."""
    if node.target not in _ADDITIONS or node.op == "call_module" or len(node.args) != 2 or node.kwargs:
        return None
    return node.args if all(shape_of(one) is not None for one in node.args) else None


def _are_alike(one: fx.Node, other: fx.Node) -> bool:
    """Whether two values are tensors of one shape and type."""
    values = one.meta.get("value"), other.meta.get("value")
    both = all(isinstance(value, torch.Tensor) for value in values)
    return both and values[0].shape == values[1].shape and values[0].dtype == values[1].dtype


_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_RECTIFIERS = (
    ("relu", nn.ReLU, (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")),
    ("relu6", nn.ReLU6, (F.relu6,)),
)
_IN_PLACE = tuple(getattr(operator, name) for name in (*CHANGES, "imatmul", "setitem"))

_NEW_NAMES = (
    *("add", "sub", "subtract", "mul", "multiply", "truediv", "div", "divide", "true_divide", "floordiv", "pow", "neg"),
    *("matmul", "mm", "bmm", "addmm", "baddbmm", "addcmul", "addcdiv", "rsub", "lerp", "where", "maximum", "minimum"),
    *("exp", "log", "sqrt", "rsqrt", "square", "reciprocal", "sin", "cos", "erf", "tanh", "sigmoid", "clamp", "clip"),
    *("relu", "relu6", "leaky_relu", "prelu", "elu", "celu", "selu", "gelu", "silu", "mish"),
    *("hardswish", "hardsigmoid", "hardtanh", "softplus", "softsign", "logsigmoid", "softmax", "log_softmax", "glu"),
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", "embedding"),
    *("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "scaled_dot_product_attention"),
    *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
    *("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
    *("mean", "sum", "amax", "amin", "var", "std", "norm"),
    *("cat", "concat", "stack", "clone", "zeros_like", "ones_like"),
)
_NEW = {getattr(home, name) for home in (torch, F, operator) for name in _NEW_NAMES if hasattr(home, name)}
_NEW |= set(_NEW_NAMES)  # methods
"""Functions and methods whose result lies in memory of its own, unless they are told to work in place."""

_NEW_OF_MODULES = {
    kind.forward
    for kind in (
        *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear),
        *(nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.Embedding),
        *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid),
        *(nn.Tanh, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.Softmax, nn.LogSoftmax, nn.GLU),
        *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
        *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool2d),
        nn.MultiheadAttention,
    )
}
"""The same of modules, also of those of other classes that only take their code over."""
