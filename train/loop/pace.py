"""What the live line says of a run under way: its loss, its speed, and when the whole run will end."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True)
class Moment:
    """Where a run stands. loss: mean over the epoch's steps so far, of this rank."""

    epoch: int
    step: int
    reduction: float
    image_size: int
    loss: float


class Pace:
    """One of each epoch. Its estimate takes later epochs for as slow as this one: high for a network that shrinks, low
    while images grow."""

    def __init__(
        self,
        epochs: int,
        steps: int,
        batch_size: int,
        first_step: int,
        eval_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """epochs, steps: of the run, of an epoch. batch_size: of all ranks. eval_s: seconds of the last evaluation."""
        self._epochs, self._steps, self._batch_size = epochs, steps, batch_size
        self._first_step, self._eval_s = first_step, eval_s
        self._clock, self._began = clock, clock()

    def text(self, moment: Moment) -> str:
        """After `moment.step` steps of the epoch, at least one of them in this process."""
        a_step_s = (self._clock() - self._began) / (moment.step - self._first_step)
        later = self._epochs - moment.epoch
        left_s = a_step_s * (self._steps - moment.step + later * self._steps) + self._eval_s * (later + 1)
        return (
            f"epoch {moment.epoch}/{self._epochs}  loss {moment.loss:.3f}  FR {moment.reduction:.2f}  "
            f"{self._batch_size / max(a_step_s, 1e-9):,.0f} images/s  {moment.image_size} px  "
            f"run ends in {timedelta(seconds=round(left_s))}"
        )
