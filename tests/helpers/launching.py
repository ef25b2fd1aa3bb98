"""Start real runs, in this process or as launch/*.py, alone or under torchrun, and read what they left."""

import copy
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import cup
from train.checkpoint.network import StoredNetwork, save_network
from train.config import parse_config
from train.log.ledger import Ledger
from train.log.rundir import read_log
from train.loop import engine
from train.network.models import Architecture, build_model, native_input_shape
from train.run import run
from train.world import World

ROOT = Path(__file__).resolve().parents[2]
SEEN_BY_RANKS = {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}

TINY = ROOT / "tests" / "helpers" / "tiny.yaml"
EVERY_STEP = {"run__save_every_minutes": 1e-9, "train__epochs": 2, "prune__last_epoch": 2}
"""Two epochs of 4 steps, with a checkpoint after each of them."""
ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))


def train(root: Path, **changes: object) -> list[dict]:
    """Run tests/helpers/tiny.yaml with overrides, __ for the dot in their names, in this process and return its log."""
    overrides = options(**changes)[2:]
    done = run(parse_config([*overrides, "--run.root", str(root)], "train.py", str(TINY)), ALONE, Ledger())
    return read_log(Path(done["directory"]) / "log.jsonl")


_undisturbed: dict[tuple, tuple[tempfile.TemporaryDirectory, list[dict]]] = {}


def train_undisturbed(root: Path, **changes: object) -> list[dict]:
    """As `train`, but where the parameters of one test ask for the same run, all but the first get a copy."""
    key = (os.environ["PYTEST_CURRENT_TEST"].partition("[")[0], *options(**changes))
    if key not in _undisturbed:
        folder = tempfile.TemporaryDirectory()
        _undisturbed[key] = folder, train(Path(folder.name), **changes)
    folder, log = _undisturbed[key]
    shutil.copytree(folder.name, root)
    return copy.deepcopy(log)


def numbers(log: list[dict]) -> list[tuple]:
    """What a log says of training, epoch by epoch."""
    keys = ("epoch", "train_loss", "top1", "lr", "flops", "threshold")
    return [tuple(event[key] for key in keys) for event in events(log, "epoch")]


@contextmanager
def broken_off(patch: pytest.MonkeyPatch, at_step: int) -> Iterator[None]:
    """Inside, a run in this process is broken off before its training step `at_step` (1, 2, ...), as by a crash."""
    honest, taken = engine.training_step, itertools.count(1)

    def step(*arguments: object) -> object:
        if next(taken) == at_step:
            raise Crash
        return honest(*arguments)

    with patch.context() as inside, pytest.raises(Crash):
        inside.setattr(engine, "training_step", step)
        yield


class Crash(Exception):
    """Stands for the end of a process."""


def interrupted(root: Path, patch: pytest.MonkeyPatch, at_step: int, **changes: object) -> list[dict]:
    """What `train` returns where the run was broken off before that step, and taken up again by another process."""
    with broken_off(patch, at_step):
        train(root, **changes)
    torch.manual_seed(12345)
    return train(root, **changes)


def events(log: list[dict], kind: str) -> list[dict]:
    return [event for event in log if event["event"] == kind]


def options(**changes: object) -> list[str]:
    """The recipe tests/helpers/tiny.yaml with overrides; __ in their names stands for the dot."""
    overrides = [text for key, value in changes.items() for text in (f"--{key.replace('__', '.')}", str(value))]
    return ["--config", str(TINY), *overrides]


def command(script: str, arguments: list[str], ranks: int = 1, torchrun: Sequence[str] = ()) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *torchrun]
    return [sys.executable, *(launcher if ranks > 1 else []), str(ROOT / script), *arguments]


class Server:
    """tests/helpers/forked.py in a process of its own, as long as this one lives; it starts with the first request."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def ask(self, **request: object) -> dict[str, Any]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, str(ROOT / "tests" / "helpers" / "forked.py")],
                env=os.environ | SEEN_BY_RANKS,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())
        except BaseException:  # pytest ends a test that takes too long here: its answer is not the next one's
            self._process.kill()  # its ranks die with it
            self._process.communicate()
            self._process = None
            raise


_server = Server()


def launch(
    script: str,
    arguments: list[str],
    cwd: Path,
    ranks: int = 1,
    timeout: float = 400,
    is_ordinary: bool = False,
    **env: str,
) -> subprocess.CompletedProcess[str]:
    """Run the script to its end in processes that were forked with the imports behind them: one, or ranks of a group.

    is_ordinary: without root's privileges, which no permission stops.
    TimeoutError, with all its processes gone, if it hangs. The exit code is the first rank's that failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / name for name in ("output", "errors")]
        output, errors = map(str, said)
        answer = _server.ask(
            script=script, arguments=arguments, cwd=str(cwd), ranks=ranks, timeout=timeout, env=env, output=output,
            errors=errors, is_ordinary=is_ordinary and os.geteuid() == 0,
        )  # fmt: skip
        out, err = (file.read_text(encoding="utf-8") for file in said)
    if "hang" in answer:
        raise TimeoutError(f"{answer['hang']}; they said: {out}{err}")
    code = next(filter(None, answer["codes"]), 0)
    return subprocess.CompletedProcess([script, *arguments], code, out, err)


def start(
    script: str,
    arguments: list[str],
    cwd: Path,
    ranks: int = 1,
    timeout: float = 400,
    torchrun: Sequence[str] = (),
    **env: str,
) -> subprocess.CompletedProcess[str]:
    """As `launch`, but as a user starts it: python, or torchrun where there are several ranks. Takes 7 s more a rank.

    TimeoutExpired, with all its processes gone, if it hangs.
    """
    process = subprocess.Popen(
        command(script, arguments, ranks, torchrun),
        cwd=cwd,
        env=os.environ | SEEN_BY_RANKS | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks, which have sessions of their own, within 30 s
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def error_of(main: Callable[[list[str]], int], arguments: list[str], capfd: pytest.CaptureFixture) -> str:
    """The one line on stderr with which a script, run in this process, refuses its arguments."""
    capfd.readouterr()
    assert main(arguments) != 0
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def rank_lines(stderr: str) -> list[str]:
    """What our own ranks said on stderr, without torchrun's words about it."""
    return [line for line in stderr.splitlines() if line.startswith(("[rank", "error:")) and "error:" in line]


def write_image_folder(root: Path, classes: int = 3, train: int = 16, val: int = 6, side: int = 28) -> Path:
    """An image folder of small JPEGs whose brightness tells the class."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 60, (side, side, 3)) + 60 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.jpg", quality=95)
    return root


def write_network(path: Path, name: str = "lenet", num_classes: int = 10, seed: int = 0) -> StoredNetwork:
    """A checkpoint of an untrained network, as launch/prune.py writes one, and what is in it."""
    torch.manual_seed(seed)
    model = build_model(name, num_classes)
    architecture = Architecture(name=name, num_classes=num_classes, input_shape=native_input_shape(name))
    dense = cup.complexity(model, architecture.example_input())
    network = StoredNetwork(architecture, dense, model, plans=(), groups=(), config=None, gpu_hours=2.0)
    save_network(path, network, widths={})
    return network
