"""Carries out the actions of pruning methods on all ranks at once. It knows no method.

    rank 0 decides -> the plan is broadcast -> every rank applies it to model, EMA and optimizer
    -> digests of the whole state are compared -> the model is wrapped in DDP again

DDP's own broadcast at wrapping would hide a divergence, so the comparison comes first and that broadcast is off.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from threadpoolctl import threadpool_limits

import cup
from cup import ChannelGroup, Cost, PrunePlan, View
from train.errors import TrainError
from train.methods import Action
from train.network.optim import reset_state
from train.network.state import TrainState, state_digest
from train.world import World, available_cores

Decide = Callable[[View], Action | None]


class ResizeError(TrainError):
    """The ranks do not hold the same network after an action."""


@dataclass(frozen=True)
class Outcome:
    """What an action did.

    removed: group -> channels that went, or with a soft action were zeroed; all of a group whose block was dropped.
    digests: one a rank, all equal; empty where nothing was removed.
    """

    action: Action
    removed: dict[str, int]
    reduction_before: float
    reduction_after: float
    digests: list[str]


class Resizer:
    """Remembers what a resized network needs: its channel groups, the plans so far, its cost then and now."""

    def __init__(
        self,
        model: torch.nn.Module,
        example_input: torch.Tensor,
        scope: Literal["inner", "all"] | None = "inner",
        momentum: Literal["carry", "reset"] = "carry",
    ) -> None:
        """model: at full width. example_input: (1, channels, side, side); only its shape counts.

        scope: of the cuts that are to come, None for none. momentum: what becomes of optimizer state.
        Raises CupError for a network that is to be cut and cannot be traced, or has nothing to cut.
        """
        self._scope, self._momentum = scope, momentum
        self.groups = _groups(model, example_input, scope)
        self.dense = self.now = cup.complexity(model, example_input)
        self.plans: list[PrunePlan] = []
        self.cost: Cost | None = None
        """What a step costs, for methods that aim at a speed-up; the same on all ranks."""

    def view(self, model: torch.nn.Module) -> View:
        """What methods may see."""
        return View(model, self.groups, self.dense, self.now, self.cost)

    @property
    def widths(self) -> dict[str, int]:
        """Group -> channels, for the groups that may be cut."""
        return {group.name: group.width for group in cup.prunable_groups(self.groups, self._scope or "inner")}

    @property
    def reduction(self) -> float:
        """FR: FLOPs at full width over FLOPs now, in the paper's counting."""
        return self.dense.flops / self.now.flops

    def speedup(self, model: torch.nn.Module) -> float | None:
        """A step at full width over a step now, as modelled; None without a cost model."""
        return None if self.cost is None else self.view(model).speedup

    def replay(self, state: TrainState, plans: list[PrunePlan]) -> None:
        """Bring a full-width state to stored widths. Every rank calls it with the same plans, before DDP."""
        for plan in plans:
            self._cut(state, plan)

    def act(self, decide: Decide, state: TrainState, world: World) -> Outcome | None:
        """`ask`, then `carry_out`; None where no action was asked for. All ranks call it."""
        action = self.ask(decide, state, world)
        return None if action is None else self.carry_out(action, state, world)

    def ask(self, decide: Decide, state: TrainState, world: World) -> Action | None:
        """What rank 0 decides, on all ranks. All ranks call it."""

        def decided() -> dict[str, Any] | None:
            # The other ranks of this machine wait for the plan: NumPy's matrix products may have their cores, torch's
            # operations in between not: two thread pools that wait for each other made planning three times slower.
            with threadpool_limits(available_cores(), user_api="blas"):
                action = decide(self.view(state.model))
            return None if action is None else {"plan": action.plan.to_json(), "soft": action.soft}

        received = world.on_rank_zero(decided)
        return received and Action(PrunePlan.from_json(received["plan"]), received["soft"])

    def carry_out(self, action: Action, state: TrainState, world: World) -> Outcome:
        """Do it. All ranks call this with equal actions; a plan that keeps all channels does nothing.

        state: changed in place; its `parallel` is wrapped anew after a cut.
        Raises ResizeError on every rank if the ranks do not end with equal bits.
        """
        before = self.reduction
        if action.plan.changes_nothing:
            return Outcome(action, {}, before, before, [])
        if not action.soft:
            state.parallel = state.model  # DDP holds on to the parameters it was built with
        digests = world.all_gather(world.on_every_rank(lambda: self._apply(action, state)))
        if len(set(digests)) > 1:
            table = ", ".join(f"rank {rank} {digest[:12]}" for rank, digest in enumerate(digests))
            raise ResizeError(f"the ranks differ after the resize: {table}; nothing was saved of it")
        if not action.soft:
            state.parallel = world.wrap(state.model)
        return Outcome(action, action.plan.removed, before, self.reduction, digests)

    def _apply(self, action: Action, state: TrainState) -> str:
        """On one rank; returns the digest of the state that comes of it."""
        if action.soft:
            self._zero(state, action.plan)
        else:
            self._cut(state, action.plan)
        return state_digest(state)

    def _zero(self, state: TrainState, plan: PrunePlan) -> None:
        cup.zero_filters(state.model, plan, self.groups)
        if state.ema is not None:
            cup.zero_filters(state.ema.module, plan, self.groups)

    def _cut(self, state: TrainState, plan: PrunePlan) -> None:
        cup.check_optimizer(state.optimizer)
        self.now = cup.complexity_after(state.model, self.groups, plan, self.now)
        resized = cup.apply_plan(state.model, plan, self.groups)
        cup.carry_optimizer(state.optimizer, resized)
        if self._momentum == "reset":
            reset_state(state.optimizer)
        if state.ema is not None:
            cup.carry_ema(state.ema, resized)
        self.groups = resized.groups
        self.plans.append(plan)


def _groups(model: torch.nn.Module, example_input: torch.Tensor, scope: str | None) -> list[ChannelGroup]:
    """The channel groups. A network that cannot be traced or has none to cut is an error only if it is to shrink."""
    try:
        groups = cup.channel_groups(model, example_input)
    except cup.CupError:
        if scope is not None:
            raise
        return []
    if scope is not None and not cup.prunable_groups(groups, scope):
        raise cup.CupError(
            f"no layer of {type(model).__name__} may shrink with prune.scope {scope}, cup.describe says why; take "
            "--prune.scope all, or --prune.method none"
        )
    return groups
