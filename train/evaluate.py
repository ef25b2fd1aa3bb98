"""Exact accuracy of a network: a checkpoint's, a folder's or an ONNX file's."""

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data import DataConfig
from data.batch import preprocessing_of
from train.build import passed_over_notes, unmatched_note
from train.config import RunConfig, config_from_dict
from train.errors import ConfigError, TrainError
from train.loaders import build_split_loaders, list_once
from train.loop.evaluation import Evaluation, evaluate
from train.network.precision import Precision
from train.network.state import MEMORY_FORMAT
from train.preprocessing import images_note, settled, usual_preprocessing
from train.source import Source, open_source
from train.world import World


@dataclass(frozen=True, kw_only=True)
class DataChanges:
    """What of the images is to be other than the network's file says; None = as it says."""

    path: str | None = None
    loader: str | None = None
    batch_size: int | None = None
    image_size: int | None = None
    """Side, pixels; the same share of an image as before."""


@dataclass(frozen=True)
class Outcome:
    """What came of an evaluation. classes: names by label; None for made images. cost: flops and params, if known."""

    evaluation: Evaluation
    classes: Sequence[str] | None
    cost: dict[str, int]


def evaluate_stored(
    path: Path, world: World, changes: DataChanges = DataChanges(), factory: str | None = None
) -> Outcome:
    """Exact accuracy of the network at `path`. All ranks call it. Raises train/world.py's USER_ERRORS.

    factory: of a network of the user's own.
    """
    source = world.on_every_rank(lambda: open_source(path, changes.image_size, factory))
    config, images_line = evaluation_config(source, changes)
    asked = ("val",), source.classes
    listed = list_once(config.data, world, *asked)
    [val_loader] = world.on_every_rank(lambda: build_split_loaders(config, world, *asked, listed))
    if source.num_classes not in (None, val_loader.num_classes):
        raise TrainError(f"{config.data.path} has {val_loader.num_classes} classes, the network {source.num_classes}")
    notes = [images_line, *unmatched_note(config, val_loader), *passed_over_notes(config, {"validation": val_loader})]
    if val_loader.num_excluded:
        notes.append(f"{config.data.path}: {val_loader.num_excluded} validation images are excluded and not counted")
    if source.classes is None and val_loader.classes is not None:
        notes.append(
            f"{path} does not hold the names of its classes: taken to be those of {config.data.path}, in its order"
        )
    for note in notes if world.is_main else ():
        warnings.warn(note, stacklevel=2)
    source.model.to(world.device, memory_format=MEMORY_FORMAT)
    try:
        result = evaluate(source.model, val_loader, Precision(config.train.precision, world.device), world)
    finally:
        val_loader.close()
    return Outcome(result, val_loader.classes, source.cost(preprocessing_of(config.data).validation.image_size))


def evaluation_config(source: Source, changes: DataChanges) -> tuple[RunConfig, str]:
    """What decides an evaluation, and a line about the images.

    The run's own settings, or what the file says where it does not hold them.
    """
    channels = source.input_shape[0]
    if source.config is not None:
        config = config_from_dict(source.config)
    elif changes.path is not None:
        config = RunConfig(data=DataConfig(channels=channels))
    else:
        raise ConfigError(f"{source.path} does not say on which images it is to be evaluated: give --data FOLDER")
    own, whose = source.preprocessing
    if own is None:
        own, whose = usual_preprocessing(source.input_shape), "the size of its images"
    given = {key: value for key, value in dataclasses.asdict(changes).items() if value is not None}
    if changes.image_size is not None:
        own, whose = preprocessing_of(config.data, own).at_size(changes.image_size), "--image-size"
        given |= {**vars(own), "start_size": 0}
    try:
        data = dataclasses.replace(config.data, **given)
    except ValueError as error:
        raise ConfigError(f"data.{error}") from error
    try:
        return dataclasses.replace(config, data=settled(data, own)), images_note(data, own, whose)
    except ValueError as error:
        raise ConfigError(str(error)) from error
