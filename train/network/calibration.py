"""The cost model's device `measured`: a few dozen layers are timed on the device at hand, forward and backward.

The layers are of the sizes that networks have at the run's batch and image size, for caches make small tensors faster.
What is fitted are the few numbers of `cup.Device`; what is timed is told by nothing else of the network.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cup import CupError, Device, named_device
from cup.cost.fitting import TimedKernel, fit_device
from cup.cost.kernels import OPERATIONS, PASSES
from train.errors import ConfigError
from train.files import read_bounded
from train.network.precision import Precision
from train.network.state import MEMORY_FORMAT

Clock = Callable[[], float]

MAX_FILE_BYTES = 1 << 24

MIN_SECONDS = 0.02
"""For how long one kernel is timed; the fastest call counts."""
MIN_CALLS = 5
OPTIMIZED = 12
"""Weights of 9 MB that the optimizer is timed on: more than caches hold."""
FLUSH_BYTES = 1 << 26
"""On a CPU so much is written before each call: in training, too, only what the layer before has just given is in the
caches, and weights and what the forward pass has left for the backward pass are not."""

# (channels read, channels written, window, image side / pixels of the layer's side, groups); odd widths are there, too:
# they cost as much as the next multiple of what the library's kernels are made for
CONVOLUTIONS = (
    *((64, 64, 3, 4, 1), (40, 40, 3, 4, 1), (128, 128, 3, 8, 1), (100, 60, 3, 8, 1), (256, 256, 3, 16, 1)),
    *((200, 120, 3, 16, 1), (512, 512, 3, 32, 1), (150, 300, 3, 32, 1), (24, 48, 3, 2, 1)),
    *((64, 256, 1, 4, 1), (256, 64, 1, 4, 1), (24, 144, 1, 4, 1), (144, 24, 1, 4, 1), (512, 128, 1, 8, 1)),
    *((100, 300, 1, 8, 1), (40, 240, 1, 8, 1), (256, 1024, 1, 16, 1), (700, 180, 1, 16, 1), (112, 672, 1, 16, 1)),
    *((2048, 512, 1, 32, 1), (320, 1280, 1, 32, 1), (960, 160, 1, 32, 1)),
    *((96, 96, 3, 4, 96), (144, 144, 3, 4, 144), (240, 240, 3, 8, 240), (480, 480, 3, 16, 480)),
    *((72, 72, 5, 8, 72), (240, 240, 5, 16, 240), (672, 672, 5, 16, 672), (96, 96, 7, 4, 96), (384, 384, 7, 16, 384)),
    *((61, 93, 3, 4, 1), (89, 49, 3, 8, 1), (181, 105, 3, 16, 1), (81, 337, 3, 32, 1), (33, 97, 1, 4, 1)),
    *((121, 41, 1, 8, 1), (49, 257, 1, 16, 1), (681, 97, 1, 16, 1), (161, 681, 1, 32, 1)),
    *((81, 81, 3, 4, 81), (233, 233, 3, 16, 233), (121, 121, 5, 8, 121)),
)
# (read, written, image side / side of a map of tokens; 0 = one token an image)
LINEARS = ((96, 384, 4), (384, 96, 4), (384, 1536, 16), (512, 1000, 0), (2048, 1000, 0), (4096, 4096, 0))
# (channels, image side / side of the map)
MAPS = ((64, 2), (24, 2), (256, 4), (96, 4), (512, 8), (1024, 16), (240, 16), (2048, 32))
UNARY = {"relu": F.relu, "hardswish": F.hardswish, "silu": F.silu, "gelu": F.gelu}


def measured_device(
    precision: Precision,
    batch_size: int,
    image_side: int,
    device: torch.device,
    clock: Clock = time.perf_counter,
    passes: int = 1,
) -> Device:
    """Time the layers, seconds on a GPU and half a minute on a CPU, and fit the device. One rank calls it.

    batch_size: images of one rank's step. clock: seconds; `time.process_time` on one thread is not stretched by
    others' work. passes: over all layers, of which the fastest counts: others' work slows a machine for seconds, which
    is longer than a layer is timed. The caller's random numbers stay as they are: a run that measures trains like one
    that does not.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        bench = _Bench(precision, batch_size, image_side, device, clock)
        timed = _fastest_of([list(bench.kernels()) for _ in range(passes)])
        launch_s = min(bench.launch_s() for _ in range(passes))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    source = f"{len(timed)} kernels timed at batch {batch_size}, {image_side} pixels"
    overlap = 1.0 if device.type == "cuda" else 0.0
    return fit_device(f"measured ({name})", precision.name, timed, launch_s, overlap, source)


def known_device(name: str, precision: str) -> Device:
    """A device by its name in `cup.DEVICES`, or from a .json file in which `launch/bench.py cost` keeps a measured one.

    Raises CupError for an unknown name or a precision that a named device lacks, ConfigError for a file that holds no
    device, or one that was measured in another precision.
    """
    if not name.endswith(".json"):
        return named_device(name, precision)
    again = f"launch/bench.py cost --models --precision {precision} --out FILE.json measures this one"
    try:
        device = Device.from_dict(json.loads(read_bounded(Path(name), MAX_FILE_BYTES))["device"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError, CupError) as error:
        found = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise ConfigError(f"{name}: found no device ({found}); {again}") from error
    if device.precision != precision:
        raise ConfigError(f"{name}: found a device measured in {device.precision}, wanted: {precision}; {again}")
    return device


def _fastest_of(passes: Sequence[Sequence[TimedKernel]]) -> list[TimedKernel]:
    return [min(same, key=lambda one: one.seconds) for same in zip(*passes, strict=True)]


@dataclass(frozen=True, eq=False)
class _Call:
    """A function, what it was given, what it gave, and a gradient for that."""

    function: Callable[..., Tensor]
    inputs: Sequence[Tensor]
    result: Tensor
    gradient: Tensor


@dataclass(eq=False)
class _Bench:
    precision: Precision
    batch_size: int
    image_side: int
    device: torch.device
    clock: Clock

    @cached_property
    def buffer(self) -> Tensor:
        return torch.zeros(FLUSH_BYTES, dtype=torch.uint8)

    def kernels(self) -> Iterator[TimedKernel]:
        yield from self.convolutions()
        yield from self.linears()
        yield from self.maps()
        yield from self.optimizer()

    def convolutions(self) -> Iterator[TimedKernel]:
        for read, written, window, stride, groups in CONVOLUTIONS:
            layer = nn.Conv2d(read, written, window, padding=window // 2, groups=groups, bias=False)
            layer.to(self.device, memory_format=MEMORY_FORMAT)
            side = self._side(stride)
            pixels, work = self.batch_size * side**2, 2 * window**2
            if groups == 1:
                kind, pair = "pointwise" if window == 1 else "conv", (read, written)
            else:
                kind, pair = "grouped" if window**2 <= 9 else "wide_grouped", (1, written)
            yield from self._product(kind, layer, pair, work * pixels, (read, side, side))

    def linears(self) -> Iterator[TimedKernel]:
        for read, written, stride in LINEARS:
            side = self._side(stride) if stride else 1
            layer = nn.Linear(read, written, bias=False).to(self.device)
            tokens = self.batch_size * side**2
            yield from self._product("linear", layer, (read, written), 2 * tokens, (side, side, read))

    def maps(self) -> Iterator[TimedKernel]:
        for channels, stride in MAPS:
            side = max(2, self._side(stride))  # batch norm does not train on one value for each channel
            shape = (channels, side, side)
            norm = nn.BatchNorm2d(channels).to(self.device)
            layer_norm = nn.LayerNorm(channels).to(self.device)
            yield from self._moving("batch_norm", norm, shape, parameters=tuple(norm.parameters()))
            yield from self._moving("norm", lambda x, norm=layer_norm: norm(x.permute(0, 2, 3, 1)), shape)
            for name, function in UNARY.items():
                yield from self._moving("unary", function, shape, operations=OPERATIONS.get(name, 1))
            yield from self._moving("binary", torch.mul, shape, operands=2)
            yield from self._moving("dropout", lambda x: F.dropout(x, 0.2), shape)
            yield from self._resized("pool", lambda x: F.max_pool2d(x, 2), shape)
            yield from self._resized("reduce", lambda x: F.adaptive_avg_pool2d(x, 1), shape)
            yield from self._resized("copy", lambda x: torch.cat((x, x), dim=1), shape)

    def optimizer(self) -> Iterator[TimedKernel]:
        """As the trainer's: fused SGD with momentum and weight decay."""
        weights = [nn.Parameter(torch.randn(512, 512, 3, 3, device=self.device)) for _ in range(OPTIMIZED)]
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        step = torch.optim.SGD(weights, lr=1e-3, momentum=0.9, weight_decay=1e-4, fused=True).step
        moved = 5 * 4 * sum(weight.numel() for weight in weights)
        yield TimedKernel("optimizer", 1, 1, 0.0, moved, self._fastest(step))

    def launch_s(self) -> float:
        """Of one of the seven kernels of convolution, batch norm and ReLU on next to nothing."""
        layers = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()).to(self.device)
        images = torch.randn(2, 8, 1, 1, device=self.device, requires_grad=True)
        steps = 20  # in a row, so that their code is in the caches

        def run() -> None:
            for _ in range(steps):
                layers(images).sum().backward()

        return self._fastest(run) / (7 * steps)

    def _side(self, stride: int) -> int:
        return max(1, self.image_side // stride)

    def _product(
        self, kind: str, layer: nn.Module, pair: tuple[int, int], flops: float, shape: tuple[int, ...]
    ) -> Iterator[TimedKernel]:
        """shape: of one image's input. flops: for each pair of a channel read and one written."""
        call = self._call(layer, shape)
        one, result = call.inputs[0], call.result
        moved = one.element_size() * (one.numel() + result.numel() + layer.weight.numel())
        seconds = {
            "forward": self._forward_s(call),
            "input": self._backward_s(call, call.inputs),
            "weight": self._backward_s(call, [layer.weight]),
        }
        for phase in seconds:
            yield TimedKernel(f"{kind}.{phase}", *pair, flops, moved, seconds[phase])

    def _moving(
        self,
        kind: str,
        function: Callable[..., Tensor],
        shape: tuple[int, ...],
        operations: int = 1,
        operands: int = 1,
        parameters: Sequence[Tensor] = (),
    ) -> Iterator[TimedKernel]:
        """A function that makes so many passes over what it is given (`PASSES`)."""
        call = self._call(function, shape, operands)
        one = call.inputs[0]
        flops, (forward, backward) = operations * one.numel() / shape[0], PASSES[kind]
        seconds = self._forward_s(call)
        yield TimedKernel(f"{kind}.forward", 1, shape[0], flops, forward * one.nbytes, seconds)
        seconds = self._backward_s(call, [*call.inputs, *parameters])
        yield TimedKernel(f"{kind}.backward", 1, shape[0], flops, operands * backward * one.nbytes, seconds)

    def _resized(
        self, kind: str, function: Callable[[Tensor], Tensor], shape: tuple[int, ...]
    ) -> Iterator[TimedKernel]:
        """A function that reads one tensor and writes another."""
        call = self._call(function, shape)
        moved = call.inputs[0].nbytes + call.result.nbytes
        yield TimedKernel(f"{kind}.forward", 1, 1, 0.0, moved, self._forward_s(call))
        yield TimedKernel(f"{kind}.backward", 1, 1, 0.0, moved, self._backward_s(call, call.inputs))

    def _call(self, function: Callable[..., Tensor], shape: tuple[int, ...], operands: int = 1) -> _Call:
        """shape: of one image's input."""
        generator = torch.Generator(self.device).manual_seed(0)
        inputs = [self._input(shape, generator) for _ in range(operands)]
        with self.precision.autocast():
            result = function(*inputs)
        return _Call(function, inputs, result, torch.ones_like(result))

    def _input(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        value = torch.randn((self.batch_size, *shape), generator=generator, device=self.device)
        value = value.contiguous(memory_format=MEMORY_FORMAT)
        with self.precision.autocast():
            if torch.is_autocast_enabled(self.device.type):  # what the layer before it gives
                value = value.to(torch.get_autocast_dtype(self.device.type))
        return value.requires_grad_()

    def _forward_s(self, call: _Call) -> float:
        def forward() -> None:
            with self.precision.autocast():
                call.function(*call.inputs)

        return self._fastest(forward, call.inputs)

    def _backward_s(self, call: _Call, learning: Sequence[Tensor]) -> float:
        """Of the gradients of these inputs and parameters; they are stored, as in training."""

        def backward() -> None:
            for one in learning:
                one.grad = None
            call.result.backward(call.gradient, inputs=list(learning), retain_graph=True)

        return self._fastest(backward, [call.gradient])

    def _fastest(self, work: Callable[[], object], warm: Sequence[Tensor] = ()) -> float:
        """Seconds of one call, the fastest of several; the first call is a warm-up. warm: tensors in the caches."""
        repeats = 10 if self.device.type == "cuda" else 1  # a GPU is timed with its queue full, as training keeps it
        work()
        elapsed: list[float] = []
        while len(elapsed) < MIN_CALLS or sum(elapsed) < MIN_SECONDS:
            self._flush(warm)
            start = self.clock()
            for _ in range(repeats):
                work()
            self._wait()
            elapsed.append(self.clock() - start)
        return min(elapsed) / repeats

    def _flush(self, warm: Sequence[Tensor]) -> None:
        if self.device.type == "cpu":
            self.buffer.add_(1)
            for one in warm:
                one.detach().sum()
        self._wait()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
