"""MetaPruning as a user runs it: PruningNet, search, training from scratch, each killed on the way and gone on with."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from launching import launch, options

from train.checkpoint.file import load_checkpoint
from train.log.rundir import read_log

IMAGES = {
    "model__name": "resnet20_cifar",
    "data__channels": 3,
    "data__image_size": 16,
    "data__resize_size": 16,
    "data__synthetic_images": 160,
}
PRUNING_NET = IMAGES | {
    "run__name": "net",
    "run__save_every_minutes": 1e-9,
    "data__held_out": 3,
    "prune__method": "meta_pruning",
    "prune__meta_pruning__hidden": 8,
    "train__ema_decay": 0.9,
}
SEARCH = ["runs/net", "--target-reduction", "2", "--generations", "3", "--population", "5", "--recalibrate", "2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/net, a PruningNet that two ranks trained."""
    folder = tmp_path_factory.mktemp("meta_pruning")
    result = launch("launch/train.py", options(**PRUNING_NET), folder, ranks=2)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def found(trained: Path) -> Path:
    """The same folder, with widths.json and its log, from a search that nothing disturbed."""
    result = search(trained, "widths.json")
    assert result.returncode == 0, result.stderr
    assert "generation 3: 5 networks, best top-1 so far" in result.stdout
    return trained


def search(cwd: Path, out: str, *more: str, ranks: int = 1, script: str = "launch/search.py", **env: str):
    return launch(script, [*SEARCH, "--out", out, *more], cwd, ranks=ranks, **env)


def judged(folder: Path, name: str) -> list[tuple]:
    events = read_log(folder / f"{name}.search.jsonl")
    return [(e["generation"], e["widths"], e["top1"]) for e in events if e["event"] == "candidate"]


def test_a_killed_pruning_net_ends_with_the_bits_of_an_undisturbed_one(trained: Path, tmp_path: Path):
    """SIGKILL of rank 1 at the second step of epoch 2."""
    fault = {"FAULT": "killed", "AT_STEP": "6"}
    killed = launch("tests/helpers/faulty_train.py", options(**PRUNING_NET), tmp_path, ranks=2, **fault)
    assert killed.returncode != 0
    result = launch("launch/train.py", options(**PRUNING_NET), tmp_path, ranks=2)
    assert result.returncode == 0, result.stderr
    logs = [read_log(root / "runs/net/log.jsonl") for root in (tmp_path, trained)]
    assert sum(event["event"] == "run" for event in logs[0]) == 2
    losses = [[(e["train_loss"], e["top1"]) for e in log if e["event"] == "epoch"] for log in logs]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    one, other = (load_checkpoint(root / "runs/net/last.pt") for root in (tmp_path, trained))
    for part in ("model", "ema"):
        assert one[part].keys() == other[part].keys()
        assert all(torch.equal(one[part][key], other[part][key]) for key in one[part])
    momenta = [[s["momentum_buffer"] for s in content["optimizer"]["state"].values()] for content in (one, other)]
    assert all(map(torch.equal, *momenta))


def test_a_killed_search_ends_with_the_widths_of_an_undisturbed_one_on_any_number_of_ranks(found: Path):
    """SIGKILL of rank 1 of two in the second generation; it goes on alone, and its log tells of the time before."""
    fault = {"KILL_RANK": "1", "AT_NETWORK": "4"}
    killed = search(found, "killed.json", ranks=2, script="tests/helpers/faulty_search.py", **fault)
    assert killed.returncode != 0
    so_far = judged(found, "killed")
    assert 5 < len(so_far) < 15 and not (found / "killed.json").exists()
    with (found / "killed.search.jsonl").open("a") as log:
        log.write('{"event": "candi')  # what a kill may leave
    again = search(found, "killed.json")
    assert again.returncode == 0, again.stderr
    assert (found / "killed.json").read_bytes() == (found / "widths.json").read_bytes()
    assert judged(found, "killed") == judged(found, "widths")
    assert judged(found, "killed")[: len(so_far)] == so_far
    spent = [event["rank_s"] for event in read_log(found / "killed.search.jsonl")]
    assert spent == sorted(spent)
    assert not list(found.glob("*.alive"))


def test_a_search_says_what_it_took_and_every_network_is_in_the_window(found: Path):
    events = read_log(found / "widths.search.jsonl")
    networks, done = [event for event in events if event["event"] == "candidate"], events[-1]
    assert done["widths"] == json.loads((found / "widths.json").read_text())
    assert done["top1"] == max(event["top1"] for event in networks)
    assert all(2 <= event["flops_reduction"] <= 2.02 for event in networks)
    assert done["judged"] == len(networks) == 15
    assert networks[-1]["rank_s"] <= 3600 * done["gpu_hours"] <= done["rank_s"]


def test_a_finished_search_started_again_changes_nothing(found: Path):
    before = {name: (found / name).read_bytes() for name in ("widths.json", "widths.search.jsonl")}
    (found / "widths.json").unlink()
    assert search(found, "widths.json").returncode == 0
    assert {name: (found / name).read_bytes() for name in before} == before


def test_the_widths_are_trained_from_scratch(found: Path):
    settings = IMAGES | {"run__name": "winner", "prune__method": "none", "model__widths": "widths.json"}
    result = launch("launch/train.py", options(**settings), found, ranks=2)
    assert result.returncode == 0, result.stderr
    events = read_log(found / "runs/winner/log.jsonl")
    assert events[0]["train_images"] == 160  # the images held out, too
    assert 2 <= events[-1]["flops_reduction"] <= 2.02
    widths = next(event["widths"] for event in events if event["event"] == "epoch")
    assert widths == json.loads((found / "widths.json").read_text())


def test_another_search_is_not_written_over(found: Path):
    content = (found / "widths.search.jsonl").read_bytes()
    expected = "widths.search.jsonl holds another search: seed (0 there"
    assert_one_line(search(found, "widths.json", "--seed", "1"), expected)
    assert (found / "widths.search.jsonl").read_bytes() == content


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["runs/net", "--target-reduction", "1"], "target_reduction: found 1.0, allowed: a number above 1"),
        (["runs/net", "--target-reduction", "2", "--mutation", "2"], "mutation: found 2.0, allowed: above 0, up to 1"),
        (["runs/net", "--target-reduction", "99"], "FLOPs: the allowed widths lead to"),
        (["runs/none", "--target-reduction", "2"], "no file at runs/none"),
        (["runs", "--target-reduction", "2"], "runs holds no last.pt"),
    ],
)
def test_a_wrong_search_is_one_line_and_leaves_no_file(trained: Path, arguments: list[str], expected: str):
    result = launch("launch/search.py", [*arguments, "--out", "wrong.json"], trained)
    assert_one_line(result, expected)
    assert not list(trained.glob("wrong*"))


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("launch/evaluate.py", ["runs/net/last.pt"]),
        ("launch/train.py", options(**IMAGES, model__checkpoint="runs/net/last.pt", run__name="from")),
        ("launch/prune.py", ["runs/net/last.pt", "--reduction", "2"]),
    ],
)
def test_a_pruning_net_is_no_network_to_go_on_with(trained: Path, script: str, arguments: list[str]):
    assert_one_line(launch(script, arguments, trained), "it holds a PruningNet, in which launch/search.py finds widths")


def test_an_ordinary_run_is_nothing_to_search_in(trained: Path, tmp_path: Path):
    assert launch("launch/train.py", options(train__epochs=1, prune__last_epoch=1), tmp_path).returncode == 0
    result = launch("launch/search.py", ["runs/tiny", "--target-reduction", "2"], tmp_path)
    assert_one_line(result, "holds no PruningNet: train one with --prune.method meta_pruning")


def assert_one_line(result: subprocess.CompletedProcess[str], expected: str) -> None:
    assert result.returncode in (1, 2)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and expected in errors[0], result.stderr
    assert "Traceback" not in result.stderr
