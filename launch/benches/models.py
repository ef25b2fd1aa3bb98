"""Many networks through all of cup: trace, plan to an FR, resize with momentum, masked twin, one training step."""

import argparse
import copy
import functools
import gc
import json
import subprocess
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import cup
from cup.tracing.meta import arguments, map_tensors, meta_copy, tensors_in
from cup.tracing.walk import IS_OUTPUT
from launch.benches.foreign import networks, rival
from launch.benches.foreign.twins import silence
from launch.benches.measure import machine, write_result
from train.errors import TrainError

TWIN_TOLERANCE = 1e-6
"""Largest difference to the masked twin's outputs and changes, relative to the largest of them; in float64."""

SMALL_SIDE = 96
"""Of the images that the passes are run on, in pixels, where the network takes such ones."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models",
        nargs="+",
        default=["torchvision"],
        metavar="NAME",
        help="as in model.name or SOURCE:NAME; all of a source: " + ", ".join(networks.SOURCES),
    )
    parser.add_argument("--reduction", type=float, default=2.0, metavar="FR", help="prune to this FR (default: 2)")
    parser.add_argument(
        "--resume", type=Path, metavar="FILE", help="an earlier --out: its networks are not run again, their rows stay"
    )
    parser.add_argument(
        "--rival", choices=("torch-pruning",), help="another library beside us; of --resume's networks alone it"
    )
    parser.add_argument("--scope", choices=("inner", "all"), default="inner", help="groups to prune (default: inner)")


def measure(options: argparse.Namespace) -> None:
    """Run every network, print a row each and the table at the end, write the result."""
    names = list(dict.fromkeys(name for given in options.models for name in networks.names_of(given)))
    for name in names:
        networks.check_name(name)
    what = {"benchmark": "models", "reduction": options.reduction, "scope": options.scope}
    libraries = ("torchvision", "timm", "transformers", "segmentation_models_pytorch", "scipy", "numpy")
    if options.rival:
        rival.check_installed()
        libraries = (*libraries, "torch-pruning")
    what["machine"] = machine(*libraries)
    rows = {row.name: row for row in (_rows_of(options.resume, what) if options.resume else [])}
    for name in names:
        if name in rows and not (options.rival and not rows[name].rival):
            continue
        row = rows[name] = rows.get(name) or run_model(name, options.reduction, options.scope)
        if options.rival:
            row.rival = run_rival(name, options.reduction)
        print(f"{name}: {row.verdict}", flush=True)
        if options.out:  # after each, for they take an hour together
            write_result(options.out, {**what, "rows": [asdict(row) for row in rows.values()]})
    _print_table(list(rows.values()), options.reduction)


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
    twin_difference, eval_difference: of the outputs to the masked twin's in training and in evaluation, relative to the
        largest. step_difference: of the parameters' changes in one step with carried momentum, likewise.
    round_trip: whether a copy that is shrunk to these widths and loads the weights gives the same, to the bit.
    seconds: of the processor, for trace, plan, and resize (apply and carry of momentum).
    failure: what went wrong, or "".
    rival: what another library did with it: "outcome" (passes, fails, differs), "reached" (FR), "seconds" and, where it
        does not pass, "why"; empty where it was not asked for.
    code: the commit that made the row, as `git describe` names it; "" where it is not known.
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
    eval_difference: float = 0.0
    step_difference: float = 0.0
    round_trip: bool = True
    seconds: dict[str, float] = field(default_factory=dict)
    failure: str = ""
    rival: dict[str, Any] = field(default_factory=dict)
    code: str = ""

    @property
    def verdict(self) -> str:
        ours = f"FR {self.reached:.2f} of at most {self.limit:.4g}, {sum(self.seconds.values()):.1f} s"
        ours = f"failed: {self.failure}" if self.failure else ours
        return f"{ours}; the other library {_rivals_cell(self.rival)}" if self.rival else ours


def _rivals_cell(rival: Mapping[str, Any]) -> str:
    if rival["outcome"] == "passes":
        return f"{rival['reached']:.2f} in {rival['seconds']:.1f} s"
    return f"{rival['outcome']}: {rival['why']}"


def run_model(name: str, reduction: float, scope: str) -> Row:
    """One network from its name to a training step after the resize. What fails is noted in the row."""
    row = Row(name, code=_commit())
    try:
        _run(row, reduction, scope)
    except Exception as error:  # whatever it is, the other networks' turn comes
        row.failure = row.failure or f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    gc.collect()  # networks are full of cycles, and the next one may need all the memory
    return row


@functools.cache
def _commit() -> str:
    try:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        return ""


def run_rival(name: str, reduction: float) -> dict[str, Any]:
    """Torch-Pruning on one network, judged as we are: `Row.rival`."""
    found: dict[str, Any] = {"outcome": "fails", "reached": 1.0, "seconds": 0.0, "why": ""}
    try:
        _run_rival(found, name, reduction)
    except Exception as error:
        found["why"] = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    gc.collect()
    return found


def _run_rival(found: dict[str, Any], name: str, reduction: float) -> None:
    model, example, inputs = _built(name)
    rival.tell_apart(model)
    full, dense = copy.deepcopy(model), cup.complexity(model, example).flops
    writers = [group.name for group in cup.channel_groups(model, example) if group.frozen == IS_OUTPUT]

    def reached(network: nn.Module) -> float:
        found["reached"] = dense / cup.complexity(network, example).flops
        return found["reached"]

    found["seconds"] = rival.prune(model, inputs, reduction, writers, reached)
    twin = rival.masked_twin(full, model)
    differences = [_difference(model.train(mode), twin.train(mode), inputs) for mode in (True, False)]
    if not max(differences) <= TWIN_TOLERANCE:
        found["outcome"], found["why"] = "differs", f"by {max(differences):.1e} from its masked twin"
    elif found["reached"] < reduction * (1 - cup.REDUCTION_TOLERANCE):
        found["why"] = f"stops at FR {found['reached']:.2f}"
    else:
        found["outcome"] = "passes"


def _built(name: str) -> tuple[nn.Module, Any, Any]:
    """The network, an example that tells its shapes, and inputs to run; in float64, so that only mistakes count."""
    torch.manual_seed(0)
    model, example = networks.build(name)
    return _without_chance(model).double(), example, map_tensors(_small(model, example), _as_double)


def _run(row: Row, reduction: float, scope: str) -> None:
    model, example, inputs = _built(row.name)
    row.side = next(tensors_in(example)).shape[-1]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    _train_step(model, optimizer, inputs)  # fills the momentum and
    clock = _Clock()
    groups = cup.channel_groups(model, example)
    clock.stop("trace")
    row.groups, row.prunable = len(groups), len(cup.prunable_groups(groups, scope))
    row.frozen = dict(Counter(group.frozen for group in groups if group.frozen))
    before = cup.complexity(model, example)
    row.seconds, row.params = clock.seconds, (before.params, before.params)
    if row.prunable == 0:
        return
    row.limit = before.flops / cup.flops_after(model, groups, _deepest(groups, scope), before)
    clock.start()
    plan = cup.plan_by_reduction(model, groups, reduction, cup.PlanOptions(scope=scope))
    clock.stop("plan")
    full, twin, twins_optimizer = copy.deepcopy(model), *copy.deepcopy((model, optimizer))
    silence(twin, groups, plan.kept)
    clock.start()
    resized = cup.apply_plan(model, plan, groups)
    cup.carry_optimizer(optimizer, resized)
    clock.stop("resize")
    after = cup.complexity(model, example)
    row.reached, row.params = before.flops / after.flops, (before.params, after.params)
    row.twin_difference = _difference(model.train(), twin.train(), inputs)
    row.eval_difference = _difference(model.eval(), twin.eval(), inputs)
    row.round_trip = _comes_back(model, full, cup.plan_first_channels(groups, plan.new_widths), groups, inputs)
    row.step_difference = _difference_of_steps((model, optimizer), (twin, twins_optimizer), resized, inputs)
    row.failure = _mistake(row)


def _mistake(row: Row) -> str:
    for what in ("twin", "eval", "step"):
        if not getattr(row, f"{what}_difference") <= TWIN_TOLERANCE:
            where = {"twin": "in training", "eval": "in evaluation", "step": "in a step"}[what]
            return f"differs from its masked twin {where} by {getattr(row, f'{what}_difference'):.1e}"
    return "" if row.round_trip else "is another one after its weights were stored and loaded"


def _as_double(value: torch.Tensor) -> torch.Tensor:
    return value.double() if value.is_floating_point() else value


def _small(model: nn.Module, example: Any) -> Any:
    """Smaller images where the network takes them, for the passes that are run for real."""
    if not isinstance(example, torch.Tensor) or example.dim() != 4 or example.shape[-1] <= SMALL_SIDE:
        return example
    for side in (SMALL_SIDE, example.shape[-1] // 2):
        smaller = example[..., :side, :side]
        try:
            with torch.no_grad(), torch.device("meta"):
                meta_copy(model).train()(smaller.to("meta"))
        except Exception:  # whatever a network says about images that are not for it
            continue
        return smaller
    return example


def _without_chance(model: nn.Module) -> nn.Module:
    """Dropout and stochastic depth off, and norms whose entries differ, so that a wrong index shows."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and (name == "p" or "drop" in name):
                setattr(module, name, 0.0)
        if isinstance(module, _NORMS) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.8, 1.2)
            if module.bias is not None:
                nn.init.uniform_(module.bias, -0.1, 0.1)
    return model


_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


def _deepest(groups: Sequence[cup.ChannelGroup], scope: str) -> cup.PrunePlan:
    prunable = cup.prunable_groups(groups, scope)
    return cup.PrunePlan({group.name: (0,) for group in prunable}, {group.name: group.width for group in prunable})


def _run_on(network: nn.Module, inputs: Any) -> list[torch.Tensor]:
    """All floating tensors that the network gives, those of auxiliary heads among them."""
    positional, named = arguments(inputs)
    return [value for value in tensors_in(network(*positional, **named)) if value.is_floating_point()]


@torch.no_grad()
def _difference(model: nn.Module, twin: nn.Module, inputs: Any) -> float:
    """The largest of the outputs, relative to the twin's largest entry."""
    pairs = zip(_run_on(model, inputs), _run_on(twin, inputs), strict=True)
    return max(float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12)) for found, wanted in pairs)


@torch.no_grad()
def _comes_back(
    model: nn.Module, full: nn.Module, plan: cup.PrunePlan, groups: Sequence[cup.ChannelGroup], inputs: Any
) -> bool:
    """Whether the full network, cut to the same widths, is the resized one once it has its weights."""
    cup.apply_plan(full, plan, groups)
    full.load_state_dict(model.state_dict())
    return all(map(torch.equal, _run_on(full.eval(), inputs), _run_on(model.eval(), inputs)))


def _difference_of_steps(
    resized_pair: "tuple[nn.Module, torch.optim.Optimizer]",
    twin_pair: "tuple[nn.Module, torch.optim.Optimizer]",
    resized: cup.Resized,
    inputs: Any,
) -> float:
    """How far a step with carried momentum changes parameters otherwise than one of the twin, relative to the largest
    change.
    """
    (model, optimizer), (twin, twins_optimizer) = resized_pair, twin_pair
    axes = {change.name: change.axes for change in resized.changes}
    twins = dict(twin.named_parameters(remove_duplicate=False))
    before = {name: (p.detach().clone(), twins[name].detach().clone()) for name, p in model.named_parameters()}
    _train_step(model, optimizer, inputs)
    _train_step(twin, twins_optimizer, inputs)
    largest, off = 1e-12, 0.0
    for name, parameter in model.named_parameters():
        moved, wanted = parameter.detach() - before[name][0], twins[name].detach() - before[name][1]
        for dim, index in axes.get(name, {}).items():
            wanted = wanted.index_select(dim, index)
        off, largest = max(off, float((moved - wanted).abs().max())), max(largest, float(wanted.abs().max()))
    return off / largest


def _train_step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Any) -> None:
    """One step on all that the network gives; TrainError if it leaves a parameter that is not finite."""
    dice = torch.Generator().manual_seed(0)
    outputs = _run_on(model.train(), inputs)
    sum((output * torch.randn(output.shape, generator=dice)).mean() for output in outputs).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise TrainError("a training step left parameters that are not finite")


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
    numbers = "| input | groups | may shrink | limit | FR | parameters (M) | twin | step | CPU s |"
    others = any(row.rival for row in rows)
    print(f"| model {numbers} frozen, and why |{' Torch-Pruning |' * others}")
    print(f"|---{'|---:' * 9}|---|{'---|' * others}")
    for row in rows:
        cells = [row.name, row.side, row.groups, row.prunable, f"{row.limit:.4g}", f"{row.reached:.2f}"]
        cells += [f"{row.params[0] / 1e6:.1f} to {row.params[1] / 1e6:.1f}"]
        differences = (max(row.twin_difference, row.eval_difference), row.step_difference)
        cells += [*(f"{difference:.0e}" for difference in differences), f"{sum(row.seconds.values()):.1f}"]
        cells += [row.failure or _why_frozen(row.frozen)] + [_rivals_cell(row.rival) if row.rival else ""] * others
        print(f"| {' | '.join(map(str, cells))} |")
    print(f"{len(whole)} of {len(rows)} pass, {reached} reach FR {reduction:g}")
