"""What README shows works: its Python example runs, the files that it names exist."""

import re

import pytest
import torch
from launching import ROOT

import cup

README = (ROOT / "README.md").read_text()
LIBRARY = (ROOT / "cup" / "README.md").read_text()


def test_the_examples_of_pruning_in_a_training_loop_and_of_a_criterion_run(capsys: pytest.CaptureFixture):
    loop, criterion = re.findall(r"```python\n(.*?)```", LIBRARY, re.DOTALL)
    torch.manual_seed(0)
    names: dict = {}
    exec(loop, names)
    dense = names["cup"].complexity(names["torchvision"].models.resnet18(num_classes=10), names["images"]).flops
    after_the_loop = int(capsys.readouterr().out)
    assert dense / after_the_loop == pytest.approx(1.25**2, rel=0.02)
    exec(criterion, names)
    now = cup.complexity(names["model"], names["images"])
    after_the_plan = cup.flops_after(names["model"], names["groups"], names["plan"], now)
    assert after_the_loop / after_the_plan == pytest.approx(1.5, rel=0.02)


def test_every_public_name_of_the_library_is_explained():
    functions = [name for name in cup.__all__ if callable(getattr(cup, name))]
    results = {"ParameterChange", "LayerCost", "Place", "GroupCut", "Complexity"}  # of functions that are explained
    assert [name for name in functions if name not in LIBRARY and name not in results] == []


def test_the_files_that_it_names_exist():
    named = set(re.findall(r"(?:launch|train|cup|data|tests|results|\.ci)/[\w./-]*\w", README))
    made_by_runs = {name for name in named if name.startswith("data/") or "n01440764" in name}
    missing = sorted(name for name in named - made_by_runs if not (ROOT / name).exists())
    assert missing == []


def test_no_placeholder_is_left():
    assert not re.findall(r"\b[A-Z]+_[A-Z]+\b", README)
