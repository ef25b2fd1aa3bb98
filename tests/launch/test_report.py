"""launch/report.py on logs made by hand: what becomes one row, what it is measured against, and what the page holds."""

import csv
import html
import html.parser
import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest
from launching import write_network

from launch import report
from launch.reports import published
from launch.reports.dendrograms import draw_layers
from launch.reports.figures import _means, _speedups, draw_accuracy, training_seconds, widths_at_start
from launch.reports.page import page
from launch.reports.read import Group, Run, differing_settings, group_runs, read_run
from launch.reports.tables import Row, markdown, means_csv, notes, our_rows, published_rows, runs_csv, setting
from train.config import RunConfig, config_from_dict
from train.methods import build_method

H100 = {"world_size": 8, "devices": ["NVIDIA H100"] * 8, "loader": "dali", "precision": "bf16"}
DENSE = {"method": "none"}
KINDS = ("startup", "data_wait", "step", "resize", "resize_warmup", "eval", "save", "other")


def write_run(
    directory: Path, *, shrinks: bool = False, hours: float = 60.0, reduction: float = 1.0, **changes
) -> Path:
    """A finished run of two epochs; without `config` as older versions logged it.

    changes: of the run event, or top1 and seconds.
    """
    top1 = changes.pop("top1", 70.0)
    seconds = dict.fromkeys(KINDS, 0.0) | {"step": 8.0, "eval": 1.5, "startup": 0.5}
    first = {
        "model": "resnet50",
        "epochs": 2,
        "batch_size": 256,
        "train_images": 1281167,
        **H100,
        **changes,
    }
    if "config" in changes:
        method = build_method(config_from_dict(changes["config"]).prune, epochs=2).label
        first |= {"shrinks": shrinks, "method": method}
    else:
        first["cup"] = shrinks
    epoch = {"threshold": None, "top1": top1, "images_per_s": 1000.0, "seconds": seconds}
    done = {"flops_reduction": reduction, "top1": top1, "top5": 90.0, "gpu_hours": hours, "device": "cuda"}
    full, cut = {"layer1.0.conv1": 64, "layer1.0.conv2": 64}, {"layer1.0.conv1": 48, "layer1.0.conv2": 32}
    lines = [
        {"event": "run", **first},
        {"event": "epoch", "epoch": 1, "flops_reduction": 1.0, "gpu_hours": hours / 2, "widths": full, **epoch},
        {"event": "epoch", "epoch": 2, "flops_reduction": reduction, "gpu_hours": hours, "widths": full, **epoch},
        {"event": "done", "time_s": 20.0, "seconds": {kind: 2 * value for kind, value in seconds.items()}, **done},
    ]
    if shrinks:
        lines[2] |= {"widths": cut, "threshold": 0.33, "images_per_s": 1600.0}
        removed = {name: full[name] - cut[name] for name in full}
        event = {"event": "resize", "epoch": 2, "threshold": 0.33, "seconds": 0.25, "removed": removed}
        lines.insert(2, event | {"flops_reduction_before": 1.0, "flops_reduction_after": reduction})
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def with_settings(directory: Path, seed: int = 0, **changes) -> dict:
    """The settings that newer versions log, for `write_run`; `changes` by section: prune={"momentum": "reset"}."""
    config = RunConfig().to_dict()
    config["run"] |= {"name": directory.name, "seed": seed}
    for section, values in changes.items():
        config[section] |= values
    return {"config": config_from_dict(config).to_dict()}


def three_seeds(root: Path) -> list[Run]:
    """Dense, CUP-SS and CUP-SS with momentum reset, three seeds each, as three people would name them."""
    runs = []
    for seed, (dense_top1, drop) in enumerate([(76.0, 1.0), (75.0, 1.5), (77.0, 2.0)]):
        for kind, prune in (("dense", {"method": "none"}), ("cup", {}), ("reset", {"momentum": "reset"})):
            directory, shrinks = root / f"c10_{kind}_s{seed}", kind != "dense"
            numbers = {"hours": 36.0 + 3 * seed if shrinks else 59.0 + seed, "reduction": 2.0 if shrinks else 1.0}
            top1 = dense_top1 - drop if shrinks else dense_top1
            settings = with_settings(directory, seed, prune=prune, run={"root": f"disk{seed}", "keep": 2 + seed})
            runs.append(read_run(write_run(directory, shrinks=shrinks, top1=top1, **numbers, **settings)))
    return runs


def rows_of(*directories: Path) -> list[Row]:
    return our_rows(group_runs([read_run(directory) for directory in directories]))


def test_runs_that_differ_in_their_seeds_alone_are_one_row_of_means_and_deviations(tmp_path: Path):
    rows = our_rows(group_runs(three_seeds(tmp_path)))
    assert [(row.name, row.method, row.count, row.seeds) for row in rows] == [
        ("c10_dense", "dense", 3, "0, 1, 2"),
        ("c10_cup", "CUP-SS", 3, "0, 1, 2"),
        ("c10_reset", "CUP-SS (momentum reset)", 3, "0, 1, 2"),
    ]
    dense, cup, _ = rows
    assert (dense.top1.mean, dense.top1.deviation) == (76.0, 1.0)
    assert (cup.top1.mean, cup.hours.mean, cup.hours.deviation) == (74.5, 39.0, 3.0)
    savings = [100 * (1 - hours / dense_hours) for hours, dense_hours in ((36, 59), (39, 60), (42, 61))]
    assert cup.saving.mean == pytest.approx(statistics.mean(savings))
    assert cup.saving.deviation == pytest.approx(statistics.stdev(savings))
    assert (cup.change1.mean, cup.change1.deviation) == (-1.5, 0.5)  # of -1, -1.5, -2: each to its seed's dense run
    assert (dense.change1, dense.saving) == (None, None)
    assert "| c10_cup | resnet50 | CUP-SS, k 0.03, b 0.3, no stop | 3 | 2.00 ± 0.00 | 74.50 ±" in (markdown(rows))
    assert "| -1.50 ± 0.50 | 39.00 ± 3.00 | 35.0 ± 3.9 |" in markdown(rows)


@pytest.mark.parametrize(
    ("seeds", "top1", "deviation"),
    [((3, 4, 5), 75.0, 3.0), ((0, 1, 3), 75.0, 3.0), ((0, 0, 1), 75.75, statistics.stdev([73.5, 78.0]))],
)
def test_without_dense_runs_of_the_same_seeds_both_scatters_count(
    tmp_path: Path, seeds: tuple[int, ...], top1: float, deviation: float
):
    def written(kind: str, seeds: Sequence[int], top1s: Sequence[float], hours: Sequence[float]) -> list[Path]:
        made = []
        for number, (seed, top1, spent) in enumerate(zip(seeds, top1s, hours, strict=True)):
            directory, shrinks = tmp_path / f"{kind}_{number}", kind == "cup"
            settings = with_settings(directory, seed, prune={} if shrinks else DENSE)
            made.append(write_run(directory, shrinks=shrinks, top1=top1, hours=spent, **settings))
        return made

    dense = written("dense", (0, 1, 2), (72.0, 76.0, 80.0), (50.0, 60.0, 70.0))
    shrunk = written("cup", seeds, (72.0, 75.0, 78.0), (29.0, 30.0, 31.0))
    row = rows_of(*dense, *shrunk)[1]
    assert (row.change1.mean, row.change1.deviation) == pytest.approx((top1 - 76, math.hypot(deviation, 4)))
    assert (row.saving.mean, row.saving.deviation) == pytest.approx((50.0, 50 * math.hypot(1 / 30, 10 / 60)))
    alone = rows_of(dense[0], *shrunk)[1]
    assert (alone.change1.mean, alone.change1.deviation, alone.saving.deviation) == (top1 - 72, None, None)


def test_a_setting_that_differs_makes_two_rows_but_not_one_without_effect(tmp_path: Path):
    runs = [
        write_run(
            tmp_path / name,
            shrinks=method != "none",
            **with_settings(tmp_path / name, prune={"method": method, "hard_ramp": {"slope": slope}}),
        )
        for name, method, slope in (
            *(("a", "hard_ramp", 0.03), ("b", "hard_ramp", 0.04)),
            *(("c", "none", 0.03), ("d", "none", 0.04)),
        )
    ]
    groups = group_runs([read_run(run) for run in runs])
    assert [[run.name for run in group.runs] for group in groups] == [["c", "d"], ["a"], ["b"]]
    differing = differing_settings(groups)
    assert differing == {
        "prune.method": ["none", "hard_ramp", "hard_ramp"],
        "prune.hard_ramp.slope": [None, 0.03, 0.04],
    }


def test_groups_have_names_that_tell_them_apart(tmp_path: Path):
    def names(*runs: str) -> list[str]:
        made = [
            write_run(
                tmp_path / run,
                shrinks=True,
                **with_settings(tmp_path / run, seed, prune={"hard_ramp": {"slope": slope}}),
            )
            for run, seed, slope in zip(runs, (0, 1, 0, 1), (0.1, 0.1, 0.2, 0.2), strict=False)
        ]
        return [group.name for group in group_runs([read_run(run) for run in made])]

    assert names("a-s0", "a-s1", "b.seed0", "b.seed1") == ["a", "b"]
    assert names("x_1", "x_2", "x_3", "x_4") == ["x_1", "x_3"]
    assert names("one/x_1", "one/x_2", "two/x_1", "two/x_2") == [str(tmp_path / "one/x_1"), str(tmp_path / "two/x_1")]


def test_equal_runs_on_other_hardware_are_no_repetitions(tmp_path: Path):
    runs = [
        write_run(tmp_path / name, **with_settings(tmp_path / name), devices=[device] * 8)
        for name, device in (("a_s0", "NVIDIA H100"), ("a_s1", "NVIDIA A100"))
    ]
    assert [row.count for row in rows_of(*runs)] == [1, 1]


def test_a_run_resumed_on_other_machines_is_compared_with_none(tmp_path: Path):
    dense, shrunk = write_run(tmp_path / "dense"), write_run(tmp_path / "cup", shrinks=True, hours=30.0)
    assert rows_of(dense, shrunk)[1].saving.mean == 50.0
    first, *others = (dense / "log.jsonl").read_text().splitlines(keepends=True)
    resumed = first.replace("H100", "A100")
    (dense / "log.jsonl").write_text("".join([first, *others[:1], resumed, *others[1:]]))
    groups = group_runs([read_run(dense), read_run(shrunk)])
    assert our_rows(groups)[1].saving is None
    assert any(note.endswith("dense, differs in devices") for note in notes(groups))
    assert "8 x NVIDIA H100, then 8 x NVIDIA A100" in page(groups, [], [])


def test_runs_of_several_networks_or_data_sets_say_which(tmp_path: Path):
    runs = [
        run_on(tmp_path, network, folder, 50_000)
        for network, folder in (
            ("resnet56_cifar", "cifar10"),
            ("resnet56_cifar", "own|"),
            ("resnet20_cifar", "own|"),
        )
    ]
    headings = "| run | network | data | method | runs |"
    table = markdown([*our_rows(group_runs(runs)), *published_rows(runs)])
    assert table.startswith(headings) and "| resnet56_cifar | cifar10 | dense | 1 |" in table
    assert r"| resnet56_cifar | own\| | dense | 1 |" in table
    assert "| published, CIFAR-10 (notebook) | resnet56_cifar | CIFAR-10 | dense |  |" in table
    assert "<th>run</th><th>network</th><th>data</th><th>method</th><th" in page(group_runs(runs), [], [])
    alone = group_runs(runs[:1])
    assert "| run | network | method | runs |" in markdown([*our_rows(alone), *published_rows(runs)])
    assert "<th>run</th><th>method</th><th" in page(alone, [], []) and "There is one run." in page(alone, [], [])
    assert [row["data"] for row in csv.DictReader(means_csv(our_rows(group_runs(runs))).splitlines())] == [
        *("cifar10", "own|", "own|")
    ]


def test_older_logs_are_read_and_stand_alone(tmp_path: Path):
    first, second = (write_run(tmp_path / f"old_s{seed}", shrinks=True, reduction=2.0) for seed in (0, 1))
    rows = rows_of(first, second)
    assert [(row.name, row.method, row.count, row.seeds) for row in rows] == [
        ("old_s0", "CUP-SS", 1, ""),
        ("old_s1", "CUP-SS", 1, ""),
    ]
    groups = group_runs([read_run(first)])
    assert "not in this run" in page(groups, [], []) and "Peak memory" not in page(groups, [], [])


def test_the_saving_is_measured_against_the_dense_run(tmp_path: Path, capsys: pytest.CaptureFixture):
    dense = write_run(tmp_path / "dense", hours=66.0, top1=75.86)
    shrunk = write_run(tmp_path / "shrunk", shrinks=True, hours=54.48, reduction=2.2, top1=74.4)
    assert report.main([str(dense), str(shrunk), "--out", str(tmp_path / "out")]) == 0
    table = (tmp_path / "out/savings.md").read_text()
    assert "| dense | resnet50 | dense | 1 | 1.00 | 75.86 | 90.00 |  | 66.00 |  |" in table
    assert "| shrunk | resnet50 | CUP-SS | 1 | 2.20 | 74.40 | 90.00 | -1.46 | 54.48 | 17.5 |" in table
    theirs = "| published, ImageNet (paper) | resnet50 | CUP-SS, k 0.03, b 0.3, stop at 3.81 GFLOPs |  "
    assert f"{theirs}| 2.20 | 74.40 | 91.99 | -1.46 | 54.48 | 17.5 |" in table
    assert table in capsys.readouterr().out
    names = {"report.html", "runs.csv", "savings.csv", "savings.md"}
    figures = {"accuracy.png", "epochs.png", "images_per_s.png", "seconds.png", "widths_shrunk.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | figures
    assert all((tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG") for name in figures)


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 30},
        {"batch_size": 512},
        {"precision": "fp32"},
        {"devices": ["NVIDIA A100"] * 8},
        {"train_images": 9},
        {"world_size": 4},
        {"loader": "torch"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_there_is_no_saving_against_a_run_of_other_costs(tmp_path: Path, change: dict):
    runs = [write_run(tmp_path / "dense", **change), write_run(tmp_path / "shrunk", shrinks=True, hours=50.0)]
    groups = group_runs([read_run(run) for run in runs])
    row = our_rows(groups)[1]
    assert (row.saving, row.change1) == (None, None)
    [key] = change
    why = f"for the nearest dense run, dense, differs in {key}"
    assert notes(groups) == [f"shrunk: no saving and no change of accuracy, {why}"]


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("train", {"label_smoothing": 0.1}),
        ("train", {"compile": "blocks"}),
        ("train", {"ema_decay": 0.999}),
        ("optim", {"name": "lars"}),
    ],
    ids=str,
)
def test_there_is_no_saving_against_another_way_of_training(tmp_path: Path, section: str, change: dict):
    [key] = change
    other = {"prune": DENSE, section: change}
    dense = write_run(tmp_path / "dense", **with_settings(tmp_path / "dense", **other))
    shrunk = [
        write_run(tmp_path / f"cup_s{seed}", shrinks=True, **with_settings(tmp_path / f"cup_s{seed}", seed))
        for seed in (0, 1)
    ]
    groups = group_runs([read_run(run) for run in (dense, *shrunk)])
    row = our_rows(groups)[1]
    assert (row.saving, row.change1, row.change5) == (None, None, None)
    [note] = notes(groups)  # one a group
    assert note.startswith("cup: no saving and no change of accuracy") and f"dense, differs in {section}.{key}" in note


@pytest.mark.parametrize("change", [{"lr": 0.2}, {"weight_decay": 5e-4}, {"schedule": "cosine"}], ids=str)
def test_a_change_of_accuracy_needs_an_optimizer_of_equal_settings_a_saving_does_not(tmp_path: Path, change: dict):
    [key] = change
    other = with_settings(tmp_path / "dense", prune=DENSE, optim=change)
    dense = write_run(tmp_path / "dense", hours=60.0, **other)
    shrunk = write_run(tmp_path / "cup", shrinks=True, hours=30.0, **with_settings(tmp_path / "cup"))
    groups = group_runs([read_run(run) for run in (dense, shrunk)])
    row = our_rows(groups)[1]
    assert (row.saving.mean, row.change1, row.change5) == (50.0, None, None)
    assert notes(groups) == [f"cup: no change of accuracy, for the nearest dense run, dense, differs in optim.{key}"]


def test_a_log_that_knows_no_size_of_validation_was_validated_at_the_size_of_training(tmp_path: Path):
    older, *newer = [
        write_run(tmp_path / name, **with_settings(tmp_path / name, data={"val_size": size}))
        for name, size in (("older", None), ("plain", None), ("larger", 256))
    ]
    lines = [json.loads(line) for line in (older / "log.jsonl").read_text().splitlines()]
    del lines[0]["config"]["data"]["val_size"]
    (older / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = [read_run(older).differences(read_run(directory), accuracy=True) for directory in newer]
    assert found == [[], ["data.val_size"]]


def test_without_any_dense_run_it_says_so_and_else_it_names_the_nearest(tmp_path: Path):
    shrunk = read_run(write_run(tmp_path / "cup", shrinks=True))
    assert notes(group_runs([shrunk])) == ["cup: no saving and no change of accuracy, for no run among these is dense"]
    far = read_run(write_run(tmp_path / "far", epochs=3, batch_size=64))
    near = read_run(write_run(tmp_path / "near", epochs=3))
    [note] = notes(group_runs([far, near, shrunk]))
    assert note.endswith("for the nearest dense run, near, differs in epochs")


def test_there_is_no_saving_against_images_of_another_size_or_another_data_set(tmp_path: Path):
    def saving(name: str, **data) -> float | None:
        dense = write_run(tmp_path / name, **with_settings(tmp_path / name, prune=DENSE, data=data))
        shrunk = write_run(tmp_path / "cup", shrinks=True, hours=30.0, **with_settings(tmp_path / "cup"))
        return rows_of(dense, shrunk)[1].saving

    assert saving("small", image_size=160) is None
    assert saving("growing", start_size=128, grow_epochs=2) is None
    assert saving("other", path="datasets/other") is None
    assert saving("augmented", auto_augment="trivialaugment") is None
    assert saving("same").mean == 50.0


def test_retraining_counts_together_with_the_training_before_it(tmp_path: Path):
    """A retrained run never shrinks, yet it is no dense run to measure savings against."""
    start = {"from": "cut.pt", "gpu_hours_before": 60.0}
    runs = [
        write_run(tmp_path / "dense", hours=60.0),
        write_run(tmp_path / "retrained", hours=30.0, reduction=2.2, **start),
        write_run(tmp_path / "again", shrinks=True, hours=30.0, reduction=2.2, **start),
        write_run(tmp_path / "foreign", hours=30.0, reduction=2.2, **start | {"gpu_hours_before": None}),
    ]
    groups = group_runs([read_run(run) for run in runs])
    table = markdown(our_rows(groups))
    assert "| dense | resnet50 | dense | 1 | 1.00 | 70.00 | 90.00 |  | 60.00 |  |" in table
    assert (
        "| retrained | resnet50 | retrained, from cut.pt | 1 | 2.20 | 70.00 | 90.00 | +0.00 | 90.00 | -50.0 |" in table
    )
    assert "| again | resnet50 | CUP-SS on a cut network, from cut.pt | 1 | 2.20 |" in table
    assert "| foreign | resnet50 | retrained, from cut.pt | 1 | 2.20 | 70.00 | 90.00 | +0.00 | 30.00 |  |" in table
    assert "retrained: 60.0000 GPU hours went into cut.pt, 30.0000 into training it further" in notes(groups)
    assert any(note.startswith("foreign: GPU hours of its own alone") for note in notes(groups))


def test_runs_that_are_not_finished_are_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture):
    runs = [write_run(tmp_path / f"run{number}") for number in range(10)]
    log = runs[3] / "log.jsonl"
    log.write_text("".join(line + "\n" for line in log.read_text().splitlines()[:-1]))
    (runs[5] / "log.jsonl").write_text("garbage\n{}\n")
    assert report.main([*map(str, runs), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert f"left out: the run in {runs[3]} is not finished" in said
    assert f"left out: {runs[5]}/log.jsonl, line 1" in said
    assert len((tmp_path / "out/runs.csv").read_text().splitlines()) == 1 + 8


def test_epochs_that_a_log_lacks_are_named(tmp_path: Path, capsys: pytest.CaptureFixture):
    run = write_run(tmp_path / "run")
    log = run / "log.jsonl"
    log.write_text("".join(line + "\n" for line in log.read_text().splitlines() if '"epoch": 1' not in line))
    assert report.main([str(run), "--out", str(tmp_path / "out")]) == 0
    assert "run: its log lacks epochs 1; the figures show what is there" in capsys.readouterr().out


@pytest.mark.parametrize("sign", ["=", "+", "-", "@"])
def test_names_that_a_spreadsheet_would_compute_are_text(tmp_path: Path, sign: str):
    name = f"{sign}cmd"
    assert report.main([str(write_run(tmp_path / name)), "--out", str(tmp_path / "out")]) == 0
    for table in ("savings.csv", "runs.csv"):
        lines = list(csv.reader((tmp_path / "out" / table).read_text().splitlines()))
        assert lines[1][0] == f"'{name}"


def test_what_is_no_finished_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert report.main([str(tmp_path / "nothing")]) == 1
    assert "nothing is no run directory" in capsys.readouterr().err
    run = write_run(tmp_path / "run", shrinks=True)
    lines = (run / "log.jsonl").read_text().splitlines()
    without_hours = lines[-1].replace('"gpu_hours"', '"hours"')
    for log, message in (
        (lines[:-1], "not finished: start it again"),
        (lines[-1:], "tells of no run: the file is empty, damaged"),
        ([], "tells of no run: the file is empty, damaged"),
        (['{"level": "info"}', '{"loss": 1.0}'], "tells of no run: the file is empty, damaged"),
        (['{"event": "run"}'], "an event 'run' has no 'method'"),
        ([*lines[:-1], without_hours], "an event 'done' has no 'gpu_hours'"),
        ([lines[0], lines[-1]], "tells of no epoch"),
    ):
        (run / "log.jsonl").write_text("".join(line + "\n" for line in log))
        assert report.main([str(run), "--out", str(tmp_path / "out")]) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
        assert ("start it again" in error) == ("not finished" in message)
    assert not (tmp_path / "out").exists()


def test_a_line_without_an_event_is_passed_over(tmp_path: Path):
    run = write_run(tmp_path / "run")
    with (run / "log.jsonl").open("a") as log:
        log.write('{"note": "by hand"}\n')
    assert read_run(run).hours == 60.0


def test_figures_take_any_name(tmp_path: Path):
    groups = group_runs([read_run(write_run(tmp_path / "a_$\\no$", shrinks=True))])
    assert draw_accuracy(groups, tmp_path).path.exists()


def test_a_run_by_two_paths_is_one(tmp_path: Path, capsys: pytest.CaptureFixture):
    run = write_run(tmp_path / "run", **with_settings(tmp_path / "run", prune=DENSE))
    (tmp_path / "link").symlink_to(run)
    paths = [str(run), f"{run}/../run", str(tmp_path / "link")]
    assert report.main([*paths, "--out", str(tmp_path / "out")]) == 0
    assert "| run | resnet50 | dense | 1 |" in capsys.readouterr().out


def test_a_dendrogram_without_a_readable_checkpoint_is_said_and_no_error(tmp_path: Path):
    groups = group_runs([read_run(write_run(tmp_path / "cup", shrinks=True))])
    figures, missing = draw_layers(groups, ["layer1.0.conv1"], tmp_path)
    assert (figures, missing) == ([], [f"cup: no dendrogram, for there is no checkpoint {tmp_path / 'cup/last.pt'}"])
    assert missing[0] in html.unescape(page(groups, [], missing))
    (tmp_path / "cup/last.pt").write_bytes(b"cut short")
    figures, [said] = draw_layers(groups, ["layer1.0.conv1"], tmp_path)
    assert not figures and said.startswith("cup: no dendrogram: ") and "last.pt" in said


def test_dendrograms_are_drawn_from_the_checkpoint_and_an_unknown_layer_is_named(tmp_path: Path, capsys):
    run = write_run(tmp_path / "cup", shrinks=True, model="lenet")
    write_network(run / "last.pt", "lenet")
    assert report.main([str(run), "--out", str(tmp_path / "out"), "--dendrogram", "conv2", "conv1"]) == 0
    drawn = sorted(path.name for path in (tmp_path / "out/dendrograms_cup").iterdir())
    assert drawn == ["conv1.png", "conv2.png"]
    text = (tmp_path / "out/report.html").read_text()
    assert len(Resources(text).fetched) == 5 + 2
    assert "cut once more at the last cut&#39;s height, t 0.330" in text
    assert report.main([str(run), "--out", str(tmp_path / "none"), "--dendrogram", "conv9"]) == 2
    assert "found conv9; allowed for cup: conv1, conv2, fc1" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def run_on(root: Path, network: str, folder: str, images: int) -> Run:
    directory = root / f"{network}_{folder.strip('|')}"
    settings = with_settings(directory, prune=DENSE, data={"path": f"datasets/{folder}"})
    return read_run(write_run(directory, model=network, train_images=images, **settings))


def test_published_rows_are_those_of_the_networks_at_hand_on_their_data_set(tmp_path: Path):
    rows = published_rows([run_on(tmp_path, "resnet56_cifar", "cifar10", 50_000)])
    assert {row.network for row in rows} == {"resnet56_cifar"} and len(rows) == 9
    [quickest] = [row for row in rows if "4,743 s" in row.setting]
    assert quickest.hours.mean == pytest.approx(1.3175)
    assert quickest.change1.mean == pytest.approx(-0.87)
    assert {row.name for row in rows} == {"published, CIFAR-10 (notebook)"}
    assert published_rows([run_on(tmp_path, "resnet20_cifar", "cifar10", 50_000)]) == []
    assert published_rows([run_on(tmp_path, "resnet18", "ILSVRC-imagenet-1k", 1_281_167)]) != []
    for network, folder, images in (
        ("resnet18", "imagenette", 9_469),
        ("resnet18", "imagenet-tenth", 128_117),
        ("resnet18", "places", 1_281_167),
        ("resnet56_cifar", "cifar100", 50_000),
        ("resnet56_cifar", "cifar10-5k", 5_000),
    ):
        assert published_rows([run_on(tmp_path, network, folder, images)]) == [], folder


# As printed in the slides and in the notebooks: (network, method, setting, FR or GFLOPs, top-1 or its change)
@pytest.mark.parametrize(
    ("network", "method", "setting", "size", "accuracy"),
    [
        ("resnet18", "SFP", "no retraining", 1.71, -3.18),
        ("resnet18", "GM", "no retraining", 1.71, -2.47),
        ("resnet18", "GM", "retrained", 1.71, -1.87),
        ("resnet34", "SFP", "no retraining", 1.69, -2.09),
        ("resnet34", "GM", "no retraining", 1.69, -2.13),
        ("resnet34", "GM", "retrained", 1.69, -1.29),
        ("resnet50", "SFP", "no retraining", 1.71, -1.54),
        ("resnet50", "SFP", "retrained", 2.15, -14.0),
        ("resnet50", "GM", "no retraining", 2.15, -2.02),
        ("vgg16_cifar", "dense", "", 0.63, 93.64),
        ("vgg16_cifar", "CUP", "t 0.90", 0.21, 93.55),
        ("vgg16_cifar", "CUP", "t 0.95", 0.17, 92.94),
        ("vgg16_cifar", "CUP-SS", "k 0.02", 0.20, 93.15),
        ("vgg16_cifar", "CUP-SS", "k 0.035", 0.20, 93.24),
    ],
)
def test_published_results_are_as_printed(network: str, method: str, setting: str, size: float, accuracy: float):
    tables = (published.CIFAR10 if "cifar" in network else published.DROPS,)
    results = [one for table in tables for one in table.results]
    [found] = [one for one in results if (one.network, one.method, one.setting) == (network, method, setting)]
    assert (found.gflops or found.reduction, found.top1 or found.change1) == (size, accuracy)


@pytest.mark.parametrize(
    ("method", "reduction", "top1", "hours"), [("SFP", 1.73, 74.01, 61.8), ("GM", 2.15, 74.13, 62.2)]
)
def test_published_hours_of_rivals_are_as_printed(method: str, reduction: float, top1: float, hours: float):
    [found] = [one for one in published.IMAGENET.results if one.method == method]
    assert (found.reduction, found.top1, found.hours) == (reduction, top1, hours)


def test_published_savings_are_the_authors_own(tmp_path: Path):
    resnet50 = [read_run(write_run(tmp_path / "resnet50"))]
    rows = {row.setting: row for row in published_rows(resnet50)}
    assert rows["k 0.03, b 0.3, stop at 3.81 GFLOPs"].saving.mean == pytest.approx(17.5, abs=0.05)
    [slides] = [row for row in published_rows(resnet50) if row.method == "CUP-RF" and row.hours]
    assert slides.saving.mean == pytest.approx(21.8, abs=0.05)


def test_published_changes_agree_with_the_published_accuracies():
    """Within a source that gives both, and FR with FLOPs: a wrong digit in the data would show."""
    results = [result for table in published.TABLES for result in table.results]
    dense = {r.network: r for r in results if r.method == "dense"}
    for result in results:
        if result.gflops and result.reduction and result.network == "resnet50":
            assert result.reduction == pytest.approx(dense["resnet50"].gflops / result.gflops, abs=0.011), result
    names = {"CUP": "CUP", "CUP-RF": "CUP-SS"}  # the slides' and the notebooks'
    drops = {(r.network, names[r.method], r.reduction): r.change1 for r in published.DROPS.results if r.method in names}
    compared = 0
    for result in results:
        known = drops.get((result.network, result.method, round(result.reduction or 0, 2)))
        if known is not None and result.top1 is not None:
            compared += 1
            assert abs(result.change1 - known) < 0.14, result
    assert compared >= 4


def test_the_csv_files_hold_full_precision_and_a_line_a_run_or_a_row(tmp_path: Path):
    groups = group_runs(three_seeds(tmp_path))
    runs = list(csv.DictReader(runs_csv(groups).splitlines()))
    assert len(runs) == 9
    assert (runs[3]["run"], runs[3]["group"], runs[3]["seed"]) == ("c10_cup_s0", "c10_cup", "0")
    assert float(runs[3]["gpu_hours"]) == 36.0 and float(runs[3]["step_s"]) == 16.0 and runs[0]["saving_percent"] == ""
    rows = [*our_rows(groups), *published_rows([read_run(write_run(tmp_path / "resnet50"))])]
    means = list(csv.DictReader(means_csv(rows).splitlines()))
    assert float(means[1]["top1_percent_deviation"]) == pytest.approx(0.8660254037844386)
    # Seed by seed, as the row of means is.
    assert float(runs[3]["top1_change_points"]) == -1.0
    assert float(runs[3]["saving_percent"]) == pytest.approx(100 * (1 - 36 / 59))
    assert [means[0]["source"], means[-1]["source"]] == ["ours", "slides"]


class Resources(html.parser.HTMLParser):
    """Everything that a page would fetch, and its visible words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]


def test_the_page_needs_no_other_file_and_escapes_what_users_named(tmp_path: Path):
    bad = "<script>alert(1)</script>"
    dense = write_run(tmp_path / "dense", **with_settings(tmp_path / "dense", prune=DENSE))
    named = with_settings(tmp_path / "cup", model={"from": bad})
    shrunk = write_run(tmp_path / "cup", shrinks=True, reduction=2.0, devices=[bad] * 8, **named, **{"from": bad})
    assert report.main([str(dense), str(shrunk), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out/report.html").read_text()
    found = Resources(text)
    assert len(found.fetched) == 5 and all(one.startswith("data:image/png;base64,") for one in found.fetched)
    assert "Beside the paper" in text and "3 Titan Xp" in text
    assert "script" not in found.tags and "link" not in found.tags
    assert "url(" not in text and "@import" not in text and "&lt;script&gt;" in text


def test_the_page_holds_the_ledger_the_resizes_and_what_newer_logs_say(tmp_path: Path):
    run = write_run(tmp_path / "cup", shrinks=True, reduction=2.0)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for line in log:
        if line["event"] == "epoch":
            line |= {"peak_memory": line["epoch"] * 2**30, "device_memory": 3 * 2**30, "all_reduce_s": 2.0}
            line["seconds_by_rank"] = [line["seconds"], line["seconds"] | {"step": 9.0}]
            line["seconds"] = line["seconds"] | {"compile": 3.0, "lost": 1.0}
        elif line["event"] == "done":
            line["seconds"] |= {"compile": 6.0, "lost": 2.0}
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    text = page(group_runs([read_run(run)]), [], [])
    cells = [re.sub(r"<.*?>", " ", row).split() for row in re.findall(r"<tr.*?</tr>", text)]
    assert ["run", "startup", "step", "eval", "compile", "lost", "sum", "wall"] in cells
    assert ["cup", "1.0", "16.0", "3.0", "6.0", "2.0", "28.0", "20.0"] in cells
    assert ["2", "0.330", "48", "1.00", "→", "2.00", "0.25", "1,000", "→", "1,600", "?", "→", "?"] in cells
    assert ["cup", "1", "1.0", "18.0", "3.0"] in cells
    assert ["cup", "1.00", "2.00", "2.00", "3.00", "0.0", "25.0"] in cells and "all-reduce" in text
    for line in log:
        line.pop("all_reduce_s", None)
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    text = page(group_runs([read_run(run)]), [], [])
    assert "peak memory" in text and "all-reduce" not in text


def test_the_speed_up_of_each_epoch_is_against_the_dense_runs_or_the_full_epochs(tmp_path: Path):
    dense = read_run(write_run(tmp_path / "dense"))
    shrunk = read_run(write_run(tmp_path / "cup", shrinks=True, reduction=2.0))
    for line, speed in zip(dense.epochs, (700.0, 900.0), strict=True):
        line["images_per_s"] = speed
    assert _speedups(shrunk, group_runs([dense, shrunk])) == [(1.0, 1.25), (2.0, 2.0)]  # 1000 and 1600 over 800
    assert _speedups(shrunk, group_runs([shrunk])) == [(1.0, 1.0), (2.0, 1.6)]
    shrunk.epochs[0]["flops_reduction"] = 1.5
    assert _speedups(shrunk, group_runs([shrunk])) == []
    growing = with_settings(tmp_path / "growing", data={"start_size": 128, "grow_epochs": 2})
    assert _speedups(read_run(write_run(tmp_path / "growing", shrinks=True, **growing)), group_runs([dense])) == []


def test_training_seconds_are_those_that_shrinking_changes():
    seconds = {"startup": 64.0, "data_wait": 1.0, "step": 2.0, "resize": 4.0, "resize_warmup": 8.0, "compile": 16.0}
    assert training_seconds({"seconds": seconds | {"eval": 128.0, "save": 256.0, "other": 512.0}}) == 31.0
    assert training_seconds({"seconds": {"step": 2.0, "eval": 1.0}}) == 2.0


def test_the_mean_at_an_epoch_is_of_the_runs_that_have_a_value_there(tmp_path: Path):
    first, second = (read_run(write_run(tmp_path / name, top1=top1)) for name, top1 in (("a", 70.0), ("b", 80.0)))
    second.epochs[1]["top1"] = None
    group = Group("both", (first, second))
    assert _means(group, lambda line: line["top1"], [1, 2, 3]) == [75.0, 70.0, None]


def test_widths_before_a_cut_in_the_first_epoch_are_found_again(tmp_path: Path):
    run = read_run(write_run(tmp_path / "cup", shrinks=True))
    assert widths_at_start(run) == {"layer1.0.conv1": 64, "layer1.0.conv2": 64}
    run.epochs[0]["widths"] = {"layer1.0.conv1": 48, "layer1.0.conv2": 32}
    run.resizes[0]["epoch"] = 1
    assert widths_at_start(run) == {"layer1.0.conv1": 64, "layer1.0.conv2": 64}


def test_the_way_of_shrinking_in_words(tmp_path: Path):
    def words(ramp: dict | None = None, **prune) -> str:
        settings = with_settings(tmp_path / "cup", prune=prune | {"hard_ramp": ramp or {}})
        return setting(read_run(write_run(tmp_path / "cup", shrinks=True, **settings)))

    assert words(target_reduction=2.2) == "k 0.03, b 0.3, stop at FR 2.2"
    assert words(round_to="measured") == "k 0.03, b 0.3, no stop, widths rounded as measured"
    ramp = {"kind": "reduction"}
    assert words(ramp, target_reduction=2.0, last_epoch=6, round_to=8, every=2, scope="all") == (
        "FR 2 in a straight line by epoch 6, every 2 epochs, widths rounded to 8, residual streams too"
    )
    faster = {"target_speedup": 1.5, "device": "t4", "scope": "all", "drop_blocks": True}
    assert words(**faster).endswith("stop at a step 1.5 times faster on t4, residual streams too, whole blocks too")
    at_hand = faster | {"device": "measured"}
    assert "a step 1.5 times faster on the device at hand, residual" in words(**at_hand)


# Honest figures


def with_log(directory: Path, speeds: Sequence[float] = (), cpu_seconds: float | None = None) -> Path:
    """Give a written run epochs of these images a second, and processor time."""
    log = directory / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    if speeds:
        [first, *_] = [line for line in lines if line["event"] == "epoch"]
        lines = [line for line in lines if line["event"] != "epoch"]
        lines[1:1] = [
            first | {"epoch": number, "images_per_s": speed, "image_size": 32}
            for number, speed in enumerate(speeds, start=1)
        ]
    lines[-1] |= {} if cpu_seconds is None else {"cpu_seconds": cpu_seconds, "device": "cpu"}
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def test_repetitions_of_one_seed_give_accuracy_no_deviation(tmp_path: Path):
    runs = []
    for number, hours in enumerate([40.0, 42.0, 44.0]):
        directory = tmp_path / f"cup-{number}"
        settings = with_settings(directory, seed=7)
        runs.append(write_run(directory, shrinks=True, hours=hours, top1=70 + 1e-6 * number, **settings))
    [row] = rows_of(*runs)
    assert (row.count, row.runs) == (3, "3 of 1 seed")
    assert row.top1.deviation is None and row.top5.deviation is None
    assert row.hours.deviation == 2.0
    assert "| 3 of 1 seed |" in markdown([row])


def test_repetitions_count_once_in_the_deviation_over_seeds(tmp_path: Path):
    """Seeds 0, 0, 1 with 70, 72, 75: the deviation of 71 and 75."""
    runs = []
    for number, (seed, top1) in enumerate([(0, 70.0), (0, 72.0), (1, 75.0)]):
        directory = tmp_path / f"cup-{number}"
        runs.append(write_run(directory, shrinks=True, top1=top1, **with_settings(directory, seed=seed)))
    [row] = rows_of(*runs)
    assert row.runs == "3 of 2 seeds"
    assert (row.top1.mean, row.top1.deviation) == (73.0, pytest.approx(statistics.stdev([71, 75])))


@pytest.mark.parametrize(("speeds", "is_told_apart"), [((990, 1000, 1010), True), ((700, 1000, 1300), False)])
def test_a_saving_below_the_scatter_of_the_dense_epochs_is_a_sentence(
    tmp_path: Path, speeds: tuple, is_told_apart: bool
):
    """Seconds an epoch: 1/700, 1/1000, 1/1300; standard deviation over mean: 31%, which is above a saving of 10%."""
    dense = with_log(write_run(tmp_path / "dense", hours=60.0), speeds)
    cup = write_run(tmp_path / "cup", shrinks=True, hours=54.0, reduction=2.0)
    groups = group_runs([read_run(dense), read_run(cup)])
    row = next(row for row in our_rows(groups) if row.name == "cup")
    seconds = [1 / speed for speed in speeds]
    assert row.scatter.mean == pytest.approx(100 * statistics.stdev(seconds) / statistics.mean(seconds))
    text = html.unescape(page(groups, [], []))
    assert ("GPU hours saved" in text) == is_told_apart
    assert ("this machine does not tell them apart" in text) != is_told_apart
    assert "dense epochs vary by (%)" in text


def test_runs_on_a_cpu_are_compared_by_processor_time_too(tmp_path: Path):
    dense = with_log(write_run(tmp_path / "dense", hours=2.0), cpu_seconds=7200.0)
    cup = with_log(write_run(tmp_path / "cup", shrinks=True, hours=3.0, reduction=2.0), cpu_seconds=5400.0)
    rows = {row.name: row for row in rows_of(dense, cup)}
    assert rows["cup"].saving.mean == pytest.approx(-50.0)  # of hours, in which others used the machine
    assert rows["cup"].cpu_saving.mean == pytest.approx(25.0)
    assert (rows["dense"].cpu_hours.mean, rows["cup"].cpu_hours.mean) == (2.0, 1.5)
    assert "saving of CPU time (%)" in markdown(list(rows.values()))
