"""Start real runs of launch/*.py, on one process or under torchrun, and read what they left."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SEEN_BY_RANKS = {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}

TINY = ROOT / "tests" / "tiny.yaml"


def options(**changes: object) -> list[str]:
    """The recipe tests/tiny.yaml with overrides; __ in their names stands for the dot."""
    overrides = [text for key, value in changes.items() for text in (f"--{key.replace('__', '.')}", str(value))]
    return ["--config", str(TINY), *overrides]


def command(script: str, arguments: list[str], ranks: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    return [sys.executable, *launcher, str(ROOT / script), *arguments]


def launch(
    script: str, arguments: list[str], cwd: Path, ranks: int = 1, timeout: float = 180, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run to the end; TimeoutExpired, with all its processes gone, if it hangs."""
    process = subprocess.Popen(
        command(script, arguments, ranks),
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
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


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
