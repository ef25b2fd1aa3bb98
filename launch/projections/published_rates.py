"""Images a second that others have measured on named devices, to hold the cost model against.

Sources, all as of November 2026:

nvidia: NVIDIA/DeepLearningExamples, PyTorch/Classification/ConvNets/resnet50v1.5/README.md: DGX A100 80 GB, one GPU,
    with DALI; T4, inference.
timm: huggingface/pytorch-image-models, results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv and
    benchmark-infer-amp-nhwc-pt240-cu124-rtx4090.csv: fp16 by autocast, channels last, made batches.
timm#1491: its issue 1491, the same benchmark on an A100 (container 22.04).
paddle#1672: PaddlePaddle/benchmark, pull request 1672: timm's trainer, PyTorch 2.0, one A100, with its loader.
milabench: mila-iqia/milabench, README.md: A100, made batches from the host, each step waited for.

MXNet's 3,410 img/s on an A100 (docs/performance.md) is no PyTorch and is left out. For an H100 none were found.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PublishedRate:
    """One measurement. network: as in model.name. fused: whether it was compiled. images_per_s: of one device."""

    source: str
    device: str
    network: str
    images_per_s: float
    batch_size: int
    precision: str = "fp16"
    training: bool = True
    fused: bool = False


def _a100(source: str, images_per_s: float, batch_size: int, **more: object) -> PublishedRate:
    values = {"network": "resnet50", "precision": "fp16"} | more
    return PublishedRate(source=source, device="a100", images_per_s=images_per_s, batch_size=batch_size, **values)


def _t4(images_per_s: float, precision: str) -> PublishedRate:
    return PublishedRate(
        source="nvidia",
        device="t4",
        network="resnet50",
        images_per_s=images_per_s,
        batch_size=256,
        precision=precision,
        training=False,
    )


# network -> (batch size, images a second)
_TIMM_TRAINING = {
    "resnet18": (512, 3481.78),
    "mobilenet_v3_large": (512, 2732.43),
    "mobilenet_v2": (512, 2313.1),
    "resnet34": (512, 2036.51),
    "efficientnet_b0": (512, 1751.72),
    "resnet50": (512, 1218.01),
    "resnext50_32x4d": (384, 1001.03),
    "densenet121": (256, 913.65),
    "convnext_tiny": (256, 819.24),
    "resnet101": (256, 747.89),
    "regnet_x_1_6gf": (512, 682.73),
    "wide_resnet50_2": (384, 668.78),
    "regnet_y_1_6gf": (512, 650.07),
    "vgg16": (384, 546.06),
    "resnet152": (192, 501.44),
}
_TIMM_INFERENCE = {
    "resnet18": 18247.43,
    "mobilenet_v3_large": 16891.88,
    "mobilenet_v2": 11768.03,
    "resnet34": 11246.05,
    "efficientnet_b0": 9831.68,
    "regnet_x_1_6gf": 6438.32,
    "regnet_y_1_6gf": 5793.48,
    "resnet50": 5088.39,
    "convnext_tiny": 4844.53,
    "resnext50_32x4d": 4219.51,
    "densenet121": 3896.08,
    "resnet101": 3320.94,
    "wide_resnet50_2": 3280.9,
    "vgg16": 2904.86,
    "resnet152": 2347.77,
}

PUBLISHED_RATES = (
    _a100("nvidia", 2470, 256),
    _a100("nvidia", 938, 256, precision="fp32"),
    _a100("timm#1491", 2600, 512),
    _a100("paddle#1672", 2035, 256),
    _a100("paddle#1672", 2050, 256, fused=True),
    _a100("milabench", 1164, 256),
    _a100("milabench", 322, 128, network="convnext_large"),
    _a100("milabench", 119, 64, network="regnet_y_128gf"),
    _t4(415, "fp32"),
    _t4(1198, "fp16"),
    *(
        PublishedRate(source="timm", device="rtx-3090", network=name, images_per_s=rate, batch_size=batch_size)
        for name, (batch_size, rate) in _TIMM_TRAINING.items()
    ),
    *(
        PublishedRate(source="timm", device="rtx-4090", network=name, images_per_s=rate, batch_size=512, training=False)
        for name, rate in _TIMM_INFERENCE.items()
    ),
)
