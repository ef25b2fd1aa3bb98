"""A device from timed layers: the few numbers with which the cost model comes nearest to the clock."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

from cup.cost.devices import KERNELS, Device, Rate
from cup.cost.seconds import kernel_seconds
from cup.errors import CupError

GRANULARITIES = (1, 8, 16, 32, 64)
"""Those that are tried; of equally good ones the smallest is taken."""

NO_LIMIT = 1e18
"""The rate of what takes no time, a second."""

STANDING_IN = {"attention": "linear", "wide_grouped": "grouped", "dropout": "unary", "norm": "batch_norm"}
"""Kinds that may not be timed, and those whose rates they have then."""


@dataclass(frozen=True)
class TimedKernel:
    """One kernel as it was timed.

    kernel: of `KERNELS`. reads, writes: its channels; 1 where the operations do not grow with them. flops: for each
    pair of them. moved: bytes.
    """

    kernel: str
    reads: int
    writes: int
    flops: float
    moved: float
    seconds: float


def fit_device(
    name: str, precision: str, timed: Sequence[TimedKernel], launch_s: float, overlap: float, source: str
) -> Device:
    """The device whose kernels come nearest to the timed ones, relative to their times.

    launch_s, overlap: as of `Device`. Kinds that were not timed take the rates of others that are like them.
    Raises CupError for timed kernels without those that all networks have.
    """
    if missing := {"conv", "pointwise", "linear", "batch_norm", "unary"} - {one.kernel.split(".")[0] for one in timed}:
        raise CupError(f"no timed kernel of {', '.join(sorted(missing))}: a device cannot be fitted")
    best, least = None, np.inf
    for granularity in GRANULARITIES:
        fits = {
            kernel: _fit([one for one in timed if one.kernel == kernel], granularity, launch_s, overlap)
            for kernel in {one.kernel for one in timed}
        }
        error = sum(error for _, error in fits.values())
        if error < 0.99 * least:
            rates = _complete({kernel: rate for kernel, (rate, _) in fits.items()})
            best, least = Device(name, precision, rates, launch_s, granularity, source, overlap), error
    return best


def _fit(timed: Sequence[TimedKernel], granularity: int, launch_s: float, overlap: float) -> tuple[Rate, float]:
    """The two rates of one kind of kernel, and the sum of the errors: |log of modelled over timed|."""
    flops = np.array(
        [one.flops * _rounded(one.reads, granularity) * _rounded(one.writes, granularity) for one in timed]
    )
    moved, seconds = np.array([one.moved for one in timed]), np.array([one.seconds for one in timed])

    def misses(logs: np.ndarray) -> np.ndarray:
        computing, moving = flops / np.exp(logs[0]), moved / np.exp(logs[1])
        return np.log(kernel_seconds(computing, moving, launch_s, overlap) / seconds)

    fastest = [np.log(np.max(one / seconds)) if one.any() else np.log(NO_LIMIT) for one in (flops, moved)]
    starts = [(fastest[0] + a, fastest[1] + b) for a in (0.0, 1.5) for b in (0.0, 1.5)]
    # A loss that grows slowly: one layer that falls out of line (a slow path of the library) does not bend the rest.
    found = [least_squares(misses, start, loss="soft_l1", f_scale=0.1) for start in starts]
    logs = np.minimum(min(found, key=lambda one: one.cost).x, np.log(NO_LIMIT))
    return Rate(*np.exp(logs).tolist()), float(np.abs(misses(logs)).sum())


def _rounded(width: int, granularity: int) -> int:
    return 1 if width == 1 else -(-width // granularity) * granularity


def _complete(rates: dict[str, Rate]) -> dict[str, Rate]:
    """The rates of all kernels: what was not timed takes those of a kind that is like it, or of the copies."""
    complete = {}
    for kernel in KERNELS:
        kind, _, phase = kernel.partition(".")
        alike = (kernel, f"{STANDING_IN.get(kind, kind)}.{phase}", f"unary.{phase}", "unary.forward")
        complete[kernel] = next(rates[one] for one in alike if one in rates)
    return complete
