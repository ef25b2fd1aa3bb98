"""Differences between two sets of runs, with Student's confidence intervals.

Runs of one seed share initial weights, order of images and augmentation, and some are even made from the other one of
their seed (a cut of the dense network, the shape that a method ended with). So they are not independent, as Welch's
interval would need: where both sides have a seed, the difference is taken seed by seed, and the interval is that of the
mean of these differences. It is right whether or not a seed's runs are alike, at the price of fewer degrees of freedom.
Without seeds in common it is Welch's.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

CONFIDENCE = 0.95
ROUNDING = 1e-9
"""Scatter below it is that of floating point."""


@dataclass(frozen=True)
class Difference:
    """The mean of one side less that of the other.

    low, high: of the confidence interval, None where there are too few seeds for one, or they do not scatter at all.
    seeds: on which it rests, of the side that has fewer. is_paired: whether it was taken seed by seed.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: int
    is_paired: bool

    @property
    def sign(self) -> int:
        """1 or -1 where the interval lies on one side of zero, 0 where it does not, or there is none."""
        if self.low is None or self.low <= 0 <= self.high:
            return 0
        return 1 if self.low > 0 else -1


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference:
    """ours, theirs: seed -> value, at least one each."""
    common = sorted(ours.keys() & theirs.keys())
    if common:
        return _paired([ours[seed] - theirs[seed] for seed in common])
    return _welch(list(ours.values()), list(theirs.values()))


def ratio(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference:
    """ours over theirs, less 1: the interval is that of the difference of logarithms. Values must be above 0."""
    logs = difference(*({seed: math.log(value) for seed, value in side.items()} for side in (ours, theirs)))
    mean, low, high = (None if one is None else math.expm1(one) for one in (logs.mean, logs.low, logs.high))
    return Difference(mean, low, high, logs.seeds, logs.is_paired)


def _paired(differences: Sequence[float]) -> Difference:
    count, mean = len(differences), statistics.mean(differences)
    error = statistics.stdev(differences) / math.sqrt(count) if count > 1 else 0.0
    if error < ROUNDING:
        return Difference(mean, None, None, count, is_paired=True)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * error
    return Difference(mean, mean - half, mean + half, count, is_paired=True)


def _welch(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Welch's, with the degrees of freedom of Welch and Satterthwaite."""
    mean, fewest = statistics.mean(ours) - statistics.mean(theirs), min(len(ours), len(theirs))
    squares = [statistics.variance(side) / len(side) if fewest > 1 else 0.0 for side in (ours, theirs)]
    total = sum(squares)
    if total < ROUNDING**2:
        return Difference(mean, None, None, fewest, is_paired=False)
    freedom = total**2 / sum(v**2 / (len(side) - 1) for v, side in zip(squares, (ours, theirs), strict=True))
    half = stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * math.sqrt(total)
    return Difference(mean, mean - half, mean + half, fewest, is_paired=False)
