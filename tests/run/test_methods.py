"""Each method on two ranks: one is killed, the run goes on, and ends with the bits of an undisturbed one."""

from pathlib import Path

import pytest
import torch
from launching import launch, options

from train.checkpoint.file import load_checkpoint
from train.log.rundir import read_log

EVERY_STEP = {"run__save_every_minutes": 1e-9, "train__epochs": 3}
WITH_BATCH_NORM = {
    "model__name": "resnet20_cifar", "data__channels": 3, "data__image_size": 8, "data__resize_size": 8,
}  # fmt: skip
METHODS = {
    "SFP": {"method": "soft_rate", "criterion": "l2"},
    "FPGM, gradients masked, bf16": {"method": "soft_rate", "criterion": "gm", "soft_rate__grad_mask": "true"},
    "PruneTrain, bf16": {
        "method": "prune_train", "target_reduction": "null", "prune_train__share": 0.95, "prune_train__below": 0.04,
    },
    "early": {"method": "early", "early__patience": 1, "early__similarity": 0.5},
    "random": {"criterion": "random"},
    "folded": {"fold": "true"},
}  # fmt: skip


@pytest.mark.parametrize("name", list(METHODS))
def test_a_killed_run_of_two_ranks_ends_with_the_bits_of_an_undisturbed_one(tmp_path: Path, name: str):
    """SIGKILL of rank 1 at the second step of epoch 2, between what the method does around it."""
    settings = EVERY_STEP | {f"prune__{key}": value for key, value in METHODS[name].items()} | {"optim__lr": 0.1}
    settings["train__precision"] = "bf16" if name.endswith("bf16") else "fp32"
    fault = {"FAULT": "killed", "AT_STEP": "6"}
    killed = launch("tests/helpers/faulty_train.py", options(**settings), tmp_path, ranks=2, **fault)
    assert killed.returncode != 0
    for root in ("runs", "undisturbed"):
        result = launch("launch/train.py", options(**settings, run__root=root), tmp_path, ranks=2)
        assert result.returncode == 0, result.stderr
    logs = [read_log(tmp_path / root / "tiny/log.jsonl") for root in ("runs", "undisturbed")]
    assert sum(event["event"] == "run" for event in logs[0]) == 2
    done = [[(e["event"], e["step"], e["removed"], e["digest"]) for e in log if "removed" in e] for log in logs]
    assert done[0] == done[1] and done[0][-1][0] == "resize"
    one, other = (load_checkpoint(tmp_path / root / "tiny/last.pt") for root in ("runs", "undisturbed"))
    assert one["method"] == other["method"]
    assert all(torch.equal(one["model"][key], other["model"][key]) for key in one["model"])
    momenta = [[s["momentum_buffer"] for s in content["optimizer"]["state"].values()] for content in (one, other)]
    assert all(map(torch.equal, *momenta))
