"""Seconds of a training step, or of inference, as a function of the widths.

Shape suffixes: K kernels, A axes, G groups.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy.sparse import csr_array
from torch import nn

from cup.cost.devices import ELEMENT_BYTES, Device, named_device
from cup.cost.kernels import Work, counts, kernels_of, occurrences
from cup.errors import CupError
from cup.tracing.groups import ChannelGroup, is_within


def device_cost(
    device: str | Device, *, precision: str | None = None, batch_size: int, training: bool = True, fused: bool = False
) -> "DeviceCost":
    """The cost model of one device.

    device: a name in `DEVICES`, or one that was measured (train/network/calibration.py).
    precision: fp32, bf16 or fp16; None: that of a measured device, bf16 of a named one. batch_size: of the device, not
        of all together. training: a whole step, forward, backward and optimizer; False: one forward pass in
        evaluation. fused: as compiled code runs it, see cup/cost/kernels.py.
    Raises CupError for an unknown device, a precision that it does not have, or a batch below 1.
    """
    if isinstance(device, str):
        device = named_device(device, precision or "bf16")
    elif precision not in (None, device.precision):
        raise CupError(f"precision: found {precision}, but {device.name} was measured in {device.precision}")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise CupError(f"batch_size: found {batch_size!r}, allowed: a whole number from 1")
    return DeviceCost(device, batch_size, training, fused)


@dataclass(frozen=True)
class DeviceCost:
    """What a training step, or inference, takes on a device: a cost that `plan_by_time` can spend.

    Not in it: waiting for data, all-reduce between devices, the loss.
    """

    device: Device
    batch_size: int
    training: bool = True
    fused: bool = False

    unit = "s"

    @property
    def granularity(self) -> int:
        """Widths in multiples of it pay."""
        return self.device.granularity

    def of(self, model: nn.Module, groups: Sequence[ChannelGroup]) -> "StepSeconds":
        """The cost of this network at any widths, for images as large as those of the groups' trace.

        model: only read. groups: from `channel_groups(model)`, at the model's widths.
        """
        return StepSeconds(self, model, groups)


class StepSeconds:
    """One network's seconds by widths. Built once for many plans."""

    def __init__(self, cost: DeviceCost, model: nn.Module, groups: Sequence[ChannelGroup]) -> None:
        if not groups:
            raise CupError("no channel groups: the cost of a network is that of its traced operations")
        network, device = groups[0].network, cost.device
        self._cost, self._model, self._groups = cost, model, tuple(groups)
        work = kernels_of(model, network, training=cost.training, fused=cost.fused)
        self.kinds = tuple(kernel.kind for kernel in work.kernels)
        self._modules = work.modules
        self._rows_in: dict[str, np.ndarray] = {}
        self._names = {group.name: index for index, group in enumerate(groups)}
        self._widths_G = np.array([group.width for group in groups], dtype=np.float64)
        self._counts_A = counts(work.axes, network.alive)
        self._full_A = counts(work.axes, np.ones_like(network.alive))
        numbers = {group.name: group.numbers for group in groups}
        self._occurrences_AG = occurrences(work.axes, numbers, network.alive)
        can_go_A = np.array([axis.numbers is not None for axis in work.axes])
        self._step_A = np.where(can_go_A, device.granularity, 1)  # what stays as it is costs what it has
        self._device = device
        self._set_kernels(work, cost)

    def _set_kernels(self, work: Work, cost: DeviceCost) -> None:
        rates, size = [cost.device.rates[kernel.kind] for kernel in work.kernels], ELEMENT_BYTES[cost.device.precision]
        flops_per_s_K = np.array([rate.flops_per_s for rate in rates])
        bytes_per_s_K = np.array([rate.bytes_per_s for rate in rates])
        self._reads_K = np.array([kernel.reads for kernel in work.kernels])
        self._writes_K = np.array([kernel.writes for kernel in work.kernels])
        self._per_pair_K = cost.batch_size * np.array([kernel.flops for kernel in work.kernels]) / flops_per_s_K
        weight_bytes_K = np.array(
            [kernel.weights * (1 if kernel.kind == "optimizer" else size) for kernel in work.kernels]
        )
        self._weights_K = weight_bytes_K / bytes_per_s_K
        entries = [
            (row, axis, cost.batch_size * size * each / bytes_per_s_K[row])
            for row, kernel in enumerate(work.kernels)
            for axis, each in kernel.elements
        ]
        rows, columns, values = zip(*entries, strict=True)
        shape = (len(work.kernels), len(work.axes))
        self._traffic_KA = csr_array((values, (rows, columns)), shape=shape)
        touches_KA = abs(self._traffic_KA).toarray() > 0
        touches_KA[np.arange(len(rates)), self._reads_K] = True
        touches_KA[np.arange(len(rates)), self._writes_K] = True
        self._rows_of = {
            name: np.flatnonzero(touches_KA[:, self._occurrences_AG[:, index] > 0].any(axis=1))
            for name, index in self._names.items()
        }
        rows_KG = np.zeros((len(rates), len(self._names)), dtype=bool)
        for name, rows in self._rows_of.items():
            rows_KG[rows, self._names[name]] = True
        names = np.array(list(self._names))
        self._neighbours = {name: names[rows_KG[rows].any(axis=0)].tolist() for name, rows in self._rows_of.items()}
        self._traffic_of = {name: self._traffic_KA[rows] for name, rows in self._rows_of.items()}

    @cached_property
    def full(self) -> float:
        """At the widths of the trace, before any cut, with the blocks that have been dropped since."""
        network = self._groups[0].network
        if network.dense is None:
            return float(self._seconds(self._full_A).sum())
        groups = [replace(group, network=network.before_drops) for group in self._groups]
        before = StepSeconds(self._cost, self._model, groups)
        return float(before._seconds(before._full_A).sum())

    @property
    def now(self) -> float:
        """At the widths of the groups."""
        return float(self._seconds(self._counts_A).sum())

    def at(self, widths: Mapping[str, int], dropped: Collection[str] = ()) -> float:
        """Where these groups have so many channels, whichever they are; those not named keep their width.

        dropped: names of residual blocks that are their shortcut; what `widths` says of their groups does not count.
        """
        seconds_K = self._seconds(self._counts(widths))
        return float(seconds_K.sum() - seconds_K[self._rows_within(dropped)].sum())

    def _rows_within(self, blocks: Collection[str]) -> np.ndarray:
        """int64: the kernels that these blocks have run, each once."""
        for block in blocks:
            if block not in self._rows_in:
                inside = [is_within(module, block) for module in self._modules]
                self._rows_in[block] = np.flatnonzero(inside)
        return np.unique(np.concatenate([np.empty(0, np.int64), *(self._rows_in[block] for block in blocks)]))

    def by_kind(self, widths: Mapping[str, int]) -> dict[str, float]:
        """Kernel kind -> seconds of all its kernels."""
        found: dict[str, float] = {}
        for kind, seconds in zip(self.kinds, self._seconds(self._counts(widths)).tolist(), strict=True):
            found[kind] = found.get(kind, 0.0) + seconds
        return found

    def walk(self, widths: Mapping[str, int]) -> "Walk":
        """Steps from these widths on, each at the price of the kernels that it changes."""
        return Walk(self, widths)

    def _counts(self, widths: Mapping[str, int]) -> np.ndarray:
        counts_A = self._counts_A.copy()
        for name, width in widths.items():
            index = self._names[name]
            counts_A += self._occurrences_AG[:, index] * (width - self._widths_G[index])
        return counts_A

    def _seconds(self, counts_A: np.ndarray, group: str | None = None) -> np.ndarray:
        """Of every kernel, or of those alone that this group's width changes."""
        rows = slice(None) if group is None else self._rows_of[group]
        traffic_KA = self._traffic_KA if group is None else self._traffic_of[group]
        rounded_A = np.ceil(counts_A / self._step_A - 1e-9) * self._step_A
        reads_K, writes_K = self._reads_K[rows], self._writes_K[rows]
        computing_K = self._per_pair_K[rows] * rounded_A[reads_K] * rounded_A[writes_K]
        moving_K = traffic_KA @ counts_A + self._weights_K[rows] * counts_A[reads_K] * counts_A[writes_K]
        return kernel_seconds(computing_K, moving_K, self._device.launch_s, self._device.overlap)


def kernel_seconds(computing: np.ndarray, moving: np.ndarray, launch_s: float, overlap: float) -> np.ndarray:
    """What kernels take that compute and move for so long: the longest, and what is not hidden of the others."""
    longest = np.maximum(np.maximum(computing, moving), launch_s)
    return longest + (1 - overlap) * (computing + moving + launch_s - longest)


class Walk:
    """Widths that change one group at a time, and blocks that go. cost: at the current widths."""

    def __init__(self, seconds: StepSeconds, widths: Mapping[str, int]) -> None:
        self._seconds = seconds
        self.widths = dict(widths)
        self._counts_A = seconds._counts(widths)
        self._runs_K = np.ones(len(seconds.kinds), dtype=bool)  # False for the kernels of dropped blocks
        self.cost = float(seconds._seconds(self._counts_A).sum())

    def after(self, name: str, width: int) -> float:
        """The cost if this group had so many channels."""
        runs = self._runs_K[self._seconds._rows_of[name]]
        before, after = (self._seconds._seconds(one, name)[runs] for one in (self._counts_A, self._moved(name, width)))
        return self.cost + float(after.sum() - before.sum())

    def move(self, name: str, width: int) -> None:
        """Give the group so many channels."""
        self.cost = self.after(name, width)
        self._counts_A = self._moved(name, width)
        self.widths[name] = width

    def after_drop(self, block: str) -> float:
        """The cost if this residual block were its shortcut."""
        rows = self._seconds._rows_within([block])
        rows = rows[self._runs_K[rows]]
        return self.cost - float(self._seconds._seconds(self._counts_A)[rows].sum())

    def drop(self, block: str) -> None:
        """Take the block out."""
        self.cost = self.after_drop(block)
        self._runs_K[self._seconds._rows_within([block])] = False

    def neighbours(self, name: str) -> Collection[str]:
        """The groups that share a kernel with this one; itself is one of them."""
        return self._seconds._neighbours[name]

    def _moved(self, name: str, width: int) -> np.ndarray:
        seconds, index = self._seconds, self._seconds._names[name]
        before = self.widths.get(name, seconds._widths_G[index])
        return self._counts_A + seconds._occurrences_AG[:, index] * (width - before)
