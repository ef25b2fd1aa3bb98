"""What `check` finds, what training says without it, and that training honours its list."""

import errno
import os
import struct
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from made_images import build, disk_loaders, made_photo, taken, write_split
from PIL import Image

from data import images
from data.batch import DataError
from data.defects import decode_failure
from data.images import list_splits
from data.prepare import check, check_data, prepare_shards
from launch import prepare


def jpeg_that_claims(photo: bytes, width: int, height: int) -> bytes:
    """The photograph with other numbers in its frame header."""
    start = photo.index(b"\xff\xc0") + 5
    return photo[:start] + struct.pack(">HH", height, width) + photo[start + 4 :]


def write_broken(folder: Path) -> dict[str, str]:
    """Broken files; returns name -> words of the reason."""
    photo = (folder / "0.jpg").read_bytes()
    (folder / "empty.JPEG").touch()
    (folder / "cut.JPEG").write_bytes(photo[: len(photo) // 2])
    (folder / "text.JPEG").write_text("no image\n" * 20)
    (folder / "huge.JPEG").write_bytes(jpeg_that_claims(photo, 60_000, 60_000))
    (folder / "link.JPEG").symlink_to(folder / "nowhere.JPEG")
    made_photo(8).save(folder / "gif.JPEG", format="gif")
    made_photo(8).save(folder / "ico.png", format="ico")
    return {
        "cut.JPEG": "truncated",
        "empty.JPEG": "the file is empty",
        "gif.JPEG": "GIF, which DALI does not decode",
        "huge.JPEG": "3600000000 pixels",
        "ico.png": "ICO, which DALI does not decode",
        "link.JPEG": "a link to nowhere",
        "text.JPEG": "cannot identify",
    }


def png_of_16_bits(pixels: np.ndarray) -> bytes:
    """Pillow writes none in colour. pixels: uint8 (height, width, 3)."""
    height, width, _ = pixels.shape
    rows = (pixels.astype(">u2") * 257).reshape(height, -1)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))),
        (b"IEND", b""),
    ]
    parts = [struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c)) for kind, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def write_unusual(folder: Path) -> dict[str, str]:
    """Unusual images that both loaders read alike; returns name -> what is unusual."""
    photo = made_photo(7)
    photo.convert("CMYK").save(folder / "cmyk.JPEG", format="jpeg")
    photo.convert("L").save(folder / "grey.JPEG", format="jpeg")
    photo.save(folder / "png.JPEG", format="png")
    photo.resize((1, 1)).save(folder / "one.JPEG", format="jpeg")
    photo.convert("RGBA").save(folder / "rgba.png")
    Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257).save(folder / "grey16.png")
    (folder / "rgb16.png").write_bytes(png_of_16_bits(np.asarray(photo)))
    photo.save(folder / "ein Bild ½ 雪.jpg")
    return {
        "cmyk.JPEG": "CMYK, converted",
        "grey.JPEG": "grey, converted",
        "grey16.png": "grey of 16 bits, converted",
        "one.JPEG": "under 16 pixels wide or high",
        "png.JPEG": "PNG named .JPEG",
        "rgb16.png": "16 bits a channel, converted",
        "rgba.png": "with transparency, converted",
    }


def test_every_broken_and_every_unusual_file_is_named_with_its_reason(photos):
    broken, unusual = write_broken(photos / "train" / "ant"), write_unusual(photos / "val" / "bee")
    Image.new("1", (10_000, 9_000)).save(photos / "val" / "bee" / "large.png")
    unusual["large.png"] = "black and white, converted; over 89 megapixels, slow to decode"
    (photos / "train" / "ant" / "notes.txt").touch()
    (photos / "train" / "stray.jpg").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of Pillow, for one
        report = check_data(photos)
    assert sorted(report.broken) == [f"train/ant/{name}" for name in broken]
    assert all(words in report.broken[f"train/ant/{name}"] for name, words in broken.items()), report.broken
    assert report.unusual == {f"val/bee/{name}": words for name, words in unusual.items()}
    assert report.unread == ["train/ant/notes.txt", "train/stray.jpg"]
    assert report.images == {"train": 14 + len(broken), "val": 10 + len(unusual) + 1}


def test_a_class_folder_that_cannot_be_listed_is_named_and_can_be_left_out(photos, monkeypatch):
    """Without permission, or a link to nowhere: the check goes on to the others."""
    honest = os.scandir

    def scandir(path):
        if Path(path).name == "cat":
            raise PermissionError(errno.EACCES, "Permission denied")
        return honest(path)

    monkeypatch.setattr(os, "scandir", scandir)
    for split in ("train", "val"):
        (photos / split / "cat").mkdir()
        (photos / split / "dog").symlink_to(photos / "nowhere")
    with pytest.raises(DataError, match=r"train/cat: cannot be read \(Permission denied\); mend it, or"):
        list_splits(photos)
    (photos / "train" / "ant" / "0.jpg").write_text("no image")
    broken = check_data(photos).broken
    assert sorted(broken) == ["train/ant/0.jpg", "train/cat/", "train/dog/", "val/cat/", "val/dog/"]
    assert broken["train/cat/"].endswith("train/cat: Permission denied, val/cat: Permission denied")
    assert "train/dog: no such file, or a link to nowhere" in broken["val/dog/"]
    assert list_splits(photos)[0].classes == ["ant", "bee"]


def test_training_knows_what_lies_in_the_folders_but_is_none_of_its_images(photos):
    """torchvision's ImageFolder takes the images of folders within a class: whoever had them there must hear of it."""
    (photos / "train" / "ant" / "more").mkdir()
    made_photo(3).save(photos / "train" / "ant" / "more" / "1.jpg")
    made_photo(3).save(photos / "val" / "stray.jpg")
    (photos / "val" / "bee" / "notes.txt").touch()
    for hidden in (photos / "val" / ".index.jpg", photos / "val" / "bee" / ".DS_Store"):
        hidden.touch()
    train, val = build(photos, "folder")
    assert (train.passed_over, val.passed_over) == (("ant/more",), ("stray.jpg", "bee/notes.txt"))
    assert (train.num_images, val.num_images) == (14, 10)


def test_names_in_another_encoding_are_listed_and_left_out(photos, tmp_path_factory, capsys):
    latin1 = os.fsencode(photos) + b"/train/ant/M\xfcll.jpg"
    Path(os.fsdecode(latin1)).write_bytes(b"no image")
    assert prepare.main(["check", str(photos)]) == 1
    assert "M\\udcfcll.jpg: cannot identify image file" in capsys.readouterr().out
    assert list_splits(photos)[0].num_excluded == 1
    made_photo(1).save(os.fsdecode(latin1))
    target = tmp_path_factory.mktemp("shards") / "set"
    (photos / "exclude.txt").unlink()
    prepare_shards(photos, target)
    assert len(list_splits(target)[0].names) == 15


@disk_loaders
def test_training_leaves_out_what_is_listed_and_takes_the_unusual(photos, loader):
    write_broken(photos / "train" / "ant")
    write_unusual(photos / "train" / "bee")
    check_data(photos)
    train, val = build(photos, loader, threads=1)
    assert (train.num_images, train.num_excluded, val.num_excluded) == (14 + 8, 7, 0)
    taken(train)
    train.close()
    val.close()


@disk_loaders
@pytest.mark.parametrize("name", ["huge.JPEG", "link.JPEG", "gif.JPEG"])
def test_training_without_check_names_the_file(photos, loader, name):
    """What the other tests of unreadable files do not have; no memory is taken for what a header claims."""
    words = write_broken(photos / "train" / "ant")[name]
    for other in (photos / "train" / "ant").iterdir():
        if other.name != name and other.suffix != ".jpg":
            other.unlink()
    train, val = build(photos, loader, batch_size=15, threads=1)
    with pytest.raises(DataError, match=rf"cannot read .*train/ant/{name} \(.*{words}"):
        taken(train)
    train.close()
    val.close()


@pytest.mark.parametrize(
    "message",
    [
        "Critical error in pipeline:\n  File x\n\nencountered:\n\nno memory\nCurrent pipeline is invalid",
        "Trace\nno memory\n",
    ],
    ids=["DALI", "worker"],
)
def test_an_error_that_is_no_images_fault_is_cut_to_its_cause(photos, message):
    failure = decode_failure(list_splits(photos)[0], np.arange(3), RuntimeError(message))
    assert str(failure).endswith("train/ant/2.jpg: no memory")


def test_a_file_without_read_permission_is_named(photos):
    (photos / "train" / "ant" / "0.jpg").chmod(0)
    if os.access(photos / "train" / "ant" / "0.jpg", os.R_OK):
        pytest.skip("this user may read everything: setpriv --bounding-set=-dac_override,-dac_read_search pytest")
    assert check_data(photos).broken == {"train/ant/0.jpg": "Permission denied"}


def test_reading_errors_of_any_kind_are_reasons(photos, monkeypatch):
    """What a file without permission, or a failing disk, does."""
    honest = images.read_bounded

    def read(path, most):
        if path.endswith("ant/0.jpg"):
            raise PermissionError(13, "Permission denied")
        return honest(path, most)

    monkeypatch.setattr(images, "read_bounded", read)
    assert check_data(photos).broken == dict.fromkeys(["train/ant/0.jpg", "val/ant/0.jpg"], "Permission denied")


def test_classes_that_are_empty_broken_or_in_one_split_only_are_named_and_left_out(photos):
    write_split(photos / "train", 1, ("only train",))
    write_split(photos / "val", 1, ("only val",))
    for split in ("train", "val"):
        write_split(photos / split, 1, ("broken",))
        (photos / split / "empty").mkdir()
    (photos / "val" / "broken" / "0.jpg").write_text("no image")
    with pytest.raises(DataError, match="found no images"):
        list_splits(photos)
    assert check_data(photos).broken == {
        "val/broken/0.jpg": "cannot identify image file",
        "train/broken/": "no sound image in val/",
        "val/broken/": "no sound image in val/",
        "train/empty/": "no sound image in train/, no sound image in val/",
        "val/empty/": "no sound image in train/, no sound image in val/",
        "train/only train/": "no such class in val/",
        "val/only val/": "no such class in train/",
    }
    train, val = list_splits(photos)
    assert train.classes == val.classes == ["ant", "bee"]
    assert set(train.labels) == set(val.labels) == {0, 1}
    assert (train.num_excluded, val.num_excluded) == (2, 2)


def test_a_second_check_replaces_its_own_lines_and_keeps_the_users(photos):
    exclude = photos / "exclude.txt"
    (photos / "train" / "ant" / "0.jpg").write_text("no image")
    exclude.write_text("train/bee/1.jpg\ntrain/bee/2.jpg\tbroken once\n")
    check_data(photos)
    assert exclude.read_text() == "train/ant/0.jpg\tcannot identify image file\ntrain/bee/1.jpg\n"
    exclude.write_text("train/bee/2.jpg\tbroken once\n")
    (photos / "train" / "ant" / "0.jpg").unlink()
    assert not check_data(photos).broken
    assert not exclude.exists()


def test_the_list_can_lie_elsewhere_and_must_then_be_there(photos, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("lists") / "mine.txt"
    with pytest.raises(DataError, match=r"there is no .*mine\.txt"):
        build(photos, "folder", exclude=str(elsewhere))
    (photos / "train" / "ant" / "0.jpg").write_text("no image")
    check_data(photos, exclude=elsewhere)
    assert not (photos / "exclude.txt").exists()
    assert build(photos, "folder", exclude=str(elsewhere))[0].num_excluded == 1


def test_a_name_that_no_list_can_hold_is_an_error_after_the_report_and_the_other_names(photos, capsys):
    for name in ("a\nb.jpg", "b.jpg"):
        (photos / "train" / "ant" / name).touch()
    assert prepare.main(["check", str(photos)]) == 1
    printed = capsys.readouterr()
    assert printed.out.splitlines()[:2] == [
        r"train/ant/a\nb.jpg: the file is empty",
        "train/ant/b.jpg: the file is empty",
    ]
    assert r"'train/ant/a\nb.jpg': a name with tabs or line breaks" in printed.err
    assert (photos / "exclude.txt").read_text() == "train/ant/b.jpg\tthe file is empty\n"


def test_a_list_that_cannot_be_written_does_not_lose_the_report(photos, capsys):
    (photos / "train" / "ant" / "b.jpg").touch()
    assert prepare.main(["check", str(photos), "--exclude", str(photos / "nowhere" / "list.txt")]) == 1
    printed = capsys.readouterr()
    assert "train/ant/b.jpg: the file is empty" in printed.out
    assert "list.txt: cannot be written" in printed.err


def test_a_disk_that_fills_up_leaves_the_list_of_before_and_no_half_of_the_new_one(photos, monkeypatch):
    def full(self, target):
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    (photos / "exclude.txt").write_text("train/ant/1.jpg\n")
    (photos / "train" / "ant" / "b.jpg").touch()
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(DataError, match=rf"exclude\.txt: no space left on {photos}: make room"):
        check_data(photos)
    assert (photos / "exclude.txt").read_text() == "train/ant/1.jpg\n"
    assert {entry.name for entry in photos.iterdir()} == {"exclude.txt", "train", "val"}


def test_a_sound_set_in_a_read_only_place_is_fine(photos, monkeypatch):
    def read_only(self, *arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    for name in ("unlink", "write_bytes", "replace"):
        monkeypatch.setattr(Path, name, read_only)
    assert not check_data(photos).broken


def test_the_users_own_lines_count_as_excluded_and_stay_their_own(photos):
    write_split(photos / "train", 2, ("cat",))
    write_split(photos / "val", 2, ("cat",))
    (photos / "train" / "ant" / "0.jpg").write_text("no image")
    (photos / "exclude.txt").write_text("train/cat/\ntrain/ant/0.jpg\n")
    assert check_data(photos).broken["val/cat/"] == "no such class in train/"
    assert (photos / "exclude.txt").read_text().splitlines() == [
        "train/ant/0.jpg",
        "train/cat/",
        "val/cat/\tno such class in train/",
    ]
    assert list_splits(photos)[0].classes == ["ant", "bee"]


def test_lines_that_match_nothing_are_known(photos):
    (photos / "exclude.txt").write_text("train/ant/0.jpg\nant/1.jpg\ntrain/ant/none.jpg\nval/cat/\n")
    assert build(photos, "folder")[0].unmatched == ("ant/1.jpg", "train/ant/none.jpg", "val/cat/")


def test_files_that_a_file_list_leaves_out_are_no_find(photos):
    (photos / "lists").mkdir()
    for split in ("train", "val"):
        (photos / split).rename(photos / "lists" / f"{split}-images")
        lines = [f"{split}-images/{name}/{number}.jpg {name}\n" for name in ("ant", "bee") for number in range(2)]
        (photos / "lists" / f"{split}.txt").write_text("".join(lines))
    report = check_data(photos / "lists")
    assert report.unread == [] and report.images == {"train": 4, "val": 4}


def test_shards_are_checked_like_files_and_leave_excluded_images_out(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_broken(photos / "train" / "ant")
    (photos / "train" / "ant" / "link.JPEG").unlink()
    prepare_shards(photos, folder / "all")
    assert len(check_data(folder / "all").broken) == 6
    check_data(photos)
    prepare_shards(photos, folder / "sound")
    assert not check_data(folder / "sound").broken


def test_the_command_prints_the_findings_and_fails_while_something_is_broken(photos, capsys):
    (photos / "train" / "ant" / "0.jpg").write_text("no image")
    write_unusual(photos / "val" / "ant")
    assert prepare.main(["check", str(photos)]) == 1
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0] == "train/ant/0.jpg: cannot identify image file"
    assert "fine, but PNG named .JPEG: val/ant/png.JPEG" in printed.out
    assert printed.err.splitlines() == [
        f"error: found broken: 1; training leaves out what {photos}/exclude.txt now lists"
    ]
    (photos / "train" / "ant" / "0.jpg").unlink()
    assert prepare.main(["check", str(photos)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "all of them can be trained on"


def test_all_unusual_ones_are_named_if_asked_for(photos, capsys):
    for number in range(7):
        made_photo(number).convert("L").save(photos / "val" / "ant" / f"grey{number}.jpg")
    assert prepare.main(["check", str(photos)]) == 0
    assert "grey4.jpg and 2 more (--all names them)\n" in capsys.readouterr().out
    assert prepare.main(["check", str(photos), "--all"]) == 0
    printed = capsys.readouterr().out
    assert all(f"val/ant/grey{number}.jpg" in printed for number in range(7)) and "more" not in printed


def test_an_interrupted_check_looks_at_no_further_image(photos, monkeypatch):
    looked_at = []

    def examine(images, index, decoder):
        looked_at.append(index)
        time.sleep(0.5 if index else 0)
        return "", ""

    def interrupted(findings, *others):
        yield next(findings)
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "IMAGES_A_TASK", 1)
    monkeypatch.setattr(check, "_examine", examine)
    monkeypatch.setattr(check, "tracked", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check_data(photos, threads=1)
    assert len(looked_at) < 14
