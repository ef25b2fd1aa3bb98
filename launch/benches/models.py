"""Many networks through all of cup: trace, plan to an FR, resize with momentum, masked twin, one training step."""

import argparse
import copy
import gc
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import cup
from cup.tracing.layers import find_layer, weight_dim
from cup.tracing.meta import meta_copy, meta_input
from launch.benches.measure import machine, write_result
from train.errors import TrainError
from train.network.models import build_model, check_model_name, native_input_shape

TWIN_TOLERANCE = 1e-4
"""Largest difference of the outputs to the masked twin's, relative to the largest output."""

TIMM = tuple(
    f"timm:{name}"
    for name in (
        *("resnet26d", "resnetv2_50", "seresnet50", "skresnet18", "res2net50_26w_4s", "dla34", "dpn68", "vovnet39a"),
        *("hrnet_w18_small", "cspresnet50", "densenet121", "regnety_008", "efficientnet_b0", "mobilenetv3_large_100"),
        *("mobilenetv4_conv_small", "repvgg_a2", "xception41", "inception_v4", "convnext_atto", "selecsls42b"),
    )
)
"""Twenty convolutional networks of different families."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models",
        nargs="+",
        default=["torchvision"],
        metavar="NAME",
        help="as in model.name; torchvision = all its classification models, timm = twenty of timm's families",
    )
    parser.add_argument("--reduction", type=float, default=2.0, metavar="FR", help="prune to this FR (default: 2)")
    parser.add_argument(
        "--resume", type=Path, metavar="FILE", help="an earlier --out: its networks are not run again, their rows stay"
    )
    parser.add_argument("--scope", choices=("inner", "all"), default="inner", help="groups to prune (default: inner)")


def measure(options: argparse.Namespace) -> None:
    """Run every network, print a row each and the table at the end, write the result."""
    sets = {"torchvision": torchvision.models.list_models(module=torchvision.models), "timm": list(TIMM)}
    names = [name for given in options.models for name in sets.get(given, [given])]
    for name in names:
        check_model_name(name)
    what = {"benchmark": "models", "reduction": options.reduction, "scope": options.scope}
    what["machine"] = machine("torchvision", "timm", "scipy", "numpy")
    rows = _rows_of(options.resume, what) if options.resume else []
    for name in names:
        if any(row.name == name for row in rows):
            continue
        rows.append(run_model(name, options.reduction, options.scope))
        print(f"{name}: {rows[-1].verdict}", flush=True)
        if options.out:  # after each, for they take an hour together
            write_result(options.out, {**what, "rows": [asdict(row) for row in rows]})
    _print_table(rows, options.reduction)


def _rows_of(path: Path, what: Mapping[str, Any]) -> "list[Row]":
    """The rows of an earlier result that was asked for the same. Raises TrainError where the file holds no such one."""
    try:
        stored = json.loads(path.read_text())
        rows = [Row(**row) for row in stored["rows"]]
        asked = {key: stored[key] for key in ("reduction", "scope")}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise TrainError(f"--resume {path}: found {error}, allowed: a result of this benchmark") from error
    wanted = {key: what[key] for key in asked}
    if asked != wanted:
        raise TrainError(f"--resume {path}: found {asked}, asked for {wanted}: give the same, or start anew")
    return rows


@dataclass
class Row:
    """What became of one network.

    groups, prunable: channel groups in all, and those in scope. frozen: reason -> groups. side: of the input, pixels.
    limit, reached: FR with one channel left of every prunable group, and FR of the plan. params: before and after.
    twin_difference: of the outputs to the masked twin's, relative to the largest.
    seconds: of the processor, for trace, plan, and resize (apply and carry of momentum).
    failure: what went wrong, or "".
    """

    name: str
    side: int = 0
    groups: int = 0
    prunable: int = 0
    frozen: dict[str, int] = field(default_factory=dict)
    limit: float = 1.0
    reached: float = 1.0
    params: tuple[int, int] = (0, 0)
    twin_difference: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    failure: str = ""

    @property
    def verdict(self) -> str:
        if self.failure:
            return f"failed: {self.failure}"
        return f"FR {self.reached:.2f} of at most {self.limit:.4g}, {sum(self.seconds.values()):.1f} s"


def run_model(name: str, reduction: float, scope: str) -> Row:
    """One network from its name to a training step after the resize. What fails is noted in the row."""
    row = Row(name)
    try:
        _run(row, reduction, scope)
    except Exception as error:  # whatever it is, the other networks' turn comes
        row.failure = row.failure or f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    gc.collect()  # networks are full of cycles, and the next one may need all the memory
    return row


def _run(row: Row, reduction: float, scope: str) -> None:
    torch.manual_seed(0)
    model, shape = _build(row.name)
    row.side, example, images = shape[-1], torch.empty(1, *shape), _small_images(model, shape)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    _train_step(model, optimizer, images)  # fills the momentum and
    clock = _Clock()
    groups = cup.channel_groups(model, example)
    clock.stop("trace")
    row.groups, row.prunable = len(groups), len(cup.prunable_groups(groups, scope))
    row.frozen = dict(Counter(group.frozen for group in groups if group.frozen))
    cup.describe(model, example)
    before = cup.complexity(model, example)
    row.seconds, row.params = clock.seconds, (before.params, before.params)
    if row.prunable == 0:
        return
    row.limit = before.flops / cup.flops_after(model, groups, _deepest(groups, scope), before)
    clock.start()
    plan = cup.plan_by_reduction(model, groups, reduction, cup.PlanOptions(scope=scope))
    clock.stop("plan")
    twin = _masked_twin(model, groups, plan)
    clock.start()
    resized = cup.apply_plan(model, plan, groups)
    cup.carry_optimizer(optimizer, resized)
    clock.stop("resize")
    after = cup.complexity(model, example)
    row.reached, row.params = before.flops / after.flops, (before.params, after.params)
    row.twin_difference = _difference(model, twin, images)
    del twin
    if not row.twin_difference <= TWIN_TOLERANCE:
        row.failure = f"differs from its masked twin by {row.twin_difference:.1e}"
    _train_step(model, optimizer, images)


def _build(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """A network with all its heads and random weights, and the images that it was made for."""
    if name in torchvision.models.list_models(module=torchvision.models):
        options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        model = torchvision.models.get_model(name, **options)
    else:
        model = build_model(name, num_classes=1000 if name.startswith("timm:") else 10)
    return _without_chance(model), native_input_shape(name)


def _small_images(model: nn.Module, shape: tuple[int, int, int]) -> torch.Tensor:
    """Two images of half the side where the network takes them, for the passes that are run for real."""
    half = (shape[0], shape[1] // 2, shape[2] // 2)
    try:
        with torch.no_grad(), torch.device("meta"):
            meta_copy(model).train()(meta_input(half, batch=2))
    except (AssertionError, RuntimeError):
        half = shape
    return torch.randn(2, *half)


def _without_chance(model: nn.Module) -> nn.Module:
    """Dropout and stochastic depth off, and norms whose entries differ, so that a wrong index shows."""
    for module in model.modules():
        if hasattr(module, "p") and isinstance(module.p, float):
            module.p = 0.0
        if isinstance(module, _NORMS) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.uniform_(module.bias, -0.1, 0.1)
    return model


_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


def _deepest(groups: Sequence[cup.ChannelGroup], scope: str) -> cup.PrunePlan:
    prunable = cup.prunable_groups(groups, scope)
    return cup.PrunePlan({group.name: (0,) for group in prunable}, {group.name: group.width for group in prunable})


def _masked_twin(model: nn.Module, groups: Sequence[cup.ChannelGroup], plan: cup.PrunePlan) -> nn.Module:
    """The network at full width in which no layer hears the channels that go."""
    twin = copy.deepcopy(model)
    for group in groups:
        gone = set(range(group.width)) - set(plan.kept.get(group.name, range(group.width)))
        for place in group.consumers:
            layer = find_layer(twin, place.module)
            silent = [index for index, channel in enumerate(place.channel_of_index.tolist()) if channel in gone]
            layer.weight.data.index_fill_(weight_dim(layer, "in"), torch.tensor(silent, dtype=torch.int64), 0.0)
    return twin


@torch.no_grad()
def _difference(model: nn.Module, twin: nn.Module, images: torch.Tensor) -> float:
    """In training mode, where batch norm keeps the signal alive after a deep cut, and in float64, so that only mistakes
    count; the model comes back as float32.
    """
    found, wanted = (_heads(network.double().train()(images.double()))[0] for network in (model, twin))
    model.float()
    return float((found - wanted).abs().max() / wanted.abs().max())


def _train_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor) -> None:
    """One step on all heads; TrainError if it leaves a parameter that is not finite."""
    labels = torch.zeros(len(images), dtype=torch.int64)
    sum(F.cross_entropy(head, labels) for head in _heads(model.train()(images))).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise TrainError("a training step left parameters that are not finite")


def _heads(outputs: Any) -> list[torch.Tensor]:
    """The logits, and those of auxiliary heads behind them."""
    return [outputs] if isinstance(outputs, torch.Tensor) else [head for head in outputs if head is not None]


class _Clock:
    """Seconds of the processor, which a busy machine does not stretch as it does those of the wall."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.start()

    def start(self) -> None:
        self._started = time.process_time()

    def stop(self, name: str) -> None:
        self.seconds[name] = time.process_time() - self._started


def _why_frozen(frozen: dict[str, int]) -> str:
    """The three most frequent reasons with the groups that they freeze, and how many there are for other reasons."""
    reasons = sorted(frozen, key=frozen.get, reverse=True)
    others = sum(frozen[reason] for reason in reasons[3:])
    return "; ".join([f"{frozen[reason]}: {reason}" for reason in reasons[:3]] + [f"{others} more"] * (others > 0))


def _print_table(rows: Sequence[Row], reduction: float) -> None:
    whole = [row for row in rows if not row.failure]
    reached = sum(row.reached >= reduction * (1 - cup.REDUCTION_TOLERANCE) for row in whole)
    print("| model | input | groups | may shrink | limit | FR | parameters (M) | CPU s | frozen, and why |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---|")
    for row in rows:
        cells = [row.name, row.side, row.groups, row.prunable, f"{row.limit:.4g}", f"{row.reached:.2f}"]
        cells += [f"{row.params[0] / 1e6:.1f} to {row.params[1] / 1e6:.1f}", f"{sum(row.seconds.values()):.1f}"]
        print(f"| {' | '.join(map(str, [*cells, row.failure or _why_frozen(row.frozen)]))} |")
    print(f"{len(whole)} of {len(rows)} pass, {reached} reach FR {reduction:g}")
