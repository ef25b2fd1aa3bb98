"""The seconds of a run so far, written every few seconds, so that a killed process is in the account."""

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from train.log.ledger import Ledger

HEARTBEAT_EVERY_S = 5.0


class Heartbeat:
    """Writes a run's seconds to a file. Rank 0 has one; the others have none."""

    def __init__(self, path: Path, ledger: Ledger) -> None:
        self._path, self._ledger = path, ledger
        self._last = -HEARTBEAT_EVERY_S

    def __call__(self, at_once: bool = False) -> None:
        """Write, if the last time is long enough ago or with `at_once`. The checkpoint reports a full disk."""
        if (now := time.monotonic()) - self._last < HEARTBEAT_EVERY_S and not at_once:
            return
        self._last = now
        wall_s = self._ledger.total_s
        seconds = {"wall_s": wall_s, "rank_s": self._ledger.gpu_hours(wall_s) * 3600}
        temporary = self._path.with_name(self._path.name + ".part")
        with suppress(OSError):
            temporary.write_text(json.dumps(seconds), encoding="utf-8")
            temporary.replace(self._path)


def lost_seconds(heartbeat: Path, account: dict[str, Any] | None) -> dict[str, float]:
    """What killed processes spent after a checkpoint: wall seconds, and rank seconds (times the ranks that ran).

    heartbeat: the file. account: the stored ledger of the checkpoint, None where there is none.
    """
    try:
        alive = json.loads(heartbeat.read_text(encoding="utf-8"))
        spent = {key: float(alive[key]) for key in ("wall_s", "rank_s")}
        if account is not None:
            spent["wall_s"] -= sum(account["seconds"].values())
            spent["rank_s"] -= account["rank_s"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or cut short by the crash
        return {"wall_s": 0.0, "rank_s": 0.0}
    return {key: max(0.0, seconds) for key, seconds in spent.items()}
