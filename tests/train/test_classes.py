"""Labels are places in a list of names: checkpoints and exports hold it, and readers go by the names."""

import json
from pathlib import Path

import onnx
import pytest
import torch
from launching import broken_off, events, train, write_image_folder

from data import DataError
from launch import evaluate, export
from train.checkpoint.file import load_checkpoint, save_checkpoint

FOLDER = {"data__loader": "folder", "data__batch_size": 12, "train__epochs": 2, "prune__method": "none"}
NAMES = ["class0", "class1", "class2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, and a run that learnt them."""
    root = tmp_path_factory.mktemp("trained")
    write_image_folder(root / "images")
    train(root, **FOLDER, data__path=root / "images")
    return root


def test_a_checkpoint_holds_the_names_of_its_classes(trained: Path):
    assert load_checkpoint(trained / "tiny/last.pt")["classes"] == NAMES


def test_evaluation_goes_by_the_names_and_refuses_others(trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture):
    assert evaluate.main([str(trained / "tiny/last.pt")]) == 0
    expected = capfd.readouterr().out
    renamed = write_image_folder(tmp_path / "renamed")
    for split in ("train", "val"):
        (renamed / split / "class1").rename(renamed / split / "class9")
    assert evaluate.main([str(trained / "tiny/last.pt"), "--data", str(renamed)]) == 1
    assert "'class9' is not the network's" in capfd.readouterr().err
    stored = load_checkpoint(trained / "tiny/last.pt")
    swapped = stored | {"classes": NAMES[::-1]}
    head = {"fc2.weight", "fc2.bias"}
    swapped["model"] = {key: value.flip(0) if key in head else value for key, value in stored["model"].items()}
    save_checkpoint(tmp_path / "swapped.pt", swapped)
    assert evaluate.main([str(tmp_path / "swapped.pt")]) == 0
    assert capfd.readouterr().out == expected


def test_training_on_from_a_checkpoint_keeps_its_order(trained: Path, tmp_path: Path):
    stored = load_checkpoint(trained / "tiny/last.pt")
    save_checkpoint(tmp_path / "swapped.pt", stored | {"classes": NAMES[::-1]})
    train(tmp_path, **FOLDER, data__path=trained / "images", model__checkpoint=tmp_path / "swapped.pt")
    assert load_checkpoint(tmp_path / "tiny/last.pt")["classes"] == NAMES[::-1]


def test_a_run_does_not_go_on_with_other_classes(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    images = write_image_folder(tmp_path / "images")
    with broken_off(monkeypatch, at_step=6):
        train(tmp_path, **FOLDER, data__path=images)
    for split in ("train", "val"):
        (images / split / "class1").rename(images / split / "class9")
    with pytest.raises(DataError, match="'class9' is not the network's"):
        train(tmp_path, **FOLDER, data__path=images)


def test_exports_hold_the_names(trained: Path, tmp_path: Path):
    for form, suffix in (("onnx", ".onnx"), ("torch", ".pt2")):
        assert (
            export.main([str(trained / "tiny/last.pt"), "--format", form, "--out", str(tmp_path / f"a{suffix}")]) == 0
        )
    held = {entry.key: entry.value for entry in onnx.load(tmp_path / "a.onnx").metadata_props}
    assert json.loads(held["classes"]) == NAMES
    extra = {"classes": ""}
    torch.export.load(tmp_path / "a.pt2", extra_files=extra)
    assert json.loads(extra["classes"]) == NAMES


def test_a_checkpoint_without_names_says_so(trained: Path, tmp_path: Path):
    save_checkpoint(tmp_path / "old.pt", load_checkpoint(trained / "tiny/last.pt") | {"classes": None})
    with pytest.warns(UserWarning, match="does not hold the names of its classes"):
        assert evaluate.main([str(tmp_path / "old.pt")]) == 0


def test_made_images_have_no_names(tmp_path: Path):
    log = train(tmp_path, train__epochs=1, prune__last_epoch=1)
    assert events(log, "done") and load_checkpoint(tmp_path / "tiny/last.pt")["classes"] is None
