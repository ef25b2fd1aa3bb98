"""MetaPruning's first stage: train a PruningNet at random widths (Liu et al., ICCV 2019, arXiv 1903.10258).

The network that trains is train/network/pruning_net.py's, which build.py puts in place of the ordinary one. The second
stage is launch/search.py, the third an ordinary run with `model.widths`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from train.methods.method import Method
from train.methods.options import SharedOptions

WITHOUT_EFFECT = (
    *("criterion", "features", "use_bias", "sequential", "target_reduction", "target_speedup", "drop_blocks"),
    *("device", "last_epoch", "every", "momentum", "fold"),
)
"""Shared options that decide nothing here: nothing is cut, and the search has its own target."""


@dataclass(frozen=True, kw_only=True)
class MetaPruningConfig:
    """The PruningNet. The defaults are the authors'."""

    scales: int = 31
    """Widths to draw from for each group: so many shares of its channels, evenly spaced up to all of them."""
    narrowest: float = 0.1
    """The smallest of these shares."""
    hidden: int = 32
    """Neurons between the two fully connected layers that make a layer's weight: the PruningNet has this many times the
    parameters of the layers that it makes, and once more."""

    def __post_init__(self) -> None:
        """Raises ValueError naming the field, the value found and what is allowed."""
        checks = [
            ("scales", self.scales >= 2, "a whole number from 2"),
            ("narrowest", 0 < self.narrowest < 1, "above 0, below 1"),
            ("hidden", self.hidden >= 1, "a whole number from 1"),
        ]
        for name, ok, allowed in checks:
            if not ok:
                raise ValueError(f"{name}: found {getattr(self, name)!r}, allowed: {allowed}")


class MetaPruning(Method):
    """Draws widths for each step. It cuts nothing; `may_resize` stays True, for blocks of changing widths are not
    worth compiling.
    """

    label = "MetaPruning (PruningNet)"

    def __init__(
        self,
        config: MetaPruningConfig,
        shared: SharedOptions,
        epochs: int,
        measured: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """Arguments as of HardRamp. Raises ValueError for widths that are to be measured."""
        if shared.round_to == "measured":
            raise ValueError("round_to: found 'measured', allowed: a whole number (prune.method: meta_pruning)")

    def before_step(self, model: nn.Module, epoch: int, step: int) -> None:
        model.draw(epoch, step)
