"""Made photographs as data sets, and what the tests of loaders do with them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.batch import DataConfig
from data.build import build_loaders
from data.dali import import_failure

needs_dali = pytest.mark.skipif(import_failure() is not None, reason=f"DALI does not import: {import_failure()}")
disk_loaders = pytest.mark.parametrize("loader", [pytest.param("dali", marks=needs_dali), "folder"])
CPU = torch.device("cpu")


def made_photo(seed: int, width: int = 90, height: int = 70) -> Image.Image:
    """Like a photograph: large smooth shapes, some fine texture."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)
    return Image.fromarray(np.clip(smooth + generator.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8))


def write_split(root: Path, per_class: int, classes: tuple[str, ...] = ("ant", "bee"), seed: int = 0) -> None:
    """Photographs of different sizes, odd and even."""
    for class_number, class_name in enumerate(classes):
        (root / class_name).mkdir(parents=True)
        for number in range(per_class):
            image = made_photo(seed + 1000 * class_number + number, 80 + 7 * number % 31, 75 + 5 * number % 23)
            image.save(root / class_name / f"{number}.jpg", quality=90)


@pytest.fixture
def photos(tmp_path):
    """14 training and 10 validation images of two classes."""
    write_split(tmp_path / "train", 7)
    write_split(tmp_path / "val", 5, seed=500)
    return tmp_path


def build(
    path: Path, loader: str, *, batch_size: int = 4, rank: int = 0, world_size: int = 1, seed: int = 3, **options
):
    """Loaders of small images. options: of `DataConfig`, and `splits` and `classes` of `build_loaders`."""
    asked = {name: options.pop(name) for name in ("splits", "classes") if name in options}
    options = {"image_size": 32, "resize_size": 40, "threads": 2, **options}
    config = DataConfig(path=str(path), loader=loader, batch_size=batch_size, **options)
    return build_loaders(config, rank=rank, world_size=world_size, device=CPU, seed=seed, **asked)


def taken(loader, steps: int | None = None) -> list[tuple[torch.Tensor, ...]]:
    """Copies of the batches of an epoch, or of its first steps."""
    batches = []
    for batch in loader:
        batches.append(tuple(tensor.clone() for tensor in batch))
        if len(batches) == steps:
            break
    return batches


def equal(one, other) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) for pair in zip(one, other, strict=True) for a, b in zip(*pair, strict=True)
    )


def synthetic(seed: int = 0, classes: list[str] | None = None, **options):
    config = DataConfig(loader="synthetic", batch_size=32, image_size=16, resize_size=16, **options)
    return build_loaders(config, rank=0, world_size=1, device=CPU, seed=seed, classes=classes)


def check_resumed_training(make_loader):
    """A loader that goes on from another's state after two batches gives what one left alone would have given."""
    undisturbed = make_loader()
    expected = taken(undisturbed) + taken(undisturbed)
    undisturbed.close()
    stopped = make_loader()
    taken(stopped, 2)
    state = stopped.state_dict()
    stopped.close()
    resumed = make_loader()
    resumed.load_state_dict(state)
    assert equal(taken(resumed) + taken(resumed), expected[2:])
    resumed.close()
