"""Exact accuracy of a checkpoint's network."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

from cup import Complexity, complexity
from data import DataConfig
from train.build import build_split_loaders, passed_over_notes, unmatched_note
from train.checkpoint.network import StoredNetwork, load_network
from train.config import RunConfig, config_from_dict
from train.errors import ConfigError, TrainError
from train.loop.evaluation import Evaluation, evaluate
from train.network.precision import Precision
from train.network.state import MEMORY_FORMAT
from train.world import World


def evaluate_checkpoint(
    path: Path, world: World, data_path: str | None = None, batch_size: int | None = None
) -> tuple[Evaluation, Complexity]:
    """Exact accuracy of the stored network at its stored widths, and its cost. All ranks call it.

    data_path, batch_size: in place of the run's own. Raises train/world.py's USER_ERRORS.
    """
    stored = world.on_every_rank(lambda: load_network(path))
    architecture, model = stored.architecture, stored.model
    config = _evaluation_config(path, stored, {"path": data_path, "batch_size": batch_size})
    [val_loader] = world.on_every_rank(lambda: build_split_loaders(config, world, ("val",), stored.classes))
    if val_loader.num_classes != architecture.num_classes:
        raise TrainError(
            f"{config.data.path} has {val_loader.num_classes} classes, the network {architecture.num_classes}"
        )
    notes = [*unmatched_note(config, val_loader), *passed_over_notes(config, {"validation": val_loader})]
    if val_loader.num_excluded:
        notes.append(f"{config.data.path}: {val_loader.num_excluded} validation images are excluded and not counted")
    if stored.classes is None and val_loader.classes is not None:
        notes.append(
            f"{path} does not hold the names of its classes: taken to be those of {config.data.path}, in its order"
        )
    for note in notes if world.is_main else ():
        warnings.warn(note, stacklevel=2)
    model.to(world.device, memory_format=MEMORY_FORMAT)
    try:
        result = evaluate(model, val_loader, Precision(config.train.precision, world.device), world)
    finally:
        val_loader.close()
    return result, complexity(model, architecture.example_input())


def _evaluation_config(path: Path, stored: StoredNetwork, data_changes: dict[str, Any]) -> RunConfig:
    """What decides an evaluation: the run's own settings, or the usual ones where no run trained the weights."""
    changes = {key: value for key, value in data_changes.items() if value is not None}
    if stored.config is not None:
        config = config_from_dict(stored.config)
    elif "path" in changes:
        channels, side, _ = stored.architecture.input_shape
        # ImageNet's custom: the centre 224 of 256 pixels; small images have no margin to spare.
        margin = side // 7 if side >= 224 else 0
        config = RunConfig(data=DataConfig(channels=channels, image_size=side, resize_size=side + margin))
    else:
        raise ConfigError(
            f"{path} was made from published weights, and no run says on which images: give --data FOLDER"
        )
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))
