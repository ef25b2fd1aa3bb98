"""Ward clusters of filters: the dendrogram, its cut, and the one filter of each cluster that stays (paper, steps 2-3).

Shape suffix: C channels.
"""

import numpy as np
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform


def ward_tree(products_CC: np.ndarray) -> np.ndarray:
    """float64 (C - 1, 4): SciPy's linkage matrix of Ward's method on Euclidean distances, merges from low to high.

    products_CC: the inner products of the channels' centred features, from which one gets all distances by one matrix
        product; that is many times faster than SciPy's pair loop.
    """
    if len(products_CC) < 2:
        return np.empty((0, 4))
    squares_C = np.diag(products_CC)
    squared_CC = -2 * products_CC  # in place from here: a wide layer's matrices are large
    squared_CC += squares_C[:, None]
    squared_CC += squares_C
    squared = squareform(squared_CC, checks=False)
    return linkage(np.sqrt(np.maximum(squared, 0, out=squared), out=squared), "ward")


def clusters_at(tree: np.ndarray, threshold: float) -> int:
    """How many clusters a cut at height `threshold` leaves (SciPy's fcluster with criterion "distance")."""
    return len(tree) + 1 - int(np.searchsorted(tree[:, 2], threshold, side="right"))


def cut(tree: np.ndarray, clusters: int) -> np.ndarray:
    """int64 (C,): each channel's cluster, numbered by lowest member, when the tree is cut to exactly `clusters`.

    The lowest C - clusters merges are made, so every smaller count refines to every larger one.
    """
    count = len(tree) + 1
    members: dict[int, list[int]] = {channel: [channel] for channel in range(count)}
    for step in range(count - clusters):
        left, right = int(tree[step, 0]), int(tree[step, 1])
        members[count + step] = members.pop(left) + members.pop(right)
    labels_C = np.empty(count, dtype=np.int64)
    for number, channels in enumerate(sorted(members.values(), key=min)):
        labels_C[channels] = number
    return labels_C


def representatives(squares_C: np.ndarray, labels_C: np.ndarray) -> tuple[int, ...]:
    """Sorted channels that stay: of each cluster the one with the largest feature norm, ties to the lowest.

    squares_C: the squared L2 norms of the channels' features.
    """
    best_first_C = np.lexsort((np.arange(len(squares_C)), -squares_C))
    _, first = np.unique(labels_C[best_first_C], return_index=True)
    return tuple(sorted(best_first_C[first].tolist()))
