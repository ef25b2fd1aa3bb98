"""Which images a network gets, and who says so.

Precedence, first wins: the configuration, the checkpoint, what is published about the weights, ImageNet's usual ones. A
network that trains from scratch has no weights, so only its configuration speaks.
"""

import dataclasses

from data import DataConfig, Preprocessing
from data.batch import preprocessing_of, require_sizes, with_preprocessing
from train.errors import ConfigError
from train.network.models import Architecture
from train.network.published import published


def settled(data: DataConfig, own: Preprocessing | None) -> DataConfig:
    """The options with nothing left open. own: of the weights. Raises ConfigError where sizes do not go together."""
    try:
        require_sizes(data, own)
    except ValueError as error:
        raise ConfigError(f"data.{error}") from error
    return with_preprocessing(data, own)


def own_preprocessing(
    architecture: Architecture, stored: Preprocessing | None, path: object
) -> tuple[Preprocessing | None, str]:
    """What a checkpoint at `path` or else publications say of its weights, and who that is; None where nobody does."""
    if stored is not None:
        return stored, str(path)
    known = published(architecture.name)
    if known is None:
        return None, "nobody"
    return known.preprocessing.at_size(architecture.input_shape[-1]), known.label


def images_note(data: DataConfig, own: Preprocessing | None, whose: str) -> str:
    """The one line that says what becomes of an image, and why.

    data: as configured. own: of the weights, as `whose` says.
    """
    used = preprocessing_of(data, own)
    if own is None:
        return f"images: {used} (ImageNet's usual ones, but for the settings of data)"
    names = [field.name for field in dataclasses.fields(Preprocessing)]
    changed = [f"data.{name}" for name in names if getattr(used, name) != getattr(own, name)]
    return f"images: {used} (as {whose} says{', but for ' if changed else ''}{', '.join(changed)})"


def usual_preprocessing(input_shape: tuple[int, int, int]) -> Preprocessing:
    """Where nobody says: ImageNet's custom, the centre 224 of 256 pixels; small images have no margin to spare."""
    channels, side, _ = input_shape
    data = DataConfig(channels=channels, image_size=side, resize_size=side + (side // 7 if side >= 224 else 0))
    return preprocessing_of(data)
