"""An accuracy says which images it is of, and is the same for every form of a network."""

import dataclasses
import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from launching import train, write_image_folder, write_network

from launch import evaluate, export
from train.checkpoint.network import save_network
from train.log.rundir import read_log

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs pip install -e '.[onnx]'",
)


def test_what_an_exclude_list_takes_out_and_what_it_names_in_vain_is_said(tmp_path, capsys):
    write_network(tmp_path / "net.pt", num_classes=3)
    images = write_image_folder(tmp_path / "images")
    (images / "exclude.txt").write_text("val/class0/0.jpg\nval/class0/no.jpg\n")
    arguments = [str(tmp_path / "net.pt"), "--data", str(images), "--batch-size", "6"]
    with pytest.warns(UserWarning) as warned:
        assert evaluate.main(arguments) == 0
    messages = [str(warning.message) for warning in warned]
    assert any("1 validation images are excluded and not counted" in message for message in messages)
    assert any("names what is not in the data set" in m and m.endswith("val/class0/no.jpg") for m in messages)
    assert "17 images" in capsys.readouterr().out


def test_images_to_evaluate_on_need_no_training_set_beside_them(tmp_path, capsys):
    write_network(tmp_path / "net.pt", num_classes=3)
    images = write_image_folder(tmp_path / "images")
    shutil.rmtree(images / "train")
    arguments = [str(tmp_path / "net.pt"), "--data", str(images), "--batch-size"]
    assert evaluate.main([*arguments, "64"]) == 0
    assert "18 images" in capsys.readouterr().out
    assert evaluate.main([*arguments, "0"]) == 2
    assert "--batch-size: found '0', allowed: a whole number from 1" in capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three classes that brightness tells apart; its checkpoint's folder holds every exported form, too.

    It is validated at another size than it is trained at, which is that of its exported forms.
    """
    root = tmp_path_factory.mktemp("trained")
    images = write_image_folder(root / "images", train=32, val=12)
    train(
        root, model__name="resnet20_cifar", data__path=str(images), data__loader="folder", data__channels=3,
        data__image_size=20, data__resize_size=20, data__val_size=24, data__batch_size=16, data__threads=1,
        train__epochs=3, prune__last_epoch=2,
    )  # fmt: skip
    return root / "tiny" / "last.pt"


def accuracy_of(arguments: list[str], capsys: pytest.CaptureFixture) -> tuple[float, str]:
    """Top-1, and all that was printed."""
    capsys.readouterr()
    assert evaluate.main(arguments) == 0
    printed = capsys.readouterr().out
    return float(re.match(r"top-1 ([\d.]+)%", printed)[1]), printed


@needs_onnx
def test_every_form_of_a_network_has_its_accuracy_and_cost(trained: Path, capsys: pytest.CaptureFixture):
    top1, printed = accuracy_of([str(trained)], capsys)
    log = read_log(trained.with_name("log.jsonl"))
    assert top1 == pytest.approx(log[-1]["top1"], abs=1e-3) and top1 > 40
    assert (log[0]["val_size"], [line["image_size"] for line in log if line["event"] == "epoch"]) == (24, [20] * 3)
    data = ["--data", str(trained.parents[1] / "images"), "--loader", "folder", "--batch-size", "9"]
    for form, name in (("timm", "last"), ("onnx", "last.onnx")):
        assert export.main([str(trained), "--format", form]) == 0
        assert accuracy_of([str(trained.with_name(name)), *data], capsys) == (top1, printed)


@needs_onnx
def test_int8_keeps_the_accuracy_in_a_quarter_of_the_bytes(trained: Path, capsys: pytest.CaptureFixture):
    top1, _ = accuracy_of([str(trained)], capsys)
    assert export.main([str(trained), "--format", "onnx-int8", "--calibration-images", "64"]) == 0
    said = capsys.readouterr().out
    assert float(re.search(r"float network: ([\d.]+)% of 64 calibration images", said)[1]) > 90
    int8, exact = map(float, re.search(r"([\d.]+) MB \(float: ([\d.]+) MB\)", said).groups())
    assert int8 < exact / 2  # of so small a network the description is a large part
    data = ["--data", str(trained.parents[1] / "images"), "--loader", "folder"]
    quantised, printed = accuracy_of([str(trained.with_name("last.int8.onnx")), *data], capsys)
    assert abs(quantised - top1) <= 100 / 36 + 0.01  # one image of 36
    assert "GFLOPs" in printed


def test_per_class_accuracy_is_listed_from_the_lowest(trained: Path, capsys: pytest.CaptureFixture):
    top1, printed = accuracy_of([str(trained), "--per-class"], capsys)
    head, *rows = [line.split() for line in printed.splitlines()[1:]]
    assert head == ["class", "images", "top-1", "(%)"]
    assert sorted(row[0] for row in rows) == ["class0", "class1", "class2"] and {row[1] for row in rows} == {"12"}
    each = [float(row[2]) for row in rows]
    assert each == sorted(each) and sum(each) / 3 == pytest.approx(top1, abs=0.01)


def test_another_image_size_and_loader(trained: Path, capsys: pytest.CaptureFixture):
    _, small = accuracy_of([str(trained)], capsys)
    _, large = accuracy_of([str(trained), "--image-size", "48", "--loader", "folder"], capsys)
    gflops = [float(re.search(r"([\d.]+) GFLOPs", printed)[1]) for printed in (small, large)]
    assert gflops[1] == pytest.approx(4 * gflops[0], rel=0.02)
    assert evaluate.main([str(trained), "--image-size", "7"]) == 2
    assert "data.image_size: found 7" in capsys.readouterr().err


@needs_onnx
def test_an_onnx_file_of_others_is_evaluated_with_the_classes_of_the_data(tmp_path: Path, capsys, recwarn):
    """Other metadata, a batch of its own size, height and width that are left open."""
    import onnx

    network = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    network[0].weight.data.zero_()
    side = torch.export.Dim("side", min=9)
    torch.onnx.export(
        network, (torch.zeros(4, 3, 28, 28),), tmp_path / "net.onnx", dynamo=True, verbose=False,
        dynamic_shapes=({2: side, 3: side},), external_data=False,
    )  # fmt: skip
    said = onnx.load(tmp_path / "net.onnx")
    onnx.helper.set_model_props(said, {"name": "somebody's", "mean": "0.5 0.5 0.5"})  # not ours
    onnx.save(said, tmp_path / "net.onnx")
    images = write_image_folder(tmp_path / "images")
    arguments = [str(tmp_path / "net.onnx"), "--data", str(images), "--loader", "folder", "--batch-size"]
    assert evaluate.main([*arguments, "4"]) == 2
    assert "give --image-size" in capsys.readouterr().err
    top1, printed = accuracy_of([*arguments, "4", "--image-size", "28"], capsys)
    assert top1 == pytest.approx(100 / 3, abs=0.001) and "GFLOPs" not in printed
    assert any("does not hold the names of its classes" in str(warning.message) for warning in recwarn)
    assert evaluate.main([*arguments, "6", "--image-size", "28"]) == 1
    assert "does not take images of shape (6, 3, 28, 28)" in capsys.readouterr().err


@needs_onnx
def test_what_is_no_network_is_refused_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture):
    network = write_network(tmp_path / "net.pt", num_classes=3)
    save_network(tmp_path / "net.pt", dataclasses.replace(network, classes=["a", "b", "c"]), widths={})
    assert export.main([str(tmp_path / "net.pt"), "--format", "timm"]) == 0
    assert export.main([str(tmp_path / "net.pt"), "--format", "onnx"]) == 0
    (tmp_path / "junk.onnx").write_bytes(b"junk")
    (tmp_path / "empty").mkdir()
    for name, changes in (
        ("wide", {"input_size": [1, 28, 56]}),
        ("deep", {"input_size": [2, 28, 28], "mean": [0, 0], "std": [1, 1]}),
        ("lanczos", {"interpolation": "lanczos"}),
    ):
        config = json.loads((shutil.copytree(tmp_path / "net", tmp_path / name) / "config.json").read_text())
        config["pretrained_cfg"] |= changes
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    images = str(write_image_folder(tmp_path / "images"))
    for arguments, words in [
        (["junk.onnx", "--data", images], "cannot be run as ONNX"),
        (["missing.onnx", "--data", images], "no file at"),
        (["empty", "--data", images], "no config.json"),
        (["net.onnx"], "give --data FOLDER"),
        (["net"], "give --data FOLDER"),
        (["net.onnx", "--data", images], "'class0' is not the network's"),
        (["wide", "--data", images], "wide: input_size: found (1, 28, 56), allowed: 1 or 3 channels, height equal"),
        (["deep", "--data", images], "deep: input_size: found (2, 28, 28), allowed: 1 or 3 channels"),
        (["lanczos", "--data", images], "lanczos: interpolation: found 'lanczos', allowed in evaluation: bilinear or"),
        (["net", "--data", images, "--loader", "plain"], "invalid choice: 'plain'"),
    ]:
        capfd.readouterr()
        assert evaluate.main([str(tmp_path / arguments[0]), *arguments[1:]]) != 0
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == 1 and words in lines[0], (arguments, lines)
