"""Plans: which channels stay. Plain data that can be stored, sent, compared and replayed."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from cup.errors import CupError


@dataclass(frozen=True)
class PrunePlan:
    """For each group the sorted channels that stay, and the width that it had.

    kept: group name -> sorted kept indices. Groups that keep all their channels may be named. None are kept of a group
        that goes with its block.
    widths: group name -> channels before the cut, for the same names.
    folded: group name -> for each old channel the kept one that takes up its work, itself for a kept one; groups whose
        channels go without a trace are absent.
    dropped: names of the residual blocks that become their shortcut (`residual_blocks`).
    threshold: the height of the cut; for a target reduction, that from which the search took its last steps.
    note: what a reader should know, e.g. that a target could not be reached; not part of the digest.
    """

    kept: Mapping[str, tuple[int, ...]]
    widths: Mapping[str, int]
    threshold: float | None = None
    note: str = field(default="", compare=False)
    folded: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()

    @property
    def new_widths(self) -> dict[str, int]:
        """Group name -> channels after the cut; 0 for a group that goes with its block."""
        return {name: len(channels) for name, channels in self.kept.items()}

    @property
    def changes_nothing(self) -> bool:
        """Whether all channels and blocks stay."""
        return not self.removed and not self.dropped

    @property
    def removed(self) -> dict[str, int]:
        """Group name -> number of channels that go, for the groups that lose any."""
        return {name: self.widths[name] - len(c) for name, c in self.kept.items() if len(c) < self.widths[name]}

    def digest(self) -> str:
        """SHA-256 of what the plan does, equal on every machine for equal plans."""
        parts = [dict(self.kept), dict(self.widths)] + ([dict(self.folded)] if self.folded else [])
        parts += [list(self.dropped)] if self.dropped else []
        content = json.dumps(parts, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "PrunePlan":
        data = json.loads(text)
        for key in data.keys() & {"kept", "folded"}:  # plans of older versions fold nothing
            data[key] = {name: tuple(channels) for name, channels in data[key].items()}
        return PrunePlan(
            **data | {"dropped": tuple(map(str, data.get("dropped", ())))}
        )  # those before it drop no block

    def then(self, later: "PrunePlan") -> "PrunePlan":
        """One plan that does what this one and then `later` do.

        Raises CupError if `later` expects other widths, and for plans that fold: what the second one adds up depends on
        what the first one has made.
        """
        if self.folded or later.folded:
            raise CupError("plans that fold channels cannot be joined: apply one after the other")
        kept, widths = dict(self.kept), dict(self.widths)
        for name, channels in later.kept.items():
            before = kept.get(name, tuple(range(later.widths[name])))
            if len(before) != later.widths[name]:
                raise CupError(f"the later plan expects {name} at {later.widths[name]} channels, found {len(before)}")
            kept[name] = tuple(before[channel] for channel in channels)
            widths.setdefault(name, later.widths[name])
        dropped = (*self.dropped, *later.dropped)
        return PrunePlan(kept, widths, later.threshold, later.note, dropped=dropped)
