"""Kill runs at random moments until so many kills have hit, and compare what comes of them with undisturbed runs.

python tests/experiments/kills.py --kills 100 --seed 0 --out results/kills.json

A run is killed up to six times, then left to end. Kills hit a random rank or all of them, with 2 and with 4 ranks; by
the clock at any moment, or inside a resize, or inside a save: in the middle of the file, and between its renames. The
disk is a slow one, so that training goes on meanwhile.
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[0:1] = [str(ROOT), str(ROOT / "tests" / "helpers")]

import torch  # noqa: E402
from forked import Noisy, Ranks  # noqa: E402

import train.build  # noqa: E402
import train.checkpoint.archive  # noqa: E402
import train.checkpoint.file  # noqa: E402
from train.checkpoint.saver import Saver  # noqa: E402
from train.log.rundir import read_log  # noqa: E402
from train.resizer import Resizer  # noqa: E402

MAX_KILLS_A_RUN = 6
WRITE_TAKES_S = 0.002
"""Each of the hundred-odd writes that make up a checkpoint: several steps take as long."""
SETTINGS = {
    "model.name": "lenet",  # any name: the network is tests/helpers/forked.py's
    "data.loader": "synthetic",
    "data.synthetic_images": 256,
    "data.channels": 1,
    "data.image_size": 28,
    "data.resize_size": 28,
    "data.batch_size": 16,
    "optim.lr": 0.05,
    "train.epochs": 4,
    "train.mixup": 0.2,
    "train.ema_decay": 0.9,
    "prune.hard_ramp.kind": "reduction",
    "prune.target_reduction": 2.0,
    "run.device": "cpu",
    "run.save_every_minutes": 0.5 / 60,
}


@dataclass
class Kill:
    """One kill. where: clock, resize or save. victim: a rank, or None for all of them.

    at: seconds from the start for the clock; else the number of the call that it strikes before, or with .5 after.
    """

    where: str
    victim: int | None
    at: float
    how: str = ""

    def install(self, rank: int) -> None:
        """In the rank: strike from inside a resize or a save. The clock's kill comes from outside."""
        if self.where == "clock" or rank != (self.victim or 0):
            return
        owner, name = {
            "": (Resizer, "_cut"),
            "while rank 0 writes": (Saver, "save"),
            "in the file": (train.checkpoint.archive._Hashing, "write"),
            "at a rename": (Path, "replace"),
        }[self.how]
        honest, calls = getattr(owner, name), count()

        def method(itself: object, *arguments: object) -> object:
            call = next(calls)
            if call == self.at:
                if self.how == "in the file":
                    honest(itself, bytes(arguments[0])[: len(arguments[0]) // 2])
                self.strike()
            result = honest(itself, *arguments)
            if call + 0.5 == self.at:
                self.strike()
            return result

        setattr(owner, name, method)

    def strike(self) -> None:
        if self.victim is None:
            os.killpg(0, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


def draw(generator: random.Random, ranks: int, whole_s: float) -> Kill:
    """A random kill for a run that takes `whole_s` undisturbed."""
    where = generator.choices(["clock", "resize", "save"], [5, 2, 3])[0]
    victim = generator.choice([None, *range(ranks)])
    half = generator.choice([0, 0.5])  # before or after the call
    if where == "clock":
        return Kill(where, victim, generator.uniform(0.05, 1) * whole_s)
    if where == "resize":
        return Kill(where, victim, generator.randrange(3) + half)
    if victim not in (0, None):  # only rank 0 writes: the others die when it is about to
        return Kill(where, victim, generator.randrange(6) + half, "while rank 0 writes")
    if generator.random() < 0.5:
        return Kill(where, victim, generator.randrange(500), "in the file")
    return Kill(where, victim, generator.randrange(20) + half, "at a rename")


def arguments(root: Path) -> list[str]:
    settings = {**SETTINGS, "run.root": root, "run.name": "run"}
    return [
        *("--config", str(ROOT / "tests" / "helpers" / "tiny.yaml")),
        *(text for key, value in settings.items() for text in (f"--{key}", str(value))),
    ]


def attempt(root: Path, ranks: int, kill: Kill | None) -> tuple[list[int], float]:
    """Start all ranks and wait for their end; exit codes, and seconds."""
    install: Callable[[int], None] = kill.install if kill else lambda rank: None
    started = time.monotonic()
    running = Ranks(arguments(root), ranks, root / "output.txt", install)
    if kill and kill.where == "clock":
        running.wait(kill.at)
        running.kill(kill.victim)
    codes = running.join(timeout_s=300)
    return codes, time.monotonic() - started


def tensors_of(root: Path) -> dict[str, torch.Tensor]:
    """Everything in the last checkpoint that training computed."""
    stored = train.checkpoint.file.load_checkpoint(root / "run" / "last.pt")
    momentum = {f"momentum.{k}": v["momentum_buffer"] for k, v in stored["optimizer"]["state"].items()}
    averages = {f"ema.{name}": value for name, value in stored["ema"].items()}
    return {**stored["model"], **averages, **momentum}


def numbers_of(root: Path) -> list[tuple]:
    """What the log says of training, without its clock."""
    keys = ("epoch", "step", "train_loss", "top1", "lr", "flops", "digest")
    events = read_log(root / "run" / "log.jsonl")
    return [tuple(event.get(key) for key in keys) for event in events if event["event"] in ("epoch", "resize")]


def run_to_the_end(root: Path, ranks: int, kills: list[Kill]) -> list[Kill]:
    """One run, started again after every kill; returns the kills that hit before it came to its end."""
    hit: list[Kill] = []
    for kill in [*kills, None]:
        codes, _ = attempt(root, ranks, kill)
        if not any(codes):
            break
        if kill is None or -signal.SIGKILL not in codes:
            raise AssertionError(f"{kill} killed nobody, and yet {codes}: {(root / 'output.txt').read_text()[-3000:]}")
        hit.append(kill)
    return hit


@dataclass
class Undisturbed:
    root: Path
    seconds: float


def undisturbed(root: Path, ranks: int) -> Undisturbed:
    root.mkdir(parents=True)
    codes, seconds = attempt(root, ranks, None)
    assert not any(codes), (root / "output.txt").read_text()[-3000:]
    return Undisturbed(root, seconds)


def killed_run(root: Path, ranks: int, model: Undisturbed, kills: list[Kill]) -> dict[str, Any]:
    """One run with kills, compared with the undisturbed one."""
    root.mkdir()
    started = time.monotonic()
    hit = run_to_the_end(root, ranks, kills)
    expected, found = tensors_of(model.root), tensors_of(root)
    return {
        "ranks": ranks,
        "kills": [asdict(kill) for kill in hit],
        "tensors": len(expected),
        "bit_equal": list(expected) == list(found) and all(torch.equal(expected[key], found[key]) for key in expected),
        "log_equal": numbers_of(model.root) == numbers_of(root),
        "damaged_checkpoints": (root / "output.txt").read_text().count("is damaged"),
        "seconds": round(time.monotonic() - started, 1),
    }


def prepare() -> None:
    """Give every run the network of tests/helpers/forked.py, and a slow disk."""
    train.build.build_model = lambda name, num_classes, image_size: Noisy()
    honest = train.checkpoint.archive._Hashing.write

    def write(itself: object, data: bytes) -> int:
        time.sleep(WRITE_TAKES_S)
        return honest(itself, data)

    train.checkpoint.archive._Hashing.write = write


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: kills by moment and ranks, and how many runs were equal. One that hangs ends this script before."""
    kills = Counter((run["ranks"], kill["where"]) for run in runs for kill in run["kills"])
    everybody = Counter(run["ranks"] for run in runs for kill in run["kills"] if kill["victim"] is None)
    lines = [
        "| ranks | kills by the clock | inside a resize | inside a save | of these, all ranks at once | runs killed | "
        "equal |",
        "|" + "---:|" * 7,
    ]
    for ranks in sorted({run["ranks"] for run in runs}):
        own = [run for run in runs if run["ranks"] == ranks and run["kills"]]
        equal = sum(run["bit_equal"] and run["log_equal"] for run in own)
        numbers = [kills[ranks, where] for where in ("clock", "resize", "save")]
        lines.append(f"| {' | '.join(map(str, [ranks, *numbers, everybody[ranks], len(own), equal]))} |")
    return "\n".join(lines)


def commit() -> str:
    """Of the code that is run, with -dirty where it was changed since."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 2, 4], help="of the runs, in turn")
    parser.add_argument("--out", type=Path, help="JSON; what is in it already is added to")
    options = parser.parse_args()
    prepare()
    generator = random.Random(options.seed)
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        models = {ranks: undisturbed(Path(folder) / f"undisturbed-{ranks}", ranks) for ranks in set(options.ranks)}
        while (so_far := sum(len(run["kills"]) for run in runs)) < options.kills:
            ranks = options.ranks[len(runs) % len(options.ranks)]
            most = min(generator.randint(2, MAX_KILLS_A_RUN), options.kills - so_far)
            kills = [draw(generator, ranks, models[ranks].seconds) for _ in range(most)]
            root = Path(folder) / f"run-{len(runs)}"
            runs.append(killed_run(root, ranks, models[ranks], kills))
            print(f"{so_far + len(runs[-1]['kills'])} kills", runs[-1], flush=True)
            shutil.rmtree(root)
    print(table(runs))
    if options.out:
        before = json.loads(options.out.read_text())["runs"] if options.out.exists() else []
        machine = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
        source = {"commit": commit(), "kills_a_chunk": options.kills, "seed": options.seed}
        every = before + [source | run for run in runs]
        record = {**machine, "settings": SETTINGS, "table": table(every).splitlines(), "runs": every}
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0 if all(run["bit_equal"] and run["log_equal"] for run in runs) else 1


if __name__ == "__main__":
    sys.exit(main())
