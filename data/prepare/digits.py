"""scikit-learn's 1,797 handwritten digits (8x8, 17 grey levels) as an image folder: a data set without a download."""

from pathlib import Path

import numpy as np
from PIL import Image

from data.prepare.atomic import write_data_set

VAL_IMAGES = 360
SIDE = 32
JPEG_QUALITY = 95
BRIGHTEST = 16


def prepare_digits(path: str | Path) -> bool:
    """Write PATH/{train,val}/{0..9}/NNNN.jpg: 1,437 and 360 RGB JPEGs of 32x32 pixels; NNNN is scikit-learn's number.

    The split is fixed and stratified. One rank calls it. A finished set is left as it is; raises DataError if something
    else is at `path` or the place cannot be written.
    """
    return write_data_set(path, _write_digits)


def _write_digits(root: Path) -> None:
    # Imported here, as only this preparation needs scikit-learn, and it takes a second.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    numbers = np.arange(len(digits.target))
    train, val = train_test_split(numbers, test_size=VAL_IMAGES, stratify=digits.target, random_state=0)
    for split, members in (("train", train), ("val", val)):
        for label in range(10):
            (root / split / str(label)).mkdir(parents=True)
        for number in members:
            file = root / split / str(digits.target[number]) / f"{number:04d}.jpg"
            _upscaled(digits.images[number]).save(file, quality=JPEG_QUALITY)


def _upscaled(levels: np.ndarray) -> Image.Image:
    pixels = np.round(levels * (255 / BRIGHTEST)).astype(np.uint8)
    return Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB")
