"""Weights & Biases offline, MLflow's file store, Trackio on this machine: a run with a resume is one curve in each."""

import json
import sqlite3
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from launching import broken_off, events, train

from train.errors import ConfigError
from train.log import trackers

Points = list[tuple[int, float]]
"""(epoch, value), as they lie in the tracker's own files."""


BLOCK = 32 * 1024


def wandb_records(log: bytes) -> Iterator[bytes]:
    """The records of one of W&B's offline files: LevelDB's log format behind 7 bytes of their own."""
    position, record = 7, b""
    while position < len(log):
        if BLOCK - position % BLOCK < 7:  # no header fits: the rest of the block is padding
            position += BLOCK - position % BLOCK
            continue
        size, kind = struct.unpack("<HB", log[position + 4 : position + 7])
        record += log[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield record
            record = b""


def wandb_points(root: Path) -> tuple[set[str], Points]:
    """The ids and the losses in all of W&B's offline files, one for each process that wrote."""
    from wandb.proto.wandb_internal_pb2 import Record

    ids, found = set(), []
    for file in sorted(root.rglob("*.wandb")):
        for record in _finished(file, Record.FromString):
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            values = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            if "train/loss" in values:
                found.append((int(values["_step"]), float(values["train/loss"])))
    return ids, found


def _finished(file: Path, parse: Callable[[bytes], Any]) -> list[Any]:
    """All records of a file, once its last one is there: W&B's own process may write after `finish` has returned."""
    from google.protobuf.message import DecodeError

    for _ in range(600):
        with suppress(struct.error, DecodeError):  # the last record is there in part
            records = [parse(data) for data in wandb_records(file.read_bytes())]
            if records and records[-1].WhichOneof("record_type") == "exit":
                return records
        time.sleep(0.1)
    raise TimeoutError(f"{file} has no end")


def mlflow_points(root: Path) -> tuple[set[str], Points]:
    from mlflow import MlflowClient

    client = MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    points = [point for run in runs for point in client.get_metric_history(run.info.run_id, "train/loss")]
    return {run.info.run_id for run in runs}, [(point.step, point.value) for point in points]


def trackio_points(root: Path) -> tuple[set[str], Points]:
    with sqlite3.connect(root / "trackio" / "tests.db") as connection:
        rows = connection.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
    losses = [(step, json.loads(text).get("train/loss")) for _, step, text in rows]
    return {name for name, _, _ in rows}, [(step, loss) for step, loss in losses if loss is not None]


READERS = {"wandb": wandb_points, "mlflow": mlflow_points, "trackio": trackio_points}


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Everything that the trackers write lies here, and nothing goes to a server."""
    for key, value in {
        "WANDB_MODE": "offline",
        "WANDB_CONFIG_DIR": tmp_path / "wandb-config",
        "WANDB_CACHE_DIR": tmp_path / "wandb-cache",
        "MLFLOW_TRACKING_URI": (tmp_path / "mlruns").as_uri(),
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "TRACKIO_DIR": tmp_path / "trackio",
        "HF_HUB_OFFLINE": "1",
    }.items():
        monkeypatch.setenv(key, str(value))
    return tmp_path


@pytest.mark.parametrize("tracker", READERS)
def test_a_run_and_its_resume_are_one_curve(local: Path, monkeypatch: pytest.MonkeyPatch, tracker: str):
    pytest.importorskip(tracker)
    settings = {"run__trackers": f"[{tracker}]", "run__project": "tests"}
    with broken_off(monkeypatch, at_step=7):  # in the second epoch of 4 steps
        train(local, **settings)
    log = train(local, **settings)
    assert not [note for note in events(log, "note") if "left out" in note["message"]]
    ids, points = READERS[tracker](local)
    assert len(ids) == 1
    assert sorted(points) == [(event["epoch"], pytest.approx(event["train_loss"])) for event in events(log, "epoch")]


def test_a_kill_takes_no_epoch_from_wandbs_offline_file(local: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv(trackers.FLUSH_INTERVAL, raising=False)
    sink = trackers.WeightsAndBiases(trackers.Tracked("run", "id", "tests", local, began=1e9, events=()))
    sink.write({"event": "resize", "epoch": 2, "removed": {"conv1": 3}, "seconds": 1.0})
    sink.write({"event": "epoch", "epoch": 2, "train_loss": 0.5, "seconds": {}, "widths": {}})
    by, written = time.monotonic() + 14, False  # W&B's own interval is 15 seconds
    while not written and time.monotonic() < by:
        time.sleep(0.1)
        written = any(b"train/loss" in file.read_bytes() for file in local.rglob("*.wandb"))
    sink.close()
    assert written


def test_mlflow_gets_the_epochs_before_it_was_asked_for_and_none_twice(local: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("mlflow")
    settings = {"run__project": "tests"}
    with broken_off(monkeypatch, at_step=7):
        train(local, **settings)
    with broken_off(monkeypatch, at_step=2):
        train(local, run__trackers="[mlflow]", **settings)
    train(local, run__trackers="[mlflow]", **settings)
    assert Counter(epoch for epoch, _ in mlflow_points(local)[1]) == Counter([1, 2, 3])


def test_two_resizes_of_an_epoch_are_two_points_of_mlflow_also_after_a_resume(local: Path):
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    resizes = [
        {"event": "resize", "epoch": 2, "removed": {"conv1": count}, "seconds": 1.0, "time_s": 10.0 + count}
        for count in (3, 5)
    ]
    run = trackers.Tracked("run", "id", "tests", local, began=1e9, events=())
    for logged, made in (((), resizes[:1]), (resizes[:1], resizes[1:]), (resizes, [])):
        sink = trackers.MLflow(replace(run, events=logged))
        for event in made:
            sink.write(event)
        sink.close()
    client = MlflowClient()
    [found] = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    history = client.get_metric_history(found.info.run_id, "cup/removed")
    assert sorted((point.step, point.value) for point in history) == [(2, 3.0), (2, 5.0)]


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(run: trackers.Tracked) -> None:
        raise ConnectionError("the server is gone")

    monkeypatch.setattr(trackers, "TRACKERS", trackers.TRACKERS)
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", fail)
    monkeypatch.setattr(trackers, "find_spec", lambda name: SimpleNamespace(loader=object()))
    log = train(tmp_path, run__trackers="[mlflow]")
    assert any(note["message"] == "mlflow is left out: the server is gone" for note in events(log, "note"))
    assert log[-1]["event"] == "done"


@pytest.mark.parametrize("found", [None, SimpleNamespace(loader=None)], ids=["nothing", "a folder called so"])
def test_a_tracker_that_is_not_installed_is_said_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: object
):
    monkeypatch.setattr(trackers, "find_spec", lambda name: found)
    with pytest.raises(ConfigError, match=r"run.trackers: wandb is not installed: `pip install wandb`"):
        train(tmp_path, run__trackers="[wandb]")
    assert not (tmp_path / "tiny").exists()


def test_wandb_without_an_account_is_left_out_and_asks_nothing(local: Path, monkeypatch: pytest.MonkeyPatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(local / "no-netrc"))
    monkeypatch.setattr(wandb, "init", lambda **options: pytest.fail("would ask on a terminal"))
    log = train(local, run__trackers="[wandb]")
    assert any("wandb is left out: not logged in" in note["message"] for note in events(log, "note"))
