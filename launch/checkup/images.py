"""Images from the disk to the device: what is decoded, whether it arrives whole, and how fast."""

import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data import Batch, DataConfig, Loader, build_loaders, train_size
from data.dali import DaliDecoder, import_failure
from data.images import open_image
from launch.benches.agreement import pixel_difference
from launch.benches.measure import data_config
from launch.checkup.check import Failed, Figure, Machine, Skipped

WIDTH, HEIGHT = 500, 375
"""Of a usual photograph of ImageNet."""
PHOTOGRAPHS = "photographs"
"""Their folder, in the machine's."""
DISTINCT = 32
"""Photographs that are made; the others are hard links to them, as there are thousands for each rank."""
MIN_TIMED = 4
"""Steps, for a rate."""
MAX_APART = 1.2
"""Of 255, mean over an image: what two decoders may differ by (data/defects.py), and two filters of a resize."""
KINDS: dict[str, Callable[[Image.Image, Path], None]] = {
    "JPEG": lambda photo, path: photo.save(path, "JPEG", quality=90),
    "progressive": lambda photo, path: photo.save(path, "JPEG", quality=90, progressive=True),
    "grey": lambda photo, path: photo.convert("L").save(path, "JPEG", quality=90),
    "CMYK": lambda photo, path: photo.convert("CMYK").save(path, "JPEG", quality=90),
    "PNG": lambda photo, path: photo.save(path, "PNG"),
}
"""As ImageNet has them: among its JPEGs are 22 in CMYK and one PNG."""
SLOW_STREAM_CYCLES = 20_000_000
"""For so long the GPU's stream is kept busy before a batch is read: about 10 ms."""


def decoders(machine: Machine) -> Figure:
    """Every kind of image through DALI's CPU decoder, beside Pillow."""
    _require_dali()
    decoder, apart = DaliDecoder(), {}
    for kind, path in _of_every_kind(machine.folder / f"kinds-{machine.world.rank}").items():
        pillow = np.asarray(open_image(path.read_bytes(), "RGB")).astype(np.int16)
        ours = decoder.decode(path.read_bytes()).astype(np.int16)
        if ours.shape != pillow.shape:
            raise Failed(f"{kind}: DALI gives {ours.shape}, Pillow {pillow.shape}")
        apart[kind] = float(np.abs(ours - pillow).mean())
    decoder.close()
    if worst := [f"{kind} {value:.1f}" for kind, value in apart.items() if value > MAX_APART]:
        raise Failed(f"DALI decodes to other images than Pillow: {', '.join(worst)} of 255 apart on average")
    return Figure(f"{', '.join(apart)}: at most {max(apart.values()):.2f} of 255 from Pillow's pixels", apart)


def gpu_decoder(machine: Machine) -> Figure:
    """Validation images that the GPU decodes, beside those of the CPU: an accuracy must not depend on the machine."""
    machine.require_gpu("nothing decodes but the CPU")
    _require_dali()
    with ExitStack() as opened:
        loaders = [
            _loader(machine, "val", opened, "dali", device=device) for device in (machine.device, torch.device("cpu"))
        ]
        mean, worst = pixel_difference(*loaders, _config(machine).std)
    if worst > MAX_APART:
        raise Failed(f"the GPU's pixels are {worst:.2f} of 255 from the CPU's in the worst image, allowed {MAX_APART}")
    return Figure(f"{mean:.3f} of 255 from the CPU's pixels, worst image {worst:.3f}", {"mean": mean, "worst": worst})


def loaders_agree(machine: Machine) -> Figure:
    """Validation images through DALI and through torchvision's operations: labels, order, sizes, pixels."""
    _require_dali()
    with ExitStack() as opened:
        kinds = (_config(machine, loader=kind, threads=1) for kind in ("dali", "folder"))
        dali, folder = (_opened(config, machine, "val", opened) for config in kinds)
        mean, worst = pixel_difference(dali, folder, _config(machine).std)
    if mean > MAX_APART:
        raise Failed(f"DALI's images are {mean:.2f} of 255 from torchvision's, allowed {MAX_APART}")
    return Figure(f"{mean:.3f} of 255 apart, worst image {worst:.3f}", {"mean": mean, "worst": worst})


def growing_sizes(machine: Machine) -> Figure:
    """Training images that grow from epoch to epoch, in one pipeline."""
    side = machine.effort.image_side
    config = _config(machine, start_size=side // 2, grow_epochs=2, size_step=side // 4)
    with ExitStack() as opened:
        train = _opened(config, machine, "train", opened)
        sides = []
        for epoch in range(3):
            train.go_to(epoch)
            batch = next(iter(train))
            sides.append(batch.images.shape[-1])
            if not bool(torch.isfinite(batch.images).all()):
                raise Failed(f"epoch {epoch + 1}: images with NaN or infinite pixels")
    expected = [train_size(config, epoch) for epoch in range(3)]
    if sides != expected:
        raise Failed(f"sides of training images: found {sides}, expected {expected}")
    return Figure(f"{', '.join(map(str, sides))} pixels in epochs 1 to 3", {"sides": sides})


def rebuilt(machine: Machine) -> Figure:
    """A loader built anew from a checkpoint gives the batches that the old one would have given, bit for bit."""
    ahead = 3
    with ExitStack() as opened:
        first, second = (_loader(machine, "train", opened) for _ in range(2))
        if len(first) <= ahead:
            raise Failed(f"an epoch has {len(first)} batches, needed {ahead + 1}: there are too few photographs")
        batches = iter(first)
        next(batches)
        state = first.state_dict()
        expected = [_copied(next(batches)) for _ in range(ahead)]
        second.load_state_dict(state)
        found = [_copied(batch) for batch in islice(second, ahead)]
        if len(found) < ahead:
            raise Failed(f"{len(found)} batches come after a rebuild, expected {ahead}")
        for number, (old, new) in enumerate(zip(expected, found, strict=True), start=1):
            if not all(map(torch.equal, old, new)):
                raise Failed(f"batch {number} after a rebuild is another one: do not resume in the middle of an epoch")
    return Figure(f"{ahead} batches of {len(old.labels)} after a rebuild, bit-equal ({first.kind})", {"batches": ahead})


def handed_over(machine: Machine) -> Figure:
    """Batches that torch reads late, while the loader works ahead, have the sums of batches that were read at once."""
    with ExitStack() as opened:
        prompt, late = (_loader(machine, "train", opened) for _ in range(2))
        expected = []
        for batch in prompt:
            machine.world.synchronize()
            expected.append(_checksum(batch).item())
        sums = []
        for batch in late:
            _delay(machine)
            sums.append(_checksum(batch))
    found = [one.item() for one in sums]
    if wrong := [number for number, pair in enumerate(zip(expected, found, strict=True), 1) if pair[0] != pair[1]]:
        raise Failed(f"batches {wrong[:5]} of {len(found)} were overwritten before torch had read them")
    return Figure(f"{len(found)} batches read late, all sums equal ({late.kind})", {"batches": len(found)})


def decoding_rates(machine: Machine) -> Figure:
    """Images a second over threads, and on a GPU over the hardware decoder's share, with what memory is left."""
    loads = (0.0, 0.65, 1.0) if machine.device.type == "cuda" else (0.65,)
    rows = []
    for threads in machine.effort.threads:
        for load in loads:
            with ExitStack() as opened:
                config = _config(machine, threads=threads, hw_decoder_load=load)
                rows.append({"threads": threads, "hw_decoder_load": load, **_rate(machine, config, opened)})
    best = max(rows, key=lambda row: row["images_per_s"])
    rates = ", ".join(f"{row['images_per_s']:,.0f}" for row in rows)
    text = f"{rates} images/s with {'/'.join(map(str, machine.effort.threads))} threads"
    if len(loads) > 1:
        text += f" and hardware shares {'/'.join(map(str, loads))}; {best['free_bytes'] >> 30} GiB free"
    return Figure(text, {"rows": rows})


def make_photographs(machine: Machine) -> None:
    """What the checks of loaders read: an image folder of two classes; DISTINCT of its photographs are different.

    One rank calls it, before the checks.
    """
    folder, count = machine.folder / PHOTOGRAPHS, machine.effort.photos * machine.world.size
    made = [_made(seed) for seed in range(min(count, DISTINCT))]
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            (folder / split / name).mkdir(parents=True)
    first: list[Path] = []
    for number in range(count):
        path = folder / "train" / ("ant", "bee")[number % 2] / f"{number}.jpg"
        if number < DISTINCT:
            made[number].save(path, quality=90)
            first.append(path)
        else:
            _link(first[number % DISTINCT], path)
        if number < 2 * DISTINCT:  # nothing is timed on these
            _link(path, folder / "val" / path.parent.name / path.name)


def _link(source: Path, path: Path) -> None:
    try:
        path.hardlink_to(source)
    except OSError:  # a file system that has none
        shutil.copyfile(source, path)


def training_loader(machine: Machine) -> Loader:
    """This rank's training images out of the photographs; the caller closes it."""
    with ExitStack() as opened:
        loader = _loader(machine, "train", opened)
        opened.pop_all()
    return loader


def _made(seed: int) -> Image.Image:
    """Large smooth shapes and some fine texture: a file as large as a photograph's."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), dtype=np.float64)
    return Image.fromarray(np.clip(smooth + generator.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8))


def _of_every_kind(folder: Path) -> dict[str, Path]:
    folder.mkdir()
    paths = {kind: folder / f"{kind}.JPEG" for kind in KINDS}  # ImageNet's PNG is called so, too
    for number, (kind, path) in enumerate(paths.items()):
        KINDS[kind](_made(number), path)
    return paths


def _require_dali() -> None:
    if (failure := import_failure()) is not None:
        raise Skipped(f"DALI cannot be imported ({failure})")


def _config(machine: Machine, **settings: object) -> DataConfig:
    side = machine.effort.image_side
    usual = {
        "path": str(machine.folder / PHOTOGRAPHS),
        "batch_size": machine.effort.batch_sizes[0] * machine.world.size,
        "image_size": side,
        "resize_size": side * 8 // 7,
        "threads": max(machine.effort.threads[0], 2),
    }
    return data_config(**{**usual, **settings})


def _loader(
    machine: Machine, split: str, opened: ExitStack, kind: str = "auto", device: torch.device | None = None
) -> Loader:
    return _opened(_config(machine, loader=kind), machine, split, opened, device)


def _opened(
    config: DataConfig, machine: Machine, split: str, opened: ExitStack, device: torch.device | None = None
) -> Loader:
    world = machine.world
    [loader] = build_loaders(
        config,
        rank=world.rank,
        world_size=world.size,
        local_world_size=world.local_size,
        device=device or world.device,
        seed=0,
        splits=(split,),
    )
    opened.callback(loader.close)
    return loader


def _rate(machine: Machine, config: DataConfig, opened: ExitStack) -> dict[str, float]:
    """The first quarter of an epoch is left out: threads start, and what is taken was made before.

    Raises Failed where too few steps are left to be timed.
    """
    config = replace(config, batch_size=machine.effort.batch_sizes[-1] * machine.world.size)
    train = _opened(config, machine, "train", opened)
    warm_up, images, start = max(1, len(train) // 4), 0, 0.0
    if (timed := len(train) - warm_up - 1) < MIN_TIMED:
        raise Failed(f"a rate would be of {max(timed, 0)} step(s), needed {MIN_TIMED}: there are too few photographs")
    for step, batch in enumerate(train):
        if step == warm_up:
            machine.world.synchronize()
            start = time.perf_counter()
        images += len(batch.labels) if step > warm_up else 0
    machine.world.synchronize()
    free = torch.cuda.mem_get_info(machine.device)[0] if machine.device.type == "cuda" else 0
    return {"images_per_s": images / (time.perf_counter() - start), "free_bytes": free}


def _copied(batch: Batch) -> Batch:
    return Batch(*(tensor.clone() for tensor in batch))


def _checksum(batch: Batch) -> torch.Tensor:
    """Sum of all bits as whole numbers, so that no order of adding matters; queued, not awaited."""
    return batch.images.contiguous().view(torch.int32).sum(dtype=torch.int64)


def _delay(machine: Machine) -> None:
    """What comes next is read late: by a GPU whose stream is busy, on a CPU by a process that slept."""
    if machine.device.type == "cuda":
        torch.cuda._sleep(SLOW_STREAM_CYCLES)
    else:
        time.sleep(0.01)
