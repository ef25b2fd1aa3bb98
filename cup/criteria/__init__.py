"""Which channels of a group go first: criteria, one a file, and the ranking that each gives.

A new criterion is a file with a class that has `rank`, and a line in `CRITERIA`. What a criterion may see is a `View`.
"""

from cup.criteria.l1 import L1
from cup.criteria.ranking import Criterion, Ranking
from cup.criteria.view import View
from cup.criteria.ward import Ward
from cup.criteria.weights import Weights

CRITERIA: dict[str, Criterion] = {
    "cup": Ward(),
    "l1": L1(),
}
"""The criteria by the name that `PlanOptions.criterion` and the command line know them by."""

__all__ = ["CRITERIA", "L1", "Criterion", "Ranking", "View", "Ward", "Weights"]
