"""launch/search.py whose rank KILL_RANK is killed while it judges its network number AT_NETWORK (1, 2, ...)."""

import os
import runpy
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import train.search  # noqa: E402


def install() -> None:
    honest, judged = train.search._Judge.top1, []

    def top1(self, widths):
        judged.append(1)
        if len(judged) == int(os.environ["AT_NETWORK"]):
            os.kill(os.getpid(), signal.SIGKILL)
        return honest(self, widths)

    train.search._Judge.top1 = top1


if __name__ == "__main__":
    if os.environ.get("RANK", "0") == os.environ["KILL_RANK"]:
        install()
    runpy.run_path(str(ROOT / "launch/search.py"), run_name="__main__")
