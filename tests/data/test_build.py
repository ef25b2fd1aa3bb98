"""Which loader is chosen, with how many threads, and what it says when it cannot be had."""

import dataclasses
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from made_images import CPU, build, disk_loaders, equal, synthetic, taken, write_split

from data import build_loaders, build_search_loaders, dali
from data.batch import DataConfig, DataError
from data.build import default_threads
from data.images import hold_out, list_split, list_splits
from data.prepare import prepare_shards


@pytest.fixture
def image_folder(tmp_path):
    """14 training and 10 validation images of two classes."""
    write_split(tmp_path / "train", 7)
    write_split(tmp_path / "val", 5, seed=500)
    return tmp_path


@pytest.fixture
def no_dali(monkeypatch):
    monkeypatch.setattr(dali, "import_failure", lambda: ImportError("No module named 'nvidia'"))


def test_auto_without_dali_takes_the_folder_loader_with_one_warning(image_folder, no_dali):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train, _ = build(image_folder, "auto", batch_size=4, world_size=2)
        build(image_folder, "auto", batch_size=4, rank=1, world_size=2)
    # On one core torch has a word to say about the two workers, too.
    ours = [str(warning.message) for warning in caught if "DataLoader will create" not in str(warning.message)]
    assert [message[:37] for message in ours] == ["loader 'auto': DALI cannot be importe"]
    assert train.state_dict()["loader"] == "folder"


@pytest.mark.skipif(dali.import_failure() is not None, reason="DALI does not import")
def test_auto_takes_dali(image_folder):
    assert build(image_folder, "auto")[0].state_dict()["loader"] == "dali"


def test_dali_asked_for_and_missing_says_how_to_install_it(image_folder, no_dali):
    with pytest.raises(DataError, match=r"No module named 'nvidia'.*pip install nvidia-dali-cuda130"):
        build(image_folder, "dali")


def test_batch_that_ranks_cannot_share(image_folder):
    with pytest.raises(DataError, match="batch_size: found 4, allowed: a multiple"):
        build(image_folder, "folder", world_size=3)


def test_training_set_smaller_than_a_batch(image_folder):
    with pytest.raises(DataError, match="14 images, fewer than one batch of 16"):
        build(image_folder, "folder", batch_size=16)


@pytest.mark.parametrize(("cores", "ranks", "threads"), [(1, 1, 1), (2, 4, 1), (16, 4, 4), (96, 8, 8), (64, 1, 8)])
def test_threads_share_the_cores_of_the_process(monkeypatch, cores, ranks, threads):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(cores), raising=False)
    assert default_threads(ranks) == threads


def test_folder_batches_do_not_depend_on_the_workers_nor_touch_the_global_generator(image_folder):
    before = torch.get_rng_state()
    epochs = []
    for workers in (1, 2):
        train, _ = build(image_folder, "folder", threads=workers)
        epochs.append(taken(train) + taken(train))
        train.close()
    for (one, _, _), (other, _, _) in zip(*epochs, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_synthetic_images_depend_on_seed_split_and_index_only():
    train, val = synthetic(synthetic_images=128, channels=1)
    assert (len(train), len(val), val.num_images, train.num_classes) == (4, 1, 32, 10)
    images, labels, valid = next(iter(val))
    again, other_seed = (
        synthetic(synthetic_images=128, channels=1)[1],
        synthetic(1, synthetic_images=128, channels=1)[1],
    )
    assert torch.equal(images, next(iter(again))[0])
    assert not torch.equal(images, next(iter(other_seed))[0])
    assert images.shape == (32, 1, 16, 16) and labels.bincount(minlength=10).min() == 3 and valid.all()
    assert len({image.numpy().tobytes() for image in images}) == 32


def test_synthetic_classes_can_be_learned():
    """The nearest class mean of the training images tells the class of nearly all validation images."""
    train, val = synthetic(synthetic_images=1024)
    batches = taken(train)
    images, labels = (torch.cat([batch[k] for batch in batches]) for k in (0, 1))
    means = torch.stack([images[labels == label].mean(dim=0) for label in range(10)]).flatten(1)
    right = [(torch.cdist(batch[0].flatten(1), means).argmin(dim=1) == batch[1]).float().mean() for batch in taken(val)]
    assert torch.stack(right).mean() > 0.98


def test_class_numbers_that_are_no_outputs_and_options_without_effect_are_said_once(tmp_path):
    """ImageNet's lists count from 1; the network's outputs from 0."""
    for split in ("train", "val"):
        (tmp_path / f"{split}.txt").write_bytes(b"\xef\xbb\xbf" + b"".join(b"a.jpg %d\n" % n for n in (1, 2, 4)))
    with pytest.warns(UserWarning, match=r"not 0 to 2 in order; .* output 0 is class 1, its last one \(2\) class 4"):
        build(tmp_path, "folder", batch_size=2, world_size=2, threads=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(tmp_path, "folder", batch_size=2, rank=1, world_size=2, threads=1)
    assert list_split(tmp_path, "train").names == ["a.jpg"] * 3  # the mark at the file's beginning is no name


def test_shards_say_that_mmap_does_not_apply(image_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("shards") / "set"
    prepare_shards(image_folder, path)
    with pytest.warns(UserWarning, match="mmap has no effect with shards"):
        build(path, "folder", mmap=False)


def test_a_class_whose_images_are_all_excluded_is_named(image_folder):
    lines = [f"val/bee/{number}.jpg\n" for number in range(5)]
    (image_folder / "exclude.txt").write_text("".join(lines))
    with pytest.raises(DataError, match=r"val: the exclude list leaves out every image of class 'bee': keep one, or"):
        list_splits(image_folder)


@disk_loaders
def test_held_out_images_are_left_out_of_training_and_given_to_a_search_alone(photos, loader):
    config = DataConfig(path=str(photos), loader=loader, batch_size=4, image_size=32, resize_size=40, threads=2)
    held = dataclasses.replace(config, held_out=3)
    everything, _ = list_splits(photos)
    trained, judged = hold_out(everything, 3)
    assert np.bincount(judged.labels).tolist() == [3, 3]
    assert sorted([*trained.names, *judged.names]) == sorted(everything.names)
    train, val = build_loaders(held, rank=0, world_size=1, device=CPU, seed=3)
    assert (train.num_images, val.num_images) == (8, 10)
    recalibration, judging = search_loaders(held, 9)
    assert (recalibration.num_images, judging.num_images) == (8, 6)
    by_image = {tuple(image.flatten()[:500].tolist()) for images, *_ in taken(judging) for image in images}
    others = {tuple(image.flatten()[:500].tolist()) for images, *_ in taken(recalibration) for image in images}
    assert len(others) == 8 and len(by_image) == 6 and not by_image & others
    for some in (train, val, recalibration, judging):
        some.close()


@disk_loaders
def test_a_search_sees_the_same_batches_at_every_pass_mixed_and_not_augmented(photos, loader):
    config = DataConfig(
        path=str(photos), loader=loader, batch_size=4, image_size=32, resize_size=40, threads=2, held_out=1
    )
    recalibration, judging = search_loaders(config, 2)
    passes = [[taken(loader) for _ in range(2)] for loader in (recalibration, judging)]
    assert all(equal(first, second) for first, second in passes)
    labels = torch.cat([batch[1] for batch in passes[0][0]])
    assert len(labels) == 8 and labels.tolist() != sorted(labels.tolist())
    for some in (recalibration, judging):
        some.close()


def test_made_images_stay_what_they_are_when_some_are_held_out():
    whole, _ = synthetic(synthetic_images=64)
    held, _ = synthetic(synthetic_images=64, held_out=3)
    pixels = {tuple(image.flatten()[:9].tolist()) for images, *_ in taken(whole) for image in images}
    assert held.num_images == 34
    assert {tuple(image.flatten()[:9].tolist()) for images, *_ in taken(held) for image in images} < pixels
    config = DataConfig(
        loader="synthetic", batch_size=5, image_size=16, resize_size=16, synthetic_images=64, held_out=3
    )
    for loader in search_loaders(config, 2, seed=0):
        assert {tuple(image.flatten()[:9].tolist()) for images, *_ in taken(loader) for image in images} < pixels


def test_a_class_must_keep_images_to_train_on(photos):
    with pytest.raises(DataError, match=r"held_out: found 7, but class 'ant' has 7 training images; allowed: up to 6"):
        build(photos, "folder", held_out=7)
    with pytest.raises(DataError, match="held_out: found 0"):
        search_loaders(DataConfig(path=str(photos), loader="folder"), 1)


def search_loaders(config: DataConfig, batches: int, seed: int = 3):
    return build_search_loaders(config, recalibration_batches=batches, device=CPU, seed=seed)


def test_workers_of_a_rank_that_is_killed_leave_no_process_and_no_open_pipe(photos):
    """The one who reads a rank's output, a shell or torchrun, waits until nobody holds its end."""
    code = """
import os, signal, sys, torch
from data import DataConfig, build_loaders
config = DataConfig(path=sys.argv[1], loader="folder", threads=1, batch_size=2, image_size=32, resize_size=32)
train, _ = build_loaders(config, rank=0, world_size=1, device=torch.device("cpu"), seed=0)
next(iter(train))
os.kill(os.getpid(), signal.SIGKILL)
"""
    result = subprocess.run([sys.executable, "-c", code, str(photos)], capture_output=True, text=True, timeout=400)
    assert result.returncode == -signal.SIGKILL, result.stderr


def test_a_process_ends_whose_loader_nobody_has_closed(photos):
    """It waits for its workers then, and they heed no signal."""
    code = """
import sys, torch
from data import DataConfig, build_loaders
config = DataConfig(path=sys.argv[1], loader="folder", threads=1, batch_size=2, image_size=32, resize_size=32)
train, _ = build_loaders(config, rank=0, world_size=1, device=torch.device("cpu"), seed=0)
batches = iter(train)
next(batches)
sys.exit(3)
"""
    result = subprocess.run([sys.executable, "-c", code, str(photos)], capture_output=True, text=True, timeout=400)
    assert (result.returncode, result.stderr) == (3, "")
