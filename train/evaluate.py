"""Exact accuracy of a checkpoint's network."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

from cup import Complexity, complexity
from data import DataConfig
from data.batch import preprocessing_of
from train.build import build_split_loaders, passed_over_notes, unmatched_note
from train.checkpoint.network import StoredNetwork, load_network
from train.config import RunConfig, config_from_dict
from train.errors import ConfigError, TrainError
from train.loop.evaluation import Evaluation, evaluate
from train.network.precision import Precision
from train.network.state import MEMORY_FORMAT
from train.preprocessing import images_note, own_preprocessing, settled
from train.world import World


def evaluate_checkpoint(
    path: Path,
    world: World,
    data_path: str | None = None,
    batch_size: int | None = None,
    image_size: int | None = None,
    factory: str | None = None,
) -> tuple[Evaluation, Complexity]:
    """Exact accuracy of the stored network at its stored widths, and its cost. All ranks call it.

    data_path, batch_size, image_size: in place of the run's own; another size takes the same share of the image.
    factory: of a network of the user's own.
    Raises train/world.py's USER_ERRORS.
    """
    stored = world.on_every_rank(lambda: load_network(path, factory))
    architecture, model = stored.architecture, stored.model
    config, images_line = _evaluation_config(path, stored, {"path": data_path, "batch_size": batch_size}, image_size)
    [val_loader] = world.on_every_rank(lambda: build_split_loaders(config, world, ("val",), stored.classes))
    if val_loader.num_classes != architecture.num_classes:
        raise TrainError(
            f"{config.data.path} has {val_loader.num_classes} classes, the network {architecture.num_classes}"
        )
    notes = [images_line, *unmatched_note(config, val_loader), *passed_over_notes(config, {"validation": val_loader})]
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
    shape = (architecture.input_shape[0], config.data.image_size, config.data.image_size)
    return result, complexity(model, dataclasses.replace(architecture, input_shape=shape).example_input())


def _evaluation_config(
    path: Path, stored: StoredNetwork, data_changes: dict[str, Any], image_size: int | None
) -> tuple[RunConfig, str]:
    """What decides an evaluation, and a line about the images.

    The run's own settings, or the usual ones where no run trained the weights.
    """
    changes = {key: value for key, value in data_changes.items() if value is not None}
    if stored.config is None and "path" not in changes:
        raise ConfigError(
            f"{path} was made from published weights, and no run says on which images: give --data FOLDER"
        )
    channels, side, _ = stored.architecture.input_shape
    default = RunConfig(data=DataConfig(channels=channels))
    config = default if stored.config is None else config_from_dict(stored.config)
    own, whose = own_preprocessing(stored.architecture, stored.preprocessing, path)
    if own is None:
        # ImageNet's custom: the centre 224 of 256 pixels; small images have no margin to spare.
        data = DataConfig(channels=channels, image_size=side, resize_size=side + (side // 7 if side >= 224 else 0))
        own, whose = preprocessing_of(data), "the size of its images"
    if image_size is not None:
        own = preprocessing_of(config.data, own).at_size(image_size)
        changes |= vars(own)
        whose = "--image-size"
    data = dataclasses.replace(config.data, **changes)
    return dataclasses.replace(config, data=settled(data, own)), images_note(data, own, whose)
