"""Golden integers: the groups of one network a family, so that a change that takes a family away shows.

A number that rises is good news; put the new one here.
"""

import pytest
import torch
import torchvision

import cup

FAMILIES = {
    "alexnet": (8, 7, 7),
    "densenet121": (121, 120, 120),
    "efficientnet_b0": (41, 35, 40),
    "googlenet": (64, 61, 61),
    "mnasnet0_5": (26, 20, 25),
    "mobilenet_v2": (26, 20, 25),
    "mobilenet_v3_small": (28, 23, 27),
    "resnet18": (13, 8, 12),
    "shufflenet_v2_x0_5": (22, 20, 20),
    "squeezenet1_1": (26, 25, 25),
    "vgg11_bn": (11, 10, 10),
    "convnext_tiny": (23, 18, 22),
    "swin_t": (29, 12, 12),
    "vit_b_16": (50, 24, 24),
    "timm:resnet10t": (11, 6, 10),
    "timm:resnetv2_50": (38, 33, 37),
    "timm:seresnet18": (21, 16, 20),
    "timm:skresnet18": (21, 16, 16),
    "timm:res2net50_14w_8s": (134, 41, 45),
    "timm:dla34": (26, 19, 25),
    "timm:dpn68b": (50, 45, 45),
    "timm:vovnet39a": (40, 39, 39),
    "timm:hrnet_w18_small": (46, 36, 45),
    "timm:cspresnet50": (56, 38, 38),
    "timm:darknetaa53": (30, 24, 29),
    "timm:cspdarknet53": (68, 39, 39),
    "timm:regnetx_002": (19, 14, 18),
    "timm:gernet_s": (29, 23, 28),
    "timm:efficientnet_b0": (41, 35, 40),
    "timm:fbnetc_100": (30, 23, 29),
    "timm:mobilenetv3_small_050": (27, 23, 26),
    "timm:mobilenetv4_conv_small": (22, 19, 21),
    "timm:repvgg_a0": (6, 0, 5),
    "timm:xception41": (34, 29, 33),
    "timm:inception_resnet_v2": (205, 195, 204),
    "timm:convnext_atto": (17, 12, 16),
    "timm:selecsls42b": (42, 41, 41),
    "timm:ghostnet_050": (32, 25, 31),
    "timm:nf_regnet_b0": (33, 16, 16),
    "timm:rexnet_100": (47, 35, 35),
    "timm:poolformer_s12": (29, 12, 12),
    "timm:eca_resnet33ts": (29, 14, 18),
    "timm:pit_xs_224": (54, 24, 24),
    "timm:vit_tiny_patch16_224": (50, 24, 24),
    "timm:mixer_s32_224": (34, 16, 16),
    "timm:lcnet_050": (18, 17, 17),
}
"""Network -> groups, those that may shrink with scope "inner", and with "all"."""


def build(name):
    """On the meta device, where weights cost nothing; and the shape of an image for it."""
    with torch.device("meta"):
        if name.startswith("timm:"):
            model = pytest.importorskip("timm").create_model(name.removeprefix("timm:"))
            return model, model.default_cfg["input_size"]
        options = {"init_weights": False} if name == "googlenet" else {}
        return torchvision.models.get_model(name, **options), (3, 224, 224)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_family_has_the_groups_that_it_had(name):
    model, shape = build(name)
    groups = cup.channel_groups(model, torch.empty(1, *shape, device="meta"))
    found = (len(groups), len(cup.prunable_groups(groups)), len(cup.prunable_groups(groups, "all")))
    assert found == FAMILIES[name]
