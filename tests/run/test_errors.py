"""What a user can get wrong: one clear line, the right exit code, no traceback, nothing overwritten, no hang."""

import os
from pathlib import Path

import pytest
from launching import TINY, launch, options, rank_lines, write_image_folder
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from launch import evaluate
from train.config import parse_config
from train.log.rundir import read_log


def one_line(result, exit_code: int) -> str:
    """The single line of the run's stderr, checked for its form."""
    lines = result.stderr.strip().splitlines()
    assert result.returncode == exit_code, result.stderr
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--prune.hard_ramp.slope", "-0.1"], ["prune.hard_ramp.slope", "-0.1", "a number from 0"]),
        (["--cup.slop", "1"], ["cup.slop", "unknown key", "did you mean prune.hard_ramp.slope?"]),
        (["--model.name", "resnet51"], ["model.name", "'resnet51'", "resnet50"]),
    ],
)
def test_a_wrong_setting_is_one_line_and_exit_code_2(tmp_path: Path, arguments: list[str], expected: list[str]):
    line = one_line(launch("launch/train.py", options() + arguments, tmp_path), exit_code=2)
    assert all(words in line for words in expected), line
    assert not (tmp_path / "runs").exists()  # nothing that the corrected command would stumble over


def test_a_missing_data_folder_is_named(tmp_path: Path):
    line = one_line(launch("launch/train.py", options(data__loader="folder", data__path="nowhere"), tmp_path), 1)
    assert "nowhere" in line
    assert not (tmp_path / "runs").exists()


def test_an_empty_class_is_named(tmp_path: Path):
    write_image_folder(tmp_path / "images")
    for image in (tmp_path / "images/train/class1").iterdir():
        image.unlink()
    line = one_line(launch("launch/train.py", options(data__loader="folder", data__path="images"), tmp_path), 1)
    assert "class1" in line


def test_a_run_directory_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "runs").write_text("a file where the folder should be")
    line = one_line(launch("launch/train.py", options(), tmp_path), 1)
    assert "runs/tiny" in line and "--run.root" in line


def test_a_folder_without_write_permission_is_named(tmp_path: Path):
    (tmp_path / "runs").mkdir(mode=0o555)
    assert "runs/tiny" in one_line(launch("launch/train.py", options(), tmp_path, is_ordinary=True), 1)


def test_a_network_that_does_not_take_the_images_is_an_error_before_training(tmp_path: Path):
    line = one_line(launch("launch/train.py", options(data__image_size=32, data__resize_size=32), tmp_path), 1)
    assert "LeNet does not take inputs of shape (1, 32, 32)" in line


def test_a_wrong_setting_is_said_once_by_a_machine(tmp_path: Path):
    """And by the report with which torchrun ends."""
    file = tmp_path / "error.json"
    arguments = options(prune__hard_ramp__slope=-1)
    result = launch("launch/train.py", arguments, tmp_path, ranks=2, TORCHELASTIC_ERROR_FILE=str(file))
    assert result.returncode != 0
    [line] = rank_lines(result.stderr)
    assert line.startswith("[rank 0] error: prune.hard_ramp.slope")
    report = torchrun_report(file)
    assert line.removeprefix("[rank 0] ") in report and "To enable traceback" not in report


def torchrun_report(file: Path) -> str:
    """What torchrun says at its end of a rank that left this file, where TORCHELASTIC_ERROR_FILE told it to."""
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(file))
    return str(ChildFailedError("launch/train.py", {0: failure})).partition("Root Cause")[2]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__loader": "folder", "data__path": "nowhere"}, "rank 0 failed: nowhere: there is no such folder"),
        ({"data__batch_size": 31}, "batch_size: found 31, allowed"),
    ],
)
def test_both_ranks_say_it_and_none_hangs(tmp_path: Path, changes: dict, words: str):
    """Of the images only rank 0 makes a list."""
    result = launch("launch/train.py", options(**changes), tmp_path, ranks=2)
    assert result.returncode != 0
    lines = sorted(rank_lines(result.stderr))
    assert [line[:8] for line in lines] == ["[rank 0]", "[rank 1]"]
    assert words in lines[1] and words.removeprefix("rank 0 failed: ") in lines[0]


def test_a_broken_image_that_one_rank_meets_is_named_by_both(tmp_path: Path):
    """In the middle of an epoch, where the other one waits for gradients."""
    sound = write_image_folder(tmp_path / "images") / "train/class1/7.jpg"
    broken = sound.with_name(os.fsdecode(b"M\xfcll.jpg"))  # Latin-1
    sound.rename(broken)
    broken.write_bytes(broken.read_bytes()[:300])
    data = {"data__loader": "folder", "data__path": "images", "data__batch_size": 4}
    file = tmp_path / "error.json"
    arguments = options(**data, train__epochs=30)
    seen = {"TORCHELASTIC_ERROR_FILE": str(file), "EXIT_DELAY_S": "2"}
    result = launch("launch/train.py", arguments, tmp_path, ranks=2, **seen)
    assert result.returncode != 0
    lines = sorted(rank_lines(result.stderr))
    assert [line[:8] for line in lines] == ["[rank 0]", "[rank 1]"]
    assert all(r"images/train/class1/M\udcfcll.jpg" in line for line in lines), lines
    assert sum(" failed: " in line for line in lines) == 1
    assert rb"M\udcfcll.jpg" in torchrun_report(file).encode(), "torchrun hangs at what is no text"


def test_what_the_folders_hold_beside_images_is_said_in_training_and_in_evaluation(
    tmp_path: Path, capfd: pytest.CaptureFixture
):
    folder = write_image_folder(tmp_path / "images", train=12)
    for split in ("train", "val"):
        (folder / split / "class1" / f"{split}.txt").touch()
    data = {"data__loader": "folder", "data__path": folder, "data__batch_size": 12}
    result = launch("launch/train.py", options(**data, train__epochs=1, prune__last_epoch=1), tmp_path)
    assert result.returncode == 0, result.stderr
    notes = [event["message"] for event in read_log(tmp_path / "runs/tiny/log.jsonl") if event["event"] == "note"]
    for split, name in (("training", "class1/train.txt"), ("validation", "class1/val.txt")):
        assert f"{folder}: not among the {split} images, for its name or place: {name}" in notes
    with pytest.warns(UserWarning, match="not among the validation images, for its name or place: class1/val.txt"):
        assert evaluate.main([str(tmp_path / "runs/tiny/last.pt")]) == 0


def test_debug_shows_the_traceback(tmp_path: Path):
    result = launch("launch/train.py", [*options(prune__hard_ramp__slope=-1), "--debug"], tmp_path)
    assert result.returncode == 2
    assert "Traceback" in result.stderr


def test_print_config_is_a_recipe_that_parses_to_the_same(tmp_path: Path):
    printed = launch("launch/train.py", [*options(), "--print_config"], tmp_path)
    assert printed.returncode == 0
    (tmp_path / "again.yaml").write_text(printed.stdout)
    parsed = [parse_config(["--config", str(path)], "train.py", "") for path in (TINY, tmp_path / "again.yaml")]
    assert parsed[0] == parsed[1]


def test_evaluate_refuses_what_is_no_checkpoint(tmp_path: Path, capfd: pytest.CaptureFixture):
    (tmp_path / "junk.pt").write_bytes(b"not a checkpoint")
    for name in ("junk.pt", "missing.pt"):
        assert evaluate.main([str(tmp_path / name)]) == 1
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == 1 and name in lines[0]
    assert evaluate.main(["--nonsense"]) == 2
    assert len(capfd.readouterr().err.splitlines()) == 1
