"""A network to evaluate, from wherever it lies: a checkpoint, a folder that `cup.load` reads, or an ONNX file."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import cup
from data import Preprocessing
from data.batch import NORMALISATION
from train.checkpoint.network import StoredNetwork, load_network
from train.errors import ConfigError, TrainError
from train.export.about import from_metadata, preprocessing_of_saved
from train.export.onnx_network import OnnxNetwork
from train.network.models import build_model
from train.preprocessing import own_preprocessing


@dataclass(frozen=True, eq=False)
class Source:
    """A network, and what its file says of it.

    model: images to logits, on the CPU. input_shape: one image, (channels, height, width).
    classes: their names, in the order of the logits; None where unknown.
    config: of the run that trained it, as plain data; None where no run did, or where the file does not say.
    preprocessing: the images that it wants, and who says so.
    known_cost: flops, macs and params of one image where the file says them; empty for a network that can be counted.
    """

    path: Path
    model: nn.Module
    input_shape: tuple[int, int, int]
    num_classes: int | None
    classes: Sequence[str] | None
    preprocessing: tuple[Preprocessing | None, str]
    config: dict[str, Any] | None = None
    known_cost: dict[str, int] | None = None

    def cost(self, image_size: int) -> dict[str, int]:
        """flops and params for images of that side; empty for an ONNX file that does not say it of this size."""
        channels, side, _ = self.input_shape
        if isinstance(self.model, OnnxNetwork):
            return self.known_cost if side == image_size else {}
        counted = cup.complexity(self.model, torch.zeros(1, channels, image_size, image_size))
        return {"flops": counted.flops, "params": counted.params}


def open_source(path: Path, image_size: int | None = None, factory: str | None = None) -> Source:
    """Read the network at `path`. image_size: of ONNX files that take any. factory: of a network of the user's own.

    Raises CheckpointError, CupError or TrainError for what cannot be read or is none.
    """
    if path.suffix == ".onnx":
        return _of_onnx(path, image_size)
    if path.is_dir() and not (path / "log.jsonl").exists():  # a run's folder: load_network says what to give
        return _of_folder(path, factory)
    return source_of(path, load_network(path, factory))


def source_of(path: Path, stored: StoredNetwork) -> Source:
    """The network of the checkpoint at `path`."""
    shape, num_classes = stored.architecture.input_shape, stored.architecture.num_classes
    own = own_preprocessing(stored.architecture, stored.preprocessing, path)
    return Source(path, stored.model, shape, num_classes, stored.classes, own, config=stored.config)


def _of_folder(path: Path, factory: str | None) -> Source:
    saved = cup.read_saved(path)
    own = _preprocessing(saved, path), str(path)
    build = None if factory is None else partial(build_model, factory)
    return Source(path, cup.load(path, build), saved.input_size, saved.num_classes, saved.classes, own)


def _of_onnx(path: Path, image_size: int | None) -> Source:
    if not path.is_file():
        raise TrainError(f"no file at {path}")
    model = OnnxNetwork(path)
    try:
        saved, cost = from_metadata(model.metadata)
    except TrainError as error:
        raise TrainError(f"{path}: {error}") from error
    channels, height, width = model.input_shape
    if channels not in NORMALISATION or height != width:
        raise TrainError(
            f"{path}: found images of {model.input_shape}, allowed: 1 or 3 channels, height equal to width"
        )
    side = height or image_size or (saved and saved.input_size[-1])
    if side is None:
        raise ConfigError(f"{path} takes images of any size, and does not say of which it should: give --image-size")
    classes = saved and saved.classes
    own = (_preprocessing(saved, path).at_size(side), str(path)) if saved else (None, "nobody")
    return Source(path, model, (channels, side, side), model.num_classes, classes, own, known_cost=cost)


def _preprocessing(saved: cup.SavedNetwork, path: Path) -> Preprocessing:
    try:
        return preprocessing_of_saved(saved)
    except TrainError as error:
        raise TrainError(f"{path}: {error}") from error
