"""The time ledger: every second of a run is charged to one kind, and the kinds add up to wall time.

The clock never stops between two kinds: `charge` switches the account and switches back. GPU hours are wall seconds
times ranks over 3600, on the CPU as well (`device` in the log says which). The clock is the host's: a GPU works behind
it, so queued work is charged to the code that waits for it; an epoch ends in a wait, so its total is exact.

CPU seconds are an account of their own: what is done once more after a kill, and the start of a process that goes on,
are in the wall time, but not in them.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

from train.log.cpu import cpu_seconds

Kind = Literal["startup", "data_wait", "step", "resize", "resize_warmup", "compile", "eval", "save", "lost", "other"]


class Ledger:
    """One rank's account, in seconds since the run began, across resumes."""

    def __init__(
        self,
        ranks: int = 1,
        clock: Callable[[], float] = time.perf_counter,
        started: float | None = None,
        cpu_clock: Callable[[], float] = cpu_seconds,
    ) -> None:
        """ranks: how many run. started: reading of `clock` when this process began; without it time counts from now.

        cpu_clock: CPU seconds of this process since it began.
        """
        self._ranks = ranks
        self._clock = clock
        self._before = {"wall_s": 0.0, "rank_s": 0.0}  # what earlier processes of a resumed run spent
        self._started = clock() if started is None else started
        self._kind: Kind = "startup"
        self._since = self._started
        self._seconds: dict[Kind, float] = dict.fromkeys(get_args(Kind), 0.0)
        self._reported = dict(self._seconds)
        self._cpu_clock = cpu_clock
        self._cpu_before: float | None = 0.0
        self._cpu_counts_from = cpu_clock() if started is None else 0.0
        self._goes_on = False

    @contextmanager
    def charge(self, kind: Kind) -> Iterator[None]:
        """Charge what happens inside to `kind`, and what comes after to what it was before."""
        outer = self._switch(kind)
        try:
            yield
        finally:
            self._switch(outer)

    def end_startup(self) -> None:
        """From here on, seconds outside of `charge` count as other."""
        self._switch("other")
        if self._goes_on:
            self._cpu_counts_from = self._cpu_clock()

    @property
    def cpu_s(self) -> float | None:
        """CPU seconds of this rank and its workers that the run as it stands was made with; None where not known."""
        return None if self._cpu_before is None else self._cpu_before + self._cpu_clock() - self._cpu_counts_from

    @property
    def seconds(self) -> dict[Kind, float]:
        """Kind -> seconds so far."""
        self._switch(self._kind)
        return dict(self._seconds)

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())

    def elapsed(self) -> tuple[float, float]:
        """(wall seconds, rank seconds) so far. Unlike the rest, any thread may ask."""
        before, own = self._before, self._clock() - self._started
        return before["wall_s"] + own, before["rank_s"] + own * self._ranks

    def gpu_hours(self, wall_s: float) -> float:
        """Hours when the run's wall time is `wall_s`: each second times the ranks that ran in it, over 3600."""
        return self._rank_seconds(wall_s) / 3600

    def since_last_report(self) -> dict[Kind, float]:
        """Kind -> seconds since the last call; the reports of a run add up to `seconds`."""
        now = self.seconds
        report = {kind: now[kind] - self._reported[kind] for kind in now}
        self._reported = now
        return report

    @property
    def reported_s(self) -> float:
        """Seconds since the run began at the last report: what all reports so far add up to."""
        return sum(self._reported.values())

    def state_dict(self) -> dict[str, Any]:
        """Plain data; equal on all ranks but for how each one's seconds are spread over the kinds."""
        seconds = self.seconds
        rank_s = self._rank_seconds(sum(seconds.values()))
        return {"seconds": seconds, "reported": dict(self._reported), "rank_s": rank_s, "cpu_s": self.cpu_s}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Add a stored account to this one, so that a resumed run reports the whole."""
        self._before = {"wall_s": sum(state["seconds"].values()), "rank_s": state["rank_s"]}
        for kind in self._seconds:
            self._seconds[kind] += state["seconds"][kind]
            self._reported[kind] += state["reported"][kind]

    def add_cpu_before(self, cpu_s: float | None) -> None:
        """Count the CPU seconds up to a checkpoint, and of this process what comes after its start; None: not known."""
        self._cpu_before, self._goes_on = cpu_s, True

    def add_lost(self, wall_s: float, rank_s: float) -> None:
        """Charge what a killed process spent after the stored account; rank_s: wall seconds times its ranks."""
        self._seconds["lost"] += wall_s
        self._before = {"wall_s": self._before["wall_s"] + wall_s, "rank_s": self._before["rank_s"] + rank_s}

    def add_startup(self, wall_s: float) -> None:
        """Charge what was spent on starting this attempt before its clock ran."""
        self._seconds["startup"] += wall_s
        self._before = {
            "wall_s": self._before["wall_s"] + wall_s,
            "rank_s": self._before["rank_s"] + wall_s * self._ranks,
        }

    def _rank_seconds(self, wall_s: float) -> float:
        return self._before["rank_s"] + (wall_s - self._before["wall_s"]) * self._ranks

    def _switch(self, kind: Kind) -> Kind:
        now = self._clock()
        self._seconds[self._kind] += now - self._since
        self._since, before, self._kind = now, self._kind, kind
        return before
