"""Runs that start from weights (`model.weights`): of a file, torchvision, timm or the hub, with another classifier."""

import json
from pathlib import Path

import pytest
import torch
from launching import broken_off, events, numbers, train, write_image_folder
from safetensors.torch import save_file

from train.checkpoint.archive import CheckpointError
from train.checkpoint.file import load_checkpoint
from train.checkpoint.network import load_network
from train.config import ModelConfig
from train.errors import ConfigError, TrainError
from train.network.models import build_model
from train.network.optim import OptimConfig, build_optimizer, set_learning_rate
from train.weights import classifier_names, read_given

DENSE = {"prune__method": "none", "train__epochs": 1}
STILL = {"optim__lr": 1e-12, "optim__weight_decay": 0}
SMALL = {"data__channels": 3, "data__image_size": 32, "data__resize_size": "null", "data__batch_size": 8}
SMALL |= {"data__synthetic_images": 16, "model__name": "null"}


def notes(log: list[dict]) -> list[str]:
    return [event["message"] for event in events(log, "note")]


def lenet(path: Path, num_classes: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    weights = build_model("lenet", num_classes).state_dict()
    torch.save({"model": weights, "epoch": 3}, path)
    return weights


def test_a_file_with_as_many_classes_is_trained_further(tmp_path: Path):
    weights = lenet(tmp_path / "a.pth", 10)
    log = train(tmp_path, model__weights=tmp_path / "a.pth", **DENSE, **STILL)
    for key, tensor in load_network(tmp_path / "tiny/last.pt").model.state_dict().items():
        assert torch.allclose(tensor, weights[key], atol=1e-6)
    assert f"starts from {tmp_path / 'a.pth'}: lenet" in notes(log)
    assert f"{tmp_path / 'a.pth'}: took model, left out: epoch" in notes(log)
    assert log[0]["from"] is None and log[0]["config"]["model"]["weights"] == str(tmp_path / "a.pth")


def test_another_number_of_classes_gets_a_new_classifier_and_a_cut_works_on(tmp_path: Path):
    weights = lenet(tmp_path / "a.pth", 4)
    log = train(tmp_path, model__weights=tmp_path / "a.pth", **DENSE, **STILL)
    found = load_network(tmp_path / "tiny/last.pt").model.state_dict()
    assert found["fc2.weight"].shape == (10, 500) and torch.allclose(found["fc1.weight"], weights["fc1.weight"])
    [said] = [note for note in notes(log) if "begin anew" in note]
    assert said == f"{tmp_path / 'a.pth'}: 4 classes there, 10 classes here: fc2.weight, fc2.bias begin anew"
    shrunk = train(tmp_path / "shrunk", model__weights=tmp_path / "a.pth")
    assert events(shrunk, "epoch")[-1]["flops_reduction"] >= 2


def test_an_interrupted_run_goes_on_without_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lenet(tmp_path / "a.pth", 4)
    changes = {"model__weights": tmp_path / "a.pth", "model__head_lr": 0.2, "train__freeze": "conv1"}
    changes |= {"train__epochs": 3, "prune__last_epoch": 2, "prune__target_reduction": 1.5}
    undisturbed = train(tmp_path / "a", **changes)
    with broken_off(monkeypatch, 7):
        train(tmp_path / "b", **changes)
    (tmp_path / "a.pth").unlink()
    assert numbers(train(tmp_path / "b", **changes)) == numbers(undisturbed)
    assert events(undisturbed, "resize")


def test_frozen_modules_keep_weights_and_statistics_and_the_classifier_has_its_own_rate(tmp_path: Path):
    torch.manual_seed(0)
    weights = build_model("resnet20_cifar", 10).state_dict()
    torch.save(weights, tmp_path / "a.pth")
    changes = {**SMALL, "model__name": "resnet20_cifar", "model__weights": tmp_path / "a.pth"}
    log = train(tmp_path, **DENSE, **changes, train__freeze="conv1, bn1,layer1", model__head_lr=0.5, optim__lr=0.1)
    content = load_checkpoint(tmp_path / "tiny/last.pt")
    same = {key for key, tensor in content["model"].items() if torch.equal(tensor, weights[key])}
    assert same == {key for key in weights if key.startswith(("conv1", "bn1", "layer1"))}
    rates = [group["lr"] for group in content["optimizer"]["param_groups"]]
    assert rates[1] == pytest.approx(5 * rates[0]) and rates[0] == events(log, "epoch")[-1]["lr"]


def test_a_rate_of_its_own_follows_the_schedule():
    model = build_model("lenet", 10)
    config = OptimConfig(lr=0.1, decay_norms_and_biases=False)
    optimizer = build_optimizer(model, config, classifier_names("lenet", 10), 0.01)
    set_learning_rate(optimizer, 0.05)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert found[id(model.fc2.weight)] == (pytest.approx(0.005), 1e-4)
    assert found[id(model.fc2.bias)] == (pytest.approx(0.005), 0)
    assert found[id(model.fc1.weight)] == (0.05, 1e-4) and len(found) == len(list(model.parameters()))


def test_torchvision_s_weights_come_from_its_cache_with_their_network_and_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As torch.hub keeps what it fetched."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    weights = build_model("squeezenet1_1", 1000).state_dict()
    torch.save(weights, tmp_path / "hub/checkpoints/squeezenet1_1-b8a52dc0.pth")
    source = "torchvision:SqueezeNet1_1_Weights.IMAGENET1K_V1"
    log = train(tmp_path, **DENSE, **STILL, **SMALL, model__weights=source)
    stored = load_network(tmp_path / "tiny/last.pt")
    assert stored.architecture.name == log[0]["model"] == "squeezenet1_1"
    assert torch.allclose(stored.model.state_dict()["features.0.weight"], weights["features.0.weight"], atol=1e-6)
    assert any(
        "1000 classes there, 10 classes here: classifier.1.weight, classifier.1.bias begin" in n for n in notes(log)
    )
    assert any(
        "(as torchvision's SqueezeNet1_1_Weights.IMAGENET1K_V1 says, but for data.image_size" in n for n in notes(log)
    )


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of the Hugging Face hub, with timm's smallest ResNet of five classes in it."""
    pytest.importorskip("timm")
    weights = build_model("timm:test_resnet", 5).state_dict()
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, tmp_path / "model.safetensors")
    pretrained = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5], "input_size": [3, 64, 64], "crop_pct": 1.0}
    pretrained |= {"num_classes": 5, "classifier": "fc", "first_conv": "conv1.0", "tag": "mine"}
    config = {"architecture": "test_resnet", "num_classes": 5, "pretrained_cfg": pretrained}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda repo_id, filename, **_: str(tmp_path / filename))
    return tmp_path


def test_the_hub_s_weights_bring_their_network_and_images(hub: Path):
    given = read_given("hf-hub:me/mine", None)
    assert (given.name, given.num_classes) == ("timm:test_resnet", 5)
    write_image_folder(hub / "images")
    changes = {"model__name": "null", "data__channels": 3, "data__loader": "folder", "data__path": hub / "images"}
    changes |= {"data__image_size": "null", "data__resize_size": "null", "data__batch_size": 4}
    log = train(hub, **DENSE, **changes, model__weights="hf-hub:me/mine")
    stored = load_network(hub / "tiny/last.pt")
    assert stored.architecture.name == "timm:test_resnet"
    assert (stored.preprocessing.image_size, stored.preprocessing.mean) == (64, (0.1, 0.2, 0.3))
    assert any("5 classes there, 3 classes here: fc.weight, fc.bias begin anew" in note for note in notes(log))


def test_timm_s_own_loader_fetches_timm_s_weights(hub: Path):
    weights = build_model("timm:test_resnet", 1000).state_dict()
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, hub / "model.safetensors")
    given = read_given("timm:test_resnet.r160_in1k", "timm:test_resnet.r160_in1k")
    assert given.num_classes == 1000 and given.published.preprocessing.mean == (0.5, 0.5, 0.5)
    assert all(torch.equal(given.weights[key], tensor) for key, tensor in weights.items())


def test_without_a_network_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("timm")

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("Network is unreachable\nand more")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", unreachable)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", unreachable)
    for source in ("torchvision:ResNet18_Weights.DEFAULT", "timm:test_resnet.r160_in1k", "hf-hub:me/mine"):
        with pytest.raises(TrainError, match=r"cannot fetch .* \(Network is unreachable\): fetch them once") as raised:
            train(tmp_path, model__name="null", model__weights=source)
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "tiny").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weights": "torchvision:ResNet50_Weights.V9"}, "allowed: weights of a classification model as torchvision"),
        ({"weights": "torchvision:FCN_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1"}, "allowed: weights of a classif"),
        ({"weights": "timm:nonet"}, "which timm does not know"),
        ({"weights": "a.pth"}, "model.name: found null beside model.weights a.pth"),
        ({"weights": "timm:test_resnet", "name": "resnet18"}, "found resnet18, but .* are of timm:test_resnet"),
        ({"weights": "torchvision:ResNet50_Weights.DEFAULT", "name": "resnet18"}, "are of resnet50"),
        ({"weights": "a.pth", "name": "lenet", "checkpoint": "b.pt"}, "beside checkpoint"),
        ({"weights": "a.pth", "name": "lenet", "width": 0.5}, "beside weights"),
        ({"head_lr": 0.0}, "head_lr: found 0.0, allowed: a number above 0"),
    ],
)
def test_weights_that_are_at_odds_with_other_settings_are_refused(settings: dict, words: str):
    if settings.get("weights", "").startswith("timm:"):
        pytest.importorskip("timm")
    with pytest.raises((ConfigError, ValueError), match=words):
        ModelConfig(**settings)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"train__freeze": "conv9"}, ConfigError, "train.freeze: found 'conv9', allowed: .* such as conv1, conv2"),
        ({"train__freeze": "conv1,conv2,fc1,fc2"}, ConfigError, "leaves no weight to train"),
        ({"model__name": "mlp"}, CheckpointError, "the weights do not fit MLP; unexpected: conv1.weight"),
        ({"model__weights": "missing.pth"}, CheckpointError, "no file at missing.pth"),
    ],
)
def test_what_cannot_be_trained_so_is_an_error_and_leaves_no_run_directory(tmp_path: Path, changes, error, words):
    lenet(tmp_path / "a.pth", 10)
    with pytest.raises(error, match=words):
        train(tmp_path / "runs", **{"model__weights": tmp_path / "a.pth", **changes})
    assert not (tmp_path / "runs").exists()


def test_a_tag_of_timm_is_part_of_the_name():
    pytest.importorskip("timm")
    assert ModelConfig(weights="timm:test_resnet.r160_in1k").name == "timm:test_resnet.r160_in1k"
    assert ModelConfig(weights="torchvision:ResNet50_Weights.IMAGENET1K_V2").name == "resnet50"
