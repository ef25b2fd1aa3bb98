"""The time ledger: every second of a run is charged to one kind, and the kinds add up to wall time.

The clock never stops between two kinds: `charge` switches the account and switches back. GPU hours are wall seconds
times ranks over 3600, on the CPU as well (`device` in the log says which).
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, get_args

Kind = Literal["startup", "data_wait", "step", "resize", "resize_warmup", "eval", "save", "other"]


class Ledger:
    """One rank's account, in seconds since the run began, across resumes."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter, started: float | None = None) -> None:
        """started: a reading of `clock` from which on time counts as startup; now, if not given."""
        self._clock = clock
        self._kind: Kind = "startup"
        self._since = clock() if started is None else started
        self._seconds: dict[Kind, float] = dict.fromkeys(get_args(Kind), 0.0)
        self._reported = dict(self._seconds)

    @contextmanager
    def charge(self, kind: Kind) -> Iterator[None]:
        """Charge what happens inside to `kind`, and what comes after to what it was before."""
        outer = self._switch(kind)
        try:
            yield
        finally:
            self._switch(outer)

    def end_startup(self) -> None:
        """From here on, what nobody charges counts as other."""
        self._switch("other")

    @property
    def seconds(self) -> dict[Kind, float]:
        """Kind -> seconds so far."""
        self._switch(self._kind)
        return dict(self._seconds)

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())

    def since_last_report(self) -> dict[Kind, float]:
        """Kind -> seconds since the last call; the reports of a run add up to `seconds`."""
        now = self.seconds
        report = {kind: now[kind] - self._reported[kind] for kind in now}
        self._reported = now
        return report

    def state_dict(self) -> dict[str, dict[Kind, float]]:
        return {"seconds": self.seconds, "reported": dict(self._reported)}

    def load_state_dict(self, state: dict[str, dict[Kind, float]]) -> None:
        """Add a stored account to this one, so that a resumed run reports the whole."""
        for kind in self._seconds:
            self._seconds[kind] += state["seconds"][kind]
            self._reported[kind] += state["reported"][kind]

    def _switch(self, kind: Kind) -> Kind:
        now = self._clock()
        self._seconds[self._kind] += now - self._since
        self._since, before, self._kind = now, self._kind, kind
        return before


def gpu_hours(wall_s: float, ranks: int) -> float:
    return wall_s * ranks / 3600
