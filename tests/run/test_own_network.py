"""Networks of the user's own, `package.module:factory`, imported only where the user says so."""

from pathlib import Path

import pytest
import torch
from launching import events, train

from launch import evaluate, export, prune
from train.checkpoint.archive import CheckpointError
from train.checkpoint.network import load_network
from train.errors import ConfigError

CODE = """
import pathlib
from torch import nn

pathlib.Path("imported").touch()

class Net(nn.Module):
    def __init__(self, num_classes, side=7):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 12, 5), nn.Conv2d(12, 16, 3)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, num_classes)

    def forward(self, images):
        return self.fc(self.pool(self.conv2(self.conv1(images).relu()).relu()).flatten(1))

def wrong_logits(num_classes):
    return Net(num_classes + 1)

def no_network(num_classes):
    return "net"

def needs_more(num_classes, depth):
    return Net(num_classes)

def other_images(num_classes):
    return nn.Linear(3, num_classes)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Its name, of its own for each test, for Python keeps what it imported; the file lies in the working directory."""
    name = f"own_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["", *__import__("sys").path[1:]])
    return name


def test_it_is_trained_and_cut_and_what_can_shrink_is_said_first(tmp_path: Path, module: str, capsys):
    log = train(tmp_path, model__name=f"{module}:Net")
    [note] = [event["message"] for event in events(log, "note") if "can shrink" in event["message"]]
    assert note.startswith(f"{module}:Net: 2 of ") and ": conv1, conv2" in note
    assert events(log, "epoch")[-1]["flops_reduction"] > 1.9
    last, own = str(tmp_path / "tiny/last.pt"), ["--model", f"{module}:Net"]
    assert evaluate.main([last, *own]) == 0 and export.main([last, "--format", "torch", *own]) == 0
    assert prune.main([last, "--t", "0.9", "--out", str(tmp_path / "cut.pt"), *own]) == 0
    again = train(tmp_path / "again", model__name=f"{module}:Net", model__checkpoint=tmp_path / "cut.pt")
    assert events(again, "done")


def test_weights_of_it_start_another_run(tmp_path: Path, module: str):
    train(tmp_path, model__name=f"{module}:Net", train__epochs=1, prune__method="none")
    weights = load_network(tmp_path / "tiny/last.pt", f"{module}:Net").model.state_dict()
    torch.save(weights, tmp_path / "a.pth")
    changes = {"model__name": f"{module}:Net", "model__weights": tmp_path / "a.pth", "data__synthetic_classes": 4}
    log = train(tmp_path / "more", **changes, train__epochs=1, prune__method="none")
    assert any("10 classes there, 4 classes here: fc.weight, fc.bias begin anew" in e.get("message", "") for e in log)


def test_a_file_alone_does_not_have_code_imported(tmp_path: Path, module: str, capfd):
    train(tmp_path, model__name=f"{module}:Net", train__epochs=1, prune__method="none")
    last = tmp_path / "tiny/last.pt"
    (tmp_path / "imported").unlink()
    __import__("sys").modules.pop(module)
    for script, more in ((evaluate, []), (export, ["--format", "torch"]), (prune, ["--t", "1"])):
        assert script.main([str(last), *more]) == 1
        assert f"give --model {module}:Net to have it imported" in capfd.readouterr().err
    with pytest.raises(ConfigError, match=r"whose code is not in the file; give --model\.name"):
        train(tmp_path / "more", model__name="null", model__checkpoint=last)
    with pytest.raises(CheckpointError, match=f"holds {module}:Net, not other:Net"):
        load_network(last, "other:Net")
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("Net2", "fails .AttributeError: .*has no attribute 'Net2'"),
        ("needs_more", "called with num_classes=10, fails .TypeError: .*'depth'"),
        ("no_network", "gives a str, allowed: a torch.nn.Module"),
        ("wrong_logits", r"makes \(1, 11\) of one image, allowed: logits \(1, 10\)"),
        ("other_images", r"does not take images of shape \(1, 1, 28, 28\)"),
    ],
)
def test_a_factory_that_gives_no_classifier_is_one_line(tmp_path: Path, module: str, factory: str, words: str):
    with pytest.raises(ConfigError, match=words) as raised:
        train(tmp_path / "runs", model__name=f"{module}:{factory}", prune__method="none")
    assert "\n" not in str(raised.value) and not (tmp_path / "runs").exists()


def test_a_module_that_is_not_there_is_one_line(tmp_path: Path):
    words = r"fails .ModuleNotFoundError: No module named 'nowhere'.; looked for in .* and on PYTHONPATH$"
    with pytest.raises(ConfigError, match=words):
        train(tmp_path / "runs", model__name="nowhere.at_all:net")
