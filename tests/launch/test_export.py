"""Exported networks: written only if they compute what the checkpoint does."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from launching import error_of, write_network

import cup
import train.export.program
from launch import export, prune
from train.checkpoint.network import load_network, save_network

ONNX = ("onnx", "onnxscript", "onnxruntime")
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ONNX), reason="needs pip install -e '.[onnx]'"
)


@pytest.fixture
def cut(tmp_path: Path) -> Path:
    """A LeNet of 10 classes with channels removed in every layer."""
    write_network(tmp_path / "full.pt")
    assert prune.main([str(tmp_path / "full.pt"), "--t", "0.3", "--out", str(tmp_path / "cut.pt")]) == 0
    return tmp_path / "cut.pt"


def test_torch_s_exported_program_takes_any_batch_and_computes_the_same(cut: Path, capsys: pytest.CaptureFixture):
    assert export.main([str(cut), "--format", "torch"]) == 0
    model, exported = load_network(cut).model.eval(), torch.export.load(cut.with_suffix(".pt2")).module()
    for batch in (1, 2, 7):
        images = torch.randn(batch, 1, 28, 28)
        assert torch.allclose(exported(images), model(images), atol=1e-5)
    size_mb = cut.with_suffix(".pt2").stat().st_size / 1e6
    printed = capsys.readouterr().out
    assert f"written: {cut.with_suffix('.pt2')}, {size_mb:.2f} MB" in printed and "largest difference" in printed


@needs_onnx
def test_onnx_is_one_file_that_takes_any_batch_and_computes_the_same(cut: Path):
    import onnxruntime

    assert export.main([str(cut), "--format", "onnx"]) == 0
    session = onnxruntime.InferenceSession(cut.with_suffix(".onnx"), providers=["CPUExecutionProvider"])
    model = load_network(cut).model.eval()
    for batch in (1, 2, 7):
        images = torch.randn(batch, 1, 28, 28)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        assert torch.allclose(torch.from_numpy(logits), model(images), atol=1e-5)
    assert sorted(path.name for path in cut.parent.iterdir()) == ["cut.onnx", "cut.pt", "full.pt"]


@needs_onnx
def test_an_onnx_file_says_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture):
    import onnx

    network = write_network(tmp_path / "net.pt", "resnet20_cifar", num_classes=3)
    save_network(tmp_path / "net.pt", dataclasses.replace(network, classes=["a", "b", "ü"]), widths={})
    assert export.main([str(tmp_path / "net.pt"), "--format", "onnx", "--image-size", "40"]) == 0
    assert "ONNX opset 18" in capsys.readouterr().out
    model = onnx.load(tmp_path / "net.onnx")
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    [images], [logits] = model.graph.input, model.graph.output
    assert [axis.dim_param or axis.dim_value for axis in images.type.tensor_type.shape.dim] == ["batch", 3, 40, 40]
    assert [axis.dim_param or axis.dim_value for axis in logits.type.tensor_type.shape.dim] == ["batch", 3]
    said = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert (said["name"], said["classes"]) == ("resnet20_cifar", ["a", "b", "ü"])
    assert (said["input_size"], said["resize_size"]) == ([3, 40, 40], 40)
    assert (said["mean"], said["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert said["macs"] == cup.complexity(network.model, torch.zeros(1, 3, 40, 40)).macs


def test_another_image_size_where_the_network_takes_it(tmp_path: Path):
    write_network(tmp_path / "full.pt", "resnet20_cifar")
    out = tmp_path / "big.pt2"
    assert export.main([str(tmp_path / "full.pt"), "--format", "torch", "--image-size", "48", "--out", str(out)]) == 0
    assert torch.export.load(out).module()(torch.zeros(3, 3, 48, 48)).shape == (3, 10)


@pytest.mark.parametrize("change", [lambda x: x * 1.01, lambda x: x * float("nan"), lambda x: x[:, :9]])
def test_what_computes_something_else_is_an_error_and_is_not_kept(
    cut: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, change
):
    honest = train.export.program._read_torch

    def corrupted(path: Path):
        run = honest(path)
        return lambda images: change(run(images))

    monkeypatch.setattr(train.export.program, "_read_torch", corrupted)
    assert "exported, i" in error_of(export.main, [str(cut), "--format", "torch"], capfd)
    assert sorted(path.name for path in cut.parent.iterdir()) == ["cut.pt", "full.pt"]


def test_a_file_that_cannot_be_written_is_one_line_also_where_the_system_gives_no_reason(
    cut: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    def fails(*_: object) -> None:
        raise OSError("the disk is away")

    monkeypatch.setattr(train.export.program, "_write_torch", fails)
    assert "cut.pt2: the disk is away" in error_of(export.main, [str(cut), "--format", "torch"], capfd)


def test_missing_packages_are_named_with_the_command_that_installs_them(
    cut: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    honest = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else honest(name))
    assert "pip install onnxscript" in error_of(export.main, [str(cut), "--format", "onnx"], capfd)


def test_what_is_there_is_overwritten_with_force_alone(cut: Path, capfd: pytest.CaptureFixture):
    (cut.parent / "mine.pt2").write_text("years of work")
    arguments = [str(cut), "--format", "torch", "--out", str(cut.parent / "mine.pt2")]
    assert "--force" in error_of(export.main, arguments, capfd)
    assert (cut.parent / "mine.pt2").read_text() == "years of work"
    assert export.main([*arguments, "--force"]) == 0
    assert torch.export.load(cut.parent / "mine.pt2").module()(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture):
    network = write_network(tmp_path / "nan.pt")
    network.model.fc2.weight.data[0, 0] = float("nan")
    save_network(tmp_path / "nan.pt", network, widths={})
    assert "not finite" in error_of(export.main, [str(tmp_path / "nan.pt"), "--format", "torch"], capfd)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--format", "tflite"], "'tflite'"),
        (["--format", "torch", "--image-size", "40"], "does not take inputs of shape (1, 40, 40)"),
        (["--format", "torch", "--image-size", "none"], "a whole number from 1"),
        (["--format", "torch", "--out", "/nowhere/net.pt2"], "/nowhere/net.pt2"),
        (["--format", "torch", "--push", "me/net"], "--push goes with --format timm, found torch"),
        (["--format", "onnx", "--calibration-images", "9"], "--calibration-images goes with --format onnx-int8"),
        (["--format", "onnx-int8"], "give --data FOLDER"),
        (["--format", "timm", "--dense", "full.pt"], "full.pt"),
        ([], "--format"),
    ],
)
def test_a_wrong_command_is_one_line(cut: Path, capfd: pytest.CaptureFixture, arguments: list[str], words: str):
    assert words in error_of(export.main, [str(cut), *arguments], capfd)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture):
    (tmp_path / "junk.pt").write_bytes(b"not a checkpoint")
    for name in ("junk.pt", "missing.pt"):
        assert name in error_of(export.main, [str(tmp_path / name), "--format", "torch"], capfd)
