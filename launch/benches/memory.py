"""Resident memory of each loader, epoch after epoch: it must not grow in hour 30.

Each contender has a process of its own, which takes whole epochs of training and validation and does nothing else. What
counts is the peak of every epoch, of that process and its workers together, as the kernel keeps it (Linux only).
"""

import argparse
import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from data import DataConfig, DataError, build_loaders
from data.prepare import prepare_shards
from launch.benches.measure import data_config, machine, write_result
from train.cli import positive_int

IMAGES_PER_SHARD = 200
MIB = 1024
"""kB, as the kernel counts."""
SETTLED_EPOCHS = 2
"""Buffers find their size in the first epochs."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="data set with files of its own")
    parser.add_argument("--epochs", type=positive_int, default=10, metavar="N", help="default: 10")
    parser.add_argument("--threads", type=positive_int, default=2, metavar="N", help="default: 2")
    parser.add_argument("--batch-size", type=positive_int, default=64, metavar="N", help="default: 64")
    parser.add_argument("--image-size", type=positive_int, default=224, metavar="PIXELS", help="default: 224")


def measure(options: argparse.Namespace) -> None:
    """Measure, print the table, write the result. Raises DataError where the kernel keeps no peak."""
    if options.epochs <= SETTLED_EPOCHS:
        raise DataError(f"--epochs: found {options.epochs}, allowed: a whole number from {SETTLED_EPOCHS + 1}")
    if not Path("/proc/self/clear_refs").exists():
        raise DataError("there is no /proc/self/clear_refs: the peak of an epoch can be measured on Linux only")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / "shards"
        prepare_shards(options.data, shards, images_per_shard=IMAGES_PER_SHARD)
        contenders = {
            "DALI, folder": _config(options, options.data, "dali"),
            "DALI, shards": _config(options, shards, "dali"),
            "our folder loader": _config(options, options.data, "folder"),
        }
        print(f"batches of {options.batch_size}, {options.image_size} pixels: peak of each epoch, MiB")
        # At the same time: that changes speed, not memory.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(len(contenders), mp_context=context, max_tasks_per_child=1) as processes:
            running = {
                name: processes.submit(peaks_and_resident, config, options.epochs)
                for name, config in contenders.items()
            }
        for name, measured in running.items():
            peaks, resident = measured.result()
            row = {"name": name, "peak_mib": peaks, "resident_mib": resident, "growth": growth(peaks)}
            rows.append(row)
            print(f"  {name:<20} {' '.join(f'{peak:.0f}' for peak in peaks)}: {100 * row['growth']:+.1f}%", flush=True)
    print(f"(percent: the highest of the last {options.epochs - SETTLED_EPOCHS} above epoch {SETTLED_EPOCHS})")
    if options.out:
        what = f"memory, {options.image_size} pixels, batches of {options.batch_size}, {options.threads} thread(s)"
        content = {"benchmark": what, "machine": machine("torchvision", "nvidia-dali-cuda130", "Pillow"), "rows": rows}
        write_result(options.out, content)


def peaks_and_resident(config: DataConfig, epochs: int) -> tuple[list[float], list[float]]:
    """Peak of every epoch, and what is resident at its end, MiB, of this process and its workers together.

    What processes share is counted for each of them.
    """
    train, val = build_loaders(config, rank=0, world_size=1, device=torch.device("cpu"), seed=0)
    peaks, resident = [], []
    try:
        for epoch in range(epochs):
            for process in _own_processes():
                (process / "clear_refs").write_text("5")  # the peak begins anew
            train.go_to(epoch)
            for loader in (train, val):
                for _ in loader:
                    pass
            status = [(process / "status").read_text() for process in _own_processes()]
            peaks.append(sum(_kib(text, "VmHWM") for text in status) / MIB)
            resident.append(sum(_kib(text, "VmRSS") for text in status) / MIB)
    finally:  # this process would wait for the loaders' own at its end
        for loader in (train, val):
            loader.close()
    return peaks, resident


def growth(peaks: list[float]) -> float:
    """How far the highest peak after the first epochs is above the last of those, as a share of it."""
    settled = peaks[SETTLED_EPOCHS - 1]
    return max(peaks[SETTLED_EPOCHS:]) / settled - 1


def _config(options: argparse.Namespace, path: Path, loader: str) -> DataConfig:
    return data_config(
        path=str(path),
        loader=loader,
        threads=options.threads,
        batch_size=options.batch_size,
        image_size=options.image_size,
        resize_size=options.image_size * 8 // 7,
    )


def _own_processes() -> list[Path]:
    """/proc/PID of this process and of all below it."""
    found = [Path(f"/proc/{os.getpid()}")]
    for process in found:
        for children in process.glob("task/*/children"):
            found += [Path(f"/proc/{pid}") for pid in children.read_text().split()]
    return found


def _kib(status: str, name: str) -> int:
    [line] = [line for line in status.splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1])
