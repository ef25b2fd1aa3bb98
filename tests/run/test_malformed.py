"""200 malformed inputs, drawn with seeds: one clear line and a non-zero code for each, and nothing overwritten."""

import copy
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launching import EVERY_STEP, TINY, broken_off, train, write_network

from launch import evaluate, export, prune
from launch import train as launch_train
from train.checkpoint.file import load_checkpoint, save_checkpoint

CONFIGURATIONS, FILES, CONTENTS, DIRECTORIES = 60, 75, 35, 30


def values(generator: random.Random) -> Any:
    """Something that hardly any setting takes."""
    return generator.choice(
        [
            -1,
            -0.5,
            float("nan"),
            float("-inf"),
            "",
            "nonsense",
            [],
            [1, 2, 3],
            {"a": 1},
            {},
            "\N{SNOWMAN}",
            "a/b",
            -(10**30),
            10**30,
        ]
    )


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class Checker:
    """Runs a script in this process and checks how it refuses."""

    def __init__(self, capfd: pytest.CaptureFixture, folder: Path) -> None:
        self.capfd, self.folder = capfd, folder
        self.problems: list[str] = []

    def refuses(self, main: Callable[[list[str]], int], arguments: list[str], what: str) -> str:
        """Note in `problems` what is not as it should be; returns the line that was said."""
        before = contents(self.folder)
        self.capfd.readouterr()
        try:
            code = main(arguments)
        except Exception as error:
            code = repr(error)
        said = self.capfd.readouterr()
        lines = [line for line in said.err.splitlines() if line] or ["nothing"]
        after = contents(self.folder)
        wrong = {
            f"exit code {code}": code not in (1, 2),
            f"said {said.err}": len(lines) != 1 or not lines[0].startswith("error: ") or len(lines[0]) < 30,
            "overwrote something": {path: after.get(path) for path in before} != before,
            "left half a file": any(path.suffix == ".part" for path in after),
        }
        self.problems += [f"{what}: {problem}" for problem, is_so in wrong.items() if is_so]
        return lines[0]


@pytest.fixture
def checker(capfd: pytest.CaptureFixture, tmp_path: Path) -> Iterator[Checker]:
    checker = Checker(capfd, tmp_path)
    yield checker
    assert not checker.problems, "\n".join(checker.problems)


def mutated(config: dict[str, Any], generator: random.Random) -> str:
    """Spoil a configuration in place; returns how."""
    section = generator.choice(sorted(config))
    key = generator.choice(sorted(config[section]))
    kind = generator.choice(["key", "section", "type", "range", "list", "text"])
    if kind == "key":
        letters = list(key)
        letters.insert(generator.randrange(len(letters) + 1), generator.choice("xyz_0"))
        config[section]["".join(letters)] = config[section].pop(key)
    elif kind == "section":
        config[section + generator.choice("sx_")] = config.pop(section)
    elif kind == "list":
        config[section] = [config[section]]
    elif kind == "text":
        config[section] = "nonsense"
    else:
        config[section][key] = values(generator) if kind == "range" else generator.choice([{"x": [1]}, [[1]], {}])
    return f"{kind} of {section}.{key}: {config.get(section)!r}"


def resolved() -> dict[str, Any]:
    from train.config import parse_config

    return parse_config(["--config", str(TINY)], "train.py", "").to_dict()


def accepts(config: dict[str, Any]) -> bool:
    """Whether a mutation happened to leave a valid configuration, by the plain data alone."""
    from train.config import config_from_dict

    try:
        config_from_dict(config)
    except Exception:  # types are checked by the parser of recipes; here they fail as they happen to
        return False
    return True


def test_configurations_with_mutated_keys_types_and_ranges(checker: Checker, tmp_path: Path):
    generator, whole = random.Random(1), resolved()
    whole["run"]["root"] = str(tmp_path / "runs")
    refused = 0
    while refused < CONFIGURATIONS:
        config = copy.deepcopy(whole)
        how = mutated(config, generator)
        if accepts(config):
            continue
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
        checker.refuses(launch_train.main, ["--config", str(tmp_path / "recipe.yaml")], how)
        assert not (tmp_path / "runs").exists(), how
        refused += 1


@pytest.fixture(scope="module")
def broken_off_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory as a crash leaves it, in the middle of epoch 2, with two checkpoints."""
    root = tmp_path_factory.mktemp("broken_off")
    with pytest.MonkeyPatch.context() as patch, broken_off(patch, at_step=7):
        train(root, **EVERY_STEP, run__keep=2)
    return root / "tiny"


READERS = {
    "evaluate": lambda path: (evaluate.main, [str(path)]),
    "prune": lambda path: (prune.main, [str(path), "--t", "0.3", "--out", str(path.with_name("cut.pt"))]),
    "export": lambda path: (export.main, [str(path), "--format", "torch"]),
    "model.from": lambda path: (
        launch_train.main,
        ["--config", str(TINY), "--run.root", str(path.parent / "runs"), "--model.checkpoint", str(path)],
    ),
}


def test_checkpoints_cut_short_bit_flipped_and_foreign(checker: Checker, tmp_path: Path, broken_off_run: Path):
    generator = random.Random(2)
    whole = (broken_off_run / "last.pt").read_bytes()
    foreign = [
        b"", b"junk", b"PK\x03\x04" + bytes(100), b"\x80\x04\x95", yaml.safe_dump(resolved()).encode(),
        (broken_off_run / "log.jsonl").read_bytes(),
    ]  # fmt: skip
    path = tmp_path / "some.pt"
    for number in range(FILES):
        kind = generator.choice(["cut short", "bit", "bytes gone", "foreign", "folder"])
        content = bytearray(whole)
        if kind == "cut short":
            # One byte less than all of it leaves the archive whole but for its comment.
            content = content[: generator.randrange(len(whole) - 100)]
        elif kind == "bit":
            place = generator.randrange(len(whole) - 75)
            content[place] ^= 1 << generator.randrange(8)
        elif kind == "bytes gone":
            place = generator.randrange(len(whole) - 100)
            del content[place : place + generator.randrange(1, 50)]
        elif kind == "foreign":
            content = bytearray(generator.choice(foreign))
        if kind == "folder":
            path.mkdir()
        else:
            path.write_bytes(content)
        main, arguments = READERS[generator.choice(sorted(READERS))](path)
        said = checker.refuses(main, arguments, f"{number}: {kind}")
        assert "some.pt" in said
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def spoiled(content: dict[str, Any], generator: random.Random) -> str:
    """Take away or replace something in a checkpoint, any depth; returns where."""
    where: list[Any] = []
    place: Any = content
    while True:
        keys = sorted(place, key=str) if isinstance(place, dict) else list(range(len(place)))
        key = generator.choice(keys)
        where.append(key)
        child = place[key]
        if not isinstance(child, dict | list) or not child or generator.random() < 0.5:
            break
        place = child
    if isinstance(place, dict) and generator.random() < 0.4:
        del place[key]
        return f"{where} gone"
    if place[key] is None:
        place[key] = "nonsense"
        return f"{where} = 'nonsense'"
    place[key] = generator.choice(["nonsense", None, torch.zeros(3, 5), [None], {"a": "b"}])
    return f"{where} = {place[key]!r}"


# What changes no number of a run that goes on: words for readers, and what the report alone reads.
UNREAD = {"config", "widths", "gpu_hours", "last_line", "best_top5", "gpu_hours_before", "compiled", "format", "run_id"}


def test_checkpoints_whose_content_is_not_as_written(checker: Checker, tmp_path: Path, broken_off_run: Path):
    """Sound files with something missing or of another kind: refused by the resume, or nothing that it needs."""
    generator, refused = random.Random(3), 0
    while refused < CONTENTS:
        root = tmp_path / str(refused)
        shutil.copytree(broken_off_run, root / "tiny")
        config = yaml.safe_load((root / "tiny/config.yaml").read_text())
        config["run"]["root"] = str(root)
        (root / "recipe.yaml").write_text(yaml.safe_dump(config))
        for other in ("last-1.pt", "best.pt"):
            (root / "tiny" / other).unlink()
        content = load_checkpoint(root / "tiny/last.pt")
        how = spoiled(content, generator)
        if not any(f"'{key}'" in how for key in UNREAD):
            save_checkpoint(root / "tiny/last.pt", content)
            checker.refuses(launch_train.main, ["--config", str(root / "recipe.yaml")], how)
            refused += 1
        shutil.rmtree(root)


def test_run_directories_that_are_broken(checker: Checker, tmp_path: Path, broken_off_run: Path):
    generator = random.Random(4)

    def junk(path: Path) -> None:
        path.write_bytes(bytes(generator.randrange(256) for _ in range(200)) + b"\n5\n")

    def not_json(path: Path) -> None:
        lines = path.read_text().splitlines()
        lines.insert(
            generator.randrange(len(lines)), generator.choice(['{"event": "ep', "5", "null", "[]", "nonsense"])
        )
        path.write_text("\n".join(lines) + "\n")

    def folder(path: Path) -> None:
        path.unlink()
        path.mkdir()

    def gone(path: Path) -> None:
        path.unlink()

    def words(path: Path) -> None:
        path.write_text(generator.choice(["nonsense", "- a\n- b\n", "5: {6: 7}\n", "run: [1]\n", "{", "run: {}\n"]))

    breaks = [
        *[("log.jsonl", action) for action in (junk, not_json, folder)],
        ("config.yaml", folder),
        *[("*.pt", action) for action in (junk, folder)],
    ]
    for number in range(DIRECTORIES):
        root = tmp_path / str(number)
        shutil.copytree(broken_off_run, root / "tiny")
        config = yaml.safe_load((root / "tiny/config.yaml").read_text())
        config["run"]["root"] = str(root)
        (root / "recipe.yaml").write_text(yaml.safe_dump(config))
        name, action = breaks[number % len(breaks)]
        for path in (root / "tiny").glob(name):
            action(path)
        checker.refuses(
            launch_train.main, ["--config", str(root / "recipe.yaml")], f"{number}: {name} {action.__name__}"
        )
        shutil.rmtree(root)


class Payload:
    """An object whose unpickling runs code."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("place", ["top", "model", "rng"])
def test_a_checkpoint_with_code_in_it_is_refused_by_every_reader_and_not_run(
    checker: Checker, tmp_path: Path, broken_off_run: Path, place: str
):
    """With a checksum that is right: whoever made the file could make that, too."""
    content = load_checkpoint(broken_off_run / "last.pt")
    payload = Payload(tmp_path / "was_here")
    if place == "top":
        content["payload"] = payload
    elif place == "model":
        content["model"]["conv1.weight"] = payload
    else:
        content["ranks"][0]["rng"] = payload
    save_checkpoint(tmp_path / "evil.pt", content)
    for reader in READERS.values():
        said = checker.refuses(*reader(tmp_path / "evil.pt"), what=place)
        assert "nothing in it was run" in said
    assert not (tmp_path / "was_here").exists()


def test_a_network_alone_is_nothing_to_go_on_from(checker: Checker, tmp_path: Path, broken_off_run: Path):
    root = tmp_path / "runs"
    shutil.copytree(broken_off_run, root / "tiny")
    write_network(root / "tiny/last.pt")
    arguments = yaml.safe_load((root / "tiny/config.yaml").read_text())
    arguments["run"]["root"] = str(root)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(arguments))
    said = checker.refuses(launch_train.main, ["--config", str(tmp_path / "recipe.yaml")], "network alone")
    assert "--model.checkpoint" in said
