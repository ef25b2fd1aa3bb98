"""The CUP-SS hook: at the start of an epoch, ask the schedule, plan on rank 0, resize on every rank, compare.

    schedule -> plan on rank 0 from fp32 weights -> broadcast as plain data -> every rank checks its digest, applies
    it to model, EMA and optimizer -> digests of the whole state are compared -> DDP is wrapped again

DDP's own broadcast at wrapping would hide a divergence, so the comparison comes first and that broadcast is off.
"""

import time
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from threadpoolctl import threadpool_limits

import cup
from cup import PlanOptions, PrunePlan
from train.errors import TrainError
from train.network.optim import forget_momentum
from train.network.state import TrainState, state_digest
from train.network.widths import NOISE, AllowedWidths, measured_widths
from train.world import World, available_cores


@dataclass(frozen=True, kw_only=True)
class CupConfig:
    """CUP-SS: how the network shrinks while it trains."""

    enabled: bool = True
    """False trains the dense network."""
    ramp: Literal["threshold", "reduction"] = "threshold"
    """threshold = cut at t(e) = slope (e - 1) + offset at the start of epoch e (the paper's);
    reduction = follow a straight line in FLOPs reduction from 1 at epoch 1 to target_reduction at last_epoch."""
    slope: float = 0.03
    """k of the threshold ramp, per epoch."""
    offset: float = 0.3
    """b of the threshold ramp."""
    target_reduction: float | None = None
    """Stop when FLOPs are down by this factor; the last cut lands on it within 1%. null = no stop (threshold ramp)."""
    last_epoch: int | None = None
    """No cuts after this epoch; the reduction ramp reaches its target there. null = the last epoch of training."""
    every: int = 1
    """Epochs between two cuts."""
    round_to: int | Literal["measured"] = 1
    """Widths are rounded up to a multiple of this (8 or more for tensor cores); measured = to the next width that is
    worth having on this device, found by timing each layer at the start of the run (seconds on a GPU)."""
    min_channels: int = 1
    """No layer gets narrower than this, channels."""
    features: Literal["both", "incoming", "outgoing"] = "both"
    """Connections that describe a filter when it is compared with others."""
    use_bias: bool = True
    """Count a layer's bias among its filters' features, where it has one."""
    scope: Literal["inner", "all"] = "inner"
    """inner = layers that no residual addition touches (the paper's); all = residual streams too."""
    momentum: Literal["carry", "reset"] = "carry"
    """What happens to the optimizer's momentum at a resize: sliced along, or dropped (the reference implementation)."""

    def __post_init__(self) -> None:
        """Raises ValueError naming the field, the value found and what is allowed."""
        target, needs_target = self.target_reduction, self.enabled and self.ramp == "reduction"
        checks = [
            ("slope", self.slope >= 0, "a number from 0"),
            ("offset", self.offset >= 0, "a number from 0"),
            ("target_reduction", target is None or target > 1, "a number above 1, or null"),
            ("target_reduction", not needs_target or target is not None, "a number above 1 (ramp: reduction needs it)"),
            ("last_epoch", self.last_epoch is None or self.last_epoch >= 1, "a whole number from 1, or null"),
            ("every", self.every >= 1, "a whole number from 1"),
            ("round_to", self.round_to == "measured" or self.round_to >= 1, "a whole number from 1, or measured"),
            ("min_channels", self.min_channels >= 1, "a whole number from 1"),
        ]
        for name, ok, allowed in checks:
            if not ok:
                raise ValueError(f"{name}: found {getattr(self, name)!r}, allowed: {allowed}")

    @property
    def plan_options(self) -> dict[str, Any]:
        names = {field.name for field in fields(PlanOptions)} & {field.name for field in fields(self)}
        return {name: getattr(self, name) for name in names}


class ResizeError(TrainError):
    """The ranks do not hold the same network after a resize, or did not receive the same plan."""


@dataclass(frozen=True)
class ResizeOutcome:
    """What happened at the start of an epoch.

    threshold: the height t of the cut, None where the schedule asks for none.
    removed: group -> channels that went; empty where nothing did. digests: one a rank, all equal.
    """

    threshold: float | None
    removed: dict[str, int]
    reduction_before: float
    reduction_after: float
    digests: list[str]
    note: str = ""


class Resizer:
    """Holds what a shrinking run must remember: the groups at their widths, the plans so far, the dense cost."""

    def __init__(self, config: CupConfig, model: torch.nn.Module, example_input: torch.Tensor, epochs: int) -> None:
        """model: at full width. example_input: (1, channels, side, side); only its shape counts."""
        self.config = config
        self.last_epoch = min(config.last_epoch or epochs, epochs)
        self.groups = _groups(config, model, example_input)
        self.dense = self.now = cup.complexity(model, example_input)
        self.plans: list[PrunePlan] = []
        self.allowed_widths: AllowedWidths | None = None
        """With round_to: measured, what was measured: a resumed run must plan with the same numbers."""

    @property
    def widths(self) -> dict[str, int]:
        """Group -> channels, for the groups that the schedule may cut."""
        return {group.name: group.width for group in cup.prunable_groups(self.groups, self.config.scope)}

    @property
    def reduction(self) -> float:
        """FR: FLOPs at full width over FLOPs now, in the paper's counting."""
        return self.dense.flops / self.now.flops

    def may_cut(self, epoch: int) -> bool:
        """Whether the schedule, as things stand now, looks at a cut at the start of `epoch`."""
        config, target = self.config, self.config.target_reduction
        reached = target is not None and cup.has_reached(self.reduction, target, cup.REDUCTION_TOLERANCE)
        return config.enabled and cup.is_cut_epoch(epoch, config.every, self.last_epoch) and not reached

    def replay(self, state: TrainState, plans: list[PrunePlan]) -> None:
        """Bring a full-width state to stored widths. Every rank calls it with the same plans, before DDP."""
        for plan in plans:
            self._apply(state, plan)

    def measure_widths(self, state: TrainState, batch_size: int, world: World) -> list[str]:
        """With round_to: measured, time the layers on rank 0, unless that was done. All ranks call it, before DDP.

        batch_size: images of one rank's step. Returns what was found in words for the user.
        """
        if not self.config.enabled or self.config.round_to != "measured" or self.allowed_widths is not None:
            return []
        started = time.perf_counter()
        groups = cup.prunable_groups(self.groups, self.config.scope)
        self.allowed_widths, scattered = world.on_rank_zero(
            lambda: measured_widths(state.model, groups, batch_size, state.precision, world.device)
        )
        counts = [len(widths) for widths in self.allowed_widths.values()]
        notes = [
            f"cup.round_to: measured {len(groups)} layers' widths in {time.perf_counter() - started:.1f} s, "
            f"{min(counts)} to {max(counts)} are allowed each"
        ]
        if uncut := [name for name, widths in self.allowed_widths.items() if len(widths) == 1]:
            notes.append(
                f"cup.round_to: measured lets {len(uncut)} of {len(groups)} layers stay as wide as they are, for no "
                f"narrower width is faster here: {', '.join(uncut)}; a number cuts them, too"
            )
        if scattered:
            notes.append(
                f"cup.round_to: measured is unsure of {len(scattered)} of {len(groups)} layers, whose times do not "
                f"repeat within {NOISE:.0%} here (other work on this machine?): {', '.join(scattered)}"
            )
        return notes

    def at_epoch_start(self, epoch: int, state: TrainState, world: World) -> ResizeOutcome:
        """Resize if the schedule says so. All ranks call it; model, EMA and optimizer are changed in place.

        Raises ResizeError on every rank if the ranks do not end with equal bits.
        """
        before = self.reduction
        decision = world.on_rank_zero(lambda: self._decide(epoch, state))
        if decision is None:
            return ResizeOutcome(None, {}, before, before, [])
        plan = PrunePlan.from_json(decision["plan"])
        if not plan.removed:
            return ResizeOutcome(plan.threshold, {}, before, before, [], plan.note)
        state.parallel = state.model  # DDP holds on to the parameters it was built with
        digests = world.gather(world.together(lambda: self._resize(state, plan, decision["digest"])))
        if len(set(digests)) > 1:
            table = ", ".join(f"rank {rank} {digest[:12]}" for rank, digest in enumerate(digests))
            raise ResizeError(f"the ranks differ after the resize at epoch {epoch}: {table}; nothing was saved of it")
        state.parallel = world.wrap(state.model)
        return ResizeOutcome(plan.threshold, plan.removed, before, self.reduction, digests, plan.note)

    def _decide(self, epoch: int, state: TrainState) -> dict[str, str] | None:
        # The other ranks of this machine wait for the plan: NumPy's matrix products may have their cores.
        with threadpool_limits(available_cores()):
            plan = self._plan(epoch, state.model)
        return None if plan is None else {"plan": plan.to_json(), "digest": plan.digest()}

    def _plan(self, epoch: int, model: torch.nn.Module) -> PrunePlan | None:
        """The plan for this epoch; None where the schedule asks for none or the target is reached."""
        config, target = self.config, self.config.target_reduction
        if not self.may_cut(epoch):
            return None
        if config.ramp == "reduction":
            goal = cup.reduction_at(epoch, target, self.last_epoch)
            return self._plan_to(goal, model) if goal > self.reduction else None
        t = cup.threshold_at(epoch, config.slope, config.offset)
        if t <= 0:
            return None
        plan = cup.plan_by_threshold(model, self.groups, t, PlanOptions(**self._plan_options))
        if target is None:
            return plan
        reduction = self.dense.flops / cup.flops_after(model, self.groups, plan, self.now)
        return self._plan_to(target, model) if reduction > target * (1 + cup.REDUCTION_TOLERANCE) else plan

    def _plan_to(self, reduction: float, model: torch.nn.Module) -> PrunePlan:
        options = PlanOptions(**self._plan_options)
        return cup.plan_by_reduction(model, self.groups, reduction, options, dense_flops=self.dense.flops)

    @property
    def _plan_options(self) -> dict[str, Any]:
        options = self.config.plan_options
        if self.config.round_to == "measured":
            assert self.allowed_widths is not None, "measure_widths comes before the first plan"
            options["round_to"] = self.allowed_widths
        return options

    def _resize(self, state: TrainState, plan: PrunePlan, digest: str) -> str:
        """On one rank: check, apply, carry; returns the digest of the state that comes of it."""
        if plan.digest() != digest:
            raise ResizeError(f"the plan that arrived ({plan.digest()[:12]}) is not the one sent ({digest[:12]})")
        self._apply(state, plan)
        return state_digest(state)

    def _apply(self, state: TrainState, plan: PrunePlan) -> None:
        cup.check_optimizer(state.optimizer)
        self.now = cup.complexity_after(state.model, self.groups, plan, self.now)
        resized = cup.apply_plan(state.model, plan, self.groups)
        cup.carry_optimizer(state.optimizer, resized)
        if self.config.momentum == "reset":
            forget_momentum(state.optimizer)
        if state.ema is not None:
            cup.carry_ema(state.ema, resized)
        self.groups = resized.groups
        self.plans.append(plan)


def _groups(config: CupConfig, model: torch.nn.Module, example_input: torch.Tensor) -> list[cup.ChannelGroup]:
    """The channel groups. A network that cannot be traced or has none to cut is an error only if it is to shrink."""
    try:
        groups = cup.channel_groups(model, example_input)
    except cup.CupError:
        if config.enabled:
            raise
        return []
    if config.enabled and not cup.prunable_groups(groups, config.scope):
        raise cup.CupError(f"no layer of {type(model).__name__} may shrink with cup.scope {config.scope}")
    return groups
