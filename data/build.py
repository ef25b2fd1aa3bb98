"""From a `DataConfig` to this rank's loaders: the only place that chooses between them."""

import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from data import dali, hf
from data.batch import (
    DECODING_ON_GPU,
    ON_DISK,
    DataConfig,
    DataError,
    Loader,
    Split,
    of_split,
    preprocessing_of,
    with_preprocessing,
)
from data.classes import is_number
from data.folder import FolderSource
from data.images import (
    DALI_SCHEMES,
    SPLITS,
    ImageList,
    has_split,
    hold_out,
    is_remote,
    list_splits,
    list_validation,
    require_schemes,
    with_classes,
)
from data.loader import SplitLoader
from data.sharding import Sharding, TrainSharding, ValSharding, local_batch_size
from data.synthetic import SyntheticSource, synthetic_splits

MAX_THREADS = 8
# Options that do not decide which pixels come at which step: a run may be resumed with others.
# What is held out shows in the images' number and names, the side of validation images in their own image_size.
WITHOUT_PIXELS = {*ON_DISK, *DECODING_ON_GPU, "held_out", "val_size", "synthetic_images", "synthetic_classes"}
# Options that earlier versions did not have: left out of a loader's identity where they say what was always done.
AS_EVER = ("resized_side", "interpolation", "mean", "std")
INSTALL_DALI = "pip install nvidia-dali-cuda130 (with CUDA 12: nvidia-dali-cuda120)"


def list_images(
    config: DataConfig, splits: Sequence[Split] = SPLITS, classes: Sequence[str] | None = None
) -> dict[Split, ImageList]:
    """The images of the splits, or more, for `build_loaders`. Arguments and errors as there; one process is enough."""
    return _listed(config, _choose(config, warn=False), splits, classes)


def one_list_serves_all(config: DataConfig) -> bool:
    """Whether what one process lists is where it says for the others, too.

    The Arrow files of a Hugging Face set may lie in a cache that every machine has for itself; images that are made lie
    nowhere.
    """
    return config.loader != "synthetic" and not hf.is_set(config.path)


def build_loaders(
    config: DataConfig,
    *,
    rank: int,
    world_size: int,
    device: torch.device,
    seed: int,
    local_world_size: int | None = None,
    splits: Sequence[Split] = SPLITS,
    classes: Sequence[str] | None = None,
    listed: Mapping[Split, ImageList] | None = None,
) -> list[Loader]:
    """This rank's loaders, training and validation; every rank calls it, with the same config and seed.

    local_world_size: ranks that share this machine's cores; all of them if not given. splits: which loaders, in this
    order; for validation alone no training images need be there. classes: names of a network's classes, in the order of
    its outputs, which labels then follow; the data set's own order if not given. Made images have none.
    listed: what `list_images` found with the same arguments, in this process or another; None: listed here.
    Raises DataError if the data set, the batch size or the chosen loader does not work, or if `classes` are not those
    of the data set. Threads and worker processes
    start with the first iteration.
    """
    config = with_preprocessing(config)
    kind = _choose(config, warn=rank == 0)
    listed = _listed(config, kind, splits, classes) if listed is None else _at_hand(listed)
    if config.held_out and "train" in listed:
        listed["train"], _ = hold_out(listed["train"], config.held_out)
    for note in _surprises(config, listed, order_is_given=classes is not None) if rank == 0 else ():
        warnings.warn(note, stacklevel=2)
    threads = config.threads or default_threads(local_world_size or world_size)
    local = local_batch_size(config.batch_size, world_size)
    ranks = {"local_batch_size": local, "rank": rank, "world_size": world_size}
    loaders = []
    for split in splits:
        images = listed[split]
        if split == "train":
            order = {"seed": seed, "shard_sizes": images.shard_sizes}
            sharding = TrainSharding(num_images=len(images.names), **ranks, **order)
        else:
            sharding = ValSharding(num_images=len(images.names), **ranks)
        loaders.append(_build_loader(config, kind, images, split, sharding, seed, device, threads))
    return loaders


def build_search_loaders(
    config: DataConfig,
    *,
    recalibration_batches: int,
    device: torch.device,
    seed: int,
    local_world_size: int = 1,
    classes: Sequence[str] | None = None,
    listed: Mapping[Split, ImageList] | None = None,
) -> tuple[Loader, Loader]:
    """What a search for widths looks at, all of it on each rank: training images for batch norm, and the held-out ones.

    Both come without augmentation, the same batches of config.batch_size images at every pass. The first are a fixed
    random choice out of those that training sees, in mixed order: so many batches, or as many as there are.
    Arguments and errors as of `build_loaders`; DataError also where config holds out no images.
    """
    if not config.held_out:
        raise DataError("held_out: found 0, allowed: a whole number from 1, for a search judges by images held out")
    config = with_preprocessing(config)
    kind = _choose(config, warn=False)
    listed = _listed(config, kind, SPLITS, classes) if listed is None else _at_hand(listed)
    trained, held = hold_out(listed["train"], config.held_out)
    order = np.random.Generator(np.random.PCG64([seed, 0])).permutation(len(trained.names))
    batches = min(recalibration_batches, max(1, len(order) // config.batch_size))
    threads = config.threads or default_threads(local_world_size)
    loaders = []
    for images in (trained.only(order[: batches * config.batch_size].tolist()), held):
        count = {"num_images": len(images.names), "local_batch_size": config.batch_size}
        sharding = ValSharding(**count, rank=0, world_size=1)
        loaders.append(_build_loader(config, kind, images, "val", sharding, seed, device, threads))
    return loaders[0], loaders[1]


def _listed(
    config: DataConfig, kind: str, splits: Sequence[Split], classes: Sequence[str] | None
) -> dict[Split, ImageList]:
    """The images of the splits, or more, with the given classes."""
    if kind == "synthetic":
        return dict(zip(SPLITS, synthetic_splits(config), strict=True))
    if "train" in splits:
        listed = dict(zip(SPLITS, list_splits(config.path, config.exclude), strict=True))
    else:
        listed = {"val": list_validation(config.path, config.exclude)}
    require_schemes(DALI_SCHEMES if kind == "dali" else (), *listed.values())
    if classes is not None:
        listed = {split: with_classes(images, list(classes)) for split, images in listed.items()}
    return listed


def _at_hand(listed: Mapping[Split, ImageList]) -> dict[Split, ImageList]:
    """The lists of another process; DataError where their images do not lie on this machine."""
    for images in listed.values():
        if not images.root.is_dir() and not is_remote(images.names[0]):
            raise DataError(
                f"{images.root}: rank 0 finds images there, but this machine has no such folder: mount or copy the "
                "data set to the same place on all machines"
            )
    return dict(listed)


def _build_loader(
    config: DataConfig,
    kind: str,
    images: ImageList,
    split: Split,
    sharding: Sharding,
    seed: int,
    device: torch.device,
    threads: int,
) -> Loader:
    """A loader of these images; split: training augments them, validation does not."""
    config = of_split(config, split)
    common = {"split": split, "sharding": sharding, "seed": seed, "device": device}
    if kind == "synthetic":
        source = SyntheticSource(config, images, **common)
    elif kind == "dali":
        source = dali.DaliSource(config, images, threads=threads, **common)
    else:
        source = FolderSource(config, images, workers=threads, **common)
    identity = _identity(config, kind, images, **common)
    return SplitLoader(kind, source, images, sharding=sharding, device=device, identity=identity)


def default_threads(local_world_size: int) -> int:
    """Threads or workers a rank: this process's cores shared among the machine's ranks, 1 to 8."""
    # Not os.cpu_count(): in containers and under batch systems a process may use a part of the machine's cores.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MAX_THREADS, cores // local_world_size))


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


def _surprises(config: DataConfig, listed: dict[Split, ImageList], *, order_is_given: bool) -> list[str]:
    """What a user might take for granted and is not so, in words."""
    notes = []
    images = next(iter(listed.values()))
    numbers = [int(name) for name in images.classes if is_number(name)]
    if len(numbers) == len(images.classes) and not order_is_given:
        orders_differ = sorted(images.classes, key=int) != sorted(images.classes)
        if orders_differ and "train" not in listed and not has_split(config.path, "train"):
            notes.append(
                f"{config.path}: the classes are numbers, and no training split says in which order the network knows "
                f"them; taken: {', '.join(images.classes[:5])} and so on"
            )
        elif numbers != list(range(len(numbers))):
            notes.append(
                f"{config.path}: the classes are numbers, but not 0 to {len(numbers) - 1} in order; the network's "
                f"output 0 is class {numbers[0]}, its last one ({len(numbers) - 1}) class {numbers[-1]}"
            )
    if not config.mmap and images.places is not None:
        notes.append("data.mmap has no effect with shards and Hugging Face sets, which are always read")
    return notes


def _identity(
    config: DataConfig, kind: str, images: ImageList, split: Split, sharding: Sharding, seed: int, device: torch.device
) -> dict[str, int | float | str]:
    """Everything that decides which pixels come at which step: a stored state goes on only where all of it is equal."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    usual = vars(preprocessing_of(DataConfig(channels=config.channels)))
    values = {name: value for name, value in values.items() if name not in AS_EVER or value != usual[name]}
    return {
        # As text: a tuple comes back as a list from some formats.
        **{k: str(v) if isinstance(v, tuple) else v for k, v in values.items() if k not in WITHOUT_PIXELS},
        "loader": kind,
        "split": split,
        "seed": seed,
        "rank": sharding.rank,
        "world_size": sharding.world_size,
        "num_images": sharding.num_images,
        "file_names": images.digest,
        **(dali.identity(config, device) if kind == "dali" else {}),
    }
