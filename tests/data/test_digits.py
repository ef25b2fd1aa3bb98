"""The digits come whole or not at all, always with the same split, and nothing that stands there is overwritten."""

import fcntl
import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

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
        (folder / "val" / "new").mkdir(parents=True)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic.write_data_set(tmp_path / "set", interrupted)
    assert not (tmp_path / "set").exists()
    # What a killed process leaves, as it cannot clean up.
    (tmp_path / ".set.preparing" / "train" / "half").mkdir(parents=True)
    (tmp_path / ".set.preparing" / ".lock").touch()
    atomic.write_data_set(tmp_path / "set", make_set)
    assert [entry.name for entry in (tmp_path / "set" / "train").iterdir()] == ["new"]
    assert {entry.name for entry in (tmp_path / "set").iterdir()} == {"train", "val"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["set"]


def test_of_two_that_prepare_the_same_set_one_waits_for_the_other(tmp_path, monkeypatch):
    made, started, waits, honest = [], Event(), Event(), fcntl.flock

    def flock(descriptor, how):
        if how == fcntl.LOCK_EX:
            waits.set()
        honest(descriptor, how)

    def make_slowly(folder):
        started.set()
        made.append(folder)
        assert waits.wait(60)
        make_set(folder)

    monkeypatch.setattr(fcntl, "flock", flock)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(atomic.write_data_set, tmp_path / "set", make_slowly)
        assert started.wait(60)
        with pytest.warns(UserWarning, match="another process is preparing the data set; waiting"):
            assert not atomic.write_data_set(tmp_path / "set", make_slowly)
    assert first.result() and len(made) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["set"]


def test_the_set_is_locked_until_it_is_at_its_place(tmp_path, monkeypatch):
    honest, locked = Path.rename, []

    def rename(self, target):
        locked.append((self / atomic.LOCK).exists())
        return honest(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    atomic.write_data_set(tmp_path / "set", make_set)
    assert locked == [True]


def test_what_cannot_be_read_elsewhere_is_not_blamed_on_the_place(tmp_path):
    def read(folder):
        (tmp_path / "source.tar").open()

    with pytest.raises(DataError, match=r"source\.tar: cannot be read \(No such file or directory\)$"):
        atomic.write_data_set(tmp_path / "set", read)
    assert not list(tmp_path.iterdir())


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
    for split in ("train", "val"):
        (folder / split / "new").mkdir(parents=True)
