"""The seconds of a run so far, written every second by a thread, so that a killed process is in the account."""

import errno
import json
import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from train.errors import TrainError
from train.files import read_bounded
from train.log.ledger import Ledger
from train.schema import fits

BEAT_EVERY_S = 1.0
MAX_BYTES = 1 << 16
LONGEST_S = 1e9
"""30 years: no run has lasted so long."""
MAX_RANKS = 1e6


class Beat:
    """Calls an action every second, at once first, until it is stopped. What it cannot write it does not tell."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action
        self._stopped = threading.Event()
        self._one_at_a_time = threading.Lock()
        self.now()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def now(self) -> None:
        with self._one_at_a_time, suppress(OSError):
            self._action()

    def stop(self) -> None:
        """When this returns, the action is not called any more."""
        self._stopped.set()
        with self._one_at_a_time:
            self._action = lambda: None
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(BEAT_EVERY_S):
            self.now()


def write_alive(path: Path, ledger: Ledger) -> None:
    """Write a run's seconds so far, and when that was. OSError if it cannot be written."""
    wall_s, rank_s = ledger.elapsed()
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps({"wall_s": wall_s, "rank_s": rank_s, "at": time.time()}), encoding="utf-8")
    temporary.replace(path)


def read_alive(path: Path) -> tuple[dict[str, float] | None, str | None]:
    """What `write_alive` wrote last, or None where there is nothing; and a note for a file that says something else.

    Raises TrainError where the system does not let it be read.
    """
    try:
        alive = json.loads(read_bounded(path, MAX_BYTES))
    except FileNotFoundError:
        return None, None
    except OSError as error:
        if error.errno == errno.EFBIG:
            return None, _no_word(path)
        raise TrainError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError):
        alive = None
    if not fits(alive, {"wall_s": float, "rank_s": float, "at": float}) or not _is_possible(alive):
        return None, _no_word(path)
    return {"at": -math.inf, **alive}, None


def _no_word(path: Path) -> str:
    return f"{path} does not say seconds that a run can have spent: what it stands for is not counted as lost"


def _is_possible(alive: dict[str, Any]) -> bool:
    if not {"wall_s", "rank_s"} <= alive.keys():
        return False
    return 0 <= alive["wall_s"] <= LONGEST_S and 0 <= alive["rank_s"] <= alive["wall_s"] * MAX_RANKS
