"""Shards and file lists: the same images, orders and resumes as an image folder's, whole or refused."""

import io
import json
import os
import shutil
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import pytest
from made_images import build, check_resumed_training, disk_loaders, equal, made_photo, needs_dali, taken, write_split
from made_shards import write_tar

from data import shards as shards_module
from data.batch import DataError
from data.images import list_split, list_splits, list_validation, open_image
from data.prepare import check_data, index_shards, prepare_shards
from data.sharding import SHARDS_AT_A_TIME, TrainSharding
from data.shards import read_index
from launch.prepare import main as prepare_main


@pytest.fixture
def shards(photos, tmp_path_factory):
    """14 training and 10 validation images in 4 and 3 shards."""
    path = tmp_path_factory.mktemp("shards") / "set"
    prepare_shards(photos, path, images_per_shard=4)
    return path


def contents(images) -> set[tuple[str, bytes]]:
    """(class, bytes) of every image."""
    return {(images.classes[label], images.read(index)) for index, label in enumerate(images.labels)}


def test_shards_hold_every_image_once_with_its_class_and_its_bytes(photos, shards):
    for files, packed in zip(list_splits(photos), list_splits(shards), strict=True):
        assert packed.classes == files.classes and len(packed.names) == len(files.names)
        assert contents(packed) == contents(files)


def test_threads_that_read_more_shards_than_stay_open_get_every_image_right(photos, tmp_path_factory, monkeypatch):
    """A shard that falls out of the cache must not be closed under the thread that reads it."""
    path = tmp_path_factory.mktemp("shards") / "set"
    prepare_shards(photos, path, images_per_shard=1)
    monkeypatch.setattr(shards_module, "_opened", lru_cache(maxsize=2)(shards_module._opened.__wrapped__))
    images, honest = list_split(path, "train"), os.pread
    expected = [images.read(index) for index in range(14)]

    def slow_pread(descriptor, size, offset):
        time.sleep(0.0005)  # long enough for other threads to empty the cache
        return honest(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", slow_pread)
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(images.read, [*range(14)] * 20)) == expected * 20


def test_classes_are_mixed_and_equal_seeds_give_equal_files(photos, shards, tmp_path):
    labels = list_split(shards, "train").labels.tolist()
    assert labels != sorted(labels)
    prepare_shards(photos, tmp_path / "again", images_per_shard=4)
    prepare_shards(photos, tmp_path / "other", images_per_shard=4, seed=1)
    first, again, other = (
        path / "train" / "train-00000.tar" for path in (shards, tmp_path / "again", tmp_path / "other")
    )
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()


@needs_dali
def test_dali_s_own_reader_takes_the_shards_and_their_index(shards):
    from nvidia.dali import fn, pipeline_def

    tars = sorted((shards / "train").glob("*.tar"))
    paths, indices = [str(tar) for tar in tars], [str(tar.with_suffix(".idx")) for tar in tars]

    @pipeline_def(batch_size=14, num_threads=1, device_id=None)
    def graph():
        images, labels = fn.readers.webdataset(paths=paths, index_paths=indices, ext=["jpg", "cls"])
        return images, labels

    images, labels = graph().run()
    listed = list_split(shards, "train")
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        assert bytes(np.asarray(image)) == listed.read(index)
        assert bytes(np.asarray(label)) == str(listed.labels[index]).encode()


@disk_loaders
def test_resumed_training_from_shards_equals_undisturbed(shards, loader):
    check_resumed_training(lambda: build(shards, loader)[0])


def test_a_stored_state_belongs_to_its_shards(photos, shards, tmp_path):
    """Shards of another length are read in another order."""
    prepare_shards(photos, tmp_path / "longer", images_per_shard=7)
    state = build(shards, "folder")[0].state_dict()
    with pytest.raises(DataError, match="file_names: stored"):
        build(tmp_path / "longer", "folder")[0].load_state_dict(state)


def test_an_order_over_shards_is_a_permutation_that_reads_few_shards_at_a_time():
    sizes = tuple([5] * 3 * SHARDS_AT_A_TIME + [2])
    sharding = TrainSharding(num_images=sum(sizes), local_batch_size=1, rank=0, world_size=1, seed=0, shard_sizes=sizes)
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    orders = [[int(sharding.indices(epoch, step)[0][0]) for step in range(sharding.steps)] for epoch in (0, 1)]
    assert orders[0] != orders[1]
    for order in orders:
        assert sorted(order) == list(range(sum(sizes)))
        assert len(set(shard_of[order[: 4 * SHARDS_AT_A_TIME]])) <= SHARDS_AT_A_TIME
        assert order != sorted(order)


def cut_tar(split):
    tar = split / "train-00001.tar"
    tar.write_bytes(tar.read_bytes()[:-1024])


def null_shard_size(split):
    manifest = json.loads((split / "manifest.json").read_text())
    manifest["shards"][0]["bytes"] = None
    (split / "manifest.json").write_text(json.dumps(manifest))


def cut_index(split):
    index = split / "train-00001.idx"
    index.write_text("\n".join(index.read_text().splitlines()[:-1]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_tar, r"train-00001\.tar: found [\d,]+ bytes, manifest.json says"),
        (cut_index, r"train-00001\.idx: cannot be read .*v1\.2 with 3 of 4 samples.*index \S+ writes it anew"),
        (lambda split: (split / "train-00001.tar").unlink(), r"train-00001\.tar: found no such file"),
        (lambda split: (split / "train-00001.idx").unlink(), r"train-00001\.idx: cannot be read"),
        (lambda split: (split / "manifest.json").write_text("{"), r"manifest\.json: cannot be read"),
        (lambda split: (split / "manifest.json").write_text('{"format": 1}'), r"manifest\.json: 'classes' is no list"),
        (null_shard_size, r"manifest\.json: 'shards' is no list with file, images, bytes"),
        (lambda split: (split / "manifest.json").unlink(), r"tar files without manifest\.json"),
    ],
    ids=["cut shard", "cut index", "no shard", "no index", "cut manifest", "no keys", "null", "no manifest"],
)
def test_shards_that_are_not_whole_are_refused_by_name(shards, damage, message):
    damage(shards / "train")
    with pytest.raises(DataError, match=message):
        list_splits(shards)


def damage_index(change):
    def damage(split):
        index = split / "train-00001.idx"
        lines = index.read_text().splitlines()
        index.write_text("\n".join(change(lines)) + "\n")

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        cut_index,
        lambda split: (split / "train-00001.idx").unlink(),
        lambda split: (split / "train-00001.idx").write_bytes(b"\xff\0"),
        damage_index(lambda lines: ["v1.2 x", *lines[1:]]),
        damage_index(lambda lines: [*lines[:-1], "cls 100"]),
        damage_index(lambda lines: [lines[0], lines[1].replace(" ", f" {10**23}", 1), *lines[2:]]),
        damage_index(lambda lines: [lines[0], lines[1].replace(" ", " -", 1), *lines[2:]]),
    ],
    ids=["cut", "gone", "no text", "no count", "cut line", "far outside", "negative"],
)
def test_a_damaged_index_is_named_and_written_anew(shards, capsys, damage):
    """The manifest stays: our own classes have their names there alone."""
    manifest, before = (shards / "train" / "manifest.json").read_bytes(), list_splits(shards)
    damage(shards / "train")
    with pytest.raises(DataError, match=rf"train-00001\.(idx|tar): .*launch/prepare\.py index {shards} writes"):
        list_splits(shards)
    assert prepare_main(["index", str(shards)]) == 0
    assert capsys.readouterr().out == f"ready: {shards}\n"
    assert (shards / "train" / "manifest.json").read_bytes() == manifest
    for after, images in zip(list_splits(shards), before, strict=True):
        assert after.digest == images.digest and contents(after) == contents(images)
    assert prepare_main(["index", str(shards)]) == 0
    assert "kept as it is" in capsys.readouterr().out


def test_an_index_that_only_points_to_other_bytes_is_written_anew(shards, capsys):
    before = contents(list_splits(shards)[0])
    damage_index(lambda lines: [line.replace(" 512 ", " 1024 ") for line in lines])(shards / "train")
    other = shards / "train" / "train-00000.idx"
    inode = other.stat().st_ino
    assert contents(list_splits(shards)[0]) != before
    assert prepare_main(["index", str(shards)]) == 0
    assert contents(list_splits(shards)[0]) == before
    assert other.stat().st_ino == inode  # it was right


def change_manifest(change):
    def damage(split):
        manifest = json.loads((split / "manifest.json").read_text())
        change(manifest)
        (split / "manifest.json").write_text(json.dumps(manifest))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_tar, r"train-00001\.tar: found [\d,]+ bytes, manifest\.json says [\d,]+ bytes: copy or make it again$"),
        (
            change_manifest(lambda manifest: manifest["shards"][1].update(images=9)),
            r"its index has 4 images, manifest\.json says 9: .* if it says the same, make the shards again",
        ),
        (
            change_manifest(lambda manifest: manifest["classes"][1].update(images=9)),
            "the images of each class are not as many as .* if it says the same, make the shards again",
        ),
        (
            change_manifest(lambda manifest: manifest["classes"][1].update(name="ant")),
            r"manifest\.json: two of the 'classes' have one name: make the shards again",
        ),
    ],
    ids=["cut shard", "images", "images of a class", "one name"],
)
def test_what_an_index_written_anew_does_not_mend_is_said(shards, damage, message):
    damage(shards / "train")
    for attempt in (list_splits, index_shards):
        with pytest.raises(DataError, match=message):
            attempt(shards)


@pytest.mark.parametrize("train", ["folder", "file list", "none"])
def test_shards_of_one_split_are_indexed_beside_another_form_or_none(photos, tmp_path_factory, train):
    path = tmp_path_factory.mktemp("sets")
    write_foreign(path, "val", 4, label=("ant", "bee", "ant").__getitem__)
    if train == "folder":
        (path / "train").symlink_to(photos / "train")
    elif train == "file list":
        (path / "train.txt").write_text(f"{photos}/train/ant/0.jpg ant\n{photos}/train/bee/0.jpg bee\n")
    assert index_shards(path)
    assert list_validation(path).classes == ["ant", "bee"]
    assert not index_shards(path)
    (path / "val/val-1.idx").unlink()
    assert index_shards(path)
    assert len(list_validation(path).names) == 8


@pytest.mark.parametrize(
    "labels", ["012012", [0, 1, 2, 0, 1, -2], [0, 1, 2, 0, 1, 3], [0, 1, 2, 0, 1], [0, 1, 2, 0, 1, "2"]]
)
def test_labels_that_are_none_are_named(tmp_path, labels):
    for split in ("train", "val"):
        write_foreign(tmp_path, split, 6)
    index_shards(tmp_path)
    file = tmp_path / "train" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["shards"][0]["labels"] = labels
    file.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"manifest\.json: 'labels' are not a whole number under 3 for each image"):
        list_splits(tmp_path)


def test_an_index_of_an_earlier_state_of_a_tar_file_is_not_trusted(tmp_path):
    for split in ("train", "val"):
        write_foreign(tmp_path, split, 6)
    (tmp_path / "train" / "train-1.idx").write_text("v1.2 1\njpg 0 10 a.jpg cls 0 1 a.cls\n")
    index_shards(tmp_path)
    assert len(list_splits(tmp_path)[0].names) == 12


def test_extensions_may_be_in_capitals_and_hold_blanks(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        with tarfile.open(tmp_path / split / "0.tar", "w") as tar:
            for name, content in (("a.v1 final.JPG", b"bytes"), ("a.CLS", b"0")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    index_shards(tmp_path)
    train, _ = list_splits(tmp_path)
    assert train.names == ["0.tar/a.v1_final.JPG"] and train.read(0) == b"bytes"


def test_an_exclude_list_elsewhere_is_honoured_when_packing(photos, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "list.txt").write_text("train/ant/0.jpg\n")
    packed = elsewhere / "set"
    assert prepare_main(["shards", str(photos), str(packed), "--exclude", str(elsewhere / "list.txt")]) == 0
    assert [len(images.names) for images in list_splits(packed)] == [13, 10]


@disk_loaders
def test_an_unreadable_image_in_a_shard_is_named_and_can_be_excluded(shards, loader):
    name, offset, size = read_index(shards / "val" / "val-00001.idx")[2]
    with (shards / "val" / "val-00001.tar").open("r+b") as tar:
        tar.seek(offset)
        tar.write(bytes(size))
    _, val = build(shards, loader)
    with pytest.raises(DataError, match=f"cannot read .*val-00001.tar: {name} "):
        taken(val)
    val.close()
    (shards / "exclude.txt").write_text(f"val/{name}\tzeros\n")
    _, val = build(shards, loader)
    assert sum(int(valid.sum()) for _, _, valid in taken(val)) == val.num_images == 9
    assert val.num_excluded == 1
    val.close()


def test_names_that_tar_keys_and_indices_cannot_hold_are_changed_and_stay_apart(tmp_path):
    for split in ("train", "val"):
        write_split(tmp_path / "files" / split, 1, ("a b.c", "雪 豹"))
        for name in ("x.y.jpg", "x_y.jpg", "x y.JPEG"):
            shutil.copy(tmp_path / "files" / split / "a b.c" / "0.jpg", tmp_path / "files" / split / "a b.c" / name)
    prepare_shards(tmp_path / "files", tmp_path / "set")
    train, _ = list_splits(tmp_path / "set")
    assert train.classes == ["a b.c", "雪 豹"] and len(set(train.names)) == 5
    assert all(" " not in name and name.count(".") == 1 for name in train.names)
    assert contents(train) == contents(list_split(tmp_path / "files", "train"))


def write_foreign(root, split, per_shard, label=str, extensions=("cls", "jpg", "json")):
    """Two shards as the webdataset library writes them: no index, no manifest, keys that come back, more files."""
    (root / split).mkdir(parents=True)
    for shard in range(2):
        with tarfile.open(root / split / f"{split}-{shard}.tar", "w") as tar:
            for number in range(per_shard):
                image = io.BytesIO()
                made_photo(10 * shard + number).save(image, format="jpeg")
                files = {
                    "cls": f"{label((shard + number) % 3)}\n".encode(),
                    "jpg": image.getvalue(),
                    "json": b"{}",
                    "txt2": b"",
                }
                for extension in extensions:
                    member = tarfile.TarInfo(f"./a b/{number:04d}.{extension}")
                    member.size = len(files[extension])
                    tar.addfile(member, io.BytesIO(files[extension]))


@disk_loaders
def test_shards_from_elsewhere_train_once_they_are_indexed(tmp_path, loader, capsys):
    write_foreign(tmp_path, "train", 6)
    write_foreign(tmp_path, "val", 3)
    with pytest.raises(DataError, match=f"tar files without manifest.json: launch/prepare.py index {tmp_path}"):
        list_splits(tmp_path)
    for words in ("ready: {}", "{}: a data set is there already; kept as it is"):
        assert prepare_main(["index", str(tmp_path)]) == 0
        assert capsys.readouterr().out == words.format(tmp_path) + "\n"
    train, val = list_splits(tmp_path)
    assert train.classes == ["0", "1", "2"]
    assert train.labels.tolist() == [0, 1, 2, 0, 1, 2, 1, 2, 0, 1, 2, 0]
    assert len(set(train.names)) == 12 and val.names[0] == "val-0.tar/./a_b/0000.jpg"
    assert open_image(val.read(5), "RGB").size == made_photo(12).size
    for of_split, count in zip(build(tmp_path, loader), (12, 6), strict=True):
        batches = taken(of_split)
        assert sum(int(valid.sum()) for _, _, valid in batches) == count
        of_split.close()
    (tmp_path / "exclude.txt").write_text(f"train/{train.names[0]}\n")
    assert list_splits(tmp_path)[0].names == train.names[1:]


def test_names_in_tar_files_need_not_be_utf_8(tmp_path):
    name = os.fsdecode(b"M\xfcll")
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        with tarfile.open(tmp_path / split / "0.tar", "w", format=tarfile.GNU_FORMAT) as tar:
            for extension, content in (("cls", b"0"), ("jpg", b"bytes")):
                member = tarfile.TarInfo(f"{name}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    index_shards(tmp_path)
    train, _ = list_splits(tmp_path)
    assert train.names == [f"0.tar/{name}.jpg"] and train.read(0) == b"bytes"


def test_tar_files_without_images_are_no_data_set(tmp_path):
    for split in ("train", "val"):
        write_foreign(tmp_path, split, 0)
    with pytest.raises(DataError, match=r"train: its 2 tar file\(s\) hold no images"):
        index_shards(tmp_path)
    assert not (tmp_path / "train" / "manifest.json").exists()


def test_a_sample_with_an_empty_class_is_named(tmp_path):
    for split in ("train", "val"):
        write_foreign(tmp_path, split, 3, label=("0", "", "2").__getitem__)
    with pytest.raises(DataError, match=r"train-0\.tar: \./a_b/0001\.cls \(1 bytes\) holds no class"):
        index_shards(tmp_path)


def test_a_tar_file_that_the_manifest_does_not_list_is_named(shards):
    shutil.copy(min((shards / "train").glob("*.tar")), shards / "train" / "new.tar")
    with pytest.raises(DataError, match=r"train/new\.tar: manifest\.json does not list it"):
        list_splits(shards)


def test_shards_made_again_at_the_same_place_are_read_anew(photos, shards):
    before = list_splits(shards)[0]
    old = before.read(0)
    shutil.rmtree(shards)
    prepare_shards(photos, shards, images_per_shard=4, seed=1)
    after = list_splits(shards)[0]
    assert contents(after) == contents(list_splits(photos)[0]) and after.read(0) != old


def test_names_as_classes_of_shards_from_elsewhere_are_sorted(tmp_path):
    for split in ("train", "val"):
        write_foreign(tmp_path, split, 3, label=("cat", "bee", "ant").__getitem__)
    index_shards(tmp_path)
    assert list_splits(tmp_path)[0].classes == ["ant", "bee", "cat"]
    assert list_splits(tmp_path)[0].labels.tolist() == [2, 1, 0, 1, 0, 2]


@pytest.mark.parametrize(
    ("extensions", "damage", "message"),
    [
        (("cls", "jpg"), lambda tar: tar.write_bytes(tar.read_bytes()[:3000]), "train-0.tar: cannot be read as a tar"),
        (("cls", "jpg"), lambda tar: [file.unlink() for file in tar.parent.iterdir()], "train: found no tar files"),
        (("jpg", "json"), lambda tar: None, "0000.json (2 bytes) holds no class"),
        (("jpg", "txt2"), lambda tar: None, "has no .cls, .json, .txt, .index file, one of which must hold its class"),
        (("cls", "json", "json"), lambda tar: None, "found 0 images in the sample of ./a_b/0000"),
    ],
    ids=["cut", "none", "no class in JSON", "no class", "no image"],
)
def test_shards_from_elsewhere_that_do_not_fit_are_named(tmp_path, capsys, extensions, damage, message):
    for split in ("train", "val"):
        write_foreign(tmp_path, split, 3, extensions=extensions)
    damage(tmp_path / "train" / "train-0.tar")
    assert prepare_main(["index", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "train" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("extension", "contents", "classes"),
    [
        ("cls", [b"10\n", b"9", b"10"], ["9", "10"]),
        ("txt", [b"tabby cat\n", b"ant", b"tabby cat"], ["ant", "tabby cat"]),
        ("index", [b"10", b"9", b"10"], ["9", "10"]),
        ("json", [b"10", b"9", b"10"], ["9", "10"]),
        ("json", [b'{"width": 9, "label": "b"}', b'{"cls": "a"}', b'{"class": "b", "name": "x"}'], ["a", "b"]),
        ("v2.CLS", [b"1", b"0", b"1"], ["0", "1"]),
    ],
    ids=["cls", "txt", "index", "JSON number", "JSON object", "long extension"],
)
def test_a_class_may_stand_in_several_kinds_of_file(tmp_path, extension, contents, classes):
    members = {}
    for number, content in enumerate(contents):
        members |= {f"{number}.v2.jpg": b"pixels %d" % number, f"{number}.{extension}": content}
    for split in ("train", "val"):
        write_tar(tmp_path / split / "0.tar", [*members.items()])
    index_shards(tmp_path)
    train, _ = list_splits(tmp_path)
    assert train.classes == classes and train.labels.tolist() == [1, 0, 1]
    assert [train.read(index) for index in range(3)] == [b"pixels 0", b"pixels 1", b"pixels 2"]


@pytest.mark.parametrize("held", [("cls", "json", "txt", "index"), ("json", "txt", "index"), ("txt", "index")])
def test_of_several_files_that_may_hold_a_class_the_first_kind_counts_in_the_whole_split(tmp_path, held):
    contents = {"cls": b"from cls", "json": b'{"label": "from json"}', "txt": b"from txt", "index": b"from index"}
    for split in ("train", "val"):
        labels = [(f"{key}.{kind}", contents[kind]) for key in "ab" for kind in held]
        write_tar(tmp_path / split / "0.tar", [("a.jpg", b""), ("b.jpg", b""), *labels])
    index_shards(tmp_path)
    assert list_splits(tmp_path)[0].classes == [f"from {held[0]}"]


def test_json_without_a_class_leaves_the_next_kind_of_file(tmp_path):
    for split in ("train", "val"):
        write_tar(tmp_path / split / "0.tar", [("a.jpg", b""), ("a.json", b'{"width": 9}'), ("a.txt", b"ant")])
    index_shards(tmp_path)
    assert list_splits(tmp_path)[0].classes == ["ant"]


def test_a_sample_with_another_kind_of_class_than_the_first_is_named(tmp_path):
    for split in ("train", "val"):
        samples = [("a.jpg", b""), ("a.cls", b"0"), ("b.jpg", b""), ("b.txt", b"a caption")]
        write_tar(tmp_path / split / "0.tar", samples)
    with pytest.raises(DataError, match=r"0\.tar: the sample of b\.jpg has no \.cls file, which must hold its class"):
        index_shards(tmp_path)


def test_keys_may_hold_dots(tmp_path):
    """A key ends at the first dot, unless that leaves several labels in one sample."""
    members = {}
    for number, key in enumerate(("set/1.5", "set/1.6", "set/1.6.b", "set/2", "v1.0/a")):
        members |= {f"{key}.jpg": b"pixels %d" % number, f"{key}.cls": b"%d" % number}
    members["set/1.5."] = b"of no kind"
    for split in ("train", "val"):
        write_tar(tmp_path / split / "0.tar", [*members.items()])
    index_shards(tmp_path)
    train, _ = list_splits(tmp_path)
    assert sorted(zip(train.names, train.labels.tolist(), strict=True)) == [
        ("0.tar/set/1.5.jpg", 0),
        ("0.tar/set/1.6.b.jpg", 2),
        ("0.tar/set/1.6.jpg", 1),
        ("0.tar/set/2.jpg", 3),
        ("0.tar/v1.0/a.jpg", 4),
    ]
    assert all(train.read(index) == b"pixels %d" % label for index, label in enumerate(train.labels))


def test_shards_beside_the_splits_are_told_where_they_belong(tmp_path):
    write_foreign(tmp_path, "train", 1)
    (tmp_path / "train").rename(tmp_path / "all")
    with pytest.raises(DataError, match=r"tar files beside it belong into train/ and val/"):
        list_splits(tmp_path / "all")


def test_files_without_a_suffix_are_packed(photos, tmp_path):
    (tmp_path / "lists").mkdir()
    for split in ("train", "val"):
        for label, name in enumerate(("ant", "bee")):
            shutil.copy(photos / split / name / "0.jpg", tmp_path / "lists" / f"{split}{label}")
        (tmp_path / "lists" / f"{split}.txt").write_text(f"{split}0 ant\n{split}1 bee\n")
    prepare_shards(tmp_path / "lists", tmp_path / "set")
    for packed, files in zip(list_splits(tmp_path / "set"), list_splits(tmp_path / "lists"), strict=True):
        assert contents(packed) == contents(files)


def write_lists(path, photos, label=str):
    """File lists of the photographs: absolute names in one, relative ones in the other."""
    path.mkdir()
    for split in ("train", "val"):
        images = list_split(photos, split)
        lines = [f"{images.path(i)} {label(images.labels[i])}" for i in range(len(images.names))]
        if split == "val":
            (path / "images").symlink_to(photos / "val")
            lines = [line.replace(f"{photos}/val", "images") for line in lines] + [""]
        (path / f"{split}.txt").write_text("\n".join(lines))


@disk_loaders
def test_file_lists_give_the_same_batches_as_their_folder(photos, tmp_path, loader):
    write_lists(tmp_path / "lists", photos, lambda label: ("ant", "bee")[label])
    for of_lists, of_folder in zip(build(tmp_path / "lists", loader), build(photos, loader), strict=True):
        assert equal(taken(of_lists), taken(of_folder))
        of_lists.close()
        of_folder.close()


def test_numbers_as_classes_keep_their_order_and_blanks_in_names(tmp_path):
    lines = [f"a b {number}.jpg\t{number}" for number in range(12)]
    (tmp_path / "train.txt").write_text("\n".join(lines))
    images = list_split(tmp_path, "train")
    assert images.classes == [str(number) for number in range(12)]
    assert images.labels.tolist() == list(range(12))
    assert images.path(3) == str(tmp_path / "a b 3.jpg")


def test_other_labels_or_classes_under_the_same_names_are_another_data_set(tmp_path):
    digests = set()
    for classes in ("ant bee", "bee ant", "ant cat"):
        first, second = classes.split()
        (tmp_path / "train.txt").write_text(f"a.jpg {first}\nb.jpg {second}\n")
        digests.add(list_split(tmp_path, "train").digest)
    assert len(digests) == 3


def test_wrong_lists_say_what_is_wrong(tmp_path):
    (tmp_path / "train.txt").write_text("a.jpg 1\nb.jpg\n")
    with pytest.raises(DataError, match=r"train\.txt, line 2: found 'b\.jpg', expected FILE CLASS"):
        list_split(tmp_path, "train")
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match=r"found both train\.txt and train/"):
        list_split(tmp_path, "train")


@needs_dali
@pytest.mark.parametrize("scheme", ["s3", "gs", "http", "HTTPS", "file"])
def test_names_with_a_scheme_are_read_by_dali_or_refused(tmp_path, scheme):
    name = f"{scheme}://bucket/a b.jpg"
    for split in ("train", "val"):
        (tmp_path / f"{split}.txt").write_text(f"{name}\tant\n{name}\tbee\n")
    assert list_split(tmp_path, "train").path(0) == name
    refusing = [
        lambda: build(tmp_path, "folder"),
        lambda: check_data(tmp_path),
        lambda: prepare_shards(tmp_path, tmp_path / "set"),
    ]
    if scheme in ("s3", "gs"):
        build(tmp_path, "dali", batch_size=1)
    else:
        refusing.append(lambda: build(tmp_path, "dali"))
    for attempt in refusing:
        with pytest.raises(
            DataError, match=rf"^{name}: {scheme.lower()}:// is not read here; .* s3:// and gs://: mount"
        ):
            attempt()
    with pytest.raises(DataError, match="object storage is read through file lists"):
        list_splits("s3://bucket/imagenet")


def test_a_manifest_counts_classes_and_shards(shards):
    manifest = json.loads((shards / "train" / "manifest.json").read_text())
    assert manifest["classes"] == [{"name": "ant", "images": 7}, {"name": "bee", "images": 7}]
    assert [shard["images"] for shard in manifest["shards"]] == [4, 4, 4, 2]


def test_a_class_whose_name_is_not_utf8_comes_back_from_shards(photos, tmp_path):
    latin1 = os.fsdecode(b"M\xfccke")
    for split in ("train", "val"):
        (photos / split / "bee").rename(photos / split / latin1)
    prepare_shards(photos, tmp_path / "set")
    assert list_splits(tmp_path / "set")[0].classes == list_splits(photos)[0].classes == [latin1, "ant"]
