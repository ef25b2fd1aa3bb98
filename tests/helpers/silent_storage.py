"""launch/train.py whose images turn into pipes, from which nothing ever comes, and which is asked to stop then.

SIGNAL says when: `told`, as soon as it has said that it waits; `in a step`, while DALI alone waits, for a later one.
"""

import os
import runpy
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from train.loop import engine, patience, watch  # noqa: E402

LOOK_S = 5.0
"""How long to look for a thread that opens a pipe, where the kernel says what its threads wait for."""


def to_pipes(folder: Path) -> None:
    for image in folder.rglob("*.jpg"):
        pipe = image.with_suffix(".pipe")
        os.mkfifo(pipe)
        pipe.replace(image)


def await_open() -> None:
    """Until a thread of this process waits in open() for the other end of a pipe."""
    end = time.monotonic() + LOOK_S
    while time.monotonic() < end:
        if any(task.read_text() == "wait_for_partner" for task in Path("/proc/self/task").glob("*/wchan")):
            return
        time.sleep(0.05)


def install(moment: str) -> None:
    honest_step, honest_tell, taken = engine.training_step, patience.Patience._tell, []

    def step(*arguments):
        taken.append(1)
        if len(taken) == 4:
            to_pipes(Path(os.environ["IMAGES"]))
        if len(taken) == 5 and moment == "in a step":
            await_open()
            os.kill(os.getpid(), signal.SIGTERM)
        return honest_step(*arguments)

    def tell(self, message):
        honest_tell(self, message)
        if moment == "told" and len(taken) > 3 and "Waiting on" in message:  # before, the machine itself is slow
            os.kill(os.getpid(), signal.SIGTERM)

    engine.training_step, patience.Patience._tell = step, tell
    watch.MAX_STEPS = 1  # the step in which it is asked is the last
    patience.LOOK_EVERY_S, patience.STOP_AFTER_S = 0.1, 1.0
    patience.TELL_AFTER_S = 1.0 if moment == "told" else 60.0


install(os.environ["SIGNAL"])
sys.argv[0] = str(ROOT / "launch" / "train.py")
sys.path.insert(0, str(ROOT / "launch"))
runpy.run_path(sys.argv[0], run_name="__main__")
