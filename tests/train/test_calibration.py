"""Layers are timed for the cost model: what is asked of them, and that a run's random numbers stay."""

import itertools
import json
from pathlib import Path

import pytest
import torch

import cup
from cup.cost.fitting import TimedKernel
from train.errors import ConfigError
from train.network import calibration
from train.network.calibration import known_device, measured_device
from train.network.precision import Precision

CPU = torch.device("cpu")


@pytest.fixture
def few_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        calibration, "CONVOLUTIONS", ((8, 16, 3, 4, 1), (16, 8, 1, 4, 1), (8, 8, 3, 4, 8), (8, 8, 5, 4, 8))
    )
    monkeypatch.setattr(calibration, "LINEARS", ((16, 8, 4), (8, 10, 0)))
    monkeypatch.setattr(calibration, "MAPS", ((8, 4),))
    monkeypatch.setattr(calibration, "FLUSH_BYTES", 1024)
    monkeypatch.setattr(calibration, "OPTIMIZED", 1)
    monkeypatch.setattr(calibration, "MIN_SECONDS", 0.0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_device_comes_of_it_and_the_random_numbers_stay(few_layers: None, precision: str):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    device = measured_device(Precision(precision, CPU), 2, 32, CPU)
    assert torch.equal(torch.rand(3), expected)
    assert device.precision == precision and device.overlap == 0 and "batch 2, 32 pixels" in device.source
    assert cup.device_cost(device, batch_size=2).device is device
    assert cup.Device.from_dict(device.to_dict()) == device


def test_a_device_is_known_by_name_or_from_the_file_that_keeps_it(few_layers: None, tmp_path: Path):
    device, file = measured_device(Precision("fp32", CPU), 2, 32, CPU), tmp_path / "mine.json"
    file.write_text(json.dumps({"device": device.to_dict(), "rows": []}))
    assert known_device(str(file), "fp32") == device
    assert known_device("l4", "bf16") == cup.named_device("l4", "bf16")
    with pytest.raises(ConfigError, match=r"found a device measured in fp32, wanted: bf16; launch/bench\.py cost"):
        known_device(str(file), "bf16")


@pytest.mark.parametrize(
    "content",
    [None, "", "[]", "3", "{}", '{"device": {"rates": {}}}', '{"device": {"rates": 3}}', '{"device": 3}', "[" * 9999],
)
def test_a_file_without_a_device_is_one_line(tmp_path: Path, content: str | None):
    if content is not None:
        (tmp_path / "mine.json").write_text(content)
    with pytest.raises(ConfigError, match=r"mine\.json: found no device .*; launch/bench\.py cost --models"):
        known_device(str(tmp_path / "mine.json"), "fp32")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_one_image_as_small_as_a_digit_is_enough(few_layers: None, monkeypatch: pytest.MonkeyPatch, precision: str):
    monkeypatch.setattr(calibration, "MAPS", ((8, 32),))
    assert measured_device(Precision(precision, CPU), 1, 28, CPU).precision == precision


def test_every_kernel_is_timed_with_the_work_that_the_model_counts(few_layers: None, monkeypatch: pytest.MonkeyPatch):
    """A clock that goes on by a second at each look: every call takes one."""
    ticks, seen = itertools.count(), []
    monkeypatch.setattr(calibration, "fit_device", lambda *all: seen.extend(all[2]))
    measured_device(Precision("fp32", CPU), 2, 32, CPU, clock=lambda: float(next(ticks)))
    timed: dict[str, TimedKernel] = {one.kernel: one for one in seen}
    assert set(timed) == {kernel for kernel in cup.KERNELS if not kernel.startswith("attention")}
    assert {one.seconds for one in seen} == {1.0}
    pixels = 2 * 8 * 8
    conv = timed["conv.weight"]
    assert (conv.reads, conv.writes, conv.flops) == (8, 16, 2 * 9 * pixels)
    assert conv.moved == 4 * (pixels * (8 + 16) + 9 * 8 * 16)
    assert (timed["grouped.forward"].reads, timed["grouped.forward"].flops) == (1, 2 * 9 * pixels)
    assert timed["batch_norm.backward"].moved == 5 * 4 * 8 * pixels
    assert timed["binary.backward"].moved == 2 * 3 * 4 * 8 * pixels


def test_the_fastest_of_several_passes_counts(few_layers: None, monkeypatch: pytest.MonkeyPatch):
    """Others' work slows the first pass alone: a clock whose seconds become shorter."""
    now, seen = itertools.accumulate((max(1.0, 100.0 - n) for n in itertools.count()), initial=0.0), []
    monkeypatch.setattr(calibration, "fit_device", lambda *all: seen.extend(all[2]))
    measured_device(Precision("fp32", CPU), 2, 32, CPU, clock=lambda: next(now), passes=2)
    assert {one.seconds for one in seen} == {1.0}
