"""Which method a run takes, and its settings."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from train.methods.early import Early, EarlyConfig
from train.methods.hard_ramp import HardRamp, HardRampConfig
from train.methods.meta_pruning import MetaPruning, MetaPruningConfig
from train.methods.method import Dense, Method
from train.methods.options import SharedOptions
from train.methods.prune_train import PruneTrain, PruneTrainConfig
from train.methods.soft_rate import SoftRate, SoftRateConfig

Measured = Mapping[str, Sequence[int]]
"""Group -> the widths that are worth having on the device, ascending."""


@dataclass(frozen=True, kw_only=True)
class PruneConfig(SharedOptions):
    """How the network shrinks while it trains."""

    method: str = "hard_ramp"
    """none = train the dense network; hard_ramp = cut at the start of an epoch, deeper each time (with the criterion
    cup this is CUP-SS, which the authors' slides call CUP-RF); soft_rate = zero a share of every layer's filters after
    each epoch, remove them at the end (SFP with the criterion l2, FPGM with gm); prune_train = a penalty empties
    channels, and empty ones go (PruneTrain); early = cut once, when the widths that would be chosen have settled;
    meta_pruning = train the PruningNet of MetaPruning, with which launch/search.py finds widths."""
    hard_ramp: HardRampConfig = field(default_factory=HardRampConfig)
    soft_rate: SoftRateConfig = field(default_factory=SoftRateConfig)
    prune_train: PruneTrainConfig = field(default_factory=PruneTrainConfig)
    early: EarlyConfig = field(default_factory=EarlyConfig)
    meta_pruning: MetaPruningConfig = field(default_factory=MetaPruningConfig)

    def __post_init__(self) -> None:
        """Raises ValueError or CupError naming the field, the value found and what is allowed."""
        super().__post_init__()
        if self.method not in METHODS:
            raise ValueError(f"method: found {self.method!r}, allowed: {', '.join(METHODS)}")
        build_method(self, epochs=1)  # settings that a method refuses are an error before anything else exists

    @property
    def trains_pruning_net(self) -> bool:
        """Whether a PruningNet trains in place of the network."""
        return self.method == "meta_pruning"

    @property
    def shrinks(self) -> bool:
        return self.method != "none"


METHODS: dict[str, Callable[[PruneConfig, int, Measured | None], Method]] = {
    "none": lambda config, epochs, measured: Dense(),
    "hard_ramp": lambda config, epochs, measured: HardRamp(config.hard_ramp, config, epochs, measured),
    "soft_rate": lambda config, epochs, measured: SoftRate(config.soft_rate, config, epochs, measured),
    "prune_train": lambda config, epochs, measured: PruneTrain(config.prune_train, config, epochs, measured),
    "early": lambda config, epochs, measured: Early(config.early, config, epochs, measured),
    "meta_pruning": lambda config, epochs, measured: MetaPruning(config.meta_pruning, config, epochs, measured),
}
"""Name -> what makes the method from (configuration, epochs of the run, measured widths)."""


def build_method(config: PruneConfig, epochs: int, measured: Measured | None = None) -> Method:
    """The method that `config` names, at the beginning of a run. Raises ValueError for settings that conflict."""
    return METHODS[config.method](config, epochs, measured)
