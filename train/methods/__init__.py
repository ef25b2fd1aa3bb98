"""Pruning methods that act while a network trains. A new one is a file here and a line in `METHODS`."""

from train.methods.config import METHODS, PruneConfig, build_method
from train.methods.hard_ramp import HardRamp, HardRampConfig
from train.methods.method import Action, Dense, Method

__all__ = ["METHODS", "Action", "Dense", "HardRamp", "HardRampConfig", "Method", "PruneConfig", "build_method"]
