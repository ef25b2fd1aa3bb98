"""Faults from outside: files of another run, logs that lost lines, files that cannot be read, hostile ones."""

import io
import json
import os
import shutil
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import EVERY_STEP, ROOT, TINY, broken_off, events, launch, numbers, options, train, write_network

from launch import evaluate, prune
from launch import train as launch_train
from train import config_file, files
from train.checkpoint.archive import CheckpointError, UnreadableError
from train.checkpoint.file import load_checkpoint, save_checkpoint
from train.checkpoint.restore import load_run
from train.checkpoint.weights import read_weights_file
from train.errors import TrainError
from train.log.attempt import Attempt, unheard_seconds
from train.log.rundir import RunDir, read_log

BROKEN_OFF = {**EVERY_STEP, "run__keep": 3}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return train(tmp_path_factory.mktemp("undisturbed"), **BROKEN_OFF)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a run that was broken off in the middle of epoch 2."""
    root = tmp_path_factory.mktemp("original")
    with pytest.MonkeyPatch.context() as patch, broken_off(patch, at_step=7):
        train(root, **BROKEN_OFF)
    return root


@pytest.fixture
def root(original: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(original / "tiny", tmp_path / "tiny")
    return tmp_path


def notes(log: list[dict]) -> list[str]:
    return [event["message"] for event in events(log, "note")]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# Power cuts


def test_what_a_later_start_needs_is_synced_with_the_directories_that_name_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    synced, honest = [], os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        honest(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    train(tmp_path / "runs", train__epochs=1, prune__last_epoch=1)
    run = tmp_path / "runs/tiny"
    made = [tmp_path, run.parent, run / "config.yaml.part", run]  # the names of the two folders, then the file
    assert [path for path in dict.fromkeys(synced) if path in made] == [run.parent, tmp_path, *made[2:]]
    assert run / "log.jsonl" in synced and run / "last.pt.part" in synced
    assert synced[-1] == run / "log.jsonl"  # the closing line


@pytest.mark.parametrize("left", ["empty", "gone", "no YAML", "only best", "only last-2"])
def test_a_run_is_found_again_from_any_one_good_checkpoint(root: Path, undisturbed: list[dict], left: str):
    run = root / "tiny"
    if left in ("empty", "no YAML"):
        (run / "config.yaml").write_text("" if left == "empty" else "\0\0: [")
    else:
        (run / "config.yaml").unlink()
    if left.startswith("only"):
        for path in run.iterdir():
            if path.name != f"{left.removeprefix('only ')}.pt":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    log = train(root, **BROKEN_OFF)
    assert numbers(log) == numbers(undisturbed)
    assert config_file.read_config(RunDir(run)).run_id == events(log, "run")[0]["run_id"]
    damaged = [note for note in notes(log) if "config.yaml" in note]
    assert len(damaged) == (run / "config.yaml.damaged").exists() == (left in ("empty", "no YAML"))


def test_a_run_without_configuration_is_refused_to_another_one(root: Path):
    (root / "tiny/config.yaml").write_text("")
    with pytest.raises(TrainError, match=r"another configuration: optim\.lr"):
        train(root, **BROKEN_OFF, optim__lr=0.07)


def test_a_run_whose_power_is_cut_goes_on_with_the_same_bits(tmp_path: Path):
    result = launch("tests/experiments/power_cut.py", ["--cuts", "1", "--seed", "3"], tmp_path, timeout=580)
    if result.returncode == 77:
        pytest.skip(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr


# Checkpoints of other runs


def test_a_checkpoint_of_another_run_is_named_and_refused(root: Path, tmp_path: Path):
    train(tmp_path / "other", **BROKEN_OFF, run__seed=1, optim__lr=0.01)
    shutil.copy(tmp_path / "other/tiny/last.pt", root / "tiny/last.pt")
    before = contents(root / "tiny")
    with pytest.raises(
        CheckpointError, match=rf"last\.pt is a checkpoint of another run, {tmp_path}/other/tiny, not of"
    ):
        train(root, **BROKEN_OFF)
    assert contents(root / "tiny") == before


def test_a_checkpoint_without_an_id_must_have_the_settings_of_the_run(root: Path):
    """As earlier versions wrote them."""
    last = root / "tiny/last.pt"
    content = load_checkpoint(last)
    save_checkpoint(last, content | {"run_id": None})
    content["config"]["optim"]["lr"] = 0.01
    save_checkpoint(last, content | {"run_id": None})
    with pytest.raises(CheckpointError, match=r"of another run.*optim\.lr"):
        train(root, **BROKEN_OFF)


def test_the_log_of_another_run_is_named_and_refused(root: Path, tmp_path: Path):
    with pytest.MonkeyPatch.context() as patch, broken_off(patch, at_step=3):
        train(tmp_path / "other", **BROKEN_OFF)
    shutil.copy(tmp_path / "other/tiny/log.jsonl", root / "tiny/log.jsonl")
    with pytest.raises(TrainError, match=r"log\.jsonl is the log of another run"):
        train(root, **BROKEN_OFF)


def test_a_checkpoint_of_another_network_is_named(root: Path):
    last = root / "tiny/last.pt"
    content = load_checkpoint(last)
    content["architecture"]["name"] = "mlp"
    save_checkpoint(last, content)
    with pytest.raises(TrainError, match=r"tiny/last\.pt holds mlp"):
        train(root, **BROKEN_OFF)


# Logs that lost lines


@pytest.mark.parametrize("fault", ["emptied", "deleted", "in mid-line", "lines gone", "lines changed"])
def test_a_log_that_lost_lines_is_written_again(root: Path, undisturbed: list[dict], fault: str):
    path = root / "tiny/log.jsonl"
    before, lines = path.read_bytes(), path.read_bytes().splitlines(keepends=True)
    if fault == "deleted":
        path.unlink()
    else:
        changed = lines[1].replace(b'"top1": ', b'"top1": 1')
        spoiled = {
            "emptied": b"",
            "in mid-line": before[: len(lines[0]) + 50],
            "lines gone": lines[0] + b"".join(lines[2:]),
            "lines changed": b"".join([lines[0], changed, *lines[2:]]),
        }
        path.write_bytes(spoiled[fault])
    log = train(root, **BROKEN_OFF)
    assert numbers(log) == numbers(undisturbed)
    assert path.read_bytes().startswith(before)
    assert [note for note in notes(log) if "log.jsonl: found" in note and "written again" in note]
    assert path.with_name("log.jsonl.damaged").exists() == (fault in ("lines gone", "lines changed"))


def test_the_log_of_an_earlier_version_is_cut_at_a_whole_line_and_its_last_epoch_written_again(root: Path):
    """Their checkpoints hold the length of the log, and its last epoch."""
    for last in (root / "tiny").glob("last*.pt"):
        content = load_checkpoint(last)
        save_checkpoint(last, content | {"log": None, "log_bytes": len(content["log"])})
    path = root / "tiny/log.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:40])
    log = train(root, **BROKEN_OFF)
    assert [event["epoch"] for event in events(log, "epoch")] == [1, 2]
    assert any("cut at the last whole line and epoch 1 written again" in note for note in notes(log))


def test_a_garbage_line_is_refused_with_the_way_out(root: Path, undisturbed: list[dict]):
    path = root / "tiny/log.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"garbage\n" + b"".join(lines[1:]))
    with pytest.raises(TrainError, match=r"log\.jsonl, line 2: no JSON object.*move the file away"):
        train(root, **BROKEN_OFF)
    path.rename(root / "elsewhere")
    assert numbers(train(root, **BROKEN_OFF)) == numbers(undisturbed)


# Files that cannot be read


@pytest.mark.parametrize("name", ["last.pt", "config.yaml", "log.jsonl", "alive.json"])
def test_what_a_user_may_not_read_is_told_and_nothing_is_moved(root: Path, name: str):
    before = contents(root)
    (root / "tiny" / name).chmod(0)
    result = launch("launch/train.py", options(**BROKEN_OFF, run__root=root), root, is_ordinary=True)
    assert result.returncode == 1, result.stderr
    [line] = result.stderr.splitlines()
    assert f"cannot read {root}/tiny/{name}: Permission denied" in line
    assert stat.S_IMODE((root / "tiny" / name).stat().st_mode) == 0
    (root / "tiny" / name).chmod(0o644)  # so that this process, which may be an ordinary user's, can compare
    assert contents(root) == before


@pytest.mark.parametrize("folder", ["runs", "runs/tiny"])
def test_a_folder_that_may_not_be_looked_into_is_told(root: Path, folder: str):
    (root / "runs").mkdir()
    (root / "tiny").rename(root / "runs/tiny")
    before = contents(root)
    (root / folder).chmod(0)
    result = launch("launch/train.py", options(**BROKEN_OFF, run__root=root / "runs"), root, is_ordinary=True)
    (root / folder).chmod(0o755)
    assert result.returncode == 1, result.stderr
    [line] = result.stderr.splitlines()
    assert f"cannot look into {root}/runs: " in line and "Permission denied" in line
    assert contents(root) == before


def test_an_error_of_the_drive_is_no_damage(root: Path, monkeypatch: pytest.MonkeyPatch):
    honest = files.open_regular

    def broken(path: Path) -> Any:
        if path.name == "last.pt":
            raise OSError(5, "Input/output error")
        return honest(path)

    monkeypatch.setattr("train.checkpoint.archive.open_regular", broken)
    before = contents(root / "tiny")
    with pytest.raises(UnreadableError, match=r"cannot read .*last\.pt: Input/output error"):
        train(root, **BROKEN_OFF)
    assert contents(root / "tiny") == before


# Checksums


def test_no_checkpoint_with_a_changed_checksum_and_a_changed_bit_is_loaded(root: Path):
    path = root / "tiny/last.pt"
    whole = path.read_bytes()
    for number in range(30):
        content = bytearray(whole)
        content[-71 + number * 71 // 30] ^= 1 << number % 8
        content[len(whole) * (number + 1) // 32] ^= 1
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="is damaged"):
            load_checkpoint(path)


def test_only_formats_that_had_no_checksum_are_loaded_without(tmp_path: Path):
    content = load_checkpoint(_network(tmp_path / "network.pt"))
    for number, loads in ((2, True), (3, False), (4, False), (5, False)):
        torch.save(content | {"format": number}, tmp_path / "bare.pt")
        if loads:
            assert load_checkpoint(tmp_path / "bare.pt")["architecture"]["name"] == "lenet"
        else:
            with pytest.raises(CheckpointError, match="has no checksum"):
                load_checkpoint(tmp_path / "bare.pt")


# The ledger against an outside clock


def test_attempts_that_are_killed_before_their_first_word_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Three of them, killed while they wait for something at their start."""
    (tmp_path / "runs").mkdir()
    began = time.time()
    for _ in range(3):
        known = set((tmp_path / "runs").iterdir())
        pid = os.fork()
        if pid == 0:
            try:
                Attempt(["--config", str(TINY), "--run.root", str(tmp_path / "runs")])
                time.sleep(200)
            finally:
                os._exit(1)
        while not any(seconds_of_word(file) > 1 for file in set((tmp_path / "runs").iterdir()) - known):
            time.sleep(0.01)
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    outside = time.time() - began
    unheard = unheard_seconds(tmp_path / "runs", "tiny", heard_at=-1e300)
    assert len(unheard.files) == 3 and 3 < unheard.wall_s <= outside + 0.1
    done = train(tmp_path / "runs")[-1]
    assert done["seconds"]["lost"] == pytest.approx(unheard.wall_s, abs=0.1)
    assert not list((tmp_path / "runs").glob(".tiny*"))


def seconds_of_word(file: Path) -> float:
    """For how long an attempt has left word; 0 where it has not yet."""
    word = json.loads(file.read_text() or '{"began": 0, "alive": 0}')
    return word["alive"] - word["began"]


def test_the_seconds_before_the_last_word_are_not_counted_twice(tmp_path: Path):
    word = {"began": 1000.0, "alive": 1030.0, "ranks": 2}
    (tmp_path / ".run.starting-1").write_text(json.dumps(word))
    (tmp_path / ".run.starting-2").write_text(json.dumps(word | {"alive": 1040.0}))
    unheard = unheard_seconds(tmp_path, "run", heard_at=1010.0)
    assert (unheard.wall_s, unheard.rank_s) == (30.0, 60.0)


def test_a_name_that_is_none_writes_nowhere(tmp_path: Path):
    (tmp_path / "runs").mkdir()
    for name in ("/../../victim", "", "a/b"):
        Attempt(["--run.root", str(tmp_path / "runs"), f"--run.name={name}"]).end()
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_torchrun_s_own_start_is_part_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("train.log.attempt.job_began", lambda: 1e6)
    monkeypatch.setattr("train.log.attempt.began", lambda: 2e6)
    assert unheard_seconds(tmp_path, "run", heard_at=2e6 - 5).torchrun_s == 5
    assert unheard_seconds(tmp_path, "run", heard_at=-1e300).torchrun_s == 1e6


SAYS = "import time; from train.log.attempt import began, job_began as job; print(time.time() - min(began(), job()))"
BUSY = "import time\nwhile time.process_time() < 1.5: pass"


@pytest.mark.parametrize("env", ["", "TORCHELASTIC_RUN_ID=x"], ids=["python", "torchrun"])
def test_what_a_shell_did_before_it_became_the_run_is_no_part_of_it(env: str):
    """`bash -c "a && b"` becomes b, whose process has the shell's start; with torchrun that is the ranks' parent."""
    end = "; true" if env else ""  # so that the shell stays the parent
    command = f'"$0" -c "$1" && sleep 1 && env {env} "$0" -c "$2"{end}'
    shell = ["bash", "-c", command, sys.executable, BUSY, SAYS]
    result = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(result.stdout) < 1.5  # 2.5 seconds were before


@pytest.mark.parametrize(
    "words",
    [
        '{"wall_s": NaN, "rank_s": 1}',
        '{"wall_s": 1, "rank_s": Infinity}',
        '{"wall_s": 1e200, "rank_s": 1e200}',
        '{"wall_s": -5, "rank_s": 0}',
        '{"wall_s": "5", "rank_s": 5}',
        '{"wall_s": 1, "rank_s": 1e9}',
        "[" * 100000,
        "",
        "5",
    ],
)
def test_a_word_that_no_run_can_have_left_counts_nothing_and_is_told(root: Path, words: str):
    (root / "tiny/alive.json").write_text(words)
    log = train(root, **BROKEN_OFF)
    assert log[-1]["seconds"]["lost"] < 100 and log[-1]["gpu_hours"] < 1
    assert any("alive.json does not say seconds" in note for note in notes(log))


# Well-formed and absurd


def _network(path: Path) -> Path:
    write_network(path)
    return path


def _doubling() -> list:
    value: list = [0]
    for _ in range(30):
        value = [value, value]
    return value


ABSURD: dict[str, Callable[[dict[str, Any]], object]] = {
    "very many classes": lambda content: content["architecture"].update(num_classes=10**12),
    "negative classes": lambda content: content["architecture"].update(num_classes=-1),
    "expanded weights": lambda content: (
        content["architecture"].update(num_classes=10**9),
        content["model"].update(extra=torch.zeros(1).expand(10**9)),
    ),
    "huge images": lambda content: content["architecture"].update(input_shape=(1, 10**6, 10**6)),
    "images of no size": lambda content: content["architecture"].update(input_shape=(0, 28, 28)),
    "nested plans": lambda content: content.update(plans="[" * 100_000),
    "doubling lists": lambda content: content.update(widths=_doubling()),
    "a huge number": lambda content: content.update(gpu_hours=10**5000),
    "hours that are none": lambda content: content.update(gpu_hours=float("nan")),
    "classes that are no names": lambda content: content.update(classes=[1] * 10),
    "too few names": lambda content: content.update(classes=["a"]),
}


@pytest.mark.timeout(180)
@pytest.mark.parametrize("what", ABSURD)
def test_absurd_checkpoints_are_refused_in_a_line(tmp_path: Path, capfd: pytest.CaptureFixture, what: str):
    path = _network(tmp_path / "some.pt")
    content = load_checkpoint(path)
    ABSURD[what](content)
    save_checkpoint(path, content)
    assert evaluate.main([str(path), "--data", "nowhere"]) == 1
    [line] = [line for line in capfd.readouterr().err.splitlines() if line]
    assert line.startswith(f"error: {path}"), line


@pytest.mark.timeout(180)
def test_files_that_take_more_than_they_are_end_in_a_line(tmp_path: Path, capfd: pytest.CaptureFixture):
    path = _network(tmp_path / "some.pt")
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for entry in archive.infolist():
            bomb.writestr(entry.filename, archive.read(entry) + bytes(200 << 20 if "data.pkl" in entry.filename else 0))
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "nested.pt", "w") as nested:
        for entry in archive.infolist():
            lists = b"\x80\x02}X\x06\x00\x00\x00format" + b"]" * 100_000 + b"a" * 99_999 + b"s."
            nested.writestr(entry.filename, lists if "data.pkl" in entry.filename else archive.read(entry))
    # A pickle that asks for 10**12 bytes: bytearray(10**12).
    (tmp_path / "asks.pt").write_bytes(b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\x00\x10\xa5\xd4\xe8\x00\x85R.")
    os.mkfifo(tmp_path / "pipe.pt")
    for name in ("bomb.pt", "nested.pt", "asks.pt", "pipe.pt", "/dev/zero"):
        for main, arguments in (
            (evaluate.main, [str(tmp_path / name)]),
            (prune.main, ["lenet", "--weights", str(tmp_path / name), "--t", "0.3"]),
        ):
            assert main(arguments) == 1
            [line] = [line for line in capfd.readouterr().err.splitlines() if line]
            assert Path(name).name in line
            assert ("not a regular file" in line) == (name in ("pipe.pt", "/dev/zero"))


@pytest.mark.parametrize(
    "content",
    [
        b"\xff" * 8 + b"{}",
        (10**8).to_bytes(8, "little") + b"{}",
        len(b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4]}}').to_bytes(8, "little")
        + b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4]}}'
        + bytes(4),
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
        b"",
    ],
)
def test_absurd_safetensors_are_refused(tmp_path: Path, content: bytes):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        read_weights_file(tmp_path / "a.safetensors")


@pytest.mark.timeout(180)
def test_recipes_and_counts_without_an_end_or_a_bottom_end_in_a_line(tmp_path: Path, capfd: pytest.CaptureFixture):
    path = _network(tmp_path / "some.pt")
    (tmp_path / "deep.yaml").write_text("[" * 100_000)
    os.mkfifo(tmp_path / "pipe.yaml")
    for name in (tmp_path / "deep.yaml", tmp_path / "pipe.yaml", "/dev/zero"):
        for main, arguments in (
            (launch_train.main, ["--config", str(name)]),
            (prune.main, [str(path), "--counts", str(name)]),
        ):
            assert main(arguments) == 2
            [line] = [line for line in capfd.readouterr().err.splitlines() if line]
            assert str(name) in line


def test_every_field_of_a_log_line_is_checked(tmp_path: Path, undisturbed: list[dict]):
    path, accepted = tmp_path / "log.jsonl", []
    for event in undisturbed:
        for key, value in event.items():
            wrong = ["5", [5], {"a": "b"}, 1e400, -(10**400)] if not isinstance(value, dict) else ["5", 5]
            for one in wrong if key not in ("event", "config_digest", "device", "digest") else [5]:
                if isinstance(one, str) and (
                    isinstance(value, str) or (value is None and key in ("from", "job", "narrowed"))
                ):
                    continue
                path.write_text(json.dumps(event | {key: one}) + "\n" + json.dumps(event) + "\n")
                try:
                    read_log(path)
                    accepted.append((event["event"], key, one))
                except TrainError as error:
                    assert "line 1" in str(error) and "move the file away" in str(error)
    assert [one for one in accepted if one[1] not in ("config_digest", "event")] == []


def test_a_log_of_nested_lists_and_one_without_an_end_are_refused(tmp_path: Path):
    path = tmp_path / "log.jsonl"
    path.write_text("[" * 100_000 + "\n{}\n")
    with pytest.raises(TrainError, match="line 1"):
        read_log(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TrainError, match="not a regular file"):
        read_log(tmp_path / "pipe")


def test_a_line_that_is_written_while_the_log_is_read_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As by compare.py, which looks at the logs of runs that go on."""
    path = tmp_path / "log.jsonl"
    note = b'{"event": "note", "time_s": 1.0, "message": "a"}\n'
    path.write_bytes(note + note[:20])

    class Growing(io.FileIO):
        def readline(self, size: int = -1) -> bytes:
            line = super().readline(size)
            if not line.endswith(b"\n"):
                path.write_bytes(note + note)
            return line

    monkeypatch.setattr("train.log.rundir.open_regular", Growing)
    assert len(read_log(path)) == 1 and len(read_log(path)) == 2


def test_a_checkpoint_whose_log_is_none_is_refused(root: Path):
    path = root / "tiny/last.pt"
    save_checkpoint(path, load_checkpoint(path) | {"log": "nonsense\n"})
    with pytest.raises(CheckpointError, match="its log is not as written"):
        load_run(path)


# Lines in place of tracebacks


def test_a_run_directory_given_to_evaluate_says_which_file_to_give(root: Path, capfd: pytest.CaptureFixture):
    assert evaluate.main([str(root / "tiny")]) == 1
    said = capfd.readouterr().err
    assert f"give {root}/tiny/best.pt" in said and "last.pt" in said and said.count("\n") == 1


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
def test_settings_that_are_not_finite_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture, value: str):
    assert launch_train.main([*options(run__root=tmp_path / "runs"), f"--optim.lr={value}"]) == 2
    assert "optim.lr: found" in capfd.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_terminal_that_knows_ascii_alone_gets_the_words(tmp_path: Path):
    (tmp_path / "M\u00fcll").mkdir()
    arguments = options(run__root=tmp_path / "M\u00fcll", train__epochs=1, prune__last_epoch=1)
    result = launch_ascii(arguments, tmp_path)
    assert result.returncode == 0, result.stderr
    assert r"M\udcc3\udcbcll/tiny: done" in result.stdout.replace("\n", "").replace("  ", "")


def launch_ascii(arguments: list[str], cwd: Path) -> Any:
    from launching import start

    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    return start("launch/train.py", arguments, cwd, **ascii_only)


def test_batch_norm_of_one_value_a_channel_is_a_line_before_training(tmp_path: Path, capfd: pytest.CaptureFixture):
    """ResNet-18's last maps are 1 x 1 for images of 32 pixels."""
    small = {"model__name": "resnet18", "data__channels": 3, "data__image_size": 32, "data__resize_size": 32}
    small |= {"prune__method": "none", "run__root": tmp_path, "train__epochs": 1}
    for changes in ({"data__batch_size": 1}, {"data__batch_size": 5, "train__accumulate": 3}):
        assert launch_train.main(options(**small, **changes)) == 2
        [line] = capfd.readouterr().err.splitlines()
        assert "data.batch_size: found" in line and "batch norm" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "words"), [(OSError(24, "Too many open files"), "ulimit -n"), (MemoryError(), "memory")]
)
def test_limits_of_the_system_end_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, error: Exception, words: str
):
    def fail(*arguments: object, **more: object) -> None:
        raise error

    monkeypatch.setattr("train.loaders.build_loaders", fail)
    assert launch_train.main(options(run__root=tmp_path)) == 1
    assert words in capfd.readouterr().err
