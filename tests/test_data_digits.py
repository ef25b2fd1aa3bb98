"""The digits come whole or not at all, always with the same split, and nothing that stands there is overwritten."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from data.batch import DataConfig, DataError
from data.images import list_splits
from data.prepare import atomic, prepare_data, prepare_digits


def test_split_is_stratified_and_fixed(tmp_path):
    prepare_digits(tmp_path / "a")
    train, val = list_splits(tmp_path / "a")
    assert (len(train.names), len(val.names)) == (1437, 360)
    assert train.classes == [str(digit) for digit in range(10)]
    share = np.bincount(val.labels) / (np.bincount(val.labels) + np.bincount(train.labels))
    assert np.abs(share - 360 / 1797).max() < 0.005
    numbers = [name.split("/")[1] for name in train.names + val.names]
    assert sorted(numbers) == [f"{number:04d}.jpg" for number in range(1797)]
    # Pins the split: results of different versions stay comparable.
    assert hashlib.sha256(" ".join(val.names).encode()).hexdigest()[:16] == "e154e159db468627"
    with Image.open(val.path(0)) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (32, 32))
        assert np.asarray(image).max() > 200
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_interrupted_preparation_is_not_taken_for_finished(tmp_path):
    def interrupted(folder):
        (folder / "train").mkdir()
        (folder / "val").mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic.write_data_set(tmp_path / "set", interrupted)
    assert not (tmp_path / "set").exists()
    # What a killed process leaves, as it cannot clean up.
    (tmp_path / ".set.preparing-1" / "train").mkdir(parents=True)
    atomic.write_data_set(tmp_path / "set", make_set)
    assert (tmp_path / "set" / "train" / "new").exists()


def test_finished_set_is_left_as_it_is(tmp_path):
    for split in ("train", "val"):
        (tmp_path / "set" / split / "mine").mkdir(parents=True)
    prepare_data(DataConfig(path=str(tmp_path / "set"), prepare="digits"))
    assert [entry.name for entry in (tmp_path / "set" / "train").iterdir()] == ["mine"]


def test_something_else_is_not_overwritten(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "thesis.tex").touch()
    with pytest.raises(DataError, match="set: exists, but train/ or val/ is missing or empty, so it is not"):
        prepare_digits(tmp_path / "set")
    assert [entry.name for entry in (tmp_path / "set").iterdir()] == ["thesis.tex"]


def test_place_that_cannot_be_written_is_a_data_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        prepare_digits(tmp_path / "file" / "set")


def test_nothing_is_prepared_unasked(tmp_path):
    prepare_data(DataConfig(path=str(tmp_path / "set")))
    assert not list(tmp_path.iterdir())


def make_set(folder):
    (folder / "train" / "new").mkdir(parents=True)
    (folder / "val").mkdir()
