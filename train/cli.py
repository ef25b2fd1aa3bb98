"""From an exception to one line and an exit code: what every script in launch/ ends with."""

import argparse
import errno
import json
import os
import shlex
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from train.errors import ConfigError, TrainError

EXIT_DELAY_S = 3.0
LEFT_WAITING = ("signs of life", "abort", "answer of the store", "patience", "inputs of the next step")
"""Our threads that may wait for what never answers, a store or a disk, and are not waited for long."""
NO_MEMORY = ("allocate memory", "start new thread", "Cannot allocate", "std::bad_alloc")
ROOT = Path(__file__).resolve().parents[1]
ROOMS = tuple(ROOT / name for name in ("cup", "data", "launch", "train"))


def exit_code_of(action: Callable[[], None], debug: bool, after_interrupt: str = "") -> int:
    """Run `action` and return the process's exit code.

    after_interrupt: what the user should know after Ctrl-C, beside that it was one.

    0 after success; 2 for a configuration error, 1 for any other that a user can cause, each printed as one line on
    stderr, with its traceback only if `debug`; 130 after Ctrl-C. What only a programmer can cause passes through.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name of a file may hold letters that the terminal does not know
            stream.reconfigure(errors="backslashreplace")
    try:
        with _warnings_in_a_line():
            action()
    except KeyboardInterrupt:
        _say("; ".join(filter(None, ["interrupted", after_interrupt])))
        return 130
    except Exception as error:
        message = _message(error)
        if message is None:
            raise
        if debug:
            traceback.print_exc()
        if not _says_another(error):
            _say(f"error: {message}")
        _tell_torchrun(message)
        # torchrun ends the other ranks as soon as one is gone; let them say their line first.
        time.sleep(EXIT_DELAY_S if _ranks() > 1 else 0)
        return getattr(error, "exit_code", 1)
    return 0


def end_with(main: Callable[[list[str]], int]) -> NoReturn:
    """Call a script's `main` with its arguments, and end the process with the exit code.

    At once, where a thread is left that waits: if its answer came while the interpreter ends, it would find nobody to
    give it to, and C++ aborts the process (exit code -6).
    """
    try:
        code = main(sys.argv[1:])
    except SystemExit as end:  # of train/peers.py
        code = end.code
    except Exception:
        if not _leaves_a_thread():
            raise
        traceback.print_exc()
        code = 1
    if not _leaves_a_thread():
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def _leaves_a_thread() -> bool:
    return any(thread.name in LEFT_WAITING for thread in threading.enumerate())


def _message(error: Exception) -> str | None:
    """The one line about an error that a user can cause; None for one that only a programmer can."""
    if isinstance(error, TrainError) and _ranks() == 1:
        return " ".join(str(error).split())
    # Only now: a script that reads a log needs no torch, whose import takes seconds.
    from train.world import USER_ERRORS, announce_failure, explain_lost_rank, explain_out_of_memory

    lost = explain_lost_rank(error)
    if lost is None:
        announce_failure(error)
    if isinstance(error, USER_ERRORS):
        return " ".join(str(error).split())
    return lost or explain_out_of_memory(error) or _explain_limits(error)


def _says_another(error: Exception) -> bool:
    """Whether the first rank of this machine says the same: the ranks read one command line and the same files."""
    return isinstance(error, ConfigError) and os.environ.get("LOCAL_RANK", "0") != "0"


def _explain_limits(error: BaseException | None) -> str | None:
    """What to do, as a message, if the error or what it came of means that the system gives this process no more."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE) or "open files" in str(error):
            return f"too few files may be open at once: raise the limit (ulimit -n; {_first_line(error)})"
        if isinstance(error, MemoryError) or any(sign in str(error) for sign in NO_MEMORY):
            return (
                "not enough memory: lower data.batch_size or data.threads, or raise the limit, if there is one "
                f"(ulimit -v; {_first_line(error)})"
            )
        error = error.__cause__ or error.__context__
    return None


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def command_again(argv: list[str], resume: str, name: str, directory: str) -> str:
    """The command that goes on with this run; of torchrun's, what has to be added to it.

    argv: our own arguments. resume: the run's run.resume, which has to be auto to go on. name: its run.name, under
    which auto may find another run than the one in `directory`, where run.resume: never gave it a number.
    """
    more = []
    if resume != "auto":
        own_name = Path(directory).name
        more = [*([] if own_name == name else ["--run.name", own_name]), "--run.resume", "auto"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return " ".join(["the same torchrun command", *(["with", *more] if more else [])])
    return shlex.join([sys.executable, *sys.argv[:1], *argv, *more])


def positive_int(text: str) -> int:
    """The `type` of an option that counts something."""
    return _int_from(1, text)


def non_negative_int(text: str) -> int:
    """The `type` of a seed, or of a number where 0 has a meaning of its own."""
    return _int_from(0, text)


def _int_from(lowest: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = lowest - 1
    if value < lowest:
        raise argparse.ArgumentTypeError(f"found {text!r}, allowed: a whole number from {lowest}")
    return value


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Inside, our own warnings are printed without the place in the source that gave them; others as ever."""
    as_ever = warnings.formatwarning

    def formatted(message: Warning | str, category: type[Warning], filename: str, *rest: object, **more: object) -> str:
        is_ours = category is UserWarning and any(Path(filename).is_relative_to(room) for room in ROOMS)
        return f"{_rank()}note: {message}\n" if is_ours else as_ever(message, category, filename, *rest, **more)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = as_ever


def _rank() -> str:
    """What a line on stderr begins with where there are several ranks."""
    return f"[rank {os.environ.get('RANK', '?')}] " if _ranks() > 1 else ""


def _ranks() -> int:
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if size.isdecimal() else 1


def _say(message: str) -> None:
    """One line on stderr, with the rank where there are several."""
    # One write, newline included: torchrun runs Python unbuffered, and the ranks' lines would mix.
    sys.stderr.write(f"{_rank()}{message}\n")
    sys.stderr.flush()


def _tell_torchrun(message: str) -> None:
    """Let the report that torchrun adds, which only its own process could keep back, end with our line.

    The file is laid out as torchrun's own decorator `record` writes it.
    """
    message = message.encode("utf-8", "backslashreplace").decode()  # a file's name may be no text: torchrun would hang
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        about = {"py_callstack": f"error: {message}", "timestamp": str(int(time.time()))}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": about}}))


class Parser(argparse.ArgumentParser):
    """The command line of the small scripts: a wrong argument is a ConfigError, so one line like any other."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help")
