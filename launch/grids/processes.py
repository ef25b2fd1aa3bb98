"""Child processes that stop when we do, and what they cost."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

# Linux asks a process to stop when its parent dies, by whatever signal: a run then saves. In the child itself, for a
# fork of ours could be caught with a lock held.
WITH_PARENT = """
import ctypes, os, signal, sys
parent, *argv = sys.argv[1:]
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() == int(parent):
    try:
        os.execvp(argv[0], argv)
    except OSError as error:
        sys.exit(f"error: cannot start {argv[0]}: {error.strerror}")
"""


class Child:
    """A program that writes what it says to a file. In a session of its own, so that Ctrl-C reaches us alone."""

    def __init__(self, argv: list[str], output: Path, env: dict[str, str]) -> None:
        """argv: the program first, by its path or as PATH finds it. output: is appended to."""
        if sys.platform == "linux":
            argv = [sys.executable, "-c", WITH_PARENT, str(os.getpid()), *argv]
        output.parent.mkdir(parents=True, exist_ok=True)
        self._started = time.perf_counter()
        with output.open("ab") as file:
            self._process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=os.environ | env, start_new_session=True
            )
        self.wall_s, self.cpu_s = 0.0, 0.0

    def poll(self) -> int | None:
        """The exit code, negative for a signal, None while it runs. Then `wall_s` and `cpu_s` are known."""
        if self._process.returncode is None:
            pid, status, used = os.wait4(self._process.pid, os.WNOHANG)
            if pid:
                self._process.returncode = os.waitstatus_to_exitcode(status)
                self.wall_s = time.perf_counter() - self._started
                self.cpu_s = used.ru_utime + used.ru_stime
        return self._process.returncode

    def stop(self) -> None:
        """Ask it to stop; a run saves first."""
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)


def last_words(output: Path) -> str:
    """The last error in a file of output, or its last line."""
    try:
        lines = [line.strip() for line in output.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    errors = [line for line in lines if "error:" in line.lower()]
    return (errors or lines or [""])[-1]
