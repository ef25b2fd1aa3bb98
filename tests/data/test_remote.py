"""Object storage that does not answer is one line, soon, and does not keep a signal waiting."""

import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from made_images import build, needs_dali

from data import remote
from data.batch import DataError
from data.dali import read_failure
from data.images import ImageList

ROOT = Path(__file__).parents[2]
pytestmark = needs_dali


def listing(*names: str) -> ImageList:
    return ImageList(root=ROOT, names=[*names], labels=np.zeros(len(names), dtype=np.int64), classes=["ant"])


def silent(names, sender):
    """In place of DALI: nothing is ever answered."""
    sender.send_bytes(remote.READY)
    time.sleep(600)


def dying(names, sender):
    os._exit(3)


def answering(names, sender):
    sender.send_bytes(remote.READY)
    sender.send_bytes(b"")


@pytest.mark.parametrize(
    ("reading", "words"), [(silent, "no answer within 1 s"), (dying, "the process that reads it has ended")]
)
def test_storage_that_does_not_answer_is_one_line(tmp_path, monkeypatch, reading, words):
    monkeypatch.setattr(remote, "ANSWER_S", 1.0)
    monkeypatch.setattr(remote, "CONTEXT", multiprocessing.get_context("fork"))  # in no time
    monkeypatch.setattr(remote, "_read", reading)
    for split in ("train", "val"):
        (tmp_path / f"{split}.txt").write_text("gs://bucket/a.jpg\tant\n")
    train, _ = build(tmp_path, "dali", batch_size=1)
    with pytest.raises(DataError, match=rf"^gs://bucket/a\.jpg: cannot be read \({words}\): look after network"):
        next(iter(train))
    train.close()
    monkeypatch.setattr(remote, "_read", answering)
    monkeypatch.setattr(remote, "ANSWER_S", 60.0)
    remote.require_answer(listing("gs://bucket/a.jpg"))


def test_what_dali_says_of_a_file_is_told(tmp_path, monkeypatch):
    """The whole way, with a name that needs no network: DALI is asked for it in the other process."""
    monkeypatch.setattr(remote, "is_remote", lambda name: True)
    there, nowhere = tmp_path / "0.jpg", tmp_path / "nowhere.jpg"
    there.write_bytes(b"content")
    assert read_failure([str(there)]) == "" and "nowhere.jpg" in read_failure([str(there), str(nowhere)])
    with pytest.raises(DataError, match=rf"^{nowhere}: cannot be read \(.*nowhere\.jpg"):
        remote.require_answer(listing(str(nowhere)))


def test_one_image_of_each_bucket_is_read():
    names = ["a.jpg", "s3://one/a.jpg", "s3://one/b.jpg", "gs://one/a.jpg", "s3://two/c/d.jpg"]
    assert remote._one_of_each_bucket(names) == ["s3://one/a.jpg", "gs://one/a.jpg", "s3://two/c/d.jpg"]
    assert remote._one_of_each_bucket(["a.jpg"]) == []


def test_a_signal_is_heard_while_storage_does_not_answer(monkeypatch):
    class Heard(Exception):
        pass

    def heard(number, frame):
        raise Heard

    honest = Connection.poll

    def poll(self, timeout):
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()  # not before it waits
        return honest(self, timeout)

    monkeypatch.setattr(remote, "CONTEXT", multiprocessing.get_context("fork"))
    monkeypatch.setattr(remote, "_read", silent)
    monkeypatch.setattr(Connection, "poll", poll)
    before = signal.signal(signal.SIGTERM, heard)
    try:
        with pytest.raises(Heard):
            remote.require_answer(listing("gs://bucket/a.jpg"))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not multiprocessing.active_children()
