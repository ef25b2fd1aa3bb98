"""What a planner needs of a cost: its price at any widths, and after single steps."""

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from torch import nn

from cup.tracing.groups import ChannelGroup


class Walk(Protocol):
    """Widths that change one group at a time, and blocks that go. cost: at the current widths, `widths`."""

    cost: float
    widths: dict[str, int]

    def after(self, name: str, width: int) -> float:
        """The cost if this group had so many channels."""
        ...

    def move(self, name: str, width: int) -> None:
        """Give the group so many channels."""
        ...

    def after_drop(self, block: str) -> float:
        """The cost if this residual block were its shortcut; asked for only where a planner may drop blocks."""
        ...

    def drop(self, block: str) -> None:
        """Take the block out. Its groups are not moved any more."""
        ...

    def neighbours(self, name: str) -> Collection[str]:
        """The groups whose steps may cost something else once this one has moved; itself is one of them."""
        ...


class CostByWidths(Protocol):
    """One network's cost. full: at the widths of the trace, with all blocks; now: at the groups' widths."""

    @property
    def full(self) -> float: ...

    @property
    def now(self) -> float: ...

    def at(self, widths: Mapping[str, int], dropped: Collection[str] = ()) -> float:
        """Where these groups have so many channels, whichever they are; those not named keep their width.

        dropped: names of residual blocks that are their shortcut; what `widths` says of their groups does not count.
        """
        ...

    def walk(self, widths: Mapping[str, int]) -> Walk:
        """Steps from these widths on."""
        ...


class Cost(Protocol):
    """A cost model: `DeviceCost`, `FlopsCost`, or one of your own.

    unit: of the cost, for people. granularity: widths in multiples of it pay.
    """

    @property
    def unit(self) -> str: ...

    @property
    def granularity(self) -> int: ...

    def of(self, model: nn.Module, groups: Sequence[ChannelGroup]) -> CostByWidths:
        """The cost of this network; the model is only read. groups: at the model's widths."""
        ...
