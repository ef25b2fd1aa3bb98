"""Both loaders show a network the same colours, and where they do not, `check` calls the image broken."""

import PIL
import pytest
import torch
from colours import SIDE, images_of_every_kind
from made_images import build, needs_dali, taken

from data.batch import NORMALISATION
from data.images import list_split
from data.plain import is_plainly_whole
from data.prepare import check_data

MAX_APART = 2
"""Of 255."""
BROKEN = {
    *("JPEG cmyk without mark", "JPEG cmyk without mark progressive", "JPEG cmyk without mark by its components"),
    *("JPEG cmyk without mark jfif", "JPEG cmyk with half a mark"),
    *("TIFF LA", "TIFF 1", "TIFF F", "TIFF I", "PPM F", "PPM up to 100", "PPM in digits"),
    *("JPEG2000 LA", "JPEG2000 CMYK", "JPEG2000 YCbCr"),
    *(f"TIFF turned {orientation}" for orientation in range(2, 9)),
}
"""What DALI and Pillow read differently, or DALI not at all."""
if int(PIL.__version__.split(".")[0]) < 13:
    BROKEN.add("TIFF YCbCr")


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory):
    """Images of every kind of colour as both splits of a set, checked."""
    path = tmp_path_factory.mktemp("colours")
    for split in ("train", "val"):
        (path / split / "one").mkdir(parents=True)
        for name, content in images_of_every_kind().items():
            (path / split / "one" / f"{name.replace('/', '')}.jpg").write_bytes(content)
    return path, check_data(path).broken


def levels(path, loader: str, channels: int, split: str) -> torch.Tensor:
    """What a network sees of all images, in the order of the listing, float32 (N, channels, SIDE, SIDE), of 255."""
    count = len(list_split(path, split).names)
    whole = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip": 0.0}
    options = {"image_size": SIDE, "resize_size": SIDE, "channels": channels, "threads": 1, **whole}
    [images] = build(path, loader, splits=(split,), batch_size=1, **options)
    batches = taken(images)
    images.close()
    order = [int(images._sharding.indices(0, step)[0][0]) for step in range(len(batches))]
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in NORMALISATION[channels])
    shown = torch.zeros(count, channels, SIDE, SIDE)
    for index, (batch, _, _) in zip(order, batches, strict=True):
        shown[index] = 255 * (batch[0] * std + mean)
    return shown


@needs_dali
def test_check_calls_broken_what_the_loaders_read_differently_and_nothing_else(every_kind):
    _, broken = every_kind
    assert {name.removeprefix("val/one/").removesuffix(".jpg") for name in broken if name.startswith("val/")} == BROKEN
    assert all("DALI" in reason for name, reason in broken.items() if "YCbCr" not in name)


@needs_dali
@pytest.mark.parametrize("split", ["val", "train"])
@pytest.mark.parametrize("channels", [3, 1], ids=["RGB", "grey"])
def test_both_loaders_show_the_same_colours(every_kind, channels, split):
    path, broken = every_kind
    names = [name for name in list_split(path, split).names if f"{split}/{name}" not in broken]
    apart = (levels(path, "dali", channels, split) - levels(path, "folder", channels, split)).abs().amax(dim=(1, 2, 3))
    differing = {name: round(most, 1) for name, most in zip(names, apart.tolist(), strict=False) if most > MAX_APART}
    assert not differing


def test_a_jpeg_in_cmyk_is_plain_with_the_mark_of_adobe_alone():
    """Without it Pillow shows (255, 55, 55) where DALI shows black; DALI is to be asked before it is trained on."""
    images = {name: content for name, content in images_of_every_kind().items() if name.startswith("JPEG cmyk")}
    assert {name for name, content in images.items() if not is_plainly_whole(content)} == {
        name for name in BROKEN if name.startswith("JPEG cmyk")
    }
