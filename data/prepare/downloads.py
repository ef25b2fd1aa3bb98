"""Small public data sets as image folders, fetched and checksummed by torchvision's downloaders.

Images that come as pixels are written as PNG: the same pixels, in 32-pixel images, as JPEG cost a network points.
"""

import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from ssl import SSLError
from urllib.error import URLError

from torchvision.datasets import CIFAR10, CIFAR100, MNIST, Imagenette, VisionDataset

from data.batch import DataError
from data.prepare.atomic import write_data_set
from data.prepare.progress import tracked

DOWNLOADED = ".download"
SILENCE_S = 60.0
"""How long a server may say nothing."""


def prepare_mnist(path: str | Path) -> bool:
    """Write PATH/{train,val}/{0..9}/NNNNN.png: 60,000 and 10,000 grey images of 28x28 pixels.

    This and the functions below: one rank calls it; returns whether it wrote, as a finished set is left as it is.
    Raises DataError if the download fails, something else is at `path`, or the place cannot be written.
    """
    return write_data_set(path, lambda root: _write_pixels(root, MNIST, [str(digit) for digit in range(10)]))


def prepare_cifar10(path: str | Path) -> bool:
    """Write PATH/{train,val}/CLASS/NNNNN.png: 50,000 and 10,000 RGB images of 32x32 pixels in 10 classes."""
    return write_data_set(path, lambda root: _write_pixels(root, CIFAR10))


def prepare_cifar100(path: str | Path) -> bool:
    """Write PATH/{train,val}/CLASS/NNNNN.png: 50,000 and 10,000 RGB images of 32x32 pixels in 100 classes."""
    return write_data_set(path, lambda root: _write_pixels(root, CIFAR100))


def prepare_imagenette(path: str | Path, size: str = "full") -> bool:
    """Write PATH/{train,val}/WNID/*.JPEG: 9,469 and 3,925 photographs of ten ImageNet classes.

    size: full, 320px or 160px (length of the shorter side).
    """
    return write_data_set(path, lambda root: _write_imagenette(root, size))


def _write_pixels(root: Path, data_set: Callable[..., VisionDataset], classes: list[str] | None = None) -> None:
    """classes: folder names by label; the data set's own if not given."""
    for split in ("train", "val"):
        with _downloading():
            images = data_set(root / DOWNLOADED, train=split == "train", download=True)
        folders = [root / split / name for name in classes or images.classes]
        for folder in folders:
            folder.mkdir(parents=True)
        for number, (image, label) in enumerate(tracked(images, f"writing {split}", len(images))):
            image.save(folders[label] / f"{number:05d}.png")
    shutil.rmtree(root / DOWNLOADED)


def _write_imagenette(root: Path, size: str) -> None:
    with _downloading():
        Imagenette(root / DOWNLOADED, size=size, download=True)
    [unpacked] = [folder for folder in (root / DOWNLOADED).iterdir() if folder.is_dir()]
    for split in ("train", "val"):
        (unpacked / split).rename(root / split)
    shutil.rmtree(root / DOWNLOADED)


@contextmanager
def _downloading() -> Iterator[None]:
    """What a network can do, and torchvision's RuntimeError for a wrong checksum, as DataError; a dead server, too."""
    # torchvision opens its connections without a limit; this one is for those of the whole process.
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE_S)
    try:
        yield
    except (URLError, HTTPException, ConnectionError, TimeoutError, SSLError, RuntimeError) as error:
        raise DataError(f"the download failed ({' '.join(str(error).split())}): try again, with a network") from error
    finally:
        socket.setdefaulttimeout(before)
