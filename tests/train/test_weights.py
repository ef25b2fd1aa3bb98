"""Weights files of others: everything that torchvision, timm and their training scripts write is read, and no more."""

import argparse
import contextlib
import os
import pathlib
import re
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from launching import events, interrupted, numbers, train
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel

from launch import evaluate, export, prune
from train.checkpoint.archive import CheckpointError
from train.checkpoint.network import load_network
from train.checkpoint.weights import load_weights, read_weights_file
from train.network.models import Architecture, build_model
from train.weights import GivenWeights, fitted_weights, start_from_weights

# RegNets cannot be built without memory for their weights: the smallest of each kind stands for them.
NETWORKS = [
    name
    for name in torchvision.models.list_models(module=torchvision.models)
    if not name.startswith("regnet_") or name.endswith("_400mf")
]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_of_torchvision_takes_its_own_state_dict(name: str):
    """With the auxiliary heads that published weights hold."""
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with torch.device("cpu" if name.startswith("regnet_") else "meta"):
        theirs = torchvision.models.get_model(name, **options).state_dict()
        ours = build_model(name, 1000)
    weights, classes = fitted_weights(name, {f"module.{key}": tensor for key, tensor in theirs.items()})
    assert classes == 1000
    load_weights(ours, weights)


def test_names_that_torchvision_s_own_published_files_still_have(tmp_path: Path):
    """Its DenseNets of 2017 and ViTs of 2021, as its own loaders rename them; the values arrive where they belong."""
    torch.manual_seed(0)
    densenet = build_model("densenet121", 5).state_dict()
    old = OrderedDict((re.sub(r"(norm|conv)([12])\.", r"\1.\2.", key), tensor) for key, tensor in densenet.items())
    torch.save(old, tmp_path / "densenet.pth")
    weights, _ = fitted_weights("densenet121", read_weights_file(tmp_path / "densenet.pth").weights)
    model = build_model("densenet121", 5)
    load_weights(model, weights)
    assert "features.denseblock1.denselayer1.norm.1.weight" in old and "norm1" not in "".join(old)
    assert all(torch.equal(tensor, densenet[key]) for key, tensor in model.state_dict().items())

    sizes = {"image_size": 32, "patch_size": 16, "num_layers": 1, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 16}
    vit, other = (torchvision.models.VisionTransformer(**sizes, num_classes=5) for _ in range(2))
    new = {"mlp.0.": "mlp.linear_1.", "mlp.3.": "mlp.linear_2."}
    load_weights(other, {re.sub(r"mlp\.[03]\.", lambda m: new[m[0]], key): t for key, t in vit.state_dict().items()})
    assert all(torch.equal(tensor, vit.state_dict()[key]) for key, tensor in other.state_dict().items())


@pytest.mark.parametrize(("name", "heads"), [("googlenet", "aux1."), ("inception_v3", "AuxLogits.")])
def test_auxiliary_heads_are_left_out(name: str, heads: str):
    theirs = torchvision.models.get_model(name, init_weights=False).state_dict()
    ours = build_model(name, 1000)
    load_weights(ours, theirs)
    assert any(key.startswith(heads) for key in theirs)
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.state_dict().items())


def test_a_run_of_mnasnet_goes_on_and_is_evaluated_and_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its own loader wants to be told the version of the weights."""
    changes = {"model__name": "mnasnet0_5", "data__channels": 3, "data__image_size": 32, "data__resize_size": 32}
    changes |= {"train__epochs": 2, "prune__method": "none", "train__ema_decay": 0.5, "data__synthetic_images": 64}
    undisturbed = train(tmp_path / "a", **changes)
    assert numbers(interrupted(tmp_path / "b", monkeypatch, 3, **changes)) == numbers(undisturbed)
    last = tmp_path / "b/tiny/last.pt"
    assert evaluate.main([str(last)]) == 0 and export.main([str(last), "--format", "torch"]) == 0
    assert events(train(tmp_path, **changes | {"model__checkpoint": last, "model__name": "null"}), "done")


def in_file(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


TRAINING = {"optimizer": {"state": {}}, "epoch": 9, "args": argparse.Namespace(lr=0.1, output=pathlib.PosixPath("x"))}


@pytest.mark.parametrize(
    ("wrap", "note"),
    [
        (lambda weights: weights, ""),
        (lambda weights: {"model": weights, **TRAINING}, "took model, left out: optimizer, epoch, args, unread: "),
        (lambda weights: {"state_dict": prefixed("module.", weights), "arch": "x"}, "took state_dict, left out: arch"),
        (lambda weights: {"model_state_dict": prefixed("module.module.", weights)}, "took model_state_dict"),
        (
            lambda weights: {"state_dict": prefixed("model.", weights) | {"loss.weight": torch.ones(2)}},
            "took state_dict",
        ),
        (lambda weights: prefixed("_orig_mod.module.", weights), ""),
        (lambda weights: {"state_dict": prefixed("net.", weights)}, "took state_dict"),
        (lambda weights: prefixed("module._orig_mod.", weights) | {"n_averaged": torch.tensor(3)}, ""),
        (lambda weights: {"model": {"state_dict": weights}}, "took model.state_dict"),
        (
            lambda weights: {"state_dict": weights, "metric": np.float64(3)},
            "took state_dict, left out: metric, unread: ",
        ),
        (
            lambda weights: {"state_dict": weights, "hyper": defaultdict(int, a=1)},
            "took state_dict, left out: hyper, un",
        ),
        (
            lambda weights: {"model": zeroed(weights), "model_ema": prefixed("module.", weights), "scaler": None},
            "took model_ema (the moving average), left out: model, scaler",
        ),
        (
            lambda weights: {"state_dict": zeroed(weights), "state_dict_ema": weights, "args": TRAINING["args"]},
            "took state_dict_ema (the moving average), left out: state_dict, args, unread: argparse.Namespace, pathlib",
        ),
        (lambda weights: {"state_dict": weights, "state_dict_ema": None}, "took state_dict, left out: state_dict_ema"),
        (lambda weights: {"model": weights, "ema": {"decay": 0.9, "updates": 5}}, "took model, left out: ema"),
        (lambda weights: {"model": weights, "model_ema": {}}, "took model, left out: model_ema"),
        (
            lambda weights: {"model": zeroed(weights), "ema": {"decay": 0.9, "module": weights}},
            "took ema.module (the moving average), left out: model, decay",
        ),
        (
            lambda weights: {"model": zeroed(weights), "model_ema": {"shadow": weights}},
            "took model_ema.shadow (the moving average), left out: model",
        ),
    ],
)
def test_what_training_scripts_wrap_around_weights_comes_off_and_is_said(tmp_path: Path, wrap, note: str):
    torch.manual_seed(0)
    weights = build_model("mlp", 5).state_dict()
    file = read_weights_file(in_file(tmp_path / "a.pth", wrap(weights)))
    found, classes = fitted_weights("mlp", file.weights)
    model = build_model("mlp", 5)
    load_weights(model, found)
    assert classes == 5 and all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())
    assert file.note.startswith(f"{tmp_path / 'a.pth'}: {note}") if note else not file.note


def prefixed(prefix: str, weights: dict) -> dict:
    return {f"{prefix}{key}": tensor for key, tensor in weights.items()}


def zeroed(weights: dict) -> dict:
    return {key: torch.zeros_like(tensor) for key, tensor in weights.items()}


def test_torch_s_own_averaged_model_and_compiled_model(tmp_path: Path):
    model = build_model("mnasnet0_5", 3)
    average = AveragedModel(model)
    for wrapper in (average, torch.compile(model), torch.compile(average)):
        file = read_weights_file(in_file(tmp_path / "a.pth", wrapper.state_dict()))
        weights, classes = fitted_weights("mnasnet0_5", file.weights)
        assert classes == 3 and weights._metadata[""]["version"] == 2
        load_weights(build_model("mnasnet0_5", 3), weights)


def test_weights_without_a_classifier_tell_no_number_of_classes(tmp_path: Path, capsys: pytest.CaptureFixture):
    weights = build_model("mlp", 7).state_dict()
    assert fitted_weights("mlp", weights)[1] == 7
    backbone = {key: tensor for key, tensor in weights.items() if not key.startswith("fc3.")}
    assert fitted_weights("mlp", backbone)[1] is None
    path = in_file(tmp_path / "a.pth", backbone)
    assert prune.main(["mlp", "--weights", str(path), "--t", "0.45", "--out", str(tmp_path / "c.pt")]) != 0
    assert "found no classifier of mlp" in capsys.readouterr().err


def test_a_new_classifier_keeps_the_version_of_the_weights():
    """MNASNet's weights of version 1 are of wider first layers, which its loader builds for them."""
    name, versions = "mnasnet0_5", []
    weights = build_model(name, 3).state_dict()
    weights._metadata = OrderedDict({**weights._metadata, "": {"version": 2, "mark": "kept"}})
    model = build_model(name, 5)
    model.register_load_state_dict_pre_hook(lambda module, state, prefix, metadata, *_: versions.append(metadata))
    given = GivenWeights("a.pth", name, weights, 3, None, "")
    start_from_weights(model, given, Architecture(name=name, num_classes=5, input_shape=(3, 32, 32)))
    assert [version.get("mark") for version in versions] == ["kept"]


def test_safetensors_with_the_names_of_a_wrapper(tmp_path: Path):
    weights = build_model("lenet", 4).state_dict()
    save_file(prefixed("model.", weights), tmp_path / "a.safetensors")
    assert (
        prune.main(
            ["lenet", "--weights", str(tmp_path / "a.safetensors"), "--t", "0.45", "--out", str(tmp_path / "c.pt")]
        )
        == 0
    )
    assert load_network(tmp_path / "c.pt").architecture.num_classes == 4


def test_a_cut_says_what_it_took_of_a_training_state(tmp_path: Path, capsys: pytest.CaptureFixture):
    in_file(tmp_path / "a.pth", {"model": build_model("lenet", 4).state_dict(), **TRAINING})
    assert (
        prune.main(["lenet", "--weights", str(tmp_path / "a.pth"), "--t", "0.45", "--out", str(tmp_path / "c.pt")]) == 0
    )
    assert "took model, left out: optimizer, epoch, args" in capsys.readouterr().out


class Runs:
    """Would make a file if it were unpickled as pickle does."""

    def __init__(self, command: tuple) -> None:
        self.command = command

    def __reduce__(self):
        return self.command


@pytest.mark.parametrize("call", [(os.system, "touch {}"), (exec, "open('{}', 'w')"), (pathlib.Path.touch, None)])
def test_nothing_in_a_file_is_run(tmp_path: Path, call: tuple):
    mark = tmp_path / "mark"
    function, argument = call
    arguments = (pathlib.PosixPath(mark),) if argument is None else (argument.format(mark),)
    path = in_file(
        tmp_path / "a.pth", {"model": build_model("mlp", 5).state_dict(), "args": Runs((function, arguments))}
    )
    with contextlib.suppress(CheckpointError):  # os is refused, the others stay unread
        assert "left out: args" in read_weights_file(path).note
    assert not mark.exists()


def test_weights_of_an_object_that_is_not_known_are_none(tmp_path: Path):
    path = in_file(tmp_path / "a.pth", {"model": argparse.Namespace(a=torch.ones(2))})
    with pytest.raises(CheckpointError, match="found no weights"):
        read_weights_file(path)


def test_timm_s_own_loader_reads_names_that_only_it_knows():
    """ConvNeXt's original names, of its authors' files."""
    pytest.importorskip("timm")
    model = build_model("timm:test_convnext", 1000)
    weights = model.state_dict()
    old = {original_name_of_convnext(key): tensor for key, tensor in weights.items()}
    assert not old.keys() <= weights.keys()
    found, classes = fitted_weights("timm:test_convnext", old)
    assert classes == 1000 and found.keys() == weights.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in weights.items())


def original_name_of_convnext(name: str) -> str:
    name = name.replace("stem.", "downsample_layers.0.").replace("head.norm.", "norm.").replace("head.fc.", "head.")
    name = re.sub(r"stages\.(\d+)\.downsample\.", r"downsample_layers.\1.", name)
    name = re.sub(r"stages\.(\d+)\.blocks\.(\d+)\.", r"stages.\1.\2.", name)
    name = name.replace("conv_dw", "dwconv").replace("mlp.fc1", "pwconv1").replace("mlp.fc2", "pwconv2")
    return name
