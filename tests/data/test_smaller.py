"""Training images made smaller as they are packed: sizes, pixels, what stays as it is, and what is refused."""

import io

import numpy as np
import pytest
from PIL import Image

from data.batch import DataError
from data.images import list_splits
from data.prepare import Smaller, prepare_shards
from launch.prepare import main

SMALLER = Smaller(40, quality=95)


def encoded(kind: str, size: tuple[int, int], mode: str = "RGB", **options) -> bytes:
    """A picture of slow colours, which survive JPEG and reduction."""
    across, down = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    image = Image.fromarray(np.stack([across, down, 255 - across], axis=2).astype(np.uint8)).convert(mode)
    stored = io.BytesIO()
    image.save(stored, kind, **options)
    return stored.getvalue()


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


@pytest.mark.parametrize(
    ("kind", "mode"), [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P")]
)
@pytest.mark.parametrize(("size", "expected"), [((200, 100), (80, 40)), ((90, 330), (40, 147)), ((41, 41), (40, 40))])
def test_the_shorter_side_is_as_long_as_asked_and_the_picture_is_the_same(kind, mode, size, expected):
    before = encoded(kind, size, mode)
    after = opened(SMALLER.of(before))
    assert (after.format, after.size, after.mode) == ("JPEG", expected, "L" if mode == "L" else "RGB")
    plain = opened(before).convert("RGB").resize(expected, Image.Resampling.LANCZOS)
    difference = np.abs(np.asarray(after.convert("RGB"), float) - np.asarray(plain, float))
    assert difference.mean() < (12 if mode == "P" else 3)  # a palette has noise of its own


def test_what_is_small_enough_or_no_picture_of_8_bits_keeps_its_bytes():
    for content in (encoded("JPEG", (40, 300)), encoded("PNG", (17, 9)), encoded("PNG", (90, 90), "I;16")):
        assert SMALLER.of(content) is content


def test_how_a_camera_was_held_stays_known():
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"
    after = opened(SMALLER.of(encoded("JPEG", (200, 100), exif=exif))).getexif()
    assert dict(after) == {0x0112: 6}


def test_training_images_are_made_smaller_and_validation_images_are_not(tmp_path, capsys):
    for split, names in (("train", "abc"), ("val", "de")):
        for name in names:
            place = tmp_path / "set" / split / "cats"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{name}.png").write_bytes(encoded("PNG", (120, 100)))
    assert main(["shards", str(tmp_path / "set"), str(tmp_path / "shards"), "--short-side", "64"]) == 0
    train, val = list_splits(tmp_path / "shards")
    assert [opened(train.read(index)).size for index in range(3)] == [(77, 64)] * 3
    assert {val.read(index) for index in range(2)} == {encoded("PNG", (120, 100))}
    assert {name.rsplit(".", 1)[1] for name in train.names} == {"jpg"}
    prepare_shards(tmp_path / "set", tmp_path / "again", smaller=Smaller(64))
    for file in (tmp_path / "shards" / "train").iterdir():
        assert (tmp_path / "again" / "train" / file.name).read_bytes() == file.read_bytes()


def test_a_broken_image_is_named_and_nothing_is_written(tmp_path):
    for split in ("train", "val"):
        (tmp_path / "set" / split / "cats").mkdir(parents=True)
        (tmp_path / "set" / split / "cats" / "a.jpg").write_bytes(encoded("JPEG", (120, 100))[:900])
    with pytest.raises(DataError, match=r"a.jpg: cannot be decoded \(.*\): list what is broken with"):
        prepare_shards(tmp_path / "set", tmp_path / "shards", smaller=Smaller(64))
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--short-side", "31"], "short side: found 31, allowed: pixels, from 32"),
        (["--short-side", "64", "--quality", "101"], "quality: found 101, allowed: 1 to 100"),
        (["--quality", "80"], "--quality is that of images made smaller: give --short-side PIXELS, too"),
    ],
)
def test_values_out_of_range_are_refused(tmp_path, capsys, options, message):
    assert main(["shards", str(tmp_path / "set"), str(tmp_path / "shards"), *options]) == 1
    assert message in capsys.readouterr().err
