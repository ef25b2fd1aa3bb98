"""Networks of other libraries by name, small and with random weights: `SOURCE:NAME`.

timm, transformers and segmentation_models_pytorch are imported where one of their networks is asked for.
"""

import importlib.util
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import nn

from train.errors import TrainError
from train.network.models import build_model, check_model_name, native_input_shape

TIMM = (
    *("resnet26d", "resnetv2_50", "seresnet50", "skresnet18", "res2net50_26w_4s", "dla34", "dpn68", "vovnet39a"),
    *("hrnet_w18_small", "cspresnet50", "densenet121", "regnety_008", "efficientnet_b0", "mobilenetv3_large_100"),
    *("mobilenetv4_conv_small", "repvgg_a2", "xception41", "inception_v4", "convnext_atto", "selecsls42b"),
)
"""Twenty convolutional networks of different families."""

_MORE_OF_TIMM = (
    *("beit_base_patch16_224", "halonet_h1", "eca_botnext26ts_256", "mobileone_s1", "cait_xxs24_224", "coat_tiny"),
    *("coat_lite_tiny", "convit_tiny", "convmixer_768_32", "cpubone_nano", "crossvit_tiny_240", "csatv2"),
    *("cs3darknet_focus_s", "cspnext_tiny", "davit_tiny", "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"),
    *("dla46x_c", "dpn48b", "edgenext_xx_small", "efficientformer_l1", "efficientformerv2_s0", "efficientnet_lite0"),
    *("efficientvim_m1", "efficientvit_b0", "efficientvit_m0", "eva02_tiny_patch14_224", "fasternet_t0", "fastvit_t8"),
    *("focalnet_tiny_srf", "gcvit_xxtiny", "ghostnet_050", "ghostnetv3_050", "hardcorenas_b", "hgnetv2_b0"),
    *("hiera_tiny_224", "iformer_t", "inception_next_atto", "inception_resnet_v2", "adv_inception_v3", "lcnetv2_small"),
    *("levit_128s", "levit_conv_128s", "lowformer_b0", "test_mambaout", "mambaout_femto", "maxvit_pico_rw_256"),
    *("coatnet_pico_rw_224", "poolformerv2_s12", "poolformer_s12", "caformer_s18", "convformer_s18", "gmlp_ti16_224"),
    *("gmixer_12_224", "mixer_s32_224", "resmlp_12_224", "mobilenetv3_small_050", "lcnet_035", "mobilevit_xxs"),
    *("mobilevitv2_050", "mvitv2_tiny", "nest_tiny", "nextvit_small", "nf_regnet_b0", "test_nfnet", "pit_ti_224"),
    *("pvt_v2_b0", "rdnet_tiny", "regnetx_002", "regnetz_005", "repghostnet_050", "repvit_m1", "res2next50"),
    *("resnest14d", "ecaresnext26t_32x4d", "resnet18", "resnext26ts", "rexnet_100", "rexnetr_200", "sequencer2d_s"),
    *("shvit_s1", "spnasnet_100", "starnet_s1", "swiftformer_xs", "swin_tiny_patch4_window7_224"),
    *(
        "swinv2_tiny_window8_256",
        "swinv2_cr_tiny_ns_224",
        "tiny_vit_5m_224",
        "tinynet_e",
        "tresnet_m",
        "twins_svt_small",
    ),
    *("vgg11_bn", "visformer_tiny", "vit_tiny_patch16_224", "vit_relpos_small_patch16_224"),
    *(
        "volo_d1_224",
        "xcit_nano_12_p16_224",
        "xception41p",
        "legacy_seresnet18",
        "legacy_xception",
        "darknet53",
        "darknetaa53",
    ),
    *("cspdarknet53", "gernet_s", "fbnetc_100", "mnasnet_small", "semnasnet_075", "mixnet_s", "nf_resnet26"),
    *("resnetblur18", "seresnext26d_32x4d", "skresnext50_32x4d", "res2net50_14w_8s", "vit_tiny_r_s16_p8_224"),
    *("ese_vovnet19b_slim", "dpn68b", "dla34", "hrnet_w18_small_v2", "mobilenetv2_050", "efficientnet_es"),
    *("mobilenetv4_conv_medium", "mobilenetv4_hybrid_medium", "repvgg_a0", "selecsls60", "haloregnetz_b"),
)
"""Of every family the smallest, and of some a second one."""

_TORCHVISION = torchvision.models.list_models(module=torchvision.models)
_HUGE = (
    *("convnext_base", "convnext_large", "densenet161", "densenet201", "efficientnet_b5", "efficientnet_b6"),
    *("efficientnet_b7", "efficientnet_v2_l", "efficientnet_v2_m", "regnet_x_16gf", "regnet_x_32gf", "regnet_y_128gf"),
    *("regnet_y_16gf", "regnet_y_32gf", "resnet152", "resnext101_32x8d", "resnext101_64x4d", "swin_b", "swin_v2_b"),
    *("vgg11", "vgg13", "vgg13_bn", "vgg16", "vgg19", "vgg19_bn", "vit_b_32", "vit_h_14", "vit_l_16", "vit_l_32"),
    *("wide_resnet101_2", "wide_resnet50_2"),
)
"""They take minutes each, and hold nothing that their smaller relatives have not."""

_WITH_MASKS = ("keypointrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2")
"""Their backbones are those of the detectors without masks."""

_LARGE_VIDEO = ("swin3d_b", "swin3d_s")


def names_of(source: str) -> list[str]:
    """The networks of a source; none where its library is not installed."""
    return _SOURCES[source]() if source in _SOURCES else [source]


def check_name(name: str) -> None:
    """Raise an error for a name that `build` does not know, as far as can be said without building anything."""
    source = name.partition(":")[0]
    if source not in _BUILDERS:
        check_model_name(name)
    elif name not in names_of(source):
        known = names_of(source) or ["nothing, for its library is not installed"]
        raise TrainError(f"found {name!r}, allowed: {', '.join(known)}")


def build(name: str) -> tuple[nn.Module, Any]:
    """A network with all its heads, and an example of its input as `cup.channel_groups` takes it, for two samples.

    Raises TrainError for an unknown name.
    """
    source, _, rest = name.partition(":")
    if source in _BUILDERS:
        return _BUILDERS[source](rest)
    check_model_name(name)
    if name in _TORCHVISION:
        options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        return torchvision.models.get_model(name, **options), torch.randn(2, *native_input_shape(name))
    model = build_model(name, num_classes=1000 if source == "timm" else 10)
    return model, torch.randn(2, *native_input_shape(name))


# --- torchvision beside classification ---


class _Heads(nn.Module):
    """What of a detector is a network: its backbone and the heads on the pyramid's maps; boxes come behind."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self.head = detector.rpn.head if hasattr(detector, "rpn") else detector.head

    def forward(self, images: torch.Tensor) -> Any:
        features = self.backbone(images)
        return self.head(list(features.values()) if isinstance(features, OrderedDict | dict) else [features])


def _segmentation(name: str) -> tuple[nn.Module, Any]:
    return _known(torchvision.models.segmentation, name, weights_backbone=None), torch.randn(2, 3, 64, 64)


def _detection(name: str) -> tuple[nn.Module, Any]:
    side = {"ssd300_vgg16": 300}.get(name, 128)
    detector = _known(torchvision.models.detection, name, weights_backbone=None)
    return _Heads(detector), torch.randn(2, 3, side, side)


def _video(name: str) -> tuple[nn.Module, Any]:
    frames, side = (16, 224) if name.startswith("mvit") else (14, 224) if name == "s3d" else (8, 56)
    return _known(torchvision.models.video, name), torch.randn(2, 3, frames, side, side)


def _known(library: Any, name: str, **options: Any) -> nn.Module:
    known = torchvision.models.list_models(module=library)
    if name not in known:
        raise TrainError(f"found {name!r}, allowed: {', '.join(known)}")
    return torchvision.models.get_model(name, weights=None, **options)


# --- transformers ---

_IMAGES = (
    *("beit", "bit", "convnext", "convnextv2", "cvt", "data2vec-vision", "deit", "dinov2", "dinov2_with_registers"),
    *("donut-swin", "efficientnet", "focalnet", "hgnet_v2", "hiera", "ijepa", "levit", "mobilenet_v1", "mobilenet_v2"),
    *("mobilevit", "mobilevitv2", "poolformer", "pp_lcnet", "pvt", "pvt_v2", "regnet", "resnet", "segformer"),
    *("siglip", "swiftformer", "swin", "swinv2", "textnet", "vit", "vit_msn"),
)
_ANY_SIDE = (
    *("bit", "convnext", "convnextv2", "efficientnet", "focalnet", "hgnet_v2", "mobilenet_v1", "mobilenet_v2"),
    *("mobilevit", "mobilevitv2", "poolformer", "pp_lcnet", "pvt_v2", "regnet", "resnet", "segformer", "textnet"),
)
_OF_STAGES = (*_ANY_SIDE, "cvt", "donut-swin", "hiera", "levit", "pvt", "swiftformer", "swin", "swinv2")
_TEXTS = (
    *("albert", "bert", "biogpt", "bloom", "convbert", "distilbert", "electra", "ernie", "fnet", "gpt2"),
    *("gpt_neo", "gpt_neox", "gptj", "llama", "megatron-bert", "mistral", "mobilebert", "mpnet", "opt", "phi"),
    *("qwen2", "rembert", "roberta", "roformer", "squeezebert", "stablelm", "starcoder2", "xlm-roberta"),
)
_CAUSAL = (
    *("biogpt", "bloom", "gpt2", "gpt_neo", "gpt_neox", "gptj", "llama", "mistral", "opt", "phi", "qwen2", "stablelm"),
    "starcoder2",
)
"""Without a mask these ask whether the numbers of the positions start anew somewhere; with one the others ask if it
leaves anything out. Shapes alone do not answer that.
"""
_SMALL = {
    **{"num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "hidden_size": 96, "n_embd": 96},
    **{"dim": 96, "intermediate_size": 160, "ffn_dim": 160, "n_inner": 160, "hidden_dim": 160, "n_head": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "n_heads": 4, "num_heads": 4, "vocab_size": 200},
    **{"embedding_size": 96, "pooler_hidden_size": 96, "word_embed_proj_dim": 96, "head_dim": 24, "rotary_dim": 8},
    "attention_types": [[["global", "local"], 1]],
}
"""Every number that a configuration has under such a name; networks of several stages keep their lists of widths."""


def _transformers(name: str) -> tuple[nn.Module, Any]:
    import transformers

    if name not in (*_IMAGES, *_TEXTS):
        raise TrainError(f"found {name!r}, allowed: {', '.join((*_IMAGES, *_TEXTS))}")
    config = transformers.AutoConfig.for_model(name)
    size = getattr(config, "vision_config", config)
    for key, value in {} if name in _OF_STAGES else _SMALL.items():
        now = getattr(size, key, None)
        if now is not None and isinstance(value, list) == isinstance(now, list):
            setattr(size, key, value)
    config.num_labels, config.architectures, config.use_cache = 5, [], False  # keys and values are kept to write texts
    if name in _TEXTS:
        config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, 1, 2
        model = transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
        mask = {"attention_mask": torch.ones(2, 12, dtype=torch.long)} if name in _CAUSAL else {}
        return model, {"input_ids": torch.randint(3, 200, (2, 12)), **mask}
    if name not in _OF_STAGES:
        size.image_size = 4 * size.patch_size
    model = transformers.AutoModelForImageClassification.from_config(config, attn_implementation="eager")
    side = getattr(size, "image_size", 64)
    side = side if isinstance(side, int) else side[0]
    return model, torch.randn(2, 3, 64 if name in _ANY_SIDE else side, 64 if name in _ANY_SIDE else side)


# --- segmentation_models_pytorch ---

_ARCHITECTURES = (
    *("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "PAN", "DeepLabV3", "DeepLabV3Plus", "UPerNet"),
)
_ENCODERS = ("resnet18", "mobilenet_v2")


def _segmentation_names() -> list[str]:
    return [f"smp:{kind}-{encoder}" for kind in _ARCHITECTURES for encoder in _ENCODERS]


def _segmentation_models(name: str) -> tuple[nn.Module, Any]:
    import segmentation_models_pytorch

    architecture, _, encoder = name.partition("-")
    if architecture not in _ARCHITECTURES:
        raise TrainError(f"found {name!r}, allowed: one of {', '.join(_ARCHITECTURES)}, then -ENCODER")
    kind = getattr(segmentation_models_pytorch, architecture)
    return kind(encoder_name=encoder, encoder_weights=None, classes=5), torch.randn(2, 3, 128, 128)


# --- sources ---


def _listed(library: Any, *left_out: str) -> list[str]:
    return [name for name in torchvision.models.list_models(module=library) if name not in left_out]


def _if_installed(library: str, names: list[str]) -> list[str]:
    return names if importlib.util.find_spec(library) else []


_BUILDERS: dict[str, Callable[[str], tuple[nn.Module, Any]]] = {
    "segmentation": _segmentation,
    "detection": _detection,
    "video": _video,
    "transformers": _transformers,
    "smp": _segmentation_models,
}
_SOURCES: dict[str, Callable[[], list[str]]] = {
    "torchvision": lambda: list(_TORCHVISION),
    "small-torchvision": lambda: [name for name in _TORCHVISION if name not in _HUGE],
    "timm": lambda: [f"timm:{name}" for name in TIMM],
    "more-timm": lambda: _if_installed("timm", [f"timm:{name}" for name in _MORE_OF_TIMM]),
    "segmentation": lambda: [f"segmentation:{name}" for name in _listed(torchvision.models.segmentation)],
    "detection": lambda: [f"detection:{name}" for name in _listed(torchvision.models.detection, *_WITH_MASKS)],
    "video": lambda: [f"video:{name}" for name in _listed(torchvision.models.video, *_LARGE_VIDEO)],
    "transformers": lambda: _if_installed("transformers", [f"transformers:{name}" for name in (*_IMAGES, *_TEXTS)]),
    "smp": lambda: _if_installed("segmentation_models_pytorch", _segmentation_names()),
}
SOURCES = tuple(_SOURCES)
