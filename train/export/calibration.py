"""The images from which int8 quantisation learns the ranges of activations."""

import dataclasses
import itertools

import torch

from data.batch import preprocessing_of
from train.evaluate import DataChanges, evaluation_config
from train.loaders import build_split_loaders
from train.source import Source
from train.world import open_world

BATCH_SIZE = 32
UNAUGMENTED = {
    "crop_scale": (1.0, 1.0),
    "crop_ratio": (1.0, 1.0),
    "flip": 0.0,
    "color_jitter": (0.0, 0.0, 0.0, 0.0),
    "auto_augment": "none",
    "start_size": 0,
}
"""Settings with which training images are the largest square of their centre, and nothing else is done to them."""


def calibration_batches(source: Source, changes: DataChanges, images: int) -> list[torch.Tensor]:
    """About so many training images, drawn at random by the run's seed, as batches that the network takes.

    Validation images are left alone, so that an accuracy on them stays one on images that the network never saw.
    changes: as of an evaluation. Raises DataError, TrainError or CupError where the images cannot be had.
    """
    config, _ = evaluation_config(source, changes)
    seen = vars(preprocessing_of(config.data).validation)
    data = dataclasses.replace(config.data, **seen, **UNAUGMENTED, batch_size=min(BATCH_SIZE, images))
    config = dataclasses.replace(config, data=data)
    [loader] = build_split_loaders(config, open_world("cpu"), ("train",), source.classes)
    try:
        steps = -(-images // data.batch_size)
        return [batch.images.contiguous().clone() for batch in itertools.islice(loader, steps)]
    finally:
        loader.close()
