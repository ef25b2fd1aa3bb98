"""The check-up: what each check finds when that very thing is wrong, and what the script says of it."""

import dataclasses
import json
import math
import os
import signal
import socket
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launching import ALONE, error_of, launch, start
from made_images import needs_dali
from torch.optim.swa_utils import AveragedModel

from data.loader import SplitLoader
from launch import doctor
from launch.checkup import images, machine, ranks, runs, steps
from launch.checkup.check import EFFORTS, Check, Effort, Failed, Figure, Machine, Result, Skipped, perform
from launch.checkup.counting import Operations
from launch.checkup.table import CHECKS
from train.checkpoint import restore
from train.log.rundir import RunDir
from train.loop.nonfinite import StepGuard
from train.network.ema import MovingAverage
from train.resizer import Resizer
from train.world import RankFailed, World

EFFORT = Effort("resnet20_cifar", 16, (4,), steps=1, photos=24, threads=(1,))


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """This process alone, with the photographs made."""
    found = Machine(ALONE, EFFORT, tmp_path_factory.mktemp("doctor"))
    images.make_photographs(found)
    return found


def result(look, here: Machine):
    [found] = perform([Check("one", look)], here, lambda number, check: None)
    return found


def fails(look, here: Machine, why: str) -> bool:
    found = result(look, here)
    return found.status == "fail" and why in found.text


def passes(look, here: Machine) -> bool:
    found = result(look, here)
    return found.status == "pass" or pytest.fail(found.text)


def test_a_check_passes_fails_or_is_skipped_and_never_ends_the_others(here: Machine):
    def look(error: Exception):
        def raising(machine: Machine) -> Figure:
            raise error

        return raising

    figure = Figure("42 images/s", {"rate": 42})
    checks = [
        Check("fine", lambda machine: figure),
        Check("wrong", look(Failed("three of four"))),
        Check("elsewhere", look(Skipped("no GPU"))),
        Check("broken", look(ZeroDivisionError("by\nnothing"))),
    ]
    begun = []
    results = list(perform(checks, here, lambda number, check: begun.append((number, check.name))))
    assert [(one.status, one.text) for one in results] == [
        ("pass", "42 images/s"),
        ("fail", "three of four"),
        ("skipped", "no GPU"),
        ("fail", "ZeroDivisionError: by nothing"),
    ]
    assert results[0].numbers == [{"rate": 42}]
    assert begun == [(1, "fine"), (2, "wrong"), (3, "elsewhere"), (4, "broken")]


def test_names_of_checks_are_distinct():
    assert len({check.name for check in CHECKS}) == len(CHECKS)


def test_what_only_a_gpu_can_do_is_skipped_with_a_reason(here: Machine):
    for look in (machine.gpu, machine.fp32, images.gpu_decoder, steps.compiled):
        found = result(look, here)
        assert found.status == "skipped" and found.text.startswith("no GPU: ")
    assert "one rank" in result(machine.exchange, here).text


def test_versions(here: Machine, monkeypatch: pytest.MonkeyPatch):
    assert passes(machine.versions, here)
    both = {"python": "3.11", "torch": "2.14", **dict.fromkeys(machine.DALI_WHEELS, "2.4.0")}
    with monkeypatch.context() as patch:
        patch.setattr(machine, "described", lambda *names: both)
        assert fails(machine.versions, here, "both installed")
    monkeypatch.setattr(machine, "described", lambda *names: both | {machine.DALI_WHEELS[1]: None})
    monkeypatch.setattr(machine, "import_failure", lambda: ImportError("libcuda"))
    assert fails(machine.versions, here, "does not import: libcuda")


def test_a_rank_that_finds_something_wrong_leaves_no_other_waiting(here: Machine, monkeypatch: pytest.MonkeyPatch):
    """Two ranks, of which this is the first; the other one is played by what `all_gather` gives."""
    gathered, others = [], [None]
    monkeypatch.setattr(World, "all_gather", lambda self, value: gathered.append(value) or [value, *others])
    pair = dataclasses.replace(here, world=dataclasses.replace(ALONE, size=2, local_size=2))
    both = dict.fromkeys(("python", "torch", *machine.DALI_WHEELS), "1")
    with monkeypatch.context() as patch:
        patch.setattr(machine, "described", lambda *names: both)
        with pytest.raises(Failed, match="both installed"):
            machine.versions(pair)
    assert len(gathered) == 1
    monkeypatch.setattr(World, "all_reduce", lambda self, tensor: tensor)
    with pytest.raises(Failed, match=r"an all-reduce of 16 MiB gave \[1.0\], expected 3.0"):
        machine.exchange(pair)
    assert len(gathered) == 2 and "expected 3.0" in gathered[1][0]
    monkeypatch.setattr(World, "all_reduce", lambda self, tensor: tensor.fill_(3.0))
    others[0] = ("a sum is wrong", 1)
    with pytest.raises(RankFailed, match="rank 1 failed: a sum is wrong"):
        machine.exchange(pair)


def test_a_loss_of_one_rank_is_told_to_all(here: Machine, monkeypatch: pytest.MonkeyPatch):
    told, honest = [], World.on_every_rank

    def on_every_rank(self: World, action):
        try:
            return honest(self, action)
        except Failed as error:
            told.append(str(error))
            raise

    monkeypatch.setattr(World, "on_every_rank", on_every_rank)
    monkeypatch.setattr(steps, "training_step", lambda *others: torch.tensor(math.nan))
    assert fails(steps.cuts, here, "a loss is not finite") and told == ["a loss is not finite at FR 1.00"]


def test_cores(here: Machine, monkeypatch: pytest.MonkeyPatch):
    assert passes(machine.affinity, here)
    crowded = dataclasses.replace(here, world=dataclasses.replace(ALONE, local_size=1000))
    assert fails(machine.affinity, crowded, "cores for 1000 ranks")


@needs_dali
def test_decoders(here: Machine, monkeypatch: pytest.MonkeyPatch):
    assert passes(images.decoders, here)
    honest = images.DaliDecoder.decode
    monkeypatch.setattr(images.DaliDecoder, "decode", lambda self, content: 255 - honest(self, content))
    elsewhere = dataclasses.replace(here, folder=here.folder / "again")
    elsewhere.folder.mkdir()
    assert fails(images.decoders, elsewhere, "DALI decodes to other images than Pillow: JPEG ")


@needs_dali
def test_loaders(here: Machine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(images, "pixel_difference", lambda *loaders: (3.0, 9.0))
    assert fails(images.loaders_agree, here, "3.00 of 255 from torchvision's")


def test_sizes_that_grow(here: Machine, monkeypatch: pytest.MonkeyPatch):
    assert passes(images.growing_sizes, here)
    monkeypatch.setattr(images, "train_size", lambda config, epoch: 16)
    assert fails(images.growing_sizes, here, "found [8, 12, 16], expected [16, 16, 16]")


def test_a_loader_that_forgets_where_it_was(here: Machine, monkeypatch: pytest.MonkeyPatch):
    assert passes(images.rebuilt, here)
    monkeypatch.setattr(SplitLoader, "load_state_dict", lambda self, state: None)
    assert fails(images.rebuilt, here, "batch 1 after a rebuild is another one")


def test_batches_that_are_overwritten_before_they_are_read(here: Machine, monkeypatch: pytest.MonkeyPatch):
    assert passes(images.handed_over, here)
    honest, taken = SplitLoader.__iter__, []

    def batches(self: SplitLoader):
        for batch in honest(self):
            taken.append(batch.images)
            yield batch

    monkeypatch.setattr(SplitLoader, "__iter__", batches)
    monkeypatch.setattr(images, "_delay", lambda machine: taken[-1].add_(1) if len(taken) == 8 else None)
    assert fails(images.handed_over, here, "batches [2] of 6 were overwritten")


def test_rates_of_decoding(here: Machine):
    found = result(images.decoding_rates, here)
    assert found.numbers[0]["rows"][0]["images_per_s"] > 0


def test_photographs_grow_with_the_ranks_and_too_few_are_no_rate(here: Machine, tmp_path: Path):
    eight = dataclasses.replace(here, world=dataclasses.replace(ALONE, size=8), folder=tmp_path)
    images.make_photographs(eight)
    made = list((tmp_path / images.PHOTOGRAPHS / "train").rglob("*.jpg"))
    assert len(made) == 8 * EFFORT.photos and len({path.stat().st_ino for path in made}) == images.DISTINCT
    crowded = dataclasses.replace(here, effort=dataclasses.replace(EFFORT, batch_sizes=(8,)))
    assert fails(images.decoding_rates, crowded, "a rate would be of 1 step(s), needed 4")
    assert fails(images.rebuilt, crowded, "an epoch has 3 batches, needed 4")


@pytest.mark.parametrize("effort", EFFORTS.values(), ids=map("-".join, EFFORTS))
def test_photographs_are_enough_for_a_rate(effort: Effort):
    steps_of_an_epoch = effort.photos // effort.batch_sizes[-1]
    assert steps_of_an_epoch - steps_of_an_epoch // 4 - 1 >= images.MIN_TIMED


def test_a_rebuilt_loader_that_gives_fewer_batches(here: Machine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(SplitLoader, "load_state_dict", lambda self, state: self.go_to(0, len(self) - 1))
    assert fails(images.rebuilt, here, "1 batches come after a rebuild, expected 3")


def test_host_reads_and_operations_of_a_step(here: Machine, monkeypatch: pytest.MonkeyPatch):
    assert passes(steps.reads_of_a_step, here)
    with monkeypatch.context() as patch:
        honest = StepGuard.step
        patch.setattr(StepGuard, "step", lambda self, *others: honest(self, *others) or bool(self.found_inf))
        assert fails(steps.reads_of_a_step, here, "a step reads 1 values from the device: _local_scalar_dense")
    monkeypatch.setattr(MovingAverage, "update_parameters", AveragedModel.update_parameters)
    assert fails(steps.reads_of_a_step, here, "from the device")


def test_a_moving_average_of_many_operations(here: Machine, monkeypatch: pytest.MonkeyPatch):
    def one_by_one(self: MovingAverage, model: torch.nn.Module) -> None:
        with torch.no_grad():
            for own, theirs in zip(self.module.parameters(), model.parameters(), strict=True):
                own.lerp_(theirs, 0.1)

    monkeypatch.setattr(MovingAverage, "update_parameters", one_by_one)
    assert fails(steps.reads_of_a_step, here, "operations a step, allowed 10")


def test_operations_are_counted_and_views_are_not():
    values = torch.arange(4.0)
    with Operations() as seen:
        (values.view(2, 2).t() + 1).sum().item()
    assert seen.names == ["add", "sum", "_local_scalar_dense"] and seen.reads == ["_local_scalar_dense"]


def test_losses_that_are_not_numbers(here: Machine, monkeypatch: pytest.MonkeyPatch):
    assert passes(steps.rates, here)
    monkeypatch.setattr(steps, "training_step", lambda *others: torch.tensor(math.nan))
    assert fails(steps.rates, here, "fp32, batch 4: the loss is nan")
    assert fails(steps.cuts, here, "a loss is not finite at FR 1.00")


def test_cuts(here: Machine, monkeypatch: pytest.MonkeyPatch):
    times = iter([1.0, *[1.0, 1.0] * 3, *[1.0, 0.5, 1.0, 0.5, 1.0, 0.5, 1.0] * 3])
    honest_timed = steps.timed

    def timed(work, world) -> float:
        honest_timed(work, world)
        return next(times)

    with monkeypatch.context() as patch:
        patch.setattr(steps, "timed", timed)
        found = result(steps.cuts, here)
    assert found.status == "pass" and "batch 4, FR" in found.text and "steps 2.00/2.00/2.00 times as fast" in found.text
    rows = found.numbers[0]["rows"]
    assert rows[-1]["flops_reduction"] == pytest.approx(2.2, abs=0.1) and len({row["digest"] for row in rows[1:]}) == 3
    honest = Resizer.act

    def act(self: Resizer, decide, state, world):
        outcome = honest(self, decide, state, world)
        for own in state.optimizer.state.values():
            own["momentum_buffer"] = own["momentum_buffer"].contiguous()
        return outcome

    monkeypatch.setattr(Resizer, "act", act)
    assert fails(steps.cuts, here, "momentum after a cut are not in channels-last memory format")


def test_cuts_where_memory_is_short(here: Machine, monkeypatch: pytest.MonkeyPatch):
    honest, taken = steps.training_step, []

    def step(state, images: torch.Tensor, *others):
        if len(images) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        taken.append(len(images))
        return honest(state, images, *others)

    monkeypatch.setattr(steps, "training_step", step)
    monkeypatch.setattr(steps, "timed", lambda work, world: (work(), 1.0)[1])
    room = 2
    assert fails(steps.cuts, here, "takes 1.00 times as long") and set(taken) == {2}
    room = 1
    assert fails(steps.cuts, here, "not enough GPU memory for a step of 2 images")


def test_a_cut_network_that_is_no_faster(here: Machine, monkeypatch: pytest.MonkeyPatch):
    honest = steps.timed
    monkeypatch.setattr(steps, "timed", lambda work, world: min(honest(work, world), 1.0) * 0 + 1.0)
    assert fails(steps.cuts, here, "takes 1.00 times as long as a dense one")


def test_gradients_that_are_not_finite(here: Machine, monkeypatch: pytest.MonkeyPatch):
    assert passes(steps.infinities, here)
    monkeypatch.setattr(StepGuard, "step", lambda self, state, clip_norm: state.precision.step(state.optimizer))
    assert fails(steps.infinities, here, "fp32: a step of inf in one pixel changed weights")


def test_widths_that_do_not_repeat(here: Machine, monkeypatch: pytest.MonkeyPatch):
    tables = iter([16, 8, 16, 16])

    def measured(model, groups, *others):
        width = next(tables)
        return {group.name: [width] for group in groups}, []

    monkeypatch.setattr(steps, "measured_widths", measured)
    assert fails(steps.widths_repeat, here, "0% of the widths come again")
    assert passes(steps.widths_repeat, here)


def test_a_ledger_that_is_off(here: Machine, monkeypatch: pytest.MonkeyPatch):
    assert passes(runs.ledger, here)
    honest = runs._SystemClock.stop

    def stop(self) -> None:
        honest(self)
        self.seconds *= 1.03

    monkeypatch.setattr(runs._SystemClock, "stop", stop)
    assert fails(runs.ledger, here, "allowed 2%")


@pytest.mark.parametrize("forgets", [False, True])
def test_a_resume(here: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgets: bool):
    (tmp_path / images.PHOTOGRAPHS).symlink_to(here.folder / images.PHOTOGRAPHS)
    elsewhere = dataclasses.replace(here, folder=tmp_path)
    if not forgets:
        assert passes(runs.resumed, elsewhere)
        return
    monkeypatch.setattr(restore, "_restore_random_numbers", lambda *others: [])
    assert fails(runs.resumed, elsewhere, "resumed, these are other bits: ")


@pytest.mark.parametrize(("rank", "sent"), [(0, [signal.SIGTERM]), (1, [])])
def test_rank_0_alone_is_signalled(
    here: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, sent: list[signal.Signals]
):
    world = dataclasses.replace(ALONE, rank=rank, size=2)
    last = RunDir(tmp_path / "runs" / "one").last
    last.parent.mkdir(parents=True)
    last.touch()
    signals, is_sent = [], threading.Event()
    monkeypatch.setattr(runs.os, "kill", lambda process, number: signals.append(number) or is_sent.set())
    with runs._stopped_once_saved(dataclasses.replace(here, world=world, folder=tmp_path), "one"):
        assert is_sent.wait(60 if sent else 20 * runs.POLL_S) == bool(sent)
    assert signals == sent


def test_a_signal_that_comes_after_the_run_ends_nobody(here: Machine, tmp_path: Path):
    """The file may be seen late, when the run does not listen any more."""
    before = signal.getsignal(signal.SIGTERM)
    with runs._stopped_once_saved(dataclasses.replace(here, folder=tmp_path), "one"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_rank_that_dies_unheard_or_late(here: Machine, monkeypatch: pytest.MonkeyPatch):
    row = {
        "way": "kill",
        "told_after_s": 1.0,
        "ended_after_s": 2.0,
        "first_error": "rank 1 ended without a word",
        "first_error_is_cause": True,
    }
    monkeypatch.setattr(ranks, "_ended_pair", lambda *others: row)
    assert passes(ranks.dead_rank, here)
    row["ended_after_s"] = 100.0
    assert fails(ranks.dead_rank, here, "ended_after_s is 100.0, allowed 20")
    row |= {"first_error": "error: out of memory", "first_error_is_cause": False}
    assert fails(ranks.dead_rank, here, "the other's first error is: error: out of memory")


def test_nobody_but_rank_0_gets_the_port_of_the_ranks_that_die():
    with ranks._held_port() as port, socket.socket() as other:
        with pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        assert dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False).port == port


def test_the_script_ends_with_1_where_a_check_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    def wrong(machine: Machine) -> Figure:
        raise Failed("two of them")

    monkeypatch.setattr(doctor, "CHECKS", (Check("good", lambda machine: Figure("1")), Check("bad", wrong)))
    out, root = tmp_path / "out.json", tmp_path / "runs"
    assert doctor.main(["--quick", "--device", "cpu", "--root", str(root), "--out", str(out)]) == 1
    said = capfd.readouterr()
    lines = said.out.splitlines()
    assert lines[0].startswith(" 1/2 good") and lines[0].endswith("s  1") and " pass " in lines[0]
    assert lines[1].startswith(" 2/2 bad") and lines[1].endswith("s  two of them") and " fail " in lines[1]
    assert said.err == "error: 1 of 2 checks failed: bad\n"
    stored = json.loads(out.read_text())
    assert [check["status"] for check in stored["checks"]] == ["pass", "fail"] and stored["machine"]["torch"]
    assert list(root.iterdir()) == []


def test_rank_0_alone_says_what_failed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    monkeypatch.setattr(doctor.cli, "EXIT_DELAY_S", 0.0)
    good, bad = (Result(status, status, "", 1.0) for status in ("pass", "fail"))
    main, other = (dataclasses.replace(ALONE, rank=rank, size=2) for rank in range(2))
    for world in (main, other):
        doctor._require_passed(world, [good])
    with pytest.raises(doctor.CheckupError, match="1 of 2 checks failed: fail"):
        doctor._require_passed(main, [good, bad])
    with pytest.raises(SystemExit) as ended:
        doctor._require_passed(other, [good, bad])
    assert ended.value.code == 1 and capfd.readouterr() == ("", "")


def test_the_script_takes_parts_of_names(tmp_path: Path, capfd: pytest.CaptureFixture):
    root = ["--root", str(tmp_path)]
    assert doctor.main(["--quick", "--device", "cpu", "--only", "VERSIONS", "cores", *root]) == 0
    assert len(capfd.readouterr().out.splitlines()) == 3
    assert "allowed: parts of the names of checks, versions" in error_of(
        doctor.main, ["--only", "nothing", *root], capfd
    )
    file = tmp_path / "file"
    file.touch()
    assert "cannot write in" in error_of(doctor.main, ["--only", "versions", "--root", str(file)], capfd)


def test_the_quick_check_up_as_a_user_starts_it(tmp_path: Path):
    """Beside other tests, times may be what they like: only checks that judge by them may fail."""
    done = start("launch/doctor.py", ["--quick", "--device", "cpu", "--out", "out.json"], tmp_path, timeout=580)
    checks = json.loads((tmp_path / "out.json").read_text())["checks"]
    assert [check["name"] for check in checks] == [check.name for check in CHECKS if check.is_quick]
    failed = {check["name"]: check["text"] for check in checks if check["status"] == "fail"}
    assert failed.keys() <= {"three cuts", "ledger and clock", "a dead rank"}, failed
    assert "_after_s is" in failed.get("a dead rank", "_after_s is"), failed
    assert done.returncode == bool(failed), done.stderr
    assert len(done.stdout.splitlines()) == len(checks) + 1


def test_two_ranks_check_what_one_cannot(tmp_path: Path):
    """The exchange, and cuts behind DDP; that a cut network is faster is not asked of a machine that runs tests."""
    done = launch("launch/doctor.py", ["--quick", "--device", "cpu", "--only", "exchange", "cuts"], tmp_path, ranks=2)
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stdout + done.stderr
    assert "gloo, 2 ranks: 16 MiB in" in lines[0]
    assert "digests of 2 rank(s) equal" in lines[1] or "times as long as a dense one" in lines[1], lines[1]
