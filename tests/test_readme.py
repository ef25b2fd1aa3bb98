"""What README and docs show works: links lead somewhere, files and settings exist, examples run, commands parse."""

import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import get_args

import pytest
import torch
from launching import ROOT, train
from pages import anchors, broken_links, code_blocks, commands

import cup
from launch import bench, compare, doctor, evaluate, export, plan, prepare, prune, report, search
from train.checkpoint.file import load_checkpoint
from train.config import parse_config
from train.errors import ConfigError
from train.log.ledger import Kind
from train.recipes import with_recipe_first
from train.renamed import NEW_NAMES

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS, *sorted((ROOT / "cup").glob("*.md"))]
TEXT = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
LIBRARY = TEXT["cup/README.md"]
SCRIPTS = {
    "bench": bench,
    "compare": compare,
    "doctor": doctor,
    "evaluate": evaluate,
    "export": export,
    "plan": plan,
    "prepare": prepare,
    "prune": prune,
    "report": report,
    "search": search,
}
IN_PLACE_OF_NAMES = {"SEED": "1", "HOST:29500": "localhost:29500"}

each_page = pytest.mark.parametrize("name", TEXT)


def every_command() -> list[tuple[str, str]]:
    return [(name, line) for name, page in TEXT.items() for line in commands(page)]


def test_the_front_page_stays_short():
    assert len(TEXT["README.md"].splitlines()) <= 160


@each_page
def test_links_lead_to_files_and_headings(name: str):
    assert list(broken_links(ROOT / name)) == []


def test_the_link_checker_finds_what_is_broken(tmp_path: Path):
    (tmp_path / "other.md").write_text("# One, two\n## A b\n## A b\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Here\n[a](other.md#one-two) [b](other.md#a-b-1) [c](#here) [d](https://example.org/x)\n"
        "[e](other.md#three) [f](gone.md) ![g](gone.png) [h](#there)\n```\n# not a heading [i](code.md)\n```\n"
    )
    assert list(broken_links(page)) == ["other.md#three", "gone.md", "gone.png", "#there"]
    assert anchors(page.read_text()) == {"here"}


def test_every_page_is_reached_from_the_front_page():
    assert [page.name for page in DOCS if f"](docs/{page.name})" not in TEXT["README.md"]] == []


@each_page
def test_the_files_that_it_names_exist(name: str):
    rooms = r"(?<![\w/-])(?:launch|train|cup|data|tests|results|docs|\.ci)/[\w./-]*\w"
    named = set(re.findall(rooms, TEXT[name])) - TO_BE_WRITTEN
    missing = sorted(file for file in named if not (ROOT / file).exists())
    assert missing == []


@each_page
def test_the_settings_that_it_names_exist(name: str):
    known = set(re.findall(r"^\| `([\w.]+)` \|", TEXT["docs/configuration.md"], re.MULTILINE))
    if name == "docs/methods.md":  # it says what became of the older ones
        known |= set(NEW_NAMES)
    sections = "|".join({setting.split(".")[0] for setting in known})
    named = re.findall(rf"`(?:--)?((?:{sections})\.\w[\w.]*\*?)(?: [^`]+|: [^`]+)?`", TEXT[name])
    files = (".py", ".md", ".txt", ".safetensors")
    unknown = [
        setting
        for setting in named
        if not setting.endswith(files) and not any(re.fullmatch(setting.replace("*", r"\w*"), one) for one in known)
    ]
    assert unknown == []


def test_the_settings_that_the_code_tells_a_user_to_give_exist():
    known = set(re.findall(r"^\| `([\w.]+)` \|", TEXT["docs/configuration.md"], re.MULTILINE)) | set(NEW_NAMES)
    sources = [path for room in ("cup", "data", "launch", "train") for path in (ROOT / room).rglob("*.*")]
    told = {
        (str(path.relative_to(ROOT)), setting)
        for path in sources
        if path.suffix in (".py", ".yaml", ".sh")
        for setting in re.findall(r"--([a-z]+(?:\.[a-z_]+)+)", path.read_text(encoding="utf-8"))
    }
    assert len(told) > 20
    assert sorted((path, setting) for path, setting in told if setting not in known) == []


def test_every_older_name_of_a_setting_is_explained():
    rows = [row.split(" | ") for row in TEXT["docs/methods.md"].splitlines() if row.startswith("| `")]
    renamed = {old: new for old, new in NEW_NAMES.items() if new != old.replace("cup.", "prune.")}
    unexplained = [
        old
        for old, new in renamed.items()
        if not any(f"`{old}" in row[0] and f"`{new}" in row[1] for row in rows if len(row) == 2)
    ]
    assert unexplained == []


def test_the_entries_of_a_checkpoint_are_those_of_the_page(tmp_path: Path):
    section = TEXT["docs/training.md"].partition("## What a checkpoint holds")[2].partition("\n## ")[0]
    explained = {
        entry for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for entry in re.findall(r"\w+", row)
    }
    train(tmp_path, train__epochs=1, prune__last_epoch=1)
    assert explained == set(load_checkpoint(tmp_path / "tiny" / "last.pt"))


def test_the_kinds_of_seconds_are_those_of_the_ledger():
    section = TEXT["docs/report.md"].partition("## How seconds become GPU hours")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(get_args(Kind))


def test_the_page_of_settings_is_current():
    spec = importlib.util.spec_from_file_location("configuration", ROOT / "docs" / "configuration.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert TEXT["docs/configuration.md"] == module.configuration_page(), "run: python docs/configuration.py"


@each_page
def test_the_scripts_that_its_commands_start_exist(name: str):
    scripts = [word for line in commands(TEXT[name]) for word in line.split() if word.endswith((".py", ".sh"))]
    assert [script for script in scripts if not (ROOT / script).exists()] == []


TO_BE_WRITTEN = {"cup/criteria/read_least.py", "train/methods/one_shot.py"}
"""The files that docs/extending.md tells how to write."""


@pytest.mark.parametrize(
    "line", sorted({line for _, line in every_command() if "launch/train.py" in line and "slurm" not in line})
)
def test_a_training_command_parses(line: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    words = [IN_PLACE_OF_NAMES.get(word, word) for word in shlex.split(line)]
    parse_config(with_recipe_first(words[words.index("launch/train.py") + 1 :]), "train.py", "")


@pytest.mark.parametrize("line", sorted({line for _, line in every_command() if "launch/train.py" not in line}))
def test_the_options_of_a_command_exist(line: str, capsys: pytest.CaptureFixture):
    script = re.search(r"launch/(\w+)\.py", line)
    if script is None:
        return
    words = shlex.split(line[script.end() :])
    sub_command = words[:1] if script[1] in ("bench", "prepare") else []
    with pytest.raises(SystemExit):
        SCRIPTS[script[1]].main([*sub_command, "--help"])
    help_text = capsys.readouterr().out
    assert [word for word in words if word.startswith("--") and word not in help_text] == []


def test_a_command_that_is_wrong_is_found():
    with pytest.raises(ConfigError, match="unknown key"):
        test_a_training_command_parses("torchrun launch/train.py --no.such 1", pytest.MonkeyPatch())


def run_example(code: str) -> dict:
    """Run an example as a file of its own and return its names."""
    torch.manual_seed(0)
    names: dict = {"__name__": "example"}
    exec(compile(code, "example", "exec"), names)
    return names


def only_example(page: str) -> str:
    (example,) = code_blocks(page, "python")
    return example


def test_the_example_on_the_front_page_runs(capsys: pytest.CaptureFixture):
    names = run_example(only_example(TEXT["README.md"]))
    assert len(only_example(TEXT["README.md"]).replace("\n\n", "\n").splitlines()) <= 11  # "in ten lines", and imports
    after = cup.complexity(names["model"], names["images"]).flops
    dense = cup.complexity(names["torchvision"].models.resnet18(num_classes=10), names["images"]).flops
    assert dense / after == pytest.approx(1.25, rel=0.01)
    assert "layer1.0.conv1" in capsys.readouterr().out


def test_the_examples_of_pruning_in_a_training_loop_and_of_a_criterion_run(capsys: pytest.CaptureFixture):
    loop, criterion = code_blocks(LIBRARY, "python")
    names = run_example(loop)
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


def test_the_numbers_on_the_front_page_have_their_provenance():
    table = TEXT["README.md"].partition("## Results")[2].partition("\n\nMeasured")[0]
    numbers = set(re.findall(r"\d+\.\d+", table))
    assert len(numbers) > 10
    assert sorted(number for number in numbers if number not in TEXT["docs/results.md"]) == []


@each_page
def test_no_placeholder_is_left(name: str):
    words = re.sub(r"```.*?```|`[^`]*`", "", TEXT[name], flags=re.DOTALL)
    assert not re.findall(r"\b(?:[A-Z]+_[A-Z]+|TODO|TBD|FIXME|XXX)\b", words)


def test_the_notebook_runs(capsys: pytest.CaptureFixture):
    cells = json.loads((ROOT / "docs/library.ipynb").read_text(encoding="utf-8"))["cells"]
    assert all(cell["outputs"] == [] for cell in cells if cell["cell_type"] == "code"), "stored outputs grow old"
    run_example("\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"))
    assert "FR 1.5" in capsys.readouterr().out
