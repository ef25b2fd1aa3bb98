"""The examples of docs/extending.md, added to the project as the page says, train and cut."""

import csv
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from launching import ROOT, events, train
from pages import code_blocks
from torch import nn

import cup
from cup.criteria import CRITERIA
from train.methods import METHODS
from train.network.models import OWN_MODELS, build_model

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


def test_every_section_is_run():
    assert [line for line in PAGE.splitlines() if line.startswith("## ")] == [
        f"## {heading}" for heading in ("A criterion", "A method", "A model", "A loader", "A tracker")
    ]


def test_the_criterion_keeps_the_largest_scales():
    example("A criterion")
    model, images = torchvision.models.resnet18(num_classes=10), torch.zeros(1, 3, 64, 64)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, -1, 1)
    groups = cup.channel_groups(model, images)
    plan = cup.plan_by_reduction(model, groups, 2.0, cup.PlanOptions(criterion="bn_scale"))
    kept = list(plan.kept["layer1.0.conv1"])
    scale = model.layer1[0].bn1.weight.abs()
    assert 1 < len(kept) < 64
    assert set(kept) == set(scale.topk(len(kept)).indices.tolist())


def test_the_criterion_trains(tmp_path: Path):
    example("A criterion")
    log = train(tmp_path, prune__criterion="bn_scale", model__name="resnet20_cifar", data__channels=3)
    assert events(log, "resize")


def test_the_method_cuts_once(tmp_path: Path):
    example("A method")
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
