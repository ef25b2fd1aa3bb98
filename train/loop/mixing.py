"""Mixup and cutmix: training images and their labels mixed in pairs, on the device that trains."""

from collections.abc import Callable

import torch
from torchvision.transforms import v2

Mixing = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(images (B, C, H, W), labels int64 (B,)) -> images and labels for the loss; neither input is changed."""


def build_mixing(mixup: float, cutmix: float, num_classes: int) -> Mixing:
    """What a training step does to its batch; labels become float (B, num_classes) where anything is mixed.

    mixup, cutmix: alpha of the Beta distribution of the shares, 0 = not; with both, a fair coin decides each step. The
    random numbers are those of torch's generator on the CPU, which checkpoints hold: a resumed run draws the same.
    """
    mixers = []
    if mixup > 0:
        mixers.append(v2.MixUp(alpha=mixup, num_classes=num_classes))
    if cutmix > 0:
        mixers.append(v2.CutMix(alpha=cutmix, num_classes=num_classes))
    if not mixers:
        return lambda images, labels: (images, labels)
    return v2.RandomChoice(mixers)
