"""What the measurements of the loaders measure: rates, waiting, memory, and pixels and top-1 beside torchvision's."""

import dataclasses
import json
import mmap

import pytest
import torch
from launching import ALONE, write_network
from made_images import needs_dali, photos

from data import Batch, DataConfig
from data.prepare import prepare_shards
from launch.bench import main
from launch.benches import loader as loader_bench
from launch.benches import memory
from train.checkpoint.network import save_network
from train.config import RunConfig

__all__ = ["photos"]  # the fixture


@needs_dali
def test_dali_and_torchvision_show_a_network_the_same_images(photos, tmp_path_factory, capsys):
    """10 photographs of different sizes, resized and cropped at a run's own sizes."""
    folder = tmp_path_factory.mktemp("network")
    config = RunConfig(data=DataConfig(image_size=32, resize_size=40, batch_size=4)).to_dict()
    network = write_network(folder / "net.pt", "resnet20_cifar", num_classes=2)
    save_network(folder / "net.pt", dataclasses.replace(network, config=config), widths={})
    arguments = ["--checkpoint", str(folder / "net.pt"), "--batch-size", "4", "--out", str(folder / "out.json")]
    assert main(["agreement", "--data", str(photos), *arguments]) == 0
    result = json.loads((folder / "out.json").read_text())
    dali, ours, torchvision = result["rows"]
    assert result["benchmark"] == "agreement, 32 of 40 pixels, cpu"
    assert 0 < dali["mean_difference"] <= 1.2
    assert ours["mean_difference"] < 1e-3 and torchvision["mean_difference"] == 0
    assert dali["images"] == ours["images"] == torchvision["images"] == 10
    assert dali["top1"] == ours["top1"] == torchvision["top1"]
    (photos / "exclude.txt").write_text("val/ant/0.jpg\n")
    assert main(["agreement", "--data", str(photos), "--batch-size", "4"]) == 1
    assert "the two loaders' labels differ" in capsys.readouterr().err


@needs_dali
def test_rates_and_waiting_are_measured_for_every_loader(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "loader.json"
    options = ["--threads", "1", "--rounds", "1", "--batch-size", "2", "--image-size", "32"]
    arguments = ["--data", str(photos), *options, "--network", "resnet20_cifar", "--out", str(out)]
    assert main(["loader", *arguments]) == 0
    result = json.loads(out.read_text())
    names = {"DALI, folder, 1 thread(s)", "DALI, shards, 1 thread(s)", "our folder loader, 1 thread(s)"}
    assert result["images_per_s"].keys() == result["wait_share"].keys() == names | {"torchvision, 1 worker(s)"}
    assert all(row["median"] > 0 for row in result["images_per_s"].values())
    assert all(0 < row["median"] < 1 for row in result["wait_share"].values())


def test_too_few_images_to_measure_are_one_line(photos, capsys):
    assert main(["loader", "--data", str(photos), "--threads", "1", "--batch-size", "8"]) == 1
    assert "14 images make 1 batches of 8, too few to measure, at least 4" in capsys.readouterr().err


def test_waiting_is_what_passes_between_a_step_s_end_and_the_next_batch(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(loader_bench.time, "perf_counter", lambda: now[0])

    def passes(seconds):
        now[0] += seconds

    def batches():
        for number in range(6):
            passes(100.0 if number < 2 else 1.0)  # the first ones are not counted: threads start
            yield Batch(torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.bool))

    options = type("Options", (), {"threads": [1]})
    share = loader_bench._wait_share(batches(), lambda batch: passes(3.0), options, ALONE)
    assert share == pytest.approx(1 / 4)


def test_memory_that_an_epoch_takes_shows_in_its_peak_alone(monkeypatch):
    """Held during the second epoch only; the peak begins anew with each one."""

    class Loader:
        epoch = 0

        def go_to(self, epoch):
            self.epoch = epoch

        def __iter__(self):
            if self.epoch == 1:
                with mmap.mmap(-1, 200 << 20) as held:  # not by malloc: that may hand out what is resident already
                    held.write(b"1" * len(held))
            return iter(())

        def close(self):
            pass

    monkeypatch.setattr(memory, "build_loaders", lambda *arguments, **options: (Loader(), Loader()))
    peaks, resident = memory.peaks_and_resident(DataConfig(), 4)
    assert peaks[1] > max(peaks[0], peaks[2]) + 150
    assert all(peak >= now for peak, now in zip(peaks, resident, strict=True))
    assert memory.growth([50, 100, 90, 104, 101]) == pytest.approx(0.04)


@needs_dali
def test_a_broken_image_ends_the_measurement_of_memory_in_one_line(photos, capsys):
    """Also where the worker processes of a loader are to be ended."""
    (photos / "train" / "ant" / "1.jpg").write_bytes(b"no image")
    assert main(["memory", "--data", str(photos), "--epochs", "3", "--batch-size", "2", "--image-size", "32"]) == 1
    assert "train/ant/1.jpg" in capsys.readouterr().err.splitlines()[-1]


def test_memory_of_too_few_epochs_is_one_line(photos, capsys):
    assert main(["memory", "--data", str(photos), "--epochs", "2"]) == 1
    assert "--epochs: found 2, allowed: a whole number from 3" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["agreement", "--resize-size", "10"], ["loader", "--image-size", "4"]])
def test_sizes_that_no_loader_takes_are_one_line(photos, capsys, arguments):
    assert main([*arguments, "--data", str(photos)]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "_size: found" in line


def test_agreement_on_shards_is_one_line(photos, tmp_path_factory, capsys):
    shards = tmp_path_factory.mktemp("shards") / "set"
    prepare_shards(photos, shards)
    assert main(["agreement", "--data", str(shards)]) == 1
    assert "found shards or a Hugging Face set, allowed: an image folder" in capsys.readouterr().err
