"""When to save, stop or give up in the middle of an epoch: looked at about once a second, decided alike by all ranks.

A signal may reach one rank alone, and clocks differ, so the ranks all-reduce what they know. Not at every step, but
when rank 0 says so: it measures how many steps a second takes, and sends the number of steps to the next look along.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from train.world import World

POLL_INTERVAL_S = 1.0
MAX_STEPS = 1000


@dataclass(frozen=True)
class Decision:
    """What all ranks do after this step."""

    stop: bool
    """Some rank was asked to stop: save, then end."""
    save: bool
    """The last checkpoint is old enough for another."""
    broken: bool
    """Some rank has numbers that training cannot go on with."""
    saved: bool
    """The checkpoint that was being written is, or could not be."""


class Watch:
    """All ranks have one and call its methods at the same steps."""

    def __init__(
        self,
        world: World,
        stop_wanted: Callable[[], bool],
        save_every_s: float = 0.0,
        save_ended: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """save_every_s: 0 = never in the middle of an epoch. save_ended: whether there is word of a checkpoint."""
        self._world = world
        self._stop_wanted = stop_wanted
        self._save_every_s = save_every_s
        self._save_ended = save_ended
        self._poll_interval_s = min(POLL_INTERVAL_S, save_every_s / 4) if save_every_s else POLL_INTERVAL_S
        self._clock = clock
        self._saved_at = clock()
        self.restart()

    def restart(self) -> None:
        """Look after the next step: the time of a step is about to change."""
        self._steps = 0
        self._steps_to_look = 1
        self._looked_at = self._clock()

    def saved(self) -> None:
        """A checkpoint was begun."""
        self._saved_at = self._clock()

    def step(self, is_broken: Callable[[], bool]) -> Decision | None:
        """Count a step; None where it is too early to look. is_broken: asked on every rank at a look, may wait."""
        self._steps += 1
        return self.poll(is_broken) if self._steps >= self._steps_to_look else None

    def poll(self, is_broken: Callable[[], bool] = lambda: False) -> Decision:
        """Decide what to do now. All ranks call it; one all-reduce of a few bytes on the CPU."""
        broken, now = is_broken(), self._clock()
        save_due, steps_to_look = False, 0
        if self._world.is_main:
            save_due = 0 < self._save_every_s <= now - self._saved_at
            a_step_s = (now - self._looked_at) / max(self._steps, 1)
            steps_to_look = round(min(max(self._poll_interval_s / max(a_step_s, 1e-9), 1), MAX_STEPS))
        stop, save, broken, saved, steps_to_look = self._world.all_reduce_max(
            [self._stop_wanted(), save_due, broken, self._save_ended(), steps_to_look]
        )
        self._steps, self._steps_to_look, self._looked_at = 0, steps_to_look, now
        return Decision(bool(stop), bool(save), bool(broken), bool(saved))
