"""Small images of every kind of colour that files have, made byte by byte where Pillow writes none such."""

import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageCms

SIDE = 64
ROWS, COLUMNS = np.mgrid[0:SIDE, 0:SIDE]
# Smooth, so that decoders' ways to sample colours make no difference, and saturated in places.
RGB = np.stack([COLUMNS * 4, 255 - ROWS * 4, 90 + COLUMNS + ROWS], axis=-1).clip(0, 255).astype(np.uint8)
PHOTO = Image.fromarray(RGB)
GREY = np.asarray(PHOTO.convert("L")).astype(int)
ALPHA = (COLUMNS * 4).astype(int)
SRGB, LAB = (ImageCms.ImageCmsProfile(ImageCms.createProfile(name)).tobytes() for name in ("sRGB", "LAB"))
ORIENTATION = 0x0112
APP0, APP14 = 0xE0, 0xEE


def encoded(image: Image.Image, format_name: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format_name, **options)
    return file.getvalue()


def jpegs() -> Iterator[tuple[str, bytes]]:
    best = {"quality": 95, "subsampling": 0}
    jfif = encoded(PHOTO, "JPEG", **best)
    bare = without_segments(jfif)
    yield "jfif", jfif
    yield "half colours", encoded(PHOTO, "JPEG", quality=95, subsampling=1)
    yield "quarter colours", encoded(PHOTO, "JPEG", quality=95, subsampling=2)
    yield "progressive", encoded(PHOTO, "JPEG", progressive=True, **best)
    yield "rgb", (rgb := encoded(PHOTO, "JPEG", keep_rgb=True, **best))
    yield "rgb by its components", without_segments(rgb)
    yield "rgb that passes for ycc", with_component_ids(without_segments(rgb), b"\1\2\3")
    grey = encoded(PHOTO.convert("L"), "JPEG", **best)
    yield "grey", grey
    yield "grey of Adobe", with_segment(grey, APP14, adobe(0))
    for ids in (b"\1\2\3", b"\0\1\2", b"RGB", b"rgb", b"\7\x08\x09"):
        yield f"components {ids!r}", with_component_ids(bare, ids)
        yield f"jfif components {ids!r}", with_component_ids(jfif, ids)
    for transform in range(4):
        yield f"Adobe {transform}", with_segment(bare, APP14, adobe(transform))
        yield f"jfif and Adobe {transform}", with_segment(jfif, APP14, adobe(transform))
    cmyk = without_segments(encoded(PHOTO.convert("CMYK"), "JPEG", **best))
    progressive = without_segments(encoded(PHOTO.convert("CMYK"), "JPEG", progressive=True, **best))
    yield "cmyk without mark", cmyk
    yield "cmyk without mark progressive", progressive
    yield "cmyk without mark by its components", with_component_ids(cmyk, b"CMYK")
    yield "cmyk without mark jfif", with_segment(cmyk, APP0, jfif[6:20])
    yield "cmyk with half a mark", with_segment(cmyk, APP14, adobe(0)[:7])
    for transform in range(4):
        yield f"cmyk Adobe {transform}", with_segment(cmyk, APP14, adobe(transform))
    yield "cmyk Adobe twice", with_segment(with_segment(cmyk, APP14, adobe(2)), APP14, adobe(0))
    yield "cmyk Adobe progressive", with_segment(progressive, APP14, adobe(0))
    yield "profile", encoded(PHOTO, "JPEG", icc_profile=SRGB, **best)
    yield "lab profile", encoded(PHOTO, "JPEG", icc_profile=LAB, **best)
    yield "several pictures", encoded(PHOTO, "MPO", save_all=True, append_images=[PHOTO.rotate(90)], **best)


def without_segments(jpeg: bytes) -> bytes:
    """Without what APP0 and APP14 say of the colours."""
    kept, place = jpeg[:2], 2
    while jpeg[place + 1] != 0xDA:
        end = place + 2 + int.from_bytes(jpeg[place + 2 : place + 4])
        kept += b"" if jpeg[place + 1] in (APP0, APP14) else jpeg[place:end]
        place = end
    return kept + jpeg[place:]


def with_segment(jpeg: bytes, kind: int, body: bytes) -> bytes:
    return jpeg[:2] + bytes([0xFF, kind]) + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


def adobe(transform: int) -> bytes:
    return b"Adobe" + struct.pack(">HHHB", 100, 0, 0, transform)


def with_component_ids(jpeg: bytes, ids: bytes) -> bytes:
    """The components of the frame under other numbers, and in its scan."""
    content, frame, scan = bytearray(jpeg), jpeg.index(b"\xff\xc0"), jpeg.index(b"\xff\xda")
    for number, component in enumerate(ids):
        content[frame + 10 + 3 * number] = content[scan + 5 + 2 * number] = component
    return bytes(content)


def pngs() -> Iterator[tuple[str, bytes]]:
    for bits in (1, 2, 4, 8, 16):
        levels = GREY * 256 + GREY[::-1] if bits == 16 else GREY >> (8 - bits)
        clear = chunk(b"tRNS", struct.pack(">H", int(levels[0, 0])))
        for name, more in (("", b""), (" and a clear level", clear), (" and gamma", gamma(45455))):
            yield f"grey of {bits}{name}", png(levels, bits, 0, more)
        if bits <= 8:
            count = 1 << bits
            colours = np.linspace((0, 255, 30), (255, 0, 90), count).astype(np.uint8).tobytes()
            palette = chunk(b"PLTE", colours)
            clear = chunk(b"tRNS", bytes(range(count)))
            for name, more in (("", b""), (" and alpha", clear), (" and background", chunk(b"bKGD", b"\0"))):
                yield f"palette of {bits}{name}", png(levels, bits, 3, palette + more)
            yield f"palette of {bits} too short", png(levels, bits, 3, chunk(b"PLTE", colours[: 3 * count // 2]))
    chunks = {
        "": b"",
        " and gamma": gamma(45455),
        " and gamma of 1": gamma(100000),
        " and gamma of 2.2": gamma(220000),
        " and sRGB": chunk(b"sRGB", b"\0"),
        " and primaries": chunk(b"cHRM", struct.pack(">8I", 31270, 32900, 15000, 6000, 64000, 33000, 30000, 60000)),
        " and profile": chunk(b"iCCP", b"x\0\0" + zlib.compress(SRGB)),
        " and background": chunk(b"bKGD", struct.pack(">HHH", 0, 255, 0)),
        " and fewer bits": chunk(b"sBIT", b"\5\6\5"),
        " and sizes": chunk(b"pHYs", struct.pack(">IIB", 1, 3, 0)),
        " and code points": chunk(b"cICP", b"\x09\x10\0\1"),
        " and palette": chunk(b"PLTE", bytes(range(30))),
    }
    for bits, factor in ((8, 1), (16, 257)):
        colours, grey, alpha = (values.astype(int) * factor for values in (RGB, GREY[..., None], ALPHA[..., None]))
        for name, more in chunks.items():
            yield f"rgb of {bits}{name}", png(colours, bits, 2, more)
            if name != " and fewer bits":
                yield f"rgba of {bits}{name}", png(np.concatenate([colours, alpha], axis=-1), bits, 6, more)
        clear = chunk(b"tRNS", struct.pack(">HHH", *map(int, colours[0, 0])))
        yield f"rgb of {bits} and a clear colour", png(colours, bits, 2, clear)
        yield f"grey and alpha of {bits}", png(np.concatenate([grey, alpha], axis=-1), bits, 4)
    yield "animated", encoded(PHOTO, "PNG", save_all=True, append_images=[PHOTO.rotate(90)])


def png(levels: np.ndarray, bits: int, colour_type: int, more: bytes = b"") -> bytes:
    """levels: int (height, width) or (height, width, channels). more: chunks between header and pixels."""
    header = struct.pack(">IIBBBBB", levels.shape[1], levels.shape[0], bits, colour_type, 0, 0, 0)
    if bits == 16:
        rows = [row.astype(">u2").tobytes() for row in levels]
    elif bits == 8:
        rows = [row.astype(np.uint8).tobytes() for row in levels]
    else:
        of_a_byte = levels.reshape(len(levels), -1, 8 // bits) << np.arange(8 - bits, -1, -bits)
        rows = [row.astype(np.uint8).tobytes() for row in of_a_byte.sum(axis=-1)]
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + pixels + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def gamma(hundred_thousandths: int) -> bytes:
    return chunk(b"gAMA", struct.pack(">I", hundred_thousandths))


def others() -> Iterator[tuple[str, bytes]]:
    modes = {mode: PHOTO.convert(mode) for mode in ("RGB", "L", "1", "CMYK", "YCbCr", "F")}
    modes |= {"P": PHOTO.quantize(16), "RGBA": with_alpha(PHOTO), "LA": with_alpha(PHOTO.convert("L"))}
    modes |= {"I;16": Image.fromarray((GREY * 257).astype(np.uint16)), "I": Image.fromarray(GREY.astype(np.int32))}
    written = {
        "BMP": ("RGB", "L", "1", "P", "RGBA"),
        "PPM": ("RGB", "L", "1", "RGBA", "I;16", "F"),
        "TIFF": tuple(modes),
        "WEBP": ("RGB", "L", "RGBA", "LA"),
        "JPEG2000": ("RGB", "L", "RGBA", "LA", "I;16", "CMYK", "YCbCr"),
    }
    for format_name, names in written.items():
        for name in names:
            yield f"{format_name} {name}", encoded(modes[name], format_name, lossless=True)
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        yield f"TIFF {compression}", encoded(PHOTO, "TIFF", compression=compression)
    yield "TIFF where 0 is white", encoded(PHOTO.convert("L"), "TIFF", tiffinfo={262: 0})
    yield "PPM of 16", b"P6 64 64 65535 " + (RGB.astype(">u2") * 257).tobytes()
    yield "PPM up to 100", b"P6 64 64 100 " + (RGB // 3).tobytes()
    yield "PPM in digits", b"P3 64 64 255 " + b" ".join(b"%d" % level for level in RGB.reshape(-1))
    yield "WEBP lossy", encoded(PHOTO, "WEBP", quality=95)
    yield "WEBP lossy RGBA", encoded(with_alpha(PHOTO), "WEBP", quality=95)
    yield "WEBP animated", encoded(PHOTO, "WEBP", save_all=True, append_images=[PHOTO.rotate(90)], lossless=True)
    for orientation in range(10):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        for format_name in ("JPEG", "PNG", "WEBP"):
            yield f"{format_name} turned {orientation}", encoded(PHOTO, format_name, exif=exif, quality=95)
        yield f"TIFF turned {orientation}", encoded(PHOTO, "TIFF", tiffinfo={ORIENTATION: orientation})


def with_alpha(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(Image.fromarray(ALPHA.astype(np.uint8)))
    return image


def images_of_every_kind() -> dict[str, bytes]:
    """What an image is -> its bytes; all of them SIDE pixels wide and high."""
    kinds = (("JPEG", jpegs()), ("PNG", pngs()), ("", others()))
    return {f"{group} {name}".strip(): content for group, images in kinds for name, content in images}
