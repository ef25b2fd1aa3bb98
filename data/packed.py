"""Lists of images as bytes, so that one process looks at a data set and others are told what it found."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data.batch import DataError, Split
from data.images import ImageList
from data.shards import Places

INTEGERS = np.dtype("<i8")
BETWEEN_NAMES = "\0"
"""Which no file's name has."""


def pack_lists(listed: Mapping[Split, ImageList]) -> bytes:
    """The lists as bytes: the length of a text in JSON, the text, and of each list the names and its integers.

    A million names take a third of the time that JSON or pickle needs. DataError for a name with a zero byte.
    """
    texts, parts = {}, []
    for split, images in listed.items():
        names, places = BETWEEN_NAMES.join(images.names), images.places
        if names.count(BETWEEN_NAMES) != len(images.names) - 1:
            raise DataError(f"{images.root}: an image's name has a zero byte in it, which no file can be called by")
        names = names.encode("utf-8", "surrogateescape")  # a file's name need not be UTF-8
        texts[split] = {
            "root": str(images.root),
            "classes": images.classes,
            "shards": None if places is None else places.shards,
            "num_excluded": images.num_excluded,
            "unmatched": images.unmatched,
            "passed_over": images.passed_over,
            "unreadable": images.unreadable,
            "length": len(names),
        }
        integers = [images.labels, *([] if places is None else [places.shard, places.offset, places.size])]
        parts += [names, *(values.astype(INTEGERS).tobytes() for values in integers)]
    text = json.dumps(texts).encode()
    return b"".join([np.array([len(text)], dtype=INTEGERS).tobytes(), text, *parts])


def unpack_lists(packed: bytes) -> dict[Split, ImageList]:
    """What `pack_lists` made bytes of."""
    start = INTEGERS.itemsize
    end = start + int(np.frombuffer(packed, INTEGERS, count=1)[0])
    listed: dict[Split, ImageList] = {}
    for split, text in json.loads(packed[start:end]).items():
        start, end = end, end + text.pop("length")
        names = packed[start:end].decode("utf-8", "surrogateescape").split(BETWEEN_NAMES)
        shards, arrays = text.pop("shards"), []
        for _ in range(1 if shards is None else 4):
            arrays.append(np.frombuffer(packed, INTEGERS, len(names), offset=end).astype(np.int64))
            end += arrays[-1].nbytes
        labels, *of_places = arrays
        places = None
        if shards is not None:
            places = Places(shards=shards, **dict(zip(("shard", "offset", "size"), of_places, strict=True)))
        listed[split] = ImageList(
            root=Path(text.pop("root")),
            names=names,
            labels=labels,
            places=places,
            unmatched=tuple(text.pop("unmatched")),
            passed_over=tuple(text.pop("passed_over")),
            **text,
        )
    return listed
