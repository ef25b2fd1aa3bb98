"""Which images are refused and which taken, that DALI never meets one that crashes it, and when the error comes."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from made_images import build, made_photo, needs_dali, taken, write_split
from PIL import Image

from data import dali
from data.batch import DataError
from data.dali import DaliDecoder
from data.defects import decode_failure, defect, find_defects
from data.images import list_splits
from data.plain import is_plainly_whole
from data.prepare import check_data, prepare_shards
from data.sharding import TrainSharding


def encoded(image: Image.Image, format_name: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format_name, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    header: tuple[int, ...] = (4, 4, 8, 2, 0, 0, 0), rows: bytes = (b"\0" + bytes(12)) * 4, more: bytes = b""
) -> bytes:
    """header: width, height, bits, colour type, compression, filters, interlacing. more: chunks before the pixels."""
    parts = (chunk(b"IHDR", struct.pack(">IIBBBBB", *header)), more, chunk(b"IDAT", zlib.compress(rows)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


JPEG = encoded(made_photo(1), "JPEG")
SCAN = JPEG.index(b"\xff\xda")
FRAME = JPEG.index(b"\xff\xc0")


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"optimize": True}, {"subsampling": 0}, {"quality": 100}]
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_of_every_usual_kind_are_plain(mode, options):
    for photo in (made_photo(2), made_photo(2).resize((1, 1)), made_photo(2).resize((17, 9))):
        assert is_plainly_whole(encoded(photo.convert(mode), "JPEG", restart_marker_rows=1, **options))


def test_what_cameras_append_to_a_jpeg_makes_no_difference():
    for more in (
        b"\0",
        b"a preview",
        JPEG,
        encoded(made_photo(2), "MPO", save_all=True, append_images=[made_photo(3)]),
    ):
        assert is_plainly_whole(JPEG + more)


def test_pngs_of_every_usual_kind_are_plain():
    for mode in ("RGB", "L", "1", "P", "LA", "RGBA", "I;16"):
        pixels = made_photo(3).convert("L" if mode == "I;16" else mode)
        image = Image.fromarray(np.asarray(pixels).astype(np.uint16) * 257) if mode == "I;16" else pixels
        assert is_plainly_whole(encoded(image, "PNG")), mode


@pytest.mark.parametrize(
    "content",
    [
        JPEG[:SCAN] + b"\xff\xd9",
        JPEG[:FRAME] + JPEG[SCAN:],
        JPEG[:-2],
        JPEG[: SCAN + 700] + b"\xff\xd8" + JPEG[SCAN + 700 :],
        JPEG[:FRAME] + b"\xff\xc3" + JPEG[FRAME + 2 :],
        JPEG[:FRAME] + b"\xff\xc9" + JPEG[FRAME + 2 :],
        JPEG[: FRAME + 4] + b"\x0c" + JPEG[FRAME + 5 :],
        JPEG[: FRAME + 14] + b"\x31" + JPEG[FRAME + 15 :],
        JPEG[: FRAME + 5] + struct.pack(">HH", 9000, 9000) + JPEG[FRAME + 9 :],
        JPEG[: FRAME + 5] + struct.pack(">HH", 14000, 14000) + JPEG[FRAME + 9 :],
        JPEG[: FRAME + 5] + struct.pack(">HH", 1, 65501) + JPEG[FRAME + 9 :],
    ],
    ids=[
        "no-scan",
        "no-frame",
        "no-end",
        "cut-in",
        "lossless",
        "arithmetic",
        "12-bits",
        "sampling",
        "too-few-bytes",
        "too-large",
        "too-long",
    ],
)
def test_jpegs_with_a_fault_in_their_structure_are_not_plain(content):
    assert not is_plainly_whole(content)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_with_any_byte_of_its_headers_changed_is_decoded_or_not_plain(progressive):
    """DALI's decoder crashes on what libjpeg refuses there."""
    whole = encoded(made_photo(1).resize((24, 16)), "JPEG", progressive=progressive)
    passed = 0
    for place in range(2, whole.rindex(b"\xff\xda") + 14):
        for flipped in (0x01, 0x10, 0x80, 0xFF):
            content = bytearray(whole)
            content[place] ^= flipped
            if is_plainly_whole(bytes(content)):
                passed += 1
                assert defect(bytes(content), None) == "", place
    assert passed > 100  # quantisation tables, identifiers, densities


def test_a_png_with_any_byte_changed_is_not_plain():
    whole = png()
    assert is_plainly_whole(whole)
    for place in range(len(whole)):
        assert not is_plainly_whole(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :]), place
        assert not is_plainly_whole(whole[:place]), place


@pytest.mark.parametrize(
    "content",
    [
        png((4, 4, 8, 7, 0, 0, 0)),
        png((4, 4, 3, 2, 0, 0, 0)),
        png((4, 4, 8, 2, 1, 0, 0)),
        png((4, 4, 8, 2, 0, 1, 0)),
        png((4, 4, 8, 2, 0, 0, 1)),
        png((0, 4, 8, 2, 0, 0, 0)),
        png((4, 4, 8, 3, 0, 0, 0), rows=bytes(5) * 4),
        png(rows=bytes(13) * 3),
        png(rows=(b"\5" + bytes(12)) * 4),
        png(more=chunk(b"CRIT", b"")),
        png(more=chunk(b"IDAT", b"") + chunk(b"PLTE", bytes(3))),
        png() + b"\0",
        png()[:33] + chunk(b"IEND", b""),
        png(more=chunk(b"IDAT", b"") + chunk(b"tEXt", b"a\0b")),
        png(more=chunk(b"acTL", bytes(8))),
        png((4, 4, 8, 3, 0, 0, 0), rows=bytes(5) * 4, more=chunk(b"PLTE", bytes(4))),
        png((4, 4, 8, 3, 0, 0, 0), rows=bytes(5) * 4, more=chunk(b"PLTE", bytes(771))),
        png((70000, 1, 8, 0, 0, 0, 0), rows=bytes(70001)),
        png()[:33] + chunk(b"IDAT", zlib.compress(bytes(52))[:-4]) + chunk(b"IEND", b""),
        png()[:8] + chunk(b"IHDR", bytes(12)) + png()[33:],
    ],
    ids=[
        "colour",
        "depth",
        "compression",
        "filters",
        "interlaced",
        "empty",
        "no-palette",
        "few-rows",
        "filter",
        "critical",
        "order",
        "more",
        "no-data",
        "short",
        "gap",
        "animation",
        "palette-of-4",
        "palette-of-771",
        "long-side",
        "no-checksum",
    ],
)
def test_pngs_that_are_not_what_their_checksums_promise_are_not_plain(content):
    assert not is_plainly_whole(content)


@needs_dali
@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "PPM", "TIFF", "WEBP", "BMP", "JPEG2000"])
def test_sound_images_of_every_format_are_taken(format_name):
    decoder = DaliDecoder()
    for mode in ("RGB", "L"):
        assert defect(encoded(made_photo(1).convert(mode), format_name), decoder) == ""
    if format_name == "PPM":
        assert defect(b"P6 2 1 65535 " + bytes(range(12)), decoder) == ""


@needs_dali
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (encoded(made_photo(1), "PNG")[:-5], "DALI does not decode it"),
        (encoded(made_photo(1).convert("1"), "TIFF"), "DALI does not decode it"),
        (encoded(made_photo(1), "TIFF", tiffinfo={274: 6}), "DALI decodes it to another image than Pillow"),
        (encoded(made_photo(1).convert("F"), "TIFF"), "DALI decodes it to another image than Pillow"),
    ],
    ids=["no end", "1 bit", "turned", "float"],
)
def test_what_dali_does_not_decode_as_pillow_does_is_refused(content, reason):
    decoder = DaliDecoder()
    assert reason in defect(content, decoder) and defect(content, None) == ""
    assert defect(JPEG, decoder) == ""  # it goes on after a failure


def test_what_is_no_image_format_of_ours_is_refused_by_all():
    assert defect(encoded(made_photo(1), "GIF"), None) == "GIF, which DALI does not decode"
    assert defect(b"", None) == "the file is empty"


def test_plainly_whole_images_are_not_decoded_at_first_sight(photos, monkeypatch):
    monkeypatch.setattr("data.defects.open_image", None)
    assert find_defects(list_splits(photos)[0], range(14), None) == {}
    assert len(find_defects(list_splits(photos)[0], range(14), None, suspect=True)) == 14


def test_a_failure_names_an_image_that_is_broken_behind_a_sound_structure(photos, monkeypatch):
    monkeypatch.setattr("data.defects.is_plainly_whole", lambda content: True)
    (photos / "train" / "ant" / "1.jpg").write_bytes(b"no image")
    failure = decode_failure(list_splits(photos)[0], np.arange(3), RuntimeError("DALI's own words"))
    assert "train/ant/1.jpg (cannot identify image file)" in str(failure)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("CUDA runtime API error cudaErrorIllegalAddress (700):\nan illegal memory access", "nvidia-smi"),
        ("Error in thread 0: CUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory", "data.threads"),
        ("CUDA allocation failed\nCurrent pipeline object is no longer valid.", "data.batch_size"),
        ("CUDA Runtime failure: '#2' at image.cpp:64", "nvidia-smi"),
        ('[nvjpeg.h:100] NVJPEG error "6" : NVJPEG_STATUS_EXECUTION_FAILED n01440764.JPEG', "nvidia-smi"),
    ],
)
def test_a_failure_of_the_gpu_is_told_as_such_and_no_image_is_decoded_again(photos, monkeypatch, words, said):
    """The words as in NVIDIA/DALI issues 950 and 3160, nvImageCodec issue 34, and DALI 2.4's own strings."""
    monkeypatch.setattr("data.defects.find_defects", None)
    cause = RuntimeError(f"Critical error in pipeline:\nError in mixed operator, encountered:\n{words}")
    failure = str(decode_failure(list_splits(photos)[0], np.arange(3), cause))
    assert failure.startswith("the GPU failed while DALI worked, and no image is to blame (") and said in failure
    assert "\n" not in failure


def test_a_jpeg_that_nvjpeg_calls_bad_is_looked_for(photos):
    (photos / "train" / "ant" / "1.jpg").write_bytes(b"no image")
    cause = RuntimeError('NVJPEG error "3" : NVJPEG_STATUS_BAD_JPEG')
    assert "train/ant/1.jpg" in str(decode_failure(list_splits(photos)[0], np.arange(3), cause))


CRASHING = {
    "junk": b"no image\n" * 20,
    "no scan": JPEG[:SCAN] + b"\xff\xd9",
    "1 bit TIFF": encoded(made_photo(1).convert("1"), "TIFF"),
    "colour type": png((4, 4, 8, 7, 0, 0, 0)),
}


@needs_dali
@pytest.mark.parametrize("in_shards", [False, True], ids=["folder", "shards"])
@pytest.mark.parametrize("content", CRASHING.values(), ids=CRASHING.keys())
def test_a_broken_image_in_a_large_batch_is_named_and_kept_from_dali(tmp_path, content, in_shards, monkeypatch):
    """DALI 2.4's decoder crashes the process there, more often than not."""
    monkeypatch.setattr(dali, "decode_failure", None)  # which names what DALI itself has failed on
    for split in ("train", "val"):
        write_split(tmp_path / "set" / split, 35)
    (tmp_path / "set" / "val" / "bee" / "34.jpg").write_bytes(content)
    if in_shards:
        prepare_shards(tmp_path / "set", tmp_path / "shards")
    _, val = build(tmp_path / ("shards" if in_shards else "set"), "dali", batch_size=70)
    with pytest.raises(DataError, match=r"cannot read .*bee.*34\.jpg"):
        taken(val)
    val.close()


@needs_dali
@pytest.mark.parametrize("batch_size", [4, 1])
def test_the_error_comes_with_the_step_that_needs_the_image(photos, batch_size):
    """DALI is some steps ahead: an image that comes later, or that the first epoch leaves out, does not end it."""
    sharding = TrainSharding(num_images=14, local_batch_size=batch_size, rank=0, world_size=1, seed=3)
    drawn = [sharding.indices(*divmod(step, sharding.steps))[0].tolist() for step in range(6 * sharding.steps)]
    first = {index: next(step for step, indices in enumerate(drawn) if index in indices) for index in range(14)}
    last, due = max(first.items(), key=lambda item: item[1])
    broken = photos / "train" / list_splits(photos)[0].names[last]
    broken.write_bytes(b"no image")
    train, _ = build(photos, "dali", batch_size=batch_size)
    steps = 0
    with pytest.raises(DataError, match=rf"cannot read {broken} "):
        for epoch in range(6):
            train.go_to(epoch)
            for _ in train:
                steps += 1
    assert steps == due >= 3
    train.close()


@needs_dali
def test_an_image_is_looked_at_once(photos, monkeypatch):
    honest, looked_at = dali.find_defects, []

    def find(images, indices, decoder):
        looked_at.extend(indices)
        return honest(images, indices, decoder)

    monkeypatch.setattr(dali, "find_defects", find)
    train, _ = build(photos, "dali")
    for epoch in range(4):
        train.go_to(epoch)
        taken(train)
    train.close()
    assert sorted(looked_at) == sorted(set(looked_at)) and len(looked_at) == 14


def test_a_named_pipe_and_a_device_are_no_images(photos):
    """By themselves they are read for ever."""
    os.mkfifo(photos / "train" / "ant" / "pipe.jpg")
    (photos / "val" / "ant" / "zero.jpg").symlink_to("/dev/zero")
    assert check_data(photos).broken == dict.fromkeys(["train/ant/pipe.jpg", "val/ant/zero.jpg"], "not a regular file")
