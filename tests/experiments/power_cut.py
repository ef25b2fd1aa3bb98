"""Cut the power of a run's disk at random moments, and compare what the same command makes of the rest.

python tests/experiments/power_cut.py --cuts 20 --seed 0 --out results/power_cuts.json     (root, Linux)

A kill leaves what the kernel has taken; a power cut takes what was not synced. So the run directory lies on an ext4
image in a file, which is shut down without flushing its journal while two ranks train. Then all ranks are killed, the
image is mounted again, and the same command goes on to the end. Exits with 77 where images cannot be mounted.
"""

import argparse
import fcntl
import json
import os
import platform
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[0:1] = [str(ROOT), str(ROOT / "tests" / "helpers"), str(ROOT / "tests" / "experiments")]

import torch  # noqa: E402
from forked import Ranks  # noqa: E402
from kills import Undisturbed, arguments, commit, numbers_of, prepare, tensors_of, undisturbed  # noqa: E402

EXT4_IOC_SHUTDOWN = 0x8004587D
WITHOUT_LOG_FLUSH = struct.pack("I", 2)
IMAGE_BYTES = 200 << 20
SKIPPED = 77


def can_cut() -> bool:
    """Whether this process may mount images."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        try:
            with disk(Path(folder)):
                return True
        except subprocess.CalledProcessError:
            return False


@contextmanager
def disk(folder: Path) -> Iterator[Path]:
    """An empty ext4 file system in a file, mounted."""
    image, mounted = folder / "image", folder / "mounted"
    mounted.mkdir()
    with image.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    command("mkfs.ext4", "-q", "-F", image)
    command("mount", "-o", "loop", image, mounted)
    try:
        yield mounted
    finally:
        command("umount", mounted)


def command(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True)


def cut_power(mounted: Path, running: Ranks) -> None:
    """Nothing reaches the disk any more, nor what the journal holds; then everybody dies, and the machine starts."""
    directory = os.open(mounted, os.O_RDONLY)
    fcntl.ioctl(directory, EXT4_IOC_SHUTDOWN, WITHOUT_LOG_FLUSH)
    os.close(directory)
    running.kill(None)
    running.join(timeout_s=60)
    command("umount", mounted)
    command("mount", "-o", "loop", mounted.with_name("image"), mounted)


def cut_run(folder: Path, ranks: int, model: Undisturbed, at_s: float) -> dict[str, Any]:
    """One run whose power is cut `at_s` seconds after its start, compared with the undisturbed one."""
    folder.mkdir()
    output = folder / "output.txt"
    with disk(folder) as mounted:
        running = Ranks(arguments(mounted), ranks, output)
        running.wait(at_s)
        was_running = not running.codes
        cut_power(mounted, running)
        left = {path.name: path.stat().st_size for path in sorted((mounted / "run").glob("*")) if path.is_file()}
        started = time.monotonic()
        codes = Ranks(arguments(mounted), ranks, output).join(timeout_s=300)
        result = {"ranks": ranks, "at_s": round(at_s, 2), "was_running": was_running, "left_after_the_cut": left}
        if any(codes):
            return result | {"codes": codes, "said": output.read_text()[-2000:], "bit_equal": False, "log_equal": False}
        expected, found = tensors_of(model.root), tensors_of(mounted)
        return result | {
            "bit_equal": expected.keys() == found.keys() and all(torch.equal(expected[k], found[k]) for k in expected),
            "log_equal": numbers_of(model.root) == numbers_of(mounted),
            "seconds_after": round(time.monotonic() - started, 1),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cuts", type=int, default=20, help="that hit a run before its end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON")
    options = parser.parse_args()
    if not can_cut():
        print("images cannot be mounted here: not root, or no loop devices or mkfs.ext4")
        return SKIPPED
    prepare()
    generator, runs = random.Random(options.seed), []
    with tempfile.TemporaryDirectory() as folder:
        model = undisturbed(Path(folder) / "undisturbed", options.ranks)
        latest = model.seconds
        while sum(run["was_running"] for run in runs) < options.cuts:
            at_s = generator.uniform(0.1, 1) * latest
            runs.append(cut_run(Path(folder) / f"run-{len(runs)}", options.ranks, model, at_s))
            latest = latest if runs[-1]["was_running"] else at_s
            print(len(runs), runs[-1], flush=True)
    if options.out:
        machine = {"python": platform.python_version(), "torch": torch.__version__, "kernel": platform.release()}
        source = {"commit": commit(), "seed": options.seed, "undisturbed_s": round(model.seconds, 1)}
        options.out.write_text(json.dumps({**machine, **source, "runs": runs}, indent=1) + "\n", encoding="utf-8")
    return 0 if all(run["bit_equal"] and run["log_equal"] for run in runs) else 1


if __name__ == "__main__":
    sys.exit(main())
