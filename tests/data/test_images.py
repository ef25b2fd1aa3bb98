"""The listing of image folders, and what every disk loader owes to it."""

import ctypes
import os
import shutil
import struct
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from made_images import CPU, build, disk_loaders, equal, made_photo, needs_dali, synthetic, taken, write_split
from PIL import ExifTags, Image

from data import build_loaders, list_images, pack_lists, unpack_lists
from data import images as images_module
from data.batch import DataConfig, DataError
from data.classes import numbered_classes
from data.dali import _interpolation
from data.images import SPLITS, ImageList, list_split, list_splits, list_validation, with_classes
from data.prepare import index_shards, prepare_shards


def test_listing_is_sorted_by_class_and_name_and_takes_images_only(tmp_path):
    for name in ["b/2.JPG", "b/10.jpeg", "a/x.png", "a/notes.txt", "a/.hidden.jpg", ".cache/y.jpg"]:
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).touch()
    images = list_split(tmp_path, "train")
    assert images.names == ["a/x.png", "b/10.jpeg", "b/2.JPG"]
    assert images.labels.tolist() == [0, 1, 1] and images.labels.dtype == np.int64
    assert images.classes == ["a", "b"]


def test_class_folders_are_listed_side_by_side(photos, monkeypatch):
    honest, together = images_module.os.scandir, threading.Barrier(2, timeout=20)

    def scandir(folder):
        if Path(folder).name in ("ant", "bee"):
            together.wait()  # until the other class is being listed, too
        return honest(folder)

    monkeypatch.setattr(images_module.os, "scandir", scandir)
    assert len(list_split(photos, "train").names) == 14


@pytest.mark.parametrize("form", ["folder", "shards", "lists"])
def test_what_one_process_lists_is_the_same_for_the_others(photos, tmp_path, form):
    """With names that are no text, and in shards the places, too."""
    (photos / "train/ant/0.jpg").rename(photos / "train/ant" / os.fsdecode(b"M\xfcll \n.jpg"))
    (photos / "exclude.txt").write_text("train/bee/3.jpg\ntrain/bee/nowhere.jpg\n")
    (photos / "train/ant/notes.txt").touch()
    path = photos
    if form == "shards":
        prepare_shards(photos, path := tmp_path / "packed")
    elif form == "lists":
        path = tmp_path / "lists"
        path.mkdir()
        for split in SPLITS:
            (path / f"{split}.txt").write_text("".join(f"{path}/{n}.jpg {n % 3}\n" for n in range(9)))
    config = DataConfig(path=str(path), loader="folder", batch_size=2)
    ours = list_images(config)
    theirs = unpack_lists(pack_lists(ours))
    assert {split: told(images) for split, images in theirs.items()} == {s: told(images) for s, images in ours.items()}
    shutil.rmtree(path / "val" if form != "lists" else path)
    with pytest.raises(DataError, match=r"rank 0 finds images there, but this machine has no such folder: mount or"):
        build_loaders(config, rank=1, world_size=2, device=CPU, seed=0, listed=theirs)


def test_a_name_that_no_file_can_have_is_an_error(tmp_path):
    (tmp_path / "train.txt").write_bytes(b"a\0b.jpg 1\n")
    with pytest.raises(DataError, match="an image's name has a zero byte in it"):
        pack_lists({"train": list_split(tmp_path, "train")})


def told(images: ImageList) -> tuple:
    """All that a list holds, as what can be compared."""
    rest = {name: value for name, value in vars(images).items() if name not in ("labels", "places")}
    places = {} if images.places is None else vars(images.places)
    arrays = {name: (values.dtype, values.tolist()) for name, values in places.items() if name != "shards"}
    return rest, images.labels.dtype, images.labels.tolist(), places.get("shards"), arrays


def test_missing_folder_says_what_is_expected(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: there is no such folder; expected PATH/train/CLASS"):
        list_splits(tmp_path / "nowhere")
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="train: found no class folders"):
        list_splits(tmp_path)


def test_empty_class_is_named(photos):
    (photos / "train" / "cat").mkdir()
    with pytest.raises(DataError, match="train/cat: found no images"):
        list_splits(photos)


def test_differing_classes_are_named(photos):
    for name in ("cat", "dog", "eel", "fox"):
        write_split(photos / "train", 1, (name,))
    with pytest.raises(DataError, match="train/ has 6 classes, val/ 2, and they differ in cat, dog, eel and 1 more"):
        list_splits(photos)


@disk_loaders
def test_training_takes_each_image_once_with_its_own_label(tmp_path, loader):
    """Every file has one grey level, so that its pixels tell which file it was."""
    for number in range(12):
        folder = tmp_path / "train" / f"class {number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (40, 40), 20 * number).save(folder / f"{number}.png")
    write_split(tmp_path / "val", 1, ("class 0", "class 1", "class 2"))
    train, _ = build(tmp_path, loader, channels=1)
    for _ in range(2):
        batches = taken(train)
        levels = torch.cat([images.mean(dim=(1, 2, 3)) * 0.226 + 0.449 for images, _, _ in batches]) * 255 / 20
        labels = torch.cat([labels for _, labels, _ in batches])
        numbers = levels.round().long()
        assert sorted(numbers.tolist()) == list(range(12))
        assert torch.equal(numbers % 3, labels)
    train.close()


@disk_loaders
def test_contract_of_a_batch(photos, loader):
    train, val = build(photos, loader)
    assert (len(train), len(val)) == (3, 3)
    assert (train.num_images, val.num_images, train.num_classes) == (14, 10, 2)
    assert train.classes == val.classes == ("ant", "bee")
    for split in (train, val):
        for batch in split:
            assert batch.images.is_contiguous(memory_format=torch.channels_last)
            assert batch.images.shape == (4, 3, 32, 32) and batch.images.dtype == torch.float32
            assert batch.labels.shape == (4,) and batch.labels.dtype == torch.int64
            assert batch.valid.shape == (4,) and batch.valid.dtype == torch.bool
            assert batch.images.abs().max() < 2.7
        split.close()


@disk_loaders
def test_validation_counts_every_image_once_over_the_ranks(photos, loader):
    """10 images, 3 ranks of 2: rank 2's last step is padding only."""
    labels, masks = [], []
    for rank in range(3):
        _, val = build(photos, loader, batch_size=6, rank=rank, world_size=3)
        batches = taken(val)
        assert len(batches) == 2
        labels += [label for _, labels_B, valid_B in batches for label in labels_B[valid_B].tolist()]
        masks.append([valid_B.tolist() for _, _, valid_B in batches])
        val.close()
    assert sorted(labels) == [0] * 5 + [1] * 5
    assert masks == [[[True] * 2, [True] * 2], [[True] * 2, [True] * 2], [[True] * 2, [False] * 2]]


@disk_loaders
def test_next_epoch_has_another_order_and_another_seed_too(photos, loader):
    train, _ = build(photos, loader, batch_size=14)
    first, second = taken(train), taken(train)
    train.go_to(0)
    again = taken(train)
    train.close()
    other, _ = build(photos, loader, batch_size=14, seed=4)
    other_seed = taken(other)
    other.close()
    assert torch.equal(first[0][1], again[0][1])
    assert not equal(first, second)
    assert not torch.equal(first[0][1], second[0][1])
    assert not torch.equal(first[0][1], other_seed[0][1])


@disk_loaders
def test_an_image_is_cropped_anew_every_epoch(tmp_path, loader):
    for split in ("train", "val"):
        write_split(tmp_path / split, 1, ("ant",))
    train, _ = build(tmp_path, loader, batch_size=1, flip=0.0)
    [(first, _, _)], [(second, _, _)] = taken(train), taken(train)
    train.close()
    assert not torch.equal(first, second)


@disk_loaders
def test_ranks_crop_equal_images_differently(tmp_path, loader):
    for split in ("train", "val"):
        write_split(tmp_path / split, 1, ("ant",))
        (tmp_path / split / "ant" / "copy.jpg").write_bytes((tmp_path / split / "ant" / "0.jpg").read_bytes())
    cropped = []
    for rank in (0, 1):
        train, _ = build(tmp_path, loader, batch_size=2, rank=rank, world_size=2, flip=0.0)
        [(images, _, _)] = taken(train)
        cropped.append(images)
        train.close()
    assert not torch.equal(*cropped)


@disk_loaders
def test_a_loader_that_goes_elsewhere_after_a_state_begins_there_as_a_fresh_one(photos, loader):
    fresh, _ = build(photos, loader)
    expected = taken(fresh)
    state = fresh.state_dict()
    fresh.close()
    elsewhere, _ = build(photos, loader)
    elsewhere.load_state_dict(state)
    elsewhere.go_to(0, 0)
    assert equal(taken(elsewhere), expected)
    elsewhere.close()


@disk_loaders
@pytest.mark.parametrize("steps_taken", [0, 2, 3], ids=["at the start", "within an epoch", "at an epoch's last step"])
def test_resumed_training_equals_undisturbed(photos, loader, tmp_path_factory, steps_taken):
    undisturbed, _ = build(photos, loader)
    taken(undisturbed)
    undisturbed.go_to(1)
    expected = taken(undisturbed) + taken(undisturbed)
    undisturbed.close()

    stopped, _ = build(photos, loader)
    taken(stopped)
    stopped.go_to(1)
    if steps_taken:
        taken(stopped, steps_taken)
    file = tmp_path_factory.mktemp("state") / "state.pt"
    torch.save(stopped.state_dict(), file)
    stopped.close()

    resumed, _ = build(photos, loader)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    resumed.go_to(1, steps_taken)
    rest = taken(resumed)
    assert len(rest) == 3 - steps_taken
    resumed.go_to(2)
    assert equal(rest + taken(resumed), expected[steps_taken:])
    resumed.close()


@disk_loaders
def test_resumed_validation_equals_undisturbed(photos, loader):
    _, val = build(photos, loader)
    expected = taken(val)
    taken(val, 1)
    state = val.state_dict()
    val.close()
    _, resumed = build(photos, loader)
    resumed.load_state_dict(state)
    assert equal(taken(resumed), expected[1:])
    assert equal(taken(resumed), expected)
    resumed.close()


@disk_loaders
def test_state_of_another_run_says_what_differs(photos, loader):
    train, val = build(photos, loader)
    state = train.state_dict()
    for change, found in [
        ({"seed": 4}, "seed: stored 3, now 4"),
        ({"flip": 0.0}, r"flip: stored 0\.5, now 0\.0"),
        ({"crop_scale": (0.5, 1.0)}, "crop_scale"),
        ({"world_size": 2}, "world_size: stored 1, now 2"),
    ]:
        other, _ = build(photos, loader, **change)
        with pytest.raises(DataError, match=found):
            other.load_state_dict(state)
    with pytest.raises(DataError, match="split: stored 'train', now 'val'"):
        val.load_state_dict(state)
    (photos / "train" / "ant" / "0.jpg").rename(photos / "train" / "ant" / "zero.jpg")
    renamed, _ = build(photos, loader)
    with pytest.raises(DataError, match="file_names"):
        renamed.load_state_dict(state)


def with_size_in_header(jpeg: bytes, width: int, height: int) -> bytes:
    """The same file with a frame header that claims another size."""
    frame = jpeg.index(b"\xff\xc0")
    return jpeg[: frame + 5] + struct.pack(">HH", height, width) + jpeg[frame + 9 :]


@disk_loaders
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("content", ["empty", "junk", "cut", "cut at its end", "huge"])
def test_unreadable_file_is_named(photos, loader, split, content):
    """In training, too, where DALI decodes a part of an image only and may never reach its end."""
    victim = photos / split / "bee" / "3.jpg"
    whole = victim.read_bytes()
    contents = {
        "empty": b"",
        "junk": b"no image",
        "cut": whole[:-200],
        "cut at its end": whole[:-20],
        "huge": with_size_in_header(whole, 14000, 14000),
    }
    victim.write_bytes(contents[content])
    train, val = build(photos, loader)
    with pytest.raises(DataError, match=rf"cannot read .*{split}/bee/3\.jpg .*replace or remove") as failure:
        taken(train if split == "train" else val)
    assert "\n" not in str(failure.value) and "ant" not in str(failure.value)
    train.close()
    val.close()


@disk_loaders
def test_names_with_spaces_and_beyond_ascii(tmp_path, loader):
    for split in ("train", "val"):
        for class_name in ("Gürteltier & Co", "雪 豹"):
            (tmp_path / split / class_name).mkdir(parents=True)
            made_photo(1).save(tmp_path / split / class_name / "ein Bild ½.JPEG", format="jpeg")
    train, val = build(tmp_path, loader, batch_size=2)
    for split in (train, val):
        [(images, labels, _)] = taken(split)
        assert images.shape == (2, 3, 32, 32) and sorted(labels.tolist()) == [0, 1]
        split.close()


@disk_loaders
def test_flip_and_crop_follow_the_options(tmp_path, loader):
    """A left-to-right ramp, whole image: flip = 1 mirrors it, flip = 0 does not."""
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1)))
    for split in ("train", "val"):
        (tmp_path / split / "ramp").mkdir(parents=True)
        ramp.save(tmp_path / split / "ramp" / "0.png")
    options = {"batch_size": 1, "crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "resize_size": 32}
    for flip, mirrored in [(0.0, False), (1.0, True)]:
        train, val = build(tmp_path, loader, flip=flip, **options)
        [(trained, _, _)], [(validated, _, _)] = taken(train), taken(val)
        expected = validated.flip(-1) if mirrored else validated
        assert (trained - expected).abs().max() < 0.05
        train.close()
        val.close()


@needs_dali
def test_dali_takes_no_unknown_interpolation_for_another():
    with pytest.raises(DataError, match=r"interpolation: found 'lanczos', allowed: bilinear or bicubic"):
        _interpolation(DataConfig(interpolation="lanczos"))


@needs_dali
@pytest.mark.parametrize("channels", [3, 1])
def test_dali_and_folder_agree_on_validation(photos, channels):
    """Same labels and masks; pixels apart by less than half of one of 255 levels on average."""
    ramp = np.add.outer(np.arange(200), np.arange(301))
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6  # both leave it as it is stored
    Image.fromarray((ramp / 2).astype(np.uint8)).convert("RGB").save(
        photos / "val" / "ant" / "gradient.jpg", quality=95, exif=turned
    )
    _, dali = build(photos, "dali", channels=channels, image_size=56, resize_size=65)
    _, folder = build(photos, "folder", channels=channels, image_size=56, resize_size=65)
    dali_batches, folder_batches = taken(dali), taken(folder)
    dali.close()
    folder.close()
    for (images, labels, valid), (images_2, labels_2, valid_2) in zip(dali_batches, folder_batches, strict=True):
        assert torch.equal(labels, labels_2) and torch.equal(valid, valid_2)
        levels_apart = (images - images_2).abs().mean(dim=(1, 2, 3)) * 0.226 * 255
        assert levels_apart.max() < 0.5


@needs_dali
def test_dali_and_folder_augment_alike(photos):
    """Over many random crops the mean pixel and its spread are the same for both."""
    statistics = []
    for loader in ("dali", "folder"):
        train, _ = build(photos, loader, batch_size=14, image_size=16, resize_size=16)
        images = torch.cat([images for _ in range(40) for images, _, _ in taken(train)])
        statistics.append((images.mean().item(), images.std().item()))
        train.close()
    assert statistics[0] == pytest.approx(statistics[1], abs=0.03)


FREED_IN_ARENAS = """
import ctypes, sys
import torch
from data import DataConfig, build_loaders

class Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
    )]

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Mallinfo2
config = DataConfig(path=sys.argv[1], loader="dali", batch_size=32, image_size=224, threads=2)
train, _ = build_loaders(config, rank=0, world_size=1, device=torch.device("cpu"), seed=3)
before = mallinfo2().fordblks
for epoch in range(5):
    train.go_to(epoch)
    assert len([0 for _ in train]) == 1
print(mallinfo2().fordblks - before)
"""


@needs_dali
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="no glibc from 2.33 on")
def test_dali_leaves_no_large_buffers_to_the_arenas_of_malloc(tmp_path):
    """What lies freed there grows over the epochs: a batch has 18 MiB. In a process without a DALI of before."""
    write_split(tmp_path / "train", 16)
    write_split(tmp_path / "val", 1)
    command = [sys.executable, "-c", FREED_IN_ARENAS, str(tmp_path)]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 9 << 20


def test_an_exclude_list_that_leaves_no_class_is_one_line(photos):
    lines = [f"{split}/{name}/\n" for split in ("train", "val") for name in ("ant", "bee")]
    (photos / "exclude.txt").write_text("".join(lines))
    with pytest.raises(DataError, match="leaves out every class"):
        list_splits(photos)


def test_a_label_means_the_same_class_in_splits_that_number_theirs_differently(tmp_path):
    """Numbers are sorted as such in a file list, as text where they are folders."""
    classes = [str(number) for number in range(12)]
    write_split(tmp_path / "images", 1, tuple(classes))
    write_split(tmp_path / "val", 2, tuple(classes))
    lines = [f"images/{name}/0.jpg {name}" for name in classes]
    (tmp_path / "train.txt").write_text("\n".join(lines))
    for val in (list_splits(tmp_path)[1], list_validation(tmp_path)):
        assert list_splits(tmp_path)[0].classes == val.classes == classes
        assert [val.classes[label] for label in val.labels] == [name.split("/")[0] for name in val.names]


@disk_loaders
def test_validation_at_another_size_has_the_same_share_of_the_image(photos, loader):
    """And training is as it was, and goes on from each other's state."""
    train, val = build(photos, loader, image_size=32, resize_size=40, val_size=48)
    as_ever, _ = build(photos, loader, image_size=32, resize_size=40)
    [at_48] = build(photos, loader, image_size=48, resize_size=60, splits=("val",))
    assert equal(taken(val), taken(at_48))
    assert equal(taken(train), taken(as_ever))
    as_ever.load_state_dict(train.state_dict())  # or a DataError
    for one in (train, val, as_ever, at_48):
        one.close()


def test_numbers_that_are_written_differently_are_classes_in_the_same_order_in_every_process():
    names = ["0" * zeros + "1" for zeros in range(9)]
    classes, labels = numbered_classes([*names, "0"])
    assert classes == ["0", *reversed(names)]
    assert [classes[label] for label in labels] == [*names, "0"]


@disk_loaders
def test_validation_alone_needs_no_training_images(photos, loader):
    _, expected = build(photos, loader)
    lines = ["val/ant/0.jpg", "train/ant/0.jpg", "val/ant/no.jpg"]
    config = DataConfig(path=str(photos), loader=loader, batch_size=4, image_size=32, resize_size=40, threads=2)
    alone = {"rank": 0, "world_size": 1, "device": CPU, "seed": 3, "splits": ("val",)}
    shutil.rmtree(photos / "train")
    [val] = build_loaders(config, **alone)
    assert equal(taken(val), taken(expected))
    val.close()
    expected.close()
    (photos / "exclude.txt").write_text("\n".join(lines))
    [val] = build_loaders(config, **alone)
    assert (val.num_images, val.num_excluded, val.unmatched) == (9, 1, ("val/ant/no.jpg",))


def test_validation_alone_says_which_order_of_numbers_it_takes(tmp_path):
    classes = [str(number) for number in range(12)]
    write_split(tmp_path / "images", 1, tuple(classes))
    (tmp_path / "val.txt").write_text("\n".join(f"images/{name}/0.jpg {name}" for name in classes))
    config = DataConfig(path=str(tmp_path), loader="folder", batch_size=4)
    arguments = {"rank": 0, "world_size": 1, "device": CPU, "seed": 0, "splits": ("val",)}
    with pytest.warns(UserWarning, match="no training split says in which order .* taken: 0, 1, 2, 3, 4 and so on"):
        build_loaders(config, **arguments)
    (tmp_path / "train").symlink_to(tmp_path / "images")
    with pytest.warns(UserWarning, match="the network's output 0 is class 0, its last one") as said:
        build_loaders(config, **arguments)
    assert len(said) == 1


NUMBERS = tuple(str(number) for number in range(12))


@pytest.fixture
def numbered(tmp_path_factory):
    """The same images of twelve classes, whose names are numbers, in every form: form -> path of the set."""
    path = tmp_path_factory.mktemp("numbered")
    for split in SPLITS:
        write_split(path / "folder" / split, 1, NUMBERS)
    (path / "lists").mkdir()
    for split in SPLITS:
        lines = [f"{path}/folder/{split}/{name}/0.jpg {name}\n" for name in NUMBERS]
        (path / "lists" / f"{split}.txt").write_text("".join(lines))
    prepare_shards(path / "folder", path / "shards")
    prepare_shards(path / "lists", path / "indexed")
    for split in SPLITS:  # as others write them: a class's name in each .cls
        (path / "indexed" / split / "manifest.json").unlink()
    index_shards(path / "indexed")
    return {form: path / form for form in ("folder", "lists", "shards", "indexed")}


def files_by_label(images) -> dict[int, bytes]:
    return {label: images.read(index) for index, label in enumerate(images.labels.tolist())}


@pytest.mark.filterwarnings("ignore:.*the classes are numbers")
@pytest.mark.parametrize("form", ["folder", "lists", "shards", "indexed"])
def test_labels_follow_the_network_s_class_names_in_every_form(numbered, form):
    """Trained on the folder, whose classes are sorted as text: 0, 1, 10, 11, 2."""
    network = build(numbered["folder"], "folder", batch_size=4)[0].classes
    assert network == tuple(sorted(NUMBERS))
    expected = files_by_label(list_splits(numbered["folder"])[1])
    for splits in (SPLITS, ("val",)):
        loaders = build(numbered[form], "folder", splits=splits, classes=network)
        assert all(loader.classes == network for loader in loaders)
    with_order = with_classes(list_validation(numbered[form]), list(network))
    assert files_by_label(with_order) == expected


def test_an_order_of_classes_that_is_given_leaves_nothing_to_say_about_numbers(numbered):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(numbered["lists"], "folder", splits=("val",), threads=1, classes=sorted(NUMBERS))


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (("ant", "cat"), "found 2 classes, the network has 2, and 'bee' is not the network's, the network's 'cat' is"),
        (("ant",), "found 2 classes, the network has 1, and 'bee' is not the network's: labels are"),
        (("ant", "bee", "cat"), "found 2 classes, the network has 3, and the network's 'cat' is not there: labels are"),
    ],
    ids=["renamed", "more", "fewer"],
)
@pytest.mark.parametrize("splits", [SPLITS, ("val",)], ids=["both", "val"])
def test_other_classes_than_the_network_s_are_refused_by_name(photos, classes, words, splits):
    with pytest.raises(DataError, match=words):
        build(photos, "folder", splits=splits, classes=classes)


def test_made_images_have_no_class_names_and_suit_any_network():
    train, val = synthetic(classes=[f"class {number}" for number in range(10)])
    assert train.classes is val.classes is None and train.num_classes == 10
