"""Real ranks of launch/*.py without their seconds of imports: forked from this process, which has them behind it.

Real processes, a real gloo group, real signals; what torchrun adds (it starts ranks, and again after a failure) is done
here in a few lines. Nothing in this process may have started a thread or a group before: pytest's own has, so
tests/helpers/launching.py runs this file as a server beside it.
"""

import ctypes
import gc
import json
import os
import runpy
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[0:1] = [str(ROOT), str(ROOT / "tests" / "helpers")]

for _threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # read at the imports below
    os.environ.setdefault(_threads, "1")

import torch  # noqa: E402
import torch.utils.tensorboard  # noqa: E402
from torch import nn  # noqa: E402

import launch.evaluate  # noqa: E402
import launch.train  # noqa: E402, F401
import train.cli  # noqa: E402
from train.config import build_parser  # noqa: E402
from train.recipes import DEFAULT  # noqa: E402

PR_SET_PDEATHSIG = 1  # linux/prctl.h
CAPABILITY_VERSION = 0x20080522  # linux/capability.h
# Long enough for a rank that has lost another to say so (train/cli.py lets it linger).
ENDS_WITHIN_S = 20


class Noisy(nn.Module):
    """Batch norm and dropout: a resume that forgets a random state or a running mean trains on other numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 24, 5, stride=4), nn.BatchNorm2d(24)
        self.conv2, self.norm2 = nn.Conv2d(24, 16, 3), nn.BatchNorm2d(16)
        self.drop, self.fc = nn.Dropout(0.3), nn.Linear(16 * 16, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.norm2(self.conv2(self.norm1(self.conv1(images)).relu())).relu()
        return self.fc(self.drop(features.flatten(1)))


class Ranks:
    """The ranks of one attempt. All of them are one process group, apart from this process's own."""

    def __init__(
        self,
        arguments: Sequence[str],
        ranks: int,
        output: Path,
        in_rank: Callable[[int], None] = lambda rank: None,
        errors: Path | None = None,
        script: str = "launch/train.py",
    ) -> None:
        """output, errors: files that take what they say; one for both, unless told otherwise.

        in_rank: called in each rank, with its number, before it begins. A single rank is on its own, as without
        torchrun.
        """
        # Kept until they are gone, so that nobody else is given it. Rank 0 may bind it as well: this one never listens.
        self._port = socket.socket()
        self._port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._port.bind(("127.0.0.1", 0))
        port = self._port.getsockname()[1]
        self.pids: list[int] = []
        sys.stdout.flush()
        sys.stderr.flush()
        for rank in range(ranks):
            pid = os.fork()
            if pid == 0:
                os.setpgid(0, self.pids[0] if self.pids else 0)
                _be_rank([script, *arguments], rank, ranks, port, (output, errors or output), in_rank)
            self.pids.append(pid)
            os.setpgid(pid, self.pids[0])
        self.codes: dict[int, int] = {}

    def wait(self, seconds: float) -> None:
        """Let them run, for as long as any of them does."""
        until = time.monotonic() + seconds
        while self._collect() and time.monotonic() < until:
            time.sleep(0.002)

    def kill(self, victim: int | None) -> None:
        """SIGKILL of one rank, or of all."""
        if victim is None:
            with suppress(ProcessLookupError):  # they ended by themselves
                os.killpg(self.pids[0], signal.SIGKILL)
        elif victim not in self.codes:
            os.kill(self.pids[victim], signal.SIGKILL)

    def _collect(self) -> list[int]:
        """Take in the exit codes of those that ended; the ranks that still run."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return [rank for rank in range(len(self.pids)) if rank not in self.codes]

    def join(self, timeout_s: float, linger_s: float = 0.0) -> list[int]:
        """Exit codes, negative for a signal. As torchrun does, the failure of one ends the others.

        linger_s: how long after, so that they may say their own line first.
        Raises TimeoutError, with all of them gone, if they do not end by themselves.
        """
        started, failed_at, asked = time.monotonic(), None, False
        while running := self._collect():
            now = time.monotonic()
            if failed_at is None and any(self.codes.values()):
                failed_at = now + linger_s
            if failed_at is not None and now >= failed_at and not asked:
                asked = True
                for rank in running:
                    os.kill(self.pids[rank], signal.SIGTERM)
            if now - started > timeout_s or (failed_at is not None and now - failed_at > ENDS_WITHIN_S):
                for rank in running:
                    os.kill(self.pids[rank], signal.SIGKILL)
                    os.waitpid(self.pids[rank], 0)
                raise TimeoutError(f"ranks {running} hang; the others ended with {self.codes}")
            time.sleep(0.005)
        return [self.codes[rank] for rank in range(len(self.pids))]


def _be_rank(
    command: Sequence[str], rank: int, ranks: int, port: int, says: tuple[Path, Path], in_rank: Callable[[int], None]
) -> None:
    """Be a rank and never return."""
    code = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # where the script is ended, nobody stays behind
    try:
        for number, path in enumerate(says, start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        if ranks > 1:
            mine = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            mine |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in mine.items()})
        in_rank(rank)
        # Nobody here ends the others before they have said their line; but the store goes with rank 0.
        train.cli.EXIT_DELAY_S = float(os.environ.get("EXIT_DELAY_S", "0"))
        sys.argv = [str(ROOT / command[0]), *command[1:]]
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def give_up_privileges() -> None:
    """Let permissions hold for root as for any user: it keeps its name, and with it the folder that Python is in."""
    header = struct.pack("Ii", CAPABILITY_VERSION, 0)
    if ctypes.CDLL(None).capset(header, bytes(24)) != 0:
        raise OSError("capabilities cannot be given up")


def serve() -> None:
    """Answer requests, one a line, until there are no more: start a script's ranks and tell their exit codes."""
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    # No rank has to build its parser, nor to look through, and so to copy, what was imported here.
    build_parser("launch/train.py", DEFAULT)
    gc.collect()
    gc.freeze()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for line in requests:
        request = json.loads(line)

        def in_rank(rank: int, request: dict = request) -> None:
            os.chdir(request["cwd"])
            os.environ.update(request["env"])
            if request["is_ordinary"]:
                give_up_privileges()

        output, errors = Path(request["output"]), Path(request["errors"])
        running = Ranks(request["arguments"], request["ranks"], output, in_rank, errors, request["script"])
        try:
            answer = {"codes": running.join(request["timeout"], linger_s=train.cli.EXIT_DELAY_S)}
        except TimeoutError as error:
            answer = {"hang": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
