"""Parsing: what a recipe and overrides may say, and the one line that says what was wrong."""

import copy
from pathlib import Path

import pytest
import yaml
from launching import ROOT, TINY

from train.cli import exit_code_of
from train.config import RunConfig, config_from_dict, differing_keys, parse_config
from train.errors import ConfigError
from train.renamed import with_new_names

META = ("--prune.method", "meta_pruning", "--data.held_out", "1")


def parse(*arguments: str) -> RunConfig:
    return parse_config(list(arguments), "train.py", str(TINY))


def test_without_a_recipe_the_default_one_is_taken_and_overrides_win():
    config = parse("--optim.lr", "0.5", "--optim.milestones", "[2, 4]")
    assert config.model.name == "lenet"
    assert config.optim.lr == 0.5
    assert config.optim.milestones == (2, 4)


def test_a_recipe_replaces_the_default_one(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("model:\n  name: resnet18\n")
    config = parse("--config", str(tmp_path / "mine.yaml"))
    assert config.model.name == "resnet18"
    assert config.train.epochs == RunConfig().train.epochs


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--prune.hard_ramp.slope", "steep"], ["prune.hard_ramp.slope", "'steep'", "a number"]),
        (["--prune.hard_ramp.kind", "up"], ["prune.hard_ramp.kind", "'up'", "threshold or reduction"]),
        (["--train.epochs", "0"], ["train.epochs", "0", "a whole number from 1"]),
        (["--train.epochs", "2.5"], ["train.epochs", "2.5", "a whole number"]),
        (["--train.ema_decay", "1"], ["train.ema_decay", "1", "below 1"]),
        (["--prune.target_reduction", "0.5"], ["prune.target_reduction", "0.5", "above 1"]),
        (["--prune.target_reduction", "null"], ["prune.target_reduction", "None", "kind: reduction needs it"]),
        (["--prune.target_reduction", "much"], ["prune.target_reduction", "'much'", "a number or null"]),
        (["--model.name", "resnet51"], ["model.name", "'resnet51'", "resnet50"]),
        (["--model.checkpoint", ""], ["model.checkpoint", "''", "a file"]),
        (["--model.widths", ""], ["model.widths", "''", "a file"]),
        (["--model.width", "0"], ["model.width", "0", "above 0, up to 1"]),
        (["--model.width", "1.5"], ["model.width", "1.5", "above 0, up to 1"]),
        (["--model.width", "0.5", "--model.widths", "x"], ["model.widths", "'x' beside width", "one of them"]),
        (["--model.checkpoint", "x", "--model.width", "0.5"], ["model.width", "0.5 beside checkpoint", "one of them"]),
        ([*META, "--data.held_out", "0"], ["data.held_out", "0", "a whole number from 1 (prune.method: meta_pruning"]),
        ([*META, "--model.width", "0.5"], ["model.width", "0.5", "allowed: 1 (prune.method: meta_pruning"]),
        ([*META, "--model.checkpoint", "x.pt"], ["model.checkpoint", "'x.pt'", "null (prune.method: meta_pruning"]),
        ([*META, "--model.widths", "x.json"], ["model.widths", "'x.json'", "null (prune.method: meta_pruning"]),
        ([*META, "--prune.round_to", "measured"], ["prune.round_to", "'measured'", "a whole number (prune.method"]),
        ([*META, "--prune.meta_pruning.scales", "1"], ["prune.meta_pruning.scales", "1", "a whole number from 2"]),
        ([*META, "--prune.meta_pruning.narrowest", "1"], ["prune.meta_pruning.narrowest", "1", "below 1"]),
        (["--data.held_out", "-1"], ["data.held_out", "-1", "a whole number from 0"]),
        (["--model.checkpont", "cut.pt"], ["model.checkpont", "unknown key", "did you mean model.checkpoint?"]),
        (["--cup.slop", "1"], ["cup.slop", "unknown key", "did you mean prune.hard_ramp.slope?"]),
        (["--prune.method", "magic"], ["prune.method", "'magic'", "none, hard_ramp, soft_rate, prune_train, early"]),
        (["--prune.method", "soft_rate", "--prune.soft_rate.rate", "1"], ["prune.soft_rate.rate", "1", "below 1"]),
        (
            ["--prune.method", "soft_rate", "--prune.soft_rate.rate", "0.3"],
            ["prune.soft_rate.rate", "rate 0.3 and target_reduction 2.0", "one of them"],
        ),
        (
            ["--prune.method", "soft_rate", "--prune.target_reduction", "null"],
            ["prune.soft_rate.rate", "rate None and target_reduction None", "one of them"],
        ),
        (["--prune.prune_train.share", "1"], ["prune.prune_train.share", "1", "below 1"]),
        (["--prune.prune_train.below", "0"], ["prune.prune_train.below", "0", "above 0"]),
        (["--prune.early.patience", "0"], ["prune.early.patience", "0", "from 1"]),
        (["--prune.early.similarity", "2"], ["prune.early.similarity", "2", "up to 1"]),
        (["--prune.early.first_epoch", "0"], ["prune.early.first_epoch", "0", "from 1"]),
        (
            ["--prune.method", "early", "--prune.early.first_epoch", "3", "--prune.last_epoch", "2"],
            ["prune.early.first_epoch", "3", "up to last_epoch (2)"],
        ),
        (
            ["--prune.method", "early", "--prune.target_reduction", "null"],
            ["prune.target_reduction", "None", "prune.method: early needs it"],
        ),
        (["--prune.criterion", "l7"], ["prune.criterion", "'l7'", "cup, l1"]),
        (["--prune.hard_ramp", "1"], ["prune.hard_ramp", "settings"]),
        (["--prune.hard_ramp.slope", "-1"], ["prune.hard_ramp.slope", "-1", "from 0"]),
        (["--prune.min_channels", "0"], ["prune.min_channels", "0", "from 1"]),
        (["--data.path", ""], ["data.path", "''", "a folder"]),
        (["--prune.last_epoch", "7"], ["prune.last_epoch", "7", "up to train.epochs (3)"]),
        (["--optim.milestones", "[4, 2]"], ["optim.milestones", "(4, 2)", "ascending"]),
        (["--optim.warmup_epochs", "9"], ["optim.warmup_epochs", "9", "up to train.epochs (3)"]),
        (["--data.crop_scale", "[0.5, 2]"], ["data.crop_scale", "(0.5, 2"]),
        (["--data.crop_scale", "[1, 2, 3]"], ["data.crop_scale", "[1, 2, 3]", "2"]),
        (["--data.resize_size", "4"], ["data.resize_size", "4", "28"]),
        (["--data.color_jitter", "[0.4, 0.4, 0.4, 0.6]"], ["data.color_jitter", "hue 0 to 0.5"]),
        (
            ["--data.channels", "1", "--data.auto_augment", "randaugment"],
            ["data.auto_augment", "none with channels: 1"],
        ),
        (["--data.start_size", "300"], ["data.start_size", "300", "0, or 8 to 28"]),
        (["--data.start_size", "24"], ["data.grow_epochs", "0", "from 1 with start_size"]),
        (["--data.start_size", "24", "--data.grow_epochs", "9"], ["data.grow_epochs", "9", "up to train.epochs (3)"]),
        (["--data.randaugment_ops", "6"], ["data.randaugment_ops", "6", "from 1 to 5"]),
        (["--train.mixup", "-1"], ["train.mixup", "-1", "from 0"]),
        (["--run.name", "a/b"], ["run.name", "'a/b'", "no slashes"]),
        (["--run.seed", str(2**32)], ["run.seed", "below 2**32"]),
        (["--run.keep", str(10**30)], ["run.keep", "1 to 1000"]),
        (["--data.image_size", str(10**30)], ["data.image_size", "8 to 16384"]),
        (["--data.synthetic_classes", str(10**30)], ["data.synthetic_classes", "2 to 100,000"]),
        (["--run.device", "tpu"], ["run.device", "'tpu'", "cuda"]),
        (["--config", "missing.yaml"], ["missing.yaml"]),
        (["--nonsense", "1"], ["nonsense", "unknown key", "prune.*"]),
        (["stray"], ["stray"]),
    ],
)
def test_a_wrong_setting_names_the_key_the_value_and_what_is_allowed(
    arguments: list[str], expected: list[str], capfd: pytest.CaptureFixture
):
    assert exit_code_of(lambda: parse(*arguments), debug=False) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert all(words in lines[0] for words in expected), lines[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cup:\n  treshold: 3\n", ["cup.treshold", "unknown key"]),
        ("optimizer:\n  lr: 3\n", ["optimizer", "unknown key"]),
        ("cup: [\n", ["mine.yaml"]),
        ("cup:\n  slope: [1]\n", ["prune.hard_ramp.slope", "a number"]),
        ("- 1\n", ["mine.yaml"]),
    ],
)
def test_a_wrong_recipe_is_one_line(tmp_path: Path, text: str, expected: list[str], capfd: pytest.CaptureFixture):
    (tmp_path / "mine.yaml").write_text(text)
    assert exit_code_of(lambda: parse("--config", str(tmp_path / "mine.yaml")), debug=False) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert all(words in lines[0] for words in expected), lines[0]


def test_a_setting_without_effect_is_named():
    assert parse().without_effect() == []
    notes = parse("--prune.method", "none", "--optim.gamma", "0.5").without_effect()
    assert notes == [
        "no effect with prune.method: none: prune.target_reduction, prune.last_epoch, prune.hard_ramp.kind",
        "no effect with optim.schedule: cosine: optim.gamma",
    ]
    notes = parse("--prune.method", "prune_train", "--prune.criterion", "l1", "--prune.early.patience", "9")
    assert notes.without_effect() == [
        "no effect with prune.method: prune_train: prune.hard_ramp.kind, prune.early.patience",
        "no effect with prune.method: prune_train, which has its own criterion: prune.criterion",
    ]
    thin = parse("--prune.method", "none", "--prune.scope", "all", "--model.width", "0.5").without_effect()
    assert not any("prune.scope" in note for note in thin)
    notes = parse("--data.flip", "0.1", "--data.grow_epochs", "2", "--data.randaugment_ops", "3").without_effect()
    assert notes == [
        "no effect with data.loader: synthetic: data.flip, data.randaugment_ops",
        "no effect with data.auto_augment: none: data.randaugment_ops",
        "no effect with data.start_size: 0: data.grow_epochs",
    ]
    on_disk = ("--data.loader", "folder", "--data.mmap", "false", "--data.decoder_width_hint", "9")
    assert parse(*on_disk, "--data.synthetic_images", "1024").without_effect() == [
        "no effect with data.loader: folder: data.mmap",
        "no effect with no decoding on a GPU: data.decoder_width_hint",
    ]


def test_plain_form_and_back():
    config = parse()
    assert config_from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


OLD_RECIPE = """
model: {name: null, from: cut.pt}
cup:
  enabled: true
  ramp: threshold
  slope: 0.02
  offset: 0.1
  target_reduction: 1.7
  momentum: reset
"""
OLD_OPTIONS = [
    *("--model.name", "null", "--model.from", "cut.pt", "--cup.enabled", "true", "--cup.ramp=threshold"),
    *("--cup.slope", "0.02", "--cup.offset", "0.1", "--cup.target_reduction", "1.7", "--cup.momentum", "reset"),
]


def test_names_of_earlier_versions_are_read_with_a_line_that_says_the_new_ones(tmp_path: Path):
    (tmp_path / "new.yaml").write_text(
        "model: {name: null, checkpoint: cut.pt}\nprune:\n  method: hard_ramp\n  target_reduction: 1.7\n"
        "  momentum: reset\n  hard_ramp: {kind: threshold, slope: 0.02, offset: 0.1}\n"
    )
    (tmp_path / "old.yaml").write_text(OLD_RECIPE)
    new = parse("--config", str(tmp_path / "new.yaml"))
    with pytest.warns(
        UserWarning,
        match=r"cup.slope is now prune.hard_ramp.slope.*model.from is now model.checkpoint"
        r"|model.from is now model.checkpoint.*cup.slope is now prune.hard_ramp.slope",
    ) as seen:
        assert parse("--config", str(tmp_path / "old.yaml")) == new
    assert len(seen) == 1
    (tmp_path / "empty.yaml").write_text("{}\n")
    with pytest.warns(UserWarning, match=r"cup.enabled is now prune.method"):
        assert parse("--config", str(tmp_path / "empty.yaml"), *OLD_OPTIONS) == new
    assert config_from_dict(new.to_dict() | yaml.safe_load(OLD_RECIPE)).model.checkpoint == "cut.pt"
    with pytest.warns(UserWarning):
        assert parse("--cup.enabled", "false").prune.method == "none"


def test_a_setting_that_is_gone_is_read_past_and_told(tmp_path: Path):
    (tmp_path / "old.yaml").write_text("prune: {recalibrate: 20, every: 2}\n")
    with pytest.warns(UserWarning, match=r"prune.recalibrate is gone and does nothing \(no training step"):
        assert parse("--config", str(tmp_path / "old.yaml")).prune.every == 2
    with pytest.warns(UserWarning, match="prune.recalibrate is gone"):
        assert parse("--prune.recalibrate", "20", "--prune.every", "3").prune.every == 3
    stored = parse().to_dict()
    assert config_from_dict(stored | {"prune": stored["prune"] | {"recalibrate": 0}}) == parse()


def test_old_and_new_names_in_one_recipe_are_both_read_and_the_new_one_counts(tmp_path: Path):
    settings = {
        "cup": {"round_to": 4, "target_reduction": 1.5},
        "prune": {"every": 2, "round_to": 8},
        "model": {"from": "cut.pt"},
    }
    before = copy.deepcopy(settings)
    for order in (["cup", "prune", "model"], ["model", "prune", "cup"]):
        found, renamed = with_new_names({section: settings[section] for section in order})
        assert found == {
            "prune": {"every": 2, "round_to": 8, "target_reduction": 1.5},
            "model": {"checkpoint": "cut.pt"},
        }
        assert len(renamed) == 3
    assert settings == before


def test_a_value_is_no_name_of_a_setting():
    with pytest.warns(UserWarning):
        config = parse("--run.name", "config", "--run.seed", "1", "--cup.momentum", "reset")
    assert (config.run.name, config.run.seed, config.prune.momentum) == ("config", 1, "reset")


def test_a_setting_given_by_both_its_names_has_the_later_value():
    with pytest.warns(UserWarning):
        assert parse("--prune.round_to", "2", "--cup.round_to", "8").prune.round_to == 8


def test_without_a_name_and_a_file_the_network_is_resnet50():
    assert parse("--model.name", "null").model.name == "resnet50"


def test_differing_keys_are_named_with_both_values():
    one, other = parse("--optim.lr", "0.2").to_dict(), parse().to_dict()
    assert differing_keys(one, one) == []
    assert differing_keys(one, other) == ["optim.lr (0.05 there, 0.2 now)"]


@pytest.mark.parametrize("recipe", sorted((ROOT / "launch/configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_parses_and_says_how_to_run_it(recipe: Path):
    parse("--config", str(recipe))
    assert "launch/train.py" in recipe.read_text().split("run:")[0]


def test_unknown_stored_keys_are_refused():
    values = parse().to_dict()
    values["optim"]["speed"] = 3
    with pytest.raises(ConfigError, match="optim"):
        config_from_dict(values)


def test_a_stored_section_that_nobody_knows_is_an_error():
    with pytest.raises(ConfigError, match="cup: unknown settings"):
        config_from_dict(parse().to_dict() | {"cup": {"bogus": 1}})
