"""Fetched and unpacked data sets: torchvision's downloaders on made archives from a local server; full disks."""

import errno
import gzip
import hashlib
import io
import pickle
import shutil
import socket
import tarfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import scipy.io
from made_images import made_photo
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, Imagenette, imagenet

from data.batch import DataError
from data.images import list_splits
from data.prepare import atomic, downloads, prepare_imagenet
from launch import prepare


def md5_of(file: Path) -> str:
    return hashlib.md5(file.read_bytes()).hexdigest()


def pack(archive: Path, members: dict[str, bytes], mode: str) -> Path:
    with tarfile.open(archive, mode) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return archive


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    made_photo(seed, 20, 16).save(buffer, format="jpeg")
    return buffer.getvalue()


def serve_mnist(folder: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty training and ten test images; the first pixel is the image's number."""
    resources = []
    for prefix, count in (("train", 20), ("t10k", 10)):
        pixels = np.zeros((count, 28, 28), dtype=np.uint8)
        pixels[:, 0, 0] = range(count)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
            file = folder / f"{prefix}-{kind}-ubyte.gz"
            file.write_bytes(gzip.compress(header + array.tobytes()))
            resources.append((file.name, md5_of(file)))
    monkeypatch.setattr(MNIST, "resources", resources)
    monkeypatch.setattr(MNIST, "mirrors", [url])


def serve_cifar(folder: Path, url: str, monkeypatch: pytest.MonkeyPatch, data_set: type[CIFAR10]) -> None:
    """Five training batches and a test batch of ten images each, all of one colour."""
    names = [f"class {label}" for label in range(10)]
    key = data_set.meta["key"]
    batches = {data_set.meta["filename"]: pickle.dumps({key: names})}
    label_key = "labels" if data_set is CIFAR10 else "fine_labels"
    for name, _ in [*data_set.train_list, *data_set.test_list]:
        pixels = np.repeat(np.arange(10, dtype=np.uint8), 3072).reshape(10, 3072)
        batches[name] = pickle.dumps({"data": pixels, label_key: list(range(10))})
    archive = pack(
        folder / data_set.filename, {f"{data_set.base_folder}/{name}": data for name, data in batches.items()}, "w:gz"
    )
    monkeypatch.setattr(data_set, "url", url + archive.name)
    monkeypatch.setattr(data_set, "tgz_md5", md5_of(archive))
    sums = {name: hashlib.md5(data).hexdigest() for name, data in batches.items()}
    for listing in ("train_list", "test_list"):
        monkeypatch.setattr(data_set, listing, [[name, sums[name]] for name, _ in getattr(data_set, listing)])
    monkeypatch.setattr(data_set, "meta", data_set.meta | {"md5": sums[data_set.meta["filename"]]})


def serve_imagenette(folder: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    members = {
        f"imagenette2-160/{split}/{wnid}/{number}.JPEG": jpeg(number)
        for split in ("train", "val")
        for wnid in Imagenette._WNID_TO_CLASS
        for number in range(2)
    }
    archive = pack(folder / "imagenette2-160.tgz", members, "w:gz")
    monkeypatch.setattr(Imagenette, "_ARCHIVES", {"160px": (url + archive.name, md5_of(archive))})


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Made archives on this machine in place of those on the network; yields the server."""
    folder = tmp_path / "served"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        url = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        serve_mnist(folder, url, monkeypatch)
        serve_imagenette(folder, url, monkeypatch)
        for data_set in (CIFAR10, CIFAR100):
            serve_cifar(folder, url, monkeypatch, data_set)
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize(
    ("arguments", "counts", "first_classes"),
    [
        (["mnist"], (20, 10), ["0", "1"]),
        (["cifar10"], (50, 10), ["class 0", "class 1"]),
        (["cifar100"], (10, 10), ["class 0", "class 1"]),
        (["imagenette", "--size", "160px"], (20, 20), ["n01440764", "n02102040"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_downloads_become_image_folders(served, tmp_path, arguments, counts, first_classes):
    name, *options = arguments
    assert prepare.main([name, str(tmp_path / "set"), *options]) == 0
    train, val = list_splits(tmp_path / "set")
    assert (len(train.names), len(val.names)) == counts
    assert train.classes[:2] == first_classes and len(train.classes) == 10
    assert {entry.name for entry in (tmp_path / "set").iterdir()} == {"train", "val"}  # no archive stays behind
    assert {entry.name for entry in tmp_path.iterdir()} == {"served", "set"}


def test_pixels_are_written_without_loss_and_with_their_labels(served, tmp_path):
    assert prepare.main(["mnist", str(tmp_path / "set")]) == 0
    for images, count in zip(list_splits(tmp_path / "set"), (20, 10), strict=True):
        numbers = [int(np.asarray(Image.open(images.path(index)))[0, 0]) for index in range(count)]
        assert sorted(numbers) == list(range(count))
        assert [number % 10 for number in numbers] == images.labels.tolist()
        assert Image.open(images.path(0)).mode == "L"


@pytest.mark.parametrize("fault", ["no network", "wrong checksum"])
def test_a_failed_download_is_one_line_and_leaves_nothing(served, tmp_path, monkeypatch, capsys, fault):
    if fault == "no network":
        served.shutdown()
        served.server_close()
    else:
        monkeypatch.setattr(CIFAR10, "tgz_md5", "0" * 32)
    assert prepare.main(["cifar10", str(tmp_path / "set")]) == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "the download failed" in line
    assert {entry.name for entry in tmp_path.iterdir()} <= {"served"}


def test_a_server_that_says_nothing_ends_the_download(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(downloads, "SILENCE_S", 0.2)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.getsockname()[1]}/cifar.tar.gz")
        assert prepare.main(["cifar10", str(tmp_path / "set")]) == 1
    assert "the download failed (timed out)" in capsys.readouterr().err
    assert socket.getdefaulttimeout() is None


def full_after(files: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the disk has room for so many images."""
    honest, written = Image.Image.save, []

    def save(self, file, **options):
        written.append(file)
        if len(written) > files:
            Path(file).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        honest(self, file, **options)

    monkeypatch.setattr(Image.Image, "save", save)


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_a_disk_that_fills_up_is_a_clear_error_and_leaves_no_set(served, tmp_path, monkeypatch, capsys, name):
    full_after(33, monkeypatch)
    for _ in range(2):  # a second attempt does not take the first one's remains for a set either
        assert prepare.main([name, str(tmp_path / "set")]) == 1
        assert f"error: {tmp_path}/set: no space left on {tmp_path}: make room" in capsys.readouterr().err
        assert {entry.name for entry in tmp_path.iterdir()} == {"served"}


def test_shards_on_a_disk_that_fills_up_leave_no_set(photos, tmp_path_factory, monkeypatch, capsys):
    folder, honest, added = tmp_path_factory.mktemp("target"), tarfile.TarFile.addfile, []

    def addfile(self, *arguments):
        added.append(arguments)
        if len(added) > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        honest(self, *arguments)

    monkeypatch.setattr(tarfile.TarFile, "addfile", addfile)
    assert prepare.main(["shards", str(photos), str(folder / "set")]) == 1
    assert f"no space left on {folder}: make room" in capsys.readouterr().err
    assert not list(folder.iterdir())


WNIDS = ("n02", "n01")  # by ILSVRC number, which is not their sorted order


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """Two classes of three training images, and four validation images, packed as the official archives are."""
    folder = tmp_path / "archives"
    folder.mkdir()
    for wnid in WNIDS:
        pack(folder / f"{wnid}.tar", {f"{wnid}_{number}.JPEG": jpeg(number) for number in range(3)}, "w")
    train = {f"{wnid}.tar": (folder / f"{wnid}.tar").read_bytes() for wnid in WNIDS}
    for wnid in WNIDS:
        (folder / f"{wnid}.tar").unlink()
    synsets = np.array(
        [(number, wnid, f"{wnid}, a thing", "gloss", 0, [], 0, 3) for number, wnid in enumerate(WNIDS, start=1)],
        dtype=[(name, object) for name in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "c", "h", "n")],
    )
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": synsets})
    kit = "ILSVRC2012_devkit_t12/data"
    truth = {f"{kit}/meta.mat": meta.getvalue(), f"{kit}/ILSVRC2012_validation_ground_truth.txt": b"1\n2\n2\n1\n"}
    val = {f"ILSVRC2012_val_{number:08d}.JPEG": jpeg(10 + number) for number in (4, 2, 3, 1)}
    made = {
        "train": pack(folder / "ILSVRC2012_img_train.tar", train, "w"),
        "val": pack(folder / "ILSVRC2012_img_val.tar", val, "w"),
        "devkit": pack(folder / "ILSVRC2012_devkit_t12.tar.gz", truth, "w:gz"),
    }
    monkeypatch.setattr(imagenet, "ARCHIVE_META", {kind: (file.name, md5_of(file)) for kind, file in made.items()})
    monkeypatch.setattr("data.prepare.imagenet.ARCHIVE_META", imagenet.ARCHIVE_META)
    return folder


def test_imagenet_is_unpacked_by_wordnet_id(archives, tmp_path):
    assert prepare.main(["imagenet", str(archives), str(tmp_path / "set")]) == 0
    train, val = list_splits(tmp_path / "set")
    assert train.names == [f"{wnid}/{wnid}_{number}.JPEG" for wnid in sorted(WNIDS) for number in range(3)]
    of_class = {"n02": (1, 4), "n01": (2, 3)}
    assert val.names == [f"{wnid}/ILSVRC2012_val_{n:08d}.JPEG" for wnid in sorted(WNIDS) for n in of_class[wnid]]
    assert val.read(0) == jpeg(12)
    assert {entry.name for entry in tmp_path.iterdir()} == {"archives", "set"}


def test_imagenet_goes_on_where_it_was_interrupted(archives, tmp_path, monkeypatch):
    """Killed in the second class: the first is not unpacked again, the half of the second is not taken for whole."""
    honest, unpacked = tarfile.TarFile.extractall, []

    def extractall(self, path, **options):
        unpacked.append(Path(path).name)
        if unpacked == [".n02.part", ".n01.part"]:
            path.mkdir()
            (path / "half.JPEG").touch()
            raise OSError(errno.ENOSPC, "No space left on device")
        honest(self, path, **options)

    monkeypatch.setattr(tarfile.TarFile, "extractall", extractall)
    with pytest.raises(DataError, match=f"no space left on {tmp_path}: make room"):
        prepare_imagenet(archives, tmp_path / "set")
    assert not (tmp_path / "set").exists()
    (tmp_path / ".set.preparing/.devkit/data").mkdir(parents=True)  # as if killed there, too
    prepare_imagenet(archives, tmp_path / "set")
    assert unpacked[:3] == [".n02.part", ".n01.part", ".n01.part"]  # then the development kit
    train, val = list_splits(tmp_path / "set")
    assert (len(train.names), len(val.names)) == (6, 4)
    assert {entry.name for entry in (tmp_path / "set").iterdir()} == {"train", "val"}
    assert {entry.name for entry in (tmp_path / "set" / "train").iterdir()} == set(WNIDS)


def test_imagenet_does_not_take_another_preparation_s_remains_for_its_own(archives, tmp_path):
    """As a maker of the same place leaves them that was killed: a class of the same name, and one of another."""
    for name in ("n01", "0"):
        (tmp_path / ".set.preparing/train" / name).mkdir(parents=True)
        (tmp_path / ".set.preparing/train" / name / "0001.jpg").touch()
    assert prepare_imagenet(archives, tmp_path / "set")
    assert {entry.name for entry in (tmp_path / "set/train").iterdir()} == set(WNIDS)
    assert len(list_splits(tmp_path / "set")[0].names) == 6
    assert {entry.name for entry in (tmp_path / "set").iterdir()} == {"train", "val"}


def test_what_another_maker_was_killed_over_emptying_is_not_taken_for_whole(archives, tmp_path, monkeypatch):
    """It finds imagenet's remains and gets no further than to leave one image of a class that was whole."""
    full = tmp_path / ".set.preparing/train/n02"
    full.mkdir(parents=True)
    (full / "n02_0.JPEG").touch()
    (tmp_path / ".set.preparing" / atomic.RESUMABLE).touch()

    def killed(folder, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        atomic.write_data_set(tmp_path / "set", lambda folder: None)
    assert full.is_dir()
    assert prepare_imagenet(archives, tmp_path / "set")
    assert len(list_splits(tmp_path / "set")[0].names) == 6


@pytest.mark.parametrize(
    ("kind", "name", "members", "words"),
    [
        ("train", "ILSVRC2012_img_train.tar", {"n01.tar": b"no tar file"}, "truncated header"),
        ("train", "ILSVRC2012_img_train.tar", None, "truncated header"),
        (
            "val",
            "ILSVRC2012_img_val.tar",
            {"ILSVRC2012_val_00000001.JPEG": b""},
            "found 1 images, the development kit",
        ),
        ("devkit", "ILSVRC2012_devkit_t12.tar.gz", {"a": b""}, "ILSVRC2012_devkit_t12"),
    ],
    ids=["class", "train", "val", "devkit"],
)
def test_an_archive_of_other_content_is_one_line(archives, tmp_path, monkeypatch, capsys, kind, name, members, words):
    """Whatever its checksum says."""
    if members is None:
        (archives / name).write_bytes(b"no tar file")
    else:
        pack(archives / name, members, "w:gz" if name.endswith("gz") else "w")
    patched = imagenet.ARCHIVE_META | {kind: (name, md5_of(archives / name))}
    monkeypatch.setattr("data.prepare.imagenet.ARCHIVE_META", patched)
    assert prepare.main(["imagenet", str(archives), str(tmp_path / "set")]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {archives / name}: cannot be unpacked (") and words in line


@pytest.mark.parametrize("name", ["train", "val", ".devkit", "train/n02", "train/.n02.part", "val/n01"])
def test_links_in_what_imagenet_goes_on_from_are_refused(archives, tmp_path, name):
    """The same command goes on there, so it is not emptied before."""
    victim, place = tmp_path / "victim", tmp_path / ".set.preparing" / name
    (victim / "n02").mkdir(parents=True)
    (victim / "n02" / "mine.jpg").touch()
    place.parent.mkdir(parents=True)
    place.symlink_to(victim)
    (tmp_path / ".set.preparing" / atomic.RESUMABLE).touch()
    with pytest.raises(DataError, match=f"{name}: is a link, to {victim}, and is not followed"):
        prepare_imagenet(archives, tmp_path / "set")
    assert [path.name for path in victim.rglob("*")] == ["n02", "mine.jpg"]


def test_a_missing_or_damaged_archive_is_named(archives, tmp_path, capsys):
    with (archives / "ILSVRC2012_img_val.tar").open("ab") as file:
        file.write(b"more")
    assert prepare.main(["imagenet", str(archives), str(tmp_path / "set")]) == 1
    assert "ILSVRC2012_img_val.tar: found MD5" in capsys.readouterr().err
    (archives / "ILSVRC2012_img_train.tar").unlink()
    assert prepare.main(["imagenet", str(archives), str(tmp_path / "set")]) == 1
    assert "ILSVRC2012_img_train.tar: there is no such file; get it from image-net.org" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["archives"]


def test_an_archive_that_cannot_be_read_is_named_and_leaves_nothing(archives, tmp_path, monkeypatch, capsys):
    def broken(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(hashlib, "file_digest", broken)
    assert prepare.main(["imagenet", str(archives), str(tmp_path / "set")]) == 1
    assert "ILSVRC2012_img_train.tar: cannot be read (Input/output error)" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["archives"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mnsit", "x"], "invalid choice: 'mnsit'"),
        (["shards", "nowhere", "x"], "nowhere: there is no such folder"),
        (["check", "nowhere"], "nowhere: there is no such folder"),
        (["imagenette", "x", "--size", "9"], "invalid choice: '9'"),
        (["check", "x", "--threads", "-3"], "--threads: found '-3', allowed: a whole number from 0"),
        (["shards", "x", "y", "--seed", "-1"], "--seed: found '-1', allowed: a whole number from 0"),
        (["shards", "x", "y", "--images-per-shard", "0"], "found '0', allowed: a whole number from 1"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert prepare.main(arguments) != 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and words in lines[0]
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_kept_and_the_command_says_so(photos, tmp_path_factory, capsys):
    target = tmp_path_factory.mktemp("target")
    for words in ("ready: {0}", "{0}: a data set is there already; kept as it is"):
        assert prepare.main(["shards", str(photos), str(target / "set")]) == 0
        assert capsys.readouterr().out == words.format(target / "set") + "\n"
    assert prepare.main(["digits", str(photos)]) == 0
    assert capsys.readouterr().out == f"{photos}: a data set is there already; kept as it is\n"
    assert prepare.main(["shards", str(photos), f"{photos}/../{photos.name}"]) == 1
    assert "is the source itself" in capsys.readouterr().err
    assert prepare.main(["shards", str(target / "set"), str(photos)]) == 1
    assert "holds a data set that is no shards" in capsys.readouterr().err


def test_empty_splits_are_no_finished_set(tmp_path, capsys):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
    assert prepare.main(["digits", str(tmp_path)]) == 1
    assert "exists, but train/ or val/ is missing or empty" in capsys.readouterr().err


def test_a_place_that_may_not_be_looked_at_is_a_data_error(tmp_path, monkeypatch, capsys):
    def forbidden(self, **options):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "exists", forbidden)
    assert prepare.main(["digits", str(tmp_path / "set")]) == 1
    assert "set: cannot be looked at (Permission denied)" in capsys.readouterr().err


def test_an_interrupted_preparation_promises_no_checkpoint(monkeypatch, capsys):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setitem(prepare.MAKERS, "digits", interrupted)
    assert prepare.main(["digits", "x"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
