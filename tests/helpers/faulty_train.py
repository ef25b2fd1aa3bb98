"""launch/train.py with a fault on rank 1, chosen by the variable FAULT; for tests/run/test_ranks.py."""

import dataclasses
import os
import runpy
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import torch  # noqa: E402

from cup import PrunePlan  # noqa: E402
from data import build as listing  # noqa: E402
from train import build as building  # noqa: E402
from train import run as running  # noqa: E402
from train.loop import engine  # noqa: E402
from train.resizer import Resizer  # noqa: E402
from train.world import World  # noqa: E402


def doctored(received: object) -> object:
    """What was received, with one more channel gone from the first group of a plan."""
    if not isinstance(received, dict) or "plan" not in received:
        return received
    plan = PrunePlan.from_json(received["plan"])
    name = next(iter(plan.kept))
    plan = dataclasses.replace(plan, kept={**plan.kept, name: plan.kept[name][:-1]})
    return received | {"plan": plan.to_json()}


def install(fault: str) -> None:
    honest_broadcast, honest_cut = World.broadcast, Resizer._cut
    if fault == "plan":
        World.broadcast = lambda self, value: doctored(honest_broadcast(self, value))
    elif fault == "one bit of momentum":

        def cut(self, state, plan):
            honest_cut(self, state, plan)
            momentum = next(iter(state.optimizer.state.values()))["momentum_buffer"]
            momentum.view(-1)[0] = momentum.view(-1)[0].nextafter(momentum.view(-1)[0] + 1)

        Resizer._cut = cut
    elif fault == "other weights":
        honest_build = building.build_model

        def build(name, num_classes, image_size):
            torch.manual_seed(1)
            return honest_build(name, num_classes)

        building.build_model = build
    elif fault in ("killed", "asked to stop", "not finite", "stuck"):
        honest_step, taken = engine.training_step, []

        def step(state, images, *arguments):
            taken.append(1)
            if len(taken) == int(os.environ["AT_STEP"]) and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
                if fault == "not finite":
                    images = images * float("nan")
                elif fault == "stuck":
                    time.sleep(12)
                else:
                    os.kill(os.getpid(), signal.SIGKILL if fault == "killed" else signal.SIGTERM)
            return honest_step(state, images, *arguments)

        engine.training_step = step
    elif fault in ("a bug", "cannot list"):

        def fail(*arguments):
            raise AssertionError("a bug on this rank")

        if fault == "a bug":
            Resizer._cut = fail
        else:
            listing.list_splits = listing.list_validation = fail


running.AGENT_SIGNAL_TIMEOUT_S = 0.5
if os.environ["RANK"] == "1":
    install(os.environ["FAULT"])
sys.argv[0] = str(ROOT / "launch" / "train.py")
sys.path.insert(0, str(ROOT / "launch"))
runpy.run_path(sys.argv[0], run_name="__main__")
