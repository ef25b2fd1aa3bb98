"""Trace a network's forward pass with torch.fx; every node of the graph knows the shape of its value.

The network's code runs once, on stand-ins for its tensors. Each operation is noted in the graph, and done on the meta
device at once, so that code that asks for a number (`if x.shape[-1] % 2`) gets it. It is noted which numbers were asked
for: where one is a width, its channels must stay.

Why torch.fx and not torch.export or torch.compile's front end: those write every size into their graph as a bare
number, and nothing tells a 64 that is a width from a 64 that is something else.
"""

import dataclasses
import functools
import itertools
import math
import operator
import random
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from cup.errors import CupError
from cup.tracing.meta import Sample, arguments, does_not_take, first_line, map_tensors, meta_input
from cup.tracing.rules import answers_no_width, arguments_besides_width, is_known

TRACED_SAMPLES = 2
"""So many samples are traced together, so that a batch is told from a size."""


@dataclass(frozen=True, eq=False)
class Trace:
    """One forward pass as a graph.

    `node.meta` holds "shape" for a tensor, "unknown" where several may be in the value, and "constant": whether it is
    computed from parameters and buffers alone.

    root: the traced copy of the network, with the constants that its code made.
    asked: nodes whose value the code took as a plain number.
    hooked: values that go into or come out of a module with forward hooks, with the module's name.
    """

    graph: fx.Graph
    root: nn.Module
    asked: list[fx.Node] = field(default_factory=list)
    hooked: list[tuple[fx.Node, str]] = field(default_factory=list)

    def steps(self, like: "Trace | None" = None) -> list[tuple[str, str, str]]:
        """(operation, what it is done to or by, arguments) of every node, comparable between traces of one network.

        like: a trace whose walk has noted which sizes follow the widths; those are left out here, too.
        """
        noted = [node.meta.get("following") for node in (self if like is None else like).graph.nodes]
        return [
            (node.op, self.target_of(node), arguments_besides_width(node, self.root, following))
            for node, following in zip(self.graph.nodes, itertools.chain(noted, itertools.repeat(None)), strict=False)
        ]

    def target_of(self, node: fx.Node) -> str:
        """What a node calls or reads, comparable between traces of one network."""
        value = operator.attrgetter(node.target)(self.root) if node.op == "get_attr" else None
        if not isinstance(value, torch.Tensor) or isinstance(value, nn.Parameter):
            return str(node.target)
        name = node.target.rpartition(".")[2]
        if name in self.root.get_submodule(node.target.rpartition(".")[0])._buffers:
            return str(node.target)
        entries = b"" if value.is_meta else value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"a constant {tuple(value.shape)} {hash(entries)}"


def trace_forward(twin: nn.Module, sample: Sample, hooked: Collection[str] = ()) -> Trace:
    """Trace a copy from `meta_copy` on `TRACED_SAMPLES` samples; the copy is used up.

    hooked: names of the modules whose forward hooks may do anything. Raises CupError where the network cannot be
    traced, or does not take such inputs.
    """
    tracer = _Tracer(meta_input(sample, batch=TRACED_SAMPLES), hooked)
    try:
        with _recorded_functions(tracer), _same_chance():
            graph = tracer.trace(twin)
    except Exception as error:  # whatever a network's own code raises on stand-ins
        refusal = None if isinstance(error, fx.proxy.TraceError) else _refusal(twin, sample)
        if refusal is not None:
            raise CupError(does_not_take(twin, sample, refusal)) from error
        raise CupError(f"torch.fx cannot trace {type(twin).__name__}: {first_line(error)}") from error
    return Trace(graph, twin, tracer.asked, tracer.hooked)


def _refusal(twin: nn.Module, sample: Sample) -> Exception | None:
    """What the network raises on shapes alone, if it does not take them."""
    positional, named = arguments(meta_input(sample, batch=TRACED_SAMPLES))
    try:
        with torch.no_grad(), torch.device("meta"):
            twin(*positional, **named)
    except Exception as error:
        return error
    return None


@contextmanager
def _same_chance() -> Iterator[None]:
    """Code that throws dice (stochastic depth in Python) does the same in every trace; the caller's dice stay."""
    python, array = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(0)
            np.random.seed(0)
            torch.default_generator.manual_seed(0)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)


@contextmanager
def _recorded_functions(tracer: "_Tracer") -> Iterator[None]:
    """Functions whose stand-ins torch's own parser of arguments does not take are noted before it sees them."""
    with torch.device("meta"):
        torch.empty(0)  # torch's table of such functions is made once, at their first use: with the originals, then
    places = {*((torch, name) for name in _FACTORIES), *_of_numbers()}
    originals = {place: getattr(*place) for place in places}

    def recorded(original: Callable) -> Callable:
        def make(*args: Any, **kwargs: Any) -> Any:
            sizes = any(isinstance(value, fx.Proxy) for value in _tensors_in((args, kwargs)))
            return tracer.create_proxy("call_function", original, args, kwargs) if sizes else original(*args, **kwargs)

        return make

    apply = vars(torch.autograd.Function)["apply"]
    try:
        for place, original in originals.items():
            setattr(*place, recorded(original))
        torch.autograd.Function.apply = classmethod(lambda cls, *args: recorded(apply.__get__(None, cls))(*args))
        yield
    finally:
        for place, original in originals.items():
            setattr(*place, original)
        torch.autograd.Function.apply = apply


_FACTORIES = ("zeros", "ones", "empty", "full", "rand", "randn", "arange", "linspace", "eye")
"""They make a tensor of a given size, and a stand-in for a size is refused."""


@functools.cache
def _of_numbers() -> tuple[tuple[Any, str], ...]:
    """(module, name) of the functions that may take a number, often a tensor in its place.

    The parser, in search of a number, reads a stand-in's memory as if it were the tensor that it says it is: that ends
    the process.
    """
    schemas = [schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("aten::")]
    number = [one for one in schemas if any(str(a.type) in ("number", "Optional[number]") for a in one.arguments)]
    names = {one.name.removeprefix("aten::") for one in number}
    plain = [(torch, name) for name in names if name[0] != "_"]
    special = [(torch.special, name.removeprefix("special_")) for name in names if name.startswith("special_")]
    return tuple(place for place in (*plain, *special) if callable(getattr(*place, None)))


class _Sizes(tuple[Any, ...]):
    """Sizes that were put together, one by one; with what `torch.Size` has and a tuple has not."""

    def numel(self) -> Any:
        return math.prod(self)


class _StandIn(fx.Proxy):
    """Stands for one value of the forward pass, and answers what can be known of it without its entries."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = self.node.meta["value"]
        if isinstance(value, torch.Tensor):
            if name == "device":
                return torch.device("cpu")  # where constants have values
            if name in _PLAIN_ATTRIBUTES or not hasattr(value, name):
                return getattr(value, name)
        return _StandInAttribute(self, name)

    @property
    def __class__(self) -> type:
        """So that isinstance says what it says of the value."""
        value = self.node.meta["value"]
        return torch.Tensor if isinstance(value, torch.Tensor) else type(value)

    def __iter__(self) -> Iterator[Any]:
        return iter([self[index] for index in range(len(self))])

    def __len__(self) -> int:
        value = self.node.meta["value"]
        return int(self.size(0)) if isinstance(value, torch.Tensor) else len(value)

    def __add__(self, other: Any) -> Any:
        """Sizes and further ones are spelt out one by one, as a view may be given them."""
        if isinstance(self.node.meta["value"], torch.Size):
            return _Sizes((*self, *other))
        return super().__add__(other)

    def __radd__(self, other: Any) -> Any:
        if isinstance(self.node.meta["value"], torch.Size):
            return _Sizes((*other, *self))
        return super().__radd__(other)

    def __setitem__(self, index: Any, value: Any) -> None:
        """Noted as what it is, a step that gives nothing; its operands are not followed."""
        step = self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {}).node
        step.meta["unknown"] = True
        self.node.meta["constant"] &= step.meta["constant"]

    def __bool__(self) -> bool:
        return bool(self.tracer.answer(self.node))

    def __int__(self) -> int:
        return int(self.tracer.answer(self.node))

    def __float__(self) -> float:
        return float(self.tracer.answer(self.node))

    def __index__(self) -> int:
        return operator.index(self.tracer.answer(self.node))

    def _changed(self, change: Callable[[Any, Any], Any], other: Any) -> Any:
        """`x += y` and the like. torch.fx takes it for `x = x + y`, which leaves the tensor that x was as it is."""
        if not isinstance(self.node.meta["value"], torch.Tensor):
            return NotImplemented  # a size, say: Python then does the latter itself
        return self.tracer.create_proxy("call_function", change, (self, other), {})


CHANGES = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "ilshift", "irshift")
"""Python's operators that change their first operand in place."""
for _name in CHANGES:
    if hasattr(torch.Tensor, f"__{_name}__"):
        setattr(_StandIn, f"__{_name}__", functools.partialmethod(_StandIn._changed, getattr(operator, _name)))


class _StandInAttribute(fx.proxy.Attribute, _StandIn):
    """An attribute of a value: a node of its own unless it is called as a method."""


_PLAIN_ATTRIBUTES = (
    "dtype",
    "ndim",
    "layout",
    "requires_grad",
    "is_cuda",
    "is_sparse",
    "is_quantized",
    "is_meta",
    "is_nested",
)


class _Tracer(fx.Tracer):
    """Looks inside all modules but those that have a rule and torch's own, and inside torch's encoder."""

    def __init__(self, inputs: Any, hooked: Collection[str]) -> None:
        super().__init__()
        self.asked: list[fx.Node] = []
        self.hooked: list[tuple[fx.Node, str]] = []
        self._inputs, self._hooked_modules = inputs, hooked
        self._computing = False
        self._names: dict[int, str] = {}

    def answer(self, node: fx.Node) -> Any:
        """The plain value at a node, for code that cannot do without."""
        value = node.meta["value"]
        if isinstance(value, torch.Tensor):
            raise fx.proxy.TraceError(f"what the code does depends on the entries of a tensor ({node.name})")
        self.asked.append(node)
        return value

    # --- torch.fx's own hooks ---

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _StandIn(node, self)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """One placeholder for each tensor of the inputs; arguments that they do not name have their defaults."""
        tensors = (*self.root.named_parameters(), *self.root.named_buffers())
        self._names = {id(tensor): name for name, tensor in tensors}
        positional, named = arguments(map_tensors(self._inputs, self._placeholder))
        return lambda root: tuple(_outputs_in(root.forward(*positional, **named))), [self.root]

    def create_node(self, kind: str, target: Any, args: tuple, kwargs: dict, *names: Any, **more: Any) -> fx.Node:
        node = super().create_node(kind, target, args, kwargs, *names, **more)
        if kind not in ("placeholder", "output"):
            self._note(node, self._value(node))
        return node

    def create_proxy(self, kind: str, target: Any, args: tuple, kwargs: dict, *names: Any, **more: Any) -> Any:
        proxy = super().create_proxy(kind, target, args, kwargs, *names, **more)
        if not answers_no_width(proxy.node):
            return proxy
        self.graph.erase_node(proxy.node)
        return proxy.node.meta["value"]

    def create_arg(self, a: Any) -> Any:
        return a.node if isinstance(a, fx.Proxy) else super().create_arg(a)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        return _StandIn.__iter__(obj)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        if type(module) in (nn.TransformerEncoder, nn.TransformerEncoderLayer):
            return False
        return "forward" not in vars(module) and (is_known(module) or super().is_leaf_module(module, name))

    def call_module(self, module: nn.Module, forward: Any, args: tuple, kwargs: dict) -> Any:
        if self._computing or module not in self.submodule_paths:  # `nn.ReLU()(x)`: made on the way
            return forward(*args, **kwargs)
        result = super().call_module(module, forward, args, kwargs)
        name = self.path_of_module(module)
        if name in self._hooked_modules:
            seen = (*_tensors_in((args, kwargs)), *_tensors_in(result))
            self.hooked.extend((value.node, name) for value in seen if isinstance(value, fx.Proxy))
        return result

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """A stand-in for a parameter or buffer. As torch.fx's own, which looks through all of them each time."""
        name = None if self._computing or not isinstance(attr_val, torch.Tensor) else self._names.get(id(attr_val))
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    # --- values ---

    def _placeholder(self, value: torch.Tensor) -> fx.Proxy:
        node = self.create_node("placeholder", "x", (), {})
        self._note(node, value)
        return self.proxy(node)

    def _note(self, node: fx.Node, value: Any) -> None:
        node.meta["value"] = value
        before = node.all_input_nodes
        node.meta["constant"] = node.op != "placeholder" and all(n.meta["constant"] for n in before)
        if isinstance(value, torch.Tensor):
            node.meta["shape"] = tuple(value.shape)
        elif not isinstance(value, _PLAIN):
            node.meta["unknown"] = True

    def _value(self, node: fx.Node) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["value"])
        args, kwargs = tuple(map(_as_given, args)), _as_given(kwargs)
        with self._plain_modules(), torch.no_grad(), torch.device("meta"):
            if node.op == "get_attr":
                value = operator.attrgetter(node.target)(self.root)
                return value.to("meta") if isinstance(value, torch.Tensor) else value
            if node.op == "call_module":
                return _call(self.root.get_submodule(node.target), args, kwargs)
            if node.op == "call_method":
                return getattr(args[0], node.target)(*args[1:], **kwargs)
            # Batch norm keeps the shape, and torch's own meta kernel for it is slow Python.
            return args[0] if node.target is F.batch_norm and args else node.target(*args, **kwargs)

    @contextmanager
    def _plain_modules(self) -> Iterator[None]:
        """While a node's value is computed, modules are called and read as they are."""
        before, self._computing = self._computing, True
        try:
            yield
        finally:
            self._computing = before


# What a size query or arithmetic on sizes gives; any other value that is no tensor may hold tensors.
_PLAIN = (torch.Size, int, float, str, torch.dtype, torch.device, type(None))


def _call(module: nn.Module, args: tuple, kwargs: dict) -> Any:
    if args and isinstance(module, nn.modules.batchnorm._BatchNorm):
        return args[0]
    return module(*args, **kwargs)


def _as_given(argument: Any) -> Any:
    """As the code gave it, in lists and dicts that it may change, which torch.fx's may not be; devices are meta."""
    if isinstance(argument, list):
        return [_as_given(item) for item in argument]
    if isinstance(argument, dict):
        return {key: _as_given(item) for key, item in argument.items()}
    return torch.device("meta") if isinstance(argument, torch.device) else argument


def _outputs_in(value: Any, seen: tuple[Any, ...] = ()) -> Iterator[Any]:
    """All stand-ins in what a network gives, those in an object of its own (a cache of keys and values) among them.

    seen: the objects around the value, which may know each other.
    """
    for found in _tensors_in(value):
        if isinstance(found, fx.Proxy | torch.Tensor) or not hasattr(found, "__dict__"):
            yield found
        elif not isinstance(found, nn.Module | type) and all(found is not other for other in seen):
            yield from _outputs_in(list(vars(found).values()), (*seen, found))


def _tensors_in(value: Any) -> Iterator[Any]:
    """Stand-ins, constant tensors, and whatever else may hold tensors, in what a module was given or gives back."""
    if isinstance(value, fx.Proxy):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors_in(item)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _tensors_in(item)
    elif dataclasses.is_dataclass(value):
        for part in dataclasses.fields(value):
            yield from _tensors_in(getattr(value, part.name))
    elif not isinstance(value, _PLAIN):
        yield value  # torch.fx takes a constant tensor, and refuses objects of unknown kinds
