"""The options that all planners share."""

import itertools
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal, get_args

from cup.criteria import CRITERIA, Criterion
from cup.criteria.features import FeatureVariant
from cup.errors import CupError
from cup.tracing.groups import ChannelGroup

CRITERION_OPTIONS = ("features", "use_bias", "scope")
"""Options that a criterion may have, too."""


@dataclass(frozen=True)
class PlanOptions:
    """How every planner works: the criterion, the groups that it may cut, the widths that they may get."""

    criterion: str | Criterion = "cup"
    """Which channels go first: a name in `CRITERIA`, or any object with `Criterion`'s method."""
    features: FeatureVariant = "both"
    """CUP's criterion by name: the connections that describe a filter: incoming, outgoing or both."""
    use_bias: bool = True
    """CUP's criterion by name: count a layer's bias among its filters' features, where it has one."""
    scope: Literal["inner", "all"] = "inner"
    """inner = groups that no residual addition touches (the paper's); all = residual groups too."""
    sequential: bool = True
    """Rank a group after the cuts before it (the reference); False = all from the weights as they are."""
    round_to: int | Mapping[str, Sequence[int]] = 1
    """Widths are rounded up, by the same ranking: to a multiple of this number, or to the next of a group's
    allowed widths (group -> ascending widths; a group that is not named may get any). The old width is always allowed,
    and none above it."""
    min_channels: int = 1
    """No group gets narrower than this."""
    fold: bool = False
    """Fold the channels of a cluster into the one that stays: their filters are averaged, and what the next layer reads
    of them is added up. False = the others go without a trace. With criterion cup alone, for it makes clusters."""

    def __post_init__(self) -> None:
        checks = [
            ("criterion", _is_criterion(self.criterion), f"{', '.join(CRITERIA)}, or an object with a method rank"),
            ("features", self.features in get_args(FeatureVariant), "both, incoming or outgoing"),
            ("scope", self.scope in ("inner", "all"), "inner or all"),
            ("round_to", _can_round_to(self.round_to), "a whole number from 1, or ascending ones for each group"),
            (
                "fold",
                not self.fold or self._may_have_clusters,
                f"False with {self.criterion}, or criterion cup",
            ),
            ("min_channels", isinstance(self.min_channels, int) and self.min_channels >= 1, "a whole number from 1"),
        ]
        for name, ok, allowed in checks:
            if not ok:
                raise CupError(f"{name}: found {getattr(self, name)!r}, allowed: {allowed}")

    @property
    def _may_have_clusters(self) -> bool:
        return not isinstance(self.criterion, str) or self.criterion == "cup"

    @property
    def ranker(self) -> Criterion:
        """The criterion as an object; one that is given by name takes over the options that it has itself."""
        if not isinstance(self.criterion, str):
            return self.criterion
        found = CRITERIA[self.criterion]
        if not is_dataclass(found):
            return found
        shared = {field.name for field in fields(found)} & set(CRITERION_OPTIONS)
        return replace(found, **{name: getattr(self, name) for name in shared})

    def allowed_widths(self, group: ChannelGroup) -> tuple[int, ...]:
        """The widths that a plan may give the group, ascending; the last one is the width it has."""
        widths: Iterable[int]
        if isinstance(self.round_to, int):
            widths = range(self.round_to, group.width, self.round_to)
        else:
            widths = self.round_to.get(group.name, range(1, group.width))
        return (*(width for width in widths if self.min_channels <= width < group.width), group.width)


def round_up(width: int, allowed: Sequence[int]) -> int:
    """The smallest of a group's allowed widths from `width` on; the widest where there is none."""
    return allowed[min(bisect_left(allowed, width), len(allowed) - 1)]


def _is_criterion(found: Any) -> bool:
    if isinstance(found, str):
        return found in CRITERIA
    return isinstance(found, Criterion) and not isinstance(found, type)


def _can_round_to(found: Any) -> bool:
    if not isinstance(found, Mapping):
        return isinstance(found, int) and found >= 1
    return all(
        all(isinstance(width, int) and width >= 1 for width in widths)
        and all(one < other for one, other in itertools.pairwise(widths))
        for widths in found.values()
    )


DEFAULT_OPTIONS = PlanOptions()
