"""A run with hundreds of resizes in one process: memory, file handles and threads must not grow.

python tests/experiments/soak.py --resizes 500 --out results/soak.json

Two ranks, one resize and one training step an epoch, with evaluation, checkpoint, log and curves each time.
 Every resize takes one channel of a hidden layer of an MLP; rank 0's and rank 1's figures are read from /proc. The
exit code is 1 if any rank holds more files or threads in the end than at its second figure, or over 3% more memory.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[0:1] = [str(ROOT), str(ROOT / "tests" / "helpers")]

import torch  # noqa: E402
from forked import Ranks  # noqa: E402
from torch import nn  # noqa: E402

import cup  # noqa: E402
import train.build  # noqa: E402
from train.loop import engine  # noqa: E402
from train.methods import Action, Method  # noqa: E402

WIDTH = 400
LOOKS, BETWEEN_LOOKS_S = 10, 0.02
MAX_GROWTH = 0.03
"""Of resident memory, after the second figure. A network and its momentum left behind at each resize would be 0.3%
each time; of 500 resizes we saw 0.8% in all (results/soak.json)."""


def mlp() -> nn.Module:
    layers = [nn.Flatten(), nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)]
    return nn.Sequential(*layers)


class OneChannel(Method):
    """One channel of the wider layer, at the start of every epoch but the first."""

    def epoch_start(self, epoch: int, view: cup.View) -> Action | None:
        widest = max(view.groups, key=lambda group: group.width)
        counts = {group.name: group.width - (group is widest) for group in cup.prunable_groups(view.groups, "inner")}
        return Action(cup.plan_by_counts(view.model, view.groups, counts)) if epoch > 1 else None


def figures() -> dict[str, int]:
    """Of this process: resident memory, open files, threads. The least of some looks: a file that is being written is
    open for a moment."""
    looks = []
    for _ in range(LOOKS):
        time.sleep(BETWEEN_LOOKS_S)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        looks.append(
            {
                "memory_kb": pages * os.sysconf("SC_PAGE_SIZE") // 1024,
                "files": len(os.listdir("/proc/self/fd")),  # noqa: PTH208
                "threads": len(os.listdir("/proc/self/task")),  # noqa: PTH208
            }
        )
    return {key: min(look[key] for look in looks) for key in looks[0]}


def soak(folder: Path, resizes: int, every: int) -> list[list[dict[str, int]]]:
    """Figures of both ranks at every so many resizes."""
    train.build.build_model = lambda name, num_classes, image_size: mlp()
    train.build.build_method = lambda *arguments: OneChannel()
    honest = engine.train_epoch

    def in_rank(rank: int) -> None:
        def train_epoch(loop: Any, epoch: int, *others: Any) -> None:
            if (epoch - 1) % every == 0:
                with (folder / f"{rank}.jsonl").open("a") as file:
                    file.write(json.dumps({"resizes": epoch - 1, **figures()}) + "\n")
            honest(loop, epoch, *others)

        engine.train_epoch = train_epoch

    settings = {
        **{"model.name": "mlp", "data.loader": "synthetic", "data.channels": 1, "data.image_size": 8},
        **{"data.resize_size": 8, "data.synthetic_images": 16, "data.batch_size": 16, "run.device": "cpu"},
        **{"train.epochs": resizes + 1, "prune.target_reduction": 1000, "prune.last_epoch": "null", "run.root": folder},
    }
    arguments = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    codes = Ranks(
        ["--config", str(ROOT / "tests/helpers/tiny.yaml"), *arguments], 2, folder / "output.txt", in_rank
    ).join(3000)
    assert codes == [0, 0], (folder / "output.txt").read_text()[-3000:]
    return [[json.loads(line) for line in (folder / f"{rank}.jsonl").read_text().splitlines()] for rank in (0, 1)]


def grown(rows: list[dict[str, int]]) -> list[str]:
    """What a rank holds more of in the end, in words; its first figures are from before the first step."""
    before, after = rows[1], rows[-1]
    problems = [f"{before[key]} {key}, then {after[key]}" for key in ("files", "threads") if after[key] > before[key]]
    if after["memory_kb"] > before["memory_kb"] * (1 + MAX_GROWTH):
        problems.append(f"{before['memory_kb']} kB of memory, then {after['memory_kb']}")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--resizes", type=int, default=500)
    parser.add_argument("--every", type=int, default=50, help="resizes between two figures")
    parser.add_argument("--out", type=Path, help="JSON")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        ranks = soak(Path(folder), options.resizes, options.every)
    for rank, rows in enumerate(ranks):
        for row in rows:
            print(f"rank {rank}: {row}")
    record = {"command": " ".join(sys.argv), "torch": torch.__version__, "python": platform.python_version()}
    record |= {"seconds": round(time.monotonic() - started, 1), "ranks": ranks}
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    problems = [f"rank {rank}: {problem}" for rank, rows in enumerate(ranks) for problem in grown(rows)]
    print("\n".join(problems) or "nothing has grown")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
