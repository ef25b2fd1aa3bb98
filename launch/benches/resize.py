"""One resize, from the plan to DDP again, beside the reference's way of planning and torch-pruning.

Run by torchrun it measures all ranks at once, as a training run has them; alone it leaves out what needs several.
"""

import argparse
import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from torch import nn

import cup
from cup.criteria import Weights
from cup.criteria.features import GroupFeatures
from launch.benches.measure import machine, rounds_in_turn, summary, timed, with_spread, write_result
from train.cli import positive_int
from train.methods import HardRamp, HardRampConfig, PruneConfig
from train.network.models import build_model, native_input_shape
from train.network.optim import OptimConfig, build_optimizer
from train.network.precision import Precision
from train.network.state import MEMORY_FORMAT, TrainState, state_digest
from train.resizer import Resizer
from train.world import World, open_world

EVERYTHING = "resize, everything"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="resnet50", metavar="NAME", help="as in model.name (default: resnet50)")
    parser.add_argument("--reduction", type=float, default=2.2, metavar="FR", help="depth of the cut (default: 2.2)")
    parser.add_argument(
        "--rounds", type=positive_int, default=10, metavar="N", help="after one of warm-up (default: 10)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto = GPU if any")


def measure(options: argparse.Namespace) -> None:
    """Measure, print the table, write the result. All ranks call it."""
    world = open_world(options.device)
    bench = _Bench(options.model, options.reduction, world)
    contenders = {
        EVERYTHING: bench.everything,
        "- plan by threshold": bench.plan_by_threshold,
        "- apply": bench.apply,
        "- carry momentum": bench.carry,
        "- digest": bench.digest,
        "plan to a target FR": bench.plan_by_reduction,
        "trace (once a run)": bench.trace,
        "SciPy's linkage on rows, cut (the reference's way)": bench.plan_like_reference,
        "torch-pruning: dependency graph": bench.oracle_build,
        "torch-pruning: dependency graph and prune": bench.oracle_build_and_prune,
    }
    if not bench.has_oracle:
        contenders = {name: work for name, work in contenders.items() if not name.startswith("torch-pruning")}
    # What one rank does alone in a run it does alone here; the others wait for it before the next resize.
    alone = {name: work if world.is_main else lambda: 0.0 for name, work in contenders.items()}
    results = rounds_in_turn({**alone, EVERYTHING: bench.everything}, options.rounds)
    if world.is_main:
        ranks = f"{world.size} rank(s), {options.rounds} rounds"
        print(f"{options.model}, one cut to FR {options.reduction:g}, {ranks}: seconds, median (spread)")
        for name, values in results.items():
            print(f"  {name:<52} {with_spread(values)}")
        if options.out:
            what = {"benchmark": "resize", "model": options.model, "reduction": options.reduction, "ranks": world.size}
            seconds = {name: summary(values) for name, values in results.items()}
            machine_now = machine("torchvision", "torch-pruning", "scipy", "numpy")
            write_result(options.out, {**what, "machine": machine_now, "seconds": seconds})
    world.close()


class _Bench:
    """A network with momentum in its optimizer, copied afresh for every measurement; each method returns seconds."""

    def __init__(self, name: str, reduction: float, world: World) -> None:
        torch.manual_seed(0)
        self.world = world
        self.images = torch.zeros(1, *native_input_shape(name))
        self.model = build_model(name, 1000).to(world.device, memory_format=MEMORY_FORMAT)
        self.groups = cup.channel_groups(self.model, self.images)
        self.reduction = reduction
        self.plan = cup.plan_by_reduction(self.model, self.groups, reduction)
        ramp = HardRampConfig(slope=0.0, offset=self.plan.threshold)
        self.method = HardRamp(ramp, PruneConfig(hard_ramp=ramp), epochs=1)
        try:
            import torch_pruning
        except ImportError:
            torch_pruning = None
        self.oracle = torch_pruning

    @property
    def has_oracle(self) -> bool:
        return self.oracle is not None

    def everything(self) -> float:
        state = self._state()
        state.parallel = self.world.wrap(state.model)
        resizer = Resizer(state.model, self.images)
        self.world.all_gather(None)  # all ranks are here
        return self._timed(lambda: resizer.act(lambda view: self.method.epoch_start(1, view), state, self.world))

    def plan_by_threshold(self) -> float:
        return self._timed(lambda: cup.plan_by_threshold(self.model, self.groups, self.plan.threshold))

    def plan_by_reduction(self) -> float:
        return self._timed(lambda: cup.plan_by_reduction(self.model, self.groups, self.reduction))

    def trace(self) -> float:
        return self._timed(lambda: cup.channel_groups(self.model, self.images))

    def apply(self) -> float:
        model = copy.deepcopy(self.model)
        return self._timed(lambda: cup.apply_plan(model, self.plan, self.groups))

    def carry(self) -> float:
        state = self._state()
        resized = cup.apply_plan(state.model, self.plan, self.groups)
        return self._timed(lambda: cup.carry_optimizer(state.optimizer, resized))

    def digest(self) -> float:
        state = self._state()
        cup.carry_optimizer(state.optimizer, cup.apply_plan(state.model, self.plan, self.groups))
        return self._timed(lambda: state_digest(state))

    def plan_like_reference(self) -> float:
        """SciPy on the feature rows, as the authors' notebooks call it, one group after another."""
        return self._timed(self._plan_like_reference)

    def oracle_build(self) -> float:
        model = copy.deepcopy(self.model).cpu()
        return self._timed(lambda: self._oracle_graph(model))

    def oracle_build_and_prune(self) -> float:
        model = copy.deepcopy(self.model).cpu()
        return self._timed(lambda: self._prune_by_oracle(model))

    def _plan_like_reference(self) -> None:
        weights = Weights(self.model)
        for group in cup.prunable_groups(self.groups):
            rows = GroupFeatures(weights, group).rows()
            clusters = fcluster(linkage(rows, "ward"), self.plan.threshold, "distance")
            norms = np.linalg.norm(rows, axis=1)
            [max(np.flatnonzero(clusters == number), key=lambda i: norms[i]) for number in np.unique(clusters)]

    def _oracle_graph(self, model: nn.Module) -> Any:
        return self.oracle.DependencyGraph().build_dependency(model, example_inputs=self.images)

    def _prune_by_oracle(self, model: nn.Module) -> None:
        graph = self._oracle_graph(model)
        for name, kept in self.plan.kept.items():
            gone = sorted(set(range(self.plan.widths[name])) - set(kept))
            layer = model.get_submodule(name)
            prune = (
                self.oracle.prune_linear_out_channels
                if isinstance(layer, nn.Linear)
                else self.oracle.prune_conv_out_channels
            )
            graph.get_pruning_group(layer, prune, idxs=gone).prune()

    def _state(self) -> TrainState:
        model = copy.deepcopy(self.model)
        optimizer = build_optimizer(model, OptimConfig())
        return TrainState(model, model, optimizer, Precision("fp32", self.world.device))

    def _timed(self, work: Callable[[], Any]) -> float:
        return timed(work, self.world)
