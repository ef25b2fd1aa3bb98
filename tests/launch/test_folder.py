"""A network's folder: what launch/export.py --format timm writes, cup.load gives back without the trainer."""

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
import torchvision
from launching import EVERY_STEP, ROOT, broken_off, error_of, train, write_network

import cup
from cup.saved import _to_json
from launch import export, prune
from train.checkpoint.network import load_network, save_network
from train.export.card import _example


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet-20 of three named classes, cut twice, as a checkpoint."""
    root = tmp_path_factory.mktemp("cut")
    network = write_network(root / "full.pt", "resnet20_cifar", num_classes=3)
    for module in network.model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean)
    save_network(root / "full.pt", dataclasses.replace(network, classes=["cat", "dog", "owl"]), widths={})
    assert prune.main([str(root / "full.pt"), "--reduction", "1.3", "--out", str(root / "once.pt")]) == 0
    assert prune.main([str(root / "once.pt"), "--reduction", "2", "--out", str(root / "cut.pt")]) == 0
    return root / "cut.pt"


@pytest.fixture
def folder(cut: Path, tmp_path: Path) -> Path:
    out = tmp_path / "net"
    assert export.main([str(cut), "--format", "timm", "--out", str(out), "--license", "apache-2.0"]) == 0
    return out


def test_a_process_that_has_the_library_alone_gets_the_same_logits(cut: Path, folder: Path, tmp_path: Path):
    shutil.copytree(ROOT / "cup", tmp_path / "alone" / "cup")
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.save(images, tmp_path / "images.pt")
    code = (
        "import sys, torch, cup\n"
        f"model = cup.load({str(folder)!r})\n"
        "assert cup.__file__.startswith(sys.path[0])\n"
        "assert not [name for name in ('train', 'data', 'launch') if name in sys.modules]\n"
        f"torch.save(model(torch.load({str(tmp_path / 'images.pt')!r})), {str(tmp_path / 'logits.pt')!r})\n"
    )
    # -P and -E: neither this folder nor PYTHONPATH; an editable install is hidden by coming later
    start = f"import sys; sys.path.insert(0, {str(tmp_path / 'alone')!r})\n"
    subprocess.run([sys.executable, "-P", "-E", "-c", start + code], cwd=tmp_path, check=True)
    expected = load_network(cut).model.eval()(images)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected.detach())


def test_the_folder_says_what_the_network_is(cut: Path, folder: Path):
    saved = cup.read_saved(folder)
    assert (saved.name, saved.num_classes, saved.classes) == ("resnet20_cifar", 3, ["cat", "dog", "owl"])
    assert (saved.input_size, saved.resize_size, saved.licence) == ((3, 32, 32), 32, "apache-2.0")
    assert (saved.mean, saved.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    model = load_network(cut).model
    assert all(model.get_submodule(name).out_channels == width for name, width in saved.widths.items())
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_timm_reads_the_folder_of_its_own_network(tmp_path: Path):
    timm = pytest.importorskip("timm")
    network = write_network(tmp_path / "net.pt", "timm:test_resnet", num_classes=3)
    save_network(tmp_path / "net.pt", dataclasses.replace(network, classes=["cat", "dog", "owl"]), widths={})
    assert export.main([str(tmp_path / "net.pt"), "--format", "timm"]) == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True).eval()
    images = torch.randn(2, *cup.read_saved(tmp_path / "net").input_size)
    assert torch.equal(model(images), network.model.eval()(images))
    assert model.pretrained_cfg["label_names"] == ["cat", "dog", "owl"]


def test_timm_resizes_to_the_size_that_is_saved():
    """As its `transforms_imagenet_eval` computes it; 240 / 357 rounds to a little more than it is."""
    for side in (32, 224, 240, 299):
        for resize in range(side, 2 * side):
            images = {"num_classes": 3, "mean": (0.5,) * 3, "std": (0.5,) * 3}
            saved = cup.SavedNetwork(name="resnet18", input_size=(3, side, side), resize_size=resize, **images)
            assert math.floor(side / _to_json(saved, "")["pretrained_cfg"]["crop_pct"]) == resize


@pytest.mark.parametrize("name", ["timm:test_resnet", "resnet18"])
def test_the_example_on_the_card_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    """By the package's own class and the widths in the file, without cup.load."""
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    write_network(tmp_path / "full.pt", name, num_classes=3)
    arguments = [str(tmp_path / "full.pt"), "--reduction", "1.5", "--out", str(tmp_path / "FOLDER.pt")]
    assert prune.main(arguments) == 0
    assert export.main([str(tmp_path / "FOLDER.pt"), "--format", "timm"]) == 0
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", (tmp_path / "FOLDER" / "README.md").read_text(), re.DOTALL)
    by_load, by_hand = example.split("# or with")
    images = torch.randn(2, *load_network(tmp_path / "full.pt").architecture.input_shape)
    logits = []
    for code in (by_load, f"import cup\n# {by_hand}"):
        names: dict = {}
        exec(code, names)
        logits.append(names["model"].eval()(images))
    assert torch.equal(*logits)


@pytest.mark.parametrize(("name", "side"), [("googlenet", 64), ("vit_b_32", 64), ("resnet18", 48)])
def test_the_call_on_the_card_builds_the_saved_network(name: str, side: int):
    images = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "resize_size": side}
    saved = cup.SavedNetwork(name=name, num_classes=3, widths={"a": 1}, input_size=(3, side, side), **images)
    example = _example(saved)
    assert f"torch.zeros(1, 3, {side}, {side}))" in example
    with torch.device("meta"):
        [call] = re.findall(r"^model = (torchvision.*)$", example, re.MULTILINE)
        built = eval(call, {"torchvision": torchvision, "config": {"architecture": name, "num_classes": 3}})
        expected = cup.networks.build_network(name, 3, side)
    assert {k: t.shape for k, t in built.state_dict().items()} == {k: t.shape for k, t in expected.state_dict().items()}


def test_the_card_of_a_network_of_ones_own_says_how_it_is_built():
    images = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "resize_size": 32}
    saved = cup.SavedNetwork(name="my.nets:Tiny", num_classes=3, widths={"a": 1}, input_size=(3, 32, 32), **images)
    example = _example(saved)
    assert "\nfrom my.nets import Tiny\n" in example
    assert '\nmodel = cup.load("FOLDER", build=Tiny)  #' in example


def test_the_card_compares_with_the_full_network_where_both_are_known(tmp_path: Path):
    done = train(tmp_path, train__epochs=2, prune__last_epoch=2)[-1]
    dense = train(tmp_path, run__name="dense", prune__method="none", train__epochs=1)[-1]
    out, checkpoint = tmp_path / "net", tmp_path / "tiny" / "last.pt"
    arguments = [str(checkpoint), "--format", "timm", "--out", str(out)]
    assert export.main([*arguments, "--dense", str(tmp_path / "dense" / "last.pt")]) == 0
    card = (out / "README.md").read_text()
    assert f"| 1.00 x | {done['flops_reduction']:.2f} x |" in card
    assert f"| top-1 (%) | {dense['top1']:.2f} | {done['top1']:.2f} |" in card
    assert export.main([*arguments, "--force"]) == 0
    assert f"| top-1 (%) | not recorded | {done['top1']:.2f} |" in (out / "README.md").read_text()


def test_a_checkpoint_in_the_middle_of_an_epoch_has_no_accuracy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with broken_off(monkeypatch, 7):
        train(tmp_path, **EVERY_STEP)
    assert load_network(tmp_path / "tiny" / "last.pt").top1 is None
    assert load_network(tmp_path / "tiny" / "best.pt").top1 is not None


def other_weights(folder: Path) -> None:
    cup.save(torchvision.models.resnet18(num_classes=3), folder / "other", cup.read_saved(folder))
    shutil.copy(folder / "other" / "model.safetensors", folder)


def edited(key: str, value: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        *section, last = key.split(".")
        (config[section[0]] if section else config)[last] = value
        (folder / "config.json").write_text(json.dumps(config))

    return edit


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda folder: (folder / "config.json").write_text("{"), "no JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "of another type than cup.save writes"),
        (lambda folder: (folder / "config.json").write_text('{"architecture": "resnet18"}'), "'cup' is missing"),
        (other_weights, "is not the file that config.json describes: SHA-256"),
        (edited("cup.network", "resnet19"), "found 'resnet19', allowed: lenet"),
        (edited("cup.network", "lenet"), "LeNet does not take inputs of shape (3, 32, 32)"),
        (edited("cup.network", "resnet32_cifar"), "does not fit resnet32_cifar"),
        (edited("cup.widths", {"layer1.0.conv1": 3, "nothing": 4}), "no channel group 'nothing'"),
        (edited("cup.widths", {"layer1.0.conv1": 10**9}), "widths: found"),
        (edited("cup.version", 3), "another version wrote it"),
        (edited("num_classes", -1), "num_classes: found -1, allowed: a whole number from 1"),
        (edited("label_names", ["cat"]), "classes: found ['cat'], allowed: 3 names"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_in_one_line(folder: Path, damage: Callable, words: str):
    damage(folder)
    with pytest.raises(cup.CupError) as caught:
        cup.load(folder)
    assert words in str(caught.value) and str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_network_of_one_s_own_comes_with_what_builds_it(tmp_path: Path):
    class Own(torch.nn.Sequential):
        def __init__(self, num_classes: int) -> None:
            super().__init__(
                torch.nn.Conv2d(1, 8, 3),
                torch.nn.BatchNorm2d(8),
                torch.nn.AdaptiveAvgPool2d(1),
                torch.nn.Flatten(),
                torch.nn.Linear(8, num_classes),
            )

    model, images = Own(3), torch.randn(2, 1, 9, 9)
    cup.shrink_to(model, {"0": 5}, images)
    saved = cup.SavedNetwork(
        name="own", num_classes=3, widths={"0": 5}, input_size=(1, 9, 9), resize_size=9, mean=(0.5,), std=(0.5,)
    )
    cup.save(model, tmp_path / "own", saved)
    assert cup.read_saved(tmp_path / "own") == saved
    assert torch.equal(cup.load(tmp_path / "own", build=Own)(images), model.eval()(images))
    with pytest.raises(cup.CupError, match=r"found 'own'.*build="):
        cup.load(tmp_path / "own")


def test_what_computes_something_else_is_not_kept(cut: Path, tmp_path: Path, monkeypatch, capfd):
    honest = cup.load

    def corrupted(folder: Path, *build: object) -> torch.nn.Module:
        model = honest(folder, *build)
        model.linear.weight.data *= 1.01
        return model

    monkeypatch.setattr(cup, "load", corrupted)
    assert "exported, its logits differ" in error_of(
        export.main, [str(cut), "--format", "timm", "--out", str(tmp_path / "net")], capfd
    )
    assert list((tmp_path / "net").iterdir()) == []


def test_other_files_in_the_folder_stay_and_force_replaces_its_own(cut: Path, folder: Path, capfd):
    (folder / "notes.txt").write_text("mine")
    arguments = [str(cut), "--format", "timm", "--out", str(folder)]
    assert "--force" in error_of(export.main, arguments, capfd)
    (folder / "config.json").write_text("old")
    assert export.main([*arguments, "--force"]) == 0
    cup.load(folder)
    assert (folder / "notes.txt").read_text() == "mine"


class Hub:
    """Stands for huggingface_hub.HfApi; what it was asked to do."""

    calls: list = []  # noqa: RUF012

    def create_repo(self, repository: str, **options: object) -> str:
        if "/" not in repository:
            raise ValueError("no such\nnamespace")
        self.calls.append(("create", repository, options))
        return f"https://huggingface.co/{repository}"

    def upload_folder(self, **options: object) -> None:
        files = sorted(options["allow_patterns"])
        assert all((Path(options["folder_path"]) / name).exists() for name in files)
        self.calls.append(("upload", options["repo_id"], files))


def test_push_uploads_the_three_files_to_a_private_repository(cut: Path, tmp_path: Path, monkeypatch, capfd):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    arguments = [str(cut), "--format", "timm", "--out", str(tmp_path / "net"), "--push"]
    assert export.main([*arguments, "org/net"]) == 0
    assert "uploaded: https://huggingface.co/org/net" in capfd.readouterr().out
    assert Hub.calls == [
        ("create", "org/net", {"private": True, "exist_ok": True}),
        ("upload", "org/net", ["README.md", "config.json", "model.safetensors"]),
    ]
    assert "to wrong: no such namespace" in error_of(export.main, [*arguments, "wrong", "--force"], capfd)


def test_push_without_the_client_is_refused_before_anything_is_written(cut: Path, tmp_path: Path, monkeypatch, capfd):
    honest = export.require_hub.__globals__["importlib"].util.find_spec
    hidden = "huggingface_hub"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == hidden else honest(name))
    arguments = [str(cut), "--format", "timm", "--out", str(tmp_path / "net"), "--push", "org/net"]
    assert "pip install huggingface_hub" in error_of(export.main, arguments, capfd)
    assert not (tmp_path / "net").exists()
