"""Links, devices and absurd sizes where files of a data set are expected: one line, nothing overwritten, and soon."""

import io
import json
import os
import resource
import shutil
import signal
import tarfile
from pathlib import Path

import pytest
from made_images import build, write_split
from made_shards import SAMPLE, write_tar

from data.batch import DataError
from data.images import list_split, list_splits
from data.prepare import atomic, check_data, index_shards, prepare_digits, prepare_shards
from data.prepare.tars import MAX_HEADER_BYTES
from launch import prepare

SECONDS = 120
"""None takes more than some; others may use the machine."""
MEMORY = 1 << 30
SPLITS = ("train", "val")


@pytest.fixture(autouse=True)
def bounded():
    """What is read for ever or into all of the memory fails in time."""

    def too_long(number, frame):
        raise AssertionError(f"took over {SECONDS} s")

    before, limits = signal.signal(signal.SIGALRM, too_long), resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.fixture
def victim(tmp_path_factory):
    """A folder of somebody's, which must stay as it is."""
    folder = tmp_path_factory.mktemp("home") / "victim"
    (folder / "n01").mkdir(parents=True)
    for name in ("thesis.tex", "n01/photo.jpg", "backup.tar"):
        (folder / name).write_text(f"mine: {name}")
    yield folder
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == [
        "backup.tar",
        "n01/photo.jpg",
        "thesis.tex",
    ]
    for name in ("thesis.tex", "n01/photo.jpg", "backup.tar"):
        assert (folder / name).read_text() == f"mine: {name}"


@pytest.fixture
def foreign(tmp_path):
    """Shards of one sample each, without index and manifest."""
    for split in SPLITS:
        write_tar(tmp_path / "foreign" / split / "0.tar", SAMPLE)
    return tmp_path / "foreign"


def refused(argv: list[str], capsys) -> str:
    """The one line that the command ends with."""
    assert prepare.main(argv) == 1
    [line] = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("name", [".set.preparing", "set"])
@pytest.mark.parametrize("to", ["folder", "nowhere"])
def test_a_link_at_a_working_name_is_refused(tmp_path, victim, capsys, name, to):
    target = victim if to == "folder" else victim.parent / "nowhere"
    (tmp_path / name).symlink_to(target)
    line = refused(["digits", str(tmp_path / "set")], capsys)
    assert f"{name}: is a link, to {target}, and is not followed" in line or "exists, but train/ or val/ is" in line
    assert (tmp_path / name).is_symlink()


@pytest.mark.parametrize("name", [atomic.LOCK, atomic.RESUMABLE])
def test_a_link_inside_the_working_folder_is_refused_or_removed(tmp_path, victim, name):
    (tmp_path / ".set.preparing").mkdir()
    (tmp_path / ".set.preparing" / name).symlink_to(victim / "new")

    def write(folder):
        for split in SPLITS:
            (folder / split / "new").mkdir(parents=True)

    if name == atomic.LOCK:
        with pytest.raises(DataError, match=r"\.lock: is a link, to"):
            atomic.write_data_set(tmp_path / "set", write, resumes=True)
    else:
        assert atomic.write_data_set(tmp_path / "set", write, resumes=True)
        assert {entry.name for entry in (tmp_path / "set").iterdir()} == {"train", "val"}


@pytest.mark.parametrize("name", [".exclude.txt.part", "exclude.txt"])
def test_a_link_at_the_exclude_list_is_not_written_through(photos, victim, capsys, name):
    (photos / "train" / "ant" / "0.jpg").write_text("no image")
    (photos / name).symlink_to(victim / "thesis.tex")
    assert prepare.main(["check", str(photos)]) == 1
    printed = capsys.readouterr()
    assert "train/ant/0.jpg: cannot identify image file" in printed.out
    assert f"{name}: is a link, to {victim}/thesis.tex" in printed.err


def test_a_link_at_the_exclude_list_is_not_removed(photos, victim):
    (victim.parent / "list").write_text("train/ant/0.jpg\tbroken once\n")
    (photos / "exclude.txt").symlink_to(victim.parent / "list")
    with pytest.raises(DataError, match=r"exclude\.txt: is a link"):
        check_data(photos)
    assert (photos / "exclude.txt").is_symlink() and (victim.parent / "list").exists()


@pytest.mark.parametrize(
    ("name", "to"),
    [
        *((name, to) for name in (".0.idx.part", "0.idx", ".manifest.json.part") for to in ("thesis.tex", "nowhere")),
        ("manifest.json", "nowhere"),
    ],
)
def test_a_link_at_an_index_or_a_manifest_is_not_written_through(foreign, victim, capsys, name, to):
    (foreign / "train" / name).symlink_to(victim / to)
    assert f"train/{name}: is a link, to {victim}/{to}, and is" in refused(["index", str(foreign)], capsys)


@pytest.mark.parametrize("what", ["another name of a file", "pipe"])
@pytest.mark.parametrize("name", [".0.idx.part", ".manifest.json.part"])
def test_what_stands_at_a_working_name_is_replaced_and_not_written_to(foreign, victim, name, what):
    place = foreign / "train" / name
    os.mkfifo(place) if what == "pipe" else os.link(victim / "thesis.tex", place)
    assert index_shards(foreign)
    assert list_split(foreign, "train").names == ["0.tar/a.jpg"]


@pytest.mark.parametrize("name", ["../../victim/backup.tar", "/etc/backup.tar", "..", "", "a\0.tar", "thesis.tex"])
def test_a_manifest_names_tar_files_in_its_folder_alone(foreign, victim, capsys, name):
    """It used to have an index written beside what it names."""
    index_shards(foreign)
    file = foreign / "train" / "manifest.json"
    manifest = json.loads(file.read_text())
    if name.startswith(".."):
        manifest["shards"].append({"file": name, "images": 0, "bytes": (victim / "backup.tar").stat().st_size})
        shutil.copytree(victim, foreign.parent / "victim")
    else:
        manifest["shards"][0]["file"] = name
    file.write_text(json.dumps(manifest))
    assert f"manifest.json: {name!r} is no name of a tar file in its folder" in refused(["index", str(foreign)], capsys)
    with pytest.raises(DataError, match="is no name of a tar file in its folder"):
        list_splits(foreign)


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_text("[" * 100_000),
        lambda file: os.truncate(file, 1 << 40),
        lambda file: file.write_text(json.dumps({"format": 1, "images": 9, "classes": [], "shards": [{}] * 3})),
        lambda file: file.write_text(file.read_text().replace('"images": 1', '"images": ' + "9" * 5000)),
        lambda file: file.write_text(
            json.dumps(json.loads(file.read_text()) | {"shards": json.loads(file.read_text())["shards"] * 2})
        ),
        lambda file: file.write_text(file.read_text().replace('"labels": [0]', f'"labels": [{10**30}]')),
    ],
    ids=["nested", "1 TiB", "empty entries", "5000 digits", "twice", "large label"],
)
def test_absurd_manifests_are_one_line(foreign, capsys, damage):
    index_shards(foreign)
    damage(foreign / "train" / "manifest.json")
    assert "train/manifest.json" in refused(["shards", str(foreign), f"{foreign}-again"], capsys)


def negative_size(size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A tar file whose second header says, in a PAX record, that its file has fewer than no bytes."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in SAMPLE:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            if name == "a.cls":
                member.type, member.pax_headers = kind, {"size": str(size)}
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def absurd_header(kind: bytes, size: int) -> bytes:
    member = tarfile.TarInfo("header")
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT) + bytes(4096)


def endless_headers(kind: bytes) -> bytes:
    """Each is about the next one; tarfile reads the next one by a call from within."""
    member = tarfile.TarInfo("header")
    member.type, member.size = kind, 512
    return (member.tobuf(tarfile.GNU_FORMAT) + b"a" * 512) * 5000


def with_holes() -> bytes:
    member = tarfile.TarInfo("a.jpg")
    member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(1 << 60)}
    content = b"1\n0\n512\n".ljust(512, b"\0") + bytes(512)
    member.size = len(content)
    return member.tobuf(tarfile.PAX_FORMAT) + content + bytes(1024)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (negative_size(-1536), "the header of a.cls says -1,536 bytes"),
        (negative_size(-512), "the header of a.cls says -512 bytes"),
        (negative_size(-1), "the header of a.cls says -1 bytes"),
        (negative_size(-1536, kind=b"Z"), "the header of a file has a negative size"),
        (negative_size(1 << 60), "the header of a.cls says 1,152,921,504,606,846,976 bytes"),
        (absurd_header(tarfile.GNUTYPE_LONGNAME, 1 << 40), "a header of 1,099,511,627,776 bytes"),
        (absurd_header(tarfile.XHDTYPE, -512), "a header of -512 bytes"),
        (absurd_header(tarfile.XHDTYPE, 1 << 40), "a header of 1,099,511,627,776 bytes"),
        (endless_headers(tarfile.XHDTYPE), "cannot be read as a tar file"),
        (endless_headers(tarfile.GNUTYPE_LONGNAME), "cannot be read as a tar file"),
        (with_holes(), "a.jpg is stored with holes"),
        (with_holes()[: -1024 - 1024], "cannot be read as a tar file"),
        (absurd_header(tarfile.XHDTYPE, MAX_HEADER_BYTES)[:512] + b"1" * MAX_HEADER_BYTES, "cannot be read as a tar"),
        (b"no tar file" * 100, "cannot be read as a tar file"),
    ],
    ids=[
        *("negative", "negative by a header", "negative by a byte", "negative of no file", "past the end"),
        *("long name", "negative header"),
        *("large header", "nested PAX", "nested names", "sparse", "sparse and cut", "digits only", "none"),
    ],
)
def test_tar_files_with_absurd_headers_are_one_line(foreign, capsys, content, words):
    (foreign / "train" / "0.tar").write_bytes(content)
    line = refused(["index", str(foreign)], capsys)
    assert "train/0.tar" in line and words in line
    assert not (foreign / "train" / "manifest.json").exists()


def append_zeros(tar: Path, members: list[tuple[str, bytes]], name: str, size: int) -> None:
    """A tar file of one member, to which one of so many zeros is added; they take no place on the disk."""
    write_tar(tar, members)
    with tar.open("r+b") as file:
        file.seek(1024)
        member = tarfile.TarInfo(name)
        member.size = size
        file.write(member.tobuf(tarfile.GNU_FORMAT))
        file.truncate(1536 + size // 512 * 512 + 2048)


@pytest.mark.parametrize("size", [1 << 40, (1 << 20) + 1])
def test_a_label_file_of_absurd_size_is_one_line(foreign, capsys, size):
    append_zeros(foreign / "train" / "0.tar", SAMPLE[:1], "a.cls", size)
    assert f"0.tar: a.cls ({size:,} bytes) holds no class" in refused(["index", str(foreign)], capsys)


def test_an_image_of_absurd_size_is_named(foreign):
    append_zeros(foreign / "train" / "0.tar", SAMPLE[1:], "a.jpg", 1 << 40)
    index_shards(foreign)
    assert "at most 268,435,456 are read" in check_data(foreign).broken["train/0.tar/a.jpg"]


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([*SAMPLE, ("a.cls", b"1")], "the sample of a.jpg has 2 .cls files, expected one"),
        ([*SAMPLE, ("b.jpg", b"")], "the sample of b.jpg has no .cls file, which must hold its class"),
        ([("a.jpg", b""), ("a.cls", b"\xff\xfe")], r"a.cls (2 bytes) holds no class"),
        ([("a.jpg", b""), ("a.cls", b"one\ntwo")], r"a.cls (7 bytes) holds no class"),
        ([("a.jpg", b""), ("a.cls", b"x" * 256)], r"a.cls (256 bytes) holds no class: a line of up to 255"),
        ([("a.jpg", b""), ("a.json", b"[" * 100_000)], "a.json (100,000 bytes) holds no class"),
        ([("a.jpg", b""), ("a.json", b'{"label": [1]}')], "holds no class: a line of up to 255 characters, in a JSON"),
        ([("a.jpg", b""), ("a.json", b'{"label": true}')], "holds no class"),
    ],
)
def test_labels_that_are_no_class_are_named(foreign, capsys, members, words):
    write_tar(foreign / "train" / "0.tar", members)
    assert words in refused(["index", str(foreign)], capsys)


@pytest.mark.parametrize("what", ["pipe", "device"])
@pytest.mark.parametrize("name", ["0.tar", "0.idx", "manifest.json"])
def test_what_is_no_file_is_not_read_as_a_shard(foreign, capsys, what, name):
    index_shards(foreign)
    file = foreign / "train" / name
    file.unlink()
    os.mkfifo(file) if what == "pipe" else file.symlink_to("/dev/zero")
    assert refused(["shards", str(foreign), f"{foreign}-again"], capsys)
    if name == "0.tar":
        (foreign / "train" / "manifest.json").unlink()
        assert "train/0.tar: cannot be indexed" in refused(["index", str(foreign)], capsys)


@pytest.mark.parametrize("what", ["pipe", "device", "1 TiB"])
def test_what_is_no_list_is_not_read_as_an_exclude_list(photos, capsys, what):
    file = photos / "exclude.txt"
    if what == "pipe":
        os.mkfifo(file)
    elif what == "device":
        file.symlink_to("/dev/zero")
    else:
        file.touch()
        os.truncate(file, 1 << 40)
    for command in (["check", str(photos)], ["shards", str(photos), f"{photos}-packed"]):
        assert "exclude.txt: cannot be read (" in refused(command, capsys)


def test_a_file_list_without_end_is_one_line(tmp_path, capsys):
    for split in SPLITS:
        (tmp_path / f"{split}.txt").touch()
        os.truncate(tmp_path / f"{split}.txt", 1 << 40)
    assert "train.txt: cannot be read (" in refused(["shards", str(tmp_path), f"{tmp_path}-packed"], capsys)


@pytest.mark.parametrize("loader", ["dali", "folder"])
def test_a_file_list_that_names_a_device_is_one_line(tmp_path, loader):
    write_split(tmp_path / "images", 1)
    lines = [f"images/{name}/0.jpg {name}\n" for name in ("ant", "bee")]
    (tmp_path / "val.txt").write_text("".join(lines))
    (tmp_path / "train.txt").write_text("".join([*lines, "/dev/zero ant\n"]))
    train, _ = build(tmp_path, loader, batch_size=3, threads=1)
    with pytest.raises(DataError, match=r"cannot read /dev/zero \(not a regular file\): replace or remove"):
        list(train)
    train.close()


def test_names_of_classes_with_thousands_of_digits_are_names(tmp_path):
    """Python turns no more than 4,300 digits into a number."""
    (tmp_path / "train.txt").write_text(f"a.jpg {'9' * 5000}\nb.jpg 1\n")
    assert list_split(tmp_path, "train").classes == ["1", "9" * 5000]


def test_a_link_at_a_shard_is_read_as_the_shard(foreign, victim, tmp_path):
    """As users are told to lay theirs; what is written lies beside the link."""
    (foreign / "train" / "0.tar").rename(tmp_path / "elsewhere.tar")
    (foreign / "train" / "0.tar").symlink_to(tmp_path / "elsewhere.tar")
    assert index_shards(foreign) and (foreign / "train" / "0.idx").is_file()
    assert list_split(foreign, "train").names == ["0.tar/a.jpg"]


def test_a_place_that_was_emptied_by_a_link_before_is_kept(tmp_path, victim):
    """The first command of all: `.NAME.preparing` led to a folder, and all of it was deleted."""
    (tmp_path / ".set.preparing").symlink_to(victim)
    with pytest.raises(DataError, match="is a link"):
        prepare_digits(tmp_path / "set")
    with pytest.raises(DataError, match="is a link"):
        prepare_shards(_photos_at(tmp_path / "photos"), tmp_path / "set")


def _photos_at(path: Path) -> Path:
    for split in SPLITS:
        write_split(path / split, 1)
    return path
