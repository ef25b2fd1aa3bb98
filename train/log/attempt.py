"""Seconds of attempts that end before their run directory is known: their imports, their look at the data.

An attempt is one process of rank 0. Until the run's own heartbeat it leaves word beside the run directory, in
ROOT/.NAME.starting-RANDOM, which the next attempt adds up. Needs no torch: its import is a good part of the seconds.
"""

import fcntl
import functools
import json
import os
import re
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from train.errors import ConfigError
from train.files import read_bounded
from train.log.cpu import process_stat
from train.log.heartbeat import LONGEST_S, MAX_BYTES, MAX_RANKS, Beat
from train.log.rundir import NAME
from train.recipes import with_recipe_first
from train.schema import fits

DEFAULTS = {"root": "runs", "name": "run"}


INTERPRETER_STARTS_WITHIN_S = 1.0
TORCHRUN_STARTS_WITHIN_S = 10.0
"""A process that a shell became by exec (`bash -c 'pip install . && torchrun ...'`) keeps the shell's start, and would
count the installation: no more than this is believed."""


def began() -> float:
    """Unix time at which this process began. The first call has to come before anything that takes long."""
    return _began(os.getpid())


@functools.cache
def _began(pid: int) -> float:
    """pid: this process's, for a forked one begins anew."""
    return time.time() - min(_age_s(pid), INTERPRETER_STARTS_WITHIN_S)


def job_began() -> float:
    """Unix time at which the ranks were started: by torchrun where it is our parent, else at this process's start."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return began()
    torchrun = os.getppid()
    age_s = time.time() - began()
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        if _cpu_s_of_children(torchrun) > 1:  # it has waited for others than ranks: a shell's doing
            return began()
        return time.time() - max(age_s, min(_age_s(torchrun), age_s + TORCHRUN_STARTS_WITHIN_S))
    return time.time() - max(age_s, _age_s(torchrun))


def _age_s(pid: int) -> float:
    """How long a process has been running; 0 where the system does not say."""
    try:
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - int(process_stat(pid)[19]) / os.sysconf("SC_CLK_TCK"))
    except (OSError, AttributeError, ValueError, IndexError):  # no Linux
        return 0.0


def _cpu_s_of_children(pid: int) -> float:
    """CPU seconds of the children that a process has waited for."""
    try:
        return sum(map(int, process_stat(pid)[13:15])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return 0.0


class Attempt:
    """Word of this process until `end`. Where the root is not there yet, or it cannot be written, there is none."""

    def __init__(self, argv: Sequence[str]) -> None:
        """argv: our own arguments, of which no parser has had a look yet."""
        root, name = _place(argv)
        self._path = Path(root) / f".{name}.starting-{secrets.token_hex(4)}"
        self._began = job_began()
        self._file, self._beat = None, None
        if not re.fullmatch(NAME, name):
            return
        with suppress(OSError):
            self._file = self._path.open("xb", buffering=0)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it when this process ends
            self._beat = Beat(self._write)

    def end(self) -> None:
        """Somebody else has word of the seconds so far, or the process ends by itself."""
        if self._beat is not None:
            self._beat.stop()
        if self._file is not None:
            self._file.close()
            self._file = None
            with suppress(OSError):
                self._path.unlink()

    def _write(self) -> None:
        word = {"began": self._began, "alive": time.time(), "ranks": _world_size()}
        os.pwrite(self._file.fileno(), json.dumps(word).encode().ljust(200), 0)


@dataclass(frozen=True)
class Unheard:
    """What was spent since the last word of the run itself.

    wall_s, rank_s: by attempts that were killed at their start. torchrun_s: by torchrun before this process began.
    files: that tell of the attempts, to be removed once these are counted.
    """

    wall_s: float
    rank_s: float
    torchrun_s: float
    files: list[str]


def unheard_seconds(root: Path, name: str, heard_at: float) -> Unheard:
    """What attempts that were killed at their start have spent, and what torchrun took before this process.

    heard_at: Unix time of the run's last word; what lies before is in its account. Rank 0 calls it.
    """
    words = {file: word for file in root.glob(f".{name}.starting-*") if (word := _dead(file)) is not None}
    wall_s, rank_s, counted_until = 0.0, 0.0, heard_at
    for word in sorted(words.values(), key=lambda word: word["alive"]):
        seconds = max(0.0, word["alive"] - max(word["began"], counted_until))
        wall_s, rank_s = wall_s + seconds, rank_s + seconds * word["ranks"]
        counted_until = max(counted_until, word["alive"])
    before_us = max(0.0, began() - max(job_began(), counted_until))
    return Unheard(wall_s, rank_s, before_us, [str(file) for file in words])


def _world_size() -> int:
    """As torchrun says; 1 for anything else, which train/world.py refuses in a moment."""
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if size.isdecimal() else 1


def _dead(file: Path) -> dict[str, Any] | None:
    """What an attempt that is no more has left; None where it is alive, or its word is none."""
    try:
        with file.open("rb") as held:
            fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
            word = json.loads(read_bounded(file, MAX_BYTES))
    except (OSError, ValueError, RecursionError):  # BlockingIOError is an OSError
        return None
    kinds = {"began": float, "alive": float, "ranks": range(1, int(MAX_RANKS) + 1)}
    if not fits(word, kinds) or not kinds.keys() <= word.keys():
        return None
    return word if 0 <= word["alive"] - word["began"] <= LONGEST_S and word["alive"] <= time.time() + 1 else None


def _place(argv: Sequence[str]) -> tuple[str, str]:
    """The run's root and name on a command line, as far as a look without the parser tells."""
    place, recipe = dict(DEFAULTS), None
    with suppress(ConfigError):  # the run ends with it in a moment
        argv = with_recipe_first(argv)
    given: dict[str, str] = {}
    words = iter(argv)
    for word in words:
        option, equals, value = word.partition("=")
        if option in ("--config", "--run.root", "--run.name"):
            value = value if equals else next(words, "")
            if option == "--config":
                recipe = Path(value)
            else:
                given[option.removeprefix("--run.")] = value
    with suppress(OSError, ValueError, AttributeError, TypeError, RecursionError, yaml.YAMLError):
        run = yaml.safe_load(read_bounded(recipe, 1 << 20)).get("run") or {}
        place |= {key: str(run[key]) for key in place if key in run}
    place |= given
    return place["root"], place["name"]
