"""The recipes: each parses, and the commands in its header are about itself and parse, too."""

import re
import shlex
from pathlib import Path

import pytest
from launching import ROOT

from launch.prepare import _parser as prepare_parser
from launch.prune import _parse as parse_prune
from train.config import RunConfig, parse_config

RECIPES = sorted((ROOT / "launch/configs").glob("*.yaml"))
DENSE_GFLOPS = {"resnet18": 3.637229544, "resnet34": 7.340368872, "resnet50": 8.212012520}
# (dense GFLOPs, published GFLOPs that the target comes of, where the header says them)
CIFAR_GFLOPS = {
    "resnet56": (0.252036362, r"stop at ([\d.]+) GFLOPs"),
    "vgg16": (0.627634186, r"CUP-SS [\d.]+% at ([\d.]+) GFLOPs"),
}


def header(recipe: Path) -> str:
    return "\n".join(line[2:] for line in recipe.read_text().splitlines() if line.startswith("#"))


def commands(recipe: Path) -> list[list[str]]:
    """What the header tells to type: indented lines, a backslash at the end going on in the next one."""
    text = re.sub(r"\\\n\s*", "", header(recipe))
    return [shlex.split(line) for line in text.splitlines() if line.startswith("  ")]


def trainings(recipe: Path) -> list[RunConfig]:
    configs = []
    for command in commands(recipe):
        if command[0] == "torchrun":
            arguments = command[command.index("launch/train.py") + 1 :]
            configs.append(parse_config(arguments, "train.py", str(ROOT / "launch/configs/demo.yaml")))
    return configs


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_commands_in_a_recipe_are_its_own_and_parse(recipe: Path):
    name = f"launch/configs/{recipe.name}"
    assert recipe.stem == "demo" or name in header(recipe)
    for command in commands(recipe):
        named = re.findall(r"launch/configs/\S+\.yaml", " ".join(command))
        assert set(named) <= {name}, f"{recipe.name} tells to run {named}"
        if command[:2] == ["python", "launch/prune.py"]:
            parse_prune(command[2:])
        elif command[:2] == ["python", "launch/prepare.py"]:
            assert prepare_parser().parse_args(command[2:]).path is not None
        else:
            assert command[0] == "torchrun"
    first, *others = trainings(recipe)
    assert first == parse_config(["--config", name], "train.py", name)
    names = [config.run.name for config in (first, *others)]
    assert len(set(names)) == len(names), "two runs of one name"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_has_a_dense_run_to_be_measured_against(recipe: Path):
    if recipe.stem == "demo":  # demo_dense.yaml is the other half
        return
    dense = [config for config in trainings(recipe) if not config.prune.shrinks and config.model.checkpoint is None]
    assert len(dense) == 1


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_what_is_cut_is_the_dense_run_and_what_is_retrained_is_the_cut(recipe: Path):
    configs = trainings(recipe)
    full = [config.run for config in configs if not config.prune.shrinks and config.model.checkpoint is None]
    cuts = [parse_prune(command[2:]) for command in commands(recipe) if command[1] == "launch/prune.py"]
    assert [cut.source for cut in cuts] == [f"{run.root}/{run.name}/last.pt" for run in full[: len(cuts)]]
    assert [str(cut.out) for cut in cuts] == [config.model.checkpoint for config in configs if config.model.checkpoint]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_hardware_and_whether_it_was_run(recipe: Path):
    if not recipe.stem.startswith("demo"):
        assert "Hardware:" in header(recipe) and re.search(r"Not run by us|Measured", header(recipe))


@pytest.mark.parametrize("network", DENSE_GFLOPS)
def test_the_target_of_the_papers_recipes_follows_from_the_stop_value(network: str):
    recipe = ROOT / f"launch/configs/{network}_imagenet.yaml"
    [stop] = re.findall(r"stop at ([\d.]+) GFLOPs", header(recipe))
    assert trainings(recipe)[0].prune.target_reduction == pytest.approx(DENSE_GFLOPS[network] / float(stop), abs=5e-4)


@pytest.mark.parametrize("network", CIFAR_GFLOPS)
def test_the_target_of_the_cifar_recipes_follows_from_the_published_flops(network: str):
    dense, pattern = CIFAR_GFLOPS[network]
    recipe = ROOT / f"launch/configs/{network}_cifar10.yaml"
    [cut] = re.findall(pattern, header(recipe))
    assert trainings(recipe)[0].prune.target_reduction == pytest.approx(dense / float(cut), abs=5e-3)
