"""Networks that answer for places of the image: U-Nets, DeepLab, pyramids and heads of detectors. Twins in float64."""

import pytest
import torch
import torch.nn.functional as F
from cup_twins import check_against_twin, randomise
from torch import nn
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.ops import FeaturePyramidNetwork


def block(read, written):
    return nn.Sequential(nn.Conv2d(read, written, 3, padding=1, bias=False), nn.BatchNorm2d(written), nn.ReLU())


class UNet(nn.Module):
    """What was on the way down is joined with what comes up, cropped or padded to its size."""

    def __init__(self):
        super().__init__()
        self.down1, self.down2, self.bottom = block(3, 6), block(6, 10), block(10, 12)
        self.rise2, self.up2 = nn.ConvTranspose2d(12, 10, 2, 2), block(20, 8)
        self.up1, self.out = block(14, 6), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        y = self.rise2(self.bottom(F.max_pool2d(two, 2)))
        rows, columns = two.shape[2] - y.shape[2], two.shape[3] - y.shape[3]
        y = F.pad(y, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
        y = self.up2(torch.cat([two, y], 1))
        y = F.interpolate(y, size=one.shape[-2:], mode="bilinear", align_corners=False)
        return self.out(self.up1(torch.cat([one, y], 1)))


class DeepLab(nn.Module):
    """torchvision's pyramid of dilated convolutions, pooled image included."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(block(3, 8), nn.MaxPool2d(2), block(8, 12))
        self.pyramid = ASPP(12, [1, 2], out_channels=10)
        self.pyramid.project[3] = nn.Identity()
        self.head = nn.Sequential(block(10, 6), nn.Conv2d(6, 2, 1))

    def forward(self, x):
        y = self.head(self.pyramid(self.backbone(x)))
        return {"out": F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)}


class Detector(nn.Module):
    """Two levels of torchvision's feature pyramid, and a head that runs on both."""

    def __init__(self, head):
        super().__init__()
        self.one, self.two = block(3, 6), block(6, 10)
        self.pyramid = FeaturePyramidNetwork([6, 10], 8)
        self.head = head

    def forward(self, x):
        one = self.one(x)
        two = self.two(F.max_pool2d(one, 2))
        return self.head(list(self.pyramid({"one": one, "two": two}).values()))


class C2f(nn.Module):
    """As in YOLOv8: half of the channels go through blocks, and all that came out on the way is joined."""

    def __init__(self, read, written, blocks, shortcut):
        super().__init__()
        self.half, self.shortcut = written // 2, shortcut
        self.first, self.last = block(read, written), block((2 + blocks) * self.half, written)
        self.blocks = nn.ModuleList(
            nn.Sequential(block(self.half, self.half), block(self.half, self.half)) for _ in range(blocks)
        )

    def forward(self, x):
        parts = list(self.first(x).chunk(2, 1))
        for layer in self.blocks:
            parts.append(parts[-1] + layer(parts[-1]) if self.shortcut else layer(parts[-1]))
        return self.last(torch.cat(parts, 1))


class Yolo(nn.Module):
    """A C2f backbone, fast spatial pyramid pooling, and a head of two branches."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = block(3, 6), C2f(6, 8, 2, True), C2f(8, 12, 1, False)
        self.squeeze, self.pooled = block(12, 6), block(24, 10)
        self.boxes = nn.Sequential(block(10, 6), nn.Conv2d(6, 4, 1))
        self.classes = nn.Sequential(block(10, 8), nn.Conv2d(8, 3, 1))

    def forward(self, x):
        pyramid = [self.squeeze(self.two(self.one(self.stem(x))))]
        for _ in range(3):
            pyramid.append(F.max_pool2d(pyramid[-1], 5, 1, 2))
        y = self.pooled(torch.cat(pyramid, 1))
        return torch.cat([self.boxes(y), self.classes(y)], 1).flatten(2)


NETWORKS = {
    "U-Net": (UNet, {"out"}),
    "DeepLab": (DeepLab, {"head.1"}),
    "RetinaNet": (
        lambda: Detector(RetinaNetHead(8, 3, 4)),
        {"head.classification_head.cls_logits", "head.regression_head.bbox_reg"},
    ),
    "region proposals": (lambda: Detector(RPNHead(8, 3)), {"head.cls_logits", "head.bbox_pred"}),
    "YOLO": (Yolo, {"boxes.1", "classes.1"}),
}
"""Network -> how to build it, and the groups that stay."""


@pytest.mark.parametrize("name", list(NETWORKS))
def test_all_but_the_outputs_may_shrink(name):
    build, outputs = NETWORKS[name]
    torch.manual_seed(0)
    model = randomise(build())
    for seed in range(2):
        groups = check_against_twin(model, torch.randn(2, 3, 16, 16), seed)
        assert {group.name for group in groups if group.frozen} == outputs
