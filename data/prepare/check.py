"""Every image of a data set decoded once, before a training meets the broken one in hour 30."""

import io
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from data.batch import DataError
from data.dali import DaliDecoder, import_failure
from data.defects import Decoder, defect
from data.files import cannot_write, refuse_link, write_whole
from data.images import (
    SPLITS,
    ImageList,
    exclude_file,
    in_words,
    list_split,
    read_exclude_list,
    require_schemes,
)
from data.plain import is_plainly_whole
from data.prepare.progress import tracked

IMAGES_A_TASK = 64
SMALLEST_USUAL_SIDE = 16
PNG_BIT_DEPTH = 24
"""Place of the bit depth in a PNG file."""
MODES = {
    "L": "grey",
    "LA": "grey with transparency",
    "I": "grey of 16 bits",
    "I;16": "grey of 16 bits",
    "RGBA": "with transparency",
}
MODES |= {"P": "with a palette", "1": "black and white"}


@dataclass
class CheckReport:
    """What was found. Names are those of the exclude list: SPLIT/CLASS/FILE, or SPLIT/CLASS/ for a whole class."""

    images: dict[str, int] = field(default_factory=dict)
    """Split -> images that were looked at."""
    broken: dict[str, str] = field(default_factory=dict)
    """Name -> why it cannot be trained on."""
    unusual: dict[str, str] = field(default_factory=dict)
    """Name -> what is unusual about an image that can be trained on."""
    unread: list[str] = field(default_factory=list)
    """Files that no loader takes, for their names or places."""


def check_data(
    path: str | Path, *, exclude: str | Path = "", threads: int = 0, show: Callable[[CheckReport], None] | None = None
) -> CheckReport:
    """Decode every image, compare the classes of both splits, and write what is broken to the exclude list.

    Pillow decodes all of them; DALI, where it is installed, those that are not plainly whole JPEGs and PNGs.

    exclude: the list; PATH/exclude.txt where empty. Lines of it without a reason are the user's own and stay, the
    others are replaced; where none remain, there is no list. threads: 0 = some more than cores. show: gets the report
    before the list is written, so that a list that cannot be written does not lose it. Raises DataError if PATH is no
    data set or the list cannot be written.
    """
    list_file = exclude_file(path, exclude)
    own = {name: "" for name, reason in read_exclude_list(list_file, must_exist=False).items() if not reason}
    splits = {split: list_split(path, split) for split in SPLITS}
    require_schemes((), *splits.values())
    report = CheckReport()
    decoder = DaliDecoder() if import_failure() is None else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the report says so
        for split, images in splits.items():
            _check_split(report, split, images, threads, decoder)
            # Only class folders: what a file list leaves out, it leaves out on purpose.
            if images.places is None and images.root == Path(path) / split:
                report.unread += [f"{split}/{name}" for name in _not_listed(images)]
    report.broken |= _incomplete_classes(splits, own | report.broken)
    if show:
        show(report)
    # The user's own lines win: with a reason they would be taken for the check's at the next one.
    _write_exclude_list(list_file, report.broken | own)
    return report


def _check_split(report: CheckReport, split: str, images: ImageList, threads: int, decoder: Decoder | None) -> None:
    """Add to `report` what is found in one split's images."""
    report.images[split] = len(images.names)
    with ThreadPoolExecutor(threads or None) as pool:
        try:
            found = tracked(_examined(images, pool, decoder), f"checking {split}", len(images.names))
            for name, (why_broken, what_is_unusual) in zip(images.names, found, strict=True):
                if why_broken:
                    report.broken[f"{split}/{name}"] = why_broken
                elif what_is_unusual:
                    report.unusual[f"{split}/{name}"] = what_is_unusual
        except BaseException:  # such as Ctrl-C: else all images would be looked at before it is heard
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _examined(images: ImageList, pool: ThreadPoolExecutor, decoder: Decoder | None) -> Iterator[tuple[str, str]]:
    """For every image, why it is broken and what is unusual about it. Threads do: Pillow decodes without the GIL."""
    indices = range(len(images.names))
    tasks = [indices[first : first + IMAGES_A_TASK] for first in range(0, len(indices), IMAGES_A_TASK)]
    for findings in pool.map(lambda task: [_examine(images, index, decoder) for index in task], tasks):
        yield from findings


def _examine(images: ImageList, index: int, decoder: Decoder | None) -> tuple[str, str]:
    try:
        content = images.read(index)
    except OSError as error:
        return in_words(error), ""
    # Pillow decodes all of them, the other decoder what training may have to ask it about.
    if why := defect(content, None if is_plainly_whole(content) else decoder):
        return why, ""
    return "", _unusual(content, Path(images.names[index]).suffix)


def _unusual(content: bytes, suffix: str) -> str:
    """What is unusual about a sound image, in words; empty if nothing is."""
    with Image.open(io.BytesIO(content)) as image:
        notes = []
        if suffix and Image.registered_extensions().get(suffix.lower()) != image.format:
            notes.append(f"{image.format} named {suffix}")
        if image.mode != "RGB":
            notes.append(f"{MODES.get(image.mode, image.mode)}, converted")
        elif image.format == "PNG" and content[PNG_BIT_DEPTH] == 16:
            notes.append("16 bits a channel, converted")
        if min(image.size) < SMALLEST_USUAL_SIDE:
            notes.append(f"under {SMALLEST_USUAL_SIDE} pixels wide or high")
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            notes.append(f"over {Image.MAX_IMAGE_PIXELS // 10**6} megapixels, slow to decode")
        return "; ".join(notes)


def _not_listed(images: ImageList) -> list[str]:
    """Files of an image folder that are not in its listing, hidden ones left out."""
    listed, others = set(images.names), []
    for folder, folders, files in os.walk(images.root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = Path(folder).relative_to(images.root)
        others += [str(relative / name) for name in files if not name.startswith(".")]
    return sorted(name for name in others if name not in listed)


def _incomplete_classes(splits: dict[str, ImageList], excluded: dict[str, str]) -> dict[str, str]:
    """Classes that not both splits have sound images of: SPLIT/CLASS/, wherever the class is -> why."""
    sound = {split: _sound_images(images, split, excluded) for split, images in splits.items()}
    incomplete = {}
    for name in sorted({name for images in splits.values() for name in images.classes}):
        without = [split for split in SPLITS if not sound[split].get(name)]
        reasons = [f"no sound image in {s}/" if name in sound[s] else f"no such class in {s}/" for s in without]
        reasons += [f"{s}/{name}: {splits[s].unreadable[name]}" for s in without if name in splits[s].unreadable]
        if reasons:
            incomplete |= {f"{split}/{name}/": ", ".join(reasons) for split in SPLITS if name in sound[split]}
    return incomplete


def _sound_images(images: ImageList, split: str, excluded: dict[str, str]) -> dict[str, int]:
    """Class -> its images that are not excluded; without the excluded classes."""
    sound = [f"{split}/{name}" not in excluded for name in images.names]
    counts = np.bincount(images.labels[sound], minlength=len(images.classes))
    classes = zip(images.classes, counts.tolist(), strict=True)
    return {name: count for name, count in classes if f"{split}/{name}/" not in excluded}


def _write_exclude_list(file: Path, excluded: dict[str, str]) -> None:
    """NAME or NAME<tab>REASON a line, in place of the list that was there; no list where nothing is excluded.

    DataError if it cannot be written, or, with all other names written, if one fits into no list.
    """
    unlistable = [name for name in excluded if {"\n", "\r", "\t"} & set(name)]
    lines = [f"{name}\t{excluded[name]}".rstrip("\t") + "\n" for name in sorted(excluded.keys() - set(unlistable))]
    try:
        _replace_content(file, os.fsencode("".join(lines)))
    except OSError as error:
        raise cannot_write(file, error) from error
    if unlistable:
        raise DataError(f"{unlistable[0]!r}: a name with tabs or line breaks fits into no list: rename or remove it")


def _replace_content(file: Path, content: bytes) -> None:
    """Write the file in one step, or remove it where there is no content; untouched where nothing changes."""
    if content == (file.read_bytes() if file.exists() else b""):
        return
    if content:
        write_whole(file, content)
    else:
        refuse_link(file)
        file.unlink()
