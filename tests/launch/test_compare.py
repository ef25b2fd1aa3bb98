"""launch/compare.py: from a grid's file to runs that need each other, and to the report."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import yaml
from launching import ROOT, TINY, launch
from rich.console import Console

from launch import compare
from launch.grids import estimate, runner, stages
from launch.grids.board import LiveTable, Progresses, _window, in_words
from launch.grids.disk import Cost, Disk, write_json
from launch.grids.grid import overridden, read_grid
from launch.grids.jobs import plan_jobs
from launch.grids.processes import Child, last_words
from launch.grids.runner import Runner, State, Status
from launch.grids.stages import Command, epochs_for, final_config, prepare, with_epochs
from train.checkpoint.file import load_checkpoint
from train.config import parse_config
from train.errors import ConfigError, TrainError
from train.log.rundir import RunDir, read_log

RECIPES = sorted((ROOT / "launch/configs/compare").glob("*.yaml"))
ENTRIES = {
    "methods": {
        "ramp": {"prune.method": "hard_ramp", "published": "CUP-RF"},
        "cut": {"kind": "cut", "prune": {"criterion": "l1"}, "published": "L1"},
    },
    "controls": {
        "dense": {},
        "thin": {"kind": "thin"},
        "random": {"kind": "same_schedule", "of": "ramp", "prune.criterion": "random"},
        "shape": {"kind": "shape", "of": ["ramp", "cut"]},
        "equal_hours": {"kind": "equal_hours", "of": "ramp"},
    },
}
ONLY_A_CUT = {"methods": {"cut": {"kind": "cut"}}, "controls": {"dense": {}}}


def write_grid(folder: Path, **changes: object) -> Path:
    content = {
        "base": str(TINY),
        "out": str(folder / "out"),
        "seeds": [0],
        "set": {"prune.method": "none", "run.device": "cpu", "train.epochs": 2, "prune.last_epoch": 2},
        "settings": {"fr2": {"prune.target_reduction": 2.0}},
        **ENTRIES,
    }
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(content | changes))
    return file


def test_what_set_changes_without_effect_is_told(tmp_path: Path):
    file = write_grid(tmp_path, settings={"a": {"prune.round_to": 1}, "b": {"prune.round_to": 2}})
    changes = ["prune.round_to=4", "prune.criterion=l2", "train.epochs=3"]  # some entries set a criterion
    assert overridden(read_grid(file, changes), changes) == ["prune.round_to"]


class QuickChild:
    """Stands for launch/grids/processes.py's: a script of ours, run to its end in a fork with the imports behind it."""

    started: ClassVar[list[list[str]]] = []

    def __init__(self, argv: list[str], output: Path, env: dict[str, str]) -> None:
        self.started.append(argv)
        result = launch(str(Path(argv[1]).relative_to(ROOT)), argv[2:], cwd=Path.cwd(), **env)
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("a") as file:
            file.write(result.stdout + result.stderr)
        self.code, self.wall_s, self.cpu_s = result.returncode, 36.0, 18.0

    def poll(self) -> int:
        return self.code


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that were started, in this order."""
    monkeypatch.setattr(QuickChild, "started", [])
    monkeypatch.setattr(runner, "Child", QuickChild)
    return QuickChild.started


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of a grid that has run, its file in it, and the names of its runs in the order of their trainings."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QuickChild, "started", [])
        patch.setattr(runner, "Child", QuickChild)
        assert compare.main([str(write_grid(folder))]) == 0
        return folder, configs_of(QuickChild.started)


def configs_of(started: list[list[str]]) -> list[str]:
    """Names of the runs whose trainings were started."""
    return [Path(argv[-1]).stem for argv in started if argv[1].endswith("train.py")]


def test_each_run_comes_after_those_that_it_needs(finished: tuple[Path, list[str]]):
    _, order = finished
    at_fr2 = ("ramp", "cut", "thin", "random", "shape_of_ramp", "shape_of_cut", "equal_hours")
    assert sorted(order) == sorted(["dense_s0", *(f"{name}_fr2_s0" for name in at_fr2)])
    needs = [
        ("dense_s0", "cut_fr2_s0"),
        ("ramp_fr2_s0", "shape_of_ramp_fr2_s0"),
        ("cut_fr2_s0", "shape_of_cut_fr2_s0"),
        ("ramp_fr2_s0", "equal_hours_fr2_s0"),
    ]
    for before, after in needs:
        assert order.index(before) < order.index(after)


def test_controls_and_cuts_are_what_they_are_called(finished: tuple[Path, list[str]]):
    folder, order = finished
    runs = folder / "out/runs"
    reductions = {name: read_log(runs / name / "log.jsonl")[-1]["flops_reduction"] for name in order}
    assert reductions.pop("dense_s0") == reductions.pop("equal_hours_fr2_s0") == 1
    assert list(reductions.values()) == pytest.approx([2] * 6, rel=0.02)
    for shape, method in (("shape_of_ramp_fr2_s0", "ramp_fr2_s0"), ("shape_of_cut_fr2_s0", "cut_fr2_s0")):
        widths = [load_checkpoint(runs / name / "last.pt")["widths"] for name in (shape, method)]
        assert widths[0] == widths[1]
    cut = read_log(runs / "cut_fr2_s0/log.jsonl")[0]
    assert cut["from"] == str(folder / "out/made/cut_fr2_s0.pt") and cut["config"]["prune"]["method"] == "none"
    assert load_checkpoint(folder / "out/made/cut_fr2_s0.pt")["plans"]
    random = read_log(runs / "random_fr2_s0/log.jsonl")[0]["config"]["prune"]
    assert (random["method"], random["criterion"]) == ("hard_ramp", "random")


def test_the_report_has_tables_sentences_and_what_each_run_cost_in_all(finished, quick: list, capsys):
    folder, order = finished
    out = folder / "out"
    capsys.readouterr()
    assert compare.main([str(folder / "tiny.yaml"), "--report-only"]) == 0
    said = capsys.readouterr().out
    assert "## With retraining" in said and "## Without retraining" in said
    assert "against random fr2: top-1" in said and "one seed, so no interval" in said
    rows = {row["run"]: row for row in csv.DictReader((out / "runs.csv").open())}
    seconds = {name: read_log(out / "runs" / name / "log.jsonl")[-1]["cpu_seconds"] for name in order}
    assert float(rows["ramp_fr2_s0"]["cpu_hours"]) == pytest.approx(seconds["ramp_fr2_s0"] / 3600)
    both = seconds["dense_s0"] + 18 + seconds["cut_fr2_s0"]  # the dense training, the cut, the one after it
    assert float(rows["cut_fr2_s0"]["cpu_hours"]) == pytest.approx(both / 3600)
    assert (out / "front.png").stat().st_size > 10_000 and "CPU hours" in (out / "report.html").read_text()
    assert not quick


def test_a_thin_network_gets_as_many_epochs_as_the_hours_of_a_method_pay_for(finished, tmp_path, monkeypatch):
    folder, _ = finished
    fair = {"kind": "equal_hours", "of": "ramp", "network": "thin"}
    controls = {**ENTRIES["controls"], "thin": {"kind": "thin", "optim.lr": 0.03}, "fair": fair}
    jobs = plan_jobs(read_grid(write_grid(tmp_path, controls=controls, out=str(folder / "out"))))
    job, disk = jobs["fair_fr2_s0"], Disk(folder / "out")
    assert job.needs == ("thin_fr2_s0", "ramp_fr2_s0") and job.config.optim.lr == 0.03
    monkeypatch.setattr(
        stages, "spent", lambda job, *_: Cost(wall=0.0, cpu=disk.done("thin_fr2_s0")["cpu_seconds"] / 3600)
    )
    config = final_config(job, jobs, disk)
    assert config.model.widths == str(folder / "out/made/thin_fr2_s0.json")
    assert config.train.epochs == 2, "what the thin run took, paid with what it cost"


def test_a_thin_network_needs_no_image_size_in_the_recipe(tmp_path):
    """As ImageNet's recipes, which leave it to what is usual."""
    open_ones = {"data.image_size": None, "data.resize_size": None, "data.channels": 3}
    changes = {"prune.method": "none", "model.name": "resnet20_cifar", **open_ones}
    jobs = plan_jobs(read_grid(write_grid(tmp_path, set=changes)))
    widths = stages.thin_widths(jobs["thin_fr2_s0"])
    assert len(widths) == 9 and 8 <= widths["layer1.0.conv1"] < 16


def test_what_is_finished_is_not_run_again(finished, quick: list, capsys):
    folder, _ = finished
    assert compare.main([str(folder / "tiny.yaml")]) == 0
    assert not quick and "[8/8 done]" in capsys.readouterr().out


def test_a_changed_grid_refuses_the_runs_that_it_changes_and_what_is_made_from_them(finished, tmp_path, quick, capsys):
    folder, _ = finished
    before = {path: path.read_bytes() for path in (folder / "out/runs").rglob("*.jsonl")}
    methods = {
        "ramp": {"prune.method": "hard_ramp", "prune.min_channels": 2},
        "cut": {"kind": "cut", "prune.criterion": "gm"},
    }
    file = write_grid(tmp_path, out=str(folder / "out"), methods=methods)
    capsys.readouterr()
    assert compare.main([str(file)]) == 1
    said = capsys.readouterr()
    refused = dict(line.split("refused: ")[1].split(": ", 1) for line in said.out.splitlines() if "] refused: " in line)
    assert set(refused) == {"ramp_fr2_s0", "random_fr2_s0", "cut_fr2_s0"}
    assert "prune.min_channels (1 there, 2 now): move it away" in refused["ramp_fr2_s0"]
    assert "prune.criterion ('l1' there, 'gm' now)" in refused["cut_fr2_s0"]
    for name, need in (("shape_of_ramp", "ramp"), ("shape_of_cut", "cut"), ("equal_hours", "ramp")):
        assert f"not run: {name}_fr2_s0: it needs {need}_fr2_s0\n" in said.out
    assert said.err == "error: 6 of 8 runs are not finished\n" and not quick
    assert before == {path: path.read_bytes() for path in before}
    report = (folder / "out/report.md").read_text()
    assert "thin fr2" in report and "ramp fr2" not in report, "what was refused is not mixed in"


def test_a_run_made_from_another_run_than_the_one_there_is_refused(finished, monkeypatch, capsys):
    folder, _ = finished
    grid = read_grid(folder / "tiny.yaml")
    disk, jobs = Disk(grid.out), plan_jobs(grid)
    config = jobs["ramp_fr2_s0"].config
    honest = RunDir.run_id
    monkeypatch.setattr(RunDir, "run_id", lambda self: "anew" if self.path.name == "ramp_fr2_s0" else honest(self))
    found = runner.Runner(jobs, disk, at_a_time=1, ranks=1)
    found.look()
    assert disk.why_not_ours(jobs["ramp_fr2_s0"], config) is None
    refused = {name: status.why for name, status in found.statuses.items() if status.state is State.REFUSED}
    assert set(refused) == {"shape_of_ramp_fr2_s0", "equal_hours_fr2_s0"}
    assert "runs.ramp_fr2_s0" in refused["shape_of_ramp_fr2_s0"] and "'anew' now" in refused["shape_of_ramp_fr2_s0"]


def test_another_data_set_is_another_comparison(finished, quick, capsys):
    folder, _ = finished
    assert compare.main([str(folder / "tiny.yaml"), "--set", "data.path=elsewhere"]) == 1
    said = capsys.readouterr()
    assert "data.path ('datasets/imagenet' there, 'elsewhere' now)" in said.out and not quick
    assert said.err.endswith("no run of this comparison is finished, so there is nothing to report\n")


def test_a_failed_run_is_told_in_a_line_and_the_others_go_on(tmp_path, quick, capsys):
    methods = {
        "broken": {"prune.method": "hard_ramp", "optim.lr": 1e30},
        "ramp": {"prune.method": "hard_ramp"},
    }
    controls = {"dense": {}, "shape": {"kind": "shape", "of": "broken"}}
    assert compare.main([str(write_grid(tmp_path, methods=methods, controls=controls))]) == 1
    said = capsys.readouterr()
    [failed] = [line for line in said.out.splitlines() if "] failed: " in line]
    assert "broken_fr2_s0: exit code 1, it said: error: the loss is" in failed
    assert failed.endswith(f"see {tmp_path / 'out/output/broken_fr2_s0.txt'}")
    assert "not run: shape_fr2_s0: it needs broken_fr2_s0" in said.out
    assert "done: ramp_fr2_s0" in said.out and said.err == "error: 2 of 4 runs are not finished\n"
    assert "Not finished, so not in here: 2 runs" in (tmp_path / "out/report.md").read_text()


def test_a_search_is_a_command_that_writes_widths_and_its_cost_counts(tmp_path, quick, monkeypatch, capsys):
    search = tmp_path / "search.py"
    search.write_text(
        "import json, sys; from pathlib import Path\n"
        "out, count, run = sys.argv[1:]\n"
        "assert Path(run, 'last.pt').exists()\n"
        "json.dump({'conv1': 3, 'conv2': int(count)}, open(out, 'w'))\n"
    )
    honest = QuickChild.__init__

    def child(self, argv: list[str], output: Path, env: dict[str, str]) -> None:
        if argv[1] == str(search):
            subprocess.run(argv, check=True)
            self.code, self.wall_s, self.cpu_s = 0, 7200.0, 3600.0
        else:
            honest(self, argv, output, env)

    monkeypatch.setattr(QuickChild, "__init__", child)
    command = f"{{python}} {search} {{out}} 5 {{run}}"
    grid = {
        "before": {"net": {"prune.method": "hard_ramp"}},
        "methods": {"search": {"kind": "search", "of": "net", "command": command, "published": "MetaPruning"}},
        "controls": {"dense": {}},
    }
    assert compare.main([str(write_grid(tmp_path, **grid))]) == 0
    widths = load_checkpoint(tmp_path / "out/runs/search_fr2_s0/last.pt")["widths"]
    assert (widths["conv1"], widths["conv2"]) == (3, 5)
    row = next(row for row in csv.DictReader((tmp_path / "out/runs.csv").open()) if row["entry"] == "search")
    assert 1 < float(row["cpu_hours"]) < 1.1 and 2 < float(row["gpu_hours"]) < 2.1
    seconds = [
        read_log(tmp_path / f"out/runs/{name}_fr2_s0/log.jsonl")[-1]["cpu_seconds"] for name in ("net", "search")
    ]
    assert float(row["cpu_hours"]) == pytest.approx(1 + sum(seconds) / 3600), (
        "the run that it read, itself, its training"
    )
    said = capsys.readouterr().out
    assert "search fr2 (MetaPruning)" in said and "net fr2" not in said


def test_a_plan_says_every_run_what_it_needs_and_what_it_costs(tmp_path, capsys):
    file = write_grid(tmp_path, seeds=[0, 1])
    assert compare.main([str(file), "--dry-run", "--jobs", "2"]) == 0
    said = capsys.readouterr().out
    assert "cut of dense_s1 to FR 2 by l1" in said and "epochs of dense_s0 that cost what ramp_fr2_s0 did" in said
    assert "projected: 16 runs, 32 epochs of 4 steps and 1 of validation, all counted as dense: at most" in said
    assert not (tmp_path / "out").exists()


def test_a_plan_counts_ranks_and_the_epochs_that_equal_hours_may_take(tmp_path: Path):
    controls = {"dense": {}, "equal": {"kind": "equal_hours", "of": ["ramp", "cut"]}}
    grid = read_grid(write_grid(tmp_path, controls=controls))
    jobs = plan_jobs(grid)
    epochs = {name: estimate._epochs(job, jobs, Disk(grid.out)) for name, job in jobs.items()}
    assert (epochs["equal_of_ramp_fr2_s0"], epochs["equal_of_cut_fr2_s0"], epochs["cut_fr2_s0"]) == (2, 4, 2)
    dense = jobs["dense_s0"]
    one, two = (estimate._measure(dense.config, 1, ranks) for ranks in (1, 2))
    assert (one.steps, one.val_steps) == (two.steps, two.val_steps)
    pace = replace(one, step_s=1800.0, step_cpu_s=3600.0, evaluation_s=0.0, evaluation_cpu_s=0.0, steps=1)
    assert "at most 20.00 CPU hours, which take 5 h 00 min" in estimate._cost(pace, 10, 5, 1, 2, dense)
    assert "at most 10.00 GPU hours" in estimate._cost(replace(pace, device="cuda"), 10, 5, 1, 2, dense)


@pytest.mark.parametrize(("environment", "threads"), [({}, 3), ({"OMP_NUM_THREADS": "1"}, 1)])
def test_a_plan_is_measured_with_the_threads_that_a_run_will_have(tmp_path, monkeypatch, environment, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("launch.grids.runner.available_cores", lambda: 6)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as OMP_NUM_THREADS says, where it does
    try:
        grid = read_grid(write_grid(tmp_path))
        jobs = plan_jobs(grid)
        assert estimate._measure(jobs["dense_s0"].config, 2, 1).threads == threads
        given = Runner(jobs, Disk(grid.out), at_a_time=2, ranks=1)._environment(0)
        assert (environment | given)["OMP_NUM_THREADS"] == str(threads)
    finally:
        torch.set_num_threads(before)


def wait_for(condition: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.05)


def pid_of_training(parent: int) -> int:
    """0 while there is none."""
    for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return int(pid)
    return 0


@pytest.mark.skipif(sys.platform != "linux", reason="a process learns of its parent's death on Linux alone")
def test_killed_and_started_again_a_comparison_goes_on_where_it_was(tmp_path: Path):
    """compare.py by SIGKILL, then the training by SIGKILL, then compare.py by SIGTERM; real processes."""
    methods = {"ramp": {"prune.method": "hard_ramp"}}
    long = {"prune.method": "none", "run.device": "cpu", "train.epochs": 100_000, "prune.target_reduction": 2.0}
    file = write_grid(tmp_path, methods=methods, controls={"dense": {}}, set=long, settings={})
    command = [sys.executable, str(ROOT / "launch/compare.py"), str(file)]
    log = tmp_path / "out/runs/dense_s0/log.jsonl"

    def started() -> subprocess.Popen:
        def epochs() -> int:
            return log.read_text().count('"event": "epoch"') if log.exists() else 0

        known = epochs()
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)
        wait_for(lambda: epochs() > known + 1 or process.poll() is not None)
        assert process.poll() is None, process.communicate()
        return process

    process = started()
    training = pid_of_training(process.pid)
    process.kill()
    process.communicate()
    wait_for(lambda: not Path(f"/proc/{training}").exists())
    assert "and saved; to go on" in (tmp_path / "out/output/dense_s0.txt").read_text()

    process = started()
    training = pid_of_training(process.pid)
    os.kill(training, signal.SIGKILL)
    wait_for(lambda: pid_of_training(process.pid) not in (0, training))  # the next run of the grid
    process.terminate()
    out, err = process.communicate(timeout=300)
    assert "goes on: dense_s0" in out and "failed: dense_s0: killed by signal 9" in out
    assert (
        err.endswith("error: stopped; the runs are saved, and the same command goes on\n") and process.returncode == 1
    )

    starts = [event for event in read_log(log) if event["event"] == "run"]
    assert len(starts) == 2 and starts[1]["first_epoch"] > 1


def test_epochs_that_cost_as_much():
    costs = [5.0, 7.0, 9.0, 11.0]  # 3 to begin with, 2 an epoch, 1 to end with
    assert epochs_for(12.0, costs, at_end=12.0) == 4
    assert epochs_for(8.0, costs, at_end=12.0) == 2
    assert epochs_for(8.9, costs, at_end=12.0) == 2 and epochs_for(9.1, costs, at_end=12.0) == 3
    assert epochs_for(20.0, costs, at_end=12.0) == 8
    assert epochs_for(0.5, costs, at_end=12.0) == 1


def test_a_schedule_is_scaled_with_its_epochs():
    recipe = str(ROOT / "launch/configs/resnet18_imagenet.yaml")
    config = parse_config(["--optim.warmup_epochs", "5"], "train.py", recipe)
    scaled = with_epochs(config, 45)
    assert scaled.train.epochs == 45 and scaled.optim.milestones == (15, 30) and scaled.optim.warmup_epochs == 2.5
    assert with_epochs(config, 90) == config
    growing = replace(config, data=replace(config.data, start_size=8, grow_epochs=1))
    assert with_epochs(growing, 30).data.grow_epochs == 1, "as few as there may be"


def test_how_long_still_is_told_from_the_pace_so_far(tmp_path: Path):
    jobs = plan_jobs(read_grid(write_grid(tmp_path)))
    progresses = Progresses(jobs, Disk(tmp_path / "out"))
    statuses = {name: Status() for name in jobs}
    assert progresses.seconds_left(statuses, 1) is None
    log = tmp_path / "out/runs/dense_s0/log.jsonl"
    log.parent.mkdir(parents=True)
    epoch = {"event": "epoch", "time_s": 30.0, "epoch": 1, "top1": 5.0, "flops_reduction": 1.0}
    lines = [{"event": "run", "time_s": 0.0, "epochs": 2}, epoch]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    statuses["dense_s0"] = Status(State.RUNNING)
    statuses["thin_fr2_s0"] = Status(State.FAILED)
    assert progresses.seconds_left(statuses, 2) == (30 + 6 * 2 * 30) / 2
    assert [in_words(seconds) for seconds in (45, 600, 11_100)] == ["45 s", "10 min", "3 h 05 min"]


def test_on_a_low_terminal_the_rows_that_run_are_shown():
    waiting, running = [False], [True]
    assert _window(waiting * 3, room=10) == slice(0, 10)
    assert _window(waiting * 9 + running + waiting * 10, room=5) == slice(8, 13)
    assert _window(waiting * 19 + running, room=5) == slice(15, 20)
    assert _window(waiting * 20, room=-3).stop > _window(waiting * 20, room=-3).start


def test_a_folder_that_was_moved_holds_the_same_runs(finished: tuple[Path, list[str]], tmp_path: Path):
    folder, order = finished
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder / "out", moved)
    grid = read_grid(folder / "tiny.yaml", out=moved)
    found = runner.Runner(plan_jobs(grid), Disk(grid.out), at_a_time=1, ranks=1)
    found.look()
    assert {name: status.why for name, status in found.statuses.items()} == dict.fromkeys(order, "")
    assert {status.state for status in found.statuses.values()} == {State.DONE}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base": None}, "base: found None"),
        ({"more": 1}, "more: unknown, allowed: base"),
        ({"seeds": [0, 0]}, "seeds: found [0, 0], allowed: each once"),
        ({"seeds": "all"}, "seeds: found 'all'"),
        ({"methods": {}}, "methods: found none"),
        ({"controls": {}}, "controls: found no dense"),
        ({"methods": {"a/b": {}}}, "found the name 'a/b'"),
        ({"methods": {"a": {"kind": "magic"}}}, "methods.a.kind: found 'magic', allowed: train, cut"),
        ({"methods": {"a": {"kind": "shape"}}}, "methods.a.of: found None, allowed with kind shape"),
        ({"methods": {"a": {"of": "dense"}}}, "methods.a.of: found 'dense', allowed with kind train: nothing"),
        ({"methods": {"ramp": {"lr": 1}}}, "methods.ramp: found lr, allowed: run.*"),
        ({"methods": {"ramp": {"run.seed": 1}}}, "found run.seed, which follows from the names and seeds"),
        ({"methods": {"ramp": {"train.epochs": "x"}, "cut": {}}}, "ramp: train.epochs"),
        ({"methods": {"ramp": {}, "cut": {}, "dense": {}}}, "dense: there twice"),
        (
            {"set": {"prune.method": "none", "prune.target_reduction": None}, "settings": {}, **ONLY_A_CUT},
            "cut: found no prune.target_reduction, allowed with kind cut",
        ),
        ({"before": {"net": {"kind": "cut"}}}, "before.net.kind: found cut, allowed here: train"),
        (
            {"methods": {"ramp": {}, "cut": {"kind": "search", "of": "dense", "command": "x"}}},
            "allowed: an entry of before",
        ),
        ({"methods": {"ramp": {}, "cut": {"kind": "search"}}}, "methods.cut.command: found None"),
        ({"methods": {"ramp": {"network": "thin"}}}, "methods.ramp.network: found 'thin', allowed with kind train"),
        (
            {"controls": {"dense": {}, "a": {"kind": "equal_hours", "of": "ramp", "network": "ramp"}}},
            "a.network: found 'ramp', allowed: dense (",
        ),
        (
            {"controls": {"dense": {}, "shape": {"kind": "shape", "of": [5]}}},
            "controls.shape.of: found [5], allowed: a name, or a list",
        ),
        (
            {"controls": {"dense": {}, "shape": {"kind": "shape", "of": [["ramp"]]}}},
            "controls.shape.of: found [['ramp']]",
        ),
        ({"controls": {"dense": {}, "shape": {"kind": "shape", "of": [None]}}}, "controls.shape.of: found [None]"),
        ({"methods": {"a": {"kind": "search", "command": 5}}}, "methods.a.command: found 5, allowed: text"),
        ({"methods": {"ramp": {"published": ["x"]}}}, "methods.ramp.published: found ['x'], allowed: text"),
        ({"methods": {"ramp": {"published": "CUP_RF"}}}, "methods.ramp.published: found 'CUP_RF', allowed: COP, CUP"),
        ({"out": 5}, "out: found 5, allowed: text"),
        (
            {"methods": {"a": {"kind": "search", "command": "x {foo}"}}},
            "found 'x {foo}' ('foo'), allowed in braces: {python}",
        ),
        ({"methods": {"a": {"kind": "search", "command": "{python.foo}"}}}, "methods.a.command: found '{python.foo}'"),
        (
            {"methods": {"a": {"kind": "search", "command": " "}}},
            "methods.a.command: found ' ', allowed: a command line",
        ),
        ({"seeds": [2**32]}, "from 0, below 2**32"),
        ({"settings": {"": {}}}, "settings: found the name ''"),
        ({"methods": {"": {}}}, "methods: found the name ''"),
        (
            {"set": {"data.path": date(2020, 1, 1)}},
            "set: data.path: found datetime.date(2020, 1, 1), allowed: text (a date in quotes)",
        ),
        ({"set": {"data.path": {"a"}}}, "set: "),
        ({"methods": {"ramp": {}, "cut": {}, "dense": {}}, "controls": {}}, "controls: found no dense"),
        (
            {"controls": {"dense": {"prune.method": "hard_ramp"}}},
            "dense: prune.method: found hard_ramp, allowed here: none",
        ),
        (
            {"controls": {"dense": {}, "random": {"kind": "same_schedule", "of": "cut"}}},
            "allowed: a method of kind train; for a cut, the control is {kind: cut, prune.criterion: random}",
        ),
        (
            {"methods": {"cut": {"kind": "cut", "prune.fold": True}}, "controls": {"dense": {}}},
            "cut: prune.fold: found true, allowed with kind cut: false",
        ),
        (
            {"methods": {"cut": {"kind": "cut", "prune.sequential": False}}, "controls": {"dense": {}}},
            "cut: prune.sequential: found false, allowed with kind cut: true",
        ),
        ({"controls": {"dense": {}, "thin": {"kind": "thin", "model.weights": "w.pth"}}}, "model.weights: found 'w.pt"),
        ({"controls": {"dense": {}, "thin": {"kind": "thin", "model.width": 0.5}}}, "model.width: found 0.5, allowed"),
    ],
)
def test_a_grid_that_is_none_is_an_error_of_one_line(tmp_path: Path, changes: dict, said: str, capsys, monkeypatch):
    monkeypatch.setattr(runner.Runner, "run", lambda *arguments: pytest.fail("it is run"))
    assert compare.main([str(write_grid(tmp_path, **changes))]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error, error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text", ["set: &a {prune: *a}", "set: {data.path: &a [*a]}", "set: {data.path: !!binary aGk=}"]
)
def test_yaml_that_no_setting_can_hold_is_an_error_of_one_line(tmp_path: Path, text: str):
    file = tmp_path / "grid.yaml"
    file.write_text(
        f"base: {TINY}\nmethods: {{ramp: {{prune.method: hard_ramp}}}}\ncontrols: {{dense: {{}}}}\n{text}\n"
    )
    with pytest.raises(ConfigError, match=r"^\S+grid.yaml: .*found .*, allowed: [^\n]*$"):
        read_grid(file)


def test_a_change_on_the_command_line_that_is_no_yaml_is_an_error_of_one_line(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"^--set: found 'data.path=\['[^\n]*$"):
        read_grid(write_grid(tmp_path), ["data.path=["])


def test_a_folder_that_cannot_be_written_is_an_error_of_one_line(tmp_path: Path, quick: list, capsys):
    (tmp_path / "out").write_text("a file")
    assert compare.main([str(write_grid(tmp_path))]) == 1
    assert capsys.readouterr().err.startswith(f"error: cannot write {tmp_path / 'out/lock'}: ")
    (tmp_path / "out").unlink()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/configs").write_text("a file")
    with pytest.raises(TrainError, match=r"cannot write .*dense_s0\.yaml"):
        grid = read_grid(write_grid(tmp_path))
        job = plan_jobs(grid)["dense_s0"]
        prepare(job, job.config, Disk(grid.out))


def test_a_log_that_cannot_be_opened_is_an_error_of_one_line(tmp_path: Path):
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(TrainError, match=r"cannot open .*log\.jsonl: Is a directory"):
        runner.is_held(RunDir(tmp_path))


def test_a_live_table_that_has_shown_nothing_closes(tmp_path: Path):
    jobs = plan_jobs(read_grid(write_grid(tmp_path)))
    LiveTable(Console(quiet=True), Progresses(jobs, Disk(tmp_path / "out")), 1).close()


def test_a_command_is_found_on_the_path_and_one_that_is_not_says_so(tmp_path: Path):
    codes = []
    for argv in (["true"], ["no-such-program"]):
        child = Child(argv, tmp_path / "output.txt", {})
        wait_for(lambda child=child: child.poll() is not None)
        codes.append(child.poll())
    assert codes == [0, 1]
    said = "error: cannot start no-such-program: No such file or directory"
    assert last_words(tmp_path / "output.txt") == said


@pytest.mark.parametrize(
    ("ours", "second"), [(None, "2,3"), ("4,5,6,7", "6,7"), ("GPU-a,GPU-b,GPU-c,GPU-d", "GPU-c,GPU-d")]
)
def test_gpus_are_shared_out_among_runs(tmp_path: Path, monkeypatch, ours: str | None, second: str):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if ours is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ours)
    found = runner.Runner({}, Disk(tmp_path), at_a_time=2, ranks=2)
    assert found._environment(1) == {"CUDA_VISIBLE_DEVICES": second}


def test_a_command_whose_file_is_gone_runs_again(tmp_path: Path):
    disk, made = Disk(tmp_path), tmp_path / "widths.json"
    write_json(disk.command("search"), {"wall_s": 1.0, "cpu_s": 1.0, "finished": True})
    found = runner.Runner({}, disk, at_a_time=1, ranks=1)
    assert not found._has_run("search", Command(["x"], made))
    made.touch()
    assert found._has_run("search", Command(["x"], made))


def test_names_that_would_be_one_are_an_error(tmp_path: Path):
    settings = {"a": {"prune.target_reduction": 2.0}, "b_a": {"prune.target_reduction": 3.0}}
    methods = {"ramp": {"prune.method": "hard_ramp"}, "ramp_b": {"prune.method": "hard_ramp"}}
    with pytest.raises(ConfigError, match="two runs would be called ramp_b_a_s0"):
        plan_jobs(read_grid(write_grid(tmp_path, settings=settings, methods=methods, controls={"dense": {}})))


def test_a_cut_of_a_pretrained_network_begins_with_the_cut_alone(tmp_path: Path):
    grid = read_grid(write_grid(tmp_path, **ONLY_A_CUT), ["model.weights=w.pth"])
    jobs = plan_jobs(grid)
    model = final_config(jobs["cut_fr2_s0"], jobs, Disk(grid.out)).model
    assert (model.weights, model.checkpoint) == (None, str(tmp_path / "out/made/cut_fr2_s0.pt"))
    assert model.name == jobs["dense_s0"].config.model.name


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_a_comparison_has_runs_after_those_that_they_need(recipe: Path):
    grid = read_grid(recipe)
    jobs = plan_jobs(grid)
    seen: set[str] = set()
    for name, job in jobs.items():
        assert set(job.needs) <= seen
        seen.add(name)
    kinds = {entry.kind for entry in grid.controls}
    of_cup_ss_alone = {
        "resnet20_cifar10_ablation": {"train", "thin", "same_schedule", "equal_hours"},
        "resnet20_cifar10_full": {"train", "thin", "shape", "equal_hours"},
        "resnet18_imagenette_seconds": {"train", "thin", "shape", "equal_hours"},
    }
    if recipe.stem in of_cup_ss_alone:
        assert kinds == of_cup_ss_alone[recipe.stem]
    else:
        assert {"train", "cut", "thin", "same_schedule", "shape", "equal_hours"} == kinds
        assert {entry.settings["prune.criterion"] for entry in grid.controls if entry.kind == "cut"} == {"random"}
    assert len(grid.seeds) >= 3 and f"launch/configs/compare/{recipe.name}" in recipe.read_text()
