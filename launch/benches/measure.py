"""What the benchmarks share: rounds in turn, medians with their spread, and the machine that they ran on."""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from data import DataConfig, DataError
from data.batch import require_sizes, with_preprocessing
from data.images import list_splits
from train.errors import TrainError
from train.world import World, available_cores


def rounds_in_turn(contenders: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Contender -> its measurement in every round. One round more comes first, as a warm-up, and is dropped.

    A contender prepares, measures and returns one number. They take turns, so that a machine that slows down slows
    all of them.
    """
    results: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, contender in contenders.items():
            value = contender()
            if number > 0:
                results[name].append(value)
    return results


def data_config(**settings: Any) -> DataConfig:
    """The options of a loader; DataError, one line for the user, where one is not allowed."""
    try:
        config = DataConfig(**settings)
        require_sizes(config)
    except ValueError as error:
        raise DataError(str(error)) from error
    return with_preprocessing(config)


def require_image_folder(path: Path) -> None:
    """DataError for anything else: torchvision's way reads image folders only."""
    train, _ = list_splits(path)
    if train.places is not None or train.root != path / "train":
        found = "file lists" if train.places is None else "shards or a Hugging Face set"
        raise DataError(f"{path}: found {found}, allowed: an image folder, as torchvision reads no other: give one")


def timed(work: Callable[[], Any], world: World) -> float:
    """Seconds of `work`, with what it leaves the device to do."""
    world.synchronize()
    start = time.perf_counter()
    work()
    world.synchronize()
    return time.perf_counter() - start


def summary(values: list[float]) -> dict[str, Any]:
    """Median, smallest, largest and all values."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": values}


def with_spread(values: list[float], digits: int = 3) -> str:
    """`median (smallest to largest)` for a table."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def machine(*packages: str) -> dict[str, Any]:
    """The hardware, and the versions of Python, torch and `packages`, as they stand in a result file."""
    return {
        "cpu": _cpu_name(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", *packages)},
    }


def write_result(path: Path, content: Mapping[str, Any]) -> None:
    """Write a result with the command that made it. Raises TrainError where the file cannot be written."""
    text = json.dumps({"command": " ".join(["python", *sys.argv]), **content}, indent=2) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise TrainError(f"cannot write {path}: {error.strerror}") from error


def _version(package: str) -> str | None:
    """None where it is not installed; the spelling of the name does not matter, as it does in a list of them all."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    """The processor's name where Linux tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
