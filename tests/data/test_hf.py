"""Hugging Face sets: the same images, labels, orders and resumes as other forms, and what is wrong told by row."""

import sys
from pathlib import Path

import pytest
from launching import error_of
from made_images import build, check_resumed_training, disk_loaders, taken

from data.batch import DataError
from data.images import list_split, list_splits, list_validation, open_image
from data.prepare import check_data, prepare_shards
from launch.prepare import main as prepare_main

datasets = pytest.importorskip("datasets", reason="needs pip install -e '.[hf]'")

HF_SPLITS = {"train": "train", "val": "validation"}
CLASSES = ["bee", "ant"]
"""Not in sorted order: a ClassLabel's own counts."""
PLAIN = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
"""What the type Image is where Parquet files say nothing of types."""
COLUMNS = {"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def rows_of(photos: Path, split: str) -> list[dict]:
    """The photographs in mixed order, as rows of a set."""
    files = sorted((photos / split).glob("*/*.jpg"), key=lambda file: (file.name, file.parent.name))
    return [
        {"image": {"bytes": file.read_bytes(), "path": file.name}, "label": CLASSES.index(file.parent.name)}
        for file in files
    ]


def write_arrow(folder: Path, rows: dict[str, list[dict]], columns: dict = COLUMNS, files: int = 2) -> str:
    """rows: name of the split -> its rows."""
    features = datasets.Features(columns)
    splits = {name: datasets.Dataset.from_list(found, features=features) for name, found in rows.items()}
    datasets.DatasetDict(splits).save_to_disk(folder, num_shards=dict.fromkeys(splits, files))
    return f"hf:{folder}"


def write_parquet(folder: Path, rows: dict[str, list[dict]], columns: dict = COLUMNS) -> str:
    """As a download from the Hub, two files a split."""
    (folder / "data").mkdir(parents=True)
    for name, found in rows.items():
        for number in range(2):
            part = datasets.Dataset.from_list(found[number::2], features=datasets.Features(columns))
            part.to_parquet(folder / "data" / f"{name}-{number:05d}-of-00002.parquet")
    return f"hf:{folder}"


@pytest.fixture(params=[write_arrow, write_parquet], ids=["arrow", "parquet"])
def written(request, photos, tmp_path_factory) -> str:
    """14 training and 10 validation images."""
    folder = tmp_path_factory.mktemp("hf") / "set"
    return request.param(folder, {name: rows_of(photos, split) for split, name in HF_SPLITS.items()})


@pytest.fixture
def arrow(photos, tmp_path_factory):
    """Writes a set of the photographs with other columns or rows: a function of `change(rows)`, columns and splits."""

    def write(change=lambda rows: rows, columns=COLUMNS, names=HF_SPLITS) -> str:
        folder = tmp_path_factory.mktemp("hf") / "set"
        return write_arrow(folder, {name: change(rows_of(photos, split)) for split, name in names.items()}, columns)

    return write


def contents(images) -> set[tuple[str, bytes]]:
    """(class, bytes) of every image."""
    return {(images.classes[label], images.read(index)) for index, label in enumerate(images.labels)}


def test_every_image_comes_with_its_bytes_and_its_class_in_the_order_of_the_class_label(photos, written):
    for files, rows in zip(list_splits(photos), list_splits(written), strict=True):
        assert rows.classes == CLASSES
        assert len(rows.names) == len(files.names) and contents(rows) == contents(files)
    assert list_split(written, "train").names[0] == "row 0, 0.jpg"


@disk_loaders
def test_resumed_training_equals_undisturbed(written, loader):
    check_resumed_training(lambda: build(written, loader)[0])


@disk_loaders
def test_validation_counts_every_row_once_over_the_ranks(written, loader):
    labels = []
    for rank in (0, 1):
        _, val = build(written, loader, batch_size=8, rank=rank, world_size=2)
        for _, label_B, valid_B in taken(val):
            labels += label_B[valid_B].tolist()
        val.close()
    assert sorted(labels) == [0] * 5 + [1] * 5


def test_a_set_and_the_shards_packed_from_it_hold_the_same(written, tmp_path):
    prepare_shards(written, tmp_path / "shards")
    for rows, packed in zip(list_splits(written), list_splits(tmp_path / "shards"), strict=True):
        assert contents(rows) == contents(packed)


def test_validation_alone_is_enough_and_test_stands_in_for_it(arrow):
    path = arrow(names={"val": "test"})
    assert len(list_validation(path).names) == 10
    with pytest.raises(DataError, match="no split called train"):
        list_splits(path)


def broken_third(rows):
    rows[2]["image"]["bytes"] = rows[2]["image"]["bytes"][:200]
    return rows


@disk_loaders
def test_a_broken_image_is_named_by_its_row_and_can_be_excluded(arrow, loader, capsys):
    path = arrow(broken_third)
    train, _ = build(path, loader)
    with pytest.raises(DataError, match=r"train/data-00000-of-00002.arrow: row 2, 1.jpg \("):
        taken(train)
    train.close()
    assert prepare_main(["check", path]) == 1
    assert "train/row 2, 1.jpg: " in capsys.readouterr().out
    train, val = build(path, loader)
    assert (train.num_images, train.num_excluded, val.num_images) == (13, 1, 9)
    taken(train)
    train.close()


def test_sets_of_one_size_with_other_names_are_not_taken_for_each_other(arrow):
    def renamed(rows):
        return [{**row, "image": {**row["image"], "path": f"other/{row['image']['path']}x"}} for row in rows]

    assert list_split(arrow(), "train").digest != list_split(arrow(renamed), "train").digest
    assert list_split(arrow(), "train").digest == list_split(arrow(), "train").digest


def test_without_a_class_label_numbers_and_words_are_classes(arrow):
    columns = {"image": datasets.Image(), "label": datasets.Value("string")}

    def in_words(rows):
        return [{**row, "label": CLASSES[row["label"]]} for row in rows]

    assert list_split(arrow(in_words, columns), "train").classes == ["ant", "bee"]
    assert list_split(arrow(columns=columns | {"label": datasets.Value("int64")}), "train").classes == ["0", "1"]


def test_columns_go_by_type_and_of_several_by_name(arrow):
    columns = {"mask": datasets.Image(), **COLUMNS, "coarse_label": datasets.ClassLabel(names=["animal"])}

    def more(rows):
        return [{**row, "mask": {"bytes": b"none", "path": None}, "coarse_label": 0} for row in rows]

    images = list_split(arrow(more, columns), "train")
    assert images.classes == CLASSES and open_image(images.read(0), "RGB")
    renamed = {"picture": PLAIN, "kind": COLUMNS["label"]}

    def other_names(rows):
        return [{"picture": row["image"], "kind": row["label"]} for row in rows]

    assert list_split(arrow(other_names, renamed), "train").classes == CLASSES


def test_a_class_without_images_is_named_and_check_leaves_it_out(arrow):
    path = arrow(columns=COLUMNS | {"label": datasets.ClassLabel(names=[*CLASSES, "cat"])})
    with pytest.raises(DataError, match="no image of class 'cat'"):
        list_splits(path)
    exclude = Path(path.removeprefix("hf:")) / "exclude.txt"
    exclude.write_text("train/cat/\nval/cat/\n")
    assert [images.classes for images in list_splits(path)] == [CLASSES, CLASSES]


def without(column):
    return lambda rows: [{name: value for name, value in row.items() if name != column} for row in rows]


def with_image(image):
    return lambda rows: [{**row, "image": image} for row in rows]


def third_without_class(rows):
    rows[2]["label"] = -1
    return rows


@pytest.mark.parametrize(
    ("change", "columns", "message"),
    [
        (without("image"), {"label": COLUMNS["label"]}, "no column among label of images"),
        (without("label"), {"image": COLUMNS["image"]}, "no column among image of labels"),
        (third_without_class, COLUMNS, "train: row 2 has no class"),
        (with_image({"bytes": None, "path": "a.jpg"}), COLUMNS | {"image": PLAIN}, "14 rows of train hold no bytes"),
    ],
)
def test_columns_and_rows_that_are_missing_are_named(arrow, change, columns, message):
    with pytest.raises(DataError, match=message):
        list_split(arrow(change, columns), "train")


def test_a_split_without_rows_is_named(tmp_path):
    empty = datasets.Dataset.from_dict({"image": [], "label": []}, features=datasets.Features(COLUMNS))
    datasets.DatasetDict(train=empty).save_to_disk(tmp_path)
    with pytest.raises(DataError, match="train has no rows: save it with its images"):
        list_split(f"hf:{tmp_path}", "train")


def test_a_set_that_is_not_there_or_damaged_is_one_line(arrow, tmp_path, capfd, monkeypatch):
    assert "there is no such folder" in error_of(prepare_main, ["check", f"hf:{tmp_path}/nowhere"], capfd)
    assert "no split called train" in error_of(prepare_main, ["check", f"hf:{tmp_path}"], capfd)
    path = arrow()
    file = Path(path.removeprefix("hf:")) / "train" / "data-00000-of-00002.arrow"
    file.write_bytes(file.read_bytes()[:2000])
    assert "cannot be read as train" in error_of(prepare_main, ["check", path], capfd)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in error_of(prepare_main, ["check", path], capfd)


def test_a_set_without_its_prefix_is_told(written):
    with pytest.raises(DataError, match="is a Hugging Face set: call it hf:"):
        list_splits(written.removeprefix("hf:"))


def test_a_whole_set_checks_without_findings(written):
    report = check_data(written)
    assert report.images == {"train": 14, "val": 10} and not (report.broken or report.unusual or report.unread)
