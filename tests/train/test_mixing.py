"""Mixup and cutmix in the training step: soft labels, the same draws for the same seed, and after a resume."""

from pathlib import Path

import pytest
import torch
from launching import interrupted, numbers, train

from train.loop.mixing import build_mixing

IMAGES = torch.arange(8.0).reshape(8, 1, 1, 1).expand(8, 1, 16, 16)  # image k is k all over
LABELS = torch.arange(8) % 4


def shares(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every mixed image: its share of itself by its pixels and by its label, as its partner is the one before it."""
    own, partner = torch.arange(8.0), torch.arange(8.0).roll(1)
    by_pixels = (images.mean(dim=(1, 2, 3)) - partner) / (own - partner)
    return by_pixels, labels[torch.arange(8), LABELS]


@pytest.mark.parametrize("options", [{"mixup": 0.8, "cutmix": 0.0}, {"mixup": 0.0, "cutmix": 1.0}], ids=str)
def test_labels_are_mixed_in_the_shares_of_the_pixels(options):
    torch.manual_seed(0)
    mix = build_mixing(**options, num_classes=4)
    images, labels = mix(IMAGES, LABELS)
    assert labels.shape == (8, 4) and torch.allclose(labels.sum(dim=1), torch.ones(8))
    by_pixels, by_labels = shares(images, labels)
    assert torch.allclose(by_pixels, by_labels, atol=1e-5)
    assert 0 < by_labels[0] < 1
    assert set(IMAGES.unique().tolist()) == set(range(8))  # the loader's batch is not written to
    mixed_pixels = images[3].unique()
    assert len(mixed_pixels) == (1 if options["mixup"] else 2)


def test_with_both_either_is_drawn_and_with_none_nothing_changes():
    torch.manual_seed(0)
    mix = build_mixing(0.5, 0.5, num_classes=4)
    kinds = {len(mix(IMAGES, LABELS)[0][3].unique()) for _ in range(20)}
    assert kinds == {1, 2}
    images, labels = build_mixing(0.0, 0.0, num_classes=4)(IMAGES, LABELS)
    assert images is IMAGES and labels is LABELS


def test_a_run_with_mixing_repeats_and_goes_on_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Growing images, mixup and cutmix together; the network takes any side."""
    monkeypatch.setattr("train.build.build_model", lambda *_: AnySide())
    changes = {
        **{"train__mixup": 0.2, "train__cutmix": 1.0, "prune__method": "none"},
        **{"data__start_size": 20, "data__grow_epochs": 2, "data__size_step": 4},
    }
    unmixed = train(tmp_path / "unmixed", **changes | {"train__mixup": 0, "train__cutmix": 0})
    undisturbed = train(tmp_path / "a", **changes)
    assert numbers(undisturbed) != numbers(unmixed)

    assert numbers(interrupted(tmp_path / "b", monkeypatch, 10, **changes)) == numbers(undisturbed)


class AnySide(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = torch.nn.Conv2d(1, 8, 5, stride=2), torch.nn.Linear(8, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.flatten(torch.nn.functional.adaptive_avg_pool2d(self.conv(images).relu(), 1), 1))
