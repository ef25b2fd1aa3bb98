"""Networks by name: torchvision's, timm's, and the paper's small ones.

torchvision and timm are imported where one of their networks is asked for.
"""

from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn

from cup.errors import CupError


def build_network(name: str, num_classes: int, image_size: int | None = None) -> nn.Module:
    """A freshly initialised classifier for `num_classes`.

    name: a classification model of torchvision (`resnet50`), `timm:NAME`, or one of `lenet`, `mlp` (28 x 28 grey),
        `vgg16_cifar`, `resnet20_cifar`, `resnet32_cifar`, `resnet44_cifar`, `resnet56_cifar` (32 x 32).
    image_size: side of its images, pixels, which only torchvision's ViT has to know; 224 if not given.
    Raises CupError for an unknown name.
    """
    check_network_name(name)
    if name in OWN_MODELS:
        return OWN_MODELS[name](num_classes)
    if name.startswith("timm:"):
        return _timm().create_model(name.removeprefix("timm:"), num_classes=num_classes)
    options: dict[str, object] = {}
    # Their auxiliary heads return several logits, which training has no loss for.
    if name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": True}
    if name.startswith("vit_") and image_size is not None:
        options["image_size"] = image_size
    return _torchvision_models().get_model(name, num_classes=num_classes, **options)


def check_network_name(name: str) -> None:
    """Raise CupError for a name that `build_network` does not know; builds nothing."""
    if name.startswith("timm:"):
        if not _timm().is_model(name.removeprefix("timm:")):
            raise CupError(f"found {name!r}, which timm does not know; timm.list_models() names them")
    elif name not in OWN_MODELS:
        models = _torchvision_models()
        if name not in models.list_models(module=models):
            raise CupError(
                f"found {name!r}, allowed: {', '.join(OWN_MODELS)}, timm:NAME, or a classification model of "
                "torchvision such as resnet18, resnet34, resnet50, vgg16_bn"
            )


class CifarResNet(nn.Module):
    """ResNet for 32 x 32 images: three stages of 16, 32, 64 channels, depth = 6 blocks_per_stage + 2.

    Shortcuts have no parameters: every second pixel, padded with zero channels (He et al. 2015, option A). ReLU and
    pooling are called as functions, as in the reference implementation of CUP, so that its FLOPs count is ours.
    """

    def __init__(self, blocks_per_stage: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks_per_stage)
        self.layer2 = self._stage(16, 32, blocks_per_stage)
        self.layer3 = self._stage(32, 64, blocks_per_stage)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(channels_in: int, channels: int, blocks: int) -> nn.Sequential:
        first = CifarBlock(channels_in, channels)
        return nn.Sequential(first, *(CifarBlock(channels, channels) for _ in range(blocks - 1)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """float (N, 3, 32, 32) -> logits (N, num_classes)."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class CifarBlock(nn.Module):
    """Two 3 x 3 convolutions around a shortcut without parameters; the first halves the side where channels double."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        more = (channels - channels_in) // 2
        self.shortcut = nn.ZeroPad3d((0, 0, 0, 0, more, more)) if more else None
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=2 if more else 1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.shortcut is not None:
            x = self.shortcut(x[:, :, ::2, ::2])
        return F.relu(out + x)


class CifarVGG(nn.Module):
    """VGG-16 with batch norm for 32 x 32 images: 13 convolutions and one linear layer (the paper's CIFAR VGG-16)."""

    CHANNELS = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512, "pool")

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels_in = 3
        for channels in self.CHANNELS:
            if channels == "pool":
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [nn.Conv2d(channels_in, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
            channels_in = channels
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(512, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """float (N, 3, 32, 32) -> logits (N, num_classes)."""
        return self.classifier(torch.flatten(self.features(images), 1))


class LeNet(nn.Module):
    """LeNet-5 as in the paper: conv 20, conv 50, fully connected 500."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(50 * 4 * 4, 500)
        self.fc2 = nn.Linear(500, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """float (N, 1, 28, 28) -> logits (N, num_classes)."""
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))


class MLP(nn.Module):
    """784-500-300-classes, as in the paper."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 500)
        self.fc2 = nn.Linear(500, 300)
        self.fc3 = nn.Linear(300, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """float (N, 1, 28, 28) or (N, 784) -> logits (N, num_classes)."""
        x = F.relu(self.fc1(torch.flatten(images, 1)))
        return self.fc3(F.relu(self.fc2(x)))


OWN_MODELS: dict[str, Callable[[int], nn.Module]] = {
    "lenet": LeNet,
    "mlp": MLP,
    "vgg16_cifar": CifarVGG,
    "resnet20_cifar": lambda num_classes: CifarResNet(3, num_classes),
    "resnet32_cifar": lambda num_classes: CifarResNet(5, num_classes),
    "resnet44_cifar": lambda num_classes: CifarResNet(7, num_classes),
    "resnet56_cifar": lambda num_classes: CifarResNet(9, num_classes),
}
"""Name -> what builds the network for a number of classes. A new network is a file and a line here."""


def _timm() -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise CupError("timm:NAME needs timm, which is not installed: pip install timm") from error
    return timm


def _torchvision_models() -> ModuleType:
    try:
        import torchvision.models
    except ImportError as error:
        raise CupError("networks by name need torchvision, which is not installed: pip install torchvision") from error
    return torchvision.models
