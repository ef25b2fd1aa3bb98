"""Distillation: the loss as written, a teacher that nothing changes, and runs that go on with it."""

import copy
import dataclasses
import math
from pathlib import Path

import pytest
import torch
from launching import events, interrupted, numbers, train, write_network
from torch import nn

from data.batch import Preprocessing
from train.checkpoint.file import load_checkpoint
from train.checkpoint.network import save_network
from train.errors import ConfigError
from train.loop.config import TrainConfig
from train.loop.step import compute_gradients
from train.loop.teacher import Teacher
from train.network.optim import OptimConfig, build_optimizer
from train.network.precision import Precision
from train.network.state import TrainState

FP32 = Precision("fp32", torch.device("cpu"))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_loss_is_that_of_plain_sums_and_the_teacher_stays_as_it_is(accumulate: int):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    teacher_model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4)).eval().requires_grad_(False)
    before = copy.deepcopy(teacher_model.state_dict())
    images, labels = torch.randn(6, 3, 2, 2), torch.arange(6) % 4
    state = TrainState(model, model, build_optimizer(model, OptimConfig()), FP32)
    teacher = Teacher(teacher_model, FP32, share=0.3, temperature=3.0)
    loss = compute_gradients(state, images, labels, TrainConfig(accumulate=accumulate), teacher=teacher)

    def softened(logits: torch.Tensor, temperature: float) -> list[float]:
        exponentials = [math.exp(logit / temperature) for logit in logits.tolist()]
        return [one / sum(exponentials) for one in exponentials]

    total = 0.0
    for image, label in zip(images, labels.tolist(), strict=True):
        logits, wanted = model(image[None])[0], teacher_model(image[None])[0]
        of_labels = -math.log(softened(logits, 1.0)[label])
        pairs = zip(softened(wanted, 3.0), softened(logits, 3.0), strict=True)
        total += 0.7 * of_labels + 0.3 * 9.0 * sum(p * math.log(p / q) for p, q in pairs)
    assert loss.item() == pytest.approx(total / 6, rel=1e-5)
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in teacher_model.state_dict().items())


@pytest.mark.parametrize("at_step", [3, 6])
def test_a_run_with_a_teacher_goes_on_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_step: int):
    write_network(tmp_path / "teacher.pt", seed=7)
    monkeypatch.setattr("train.loop.watch.MAX_STEPS", 1)
    settings = {"train__teacher": tmp_path / "teacher.pt", "train__mixup": 0.3, "run__save_every_minutes": 1e-9}
    alone = train(tmp_path / "alone", train__mixup=0.3)
    undisturbed = train(tmp_path / "a", **settings)
    again = interrupted(tmp_path / "b", monkeypatch, at_step, **settings)
    assert numbers(again) == numbers(undisturbed) != numbers(alone)
    one, other = (load_checkpoint(tmp_path / side / "tiny/last.pt") for side in "ab")
    assert all(torch.equal(one["model"][key], other["model"][key]) for key in one["model"])
    notes = [event["message"] for event in events(undisturbed, "note")]
    assert any("the hours count its passes, and not the 2 that its own training took" in note for note in notes)


def test_a_teacher_of_other_images_is_refused_before_there_is_a_run(tmp_path: Path):
    write_network(tmp_path / "teacher.pt", "resnet20_cifar")
    with pytest.raises(ConfigError, match=r"train.teacher: .* does not take images of 1 channels and 28 pixels"):
        train(tmp_path, train__teacher=tmp_path / "teacher.pt")
    stored = write_network(tmp_path / "teacher.pt")
    coloured = dataclasses.replace(stored, preprocessing=Preprocessing(image_size=28, mean=(0.5,), std=(0.5,)))
    save_network(tmp_path / "teacher.pt", coloured, widths={})
    with pytest.raises(ConfigError, match=r"was trained with mean \(0.5,\) .*: set data.mean and data.std"):
        train(tmp_path, train__teacher=tmp_path / "teacher.pt")
    assert not (tmp_path / "tiny").exists()


def test_a_network_of_the_users_own_can_teach_its_like(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "home.py").write_text("from cup.networks import LeNet\n\nmake = LeNet\n")
    monkeypatch.syspath_prepend(tmp_path)
    train(tmp_path / "a", model__name="home:make")
    train(tmp_path / "b", model__name="home:make", train__teacher=tmp_path / "a/tiny/last.pt")


def test_a_teacher_of_other_classes_is_refused_before_there_is_a_run(tmp_path: Path):
    write_network(tmp_path / "teacher.pt", num_classes=3)
    with pytest.raises(ConfigError, match=r"train.teacher: .* tells 3 classes apart, the data set has 10"):
        train(tmp_path, train__teacher=tmp_path / "teacher.pt")
    assert not (tmp_path / "tiny").exists()
