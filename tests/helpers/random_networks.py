"""Random networks for the fuzzer: small programs of some seventy operations, as data, so that a failure can be shrunk.

A program is a list of steps; a step names an operation, the earlier values that it reads (0 is the image), and the seed
of its own choices. An operation that does not fit its operands gives the first of them on, so that any step can be
taken out and what is left is a network still.
"""

import operator
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from cup_twins import check_against_twin, randomise
from torch import nn

IMAGE = (3, 8, 8)


@dataclass(frozen=True)
class Step:
    """operation: a key of OPERATIONS. reads: values; later ones than there are count from the start again."""

    operation: str
    reads: tuple[int, ...]
    seed: int


Program = tuple[Step, ...]


def random_program(seed: int) -> Program:
    rng = random.Random(seed)
    # Layers more often than the rest, or few channels are anybody's to cut.
    names = [*OPERATIONS, *LAYERS * 4]
    steps = []
    for index in range(rng.randint(3, 14)):
        recent = [max(0, index - rng.choice((0, 0, 0, 1, 1, 2, 4))) for _ in range(3)]
        steps.append(Step(rng.choice(names), tuple(recent), rng.randrange(10**6)))
    return tuple(steps)


class RandomNetwork(nn.Module):
    """The network of a program, with a linear layer on the last value's mean over pixels."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.wires: list[tuple[int, ...]] = []
        self.steps = nn.ModuleList()
        values = [torch.zeros(2, *IMAGE)]
        for step in program:
            operands = tuple(index % len(values) for index in step.reads)
            module = self._module(step, [values[index] for index in operands])
            self.wires.append(operands)
            self.steps.append(module)
            with torch.no_grad():
                values.append(module(*(values[index] for index in operands)))
        self.fc = nn.Linear(values[-1].shape[1], 5)

    def _module(self, step: Step, values: list[torch.Tensor]) -> nn.Module:
        """What the step does, if that fits: its result is a batch of images again, and not too large."""
        rng = random.Random(step.seed)
        made = OPERATIONS[step.operation](rng, values, self.steps)
        if made is not None:
            try:
                with torch.no_grad():
                    result = made(*values)
                if result.dim() == 4 and 1 < result.shape[-1] <= 16 and 1 < result.shape[-2] <= 16:
                    return made if 0 < result.shape[1] <= 64 else Nothing()
            except (RuntimeError, ValueError, IndexError, AssertionError):
                pass  # operands that do not go together
        return Nothing()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = [x]
        for step, wires in zip(self.steps, self.wires, strict=True):
            values.append(step(*(values[index] for index in wires)))
        return self.fc(values[-1].mean((2, 3)))


def check_program(program: Program, seed: int = 0) -> list[Any]:
    """Build, cut at random, compare with the silenced twin; returns the groups. Raises whatever is wrong."""
    torch.manual_seed(seed)
    with torch.random.fork_rng():
        model = randomise(RandomNetwork(program))
        images = torch.randn(3, *IMAGE)
    return check_against_twin(model, images, seed=seed, relative=1e-8)


def failure_of(program: Program, seed: int = 0) -> str:
    """What is wrong with the program, as one line; "" where nothing is."""
    try:
        check_program(program, seed)
    except Exception as error:  # a crash is as much of a find as a difference
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""


def shrunk(program: Program, fails: Callable[[Program], bool]) -> Program:
    """The program without every step that the failure can do without."""
    smaller = True
    while smaller:
        smaller = False
        for index in reversed(range(len(program))):
            shorter = (*program[:index], Step("nothing", program[index].reads, 0), *program[index + 1 :])
            if program[index].operation != "nothing" and fails(shorter):
                program, smaller = shorter, True
    return program


# --- operations ---


class Nothing(nn.Module):
    def forward(self, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return x


class Act(nn.Module):
    """A function of the operands, and the layers that it uses."""

    def __init__(self, act: Callable[..., torch.Tensor], **parts: nn.Module | nn.Parameter | torch.Tensor) -> None:
        super().__init__()
        self.act = act
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        return self.act(self, *values)


class ChannelNorm(nn.LayerNorm):
    """A layer norm over the channels of images, as ConvNeXt has it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class Heads(nn.Module):
    """Attention among pixels whose numbers are the module's, as timm's or Hugging Face's."""

    def __init__(self, width: int, rng: random.Random, packed: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim = rng.choice((2, 3, 4)), rng.choice((2, 3))
        self.attn_dim, self.by_hand = self.num_heads * self.head_dim, rng.random() < 0.5
        names = ("qkv",) if packed else ("q", "k", "v")
        self.names = names
        for name in names:
            setattr(self, name, nn.Linear(width, self.attn_dim * 3 // len(names), bias=rng.random() < 0.5))
        self.out = nn.Linear(self.attn_dim, width)

    def forward(self, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        batch, _, height, _ = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        if len(self.names) == 1:
            qkv = self.qkv(tokens).reshape(batch, tokens.shape[1], 3, self.num_heads, self.head_dim)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        else:
            parts = (getattr(self, name)(tokens) for name in self.names)
            q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        if self.by_hand:
            y = ((q @ k.transpose(-2, -1)) * self.head_dim**-0.5).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        y = y.transpose(1, 2).reshape(batch, tokens.shape[1], self.attn_dim)
        return self.out(y).transpose(1, 2).unflatten(2, (height, -1))


class TorchHeads(nn.Module):
    """torch's own attention among pixels."""

    def __init__(self, width: int, rng: random.Random) -> None:
        super().__init__()
        heads = rng.choice([n for n in (1, 2, 3, 4) if width % n == 0])
        self.attention = nn.MultiheadAttention(width, heads, bias=rng.random() < 0.5, batch_first=rng.random() < 0.5)
        self.asks, self.reads = rng.random() < 0.5, rng.random() < 0.1

    def forward(self, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        order, back = ((0, 2, 1), (0, 2, 1)) if self.attention.batch_first else ((2, 0, 1), (1, 2, 0))
        tokens = x.flatten(2).permute(order)
        y, weights = self.attention(tokens, tokens, tokens, need_weights=self.asks or self.reads)
        y = y.permute(back).unflatten(2, (x.shape[2], -1))
        return y + weights.square().mean() if self.reads else y


class Widening(nn.Module):
    """A residual addition that widens the stream by zero channels on both sides, as CIFAR ResNets do."""

    def __init__(self, width: int, more: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width + 2 * more, 3, padding=1)
        self.shortcut = nn.ZeroPad3d((0, 0, 0, 0, more, more))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) + self.shortcut(x)


class PartlyAdded(nn.Module):
    """What it reads is added to the first channels of what it writes (ReXNet)."""

    def __init__(self, width: int, more: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width + more, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return torch.cat([y[:, : x.shape[1]] + x, y[:, x.shape[1] :]], 1)


class NormAct(nn.BatchNorm2d):
    """Counts its own batches and has an activation in it, as timm's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_batches_tracked.add_(1)
        mean, var = self.running_mean, self.running_var
        return F.relu(F.batch_norm(x, mean, var, self.weight, self.bias, self.training, 0.1, self.eps))


class ScaledConv(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.in_channels**-0.5


Make = Callable[[random.Random, Sequence[torch.Tensor], nn.ModuleList], nn.Module | None]


def _one(make: Callable[[random.Random, int], nn.Module]) -> Make:
    """An operation on one value, from a layer made for so many channels."""
    return lambda rng, values, _: First(make(rng, values[0].shape[1]))


class First(nn.Module):
    """Gives the first operand to a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def _act(act: Callable[..., torch.Tensor]) -> Make:
    """An operation without layers: a function of up to three values."""
    count = act.__code__.co_argcount
    return lambda rng, values, _: Act(lambda s, *operands: act(*operands[:count]))


def _width(rng: random.Random) -> int:
    return rng.choice((4, 6, 8, 12))


def _grouped(rng: random.Random, width: int) -> nn.Module:
    groups = rng.choice([n for n in (2, 3, 4, width) if width % n == 0])
    return nn.Conv2d(width, width * rng.choice((1, 2)), 3, padding=1, groups=groups)


def _group_norm(rng: random.Random, width: int) -> nn.Module:
    return nn.GroupNorm(rng.choice([n for n in (1, 2, 4) if width % n == 0]), width)


def _squeeze_excite(rng: random.Random, values: Sequence[torch.Tensor], _: nn.ModuleList) -> nn.Module:
    width = values[0].shape[1]

    def act(s: Act, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        batch, channels = x.shape[:2]
        gate = s.up(F.relu(s.down(x.mean((2, 3)).view(batch, channels))))
        return x * gate.sigmoid().view(batch, channels, 1, 1)

    return Act(act, down=nn.Linear(width, 3), up=nn.Linear(3, width))


def _expanded_gate(rng: random.Random, values: Sequence[torch.Tensor], _: nn.ModuleList) -> nn.Module:
    width = values[0].shape[1]

    def act(s: Act, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return x * s.gate(F.adaptive_avg_pool2d(x, 1)).sigmoid().expand_as(x)

    return Act(act, gate=nn.Conv2d(width, width, 1))


def _map_gate(rng: random.Random, values: Sequence[torch.Tensor], _: nn.ModuleList) -> nn.Module:
    return Act(lambda s, x, *others: x * s.map(x).sigmoid(), map=nn.Conv2d(values[0].shape[1], 1, 1))


def _scale(rng: random.Random, values: Sequence[torch.Tensor], _: nn.ModuleList) -> nn.Module:
    return Act(lambda s, x, *others: s.scale * x, scale=nn.Parameter(torch.rand(values[0].shape[1], 1, 1) + 0.5))


def _viewed_scale(rng: random.Random, values: Sequence[torch.Tensor], _: nn.ModuleList) -> nn.Module:
    scale = nn.Parameter(torch.rand(values[0].shape[1]) + 0.5)
    return Act(lambda s, x, *others: x * s.scale[None, :, None, None], scale=scale)


def _frozen_norm(rng: random.Random, values: Sequence[torch.Tensor], _: nn.ModuleList) -> nn.Module:
    table = torch.rand(values[0].shape[1]) + 0.5
    return Act(lambda s, x, *others: x * s.table.view(1, -1, 1, 1) + s.table.view(1, -1, 1, 1), table=table)


def _with_buffer(rng: random.Random, values: Sequence[torch.Tensor], _: nn.ModuleList) -> nn.Module:
    rows = torch.linspace(0, 1, values[0].shape[2]).view(1, 1, -1, 1)

    def act(s: Act, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, s.rows.expand(x.shape[0], -1, -1, x.shape[3])], 1)

    return Act(act, rows=rows)


def _tokens(rng: random.Random, values: Sequence[torch.Tensor], _: nn.ModuleList) -> nn.Module:
    width = values[0].shape[1]

    def act(s: Act, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        height = x.shape[2]
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + s.narrow(F.gelu(s.wide(s.norm(tokens))))
        return tokens.transpose(1, 2).unflatten(2, (height, -1))

    return Act(act, norm=nn.LayerNorm(width), wide=nn.Linear(width, 10), narrow=nn.Linear(10, width))


def _again(rng: random.Random, values: Sequence[torch.Tensor], earlier: nn.ModuleList) -> nn.Module | None:
    """One of the layers before, once more."""
    return earlier[rng.randrange(len(earlier))] if len(earlier) else None


def _tied(rng: random.Random, values: Sequence[torch.Tensor], earlier: nn.ModuleList) -> nn.Module | None:
    """A convolution with the weight of one before."""
    convs = [m for m in earlier.modules() if type(m) is nn.Conv2d and m.weight.shape[1] == values[0].shape[1]]
    convs = [m for m in convs if m.groups == 1 and m.kernel_size == (3, 3)]
    if not convs:
        return None
    source = rng.choice(convs)
    layer = nn.Conv2d(source.in_channels, source.out_channels, 3, padding=1)
    layer.weight = source.weight
    return First(layer)


def _slice(rng: random.Random, values: Sequence[torch.Tensor], _: nn.ModuleList) -> nn.Module:
    width = values[0].shape[1]
    start = rng.randrange(width)
    stop = rng.randrange(start, width) + 1
    return Act(lambda s, x, *others: x[:, start:stop])


def _shuffle(x: torch.Tensor) -> torch.Tensor:
    batch, channels, height, width = x.shape
    return x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)


def _free_shuffle(x: torch.Tensor) -> torch.Tensor:
    batch, channels = x.shape[:2]
    return x.view(batch, 2, channels // 2, *x.shape[2:]).transpose(1, 2).reshape(batch, -1, *x.shape[2:])


def _fixed_view(rng: random.Random, values: Sequence[torch.Tensor], _: nn.ModuleList) -> nn.Module:
    _, channels, height, width = values[0].shape
    return Act(lambda s, x, *others: x.flatten(1).view(-1, channels, height, width))


LAYERS = ["conv", "conv", "strided conv", "batch norm", "add", "cat", "widening"]

OPERATIONS: dict[str, Make] = {
    "nothing": lambda rng, values, _: Nothing(),
    # layers
    "conv": _one(lambda rng, width: nn.Conv2d(width, _width(rng), 3, padding=1)),
    "widening": _one(lambda rng, width: Widening(width, rng.randint(1, 3))),
    "zero channels of a module": _one(lambda rng, width: nn.ZeroPad3d((0, 0, 0, 0, 1, 1))),
    "partly added": _one(lambda rng, width: PartlyAdded(width, rng.randint(1, 4))),
    "strided conv": _one(lambda rng, width: nn.Conv2d(width, _width(rng), 2, stride=2)),
    "pointwise conv": _one(lambda rng, width: nn.Conv2d(width, _width(rng), 1, bias=False)),
    "grouped conv": _one(_grouped),
    "transposed conv": _one(lambda rng, width: nn.ConvTranspose2d(width, _width(rng), 2, stride=2)),
    "scaled conv": _one(lambda rng, width: ScaledConv(width, _width(rng), 3, padding=1)),
    "batch norm": _one(lambda rng, width: nn.BatchNorm2d(width)),
    "batch norm with activation": _one(lambda rng, width: NormAct(width)),
    "group norm": _one(_group_norm),
    "instance norm": _one(lambda rng, width: nn.InstanceNorm2d(width, affine=True, track_running_stats=True)),
    "channel norm": _one(lambda rng, width: ChannelNorm(width)),
    "prelu": _one(lambda rng, width: nn.PReLU(width)),
    "tokens": _tokens,
    "packed heads": _one(lambda rng, width: Heads(width, rng, packed=True)),
    "separate heads": _one(lambda rng, width: Heads(width, rng, packed=False)),
    "torch's heads": _one(lambda rng, width: TorchHeads(width, rng)),
    "squeeze-excite": _squeeze_excite,
    "expanded gate": _expanded_gate,
    "map gate": _map_gate,
    "scale": _scale,
    "scale with new axes": _viewed_scale,
    "table": _frozen_norm,
    "rows joined": _with_buffer,
    "again": _again,
    "tied": _tied,
    # functions of one value
    "relu": _act(lambda x: F.relu(x)),
    "gelu": _act(lambda x: F.gelu(x) * 2 + 1),
    "tanh squared": _act(lambda x: x.tanh() ** 2),
    "sine": _act(lambda x: torch.sin(x)),
    "clamp": _act(lambda x: x.clamp(-1, 1)),
    "max pool": _act(lambda x: F.max_pool2d(x, 3, 1, 1)),
    "average pool": _act(lambda x: F.avg_pool2d(x, 2)),
    "twice the size": _act(lambda x: F.interpolate(x, scale_factor=2.0)),
    "padded": _act(lambda x: F.pad(x, (1, 1))),
    "zero channels": _act(lambda x: F.pad(x, (0, 0, 0, 0, 1, 2))),
    "turned": _act(lambda x: x.transpose(2, 3)),
    "every second pixel": _act(lambda x: x[:, :, ::2, ::2]),
    "cropped": _act(lambda x: x[..., 1:, : x.shape[-1] - 1]),
    "centred": _act(lambda x: x - x.mean((2, 3), keepdim=True)),
    "softmax over pixels": _act(lambda x: x.softmax(3)),
    "softmax over channels": _act(lambda x: x.softmax(1)),
    "mean over channels": _act(lambda x: x * x.mean(1, keepdim=True)),
    "rolled": _act(lambda x: x.roll(1, 1)),
    "slice": _slice,
    "first half": _act(lambda x: x.chunk(2, 1)[0]),
    "halves joined": _act(lambda x: torch.cat(x.chunk(2, 1)[::-1], 1)),
    "gated halves": _act(lambda x: F.glu(x, 1)),
    "half by its own width": _act(lambda x: x[:, x.shape[1] // 2 :]),
    "split by its own width": _act(lambda x: x.split(x.shape[1] // 2, 1)[0]),
    "product of halves": _act(lambda x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1].sigmoid()),
    "all but the first": _act(lambda x: x[:, 1:]),
    "all as a slice": _act(lambda x: x[:, :64]),
    "shuffle": _act(_shuffle),
    "shuffle by its own width": _act(_free_shuffle),
    "shuffle of three": _act(lambda x: F.channel_shuffle(x, 3)),
    "rows of two channels": _act(lambda x: x.view(x.shape[0], -1, 2, *x.shape[2:]).transpose(1, 2).flatten(1, 2)),
    "flipped": _act(lambda x: x.flip(1)),
    "pixels out of channels": _act(lambda x: F.pixel_shuffle(x, 2)),
    "channels out of pixels": _act(lambda x: F.pixel_unshuffle(x, 2)),
    "there and back": _act(lambda x: x.flatten(2).view(x.shape)),
    "fixed view": _fixed_view,
    "by its width": _act(lambda x: x / x.shape[1] ** 0.5),
    "a branch on its width": _act(lambda x: x.flip(1) if x.shape[1] > 6 else x),
    "a branch on its size": _act(lambda x: x if x.shape[-1] % 2 else x * 2),
    # functions of two and three
    "add": _act(lambda x, y: x + y),
    "add by an operator in place": _act(lambda x, y: operator.iadd(x.clone(), y)),
    "subtract in place": _act(lambda x, y: x.clone().sub_(y)),
    "multiply": _act(lambda x, y: x * y.sigmoid()),
    "gate": _act(lambda x, y: x * y.mean((2, 3), keepdim=True).sigmoid()),
    "maximum": _act(lambda x, y: torch.maximum(x, y)),
    "where": _act(lambda x, y, z: torch.where(x > 0, y, z)),
    "cat": _act(lambda x, y: torch.cat([x, y], 1)),
    "cat of three": _act(lambda x, y, z: torch.cat((x, y, z), dim=1)),
    "rows of two": _act(lambda x, y: torch.cat([x, y], 2)),
    "stacked": _act(lambda x, y: torch.stack([x, y], 1).sum(1)),
    "mixed": _act(lambda x, y: torch.addcmul(x, y.tanh(), y.sigmoid(), value=0.5)),
}
