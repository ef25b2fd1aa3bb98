"""The path of docs/deploy.md from photographs and weights to an ONNX file with its accuracy: the page's commands."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import torch
import torchvision
from launching import ROOT, launch, write_image_folder
from pages import commands

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs pip install -e '.[onnx]'",
)
SMALL = {
    "data.image_size": 32,
    "data.resize_size": 32,
    "data.batch_size": 6,
    "data.threads": 1,
    "run.device": "cpu",
    "train.precision": "fp32",
    "train.epochs": 2,
    "optim.warmup_epochs": 0,
    "prune.last_epoch": 1,
}


def test_the_commands_lead_from_photographs_and_weights_to_an_onnx_file_with_its_accuracy(tmp_path: Path):
    """ResNet-18 for ResNet-50, with weights of 1,000 classes for data of three."""
    section = (ROOT / "docs/deploy.md").read_text().partition("## Four commands")[2].partition("\n## ")[0]
    lines = [line.replace("resnet50", "resnet18") for line in commands(section)]
    assert len(lines) == 4
    write_image_folder(tmp_path / "photos", train=4, val=2, side=40)
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    said = []
    for line in lines:
        script, *arguments = shlex.split(
            line[line.index("launch/") :].replace("launch/configs", f"{ROOT}/launch/configs")
        )
        more = (
            [word for key, value in SMALL.items() for word in (f"--{key}", str(value))] if "train.py" in script else []
        )
        result = launch(script, [*arguments, *more], tmp_path)
        assert result.returncode == 0, result.stderr
        said.append(result.stdout + result.stderr)
    assert "all of them can be trained on" in said[0]
    assert float(re.search(r"FR 1.00 -> ([\d.]+)", said[1])[1]) >= 2.0
    assert (tmp_path / "runs/half/last.onnx").is_file()
    assert re.search(r"top-1 [\d.]+% .* 6 images", said[3]) and "class2" in said[3]
