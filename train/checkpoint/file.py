"""Checkpoints: written whole or not at all, read without executing anything.

One file holds, in the order in which they are needed: which network it is and the plans so far (they rebuild its
shape), then tensors and the state of everything that has some. A run writes all of it (saver.py), its own configuration
and log included, so that a run is found again from any one of them; what launch/prune.py writes is a network alone: no
optimizer, and no configuration where no run trained it.
"""

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from train.checkpoint.archive import CheckpointError, UnreadableError, load_archive, write_archive
from train.checkpoint.upgrade import FORMAT, WITHOUT_CHECKSUM, upgrade
from train.files import open_regular, sync_directory, why_unwritten
from train.schema import fits, is_plain

# What every checkpoint holds, a run's and a network's alone; a file without was made or changed by something else.
NETWORK_PARTS = {
    "architecture": dict,
    "config": dict | None,
    "plans": str,
    "gpu_hours": float | None,
    "classes": list[str] | None,
    "preprocessing": dict | None,
    "model": dict,
    "ema": dict | None,
}

COPIED_AT_ONCE_BYTES = 1 << 22


def save_checkpoint(path: Path, content: dict[str, Any], keep: int = 1) -> None:
    """Write `content` (tensors and plain data) to `path`: a crash or a full disk leaves the old file or the new one.

    keep: how many checkpoints stay, this one included; those before it are NAME-1.pt (the newest of them), NAME-2.pt.
    Raises CheckpointError if the file cannot be written.
    """
    _replace(path, lambda file: write_archive(file, {"format": FORMAT, **content}), keep)


def copy_checkpoint(source: Path, path: Path, keep: int = 1) -> None:
    """As `save_checkpoint`, with the bytes of the checkpoint `source`.

    A copy and no link: damage to one of the two files leaves the other.
    """

    def write(file: BinaryIO) -> None:
        with open_regular(source) as original:
            shutil.copyfileobj(original, file, COPIED_AT_ONCE_BYTES)

    _replace(path, write, keep)


def _replace(path: Path, write: Callable[[BinaryIO], None], keep: int) -> None:
    temporary = path.with_name(path.name + ".part")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        for number in range(keep - 1, 0, -1):  # between two of these a crash leaves a gap, which a resume steps over
            if (younger := earlier_checkpoint(path, number - 1)).exists():
                younger.replace(earlier_checkpoint(path, number))
        temporary.replace(path)
        sync_directory(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        why = why_unwritten(error, path)
        raise CheckpointError(f"could not write {path}: {why}; the file before it, if any, is untouched") from error


def earlier_checkpoint(path: Path, number: int) -> Path:
    """The checkpoint that `path` was `number` saves ago: last.pt, last-1.pt, last-2.pt."""
    return path.with_name(f"{path.stem}-{number}{path.suffix}") if number else path


def newest_checkpoint(last: Path, best: Path) -> tuple[Path | None, dict[str, Any] | None, dict[Path, str]]:
    """The newest of `last` and those before it that can be read, and its content; without any of them `best`.

    (None, None, {}) where there is none at all. Also returns the newer ones that are damaged, and why, in words for the
    user. Raises UnreadableError for one that the system does not let be read, CheckpointError if all are damaged.
    """
    numbered = re.compile(rf"{re.escape(last.stem)}-([1-9]\d*){re.escape(last.suffix)}")
    matches = (numbered.fullmatch(file.name) for file in last.parent.glob("*"))
    numbers = [0, *sorted(int(match[1]) for match in matches if match)]
    names = [*(earlier_checkpoint(last, number) for number in numbers), best]
    damaged: dict[Path, str] = {}
    for file in filter(Path.exists, names):
        try:
            return file, load_checkpoint(file), damaged
        except UnreadableError:
            raise
        except CheckpointError as error:
            damaged[file] = str(error)
    if damaged:
        raise CheckpointError("; ".join(damaged.values()))
    return None, None, {}


def put_aside(damaged: Sequence[Path]) -> None:
    """Rename damaged files to NAME.damaged: checkpoints among the others would push a good one out at the next save."""
    for path in damaged:
        try:
            path.replace(path.with_name(path.name + ".damaged"))
        except OSError as error:
            raise CheckpointError(f"{path} is damaged and cannot be renamed: {error}") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, tensors and plain data only, in today's format.

    Raises UnreadableError where the system does not let it be read, CheckpointError if it is damaged, has no valid
    checksum, or is another program's or another version's.
    """
    content, vouched = load_archive(path, "is damaged or no checkpoint of this program")
    if not isinstance(content, dict) or "format" not in content:
        raise CheckpointError(f"{path} is no checkpoint of this program; launch/prune.py takes weights with --weights")
    if not is_plain(content, leaves=(torch.Tensor,)):
        raise CheckpointError(f"{path} is no checkpoint of this program: it holds what no run writes")
    if not vouched and content["format"] not in WITHOUT_CHECKSUM:
        raise CheckpointError(f"{path} is damaged: it has no checksum, and every checkpoint of its format has one")
    try:
        content = upgrade(content)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged or no checkpoint of this program: {error}") from error
    wrong = [key for key, kind in NETWORK_PARTS.items() if key not in content or not fits(content[key], kind)]
    wrong += [key for key in ("model", "ema") if not _are_weights(content.get(key) or {})]
    if wrong:
        raise CheckpointError(f"{path} is no checkpoint of this program: {first_few(wrong)} missing or not as written")
    return content


def _are_weights(weights: Any) -> bool:
    """Whether these are names and tensors, as state_dict() gives them, none larger than what the file holds of it."""
    named = weights.items() if isinstance(weights, Mapping) else [(None, None)]
    return all(isinstance(key, str) and isinstance(value, torch.Tensor) and _is_whole(value) for key, value in named)


def _is_whole(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.nbytes <= tensor.untyped_storage().nbytes()


def first_few(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
