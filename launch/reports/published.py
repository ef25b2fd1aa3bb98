"""The paper's numbers, as its authors published them; nothing here was measured by us.

Sources: the paper (arXiv 1911.08630; its later version calls CUP-SS CUP-RF, for retrain-free), the authors' slides, and
the notebooks that they released (public repository duggalrahul/CUP_Public). Accuracies in percent, changes in points
against the dense network, FLOPs in the paper's counting.
"""

import re
from dataclasses import dataclass
from typing import Generic, TypeVar

Number = TypeVar("Number")


@dataclass(frozen=True, kw_only=True)
class Measures(Generic[Number]):
    """What can be said of a result in numbers, published ones and ours; None is what nobody knows."""

    reduction: Number | None = None
    """FR in the paper's counting."""
    top1: Number | None = None
    top5: Number | None = None
    change1: Number | None = None
    change5: Number | None = None
    hours: Number | None = None
    """GPU hours of training."""
    saving: Number | None = None
    """Percent of the dense network's hours."""
    gflops: Number | None = None
    """Of one image."""


@dataclass(frozen=True, kw_only=True)
class Result(Measures[float]):
    """One published result. network: the name of our model."""

    network: str
    method: str
    setting: str = ""
    source: str


@dataclass(frozen=True)
class DataSet:
    """What a table was measured on. folder: a regular expression for names of its folder; images: of training."""

    name: str
    folder: str
    images: int

    def is_that_of(self, folder: str | None, images: int) -> bool:
        """Whether a run trained on it, all of it: on a part, accuracies do not compare. An old log has no `folder`."""
        return images == self.images and (folder is None or re.search(self.folder, folder.lower()) is not None)


@dataclass(frozen=True)
class Table:
    """A published table. title: with data set and hardware."""

    title: str
    data: DataSet
    results: tuple[Result, ...]


def _measured(network: str, source: str, *rows: tuple) -> tuple[Result, ...]:
    """rows: (method, setting, FR, top-1, top-5, GFLOPs, GPU hours), the last ones may be missing.

    The first is the dense network: changes follow from it, and FR, where it was not published.
    """
    names = ("method", "setting", "reduction", "top1", "top5", "gflops", "hours")
    results = [dict(zip(names, row, strict=False)) for row in rows]
    dense = results[0]
    for result in results:
        if result.get("reduction") is None and result.get("gflops"):
            result["reduction"] = dense["gflops"] / result["gflops"]
        if result is not dense:
            result |= {f"change{k}": _difference(result.get(f"top{k}"), dense.get(f"top{k}")) for k in (1, 5)}
    return tuple(Result(network=network, source=source, **result) for result in results)


def _difference(value: float | None, dense: float | None) -> float | None:
    return None if value is None or dense is None else value - dense


def _listed(network: str, source: str, columns: str, *rows: tuple) -> tuple[Result, ...]:
    """Results as they are printed. columns: the fields that each row gives, in order."""
    return tuple(Result(network=network, source=source, **dict(zip(columns.split(), row, strict=True))) for row in rows)


ON_IMAGENET = DataSet("ImageNet", "imagenet", 1_281_167)
ON_CIFAR10 = DataSet("CIFAR-10", r"cifar[-_]?10(?!\d)", 50_000)

IMAGENET = Table(
    "ResNet-50 on ImageNet with training time, 3 Titan Xp, fp32, 90 epochs of batch 256",
    ON_IMAGENET,
    _measured(
        "resnet50",
        "paper",
        ("dense", "", 1.0, 75.86, 92.87, 8.21, 66.0),
        ("CUP", "t 0.65", 2.18, 75.07, 92.30, 3.76),
        ("CUP", "t 0.675", 2.32, 74.73, 92.14, 3.53),
        ("CUP", "t 0.70", 2.47, 74.60, 92.06, 3.33),
        ("CUP", "t 0.725", 2.64, 74.42, 91.74, 3.11),
        ("CUP-SS", "k 0.03, b 0.3, stop at 3.81 GFLOPs", 2.20, 74.40, 91.99, 3.74, 54.48),
        ("CUP-SS", "k 0.03, b 0.4", None, 74.31, 92.10, 3.80),
        ("CUP-SS", "k 0.03, b 0.5", None, 74.39, 91.94, 3.72),
    )
    + _listed(
        "resnet50",
        "slides",
        "method setting reduction top1 hours",
        ("CUP-RF", "no retraining", 2.21, 74.34, 51.6),
        ("SFP", "no retraining", 1.73, 74.01, 61.8),
        ("GM", "no retraining", 2.15, 74.13, 62.2),
    ),
)

DROP_COLUMNS = "method setting reduction change1 change5"
DROPS = Table(
    "Change of accuracy on ImageNet against each method's own dense network",
    ON_IMAGENET,
    _listed(
        "resnet18",
        "slides",
        DROP_COLUMNS,
        ("GM", "retrained", 1.71, -1.87, -1.15),
        ("COP", "retrained", 1.75, -2.48, None),
        ("CUP", "retrained", 1.75, -1.00, -0.79),
        ("SFP", "no retraining", 1.71, -3.18, -1.85),
        ("GM", "no retraining", 1.71, -2.47, -1.52),
        ("CUP-RF", "no retraining", 1.75, -2.37, -1.40),
    )
    + _listed(
        "resnet34",
        "slides",
        DROP_COLUMNS,
        ("L1", "retrained", 1.31, -1.06, None),
        ("GM", "retrained", 1.69, -1.29, -0.54),
        ("CUP", "retrained", 1.78, -0.86, -0.53),
        ("SFP", "no retraining", 1.69, -2.09, -1.29),
        ("GM", "no retraining", 1.69, -2.13, -0.92),
        ("CUP-RF", "no retraining", 1.71, -1.61, -0.89),
    )
    + _listed(
        "resnet50",
        "slides",
        DROP_COLUMNS,
        ("SFP", "retrained", 2.15, -14.0, -8.20),
        ("MetaPruning", "retrained", 2.05, -1.20, None),
        ("CUP", "retrained", 2.47, -1.17, -0.81),
        ("SFP", "no retraining", 1.71, -1.54, -0.81),
        ("GM", "no retraining", 2.15, -2.02, -0.93),
        ("CUP-RF", "no retraining", 2.20, -1.47, -0.88),
    ),
)

NOTEBOOKS = Table(
    "ResNet-18 and ResNet-34 on ImageNet",
    ON_IMAGENET,
    _measured(
        "resnet18",
        "notebook",
        ("dense", "", 1.0, 69.88, 89.26, 3.64),
        ("CUP", "t 0.8", None, 68.88, 88.47, 2.08),
        ("CUP", "t 0.825", None, 68.29, 88.15, 1.97),
        ("CUP-SS", "k 0.03, b 0.3, stop at 2.12 GFLOPs", None, 67.38, 87.86, 2.09),
        ("CUP-SS", "k 0.03, b 0.4", None, 66.86, None, 1.92),
        ("CUP-SS", "k 0.03, b 0.5", None, 67.24, None, 1.99),
    )
    + _measured(
        "resnet34",
        "notebook",
        ("dense", "", 1.0, 73.59, 91.44, 7.34),
        ("CUP", "t 0.60", None, 72.73, 90.91, 4.12),
        ("CUP", "t 0.65", None, 71.99, None, 3.53),
        ("CUP", "t 0.675", None, 71.65, None, 3.20),
        ("CUP", "t 0.70", None, 71.15, None, 2.88),
        ("CUP-SS", "k 0.03, b 0.3", None, 71.98, 90.42, 4.30),
        ("CUP-SS", "k 0.03, b 0.4, stop at 4.34 GFLOPs", None, 71.69, 90.28, 4.27),
    ),
)

CIFAR10 = Table(
    "ResNet-56 and VGG-16 on CIFAR-10, one GPU, 160 epochs of batch 64",
    ON_CIFAR10,
    _measured(
        "resnet56_cifar",
        "notebook",
        ("dense", "", 1.0, 93.67, None, 0.25),
        ("CUP", "t 0.80", None, 93.27, None, 0.09),
        ("CUP", "t 0.825", None, 92.60, None, 0.08),
        # stop at 0.12 GFLOPs: what was reached is not published
        ("CUP-SS", "k 0.005, b 0, stop at 0.12 GFLOPs, 5,079 s", None, 93.21, None, None, 5079 / 3600),
        ("CUP-SS", "k 0.01, b 0, stop at 0.12 GFLOPs, 4,845 s", None, 93.26, None, None, 4845 / 3600),
        ("CUP-SS", "k 0.015, b 0, stop at 0.12 GFLOPs, 4,861 s", None, 92.98, None, None, 4861 / 3600),
        ("CUP-SS", "k 0.02, b 0, stop at 0.12 GFLOPs, 4,836 s", None, 93.36, None, None, 4836 / 3600),
        ("CUP-SS", "k 0.03, b 0, stop at 0.12 GFLOPs, 4,743 s", None, 92.80, None, None, 4743 / 3600),
        ("CUP-SS", "k 0.05, b 0, stop at 0.12 GFLOPs, 4,781 s", None, 92.89, None, None, 4781 / 3600),
    )
    + _measured(
        "vgg16_cifar",
        "notebook",
        ("dense", "", 1.0, 93.64, None, 0.63),
        ("CUP", "t 0.90", None, 93.55, None, 0.21),
        ("CUP", "t 0.95", None, 92.94, None, 0.17),
        ("CUP-SS", "k 0.02", None, 93.15, None, 0.20),
        ("CUP-SS", "k 0.035", None, 93.24, None, 0.20),
    ),
)

TABLES = (IMAGENET, DROPS, NOTEBOOKS, CIFAR10)

NOTES = (
    "FR of a row without one in its source is the dense network's published GFLOPs over the row's; CIFAR-10's have two "
    "decimals, so that such an FR is right to about 8%.",
    "Without any retraining, one cut of ResNet-50 at t 0.65 leaves a top-1 of 0.156%.",
    "PruneTrain (arXiv 1901.09290), the nearest rival for time: its abstract reports ResNet-50 on ImageNet with 40% "
    "fewer training FLOPs and 39% less training time.",
)
