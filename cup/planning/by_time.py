"""The planner that saves time: the removals, over all groups, that lose least for each second saved."""

import itertools
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from torch import nn

from cup.blocks import ResidualBlock, outermost, residual_blocks
from cup.cost.model import Cost, Walk
from cup.criteria import View
from cup.errors import CupError
from cup.plan import PrunePlan
from cup.planning.cuts import cut_view, cut_without, plan_from
from cup.planning.losses import loss_as_it_is, loss_of_block, losses_by_width
from cup.planning.options import PlanOptions
from cup.tracing.groups import ChannelGroup, check_groups, is_within

TIME_TOLERANCE = 0.01
"""Relative tolerance around a target speed-up."""

APPROACHES = 16
"""How often at most a target is approached, each time without the step that passed it by too much."""

TIME_OPTIONS = PlanOptions(scope="all")
"""Residual streams hold most of the memory traffic, so the paper's inner groups alone save little of a GPU's time."""


def plan_by_time(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    target: float,
    options: PlanOptions = TIME_OPTIONS,
    *,
    cost: Cost,
    full_cost: float | None = None,
    drop_blocks: bool = False,
    at_most: float | None = None,
) -> PrunePlan:
    """The plan after which a step takes 1/target of the time, or less by up to 1% where widths allow that.

    Where the narrowest widths take up to 1% more, they are taken as reaching it.

    Group by group the next narrower width that pays is priced: what is lost (cup/planning/losses.py) for each second
    that is saved. The cheapest step is taken until the target is reached; then what turns out too much is given back.
    Which channels go is the criterion's choice, group after group as in the other planners.

    cost: what is to be saved, e.g. `device_cost("h100-sxm", batch_size=256)`. Without `options.round_to` widths are
    multiples of its granularity. full_cost: what the target is measured against; the cost now, if not given.
    drop_blocks: one more kind of step: a residual block that can be dropped (`residual_blocks`) goes with all its
    kernels.
    at_most: how far the target may be passed, the target itself if not given: on the way to a higher one, a block or a
    coarse width need not wait for it.
    Where a block or a width would pass that by more than 1%, it stays, unless the target cannot be reached without it;
    the note then says where it landed.
    If even the narrowest widths take longer than the target, the plan's `note` says so.
    Raises CupError for a target <= 1, at_most below it, weights that are not finite, or groups of another network.
    """
    if not isinstance(target, int | float) or not target > 1:
        raise CupError(f"target speed-up: found {target}, allowed: a number above 1")
    if at_most is not None and at_most < target:
        raise CupError(f"at_most: found {at_most}, allowed: from the target, {target}")
    check_groups(model, groups)
    view = View(model, groups)
    search = _Search(view, cost, options, residual_blocks(model, groups) if drop_blocks else [])
    full = search.walk.cost if full_cost is None else full_cost
    note = search.reach(full, target, target if at_most is None else at_most)
    return replace(search.plan(), note=note)


class _Place(NamedTuple):
    """Where an approach to the target has ended, and what is to be noted of it."""

    walk: Walk
    allowed: dict[str, tuple[int, ...]]
    dropped: list[str]
    note: str


class _Search:
    """Widths on their way to a target, and the blocks that are dropped."""

    def __init__(self, view: View, cost: Cost, options: PlanOptions, blocks: Sequence[ResidualBlock]) -> None:
        rankings = cut_view(view, lambda group, ranking: group.width, options)
        self._view, self._options = view, options
        self._losses: dict[str, np.ndarray] = {}
        self._all_allowed: dict[str, tuple[int, ...]] = {}
        for cut in rankings:
            self._losses[cut.group.name] = losses_by_width(view, cut.group, cut.ranking)
            self._all_allowed[cut.group.name] = allowed_widths(cut.group, options, cost.granularity)
        self._kept_losses = {group.name: loss_as_it_is(view, group) for group in view.groups}
        self._costs = cost.of(view.model, view.groups)
        self._blocks = {block.name: block for block in blocks if block.groups}
        self._streams = {block.name: _stream_of(block, view.groups) for block in blocks}
        self._begin()

    def _begin(self) -> None:
        """Back to the widths that the network has. allowed: of the groups that no dropped block has taken along. last:
        the group or block of the last step.
        """
        self.allowed = dict(self._all_allowed)
        self.dropped: list[str] = []
        self.last = ""
        self.walk: Walk = self._costs.walk({name: widths[-1] for name, widths in self.allowed.items()})

    def plan(self) -> PrunePlan:
        """The plan that leads to the widths now: the criterion ranks what is left when the blocks have gone."""
        blocks = [self._blocks[name] for name in outermost(self.dropped)]
        dropped = tuple(block.name for block in blocks)
        cuts = cut_without(self._view, dropped, lambda group, ranking: self.walk.widths[group.name], self._options)
        plan, gone = plan_from(cuts), {name for block in blocks for name in block.groups}
        widths = {group.name: group.width for group in self._view.groups if group.name in gone}
        kept = {**plan.kept, **dict.fromkeys(widths, ())}
        return replace(plan, kept=kept, widths={**plan.widths, **widths}, dropped=dropped)

    def reach(self, full: float, target: float, at_most: float) -> str:
        """Move the widths to the target; returns what is to be noted, "" where they are near."""
        goal = full / target
        if self.walk.cost < goal / (1 + TIME_TOLERANCE):
            return f"the step is {full / self.walk.cost:.3f} times faster already, above {target:g}"
        blocks, nearest = dict(self._blocks), None
        for _ in range(APPROACHES):
            note = self._approach(full, target, at_most, blocks)
            here = _Place(self.walk, self.allowed, self.dropped, note)
            if nearest is not None and here.walk.cost > goal * (1 + TIME_TOLERANCE):
                break
            if not note or here.walk.cost > goal:
                return note
            if nearest is None or here.walk.cost > nearest.walk.cost:
                nearest = here
            self._leave_out(self.last, blocks)
            self._begin()
        self.walk, self.allowed, self.dropped, note = nearest
        return note

    def _leave_out(self, step: str, blocks: dict[str, ResidualBlock]) -> None:
        """What went too far, a block or a group's width now, is not to be taken in the next approach."""
        if step in blocks:
            del blocks[step]
            return
        widths = self._all_allowed[step]
        self._all_allowed[step] = widths[bisect_left(widths, self.walk.widths[step]) + 1 :] or widths[-1:]

    def _approach(self, full: float, target: float, at_most: float, blocks: Mapping[str, ResidualBlock]) -> str:
        """Once from the start to the target. blocks: those that may be dropped."""
        goal, least, before = full / target, full / at_most / (1 + TIME_TOLERANCE), self.walk.cost
        self._narrow(goal, dict(blocks))
        if self.walk.cost > goal:
            if self.walk.cost <= goal * (1 + TIME_TOLERANCE):
                return ""
            found = f"the narrowest widths give {full / self.walk.cost:.3f}"
            if self.walk.cost == before:
                found = "no narrower width costs less"
            return f"a speed-up of {target:g} is out of reach: {found}"
        self._widen(goal)
        if self.walk.cost < least:
            self._exchange(goal)
        if self.walk.cost >= least:
            return ""
        return f"a speed-up of {full / self.walk.cost:.3f} is the nearest to {target:g} that was found"

    def _is_near(self, cost: float, goal: float) -> bool:
        return goal / (1 + TIME_TOLERANCE) <= cost <= goal

    def _narrow(self, goal: float, blocks: dict[str, ResidualBlock]) -> None:
        """The cheapest step, again and again, until the cost is at the goal or nothing is left that saves any.

        blocks: that may be dropped; used up.
        """
        prices = {name: self._price(name) for name in self.allowed}
        drops = {name: self._price_of(block) for name, block in blocks.items()}
        while self.walk.cost > goal:
            name = min(prices, key=lambda name: prices[name][0], default=None)
            price, width = (np.inf, 0) if name is None else prices[name]
            block = min(drops, key=lambda name: drops[name], default=None)
            if block is not None and drops[block] < price:
                self._drop(blocks[block])
                self.last = block
                blocks = {name: one for name, one in blocks.items() if not is_within(name, block)}
                prices = {name: self._price(name) for name in self.allowed}
                drops = {name: self._price_of(one) for name, one in blocks.items()}
                continue
            if price == np.inf:
                return
            self.walk.move(name, width)
            self.last = name
            around = set(self.walk.neighbours(name))
            prices |= {other: self._price(other) for other in around & prices.keys()}
            drops |= {one: self._price_of(found) for one, found in blocks.items() if around & set(found.groups)}

    def _drop(self, block: ResidualBlock) -> None:
        self.walk.drop(block.name)
        self.dropped.append(block.name)
        self.allowed = {name: widths for name, widths in self.allowed.items() if name not in block.groups}

    def _price_of(self, block: ResidualBlock) -> float:
        """Loss for each second saved of the block as a whole; infinite where that saves none."""
        saved = self.walk.cost - self.walk.after_drop(block.name)
        if saved <= 1e-9 * self.walk.cost:
            return np.inf
        writers, now = self._writers(block)
        return loss_of_block(block.branches, [self._loss(name) for name in block.groups], writers, now) / saved

    def _writers(self, block: ResidualBlock) -> tuple[int, int]:
        """How many layers write the block's stream: in the full network, and now. Of streams that are not followed, all
        blocks that write one, and what began it.
        """
        stream, network = self._streams[block.name], self._view.groups[0].network
        wrote = {} if network.dense is None else network.dense.wrote
        if stream is None:
            gone = [name for name, layers in wrote.items() if not layers]
            others = [name for name, other in self._streams.items() if other is None]
            ever = outermost([*others, *gone])
            return len(ever) + 1, len(set(ever) - {*gone, *self.dropped}) + 1
        (producers,) = [group.producers for group in self._view.groups if group.name == stream]
        before = sum(layers.get(stream, 0) for layers in wrote.values())
        left = [place for place in producers if not any(is_within(place.module, one) for one in self.dropped)]
        return len(producers) + before, len(left)

    def _loss(self, name: str) -> float:
        """Of the group at its width now."""
        return float(self._losses[name][self.walk.widths[name]] if name in self._losses else self._kept_losses[name])

    def _price(self, name: str) -> tuple[float, int]:
        """(loss for each second saved, width) of the group's next step that saves any; infinite where there is none."""
        losses, now = self._losses[name], self.walk.widths[name]
        for width in self._narrower(name):
            saved = self.walk.cost - self.walk.after(name, width)
            if saved > 1e-9 * self.walk.cost:
                return float((losses[width] - losses[now]) / saved), width
        return np.inf, now

    def _widen(self, goal: float) -> None:
        """Give back steps for as long as the goal holds, what loses most first: the last step may have gone too far."""
        start = {name: allowed[-1] for name, allowed in self.allowed.items()}
        while True:
            best, gain = None, 0.0
            for name in self.allowed:
                width = self.walk.widths[name]
                if width < start[name]:
                    wider = self._next_wider(name)
                    regained = float(self._losses[name][width] - self._losses[name][wider])
                    if regained > gain and self.walk.after(name, wider) <= goal:
                        best, gain = (name, wider), regained
            if best is None:
                return
            self.walk.move(*best)

    def _exchange(self, goal: float) -> None:
        """One group a step wider and another narrower, where that lands near the goal: the pair that loses least."""
        found: list[tuple[float, tuple[str, int], tuple[str, int]]] = []
        for up in self.allowed:
            before = self.walk.widths[up]
            if before == self.allowed[up][-1]:
                continue
            wider = self._next_wider(up)
            self.walk.move(up, wider)
            for down, width in self._first_steps(up):
                if self._is_near(self.walk.after(down, width), goal):
                    lost = self._losses[down][width] - self._losses[down][self.walk.widths[down]]
                    regained = self._losses[up][before] - self._losses[up][wider]
                    found.append((float(lost - regained), (up, wider), (down, width)))
            self.walk.move(up, before)
        if found:
            _, wider_step, narrower_step = min(found)
            self.walk.move(*wider_step)
            self.walk.move(*narrower_step)

    def _first_steps(self, but: str) -> Iterator[tuple[str, int]]:
        """(group, next narrower width) of all groups but one."""
        for name in self.allowed:
            if name != but:
                yield from ((name, width) for width in itertools.islice(self._narrower(name), 1))

    def _narrower(self, name: str) -> Iterator[int]:
        """Allowed widths below the current one, from the widest on."""
        allowed = self.allowed[name]
        return reversed(allowed[: bisect_left(allowed, self.walk.widths[name])])

    def _next_wider(self, name: str) -> int:
        allowed = self.allowed[name]
        return allowed[bisect_left(allowed, self.walk.widths[name]) + 1]


def _stream_of(block: ResidualBlock, groups: Sequence[ChannelGroup]) -> str | None:
    """The group that the block adds to; None where it is not followed."""
    for group in groups:
        if group.name not in block.groups and any(is_within(place.module, block.name) for place in group.producers):
            return group.name
    return None


def allowed_widths(group: ChannelGroup, options: PlanOptions, granularity: int) -> tuple[int, ...]:
    """The widths that a plan may give the group, ascending: those of the options, or where these allow any, those that
    pay on the device.
    """
    if options.round_to == 1:
        options = replace(options, round_to=granularity)
    return options.allowed_widths(group)
