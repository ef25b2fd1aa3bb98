"""Networks by name with published weights get the images that the weights want, through both loaders and every tool."""

import json
from pathlib import Path

import pytest
import torch
import torchvision
from launching import events, interrupted, numbers, train, write_image_folder
from made_images import build, disk_loaders, made_photo
from PIL import Image

from cup import CupError
from data import Preprocessing
from data.batch import MEAN_RGB, STD_RGB
from launch import evaluate, export, prune
from train.checkpoint.file import load_checkpoint, save_checkpoint
from train.checkpoint.network import load_network
from train.config import RunConfig
from train.errors import ConfigError
from train.network.models import build_model, native_input_shape
from train.network.published import of_torchvision, published
from train.start import _differing

IMAGENET = (MEAN_RGB, STD_RGB)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four validation images, upright, lying, smaller and larger than most networks' inputs."""
    root = tmp_path_factory.mktemp("photos") / "val"
    for number, (width, height) in enumerate([(500, 375), (333, 501), (640, 640), (150, 211)]):
        (root / f"class{number % 2}").mkdir(parents=True, exist_ok=True)
        made_photo(number, width, height).save(root / f"class{number % 2}" / f"{number}.jpg", quality=95)
    return root.parent


def library_transform(name: str):
    """What the library itself makes of a Pillow image."""
    if not name.startswith("timm:"):
        return torchvision.models.get_weight(name).transforms()
    timm = pytest.importorskip("timm")
    config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name[5:]).to_dict())
    return timm.data.create_transform(**config)


def wanted(name: str) -> Preprocessing:
    if name.startswith("timm:"):
        return published(name).preprocessing
    return of_torchvision(torchvision.models.get_weight(name)).preprocessing


def through(loader: str, photos: Path, preprocessing: Preprocessing) -> torch.Tensor:
    [val] = build(photos, loader, splits=("val",), threads=1, **vars(preprocessing))
    [(images, _, _)] = [tuple(tensor.clone() for tensor in batch) for batch in val]
    val.close()
    return images


@disk_loaders
@pytest.mark.parametrize(
    "name",
    [
        "ResNet50_Weights.IMAGENET1K_V2",  # 224 of 232
        "EfficientNet_B4_Weights.IMAGENET1K_V1",  # bicubic, 380 of 384
        "EfficientNet_V2_L_Weights.IMAGENET1K_V1",  # mean and deviation 0.5
        "VGG16_Weights.IMAGENET1K_FEATURES",  # deviation 1/255
        "timm:test_resnet",  # mean and deviation 0.5, 160 of 168
        "timm:vit_base_patch32_clip_224.openai",  # CLIP's mean and deviation
        "timm:tf_efficientnetv2_b3.in21k_ft_in1k",  # both sides resized
        "timm:volo_d4_448",  # a black border
        "timm:deepseek_vit_412m",  # a border of the mean colour
    ],
)
def test_validation_images_are_the_library_s_own(photos: Path, loader: str, name: str):
    """The folder loader's are equal; DALI's differ by a fifth of one of 255 levels on average, and by three at most."""
    transform, preprocessing = library_transform(name), wanted(name)
    files = sorted((photos / "val").glob("*/*.jpg"))
    expected = torch.stack([transform(Image.open(file)) for file in files])
    images = through(loader, photos, preprocessing)
    levels = (images - expected).abs() * torch.tensor(preprocessing.std).view(-1, 1, 1) * 255
    assert images.shape == expected.shape
    if loader == "folder":
        assert levels.max() < 1e-3
    else:
        assert levels.mean(dim=(1, 2, 3)).max() < 0.3 and levels.max() < 4


def test_nothing_of_what_the_libraries_say_is_lost():
    """Of timm's 1,826 configurations 683 have other means or deviations than ImageNet's."""
    timm = pytest.importorskip("timm")
    differing = 0
    for name in timm.list_pretrained():
        config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
        differing += (config["mean"], config["std"]) != IMAGENET
        _, height, width = config["input_size"]
        if height != width:
            with pytest.raises(ConfigError, match=f"{height} x {width} pixels, allowed: square ones"):
                published(f"timm:{name}")
            continue
        found = published(f"timm:{name}").preprocessing
        assert (found.image_size, found.interpolation) == (height, config["interpolation"])
        assert (found.mean, found.std) == (config["mean"], config["std"])
    assert differing > 600  # 683 in timm 1.0.31


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_that_transform_their_input_get_it_transformed(photos: Path, name: str):
    """Our networks are built without that layer: the loader's means and deviations do what it does."""
    weights = torchvision.models.get_model_weights(name).DEFAULT
    theirs = torchvision.models.get_model(name, transform_input=True, init_weights=False)
    images = torch.stack([weights.transforms()(Image.open(file)) for file in sorted((photos / "val").glob("*/*.jpg"))])
    right = theirs._transform_input(images)  # what the first layer gets
    found = through("folder", photos, published(name).preprocessing)
    assert torch.allclose(found, right, atol=1e-5)
    assert (images - right).abs().max() > 0.5
    assert not build_model(name, 10).transform_input


@pytest.mark.parametrize(
    ("name", "side", "resize_size"),
    [
        ("efficientnet_b1", 240, 255),
        ("efficientnet_b7", 600, 600),
        ("efficientnet_v2_s", 384, 384),
        ("swin_v2_t", 256, 260),
    ],
)
def test_a_network_s_own_image_size_is_the_published_one(name: str, side: int, resize_size: int):
    assert native_input_shape(name) == (3, side, side)
    assert published(name).preprocessing.resize_size == resize_size


def test_a_network_under_a_name_that_timm_once_gave_has_its_image_size():
    timm = pytest.importorskip("timm")
    assert timm.get_pretrained_cfg("adv_inception_v3") is None
    assert native_input_shape("timm:adv_inception_v3") == (3, 299, 299)


def test_weights_in_a_file_are_known_by_the_name_that_they_were_published_under():
    sizes = [
        published("resnet50", Path(name)).preprocessing.resize_size for name in ("resnet50-0676ba61.pth", "my.pth")
    ]
    assert sizes == [256, 232]
    assert published("resnet50", Path("resnet50-0676ba61.pth")).label == "torchvision's ResNet50_Weights.IMAGENET1K_V1"


# Of a run that trains a few images of two classes.
FOLDER = {
    "data__loader": "folder",
    "data__batch_size": 4,
    "data__channels": 3,
    "train__epochs": 1,
    "prune__method": "none",
}
OPEN = {"data__image_size": "null", "data__resize_size": "null"}
TEST_RESNET = Preprocessing(image_size=160, resize_size=168, mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """timm's smallest ResNet after a cut; its published weights want means and deviations of 0.5."""
    pytest.importorskip("timm")
    root = tmp_path_factory.mktemp("cut")
    torch.manual_seed(0)
    torch.save(build_model("timm:test_resnet", 3).state_dict(), root / "weights.pth")
    arguments = ["timm:test_resnet", "--weights", str(root / "weights.pth"), "--t", "0.5"]
    assert prune.main([*arguments, "--out", str(root / "cut.pt")]) == 0
    write_image_folder(root / "images")
    return root / "cut.pt"


def notes_about_images(log: list[dict]) -> list[str]:
    return [event["message"] for event in events(log, "note") if event["message"].startswith("images: ")]


def test_what_the_weights_want_goes_from_cut_to_training_evaluation_and_export(cut: Path, tmp_path: Path, capsys):
    assert load_network(cut).preprocessing == TEST_RESNET
    changes = {"model__checkpoint": cut, "model__name": "null", "data__path": cut.parent / "images"}
    log = train(tmp_path, **FOLDER, **OPEN, **changes)
    assert notes_about_images(log) == [f"images: {TEST_RESNET} (as {cut} says)"]
    last = tmp_path / "tiny/last.pt"
    assert load_network(last).preprocessing == TEST_RESNET
    assert load_network(last).architecture.input_shape == (3, 160, 160)
    with pytest.warns(UserWarning, match="resized to 168 pixels .* mean 0.5 0.5 0.5"):
        assert evaluate.main([str(last)]) == 0
    assert f"top-1 {events(log, 'epoch')[-1]['top1']:.3f}%" in capsys.readouterr().out
    assert export.main([str(last), "--format", "torch"]) == 0
    assert f"images: {TEST_RESNET}" in capsys.readouterr().out
    extra = {"mean": "", "resize_size": ""}
    torch.export.load(last.with_suffix(".pt2"), extra_files=extra)
    assert (json.loads(extra["mean"]), extra["resize_size"]) == ([0.5, 0.5, 0.5], "168")


def test_the_configuration_comes_before_the_weights_and_says_so(cut: Path, tmp_path: Path):
    changes = {"model__checkpoint": cut, "model__name": "null", "data__path": cut.parent / "images"}
    log = train(
        tmp_path, **FOLDER, **changes, data__image_size=64, data__resize_size="null", data__mean="[0.4,0.4,0.4]"
    )
    used = load_network(tmp_path / "tiny/last.pt").preprocessing
    assert (used.image_size, used.resize_size, used.mean, used.std) == (64, 67, (0.4,) * 3, (0.5,) * 3)
    [note] = notes_about_images(log)
    assert note.endswith("but for data.image_size, data.resize_size, data.mean)")


def test_a_network_from_scratch_has_imagenet_s_usual_images_whatever_is_published_about_its_name(tmp_path: Path):
    pytest.importorskip("timm")
    made = {"model__name": "timm:test_resnet", "data__channels": 3, "data__image_size": 32, "data__resize_size": "null"}
    log = train(tmp_path, **made, train__epochs=1, prune__method="none")
    used = load_network(tmp_path / "tiny/last.pt").preprocessing
    assert used == Preprocessing(image_size=32, resize_size=36)
    assert notes_about_images(log) == []


def test_validation_at_another_size_goes_with_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A run that goes on, and one that starts from its checkpoint, train and validate as before."""
    sizes = {"data__image_size": 24, "data__resize_size": "null", "data__val_size": 28}
    made = {"model__name": "resnet20_cifar", "data__channels": 3, "prune__method": "none", "train__epochs": 2}
    whole = train(tmp_path / "whole", **made, **sizes)
    torn = interrupted(tmp_path / "torn", monkeypatch, 6, **made, **sizes)
    assert numbers(torn) == numbers(whole)
    [note] = notes_about_images(whole)
    assert "resized to 31 pixels (bilinear), the centre 28 (in training 24)" in note
    used = Preprocessing(image_size=24, resize_size=27, val_size=28)
    assert load_network(tmp_path / "whole/tiny/last.pt").preprocessing == used
    again = {**made, "data__image_size": "null", "data__resize_size": "null", "train__epochs": 1}
    log = train(tmp_path / "again", model__checkpoint=tmp_path / "whole/tiny/last.pt", **again)
    assert (log[0]["val_size"], [line["image_size"] for line in events(log, "epoch")]) == (28, [24])
    assert load_network(tmp_path / "again/tiny/last.pt").preprocessing == used
    smaller = {"data__image_size": 28, "data__resize_size": 28, "data__val_size": 8}
    with pytest.raises(CupError, match=r"LeNet does not take inputs of shape \(1, 8, 8\)"):
        train(tmp_path / "lenet", **smaller)


def test_a_cut_network_of_an_earlier_version_has_the_images_that_are_published(cut: Path, tmp_path: Path):
    content = load_checkpoint(cut)
    del content["preprocessing"]
    save_checkpoint(tmp_path / "old.pt", content | {"format": 5})
    assert load_network(tmp_path / "old.pt").preprocessing is None
    with pytest.warns(UserWarning, match="mean 0.5 0.5 0.5.*as timm's test_resnet.r160_in1k says"):
        assert evaluate.main([str(tmp_path / "old.pt"), "--data", str(cut.parent / "images"), "--batch-size", "6"]) == 0


def test_a_checkpoint_of_an_earlier_version_has_the_images_that_its_run_had(tmp_path: Path, cut: Path):
    train(tmp_path, **FOLDER, model__name="timm:test_resnet", data__path=cut.parent / "images")
    content = load_checkpoint(tmp_path / "tiny/last.pt")
    del content["preprocessing"]
    save_checkpoint(tmp_path / "old.pt", content | {"format": 5})
    assert load_network(tmp_path / "old.pt").preprocessing == Preprocessing(image_size=28, resize_size=28)


def test_a_run_of_an_earlier_version_goes_on_where_its_settings_are_left_open_now():
    """They were stored with the values that are usual still. Of a run from a checkpoint, they are as it began."""
    now = RunConfig().to_dict()
    stored = {**now, "data": {**now["data"], "image_size": 224, "resize_size": 256}}
    assert now["data"]["image_size"] is None and _differing(stored, now) == []
    other = {**now, "data": {**now["data"], "image_size": 160}}
    sizes = ["data.image_size (224 there, 160 now)", "data.resize_size (256 there, 182 now)"]
    assert _differing(stored, other) == [*sizes, "data.val_size (224 there, 160 now)"]
    assert _differing({**now, "data": {**now["data"], "val_size": 256}}, now) == ["data.val_size (256 there, 224 now)"]
    assert _differing({**now, "data": {**now["data"], "val_size": 224}}, now) == []
    begun = {"model": {**now["model"], "checkpoint": "cut.pt"}}
    assert _differing(other | begun, now | begun) == []
    assert _differing(now | begun, other | begun) == ["data.image_size (None there, 160 now)"]


def test_a_loader_s_state_of_an_earlier_version_is_continued(photos: Path):
    """What is usual is not in it, as ever, and what is not is."""
    added = {"mean", "std", "interpolation", "resized_side"}
    for changes in ({}, {"mean": (0.5, 0.5, 0.5), "interpolation": "bicubic"}):
        [val] = build(photos, "folder", splits=("val",), threads=1, **changes)
        assert added & val.state_dict().keys() == changes.keys()
        val.close()


def test_evaluation_at_another_size_takes_the_same_share_of_the_image(cut: Path, capsys):
    arguments = [str(cut), "--data", str(cut.parent / "images"), "--batch-size", "6", "--image-size", "80"]
    with pytest.warns(UserWarning, match=r"resized to 84 pixels \(bilinear\), the centre 80"):
        assert evaluate.main(arguments) == 0


@pytest.mark.parametrize(
    "change",
    [{"image_size": 0}, {"mean": [0.5]}, {"std": [0.5, 0.5, -1.0]}, {"interpolation": "lanczos"}, {"more": 1}],
)
def test_a_checkpoint_with_absurd_images_is_refused(cut: Path, tmp_path: Path, change: dict, capfd):
    content = load_checkpoint(cut)
    save_checkpoint(tmp_path / "bad.pt", content | {"preprocessing": content["preprocessing"] | change})
    assert export.main([str(tmp_path / "bad.pt"), "--format", "torch"]) == 1
    assert "the stored preprocessing is not as any run writes it" in capfd.readouterr().err
