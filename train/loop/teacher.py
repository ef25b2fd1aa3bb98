"""Distillation: a trained network's predictions are learned beside the labels (Hinton et al., arXiv 1503.02531).

The teacher sees the very images that are trained on, augmented and mixed alike (Beyer et al., arXiv 2106.05237).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from data.batch import Preprocessing, preprocessing_of, train_size
from train.checkpoint.network import load_network
from train.config import RunConfig
from train.errors import ConfigError
from train.network.own import is_factory
from train.network.precision import Precision
from train.network.state import MEMORY_FORMAT


@dataclass(frozen=True, eq=False)
class Teacher:
    """model: in evaluation mode, on the device; it is not trained. share, temperature: of `TrainConfig`."""

    model: nn.Module
    precision: Precision
    share: float
    temperature: float

    def taught(self, loss: torch.Tensor, images: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The loss with its share of the teacher's: T^2 KL(teacher || network), both softened by the temperature T.

        loss: of the labels, a scalar. images: (B, C, H, W). logits: (B, classes), the network's on these images.
        """
        with torch.no_grad(), self.precision.autocast():
            wanted = self.model(images.contiguous(memory_format=MEMORY_FORMAT))
        soft = [F.log_softmax(some.float() / self.temperature, dim=1) for some in (logits, wanted)]
        divergence = F.kl_div(*soft, reduction="batchmean", log_target=True)
        return (1 - self.share) * loss + self.share * self.temperature**2 * divergence


def load_teacher(
    config: RunConfig, num_classes: int, classes: Sequence[str] | None, device: torch.device
) -> tuple[Teacher | None, list[str]]:
    """The teacher that the configuration names, if any, and notes for the user.

    num_classes, classes: of the data set. No random numbers are taken.
    Raises CheckpointError for a file that holds no network, ConfigError for a network of other classes or images.
    """
    train = config.train
    if train.teacher is None:
        return None, []
    with torch.random.fork_rng(devices=[]):  # a resumed run has its generators restored by now
        factory = config.model.name if is_factory(config.model.name) else None
        stored = load_network(Path(train.teacher), factory)
    if stored.architecture.num_classes != num_classes:
        raise ConfigError(
            f"train.teacher: {train.teacher} tells {stored.architecture.num_classes} classes apart, the data set has "
            f"{num_classes}; allowed: equal numbers"
        )
    if None not in (stored.classes, classes) and list(stored.classes) != list(classes):
        raise ConfigError(f"train.teacher: the classes of {train.teacher} are not those of the data set, in its order")
    model = stored.model.eval().requires_grad_(False)
    _require_same_images(model, stored.preprocessing, config)
    hours = "unknown" if stored.gpu_hours is None else f"{stored.gpu_hours:.4g}"
    note = f"{train.teacher} teaches; the hours count its passes, and not the {hours} that its own training took"
    precision = Precision(train.precision, device)
    model.to(device, memory_format=MEMORY_FORMAT)
    return Teacher(model, precision, train.teacher_share, train.teacher_temperature), [note]


def _require_same_images(model: nn.Module, own: Preprocessing | None, config: RunConfig) -> None:
    """ConfigError where the teacher cannot see the run's images, or was trained on others' colours."""
    given = preprocessing_of(config.data)
    if own is not None and (own.mean, own.std) != (given.mean, given.std):
        raise ConfigError(
            f"train.teacher: {config.train.teacher} was trained with mean {own.mean} and deviation {own.std}, this run "
            f"has {given.mean} and {given.std}: set data.mean and data.std"
        )
    for side in {train_size(config.data, 0), config.data.image_size}:
        try:
            with torch.no_grad():
                model(torch.zeros(1, config.data.channels, side, side))
        except Exception as error:  # of whatever its layers raise
            raise ConfigError(
                f"train.teacher: {config.train.teacher} does not take images of {config.data.channels} channels and "
                f"{side} pixels ({' '.join(str(error).split())[:200]})"
            ) from error
