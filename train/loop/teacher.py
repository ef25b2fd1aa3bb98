"""Distillation: a trained network's predictions are learned beside the labels (Hinton et al., arXiv 1503.02531).

The teacher sees the very images that are trained on, augmented and mixed alike (Beyer et al., arXiv 2106.05237).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from train.checkpoint.network import load_network
from train.errors import ConfigError
from train.loop.config import TrainConfig
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
    config: TrainConfig, num_classes: int, classes: Sequence[str] | None, device: torch.device
) -> tuple[Teacher | None, list[str]]:
    """The teacher that the configuration names, if any, and notes for the user.

    num_classes, classes: of the data set. No random numbers are taken.
    Raises CheckpointError for a file that holds no network, ConfigError for a network of other classes.
    """
    if config.teacher is None:
        return None, []
    with torch.random.fork_rng(devices=[]):  # a resumed run has its generators restored by now
        stored = load_network(Path(config.teacher))
    if stored.architecture.num_classes != num_classes:
        raise ConfigError(
            f"train.teacher: {config.teacher} tells {stored.architecture.num_classes} classes apart, the data set has "
            f"{num_classes}; allowed: equal numbers"
        )
    if None not in (stored.classes, classes) and list(stored.classes) != list(classes):
        raise ConfigError(f"train.teacher: the classes of {config.teacher} are not those of the data set, in its order")
    model = stored.model.eval().requires_grad_(False).to(device, memory_format=MEMORY_FORMAT)
    hours = "unknown" if stored.gpu_hours is None else f"{stored.gpu_hours:.4g}"
    note = f"{config.teacher} teaches; the hours count its passes, and not the {hours} that its own training took"
    return Teacher(model, Precision(config.precision, device), config.teacher_share, config.teacher_temperature), [note]
