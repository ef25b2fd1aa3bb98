"""SIGTERM, SIGINT and SIGHUP ask a run to stop: the loop finishes its step, saves and ends.

The interpreter runs a signal handler only when the main thread is back in Python, and a rank may be deep in a
collective that never ends. So the signals also wake a thread, which ends the process at a second Ctrl-C.
"""

import os
import signal
import threading
import time
from contextlib import suppress
from types import TracebackType

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SECOND_AFTER_S = 1.0
"""torchrun passes on the Ctrl-C that the terminal gave to everybody: what comes together counts once."""
ENDS_WITHIN_S = 2.0
EXIT_CODE_OF_INTERRUPT = 130
HEARD = b"stopping after this step; Ctrl-C again ends at once\n"


class StopSignals:
    """While it is entered, by the main thread, signals set `stop_wanted` in place of ending the process.

    Processes that are started meanwhile get the usual handlers. Entered by another thread it does nothing.
    """

    def __init__(self, answers: bool = True) -> None:
        """answers: whether this process acknowledges a Ctrl-C on stderr; one of all ranks is enough."""
        self._answers = answers
        self._wanted = threading.Event()
        self._before: dict[signal.Signals, object] = {}
        self._pipe: tuple[int, int] | None = None

    @property
    def stop_wanted(self) -> bool:
        return self._wanted.is_set()

    def wait(self, timeout_s: float) -> bool:
        """Wait for this process's own signal; returns whether there was one."""
        return self._wanted.wait(timeout_s)

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is not threading.main_thread():
            return self
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, end == self._pipe[0])
        self._wakeup_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        for number in STOPPING:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves it
                self._before[number] = signal.signal(number, lambda number, frame: None)
        self._thread = threading.Thread(target=self._watch, args=(self._pipe[0],), name="stop signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pipe is None:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._pipe[1])  # ends the thread, which closes the other end
        self._thread.join(ENDS_WITHIN_S)
        self._pipe, self._before = None, {}

    def _watch(self, end: int) -> None:
        interrupted_at = None
        while number := os.read(end, 1):
            if number[0] not in STOPPING:
                continue
            self._wanted.set()
            if number[0] == signal.SIGINT:
                if interrupted_at is None:
                    interrupted_at = time.monotonic()
                    if self._answers:
                        with suppress(OSError):  # os.write, for the main thread may hold the lock of sys.stderr
                            os.write(2, HEARD)
                if time.monotonic() - interrupted_at > SECOND_AFTER_S:
                    os._exit(EXIT_CODE_OF_INTERRUPT)
        os.close(end)
