"""Augmentation: every option changes what it says, in both disk loaders, and what is resumed goes on bit-equal."""

import numpy as np
import pytest
import torch
from made_images import build, disk_loaders, equal, needs_dali, synthetic, taken
from PIL import Image
from torchvision.transforms import v2

from data import dali, folder
from data.batch import NORMALISATION, DataConfig, train_size, with_preprocessing
from data.prepare import prepare_shards

STILL = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip": 0.0}
EVERYTHING = {
    **{"image_size": 48, "resize_size": 48, "start_size": 24, "grow_epochs": 3, "size_step": 8},
    **{"auto_augment": "randaugment", "color_jitter": (0.4, 0.4, 0.4, 0.1)},
}


def test_the_side_grows_in_steps_from_its_start_to_the_image_size():
    config = DataConfig(start_size=128, grow_epochs=10, image_size=224, size_step=32)
    sizes = [train_size(config, epoch) for epoch in range(14)]
    assert sizes == [128] * 4 + [160] * 3 + [192] * 3 + [224] * 4
    assert {train_size(with_preprocessing(DataConfig()), epoch) for epoch in range(5)} == {224}


@disk_loaders
def test_images_grow_by_epoch_in_the_same_number_of_steps_and_validation_stays(photos, loader):
    options = {"image_size": 40, "resize_size": 48, "start_size": 24, "grow_epochs": 2, "size_step": 8}
    train, val = build(photos, loader, **options, threads=1)
    sides = [[images.shape[-1] for images, _, _ in taken(train)] for _ in range(3)]
    assert sides == [[24] * 3, [32] * 3, [40] * 3]
    assert {batch[0].shape[-2:] for batch in taken(val)} == {(40, 40)}
    train.close()
    val.close()


def test_synthetic_images_grow_too():
    train, val = synthetic(synthetic_images=64, start_size=8, grow_epochs=1)
    assert [[images.shape[-1] for images, _, _ in taken(train)] for _ in range(2)] == [[8, 8], [16, 16]]
    assert taken(val)[0][0].shape[-1] == 16


@pytest.mark.parametrize(
    ("loader", "augment"), [("dali", "randaugment"), ("dali", "trivialaugment"), ("folder", "trivialaugment")]
)
def test_resumed_training_with_everything_on_equals_undisturbed(photos, loader, augment, tmp_path_factory):
    """Growing sides, random operations, colour jitter, shards, an exclude list; stopped within an epoch."""
    shards = tmp_path_factory.mktemp("shards") / "set"
    prepare_shards(photos, shards, images_per_shard=5)
    (shards / "exclude.txt").write_text("train/0-ant/0000003-3.jpg\n")
    options = {**EVERYTHING, "auto_augment": augment, "batch_size": 6, "threads": 1}
    train, _ = build(shards, loader, **options)
    assert (train.num_images, train.num_excluded) == (13, 1)
    taken(train)
    taken(train, 1)
    state = train.state_dict()
    expected = taken(train) + taken(train)
    train.close()
    resumed, _ = build(shards, loader, **options)
    resumed.load_state_dict(state)
    rest = taken(resumed) + taken(resumed)
    resumed.close()
    assert [images.shape[-1] for images, _, _ in rest] == [32, 40, 40]
    assert equal(rest, expected)


@disk_loaders
@pytest.mark.parametrize("name", ["randaugment", "trivialaugment"])
def test_auto_augment_changes_most_images_and_keeps_their_shape(photos, loader, name):
    plain, _ = build(photos, loader, batch_size=14, threads=1, **STILL)
    augmented, _ = build(photos, loader, batch_size=14, threads=1, auto_augment=name, **STILL)
    [(before, _, _)], [(after, _, _)] = taken(plain), taken(augmented)
    plain.close()
    augmented.close()
    assert after.shape == before.shape
    changed = (after - before).abs().mean(dim=(1, 2, 3)) > 0.05
    assert changed.sum() >= 7


@disk_loaders
@pytest.mark.parametrize(
    ("jitter", "spread"),
    [
        ((0.5, 0.0, 0.0, 0.0), lambda images: images.mean(dim=(1, 2, 3))),  # brightness: the mean moves
        ((0.0, 0.5, 0.0, 0.0), lambda images: images.std(dim=(1, 2, 3))),  # contrast: the deviation does
        ((0.0, 0.0, 1.0, 0.0), lambda images: images.std(dim=1).mean(dim=(1, 2))),  # saturation: colours' distance
        ((0.0, 0.0, 0.0, 0.5), lambda images: images[:, 0].mean(dim=(1, 2))),  # hue: red does
    ],
    ids=["brightness", "contrast", "saturation", "hue"],
)
def test_colour_jitter_moves_what_it_names(tmp_path, loader, jitter, spread):
    """Sixteen times the same two-coloured image: without jitter they are equal."""
    pixels = np.zeros((40, 40, 3), dtype=np.uint8)
    pixels[:20], pixels[20:] = (150, 90, 60), (90, 70, 50)
    for split in ("train", "val"):
        (tmp_path / split / "one").mkdir(parents=True)
        for number in range(16 if split == "train" else 1):
            Image.fromarray(pixels).save(tmp_path / split / "one" / f"{number}.png")
    options = {"batch_size": 16, "image_size": 40, "resize_size": 40, "threads": 1, **STILL}
    for strengths, low, high in [((0.0,) * 4, 0, 1e-6), (jitter, 0.02, 2)]:
        train, _ = build(tmp_path, loader, color_jitter=strengths, **options)
        [(images, _, _)] = taken(train)
        assert low <= spread(images).std() <= high
        train.close()


@needs_dali
def test_grey_images_can_have_brightness_and_contrast_only(photos):
    train, _ = build(photos, "dali", channels=1, color_jitter=(0.5, 0.5, 0.0, 0.0))
    assert taken(train)[0][0].shape[1] == 1
    train.close()
    for options in ({"color_jitter": (0.0, 0.0, 0.5, 0.0)}, {"auto_augment": "randaugment"}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}: found .* with channels: 1"):
            DataConfig(channels=1, **options)


def test_16_bit_grey_is_scaled_not_cut_off(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "one").mkdir(parents=True)
        Image.fromarray(np.full((40, 40), 100 * 257, dtype=np.uint16)).save(tmp_path / split / "one" / "0.png")
    _, val = build(tmp_path, "folder", batch_size=1, threads=1)
    [(images, _, _)] = taken(val)
    val.close()
    expected = (100 / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(images.mean(dim=(0, 2, 3)), expected, atol=0.01)


@needs_dali
def test_decoding_on_a_gpu_gets_the_options_and_decoding_on_the_cpu_none():
    config = DataConfig(hw_decoder_load=0.5, decoder_width_hint=1, decoder_height_hint=2, decoder_device_memory=3)
    training, validation = (dali._decoder_options(config, "mixed", hints=hints) for hints in (True, False))
    assert (
        training.items()
        >= {
            "device": "mixed",
            "hw_decoder_load": 0.5,
            "preallocate_width_hint": 1,
            "preallocate_height_hint": 2,
            "device_memory_padding": 3,
            "host_memory_padding": 140544512,
        }.items()
    )
    assert validation["hw_decoder_load"] == 0.5 and "device_memory_padding" not in validation
    assert set(dali._decoder_options(config, "cpu", hints=True)) == {"device", "output_type", "adjust_orientation"}


@needs_dali
def test_mmap_is_handed_to_dali(photos, monkeypatch):
    from nvidia.dali import fn

    asked, honest = [], fn.io.file.read
    monkeypatch.setattr(fn.io.file, "read", lambda *a, **options: asked.append(options) or honest(*a, **options))
    for mmap in (True, False):
        _, val = build(photos, "dali", mmap=mmap)
        taken(val)
        val.close()
    assert asked == [{"dont_use_mmap": False}, {"dont_use_mmap": True}]


@disk_loaders
def test_hue_is_turned_by_a_share_of_the_whole_circle(tmp_path, loader):
    """Half of it, either way: of 32 times the same red some come out with less red than green and blue."""
    for split in ("train", "val"):
        (tmp_path / split / "one").mkdir(parents=True)
        for number in range(32 if split == "train" else 1):
            Image.new("RGB", (40, 40), (150, 70, 70)).save(tmp_path / split / "one" / f"{number}.png")
    train, _ = build(tmp_path, loader, batch_size=32, threads=1, color_jitter=(0.0, 0.0, 0.0, 0.5), **STILL)
    [(images, _, _)] = taken(train)
    train.close()
    std = torch.tensor(NORMALISATION[3][1]).view(3, 1, 1)
    red, green, blue = (images * std + torch.tensor(NORMALISATION[3][0]).view(3, 1, 1)).mean(dim=(2, 3)).T
    assert ((red < green) & (red < blue)).any()


def test_randaugment_gets_its_operations_and_their_strength(photos):
    config = DataConfig(auto_augment="randaugment", randaugment_ops=3, randaugment_magnitude=17)
    config = with_preprocessing(config)
    [step] = [step for step in folder._train_transform(config, 32).transforms if isinstance(step, v2.RandAugment)]
    assert (step.num_ops, step.magnitude) == (3, 17)


@needs_dali
def test_randaugment_gets_its_operations_and_their_strength_from_dali(photos, monkeypatch):
    from nvidia.dali.auto_aug import rand_augment

    asked = []
    monkeypatch.setattr(rand_augment, "rand_augment", lambda images, **options: asked.append(options) or images)
    train, _ = build(photos, "dali", auto_augment="randaugment", randaugment_ops=3, randaugment_magnitude=17)
    taken(train, 1)
    train.close()
    assert [(options["n"], options["m"]) for options in asked] == [(3, 17)]
