"""What surrounds a cut: the loss before and after it, batch norm measured anew, the learning rate."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from launching import ALONE, events, train, write_image_folder
from torch import nn

from data import Batch, DataConfig, build_loaders
from train.loop import engine
from train.loop.probe import batches_ahead, mean_loss
from train.network.precision import Precision

FP32 = Precision("fp32", torch.device("cpu"))


class OneBuffer:
    """A loader of three batches, each of which overwrites the one before."""

    def __init__(self) -> None:
        self.step = 0
        self._images = torch.empty(4, 3, 2, 2)

    def go_to(self, epoch: int, step: int = 0) -> None:
        self.step = step

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]

    def __iter__(self):
        while self.step < 3:
            self.step += 1
            self._images.copy_(torch.arange(48.0).view(4, 3, 2, 2) / 48 + self.step)
            yield Batch(self._images, torch.tensor([0, 1, 1, 0]), torch.ones(4, dtype=torch.bool))


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Dropout(), nn.Linear(12, 2))


def test_the_loss_is_told_in_evaluation_mode_and_leaves_network_and_loader_as_they_were():
    loader, model = OneBuffer(), classifier()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loader.go_to(0, 1)
    with batches_ahead(loader, 0, 1) as batches:
        batch = next(batches)
        found = mean_loss(model, batch, FP32, ALONE)
        assert model.training
        assert found == pytest.approx(F.cross_entropy(model.eval()(batch.images), batch.labels).item())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(list(loader)) == 2, "training sees the batch, too"


def test_a_loss_that_is_not_finite_is_logged_as_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine, "mean_loss", lambda *arguments: float("inf"))
    assert [event["loss_after"] for event in events(train(tmp_path), "resize")] == [None, None]


def test_a_resize_event_and_the_console_tell_the_loss_around_it(tmp_path: Path, capsys: pytest.CaptureFixture):
    log = train(tmp_path)
    first, last = events(log, "resize")
    assert first["loss_before"] < 2.4 and first["loss_after"] != first["loss_before"]
    assert f"loss {last['loss_before']:.3f} -> {last['loss_after']:.3f}, all ranks" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["dali", "folder"])
def test_looking_ahead_changes_no_batch_of_training(tmp_path: Path, kind: str):
    if kind == "dali":
        pytest.importorskip("nvidia.dali")
    write_image_folder(tmp_path)
    config = DataConfig(path=str(tmp_path), loader=kind, batch_size=12, image_size=16, resize_size=16, threads=1)
    options = {"rank": 0, "world_size": 1, "local_world_size": 1, "device": torch.device("cpu"), "seed": 0}
    [loader, other] = [build_loaders(config, **options, splits=("train",))[0] for _ in range(2)]
    for one in (loader, other):
        list(one)  # an epoch, so that random state has moved on
    with batches_ahead(loader, 1, 0) as batches:
        ahead = next(batches).images.clone()
    loader.go_to(1, 0)
    other.go_to(1, 0)
    [again, undisturbed] = [[batch.images.clone() for batch in one] for one in (loader, other)]
    loader.close()
    other.close()
    assert torch.equal(ahead, again[0])
    assert all(map(torch.equal, again, undisturbed))
