"""Labels: the trace's bookkeeping of channels.

Every channel that a layer produces gets a label of its own (an integer). Labels travel through the graph as an array,
one entry for each index of a tensor's channel axis; here is what the walk finds out about them on its way.

Labels stand in int64 arrays named `_C`: one entry for each index of the channel axis.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components


@dataclass(frozen=True, eq=False)
class Channels:
    """A tensor's channel axis: which dimension it is, and the label at each of its indices."""

    dim: int
    labels_C: np.ndarray


@dataclass
class Labels:
    """All labels so far: which are one channel, which must stay and why, and which layers they pass through.

    ties: pairs of arrays; labels at equal positions are one channel. frozen: labels with the reason. residual: labels
    that an addition touches. producers, followers, consumers: (dotted name of a module or parameter, labels), in the
    order of the forward pass.
    """

    count: int = 0
    ties: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    frozen: list[tuple[np.ndarray, str]] = field(default_factory=list)
    residual: list[np.ndarray] = field(default_factory=list)
    producers: list[tuple[str, np.ndarray]] = field(default_factory=list)
    followers: list[tuple[str, np.ndarray]] = field(default_factory=list)
    consumers: list[tuple[str, np.ndarray]] = field(default_factory=list)

    def fresh(self, count: int) -> np.ndarray:
        self.count += count
        return np.arange(self.count - count, self.count)

    def frozen_fresh(self, count: int, reason: str) -> np.ndarray:
        """Labels for channels that no layer produces, and that must stay."""
        labels_C = self.fresh(count)
        self.frozen.append((labels_C, reason))
        return labels_C

    def freeze(self, values: Iterable[Channels | None], reason: str) -> None:
        self.frozen.extend((value.labels_C, reason) for value in values if value is not None)

    def bundle(self, labels_C: np.ndarray, bundles: int) -> np.ndarray:
        """Tie equal runs of labels together, so that each run goes or stays as one; returns the runs' first labels."""
        runs_BR = labels_C.reshape(bundles, -1)
        self.ties.append((np.repeat(runs_BR[:, 0], runs_BR.shape[1]), labels_C))
        return runs_BR[:, 0]

    def tie_runs(self, labels_C: np.ndarray, runs: int) -> np.ndarray:
        """Tie labels at equal places of equal runs, so that all runs keep the same places; returns the first run's."""
        runs_RB = labels_C.reshape(runs, -1)
        self.ties.append((np.tile(runs_RB[0], runs), labels_C))
        return runs_RB[0]

    def channels(self) -> np.ndarray:
        """int (count,): the channel that each label stands for."""
        return self._connected(self.ties)

    def groups(self) -> np.ndarray:
        """int (count,): the group of each label: channels of one producer belong together, and tied ones do.

        But where a producer writes only some of the channels that it shares with others, as in front of a shortcut that
        pads with zero channels, those that have the same producers are a group. Each is named after another producer.
        """
        blocks = [(np.broadcast_to(labels_C[:1], labels_C.shape), labels_C) for _, labels_C in self.producers]
        together, channel_of = self._connected(self.ties + blocks), self.channels()
        written_by: dict[int, dict[int, list[str]]] = {}  # group -> channel -> the layers that write it, in order
        for layer, labels_C in self.producers:
            written = written_by.setdefault(int(together[labels_C[0]]), {})
            for channel in np.unique(channel_of[labels_C]).tolist():
                if layer not in (layers := written.setdefault(channel, [])):
                    layers.append(layer)
        groups, count = together.copy(), together.max(initial=-1) + 1
        for written in written_by.values():
            kinds = list(dict.fromkeys(map(tuple, written.values())))
            if len({layers[0] for layers in kinds}) < len(kinds):
                continue  # two would have one name
            for number, kind in enumerate(kinds[1:], start=count):
                apart = [channel for channel, layers in written.items() if tuple(layers) == kind]
                groups[np.isin(channel_of, apart)] = number
            count += len(kinds) - 1
        return groups

    def _connected(self, ties: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        rows = np.concatenate([np.empty(0, dtype=np.int64), *(first for first, _ in ties)])
        columns = np.concatenate([np.empty(0, dtype=np.int64), *(second for _, second in ties)])
        edges = coo_array((np.ones(len(rows), dtype=np.int8), (rows, columns)), shape=(self.count, self.count))
        return connected_components(edges, directed=False)[1]
