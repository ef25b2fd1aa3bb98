"""Ward clusters of filters: the dendrogram, its cut, and the one filter of each cluster that stays (paper, steps 2-3).

Shape suffixes: C channels, F features.
"""

import numpy as np
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform


def ward_tree(features_CF: np.ndarray) -> np.ndarray:
    """float64 (C - 1, 4): SciPy's linkage matrix of Ward's method on Euclidean distances, merges from low to high."""
    if len(features_CF) < 2:
        return np.empty((0, 4))
    return linkage(_distances(features_CF), "ward")


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


def representatives(features_CF: np.ndarray, labels_C: np.ndarray) -> tuple[int, ...]:
    """Sorted channels that stay: of each cluster the one with the largest feature norm (L2), ties to the lowest."""
    norms_C = np.linalg.norm(features_CF, axis=1)
    best_first_C = np.lexsort((np.arange(len(norms_C)), -norms_C))
    _, first = np.unique(labels_C[best_first_C], return_index=True)
    return tuple(sorted(int(channel) for channel in best_first_C[first]))


def _distances(features_CF: np.ndarray) -> np.ndarray:
    """Condensed Euclidean distances by one matrix product, which is many times faster than SciPy's pair loop.

    The rows are centred first, so that the difference of squares loses no digits that Ward's heights depend on.
    """
    centred_CF = features_CF - features_CF.mean(axis=0)
    gram_CC = centred_CF @ centred_CF.T
    squares_C = np.diag(gram_CC)
    squared_CC = np.maximum(squares_C[:, None] + squares_C[None, :] - 2 * gram_CC, 0)
    np.fill_diagonal(squared_CC, 0)
    return squareform(np.sqrt(squared_CC), checks=False)
