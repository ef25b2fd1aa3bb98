"""Exact accuracy of a network: a checkpoint's, a folder's or an ONNX file's."""

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data import DataConfig
from data.batch import NORMALISATION
from train.build import build_split_loaders, passed_over_notes, unmatched_note
from train.config import RunConfig, config_from_dict
from train.errors import ConfigError, TrainError
from train.export.about import usual_resize_size
from train.loop.evaluation import Evaluation, evaluate
from train.network.precision import Precision
from train.network.state import MEMORY_FORMAT
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


def evaluate_stored(path: Path, world: World, changes: DataChanges = DataChanges()) -> Outcome:
    """Exact accuracy of the network at `path`. All ranks call it. Raises train/world.py's USER_ERRORS."""
    source = world.on_every_rank(lambda: open_source(path, changes.image_size))
    config = evaluation_config(source, changes)
    [val_loader] = world.on_every_rank(lambda: build_split_loaders(config, world, ("val",), source.classes))
    if source.num_classes not in (None, val_loader.num_classes):
        raise TrainError(f"{config.data.path} has {val_loader.num_classes} classes, the network {source.num_classes}")
    notes = [*unmatched_note(config, val_loader), *passed_over_notes(config, {"validation": val_loader})]
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
    return Outcome(result, val_loader.classes, source.cost(config.data.image_size))


def evaluation_config(source: Source, changes: DataChanges) -> RunConfig:
    """What decides an evaluation: the run's own settings, or what the file says where it does not hold them."""
    if source.config is not None:
        config = config_from_dict(source.config)
    elif changes.path is not None:
        config = RunConfig(data=_images_of(source))
    else:
        raise ConfigError(f"{source.path} does not say on which images it is to be evaluated: give --data FOLDER")
    given = {key: value for key, value in dataclasses.asdict(changes).items() if value is not None}
    if changes.image_size is not None:
        resize_size = round(config.data.resize_size * changes.image_size / config.data.image_size)
        given |= {"resize_size": resize_size, "start_size": 0}
    try:
        return dataclasses.replace(config, data=dataclasses.replace(config.data, **given))
    except ValueError as error:
        raise ConfigError(f"data.{error}") from error


def _images_of(source: Source) -> DataConfig:
    """The settings that make the images which the network wants."""
    channels, side, _ = source.input_shape
    saved = source.saved
    if saved is None:
        return DataConfig(channels=channels, image_size=side, resize_size=usual_resize_size(side))
    wanted = (saved.mean, saved.std, saved.crop_mode, saved.interpolation)
    if wanted != (*NORMALISATION[channels], "center", "bilinear"):
        raise TrainError(f"{source.path} wants images that no loader here makes: {', '.join(map(str, wanted))}")
    resize_size = round(saved.resize_size * side / saved.input_size[-1])
    return DataConfig(channels=channels, image_size=side, resize_size=resize_size)
