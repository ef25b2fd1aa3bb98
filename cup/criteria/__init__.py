"""Which channels of a group go first: criteria, one a file, and the ranking that each gives.

A new criterion is a file with a class that has `rank`, and a line in `CRITERIA`. What a criterion may see is a `View`.
"""

from cup.criteria.bn_scale import BatchNormScale
from cup.criteria.cop import Cop
from cup.criteria.geometric_median import GeometricMedian
from cup.criteria.l1 import L1
from cup.criteria.l2 import L2
from cup.criteria.max_abs import MaxAbs
from cup.criteria.random_order import Random
from cup.criteria.ranking import Criterion, Ranking
from cup.criteria.view import View
from cup.criteria.ward import Ward
from cup.criteria.weights import Weights

CRITERIA: dict[str, Criterion] = {
    "cup": Ward(),
    "l1": L1(),
    "l2": L2(),
    "gm": GeometricMedian(),
    "bn_scale": BatchNormScale(),
    "cop": Cop(),
    "max_abs": MaxAbs(),
    "random": Random(),
}
"""The criteria by the name that `PlanOptions.criterion` and the command line know them by."""

__all__ = [
    "CRITERIA",
    "L1",
    "L2",
    "BatchNormScale",
    "Cop",
    "Criterion",
    "GeometricMedian",
    "MaxAbs",
    "Random",
    "Ranking",
    "View",
    "Ward",
    "Weights",
]
