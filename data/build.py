"""From a `DataConfig` to this rank's two loaders: the only place that chooses between them."""

import os
import warnings

import torch

from data import dali
from data.batch import DataConfig, DataError, Loader
from data.folder import FolderSource, ImageList, list_splits
from data.loader import SplitLoader
from data.sharding import Sharding, TrainSharding, ValSharding, batch_size_per_rank
from data.synthetic import SyntheticSource, synthetic_labels

MOST_THREADS = 8
INSTALL_DALI = "pip install nvidia-dali-cuda130 (with CUDA 12: nvidia-dali-cuda120)"


def build_loaders(
    config: DataConfig,
    *,
    rank: int,
    world_size: int,
    device: torch.device,
    seed: int,
    local_world_size: int | None = None,
) -> tuple[Loader, Loader]:
    """This rank's training and validation loader; every rank calls it, with the same config and seed.

    local_world_size: ranks that share this machine's cores; all of them if not given.
    Raises DataError if the data set, the batch size or the chosen loader does not work. Threads and worker processes
    start with the first iteration.
    """
    kind = _choose(config, warn=rank == 0)
    threads = config.threads or default_threads(local_world_size or world_size)
    if kind == "synthetic":
        images = {"train": None, "val": None}
        counts = {"train": config.synthetic_images, "val": config.synthetic_images // 4}
        labels = {split: synthetic_labels(count, config.synthetic_classes) for split, count in counts.items()}
        num_classes = config.synthetic_classes
    else:
        images = dict(zip(("train", "val"), list_splits(config.path), strict=True))
        labels = {split: listing.labels for split, listing in images.items()}
        num_classes = len(images["train"].classes)

    loaders = []
    for split in ("train", "val"):
        sharding = _sharding(config, split, len(labels[split]), rank, world_size, seed)
        common = {"sharding": sharding, "seed": seed, "device": device}
        if kind == "synthetic":
            source = SyntheticSource(config, labels[split], split=split, **common)
        elif kind == "dali":
            source = dali.DaliSource(config, images[split], augment=split == "train", threads=threads, **common)
        else:
            source = FolderSource(config, images[split], augment=split == "train", workers=threads, **common)
        loaders.append(
            SplitLoader(
                kind=kind,
                source=source,
                sharding=sharding,
                labels=labels[split],
                num_classes=num_classes,
                device=device,
                identity=_identity(config, kind, split, images[split], sharding, seed, device),
            )
        )
    return loaders[0], loaders[1]


def default_threads(local_world_size: int) -> int:
    """Threads or workers a rank: this process's cores shared among the machine's ranks, 1 to 8."""
    # Not os.cpu_count(): in containers and under batch systems a process may use a part of the machine's cores.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_THREADS, cores // local_world_size))


def _choose(config: DataConfig, *, warn: bool) -> str:
    """Loader by name, `auto` resolved."""
    if config.loader not in ("auto", "dali"):
        return config.loader
    failure = dali.import_failure()
    if failure is None:
        return "dali"
    if config.loader == "dali":
        raise DataError(f"loader: found 'dali', but it cannot be imported ({failure}): {INSTALL_DALI}, or use 'folder'")
    if warn:
        warnings.warn(
            f"loader 'auto': DALI cannot be imported ({failure}), so images are read by torchvision and Pillow, "
            f"which is slower. To use DALI: {INSTALL_DALI}",
            stacklevel=3,
        )
    return "folder"


def _sharding(config: DataConfig, split: str, num_images: int, rank: int, world_size: int, seed: int) -> Sharding:
    ranks = {
        "num_images": num_images,
        "batch_size": batch_size_per_rank(config.batch_size, world_size),
        "rank": rank,
        "world_size": world_size,
    }
    return TrainSharding(**ranks, seed=seed) if split == "train" else ValSharding(**ranks)


def _identity(
    config: DataConfig,
    kind: str,
    split: str,
    images: ImageList | None,
    sharding: Sharding,
    seed: int,
    device: torch.device,
) -> dict[str, int | float | str]:
    """Everything that decides which pixels come at which step: a stored state goes on only where all of it is equal."""
    options = ("batch_size", "image_size", "resize_size", "channels", "flip")
    return {
        "loader": kind,
        "split": split,
        "seed": seed,
        "rank": sharding.rank,
        "world_size": sharding.world_size,
        "num_images": sharding.num_images,
        "file_names": images.digest if images else f"{config.synthetic_classes} synthetic classes",
        **{name: getattr(config, name) for name in options},
        # As text: a tuple comes back as a list from some formats.
        "crop_scale": str(tuple(config.crop_scale)),
        "crop_ratio": str(tuple(config.crop_ratio)),
        **(dali.identity(device) if kind == "dali" else {}),
    }
