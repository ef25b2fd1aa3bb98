"""Channels in random order: the control that every criterion has to beat."""

import hashlib
from dataclasses import dataclass

import numpy as np

from cup.criteria.ranking import Ranking, lowest_first
from cup.criteria.view import View
from cup.tracing.groups import ChannelGroup, Masks


@dataclass(frozen=True)
class Random:
    """Every channel has a number from 0 to 1, and the smallest goes first. Heights are those numbers.

    A channel keeps its number through all cuts of the others, so a cut at height t leaves about the share 1 - t of the
    full network's channels. The numbers come from SHA-256 of seed, group and channel: equal on every machine.
    """

    seed: int = 0

    def rank(self, group: ChannelGroup, view: View, masks: Masks) -> Ranking:
        return lowest_first(np.array([self._number(f"{group.name} {number}") for number in group.numbers.tolist()]))

    def _number(self, channel: str) -> float:
        digest = hashlib.sha256(f"{self.seed} {channel}".encode()).digest()
        return int.from_bytes(digest[:6], "big") / 2**48
