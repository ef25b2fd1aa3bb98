"""CPU seconds of a process: what its work costs, nearly whoever else uses the machine. Needs no torch."""

import multiprocessing
import os
import time
from pathlib import Path


def cpu_seconds() -> float:
    """CPU seconds of this process so far: of all its threads, and of its child processes with their own.

    The system adds a child's seconds to its parent's when the parent has waited for it, so those of workers that still
    live (a DataLoader's) are read from /proc; without one they come later.
    """
    living = sum(_cpu_s_of(child.pid) for child in multiprocessing.active_children())  # waits for those that ended
    ended = os.times()
    return time.process_time() + ended.children_user + ended.children_system + living


def process_stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat behind the name: proc(5) counts them from 3. OSError without such a process."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _cpu_s_of(pid: int) -> float:
    """Of a living child, and of the children that it has waited for: utime, stime, cutime, cstime."""
    try:
        return sum(map(int, process_stat(pid)[11:15])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):  # it has just ended, or there is no Linux
        return 0.0
