"""Pruning methods that act while a network trains. A new one is a file here and a line in `METHODS`."""

from train.methods.config import METHODS, PruneConfig, build_method
from train.methods.early import Early, EarlyConfig
from train.methods.hard_ramp import HardRamp, HardRampConfig
from train.methods.meta_pruning import MetaPruning, MetaPruningConfig
from train.methods.method import Action, Dense, Method
from train.methods.prune_train import PruneTrain, PruneTrainConfig
from train.methods.soft_rate import SoftRate, SoftRateConfig

__all__ = [
    "METHODS",
    "Action",
    "Dense",
    "Early",
    "EarlyConfig",
    "HardRamp",
    "HardRampConfig",
    "MetaPruning",
    "MetaPruningConfig",
    "Method",
    "PruneConfig",
    "PruneTrain",
    "PruneTrainConfig",
    "SoftRate",
    "SoftRateConfig",
    "build_method",
]
