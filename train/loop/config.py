"""The settings of the training loop."""

import math
from dataclasses import dataclass
from typing import Literal

from train.network.precision import PrecisionName


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop."""

    epochs: int = 90
    """Passes over the training set."""
    precision: PrecisionName = "fp32"
    """fp32, bf16 (autocast), or fp16 (autocast with a gradient scaler)."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes, 0 to below 1."""
    mixup: float = 0.0
    """Alpha of mixup: images and labels are mixed with shares drawn from Beta(alpha, alpha); 0 = none."""
    cutmix: float = 0.0
    """Alpha of cutmix, which puts a rectangle of one image into another; 0 = none. With both, either at random."""
    accumulate: int = 1
    """Pieces that a rank's batch is cut into, as even as can be, one forward and backward pass each, to one optimizer
    step: the same step in less memory, but for batch norm, which sees a piece at a time."""
    clip_norm: float = 0.0
    """Gradients are scaled down to this L2 norm over the whole network where theirs is larger; 0 = never."""
    freeze: str = ""
    """Modules that keep their weights and running statistics, with all that is in them: names as in the network, with
    commas between them (layer1,layer2). Cuts may still make them narrower."""
    compile: Literal["none", "blocks"] = "none"
    """blocks = torch.compile on the network's repeated blocks, where enough steps at the same widths and image size lie
    ahead."""
    compile_steps: int = 6000
    """Fewest steps ahead, at the same widths and image size, for compiling to pay (6,000 steps that each get 10 ms
    shorter are worth a minute)."""
    ema_decay: float = 0.0
    """Decay of the moving average of the weights a step, evaluated instead of them; 0 = none."""
    teacher: str | None = None
    """Checkpoint whose network teaches this one: its predictions are learned beside the labels. null = labels alone."""
    teacher_share: float = 0.5
    """The teacher's share of the loss, above 0, up to 1."""
    teacher_temperature: float = 2.0
    """By which logits of teacher and network are divided before they are compared."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What a loss that is NaN or infinite does: stop = it ends the run; skip = a step whose gradients are not finite
    changes no weight, momentum or buffer on any rank (a moving average takes the unchanged weights once more)."""
    nonfinite_limit: int = 25
    """With skip: so many such steps in a row end the run. fp16 skips about ten while it finds its scale."""

    def __post_init__(self) -> None:
        """Raises ValueError naming the field, the value found and what is allowed."""
        checks = [
            ("epochs", self.epochs >= 1, "a whole number from 1"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "from 0 to below 1"),
            ("mixup", self.mixup >= 0, "a number from 0"),
            ("cutmix", self.cutmix >= 0, "a number from 0"),
            ("accumulate", self.accumulate >= 1, "a whole number from 1"),
            ("clip_norm", self.clip_norm >= 0, "a number from 0"),
            ("compile_steps", self.compile_steps >= 1, "a whole number from 1"),
            ("ema_decay", 0 <= self.ema_decay < 1, "from 0 to below 1"),
            ("teacher", self.teacher != "", "a file, or null"),
            ("teacher_share", 0 < self.teacher_share <= 1, "above 0, up to 1"),
            ("teacher_temperature", 0 < self.teacher_temperature < math.inf, "a number above 0"),
            ("nonfinite_limit", self.nonfinite_limit >= 1, "a whole number from 1"),
        ]
        for name, ok, allowed in checks:
            if not ok:
                raise ValueError(f"{name}: found {getattr(self, name)!r}, allowed: {allowed}")

    @property
    def frozen(self) -> list[str]:
        """Names of the modules in `freeze`."""
        return [name.strip() for name in self.freeze.split(",") if name.strip()]
