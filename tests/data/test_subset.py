"""launch/prepare.py subset: fewer images of an image folder."""

from pathlib import Path

import pytest
from launching import write_image_folder

from data.images import list_splits
from launch import prepare


def subset(source: Path, path: Path, train: int, val: int) -> int:
    return prepare.main(["subset", str(source), str(path), "--train", str(train), "--val", str(val)])


def test_a_subset_has_the_images_asked_for_classes_in_proportion_always_the_same(tmp_path: Path):
    source = write_image_folder(tmp_path / "source", classes=3, train=16, val=6)
    assert subset(source, tmp_path / "one", train=12, val=3) == 0
    assert subset(source, tmp_path / "other", train=12, val=3) == 0
    train, val = list_splits(tmp_path / "one")
    assert [train.labels.tolist().count(label) for label in range(3)] == [4, 4, 4]
    assert [val.labels.tolist().count(label) for label in range(3)] == [1, 1, 1]
    assert [images.names for images in list_splits(tmp_path / "other")] == [train.names, val.names]
    for images, split in ((train, "train"), (val, "val")):
        for name in images.names:
            assert (images.root / name).read_bytes() == (source / split / name).read_bytes()


def test_a_finished_subset_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture):
    source = write_image_folder(tmp_path / "source")
    assert subset(source, tmp_path / "subset", train=12, val=3) == 0
    assert subset(source, tmp_path / "subset", train=24, val=6) == 0
    assert len(list_splits(tmp_path / "subset")[0].names) == 12 and "kept as it is" in capsys.readouterr().out


@pytest.mark.parametrize(("train", "said"), [(2, "allowed: 3 (one a class) to 48"), (49, "found 49 images of train")])
def test_more_images_than_there_are_are_refused(tmp_path: Path, train: int, said: str, capsys: pytest.CaptureFixture):
    source = write_image_folder(tmp_path / "source")
    assert subset(source, tmp_path / "subset", train=train, val=3) == 1
    assert said in capsys.readouterr().err and not (tmp_path / "subset").exists()


def test_file_lists_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture):
    images = write_image_folder(tmp_path / "source")
    lists = tmp_path / "lists"
    lists.mkdir()
    for split in ("train", "val"):
        lines = [f"{file} {file.parent.name}" for file in sorted((images / split).rglob("*.jpg"))]
        (lists / f"{split}.txt").write_text("\n".join(lines))
    assert subset(lists, tmp_path / "subset", train=12, val=3) == 1
    assert "found file lists, shards or a Hugging Face set, allowed: an image folder" in capsys.readouterr().err
