"""Which recipe a command line trains, and that options mean the same on either side of it."""

from pathlib import Path

import pytest
from launching import TINY, launch, write_image_folder

from train.config import parse_config
from train.errors import ConfigError
from train.log.rundir import RunDir
from train.recipes import RECIPES, recipes, with_recipe_first


def parsed(*words: str) -> object:
    return parse_config(with_recipe_first(words), "train.py", "")


def test_every_recipe_has_a_name_and_a_line():
    assert recipes().keys() == {file.stem for file in RECIPES.glob("*.yaml")}
    assert all(len(what) > 20 for what in recipes().values())


@pytest.mark.parametrize("word", ["--recipe=resnet50_imagenet", "--recipe=resnet50-imagenet"])
def test_a_recipe_by_its_name(word: str):
    assert with_recipe_first([word]) == ["--config", str(RECIPES / "resnet50_imagenet.yaml")]


def test_options_mean_the_same_before_and_after_the_recipe():
    before, after = (
        parsed("--optim.lr", "0.7", "--config", str(TINY)),
        parsed("--config", str(TINY), "--optim.lr", "0.7"),
    )
    assert before == after
    assert before.optim.lr == 0.7
    assert parsed("--optim.lr=0.7", "--recipe", "demo").optim.lr == 0.7


def test_files_given_one_after_the_other_stay_in_their_order(tmp_path: Path):
    (tmp_path / "more.yaml").write_text("optim: {lr: 0.3}")
    assert parsed("--config", str(TINY), "--config", str(tmp_path / "more.yaml")).optim.lr == 0.3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.path", "photos"], "--data.path without a recipe: choose one with --recipe NAME (demo, "),
        (["--model.name=vgg16", "--data.path=photos"], "--data.path and --model.name without a recipe"),
        (["--recipe", "resnet50_imagnet"], "(did you mean resnet50_imagenet?), allowed: demo, "),
        (["--recipe", "imagenet-resnet50"], "(did you mean resnet50_imagenet?), allowed: demo, "),
        (["--model.weights", "weights.pth"], "--model.weights without a recipe"),
        (["--recipe", "../../x"], "allowed: demo, "),
        (["--recipe"], "--recipe: found nothing, allowed: demo, "),
        (["--config"], "--config: found nothing, allowed: a YAML file"),
        (["--recipe", "demo", "--config", str(TINY)], "found 2 recipes, allowed: one"),
    ],
)
def test_a_command_line_that_leaves_the_recipe_open_is_an_error(words: list[str], message: str):
    with pytest.raises(ConfigError) as caught:
        with_recipe_first(words)
    assert message in str(caught.value)


def test_the_first_line_names_the_recipe_and_a_finished_run_is_followed_by_another(tmp_path: Path):
    arguments = ["--run.root", "runs", "--config", str(TINY), "--train.epochs", "1", "--prune.last_epoch", "1"]
    first, second = (launch("launch/train.py", arguments, tmp_path) for _ in range(2))
    assert first.stdout.splitlines()[0].startswith("recipe ")
    assert first.stdout.splitlines()[0].endswith("tests/helpers/tiny.yaml")
    assert "new run" not in first.stdout
    assert "note: runs/tiny is finished: this is a new run, tiny-2" in second.stdout
    assert RunDir(tmp_path / "runs" / "tiny-2").closing_event() is not None


def test_data_of_ones_own_with_no_recipe_trains_nothing(tmp_path: Path):
    data = write_image_folder(tmp_path / "photos")
    result = launch("launch/train.py", ["--data.path", str(data)], tmp_path)
    assert result.returncode == 2
    [line] = result.stderr.splitlines()
    assert line.startswith("error: --data.path without a recipe")
    assert not (tmp_path / "runs").exists()


def test_the_recipes_are_listed(tmp_path: Path):
    result = launch("launch/train.py", ["--recipe", "list"], tmp_path)
    assert result.returncode == 0
    assert [line.split()[0] for line in result.stdout.splitlines()] == list(recipes())
