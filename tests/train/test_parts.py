"""The small parts of a run: ledger, learning rate, optimizer groups, models, checkpoints, run directories."""

import ctypes
import json
import math
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from fractions import Fraction
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launching import TINY
from torch import nn

from data import Batch, DataError
from launch import train
from train.allocation import OF_GLIBC, prefer_growing_segments
from train.build import _data_notes, _fitted
from train.checkpoint.file import CheckpointError, load_checkpoint, save_checkpoint
from train.cli import exit_code_of
from train.config import RunConfig, parse_config
from train.config_file import create_run_dir
from train.errors import ConfigError, TrainError
from train.log.cpu import cpu_seconds
from train.log.ledger import Ledger
from train.log.rundir import RunDir, read_log
from train.log.sinks import JsonLines
from train.loop.config import TrainConfig
from train.loop.evaluation import evaluate
from train.loop.progress import EpochSoFar
from train.loop.step import training_step
from train.network import optim
from train.network.models import build_model
from train.network.optim import OptimConfig, build_optimizer, learning_rate, reset_state
from train.network.precision import Precision
from train.network.state import TrainState
from train.start import find_run_dir
from train.world import World, _attempt, announce_failure, explain_lost_rank, open_world


class Clock:
    """A clock that stands still until it is told otherwise."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_ledger_charges_every_second_to_one_kind():
    clock = Clock()
    ledger = Ledger(clock=clock, started=97.0)
    clock.now += 1  # 4 s of startup
    ledger.end_startup()
    clock.now += 0.5
    with ledger.charge("step"):
        clock.now += 10
        with ledger.charge("data_wait"):
            clock.now += 2
        clock.now += 1
    seconds = ledger.seconds
    assert (seconds["startup"], seconds["step"], seconds["data_wait"], seconds["other"]) == (4, 11, 2, 0.5)
    assert ledger.total_s == 17.5


def test_reports_of_the_ledger_add_up_also_across_a_resume():
    clock = Clock()
    ledger = Ledger(8, clock)
    ledger.end_startup()
    with ledger.charge("step"):
        clock.now += 3
    first = ledger.since_last_report()
    stored = ledger.state_dict()

    resumed = Ledger(2, clock)
    clock.now += 5
    resumed.load_state_dict(stored)
    resumed.end_startup()
    with ledger.charge("eval"), resumed.charge("eval"):
        clock.now += 2
    second = resumed.since_last_report()
    assert first["step"] == 3 and second["step"] == 0
    assert second["startup"] == 5 and second["eval"] == 2
    assert resumed.total_s == 10
    assert resumed.gpu_hours(resumed.total_s) == pytest.approx(
        (3 * 8 + 7 * 2) / 3600
    )  # each second times the ranks of its time


def test_cpu_seconds_of_a_resumed_run_are_those_that_it_was_made_with():
    cpu = Clock()
    cpu.now = 0
    first = Ledger(started=0.0, cpu_clock=cpu)
    cpu.now += 3  # imports
    first.end_startup()
    cpu.now += 10
    stored = first.state_dict()
    assert stored["cpu_s"] == first.cpu_s == 13
    cpu.now += 5  # work that a kill takes
    cpu.now = 0  # another process
    resumed = Ledger(started=0.0, cpu_clock=cpu)
    resumed.load_state_dict(stored)
    resumed.add_cpu_before(stored["cpu_s"])
    cpu.now += 4  # its imports: work done once more
    resumed.end_startup()
    cpu.now += 5  # what was lost
    assert resumed.cpu_s == 18
    resumed.add_cpu_before(None)  # what an earlier version began
    assert resumed.cpu_s is None


def test_cpu_seconds_count_threads_living_workers_and_those_that_have_ended():
    def spin() -> None:
        end = time.process_time() + 0.6
        while time.process_time() < end:
            pass

    def worker(done: Any, may_end: Any) -> None:
        spin()
        done.set()
        may_end.wait()

    before = cpu_seconds()
    thread = threading.Thread(target=spin)
    thread.start()
    thread.join()
    assert cpu_seconds() - before > 0.55
    context = multiprocessing.get_context("fork")
    done, may_end = context.Event(), context.Event()
    process = context.Process(target=worker, args=(done, may_end))
    before = cpu_seconds()
    process.start()
    done.wait()
    assert cpu_seconds() - before > 0.55
    may_end.set()
    process.join()
    assert 0.55 < cpu_seconds() - before < 1.2  # and not twice


def test_the_paper_s_step_schedule():
    config = OptimConfig(lr=0.1, milestones=(30, 60))
    rates = [learning_rate(config, progress, 90) for progress in (0, 29.99, 30, 59.99, 60, 89)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_warm_up_and_cosine():
    config = OptimConfig(lr=0.4, schedule="cosine", warmup_epochs=5)
    rates = [learning_rate(config, progress, 105) for progress in (0, 2.5, 5, 55, 105)]
    assert rates == pytest.approx([0, 0.2, 0.4, 0.2, 0])


def test_norms_and_biases_may_be_spared_from_weight_decay():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.1, decay_norms_and_biases=False))
    decayed, spared = optimizer.param_groups
    assert {id(p) for p in decayed["params"]} == {id(model[0].weight), id(model[3].weight)}
    assert {id(p) for p in spared["params"]} == {id(p) for p in (model[0].bias, *model[1].parameters(), model[3].bias)}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0)


@pytest.mark.parametrize("restart", [False, True])
def test_an_overflow_in_the_first_fp16_step_leaves_no_garbage_in_the_momentum(restart: bool):
    model = nn.Linear(4, 4)
    optimizer = build_optimizer(model, OptimConfig(lr=0.1))
    if restart:
        optimizer.step()
        reset_state(optimizer)
    before = model.weight.detach().clone()
    precision = Precision("fp16", torch.device("cpu"))
    precision.backward(model(torch.full((2, 4), 1e30)).sum() * 1e30)
    precision.step(optimizer)  # the gradients overflowed: the scaler skips the step
    assert torch.equal(model.weight, before)
    assert all(not state["momentum_buffer"].any() for state in optimizer.state.values())


def made_step(config: TrainConfig) -> tuple[nn.Module, float]:
    """A small network after one step on one batch, and its loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3))
    optimizer = build_optimizer(model, OptimConfig(lr=0.5))
    state = TrainState(model, model, optimizer, Precision("fp32", torch.device("cpu")))
    loss = training_step(state, torch.randn(7, 3, 2, 2), torch.arange(7) % 3, config)
    return model, loss.item()


def test_a_batch_in_pieces_makes_the_step_of_the_whole_batch():
    whole, loss = made_step(TrainConfig())
    pieces, loss_of_pieces = made_step(TrainConfig(accumulate=3))  # 3 + 2 + 2 images
    assert loss_of_pieces == pytest.approx(loss, rel=1e-6)
    for one, other in zip(whole.parameters(), pieces.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_pieces_are_as_even_as_can_be():
    """Batch norm takes a piece at a time, and of one value a channel there is no deviation."""
    sizes: list[int] = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    optimizer = build_optimizer(model, OptimConfig(lr=0.5))
    state = TrainState(model, model, optimizer, Precision("fp32", torch.device("cpu")))
    for images, pieces in ((13, 4), (2, 5)):
        training_step(state, torch.randn(images, 3, 2, 2), torch.arange(images) % 3, TrainConfig(accumulate=pieces))
    assert sizes == [4, 3, 3, 3, 1, 1]


def test_gradients_are_clipped_to_the_norm_asked_for():
    before, _ = made_step(TrainConfig(clip_norm=1e-30))
    free, _ = made_step(TrainConfig())
    clipped, _ = made_step(TrainConfig(clip_norm=0.01))
    moved = [(new - old).detach().norm() for new, old in zip(clipped.parameters(), before.parameters(), strict=True)]
    assert torch.stack(moved).norm().item() == pytest.approx(0.5 * 0.01, rel=2e-2)  # lr times the norm
    loose, _ = made_step(TrainConfig(clip_norm=1e9))
    for one, other in zip(free.parameters(), loose.parameters(), strict=True):
        assert torch.equal(one, other)


def test_clipping_sees_gradients_without_the_scale_of_fp16():
    model = nn.Linear(2, 1, bias=False)
    model.weight.data.zero_()
    optimizer = build_optimizer(model, OptimConfig(lr=1.0, momentum=0, weight_decay=0))
    precision = Precision("fp16", torch.device("cpu"))
    precision.backward(model(torch.ones(1, 2)).sum())  # the gradient is (1, 1), scaled by 65536
    precision.step(optimizer, clip_norm=0.5)
    assert model.weight.norm().item() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("name", ["apex_sgd", "apex_lamb"])
def test_apex_is_refused_clearly_where_it_cannot_run(name: str, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match=f"optim.name: {name} needs a GPU, this run has none; allowed here: sgd"):
        build_optimizer(nn.Linear(2, 2), OptimConfig(name=name))
    monkeypatch.setitem(sys.modules, "amp_C", None)  # as if it were not installed
    with pytest.raises(
        ConfigError, match=f"optim.name: {name} needs NVIDIA's apex .* not installed .* PyPI is another"
    ):
        optim._apex_optimizer(name)


def test_apex_is_taken_by_name_with_its_own_clipping_off(monkeypatch: pytest.MonkeyPatch):
    """apex cannot run here: a stand-in takes down how it is called, on parameters that claim to be on a GPU."""
    calls = []

    def stand_in(name: str):
        def build(groups: list, **settings: object) -> torch.optim.Optimizer:
            calls.append((name, settings))
            return torch.optim.SGD(groups, lr=settings["lr"], momentum=settings.get("momentum", 0))

        return build

    optimizers = SimpleNamespace(FusedSGD=stand_in("FusedSGD"), FusedLAMB=stand_in("FusedLAMB"))
    monkeypatch.setitem(sys.modules, "amp_C", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "apex", SimpleNamespace(optimizers=optimizers))
    model = nn.Linear(2, 2, device="meta")
    monkeypatch.setattr(optim, "_is_on_gpu", lambda parameter: True)
    build_optimizer(model, OptimConfig(name="apex_sgd", lr=0.2, momentum=0.8))
    build_optimizer(model, OptimConfig(name="apex_lamb", lr=0.2))
    assert calls == [
        ("FusedSGD", {"lr": 0.2, "momentum": 0.8, "nesterov": False}),
        ("FusedLAMB", {"lr": 0.2, "max_grad_norm": math.inf}),
    ]


def test_forgetting_the_momentum_starts_averages_and_their_correction_anew():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["step"] = 7  # as FusedLAMB counts
    optimizer.state[model.weight] = {"exp_avg": torch.ones(2, 2)}
    reset_state(optimizer)
    assert not optimizer.state and "step" not in optimizer.param_groups[0]


def test_momentum_that_starts_at_zero_makes_torch_s_own_steps():
    torch.manual_seed(0)
    ours, theirs = nn.Linear(4, 4), nn.Linear(4, 4)
    theirs.load_state_dict(ours.state_dict())
    config = OptimConfig(lr=0.1, momentum=0.9, weight_decay=0.01)
    optimizers = build_optimizer(ours, config), torch.optim.SGD(theirs.parameters(), 0.1, 0.9, weight_decay=0.01)
    for seed in range(3):
        torch.manual_seed(seed)
        images = torch.randn(8, 4)
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model(images).square().sum().backward()
            optimizer.step()
    assert torch.allclose(ours.weight, theirs.weight, rtol=1e-5, atol=1e-6)


def test_evaluation_counts_padding_for_nothing():
    """Five images in two batches of four: three paddings, which a careless count would take for hits or for misses."""

    class Echo(nn.Module):
        """Logits that put the classes in the order that the image's pixels name."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            order = images.flatten(1).long()
            return torch.zeros(len(order), 6).scatter(1, order, torch.arange(6.0, 0, -1).expand(len(order), 6))

    class Batches(list):
        num_classes = 6

    first, last = [0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]  # class 0 is the first guess, or the sixth
    guesses = torch.tensor([first, first, last, [1, 0, 2, 3, 4, 5], last, first, last, first]).float()
    valid = torch.tensor([True] * 5 + [False] * 3)
    images, labels = guesses.reshape(8, 6, 1, 1), torch.zeros(8, dtype=torch.int64)
    labels[2] = 5  # its first guess
    batches = Batches(Batch(images[i : i + 4], labels[i : i + 4], valid[i : i + 4]) for i in (0, 4))
    world = World(0, 1, 0, 1, torch.device("cpu"))
    result = evaluate(Echo(), batches, Precision("fp32", world.device), world)
    assert (result.top1, result.top5, result.images) == (60.0, 80.0, 5)
    assert (result.class_images, result.class_hits) == ((4, 0, 0, 0, 0, 1), (2, 0, 0, 0, 0, 1))


@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [
        ("resnet20_cifar", (3, 32, 32), 269_722),
        ("resnet56_cifar", (3, 32, 32), 853_018),
        ("vgg16_cifar", (3, 32, 32), 14_728_266),
        ("lenet", (1, 28, 28), 431_080),
        ("mlp", (1, 28, 28), 545_810),
        ("resnet18", (3, 64, 64), 11_181_642),
    ],
)
def test_networks_of_the_paper_have_their_sizes(name: str, shape: tuple[int, ...], parameters: int):
    model = build_model(name, 10).eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model(torch.zeros(2, *shape)).shape == (2, 10)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_with_auxiliary_heads_give_one_tensor_of_logits_in_training(name: str):
    model = build_model(name, 10).train()
    assert model(torch.zeros(2, 3, 80, 80)).shape == (2, 10)


def test_an_unknown_network_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"model\.name: found 'resnet51'.*resnet50"):
        build_model("resnet51", 10)


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"epoch": 1})

    def full_disk(content: object, file: object) -> None:
        file.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(CheckpointError, match="no space left"):
        save_checkpoint(path, {"epoch": 2})
    monkeypatch.undo()
    assert torch.load(path, weights_only=True)["epoch"] == 1  # no whole checkpoint, which load_checkpoint would ask for
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_a_checkpoint_is_on_the_disk_before_it_takes_its_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"epoch": 1})
    order: list[tuple] = []
    rename = Path.replace

    def fsync(descriptor: int) -> None:
        order.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink(), os.fstat(descriptor).st_size))

    def replace(self: Path, target: Path) -> None:
        order.append(("rename", self, target))
        rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    save_checkpoint(path, {"epoch": 2}, keep=2)
    part, folder_size = tmp_path / "last.pt.part", tmp_path.stat().st_size
    assert order == [
        ("sync", part, path.stat().st_size),  # all of it
        ("rename", path, tmp_path / "last-1.pt"),
        ("rename", part, path),
        ("sync", tmp_path, folder_size),
    ]


class Payload:
    """An object whose unpickling runs code."""

    def __reduce__(self) -> tuple:
        return (Path("/tmp/cupss_was_here").touch, ())


def test_a_checkpoint_with_code_in_it_is_refused_and_not_run(tmp_path: Path):
    torch.save({"format": 1, "model": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match=r"evil\.pt"):
        load_checkpoint(tmp_path / "evil.pt")
    assert not Path("/tmp/cupss_was_here").exists()


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:100] + b"x" * 50 + b[150:]])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, damage):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"weights": torch.arange(1000.0)})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"last\.pt"):
        load_checkpoint(path)


def config_in(root: Path, **changes: str) -> RunConfig:
    overrides = [text for key, value in changes.items() for text in (f"--{key.replace('__', '.')}", value)]
    return parse_config([*overrides, "--run.root", str(root)], "train.py", str(TINY))


def choose_run_dir(config: RunConfig) -> RunDir:
    """What a run does at its start."""
    run_dir = find_run_dir(config)
    create_run_dir(run_dir, config, run_id=None)
    return run_dir


def finish(path: Path) -> None:
    (path / "log.jsonl").write_text(json.dumps({"event": "done"}) + "\n")


def test_a_run_directory_is_resumed_kept_or_numbered(tmp_path: Path):
    config = config_in(tmp_path)
    first = choose_run_dir(config).path
    assert first == tmp_path / "tiny"
    assert choose_run_dir(config).path == first  # unfinished, same configuration: goes on
    finish(first)
    second = choose_run_dir(config).path
    assert second == tmp_path / "tiny-2"
    assert choose_run_dir(config).path == second
    finish(second)
    assert choose_run_dir(config).path == tmp_path / "tiny-3"


def test_resume_never_takes_a_new_directory(tmp_path: Path):
    config = config_in(tmp_path, run__resume="never")
    assert [choose_run_dir(config).path.name for _ in range(3)] == ["tiny", "tiny-2", "tiny-3"]


def test_how_a_run_is_resumed_is_no_difference_between_configurations(tmp_path: Path):
    choose_run_dir(config_in(tmp_path, run__resume="never"))
    assert choose_run_dir(config_in(tmp_path, run__resume="auto")).path.name == "tiny"


def test_an_unfinished_run_of_another_configuration_is_refused(tmp_path: Path):
    choose_run_dir(config_in(tmp_path))
    with pytest.raises(ConfigError, match=r"optim\.lr \(0\.05 there, 0\.3 now\)"):
        choose_run_dir(config_in(tmp_path, optim__lr="0.3"))


def test_a_run_may_go_on_with_settings_that_compute_nothing_and_leave_out_steps_that_broke_it(tmp_path: Path):
    choose_run_dir(config_in(tmp_path))
    others = {"data__threads": "3", "data__mmap": "false", "data__path": "elsewhere", "data__hw_decoder_load": "0"}
    again = config_in(tmp_path, **others, train__nonfinite="skip", train__nonfinite_limit="3")
    assert choose_run_dir(again).path.name == "tiny"
    with pytest.raises(ConfigError, match=r"train\.precision \('fp32' there, 'bf16' now\)"):
        choose_run_dir(config_in(tmp_path, train__precision="bf16"))


def test_a_directory_that_is_no_run_is_left_alone(tmp_path: Path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/thesis.tex").write_text("years of work")
    with pytest.raises(TrainError, match="no run directory"):
        choose_run_dir(config_in(tmp_path))
    assert [path.name for path in (tmp_path / "tiny").iterdir()] == ["thesis.tex"]


def test_a_kill_while_the_configuration_is_written_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/config.yaml.part").write_text("run:\n  na")
    assert choose_run_dir(config_in(tmp_path)).path == tmp_path / "tiny"
    assert [path.name for path in (tmp_path / "tiny").iterdir()] == ["config.yaml"]

    def full_disk(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(TrainError, match="no space left"):
        create_run_dir(RunDir(tmp_path / "other"), config_in(tmp_path), run_id=None)
    assert not list((tmp_path / "other").iterdir())


def test_a_log_with_damage_in_the_middle_is_refused_but_a_cut_off_end_is_not(tmp_path: Path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"event": "run"}\n{"event": "ep')
    assert read_log(log) == [{"event": "run"}]
    log.write_text('{"event": "run"}\n{"event": "ep\n{"event": "done"}\n')
    with pytest.raises(TrainError, match="line 2"):
        read_log(log)


def test_two_processes_cannot_write_one_log(tmp_path: Path):
    first = JsonLines(tmp_path / "log.jsonl")
    first.write({"event": "run"})
    with pytest.raises(TrainError, match="another process"):
        JsonLines(tmp_path / "log.jsonl")
    assert read_log(tmp_path / "log.jsonl") == [{"event": "run"}]
    first.close()
    JsonLines(tmp_path / "log.jsonl").close()
    assert read_log(tmp_path / "log.jsonl") == []


def test_lines_of_an_exclude_list_that_match_nothing_are_a_note():
    loader = SimpleNamespace(num_excluded=0, unmatched=("a", "b", "c", "d", "e"), passed_over=())
    trainer = SimpleNamespace(train_loader=loader, val_loader=loader)
    [note] = _data_notes(RunConfig(), trainer)
    assert note.startswith("datasets/imagenet/exclude.txt names what is not in the data set")
    assert note.endswith("a, b, c and 2 more")


def test_what_is_no_image_by_name_or_place_is_a_note_for_each_split():
    trained, evaluated = (SimpleNamespace(num_excluded=0, unmatched=(), passed_over=names) for names in (("a/b",), ()))
    [note] = _data_notes(RunConfig(), SimpleNamespace(train_loader=trained, val_loader=evaluated))
    assert note == "datasets/imagenet: not among the training images, for its name or place: a/b"


@pytest.mark.parametrize(("ratio", "steps", "step", "is_trained"), [("4/3", 4, 4, True), ("3/4", 5, 5, True)])
def test_an_epoch_at_its_end_is_taken_up_with_another_batch(ratio: str, steps: int, step: int, is_trained: bool):
    """5 of 5 steps of 24 would be 3 of 4 steps of 32, but its training has ended, and the method has acted."""
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
    written = [EpochSoFar(None, {}, torch.tensor(10.0), torch.tensor(0.0), step=5, is_trained=True)] * 3
    so_far = EpochSoFar.restored(written, world, Fraction(ratio), steps)
    assert (so_far.step, so_far.is_trained) == (step, is_trained)
    assert so_far.loss_sum == pytest.approx(2.0 * step)
    assert written[0].step == 5


@pytest.mark.parametrize(("steps", "step", "is_trained"), [(4, 4, True), (5, 5, True), (7, 7, True)])
def test_an_epoch_of_a_set_that_lost_or_got_images_ends_where_the_set_does(steps: int, step: int, is_trained: bool):
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
    written = EpochSoFar(None, {}, torch.tensor(10.0), torch.tensor(0.0), step=5, is_trained=True)
    so_far = EpochSoFar.restored([written], world, Fraction(1), steps)
    assert (so_far.step, so_far.is_trained) == (step, is_trained)
    assert so_far.loss_sum == pytest.approx(2.0 * step)


@pytest.mark.parametrize(
    ("ranks", "has_run", "batch_size", "lr"),
    [(4, True, 32, 0.05), (3, True, 30, 0.05 * 30 / 32), (3, False, 32, 0.05), (33, True, 32, 0.05)],
)
def test_ranks_that_cannot_share_the_batch_go_on_with_the_next_smaller_one_and_less_learning_rate(
    tmp_path: Path, ranks: int, has_run: bool, batch_size: int, lr: float
):
    """With 33 ranks for 32 images, or in a run that begins, the loader refuses it."""
    config = config_in(tmp_path)
    fitted, words = _fitted(config, World(0, ranks, 0, ranks, torch.device("cpu")), has_run)
    assert (fitted.data.batch_size, fitted.optim.lr) == (batch_size, pytest.approx(lr))
    assert len(words) == (batch_size != 32) and all("optim.lr 0.046875 in place of 0.05" in word for word in words)
    assert fitted.prune == config.prune and fitted.train == config.train


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("Tried to allocate 2 GiB.\nmore"), "lower data.batch_size or raise train.accumulate"),
        (dist.DistNetworkError("Connection closed by peer [10.0.0.2]:4711\nmore"), "lost another rank"),
        (dist.DistError("Timed out waiting 1000ms\nmore"), "another rank did not answer in time"),
    ],
)
def test_what_torch_raises_for_a_full_gpu_or_a_lost_rank_is_one_line(
    error: Exception, said: str, capsys: pytest.CaptureFixture
):
    def action() -> None:
        raise error

    assert exit_code_of(action, debug=False) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert said in line and line.endswith(f"({str(error).splitlines()[0]})")


def test_warnings_of_ours_are_a_line_and_others_say_where_they_come_from():
    before, printed = warnings.formatwarning, []

    def action() -> None:
        ours, theirs = train.__file__, str(TINY.parents[2] / ".venv/lib/library.py")
        printed.append(warnings.formatwarning("ours", UserWarning, ours, 1))
        printed.append(warnings.formatwarning("theirs", UserWarning, theirs, 7))
        printed.append(warnings.formatwarning("old", DeprecationWarning, ours, 1))

    assert exit_code_of(action, debug=False) == 0
    assert printed[0] == "note: ours\n" and printed[1].endswith("library.py:7: UserWarning: theirs\n")
    assert "DeprecationWarning" in printed[2]
    assert warnings.formatwarning is before


def test_the_first_word_of_a_failure_is_what_the_other_ranks_say(monkeypatch: pytest.MonkeyPatch):
    store = dist.HashStore()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    lost = dist.DistNetworkError("Connection closed by peer")
    assert "lost another rank" in explain_lost_rank(lost)
    announce_failure(DataError("cannot read\n  M\udcfcll.jpg"))
    announce_failure(TrainError("what followed from it"))
    assert explain_lost_rank(lost) == r"rank 1 failed: cannot read M\udcfcll.jpg"


def test_a_store_that_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch):
    asked, answered, over = threading.Event(), [], threading.Event()

    class Silent:
        def clone(self) -> "Silent":
            return self

        def check(self, keys: list[str]) -> bool:
            asked.set()
            answered.append(over.wait(60))
            return False

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", Silent)
    monkeypatch.setattr("train.world.STORE_ANSWERS_WITHIN_S", 0.05)
    assert "lost another rank" in explain_lost_rank(dist.DistNetworkError("Connection closed by peer"))
    assert asked.wait(60) and not answered
    over.set()


def test_a_meeting_place_that_does_not_exist_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "junk")
    with pytest.raises(ConfigError, match="RANK: found 'junk' in the environment, allowed: a whole number"):
        open_world("cpu")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        variables = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": taken.getsockname()[1]}
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(TrainError, match=r"cannot join the other ranks at 127\.0\.0\.1:\d+ .*EADDRINUSE"):
            open_world("cpu", timeout_minutes=0.05)


def test_ranks_started_again_on_the_same_store_do_not_take_an_earlier_start_for_theirs():
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def start(rank: int, size: int, after_s: float) -> str:
        time.sleep(after_s)
        store = dist.TCPStore("127.0.0.1", server.port, wait_for_workers=False)
        return _attempt(store, rank, size, timedelta(seconds=20))

    attempts = []
    for delays in ((0.0, 0.0, 0.0), (0.0, 0.2, 0.4), (0.4, 0.2), (0.0, 0.3, 0.1, 0.2)):
        with ThreadPoolExecutor(4) as ranks:
            names = set(ranks.map(start, range(len(delays)), repeat(len(delays)), delays))
        assert len(names) == 1
        attempts += names
        server.set("names/1", "a rank that died before the others came")
    assert len(set(attempts)) == 4
    with pytest.raises(RuntimeError, match=r"timed out after 0:00:00.100000 with no word of all the others"):
        _attempt(server, 0, 3, timedelta(seconds=0.1))
    with pytest.raises(RuntimeError, match="no word of rank 0"):
        _attempt(server, 1, 3, timedelta(seconds=0.1))


def test_an_interrupted_training_says_how_it_goes_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "_train", interrupted)
    assert train.main([]) == 130
    assert capsys.readouterr().err.startswith("interrupted; the same command goes on from the last checkpoint")


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "x"}, {"PYTORCH_ALLOC_CONF": "x"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "y"}, {"PYTORCH_CUDA_ALLOC_CONF": "y"}),
    ],
)
def test_segments_grow_unless_the_user_says_anything_of_memory(monkeypatch: pytest.MonkeyPatch, given, found):
    monkeypatch.setattr(os, "environ", dict(given))
    prefer_growing_segments()
    assert os.environ == found


FREED_AND_TAKEN_AGAIN = """
import resource, torch
from train.world import open_world
open_world("cpu")
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.zeros(40 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc's allocator")
@pytest.mark.parametrize(("variables", "given_back"), [({}, False), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, True)])
def test_on_a_cpu_large_blocks_are_kept_for_the_next_step(variables, given_back):
    """10,240 pages of 4 KiB, or 20 of 2 MiB, would be cleared for each of four tensors; unless the user wants that."""
    environment = {name: value for name, value in os.environ.items() if name not in OF_GLIBC} | variables
    command = [sys.executable, "-c", FREED_AND_TAKEN_AGAIN]
    found = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert (int(found.stdout) >= 80) == given_back


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_logits_that_bf16_cannot_tell_apart_are_told_apart(precision: str):
    """4096 and 4097 are equal in bf16, and in fp16; the right class is the second."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 3))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[4096.0], [4097.0], [0.0]]))
        model[1].bias.zero_()
    batch = Batch(torch.ones(2, 1, 1, 1), torch.tensor([1, 1]), torch.tensor([True, True]))
    loader = FewBatches([batch], num_classes=3)
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
    assert evaluate(model, loader, Precision(precision, world.device), world).top1 == 100
    assert not model[1]._forward_hooks


def test_a_classifier_of_ones_own_class_is_evaluated_as_it_computes():
    class Backwards(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).flip(1)

    model = nn.Sequential(nn.Flatten(), Backwards(1, 3, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[0.0], [1.0], [2.0]]))
    batch = Batch(torch.ones(2, 1, 1, 1), torch.tensor([0, 0]), torch.tensor([True, True]))
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
    assert evaluate(model, FewBatches([batch], num_classes=3), Precision("bf16", world.device), world).top1 == 100


class FewBatches(list):
    """What an evaluation needs of a loader."""

    def __init__(self, batches: list[Batch], num_classes: int) -> None:
        super().__init__(batches)
        self.num_classes = num_classes
