"""Torch-Pruning over one network: does it run, does it get as far, and is what is left right?

It gets what its manual asks a user for: the layers that write the outputs are left out, and of attention modules that
project with layers named in `_PROJECTIONS` it is told the number of heads and set right afterwards. All else is as it
comes: local magnitude pruning in small steps, until the FLOPs are down.
"""

import copy
import importlib.util
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cup.tracing.heads import head_count
from cup.tracing.meta import tensors_in
from launch.benches.foreign.twins import hear_only
from train.errors import TrainError

STEPS, DEEPEST = 40, 0.96
"""From all channels to four of a hundred, so that the FLOPs reduction that is asked for is met within some percent."""

LONGEST_S = 120

_PROJECTIONS = ("qkv", "query", "key", "value", "q_proj", "k_proj", "v_proj", "q", "k", "v", "q_lin", "k_lin", "v_lin")
_HEAD_WIDTHS = ("head_dim", "attention_head_size", "head_size", "key_dim", "size_per_head")
_ALL_WIDTHS = ("attn_dim", "all_head_size", "inner_dim")


def check_installed() -> None:
    """Raises TrainError where it is not."""
    if not importlib.util.find_spec("torch_pruning"):
        raise TrainError("--rival torch-pruning: it is not installed: pip install torch-pruning")


def prune(
    model: nn.Module, inputs: Any, reduction: float, writers: Sequence[str], reached: Callable[[nn.Module], float]
) -> float:
    """Prune the model, in place, until `reached` says that its FLOPs are down by `reduction`, or nothing more goes.

    writers: the layers that write the network's outputs. reached: the FLOPs reduction of the model as it is now.
    Returns seconds of the processor, for the graph and all steps. Raises what Torch-Pruning raises, and TimeoutError
    after LONGEST_S of the processor.
    """
    import torch_pruning

    outputs = [model.get_submodule(name) for name in writers]
    heads = dict(_projections(model))
    seconds = 0.0
    with _at_most(LONGEST_S):
        started = time.process_time()
        pruner = torch_pruning.pruner.BasePruner(
            model,
            inputs,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=DEEPEST,
            iterative_steps=STEPS,
            ignored_layers=outputs,
            num_heads=heads,
            in_channel_groups={},  # its own defaults are shared between all pruners
            out_channel_groups={},
            output_transform=lambda value: [one for one in tensors_in(value) if one.requires_grad],
        )
        for step in range(1, STEPS + 1):
            pruner.step()
            _set_right(model, pruner.num_heads)
            seconds += time.process_time() - started
            # Counting takes longer than a step, and layers shrink by no more than the square of their widths.
            if (1 - DEEPEST * step / STEPS) ** -2 >= reduction and reached(model) >= reduction:
                break
            started = time.process_time()
    return seconds


def _projections(model: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    for module in model.modules():
        heads = head_count(module)
        for name in _PROJECTIONS if heads is not None else ():
            if isinstance(layer := getattr(module, name, None), nn.Linear):
                yield layer, heads


def _set_right(model: nn.Module, heads: dict[nn.Module, int]) -> None:
    """The numbers by which attention modules split their channels, as in Torch-Pruning's examples."""
    for module in model.modules():
        layers = [(name, getattr(module, name, None)) for name in _PROJECTIONS]
        layers = [(name, layer) for name, layer in layers if isinstance(layer, nn.Linear) and layer in heads]
        if not layers:
            continue
        name, layer = layers[0]
        width = layer.out_features // (3 if name == "qkv" else 1)
        for number, value in {
            **dict.fromkeys(_HEAD_WIDTHS, width // heads[layer]),
            **dict.fromkeys(_ALL_WIDTHS, width),
        }.items():
            if isinstance(vars(module).get(number), int):
                setattr(module, number, value)


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"it takes longer than {seconds} s of the processor")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def tell_apart(model: nn.Module) -> None:
    """No two entries of a parameter alike, in place, so that those that are left can be found again."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=1e-6)


def masked_twin(full: nn.Module, pruned: nn.Module) -> nn.Module:
    """A copy of the full network in which every entry of a parameter that the pruned one has lost is zero.

    Layer norms and group norms do not hear what they have lost, either. All entries of a parameter are different ones
    (`tell_apart`).
    """
    left = dict(pruned.named_parameters(remove_duplicate=False))
    twin = copy.deepcopy(full)
    for name, parameter in twin.named_parameters():
        lost = ~torch.isin(parameter.data, left[name].data)
        layer = twin.get_submodule(name.rpartition(".")[0])
        if name.endswith("weight") and isinstance(layer, nn.LayerNorm | nn.GroupNorm) and lost.any():
            hear_only(layer, ~lost)
        parameter.data[lost] = 0
    return twin
