"""launch/report.py on logs made by hand: what becomes one row, what it is measured against, and what the page holds."""

import csv
import html
import html.parser
import json
import re
from pathlib import Path

import pytest
from launching import write_network

from launch import report
from launch.reports import published
from launch.reports.dendrograms import draw_layers
from launch.reports.figures import widths_at_start
from launch.reports.page import page
from launch.reports.read import Run, differing_settings, group_runs, read_run
from launch.reports.tables import Row, markdown, means_csv, notes, our_rows, published_rows, runs_csv, setting
from train.config import RunConfig, config_from_dict

H100 = {"world_size": 8, "devices": ["NVIDIA H100"] * 8, "loader": "dali", "precision": "bf16"}
KINDS = ("startup", "data_wait", "step", "resize", "resize_warmup", "eval", "save", "other")


def write_run(directory: Path, *, cup: bool = False, hours: float = 60.0, reduction: float = 1.0, **changes) -> Path:
    """A finished run of two epochs as older versions logged it: without its settings.

    changes: of the run event, or top1 and seconds.
    """
    top1 = changes.pop("top1", 70.0)
    seconds = dict.fromkeys(KINDS, 0.0) | {"step": 8.0, "eval": 1.5, "startup": 0.5}
    first = {
        "model": "resnet50",
        "cup": cup,
        "epochs": 2,
        "batch_size": 256,
        "train_images": 1281167,
        **H100,
        **changes,
    }
    epoch = {"threshold": None, "top1": top1, "images_per_s": 1000.0, "seconds": seconds}
    done = {"flops_reduction": reduction, "top1": top1, "top5": 90.0, "gpu_hours": hours, "device": "cuda"}
    full, cut = {"layer1.0.conv1": 64, "layer1.0.conv2": 64}, {"layer1.0.conv1": 48, "layer1.0.conv2": 32}
    lines = [
        {"event": "run", **first},
        {"event": "epoch", "epoch": 1, "flops_reduction": 1.0, "gpu_hours": hours / 2, "widths": full, **epoch},
        {"event": "epoch", "epoch": 2, "flops_reduction": reduction, "gpu_hours": hours, "widths": full, **epoch},
        {"event": "done", "time_s": 20.0, "seconds": {kind: 2 * value for kind, value in seconds.items()}, **done},
    ]
    if cup:
        lines[2] |= {"widths": cut, "threshold": 0.33, "images_per_s": 1600.0}
        removed = {name: full[name] - cut[name] for name in full}
        event = {"event": "resize", "epoch": 2, "threshold": 0.33, "seconds": 0.25, "removed": removed}
        lines.insert(2, event | {"flops_reduction_before": 1.0, "flops_reduction_after": reduction})
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def with_settings(directory: Path, seed: int = 0, **changes) -> dict:
    """The settings that newer versions log, for `write_run`; `changes` by section: cup={"momentum": "reset"}."""
    config = RunConfig().to_dict()
    config["run"] |= {"name": directory.name, "seed": seed}
    for section, values in changes.items():
        config[section] |= values
    return {"config": config_from_dict(config).to_dict()}


def three_seeds(root: Path) -> list[Run]:
    """Dense, CUP-SS and CUP-SS with momentum reset, three seeds each, as three people would name them."""
    runs = []
    for seed, (dense_top1, drop) in enumerate([(76.0, 1.0), (75.0, 1.5), (77.0, 2.0)]):
        for kind, cup in (("dense", {"enabled": False}), ("cup", {}), ("reset", {"momentum": "reset"})):
            directory, shrinks = root / f"c10_{kind}_s{seed}", kind != "dense"
            numbers = {"hours": 36.0 + 3 * seed if shrinks else 59.0 + seed, "reduction": 2.0 if shrinks else 1.0}
            top1 = dense_top1 - drop if shrinks else dense_top1
            settings = with_settings(directory, seed, cup=cup, run={"root": f"disk{seed}", "keep": 2 + seed})
            runs.append(read_run(write_run(directory, cup=shrinks, top1=top1, **numbers, **settings)))
    return runs


def rows_of(*directories: Path) -> list[Row]:
    return our_rows(group_runs([read_run(directory) for directory in directories]))


def test_runs_that_differ_in_their_seeds_alone_are_one_row_of_means_and_deviations(tmp_path: Path):
    rows = our_rows(group_runs(three_seeds(tmp_path)))
    assert [(row.name, row.method, row.count, row.seeds) for row in rows] == [
        ("c10_dense", "dense", 3, "0, 1, 2"),
        ("c10_cup", "CUP-SS (carried momentum)", 3, "0, 1, 2"),
        ("c10_reset", "CUP-SS (momentum reset)", 3, "0, 1, 2"),
    ]
    dense, cup, _ = rows
    assert (dense.top1.mean, dense.top1.deviation) == (76.0, 1.0)
    assert (cup.top1.mean, cup.hours.mean, cup.hours.deviation) == (74.5, 39.0, 3.0)
    assert (cup.saving.mean, cup.saving.deviation) == (pytest.approx(35.0), pytest.approx(5.0))
    assert (cup.change1.mean, dense.change1, dense.saving) == (-1.5, None, None)
    assert "| c10_cup | resnet50 | CUP-SS (carried momentum), k 0.03, b 0.3, no stop | 3 | 2.00 ± 0.00 | 74.50 ±" in (
        markdown(rows)
    )
    assert "| -1.50 ± 0.87 | 39.00 ± 3.00 | 35.0 ± 5.0 |" in markdown(rows)


def test_a_setting_that_differs_makes_two_rows_but_not_one_without_effect(tmp_path: Path):
    runs = [
        write_run(
            tmp_path / name, cup=enabled, **with_settings(tmp_path / name, cup={"enabled": enabled, "slope": slope})
        )
        for name, enabled, slope in (("a", True, 0.03), ("b", True, 0.04), ("c", False, 0.03), ("d", False, 0.04))
    ]
    groups = group_runs([read_run(run) for run in runs])
    assert [[run.name for run in group.runs] for group in groups] == [["c", "d"], ["a"], ["b"]]
    differing = differing_settings(groups)
    assert differing == {"cup.enabled": [False, True, True], "cup.slope": [None, 0.03, 0.04]}


def test_groups_have_names_that_tell_them_apart(tmp_path: Path):
    def names(*runs: str) -> list[str]:
        made = [
            write_run(tmp_path / run, cup=True, **with_settings(tmp_path / run, seed, cup={"slope": slope}))
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


def test_older_logs_are_read_and_stand_alone(tmp_path: Path):
    first, second = (write_run(tmp_path / f"old_s{seed}", cup=True, reduction=2.0) for seed in (0, 1))
    rows = rows_of(first, second)
    assert [(row.name, row.method, row.count, row.seeds) for row in rows] == [
        ("old_s0", "CUP-SS", 1, ""),
        ("old_s1", "CUP-SS", 1, ""),
    ]
    groups = group_runs([read_run(first)])
    assert "not in this run" in page(groups, [], []) and "Peak memory" not in page(groups, [], [])


def test_the_saving_is_measured_against_the_dense_run(tmp_path: Path, capsys: pytest.CaptureFixture):
    dense = write_run(tmp_path / "dense", hours=66.0, top1=75.86)
    shrunk = write_run(tmp_path / "shrunk", cup=True, hours=54.48, reduction=2.2, top1=74.4)
    assert report.main([str(dense), str(shrunk), "--out", str(tmp_path / "out")]) == 0
    table = (tmp_path / "out/savings.md").read_text()
    assert "| dense | resnet50 | dense | 1 | 1.00 | 75.86 | 90.00 |  | 66.00 |  |" in table
    assert "| shrunk | resnet50 | CUP-SS | 1 | 2.20 | 74.40 | 90.00 | -1.46 | 54.48 | 17.5 |" in table
    theirs = "| published (paper) | resnet50 | CUP-SS, k 0.03, b 0.3, stop at 3.81 GFLOPs |  "
    assert f"{theirs}| 2.20 | 74.40 | 91.99 | -1.46 | 54.48 | 17.5 |" in table
    assert table in capsys.readouterr().out
    names = {"report.html", "runs.csv", "savings.csv", "savings.md"}
    figures = {"accuracy.png", "epochs.png", "images_per_s.png", "seconds.png", "widths_shrunk.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | figures
    assert all((tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG") for name in figures)


@pytest.mark.parametrize(
    "change",
    [{"epochs": 30}, {"batch_size": 512}, {"precision": "fp32"}, {"devices": ["NVIDIA A100"] * 8}, {"train_images": 9}],
)
def test_there_is_no_saving_against_a_run_of_other_costs(tmp_path: Path, change: dict):
    runs = [write_run(tmp_path / "dense", **change), write_run(tmp_path / "shrunk", cup=True, hours=50.0)]
    groups = group_runs([read_run(run) for run in runs])
    row = our_rows(groups)[1]
    assert (row.saving, row.change1) == (None, None)
    assert any(note.startswith("shrunk: no saving") for note in notes(groups))


def test_there_is_no_saving_against_images_of_another_size_or_another_data_set(tmp_path: Path):
    def saving(name: str, **data) -> float | None:
        dense = write_run(tmp_path / name, **with_settings(tmp_path / name, cup={"enabled": False}, data=data))
        shrunk = write_run(tmp_path / "cup", cup=True, hours=30.0, **with_settings(tmp_path / "cup"))
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
        write_run(tmp_path / "again", cup=True, hours=30.0, reduction=2.2, **start),
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


def test_what_is_no_finished_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert report.main([str(tmp_path / "nothing")]) == 1
    assert "nothing is no run directory" in capsys.readouterr().err
    unfinished = write_run(tmp_path / "unfinished", cup=True)
    (unfinished / "log.jsonl").write_text('{"event": "run"}\n')
    assert report.main([str(unfinished), "--out", str(tmp_path / "out")]) == 1
    assert "not finished" in capsys.readouterr().err
    (unfinished / "log.jsonl").write_text('{"event": "done"}\n')
    assert report.main([str(unfinished), "--out", str(tmp_path / "out")]) == 1
    assert "damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_dendrogram_without_a_checkpoint_is_said_and_no_error(tmp_path: Path):
    groups = group_runs([read_run(write_run(tmp_path / "cup", cup=True))])
    figures, missing = draw_layers(groups, ["layer1.0.conv1"], tmp_path)
    assert (figures, missing) == ([], [f"cup: no dendrogram, for there is no checkpoint {tmp_path / 'cup/last.pt'}"])
    assert missing[0] in html.unescape(page(groups, [], missing))


def test_dendrograms_are_drawn_from_the_checkpoint_and_an_unknown_layer_is_named(tmp_path: Path, capsys):
    run = write_run(tmp_path / "cup", cup=True, model="lenet")
    write_network(run / "last.pt", "lenet")
    assert report.main([str(run), "--out", str(tmp_path / "out"), "--dendrogram", "conv2", "fc1"]) == 0
    drawn = sorted(path.name for path in (tmp_path / "out/dendrograms_cup").iterdir())
    assert drawn == ["conv2.png", "fc1.png"]
    assert len(Resources((tmp_path / "out/report.html").read_text()).fetched) == 5 + 2
    assert report.main([str(run), "--out", str(tmp_path / "none"), "--dendrogram", "conv9"]) == 2
    assert "found conv9; allowed for cup: conv1, conv2, fc1" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_published_rows_are_those_of_the_networks_at_hand():
    rows = published_rows(["resnet56_cifar"])
    assert {row.network for row in rows} == {"resnet56_cifar"} and len(rows) == 9
    [quickest] = [row for row in rows if "4,743 s" in row.setting]
    assert quickest.hours.mean == pytest.approx(1.3175)
    assert quickest.change1.mean == pytest.approx(-0.87)
    assert published_rows(["resnet20_cifar"]) == []


def test_published_savings_are_the_authors_own():
    rows = {row.setting: row for row in published_rows(["resnet50"])}
    assert rows["k 0.03, b 0.3, stop at 3.81 GFLOPs"].saving.mean == pytest.approx(17.5, abs=0.05)
    [slides] = [row for row in published_rows(["resnet50"]) if row.method == "CUP-RF" and row.hours]
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
    means = list(csv.DictReader(means_csv([*our_rows(groups), *published_rows(["resnet50"])]).splitlines()))
    assert float(means[1]["top1_percent_deviation"]) == pytest.approx(0.8660254037844386)
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
    dense = write_run(tmp_path / "dense", **with_settings(tmp_path / "dense", cup={"enabled": False}))
    named = with_settings(tmp_path / "cup", model={"from": bad})
    shrunk = write_run(tmp_path / "cup", cup=True, reduction=2.0, devices=[bad] * 8, **named, **{"from": bad})
    assert report.main([str(dense), str(shrunk), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out/report.html").read_text()
    found = Resources(text)
    assert len(found.fetched) == 5 and all(one.startswith("data:image/png;base64,") for one in found.fetched)
    assert "Beside the paper" in text and "3 Titan Xp" in text
    assert "script" not in found.tags and "link" not in found.tags
    assert "url(" not in text and "@import" not in text and "&lt;script&gt;" in text


def test_the_page_holds_the_ledger_the_resizes_and_what_newer_logs_say(tmp_path: Path):
    run = write_run(tmp_path / "cup", cup=True, reduction=2.0)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for line in log:
        if line["event"] == "epoch":
            line |= {"peak_memory": line["epoch"] * 2**30, "all_reduce_s": 2.0}
            line["seconds_by_rank"] = [line["seconds"], line["seconds"] | {"step": 9.0}]
            line["seconds"] = line["seconds"] | {"compile": 3.0, "lost": 1.0}
        elif line["event"] == "done":
            line["seconds"] |= {"compile": 6.0, "lost": 2.0}
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    text = page(group_runs([read_run(run)]), [], [])
    cells = [re.sub(r"<.*?>", " ", row).split() for row in re.findall(r"<tr.*?</tr>", text)]
    assert ["run", "startup", "step", "eval", "compile", "lost", "sum", "wall"] in cells
    assert ["cup", "1.0", "16.0", "3.0", "6.0", "2.0", "28.0", "20.0"] in cells
    assert ["2", "0.330", "48", "1.00", "→", "2.00", "0.25", "1,000", "→", "1,600"] in cells
    assert ["cup", "1", "1.0", "18.0", "3.0"] in cells
    assert ["cup", "1.00", "2.00", "2.00", "0.0", "25.0"] in cells


def test_widths_before_a_cut_in_the_first_epoch_are_found_again(tmp_path: Path):
    run = read_run(write_run(tmp_path / "cup", cup=True))
    assert widths_at_start(run) == {"layer1.0.conv1": 64, "layer1.0.conv2": 64}
    run.epochs[0]["widths"] = {"layer1.0.conv1": 48, "layer1.0.conv2": 32}
    run.resizes[0]["epoch"] = 1
    assert widths_at_start(run) == {"layer1.0.conv1": 64, "layer1.0.conv2": 64}


def test_the_way_of_shrinking_in_words(tmp_path: Path):
    def words(**cup) -> str:
        return setting(read_run(write_run(tmp_path / "cup", cup=True, **with_settings(tmp_path / "cup", cup=cup))))

    assert words(target_reduction=2.2) == "k 0.03, b 0.3, stop at FR 2.2"
    assert words(round_to="measured") == "k 0.03, b 0.3, no stop, widths rounded as measured"
    assert words(ramp="reduction", target_reduction=2.0, last_epoch=6, round_to=8, every=2, scope="all") == (
        "FR 2 in a straight line by epoch 6, every 2 epochs, widths rounded to 8, residual streams too"
    )
