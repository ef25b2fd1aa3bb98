"""Checkpoints: written whole or not at all, read without executing anything.

One file holds, in the order in which they are needed: which network it is and the plans so far (they rebuild its
shape), then tensors and the state of everything that has some. A run writes all of it (saving.py); what
launch/prune.py writes is a network alone: no optimizer, and no configuration where no run trained it.

The file is torch.save's zip archive with a checksum as the archive's comment (`unzip -z last.pt` shows it): a file of
its own could be lost or outlive its checkpoint. It is verified before anything is unpickled.
"""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from train.checkpoint.upgrade import FORMAT, upgrade
from train.errors import TrainError

COMMENT = re.compile(rb"sha256:([0-9a-f]{64})")
COMMENT_BYTES = 71

# What every checkpoint holds, a run's and a network's alone; a file without was made or changed by something else.
NETWORK_PARTS = {
    "architecture": dict,
    "config": dict | None,
    "plans": str,
    "gpu_hours": float | int | None,
    "model": dict,
    "ema": dict | None,
}


class CheckpointError(TrainError):
    """A checkpoint that cannot be read or does not belong here."""


def save_checkpoint(path: Path, content: dict[str, Any], keep: int = 1) -> None:
    """Write `content` (tensors and plain data) to `path`: a crash or a full disk leaves the old file or the new one.

    keep: how many checkpoints stay, this one included; those before it are NAME-1.pt (the newest of them), NAME-2.pt.
    Raises CheckpointError if the file cannot be written.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        with temporary.open("wb") as file:
            _write(file, {"format": FORMAT, **content})
            file.flush()
            os.fsync(file.fileno())
        for number in range(keep - 1, 0, -1):  # between two of these a crash leaves a gap, which a resume steps over
            if (younger := earlier_checkpoint(path, number - 1)).exists():
                younger.replace(earlier_checkpoint(path, number))
        temporary.replace(path)
        _sync_directory(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise CheckpointError(f"could not write {path}: {error}; the file before it, if any, is untouched") from error


def earlier_checkpoint(path: Path, number: int) -> Path:
    """The checkpoint that `path` was `number` saves ago: last.pt, last-1.pt, last-2.pt."""
    return path.with_name(f"{path.stem}-{number}{path.suffix}") if number else path


def newest_checkpoint(path: Path) -> tuple[Path | None, dict[str, Any] | None, dict[Path, str]]:
    """The newest of `path` and those before it that can be read, and its content; None where there is none at all.

    Also returns the newer ones, and why they cannot, as messages for the user. Raises CheckpointError if none can.
    """
    numbered = re.compile(rf"{re.escape(path.stem)}-([1-9]\d*){re.escape(path.suffix)}")
    matches = (numbered.fullmatch(file.name) for file in path.parent.glob("*"))
    numbers = [0, *sorted(int(match[1]) for match in matches if match)]
    found = [file for number in numbers if (file := earlier_checkpoint(path, number)).exists()]
    damaged: dict[Path, str] = {}
    for file in found:
        try:
            content = load_checkpoint(file)
        except CheckpointError as error:
            damaged[file] = str(error)
        else:
            return file, content, damaged
    if damaged:
        raise CheckpointError("; ".join(damaged.values()))
    return None, None, {}


def put_aside(damaged: Sequence[Path]) -> None:
    """Rename damaged checkpoints to NAME.damaged: among the others they would push a good one out at the next save."""
    for path in damaged:
        try:
            path.replace(path.with_name(path.name + ".damaged"))
        except OSError as error:
            raise CheckpointError(f"{path} is damaged and cannot be renamed: {error}") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, tensors and plain data only (`weights_only`), after its checksum.

    Raises CheckpointError if it is damaged, another program's or another version's.
    """
    content = load_archive(path, "is damaged or no checkpoint of this program")
    if not isinstance(content, dict) or "format" not in content:
        raise CheckpointError(f"{path} is no checkpoint of this program; launch/prune.py takes weights with --weights")
    try:
        content = upgrade(content)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged or no checkpoint of this program: {error}") from error
    wrong = [key for key, kind in NETWORK_PARTS.items() if key not in content or not isinstance(content[key], kind)]
    wrong += [key for key in ("model", "ema") if not _are_tensors(content.get(key) or {})]
    if wrong:
        raise CheckpointError(f"{path} is no checkpoint of this program: {first_few(wrong)} missing or not as written")
    return content


def _are_tensors(weights: Any) -> bool:
    """Whether these are names and tensors, as state_dict() gives them."""
    named = weights.items() if isinstance(weights, Mapping) else [(None, None)]
    return all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in named)


def _write(file: BinaryIO, content: dict[str, Any]) -> None:
    """The archive, and behind it its comment: the checksum of the archive as it was without."""
    hashing = _Hashing(file)
    torch.save(content, hashing)
    comment = b"sha256:" + hashing.digest.hexdigest().encode()
    file.seek(-2, os.SEEK_END)  # a zip archive ends with its comment's length, here still 0, and the comment
    file.write(len(comment).to_bytes(2, "little") + comment)


class _Hashing:
    """A file to write to that keeps the checksum of what it was given."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def _is_intact(path: Path) -> bool:
    """Whether the checksum agrees; what has none (torch.save's own files) is left to torch.load."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - COMMENT_BYTES))
        stored = COMMENT.fullmatch(file.read())
        if stored is None:
            return True
        file.seek(0)
        digest, left = hashlib.sha256(), size - COMMENT_BYTES - 2
        while left > 0 and (block := file.read(min(left, 1 << 22))):
            digest.update(block)
            left -= len(block)
    digest.update(b"\0\0")
    return digest.hexdigest().encode() == stored[1]


def _sync_directory(path: Path) -> None:
    """Make the new name as lasting as the file's content."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def load_archive(path: Path, otherwise: str) -> Any:
    try:
        if not _is_intact(path):
            raise CheckpointError(f"{path} is damaged: its content does not have the checksum that it was written with")
        return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"no file at {path}") from error
    except Exception as error:  # torch.load raises many types for a file that is damaged or not its own
        raise CheckpointError(f"{path} {otherwise}; nothing in it was run") from error


def first_few(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
