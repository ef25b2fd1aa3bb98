"""FLOPs in the paper's counting as a cost: what the planner saves where time follows FLOPs."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from cup.complexity import FlopsByWidths, complexity
from cup.tracing.groups import ChannelGroup
from cup.tracing.meta import meta_input


@dataclass(frozen=True)
class FlopsCost:
    """FLOPs of one forward pass of one sample (docs: `cup.complexity`): what `plan_by_time` saves when given it.

    Counted by its rules as if the first channels of each group stayed. Slow: each step that is priced counts the whole
    network anew, where `DeviceCost` counts only the kernels that the step changes. To a FLOPs target
    `plan_by_reduction` is the fast way, by one height for all groups.
    """

    granularity: int = 1

    unit = "FLOPs"

    def of(self, model: nn.Module, groups: Sequence[ChannelGroup]) -> "NetworkFlops":
        return NetworkFlops(model, groups)


class NetworkFlops:
    """One network's FLOPs by widths."""

    def __init__(self, model: nn.Module, groups: Sequence[ChannelGroup]) -> None:
        now = complexity(model, meta_input(groups[0].network.input_shape, batch=1))
        self._flops = FlopsByWidths(model, groups, now)
        self._neighbours = _neighbours(groups)

    @property
    def full(self) -> float:
        return self._flops.full()

    @property
    def now(self) -> float:
        return self.at({})

    def at(self, widths: Mapping[str, int], dropped: Collection[str] = ()) -> float:
        return self._flops.after({name: range(width) for name, width in widths.items()}, dropped)

    def walk(self, widths: Mapping[str, int]) -> "FlopsWalk":
        return FlopsWalk(self, dict(widths))

    def neighbours(self, name: str) -> Collection[str]:
        """The groups that have a layer in common with this one; itself is one of them."""
        return self._neighbours[name]


class FlopsWalk:
    """Widths that change one group at a time, and blocks that go. cost: at the current widths."""

    def __init__(self, flops: NetworkFlops, widths: dict[str, int]) -> None:
        self._flops, self.widths = flops, widths
        self._dropped: tuple[str, ...] = ()
        self.cost = flops.at(widths)

    def after(self, name: str, width: int) -> float:
        return self._flops.at(self.widths | {name: width}, self._dropped)

    def move(self, name: str, width: int) -> None:
        self.widths[name] = width
        self.cost = self._flops.at(self.widths, self._dropped)

    def after_drop(self, block: str) -> float:
        return self._flops.at(self.widths, (*self._dropped, block))

    def drop(self, block: str) -> None:
        self._dropped = (*self._dropped, block)
        self.cost = self._flops.at(self.widths, self._dropped)

    def neighbours(self, name: str) -> Collection[str]:
        return self._flops.neighbours(name)


def _neighbours(groups: Sequence[ChannelGroup]) -> dict[str, set[str]]:
    users: dict[str, set[str]] = {}
    for group in groups:
        for place in group.places:
            users.setdefault(place.module, set()).add(group.name)
    return {group.name: {group.name}.union(*(users[place.module] for place in group.places)) for group in groups}
