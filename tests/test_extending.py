"""The examples of docs/extending.md, added to the project as the page says, train and cut."""

import csv
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from launching import ROOT, events, train
from pages import code_blocks

import cup
from cup.criteria import CRITERIA
from cup.networks import OWN_MODELS
from train.methods import METHODS
from train.network.models import build_model

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def tables() -> Iterator[None]:
    """Puts the tables back as they were before an example added its line."""
    kept = [(table, dict(table)) for table in (CRITERIA, METHODS, OWN_MODELS)]
    yield
    for table, before in kept:
        table.clear()
        table.update(before)


def example(heading: str) -> SimpleNamespace:
    """The names that a section's code defines."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    names: dict = {}
    for code in code_blocks(section, "python"):
        exec(compile(code, heading, "exec"), names)
    return SimpleNamespace(**names)


def add_to_copy(folder: Path, heading: str, file: str, table: str) -> None:
    """A copy of the packages in `folder`, with a section's file and its lines in the table's file."""
    for package in ("cup", "data", "train"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    (folder / file).write_text(code_blocks(section, "python")[0], encoding="utf-8")
    [change] = code_blocks(section, "diff")
    statement, opening, *entries = change.splitlines()
    lines = (folder / table).read_text(encoding="utf-8").splitlines()
    imports = [index for index, line in enumerate(lines) if line.startswith("from ")]
    lines[min(imports) : max(imports) + 1] = sorted([statement[1:], *lines[min(imports) : max(imports) + 1]])
    at = lines.index(opening[1:]) + 1
    lines[at:at] = [entry[1:] for entry in entries]
    (folder / table).write_text("\n".join(lines) + "\n", encoding="utf-8")


def last_line(folder: Path, code: str) -> str:
    """What a fresh process that imports the copy prints last."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.splitlines()[-1]


def test_a_criterion_is_a_file_and_a_line(tmp_path: Path):
    add_to_copy(tmp_path, "A criterion", "cup/criteria/read_least.py", "cup/criteria/__init__.py")
    code = "import cup; print(cup.__file__, type(cup.PlanOptions(criterion='read_least').ranker).__name__)"
    assert last_line(tmp_path, code) == f"{tmp_path}/cup/__init__.py ReadLeast"


def test_a_method_is_a_file_and_a_line(tmp_path: Path):
    add_to_copy(tmp_path, "A method", "train/methods/one_shot.py", "train/methods/config.py")
    code = "from train.methods import PruneConfig, build_method as b; print(b(PruneConfig(method='one_shot'), 3).label)"
    assert last_line(tmp_path, code) == "one-shot"


def test_every_section_is_run():
    assert [line for line in PAGE.splitlines() if line.startswith("## ")] == [
        f"## {heading}" for heading in ("A criterion", "A method", "A model", "A loader", "A tracker")
    ]


def test_the_criterion_keeps_what_is_read_with_the_largest_weights():
    CRITERIA["read_least"] = example("A criterion").ReadLeast()
    torch.manual_seed(0)
    model, images = torchvision.models.resnet18(num_classes=10), torch.zeros(1, 3, 64, 64)
    groups = cup.channel_groups(model, images)
    plan = cup.plan_by_counts(model, groups, {"layer1.0.conv1": 20}, cup.PlanOptions(criterion="read_least"))
    sums = model.layer1[0].conv2.weight.abs().sum(dim=(0, 2, 3))
    assert set(plan.kept["layer1.0.conv1"]) == set(sums.topk(20).indices.tolist())


def test_the_criterion_trains(tmp_path: Path):
    CRITERIA["read_least"] = example("A criterion").ReadLeast()
    log = train(tmp_path, prune__criterion="read_least", model__name="resnet20_cifar", data__channels=3)
    assert events(log, "resize")


def test_the_method_cuts_once(tmp_path: Path):
    method = example("A method").OneShot
    METHODS["one_shot"] = lambda config, epochs, measured: method(
        config.last_epoch, config.target_reduction, config.plan_options(measured)
    )
    log = train(tmp_path, prune__method="one_shot", prune__last_epoch=2, prune__target_reduction=1.5)
    reductions = [event["flops_reduction"] for event in events(log, "epoch")]
    assert reductions[0] == 1
    assert reductions[1:] == pytest.approx([1.5] * (len(reductions) - 1), rel=0.02)
    assert len(events(log, "resize")) == 1
    assert events(log, "run")[0]["method"] == "one-shot"


def test_the_model_shrinks():
    example("A model")
    model, images = build_model("tiny_vgg", 10), torch.zeros(1, 3, 32, 32)
    assert {group.name for group in cup.prunable_groups(cup.channel_groups(model, images))} == {
        "features.0",
        "features.3",
    }


def test_the_loader_gives_each_image_with_its_label():
    found = example("A loader")
    seen = 0
    for batch in found.loader:
        for image, label in zip(batch.images, batch.labels, strict=True):
            pixels = (image.permute(1, 2, 0) * 0.226 + 0.45) * 255
            [index] = np.flatnonzero((found.pixels == pixels.round().byte().numpy()).all(axis=(1, 2, 3)))
            assert found.labels[index] == label
            seen += 1
    assert seen == 96  # 12 batches of 8


def test_the_loader_goes_on_where_it_was():
    found, again = example("A loader"), example("A loader")
    batches = iter(found.loader)
    next(batches)
    again.loader.load_state_dict(found.loader.state_dict())
    assert torch.equal(next(batches).images, next(iter(again.loader)).images)


def test_the_tracker_writes_a_line_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    table = example("A tracker").EpochTable(tmp_path / "epochs.csv")
    monkeypatch.setattr("train.build.ConsoleSink", lambda: table)
    log = train(tmp_path / "runs")
    with (tmp_path / "epochs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    assert [float(row["top1"]) for row in rows] == [event["top1"] for event in events(log, "epoch")]
