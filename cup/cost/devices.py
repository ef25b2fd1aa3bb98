"""What a device is to the cost model: a few rates. Named devices by their data sheets.

Sources of the peaks (dense, without sparsity): NVIDIA's data sheets of H100 (SXM: 989.4 TFLOP/s in bf16 and fp16,
494.7 in TF32, 66.9 in fp32, 3.35 TB/s; PCIe: 756, 378, 51, 2.0), H200 (as H100 SXM, 4.8 TB/s), A100 80 GB (312, 156,
19.5, 2.04), L4 (121, 60, 30.3, 0.3), L40S (362, 183, 91.6, 0.864), T4 (65 in fp16, 8.1 in fp32, 0.32); the Ada white
paper for the RTX 4090 (165.2, 82.6, 82.6, 1.008), the GA102 white paper for the RTX 3090 (71, 35.6, 35.6, 0.936); the
product page of the Titan Xp (12.15 in fp32, 0.548).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cup.errors import CupError

ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Precision -> bytes of an activation."""

PRODUCT_KINDS = ("conv", "pointwise", "grouped", "wide_grouped", "linear", "attention")
"""Matrix products: convolutions with a window, of 1 x 1, grouped and depthwise ones with windows of up to 9 entries and
of more, linear layers, attention."""
TRAFFIC_KINDS = ("batch_norm", "norm", "unary", "binary", "dropout", "pool", "reduce", "copy")
"""What mostly moves memory: batch norm, other norms and softmax, activations, additions and products of two tensors,
dropout, pooling, means, concatenations and the like."""
KERNELS = (
    *(f"{kind}.{phase}" for kind in PRODUCT_KINDS for phase in ("forward", "input", "weight")),
    *(f"{kind}.{phase}" for kind in TRAFFIC_KINDS for phase in ("forward", "backward")),
    "optimizer",
)
"""The kinds of kernels; backward, a product has one for the gradient of its input and one for that of its weight."""


@dataclass(frozen=True)
class Rate:
    """Floating-point operations and bytes a second."""

    flops_per_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class Device:
    """One device in one precision.

    A kernel needs three times: for its operations at the rate of its kind, for its bytes, and for its launch. It takes
    the longest of them and what the others are not hidden behind it.

    rates: kernel (of `KERNELS`) -> what it reaches. launch_s: of any kernel.
    overlap: 1 = it takes the longest of the three, as on a GPU whose queue is full; 0 = their sum, as on a CPU.
    granularity: widths in multiples of it pay; a matrix product of any other width takes as long as one of the next.
    source: where the numbers come from.
    """

    name: str
    precision: str
    rates: Mapping[str, Rate]
    launch_s: float
    granularity: int
    source: str
    overlap: float = 1.0

    def __post_init__(self) -> None:
        """Raises CupError naming what is missing or out of range."""
        require_precision(self.precision)
        if missing := [kernel for kernel in KERNELS if kernel not in self.rates]:
            raise CupError(f"device {self.name}: no rate for {missing[0]}; needed: {', '.join(KERNELS)}")
        numbers = [n for rate in self.rates.values() for n in (rate.flops_per_s, rate.bytes_per_s)]
        checks = [
            ("rates", all(number > 0 for number in numbers), "numbers above 0"),
            ("launch_s", self.launch_s >= 0, "a number from 0"),
            ("granularity", self.granularity >= 1, "a whole number from 1"),
            ("overlap", 0 <= self.overlap <= 1, "from 0 to 1"),
        ]
        for name, ok, allowed in checks:
            if not ok:
                raise CupError(f"device {self.name}, {name}: found {getattr(self, name)}, allowed: {allowed}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON and a checkpoint can hold."""
        return asdict(self) | {"rates": {name: asdict(rate) for name, rate in self.rates.items()}}

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> "Device":
        """The device that `to_dict` gave. Raises KeyError, TypeError or CupError for anything else."""
        if not isinstance(content["rates"], Mapping):
            raise TypeError(f"rates: found {content['rates']!r}, allowed: a rate for each kernel")
        rates = {name: Rate(**rate) for name, rate in content["rates"].items()}
        return Device(**{**content, "rates": rates})


@dataclass(frozen=True)
class DataSheet:
    """A named device.

    matrix: precision -> TFLOP/s of matrix products, sustained. vector: TFLOP/s of its plain fp32 units, sustained.
    bandwidth: TB/s, sustained. peaks: what the sustained numbers are a part of, for people.
    """

    matrix: Mapping[str, float]
    vector: float
    bandwidth: float
    granularity: int
    peaks: str

    def device(self, name: str, precision: str) -> Device:
        """Raises CupError for a precision that the device does not have."""
        require_precision(precision)
        if precision not in self.matrix:
            raise CupError(f"precision: found {precision}, but {name} has: {', '.join(self.matrix)}")
        matrix = Rate(1e12 * self.matrix[precision], 1e12 * self.bandwidth)
        vector = Rate(1e12 * self.vector, 1e12 * self.bandwidth)
        is_matrix = {kernel: kernel.startswith(("conv.", "pointwise.", "linear.", "attention.")) for kernel in KERNELS}
        backward = Rate(vector.flops_per_s, GROUPED_BACKWARD * vector.bytes_per_s)
        rates = {kernel: matrix if is_matrix[kernel] else vector for kernel in KERNELS}
        rates |= {kernel: backward for kernel in KERNELS if "grouped." in kernel and not kernel.endswith("forward")}
        return Device(name, precision, rates, LAUNCH_S, self.granularity, self.peaks)


GROUPED_BACKWARD = 0.2
"""The part of the bandwidth that gradients of depthwise and grouped convolutions reach: fitted to the training rates
of four networks with depthwise convolutions that timm published for an RTX 3090 (`launch/bench.py rates`)."""

LAUNCH_S = 5e-6
"""The least that a kernel takes on a GPU that is fed eagerly: an assumption, of the order that profilers show."""


def _tensor_cores(matrix_16: float, tf32: float, vector: float, bandwidth: float, peaks: str) -> DataSheet:
    """fp32 means what PyTorch does with it: convolutions in TF32."""
    return DataSheet({"fp32": tf32, "bf16": matrix_16, "fp16": matrix_16}, vector, bandwidth, 8, peaks)


# Sustained: about half of the tensor cores' peak (A100: 60%, which its large matrix products reach; RTX cards 80%, for
# their peaks are those of a lower clock than they run at; L4 and T4 are held back by 70 watts), half of the plain
# units' and 85 to 90% of the bandwidth's. Depthwise convolutions do not run on tensor cores. The numbers of H100 SXM,
# A100 and Titan Xp are those of an earlier model that came between two published training rates of ResNet-50 on A100;
# those of the RTX cards were set by published rates (docs/performance.md, `launch/bench.py rates`).
DEVICES: dict[str, DataSheet] = {
    "h100-sxm": _tensor_cores(480, 240, 33, 3.0, "989 TFLOP/s bf16, 495 TF32, 67 fp32, 3.35 TB/s"),
    "h100-pcie": _tensor_cores(367, 183, 25, 1.8, "756 TFLOP/s bf16, 378 TF32, 51 fp32, 2.0 TB/s"),
    "h200": _tensor_cores(480, 240, 33, 4.3, "989 TFLOP/s bf16, 495 TF32, 67 fp32, 4.8 TB/s"),
    "a100": _tensor_cores(190, 95, 9.7, 1.7, "312 TFLOP/s bf16, 156 TF32, 19.5 fp32, 2.04 TB/s (80 GB)"),
    "l4": _tensor_cores(55, 27, 15, 0.26, "121 TFLOP/s bf16, 60 TF32, 30 fp32, 0.30 TB/s"),
    "l40s": _tensor_cores(180, 90, 45, 0.76, "362 TFLOP/s bf16, 183 TF32, 92 fp32, 0.864 TB/s"),
    "rtx-4090": _tensor_cores(130, 65, 41, 0.9, "165 TFLOP/s bf16 (fp32 sums), 83 TF32, 83 fp32, 1.01 TB/s"),
    "rtx-3090": _tensor_cores(56, 28, 18, 0.84, "71 TFLOP/s bf16 (fp32 sums), 36 TF32, 36 fp32, 0.936 TB/s"),
    "t4": DataSheet({"fp16": 26, "fp32": 5}, 4, 0.26, 8, "65 TFLOP/s fp16, 8.1 fp32, 0.32 TB/s"),
    "titan-xp": DataSheet({"fp32": 10}, 6, 0.45, 8, "12.15 TFLOP/s fp32, 0.548 TB/s"),
}
"""Name -> data sheet."""


def named_device(name: str, precision: str) -> Device:
    """Raises CupError for an unknown name, or a precision that the device does not have."""
    if name not in DEVICES:
        raise CupError(f"device: found {name!r}, allowed: {', '.join(DEVICES)}, or a cup.Device of your own")
    return DEVICES[name].device(name, precision)


def require_precision(precision: str) -> None:
    """Raises CupError for an unknown one."""
    if precision not in ELEMENT_BYTES:
        raise CupError(f"precision: found {precision!r}, allowed: {', '.join(ELEMENT_BYTES)}")
