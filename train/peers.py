"""Whether the other ranks are alive: who waits for a dead one is told, and ends.

A collective of NCCL is a kernel: when a rank dies it neither fails nor returns before a timeout of minutes, and no line
of Python runs meanwhile. So threads of each rank look after the others:

- ranks of this machine by their processes: one that is gone without having left is dead;
- all ranks by signs of life in the group's store: rank 0 watches everybody, the others watch rank 0;
- the word that the first rank that fails, or finds another dead, leaves in the store.

Then the rank says why, aborts the group, and ends: by itself where that frees the training loop, else at once.
"""

import os
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from train.log.cpu import process_stat
from train.world import World, abort_group, announce_failure, is_lost_rank, leave_word, open_line, read_word

LOOK_EVERY_S = 0.5
PATIENT_FOR_LOOKS = 3
"""A process that is gone may have left in order, which the store tells a look later; and who is told of a failure by a
collective ends by itself."""
ENDS_WITHIN_S = 2.0
"""For the training loop to come free, and for the others to hear the word from the store, which rank 0 may keep."""
EXIT_CODE = 1
LEFT = b"left"


class Peers:
    """While it is entered, threads of this rank watch the others. All ranks enter it."""

    def __init__(self, world: World, silence_s: float = 60.0) -> None:
        """silence_s: without a sign of life for so long a rank counts as lost; 0 = never."""
        self._world = world
        self._most_silent = silence_s / LOOK_EVERY_S if silence_s else float("inf")
        self._local: dict[int, int] = {}
        """Other ranks of this machine -> their processes."""
        self._signs: dict[int, bytes] = {}
        """Ranks that are watched by signs, this one among them -> the last one that the store gave."""
        self._word: str | None = None
        self._leaving = threading.Event()  # the training loop has come free and ends by itself
        self._left = threading.Event()
        self._told = threading.Lock()  # taken by the thread that says why, for good

    def __enter__(self) -> "Peers":
        world = self._world
        if world.size == 1:
            return self
        self._line = open_line()
        self._line.set(_key(world.rank), "0")
        places = world.all_gather([_machine(), os.getpid()])
        here = places[world.rank][0]
        self._local = {rank: pid for rank, (there, pid) in enumerate(places) if there == here and rank != world.rank}
        watched = range(world.size) if world.is_main else (0, *self._local)
        self._signs = dict.fromkeys([world.rank, *watched], b"0")  # where nothing comes any more, its own is first
        self._exchanging = threading.Thread(target=self._exchange, name="signs of life", daemon=True)
        self._exchanging.start()
        self._watching = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._watching.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.leave(error)
        if self._told.locked() and error is not None:  # which only says what came of it
            time.sleep(ENDS_WITHIN_S)
            raise SystemExit(EXIT_CODE) from error

    def leave(self, error: BaseException | None = None) -> None:
        """From here on this rank waits for nobody, and nobody for it; with an error, the others are told."""
        if self._world.size == 1 or self._left.is_set():
            return
        self._leaving.set()
        if error is not None and not self._told.locked():
            if not is_lost_rank(error):
                announce_failure(error)
                time.sleep(2 * LOOK_EVERY_S)  # the store may go with this process: the others are to hear it first
            elif why := self._cause():
                self._say(why)
                leave_word(why)
        self._left.set()
        for thread in (self._exchanging, self._watching):
            thread.join(ENDS_WITHIN_S)

    def _cause(self) -> str | None:
        """Why a collective failed: a connection breaks before the word of that is there, or the process gone."""
        for _ in range(PATIENT_FOR_LOOKS):
            time.sleep(LOOK_EVERY_S)
            if self._word is not None:
                return self._word
        gone = self._gone()
        return _ended(gone[0]) if gone else None

    def _gone(self) -> list[int]:
        """Ranks of this machine whose processes have ended, and that did not leave."""
        return [rank for rank, pid in self._local.items() if self._signs[rank] != LEFT and _is_gone(pid)]

    def _exchange(self) -> None:
        """Give a sign of life and take those of the others, on a thread that a silent store may stop for ever."""
        number, ranks = 0, list(self._signs)
        while not self._left.wait(LOOK_EVERY_S):
            number += 1
            with suppress(Exception):  # the store went away with its host: nothing new is a sign, too
                self._line.set(_key(self._world.rank), str(number))
                self._signs = dict(zip(ranks, self._line.multi_get([_key(rank) for rank in ranks]), strict=True))
                self._word = read_word(self._line)
        with suppress(Exception):
            self._line.set(_key(self._world.rank), LEFT.decode())

    def _watch(self) -> None:
        gone, silent, before, word_for = Counter(), Counter(), self._signs, 0
        while not self._left.wait(LOOK_EVERY_S):
            signs = self._signs
            gone = Counter({rank: gone[rank] + 1 for rank in self._gone()})
            silent = Counter({rank: silent[rank] + 1 for rank in signs if signs[rank] == before[rank] != LEFT})
            before, word_for = signs, word_for + (self._word is not None)
            dead = [rank for rank, looks in gone.items() if looks >= PATIENT_FOR_LOOKS]
            mute = [rank for rank, looks in silent.items() if looks >= self._most_silent]
            if (word_for >= PATIENT_FOR_LOOKS or dead or mute) and not self._leaving.is_set():
                self._end(self._word or (_ended(dead[0]) if dead else self._silent(mute[0])))
                return

    def _silent(self, rank: int) -> str:
        for_s = f"for {self._most_silent * LOOK_EVERY_S:.0f} s (run.silence_s)"
        if rank == self._world.rank:
            return (
                f"the ranks' store has not answered {for_s}: rank 0 or torchrun, which keeps it, is stopped or cut off"
            )
        return f"rank {rank} has given no sign of life {for_s}: it is stopped, or its machine is gone or cut off"

    def _end(self, why: str) -> None:
        self._say(why)
        threading.Thread(target=abort_group, name="abort", daemon=True).start()
        leave_word(why)
        if self._left.wait(ENDS_WITHIN_S):
            return
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(EXIT_CODE)

    def _say(self, why: str) -> None:
        if not self._told.acquire(blocking=False):
            return
        with suppress(OSError):  # os.write, for the main thread may hold the lock of sys.stderr
            os.write(2, f"[rank {self._world.rank}] error: {why}\n".encode(errors="replace"))


def _key(rank: int) -> str:
    return f"sign of life/{rank}"


def _ended(rank: int) -> str:
    return f"rank {rank} ended without a word: it was killed (the kernel's log tells, if for want of memory) or crashed"


def _machine() -> str:
    """Equal for processes that see each other's numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # no Linux: nobody is of this machine, and signs of life remain
        return f"{os.getpid()} {time.time_ns()}"


def _is_gone(pid: int) -> bool:
    try:
        return process_stat(pid)[0] in ("Z", "X")
    except OSError:
        return True
