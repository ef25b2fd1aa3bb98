"""CUP's criterion: Ward clusters of filters, and the one filter of each cluster that stays (paper, steps 1 to 3).

Shape suffix: C channels.
"""

from dataclasses import dataclass

import numpy as np
from scipy.cluster.hierarchy import linkage

from cup.criteria.features import FeatureVariant, Gram, GroupFeatures
from cup.criteria.ranking import Ranking
from cup.criteria.view import View
from cup.tracing.groups import ChannelGroup, Masks


@dataclass(frozen=True)
class Ward:
    """Where two clusters merge, the representative with the smaller feature norm goes; of equal norms the higher id.

    Heights are those of Ward's merges. A cut at height t so leaves one filter of each cluster that the dendrogram has
    there: the one with the largest norm.
    features, use_bias: as of `PlanOptions`.
    """

    features: FeatureVariant = "both"
    use_bias: bool = True

    def rank(self, group: ChannelGroup, view: View, masks: Masks) -> Ranking:
        ranked = view.remember(
            (self, group.name),
            lambda: _RankedFeatures(GroupFeatures(view.weights, group, self.features, self.use_bias)),
        )
        return ranked.under(masks)


class _RankedFeatures:
    """A group's features and the ranking that they gave last: masks that leave them as they are cost no new tree."""

    def __init__(self, features: GroupFeatures) -> None:
        self._features = features
        self._gram: Gram | None = None
        self._ranking: Ranking | None = None

    def under(self, masks: Masks) -> Ranking:
        gram = self._features.gram(masks)
        if self._ranking is None or gram is not self._gram:
            tree = ward_tree(gram.products_CC)
            self._gram, self._ranking = gram, Ranking(removal_order(tree, gram.squares_C), tree[:, 2], tree)
        return self._ranking


def ward_tree(products_CC: np.ndarray) -> np.ndarray:
    """float64 (C - 1, 4): SciPy's linkage matrix of Ward's method on Euclidean distances, merges from low to high.

    products_CC: the inner products of the channels' centred features (upper triangle), from which one gets all
        distances by one matrix product; that is many times faster than SciPy's pair loop.
    """
    width = len(products_CC)
    if width < 2:
        return np.empty((0, 4))
    squares_C = np.diag(products_CC)
    squared = np.empty(width * (width - 1) // 2)  # SciPy's order of pairs: each channel with all later ones
    start = 0
    for channel in range(width - 1):
        pairs = squared[start : start + width - 1 - channel]
        np.multiply(products_CC[channel, channel + 1 :], -2, out=pairs)
        pairs += squares_C[channel]
        pairs += squares_C[channel + 1 :]
        start += len(pairs)
    return linkage(np.sqrt(np.maximum(squared, 0, out=squared), out=squared), "ward")


def removal_order(tree: np.ndarray, squares_C: np.ndarray) -> np.ndarray:
    """int64 (C,), ids: what each merge removes, and at the end the one filter that stays for all.

    squares_C: the squared L2 norms of the channels' features.
    """
    best_first_C = np.lexsort((np.arange(len(squares_C)), -squares_C))
    places = np.argsort(best_first_C).tolist()  # of each node's representative among the best
    removed = []
    for left, right in tree[:, :2].astype(np.int64).tolist():
        places.append(min(places[left], places[right]))
        removed.append(max(places[left], places[right]))
    return best_first_C[[*removed, 0]]


def clusters_of(tree: np.ndarray, count: int) -> np.ndarray:
    """int64 (C,): each channel's cluster, numbered by lowest member, when the tree is cut to exactly `count`.

    The lowest C - count merges are made, so every smaller count refines to every larger one.
    """
    width = len(tree) + 1
    members: dict[int, list[int]] = {channel: [channel] for channel in range(width)}
    for step in range(width - count):
        left, right = int(tree[step, 0]), int(tree[step, 1])
        members[width + step] = members.pop(left) + members.pop(right)
    clusters_C = np.empty(width, dtype=np.int64)
    for number, channels in enumerate(sorted(members.values(), key=min)):
        clusters_C[channels] = number
    return clusters_C
