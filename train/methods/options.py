"""The options that all methods share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

from cup import CRITERIA, DEVICES, PlanOptions
from train.methods.landing import ReductionTarget, SpeedupTarget, Target


@dataclass(frozen=True, kw_only=True)
class SharedOptions(PlanOptions):
    """Which channels go first (the fields of `cup.PlanOptions`), how far, and until when."""

    criterion: str = "cup"
    """Which channels of a layer go first; see docs/methods.md."""
    round_to: int | Literal["measured"] = 1
    """Widths are rounded up to a multiple of this (8 or more for tensor cores); measured = to the next width that is
    worth having on this device, found by timing each layer at the start of the run (seconds on a GPU)."""
    target_reduction: float | None = None
    """Stop when FLOPs are down by this factor; the last cut lands on it within 1%. null = no such stop."""
    target_speedup: float | None = None
    """In place of target_reduction: stop when a training step is this many times faster than the full network's, as
    modelled for prune.device; the last cut takes what loses least for each second saved. Give scope all with it: inner
    groups alone save a modern GPU little. null = no such stop."""
    drop_blocks: bool = False
    """With target_speedup: whole residual blocks may go, too, where they cost more than they give; their shortcuts stay
    (docs/performance.md#whole-blocks)."""
    device: str = "measured"
    """Whose seconds target_speedup means: measured = those of the device that the run is on, for which a few dozen
    layers are timed at the start (seconds on a GPU, a minute on a CPU); a .json file in which `launch/bench.py cost`
    keeps a device that was measured once, so that several runs plan alike; or a name of docs/performance.md's table
    (h100-sxm, a100, l4, ...)."""
    last_epoch: int | None = None
    """No cuts after this epoch. null = the last epoch of training."""
    every: int = 1
    """Epochs between two cuts."""
    momentum: Literal["carry", "reset"] = "carry"
    """What happens to the optimizer's state at a resize: sliced along, or reset (the reference implementation)."""

    def __post_init__(self) -> None:
        """Raises ValueError or CupError naming the field, the value found and what is allowed."""
        target, speedup = self.target_reduction, self.target_speedup
        checks = [
            ("criterion", self.criterion in CRITERIA, ", ".join(CRITERIA)),
            ("round_to", self.round_to == "measured" or self.round_to >= 1, "a whole number from 1, or measured"),
            ("target_reduction", target is None or target > 1, "a number above 1, or null"),
            ("target_speedup", speedup is None or speedup > 1, "a number above 1, or null"),
            ("target_speedup", None in (speedup, target), f"null beside target_reduction {target}, or that one null"),
            ("drop_blocks", not self.drop_blocks or speedup is not None, "false without target_speedup"),
            ("device", self._has_device(), f"measured, {', '.join(DEVICES)}, or a .json file of bench.py cost --out"),
            ("last_epoch", self.last_epoch is None or self.last_epoch >= 1, "a whole number from 1, or null"),
            ("every", self.every >= 1, "a whole number from 1"),
        ]
        for name, ok, allowed in checks:
            if not ok:
                raise ValueError(f"{name}: found {getattr(self, name)!r}, allowed: {allowed}")
        self.plan_options()  # which checks what it takes over

    def _has_device(self) -> bool:
        return self.device in ("measured", *DEVICES) or self.device.endswith(".json")

    @property
    def target(self) -> Target | None:
        """Where cuts stop; None for nowhere."""
        if self.target_speedup is not None:
            return SpeedupTarget(self.target_speedup, self.drop_blocks)
        return None if self.target_reduction is None else ReductionTarget(self.target_reduction)

    def plan_options(self, measured: Mapping[str, Sequence[int]] | None = None) -> PlanOptions:
        """What the planners take. measured: the allowed widths of each group, for `round_to: measured`."""
        values = {field.name: getattr(self, field.name) for field in fields(PlanOptions)}
        if self.round_to == "measured":
            values["round_to"] = measured or 1
        return PlanOptions(**values)
