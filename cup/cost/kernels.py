"""From the traced operations to kernels: what each of them computes and moves, as a function of the widths.

Forward and backward. A product of matrices has three kernels in training: its own, the gradient of its input (none for
the image), the gradient of its weight. What only moves memory counts the tensors that it reads and writes:

| | forward | backward |
|---|---|---|
| batch norm | statistics: 1; normalise: 2 | sums: 2; gradient: 3 |
| other norms, softmax | 2 | 5 |
| activation | 2 | 3 |
| sum of two | 3 | none: the gradient goes to both as it is |
| product of two | 3 | 3 for each factor, 1 more where a factor was spread |
| pooling, mean | input and output | the same |
| concatenation, padding, resampling | input and output | the same |
| a value that several read | | 3 for each reader after the first, to add up |

Views are free. In inference batch norm takes 2 and dropout nothing.

The optimizer's kernel is counted for the weights of convolutions and linear layers only, torch's attention among them:
norms, biases and free parameters have none.

Fused: an operation on single elements that is the only reader of what a norm or another such operation gives runs
in the same kernel. It costs only the other tensors that it reads, and backward one more for the branch that it
adds; in inference convolutions and linear layers take such operations and their batch norm along, too.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from cup.tracing.groups import Network, TracedOp, Value
from cup.tracing.layers import CONVS, TRANSPOSED_CONVS, weight_of

ONE = 0
"""The axis of what has no channels that could go: its width is always 1."""

MANY_PER_GROUP = 64
"""A grouped convolution that reads so many channels a group runs as fast as a plain one: tensor cores are filled."""


@dataclass(frozen=True)
class Axis:
    """A channel axis. numbers: int64, the trace's number of the channel at each index; None where none can go."""

    numbers: np.ndarray | None
    length: int


@dataclass(frozen=True)
class Kernel:
    """The work of one kernel, for one sample.

    kind: of `KERNELS`. reads, writes: axes. flops: for each pair of a channel read and a channel written.
    elements: (axis, elements for each of its channels), of all tensors that it reads and writes.
    weights: elements of the weight for each such pair, which do not grow with the batch; of the optimizer, the bytes.
    """

    kind: str
    reads: int = ONE
    writes: int = ONE
    flops: float = 0.0
    elements: tuple[tuple[int, float], ...] = ()
    weights: float = 0.0


@dataclass(frozen=True)
class Work:
    """All kernels of a training step, or of inference, and the axes that they speak of.

    modules: of each kernel, the innermost module that has it run.
    """

    axes: tuple[Axis, ...]
    kernels: tuple[Kernel, ...]
    modules: tuple[str, ...]


def kernels_of(model: nn.Module, network: Network, *, training: bool, fused: bool) -> Work:
    """The kernels in the order of the forward pass, each operation's backward ones behind its own."""
    counting = _Counting(model, network, training, fused)
    pairs = [(kernel, op.module) for op in counting.operations for kernel in counting.kernels(op)]
    kernels, modules = zip(*pairs, *counting.sums_of_gradients(), strict=True)
    return Work(tuple(counting.axes), kernels, modules)


PASSES = {"batch_norm": (3, 5), "norm": (2, 5), "unary": (2, 3), "binary": (3, 3), "dropout": (2, 3)}
"""Kind -> passes over the result, forward and backward, in training."""

OPERATIONS = {"gelu": 40, "silu": 20, "swish": 20, "sigmoid": 20, "tanh": 20, "mish": 40, "softplus": 20, "erf": 20}
"""Activations with an exponential function in them -> operations for an element; any other takes one."""

_FREE = (
    *("view", "reshape", "flatten", "unflatten", "permute", "transpose", "swapaxes", "t", "squeeze", "unsqueeze"),
    *("getitem", "getattr", "size", "chunk", "split", "unbind", "expand", "expandas", "identity", "detach", "select"),
    *("narrow", "contiguous", "to", "typeas", "float", "half", "bfloat16", "clone", "viewas", "movedim", "tensorsplit"),
)
"""Views, and what mostly is none but costs nothing that widths change."""
_BATCH_NORMS = ("batchnorm", "batchnorm1d", "batchnorm2d", "batchnorm3d", "syncbatchnorm")
_NORMS = ("layernorm", "groupnorm", "instancenorm", "instancenorm2d", "rmsnorm", "softmax", "logsoftmax", "normalize")
_SUMS = ("add", "iadd", "sub", "isub")
_PRODUCTS_OF_TWO = ("mul", "imul", "truediv", "itruediv", "div", "maximum", "minimum", "where", "pow", "ipow")
_POOLS = ("maxpool1d", "maxpool2d", "maxpool3d", "avgpool1d", "avgpool2d", "avgpool3d", "lppool2d")
_MEANS = (
    *("adaptiveavgpool1d", "adaptiveavgpool2d", "adaptiveavgpool3d", "adaptivemaxpool2d", "mean", "sum", "amax"),
    "amin",
)
_COPIES = (
    *(
        "cat",
        "concat",
        "stack",
        "pad",
        "zeropad2d",
        "zeropad3d",
        "constantpad3d",
        "roll",
        "repeat",
        "interpolate",
        "upsample",
        "channelshuffle",
    ),
    *("upsamplingnearest2d", "upsamplingbilinear2d", "constantpad2d", "reflectionpad2d", "replicationpad2d"),
)
_MATRIX_PRODUCTS = ("matmul", "bmm", "einsum", "baddbmm", "rmatmul")
_CHANCE = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alphadropout", "stochasticdepth", "droppath")


@dataclass
class _Counting:
    """Turns operations into kernels; `axes` grows with what they need."""

    model: nn.Module
    network: Network
    training: bool
    fused: bool
    axes: list[Axis] = field(default_factory=lambda: [Axis(None, 1)])

    def __post_init__(self) -> None:
        self.operations = [op for op in self.network.operations if self.training or op.in_evaluation]
        self._axis_of: dict[bytes, int] = {}
        self._layers = {op.module: self.network.find(self.model, op.module) for op in self.operations}
        self._maker = {op.writes: op for op in self.operations if op.writes is not None}
        self._readers: dict[int, list[TracedOp]] = {}
        for op in self.operations:
            for position in set(op.reads):
                self._readers.setdefault(position, []).append(op)
        self._with_gradient = self._find_gradients() if self.training else set()
        self._optimized: set[int] = set()

    def kernels(self, op: TracedOp) -> Iterator[Kernel]:
        name, layer = op.name, self._layers[op.module]
        if op.writes is None and name != "multiheadattention":
            return
        if name in _FREE or (name in _CHANCE and not self._is_active(layer)):
            return
        if name.startswith("conv"):
            yield from self._convolution(op, layer)
        elif name == "linear":
            yield from self._linear(op, layer)
        elif name in _MATRIX_PRODUCTS or name == "scaleddotproductattention":
            yield from self._attention(op)
        elif name == "multiheadattention":
            yield from self._multihead(op, layer)
        elif name in _BATCH_NORMS:
            if not self._is_merged(op):
                yield from self._moving("batch_norm", op, *(PASSES["batch_norm"] if self.training else (2, 0)))
        elif name in _CHANCE:
            yield from self._moving("dropout", op, *PASSES["dropout"])
        elif name in _NORMS:
            yield from self._moving("norm", op, *PASSES["norm"])
        elif name in _POOLS or name in _MEANS:
            yield from self._resized("pool" if name in _POOLS else "reduce", op)
        elif name in _COPIES:
            yield from self._resized("copy", op)
        else:
            yield from self._elementwise(op)

    def sums_of_gradients(self) -> Iterator[tuple[Kernel, str]]:
        """Where several operations read a value, their gradients are added up, one by one: for the reader's module."""
        for position, readers in self._readers.items():
            if position in self._with_gradient and len(readers) > 1:
                axis, each = self._elements(position)
                for reader in readers[1:]:
                    yield Kernel("binary.backward", elements=((axis, 3 * each),)), reader.module

    # --- products ---

    def _convolution(self, op: TracedOp, layer: nn.Module) -> Iterator[Kernel]:
        value, result = self.network.values[op.reads[0]], self.network.values[op.writes]
        if not isinstance(layer, CONVS):
            yield from self._free_weight(op)
            return
        window = math.prod(layer.kernel_size)
        # A transposed convolution does for each pixel of its input what another does for each of its output.
        pixels = _size(value if isinstance(layer, TRANSPOSED_CONVS) else result) / _width(layer, value, result)
        kind = "pointwise" if window == 1 else "conv"
        if layer.groups > 1:
            per_channel = layer.weight.shape[1]
            if per_channel < MANY_PER_GROUP:
                kind = "grouped" if window <= 9 else "wide_grouped"
            yield from self._product(op, layer, kind, 2 * window * pixels * per_channel, window * per_channel)
        else:
            yield from self._product(op, layer, kind, 2 * window * pixels, window)

    def _linear(self, op: TracedOp, layer: nn.Module) -> Iterator[Kernel]:
        if not isinstance(layer, nn.Linear | nn.MultiheadAttention):
            yield from self._free_weight(op)
            return
        result = self.network.values[op.writes]
        yield from self._product(op, layer, "linear", 2 * _size(result) / result.shape[-1], 1)

    def _product(self, op: TracedOp, layer: nn.Module, kind: str, flops: float, weights: float) -> Iterator[Kernel]:
        """flops, weights: for each pair of a channel read and one written; of a grouped layer for each written."""
        value, result = op.reads[0], op.writes
        dim = -1 if kind == "linear" else 1
        read, written = self._elements(value, dim), self._elements(result, dim)
        axes = (read[0] if getattr(layer, "groups", 1) == 1 else ONE, written[0])
        both = (read, written)
        work = {"reads": axes[0], "writes": axes[1], "flops": flops, "elements": both, "weights": weights}
        yield Kernel(f"{kind}.forward", **work)
        if value in self._with_gradient:
            yield Kernel(f"{kind}.input", **work)
        if result in self._with_gradient and (weight := weight_of(layer)).requires_grad:
            yield Kernel(f"{kind}.weight", **work)
            yield from self._optimizer(weight, axes, weights)

    def _optimizer(self, weight: torch.Tensor, axes: tuple[int, int], weights: float) -> Iterator[Kernel]:
        """SGD with momentum in fp32: weight, gradient and momentum are read, weight and momentum written."""
        if id(weight) not in self._optimized:
            self._optimized.add(id(weight))
            yield Kernel("optimizer", *axes, weights=5 * 4 * weights)

    def _attention(self, op: TracedOp) -> Iterator[Kernel]:
        """Products of values: of two, or attention's two in one kernel; the work of all heads, also where some go."""
        values = [self.network.values[position] for position in op.reads]
        result = self.network.values[op.writes]
        flops = 2 * _size(result) * values[0].shape[-1]
        if op.name == "scaleddotproductattention":
            flops = 4 * _size(result) * values[1].shape[-2]
        elements = tuple(self._elements(position) for position in (*op.reads, op.writes))
        yield Kernel("attention.forward", flops=flops, elements=elements)
        if op.writes in self._with_gradient:
            yield Kernel("attention.input", flops=2 * flops, elements=tuple((axis, 2 * n) for axis, n in elements))

    def _multihead(self, op: TracedOp, layer: nn.Module) -> Iterator[Kernel]:
        """torch's own module as a whole, where it is not followed: four projections, and attention."""
        value = self.network.values[op.reads[0]]
        channels, tokens = value.shape[-1], _size(value) / value.shape[-1]
        length = value.shape[1 if getattr(layer, "batch_first", False) else 0]
        axis, each = self._elements(op.reads[0])
        parts = [
            ("linear", 2 * tokens * 4 * channels**2, 8, 4.0 * channels**2),
            ("attention", 4 * tokens * length * channels, 4, 0.0),
        ]
        for kind, flops, tensors, weights in parts:
            work = {"flops": flops, "elements": ((axis, tensors * each),), "weights": weights}
            yield Kernel(f"{kind}.forward", **work)
            if self.training:
                yield Kernel(f"{kind}.input", **work)
                yield Kernel(f"{kind}.weight", **work)

    def _free_weight(self, op: TracedOp) -> Iterator[Kernel]:
        """A function that is given matrices as parameters: each multiplies every row of the result, or pixel."""
        result = self.network.values[op.writes]
        matrices = [v for v in (self.network.values[p] for p in op.reads) if v.parameter and _is_matrix(v)]
        rows = _size(result) / result.shape[1 if op.name.startswith("conv") else -1]
        flops = sum(2 * rows * math.prod(matrix.shape) for matrix in matrices)
        elements = tuple(self._elements(p) for p in (*op.reads, op.writes))
        yield Kernel("linear.forward", flops=flops, elements=elements)
        if op.writes in self._with_gradient:
            yield Kernel("linear.input", flops=flops, elements=elements)
            yield Kernel("linear.weight", flops=flops, elements=elements)

    # --- what moves memory ---

    def _moving(self, kind: str, op: TracedOp, forward: float, backward: float) -> Iterator[Kernel]:
        """So many passes over the result."""
        axis, each = self._elements(op.writes)
        operations = OPERATIONS.get(op.name, 1) * each
        yield Kernel(f"{kind}.forward", writes=axis, flops=operations, elements=((axis, forward * each),))
        if op.writes in self._with_gradient:
            yield Kernel(f"{kind}.backward", writes=axis, flops=operations, elements=((axis, backward * each),))

    def _resized(self, kind: str, op: TracedOp) -> Iterator[Kernel]:
        elements = tuple(self._elements(position) for position in (*op.reads, op.writes))
        yield Kernel(f"{kind}.forward", elements=elements)
        if op.writes in self._with_gradient:
            yield Kernel(f"{kind}.backward", elements=elements)

    def _elementwise(self, op: TracedOp) -> Iterator[Kernel]:
        """Activations, sums, products, and whatever has no rule of its own."""
        matrices = [p for p in op.reads if self.network.values[p].parameter and _is_matrix(self.network.values[p])]
        if matrices and op.name not in (*_SUMS, *_PRODUCTS_OF_TWO):
            yield from self._free_weight(op)
            return
        merged = self._is_merged(op)
        if len(op.reads) == 1:
            if not merged:
                yield from self._moving("unary", op, *PASSES["unary"])
            return
        operands = op.reads[1:] if merged else op.reads
        result = self._elements(op.writes)
        elements = tuple(self._elements(position) for position in operands)
        yield Kernel("binary.forward", elements=elements if merged else (*elements, result))
        if op.writes in self._with_gradient and (backward := self._backward(op, merged)):
            yield Kernel("binary.backward", elements=((result[0], backward * result[1]),))

    def _backward(self, op: TracedOp, merged: bool) -> float:
        """Passes over the result for the gradients of what it was made of."""
        learning = [position for position in op.reads if position in self._with_gradient]
        if merged:
            return float(len([position for position in learning if position != op.reads[0]]))
        if op.name in _SUMS:
            return float(sum(self._is_spread(position, op) for position in learning))
        return float(sum(3 + self._is_spread(position, op) for position in learning))

    # --- what is known of values ---

    def _is_spread(self, position: int, op: TracedOp) -> bool:
        """Whether the value has fewer elements than the result of combining it with another."""
        return math.prod(self.network.values[position].shape) < math.prod(self.network.values[op.writes].shape)

    def _is_merged(self, op: TracedOp) -> bool:
        """Whether it runs in the kernel of what gives it its first operand."""
        before = self._only_maker(op.reads[0])
        if not self.fused or before is None:
            return False
        if op.name in _BATCH_NORMS:
            return not self.training and before.name.startswith("conv")
        takes_along = before.name in (*_BATCH_NORMS, *_NORMS) or _is_elementwise(before)
        return takes_along or (not self.training and before.name.startswith(("conv", "linear")))

    def _only_maker(self, position: int) -> TracedOp | None:
        """What computed the value, looking through what does nothing; None where others read it, too."""
        before = self._maker.get(position)
        if before is None or len(self._readers[position]) > 1:
            return None
        does_nothing = before.name == "identity" or (
            before.name in _CHANCE and not self._is_active(self._layers[before.module])
        )
        return self._only_maker(before.reads[0]) if does_nothing else before

    def _is_active(self, layer: nn.Module) -> bool:
        """Whether a dropout drops anything."""
        return self.training and getattr(layer, "p", getattr(layer, "drop_prob", 1.0)) not in (0.0, None)

    def _find_gradients(self) -> set[int]:
        """The values that a gradient flows to: all that depend on a parameter."""
        found = {p for p, v in enumerate(self.network.values) if v.parameter and self._is_trained(v.parameter)}
        for op in self.operations:
            layer = self._layers[op.module]
            own = not any(True for _ in layer.children()) and any(p.requires_grad for p in layer.parameters())
            if op.writes is not None and (own or any(position in found for position in op.reads)):
                found.add(op.writes)
        return found

    def _is_trained(self, name: str) -> bool:
        owner, _, attribute = name.rpartition(".")
        try:
            return self.network.find(self.model, owner).get_parameter(attribute).requires_grad
        except AttributeError:
            return False  # a buffer, or a constant that the code made

    def _elements(self, position: int, dim: int | None = None) -> tuple[int, float]:
        """(axis, elements of one sample for each of its channels).

        dim: the dimension that counts as the channels where none can go; without it they do not count.
        """
        value = self.network.values[position]
        if value.numbers is None:
            if dim is None:
                return ONE, _size(value)
            length = value.shape[dim]
            return self._axis(None, length), _size(value) / length
        return self._axis(value.numbers, len(value.numbers)), _size(value) / len(value.numbers)

    def _axis(self, numbers: np.ndarray | None, length: int) -> int:
        key = b"%d" % length if numbers is None else b"c" + numbers.tobytes()
        if key not in self._axis_of:
            self._axis_of[key] = len(self.axes)
            self.axes.append(Axis(numbers, length))
        return self._axis_of[key]


def _is_elementwise(op: TracedOp) -> bool:
    known = (*_FREE, *_POOLS, *_MEANS, *_COPIES, *_MATRIX_PRODUCTS, *_BATCH_NORMS, *_NORMS, "linear")
    return not op.name.startswith("conv") and op.name not in known and not op.name.endswith("attention")


def _size(value: Value) -> float:
    """Elements of one sample; of what does not depend on the input, all of them."""
    return math.prod(value.shape) / max(1, value.samples)


def _width(layer: nn.Module, value: Value, result: Value) -> int:
    """Channels of the tensor whose pixels a convolution counts."""
    return (value if isinstance(layer, TRANSPOSED_CONVS) else result).shape[1]


def _is_matrix(value: Value) -> bool:
    return sum(length > 1 for length in value.shape) > 1


def counts(axes: Sequence[Axis], alive: np.ndarray) -> np.ndarray:
    """float64: the channels of each axis that are there."""
    return np.array([axis.length if axis.numbers is None else alive[axis.numbers].sum() for axis in axes], np.float64)


def occurrences(axes: Sequence[Axis], groups: Mapping[str, np.ndarray], alive: np.ndarray) -> np.ndarray:
    """float64 (axes, groups): how often a channel of each group stands on each axis, the mean over its channels."""
    table = np.zeros((len(axes), len(groups)))
    owner = np.full(len(alive), -1, dtype=np.int64)
    for index, numbers in enumerate(groups.values()):
        owner[numbers] = index
    widths = np.array([len(numbers) for numbers in groups.values()])
    for row, axis in enumerate(axes):
        if axis.numbers is not None:
            owners = owner[axis.numbers]
            table[row] = np.bincount(owners[owners >= 0], minlength=len(groups)) / widths
    return table
