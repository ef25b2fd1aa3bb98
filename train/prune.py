"""One-shot CUP: cut a trained network once. Where it comes from, and what the cut makes of it.

What is written is read by training again (`model.checkpoint`), by evaluation, by export, and by the next cut.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import yaml

import cup
from cup import ChannelGroup, Complexity, PrunePlan
from train.checkpoint.network import StoredNetwork
from train.checkpoint.weights import load_weights
from train.errors import ConfigError
from train.files import read_bounded
from train.network.models import Architecture, build_model, check_model_name, native_input_shape
from train.network.sources import network_of
from train.weights import read_given

MAX_COUNTS_BYTES = 1 << 24


@dataclass(frozen=True, eq=False)
class Cut:
    """What one cut made of a network. before, after: its cost. widths: of all groups that may shrink, after it."""

    network: StoredNetwork
    before: Complexity
    after: Complexity
    widths: dict[str, int]

    @property
    def reduction_before(self) -> float:
        """FR against the full network, in the paper's counting."""
        return self.network.dense.flops / self.before.flops

    @property
    def reduction_after(self) -> float:
        return self.network.dense.flops / self.after.flops


def network_from_weights(
    name: str, source: str, num_classes: int | None, image_size: int | None
) -> tuple[StoredNetwork, str]:
    """A full network by name with published weights, and what of a file was not taken, in words for the user.

    source: a file, or as in `model.weights`. num_classes, image_size: read from the weights, and what they want, where
    not given. Raises ConfigError for an unknown name or source, CheckpointError for weights that are another network's,
    TrainError for weights that cannot be had, CupError for a size that the network does not take.
    """
    check_model_name(name)
    given = read_given(source, network_of(source, name))
    own = given.published and given.published.preprocessing
    channels, side, _ = native_input_shape(name)
    side = image_size or (own.image_size if own else side)
    classes = num_classes or given.num_classes
    if classes is None:
        raise ConfigError(
            f"{source}: found no classifier of {name}, so the number of classes cannot be told; allowed: weights of "
            "the whole network"
        )
    architecture = Architecture(name=name, num_classes=classes, input_shape=(channels, side, side))
    model = build_model(name, classes, side)
    load_weights(model, given.weights)
    dense = cup.complexity(model, architecture.example_input())
    preprocessing = own and own.at_size(side)
    network = StoredNetwork(
        architecture, dense, model, plans=(), groups=(), config=None, gpu_hours=None, preprocessing=preprocessing
    )
    return network, given.note


def read_counts(path: Path) -> dict[str, int]:
    """Group name -> channels from a JSON or YAML file. Raises ConfigError for anything else."""
    try:
        counts = yaml.safe_load(read_bounded(path, MAX_COUNTS_BYTES).decode())
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the counts in {path}: {error}") from error
    if not isinstance(counts, dict) or not counts:
        raise ConfigError(f"{path}: found no counts, allowed: group names with their channels, as JSON or YAML")
    for group, count in counts.items():
        if not isinstance(group, str) or type(count) is not int:
            raise ConfigError(f"{path}: found {group!r}: {count!r}, allowed: a group's name and a whole number")
    return counts


def cut_network(network: StoredNetwork, plan: PrunePlan, groups: list[ChannelGroup]) -> Cut:
    """Apply `plan` to the network's model, in place. groups: the model's, as the plan was made for."""
    example_input = network.architecture.example_input()
    before = cup.complexity(network.model, example_input)
    resized = cup.apply_plan(network.model, plan, groups)
    return Cut(
        network=replace(network, plans=(*network.plans, plan), groups=resized.groups),
        before=before,
        after=cup.complexity(network.model, example_input),
        widths={group.name: group.width for group in resized.groups if not group.frozen},
    )
