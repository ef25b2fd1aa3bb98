"""Whether a file is plainly a whole JPEG or PNG, as nearly all images of nearly all data sets are.

Training looks at every image when it first comes up, so this has to be quick. It follows a JPEG's structure to the end,
0.2 ms for a photograph, and inflates a PNG, some milliseconds. Files that are unusual in any way are not plain, which
does not mean broken: decoders are to be asked.
"""

import re
import struct
import zlib

from PIL import Image

LONGEST_SIDE = 65500
"""libjpeg's limit; libpng's is higher."""
ADOBE_BYTES = 12
"""Of Adobe's segment; a shorter one is none to libjpeg."""
ANIMATION = b"acTL"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""By colour type."""
PNG_BITS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}

SOF0, SOF1, SOF2, DHT, EOI, SOS, DQT, DRI, APP14, COM = 0xC0, 0xC1, 0xC2, 0xC4, 0xD9, 0xDA, 0xDB, 0xDD, 0xEE, 0xFE
IGNORED = {*range(0xE0, 0xF0), COM}
NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
"""After entropy-coded data, in which 0xFF is followed by 0 or by a restart marker."""


def is_plainly_whole(content: bytes) -> bool:
    """Whether these bytes are a whole JPEG (Huffman, 8 bits) or PNG (not interlaced), of a size that is decoded.

    Of a JPEG its segments, tables and scans are checked (ISO 10918-1, annex B and what libjpeg refuses), not what the
    scans encode; of a PNG everything but the colours. Behind a JPEG there may be more, as in the files of many cameras.
    """
    try:
        if content.startswith(b"\xff\xd8"):
            return _Jpeg(content).is_whole()
        if content.startswith(PNG_SIGNATURE):
            return _is_whole_png(content)
    except (struct.error, IndexError, zlib.error):  # it ends, or is none, in the middle of something
        pass
    return False


class _Jpeg:
    """One pass over the segments; methods return whether what they are named for is sound."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._tables: set[tuple[str, int]] = set()
        self._is_progressive = False
        # Component -> (sampling factors across and down, quantisation table)
        self._components: dict[int, tuple[int, int, int]] = {}
        self._begun: set[int] = set()
        self._is_adobe = False
        self._blocks = self._coded_bytes = 0

    def is_whole(self) -> bool:
        content, place = self._content, 2
        readers = {DQT: self._quantisation, DHT: self._huffman, SOS: self._scan, DRI: lambda body: len(body) == 2}
        readers |= {SOF0: self._frame, SOF1: self._frame, SOF2: self._frame}
        while content[place] == 0xFF and content[place + 1] != EOI:
            kind, end = content[place + 1], place + 2 + int.from_bytes(content[place + 2 : place + 4])
            body = content[place + 4 : end]
            if len(body) != end - place - 4:
                return False
            self._is_progressive |= kind == SOF2
            self._is_adobe |= kind == APP14 and body.startswith(b"Adobe") and len(body) >= ADOBE_BYTES
            if kind not in IGNORED and not (kind in readers and readers[kind](body)):
                return False
            place = end
            if kind == SOS:
                following = NEXT_MARKER.search(content, place)
                if following is None:
                    return False
                place = following.start()
                self._coded_bytes += place - end
        is_end = content[place : place + 2] == bytes([0xFF, EOI])  # what follows is read by no decoder
        is_complete = bool(self._components) and self._begun == self._components.keys()
        # Adobe stores CMYK inverted. Without its mark Pillow takes it as it is, DALI as inverted.
        has_known_colours = len(self._components) < 4 or self._is_adobe
        bits_of_a_block = 1 if self._is_progressive else 2  # at least: its DC code, and an AC code that ends it
        return is_end and is_complete and has_known_colours and 8 * self._coded_bytes >= bits_of_a_block * self._blocks

    def _quantisation(self, body: bytes) -> bool:
        place = 0
        while place < len(body):
            precision, number = divmod(body[place], 16)
            if precision > 1 or number > 3:
                return False
            self._tables.add(("quantisation", number))
            place += 1 + 64 * (1 + precision)
        return place == len(body)

    def _huffman(self, body: bytes) -> bool:
        place = 0
        while place < len(body):
            is_ac, number = divmod(body[place], 16)
            counts = body[place + 1 : place + 17]
            symbols = body[place + 17 : place + 17 + sum(counts)]
            if is_ac > 1 or number > 3 or len(counts) < 16 or not 0 < len(symbols) == sum(counts) <= 256:
                return False
            code = 0
            for length, count in enumerate(counts, start=1):
                code += count
                if count and code >= 1 << length:  # no code is all ones
                    return False
                code <<= 1
            if not is_ac and max(symbols) > 15:
                return False
            self._tables.add(("AC" if is_ac else "DC", number))
            place += 17 + len(symbols)
        return place == len(body)

    def _frame(self, body: bytes) -> bool:
        bits, height, width, count = struct.unpack_from(">BHHB", body)
        if self._components or bits != 8 or count not in (1, 3, 4) or len(body) != 6 + 3 * count:
            return False
        for place in range(6, len(body), 3):
            component, sampling, table = body[place : place + 3]
            across, down = divmod(sampling, 16)
            if component in self._components or not (1 <= across <= 4 and 1 <= down <= 4 and table <= 3):
                return False
            self._components[component] = (across, down, table)
        factors = [(across, down) for across, down, _ in self._components.values()]
        most_across, most_down = map(max, zip(*factors, strict=True))
        blocks = [width * height * across * down // (64 * most_across * most_down) for across, down in factors]
        self._blocks = sum(blocks)  # rounded down
        is_usual = all(most_across % across == most_down % down == 0 for across, down in factors)
        return is_usual and _is_decoded_size(width, height)

    def _scan(self, body: bytes) -> bool:
        count = body[0]
        if len(body) != 4 + 2 * count or not 1 <= count <= 4:
            return False
        components, selectors = body[1 : 1 + 2 * count : 2], body[2 : 2 + 2 * count : 2]
        first, last, (high, low) = body[-3], body[-2], divmod(body[-1], 16)
        if self._is_progressive:
            sound = last == 0 if first == 0 else first <= last <= 63 and count == 1
            sound = sound and low <= 13 and (high == 0 or high == low + 1)
            kinds = [*["DC"] * (first == 0 and high == 0), *["AC"] * (first > 0)]
        else:
            sound = (first, last, high, low) == (0, 63, 0, 0)
            kinds = ["DC", "AC"]
        if not sound or len(set(components)) < count or not self._components.keys() >= set(components):
            return False
        if first == 0:
            self._begun.update(components)
        samples = [self._components[component][0] * self._components[component][1] for component in components]
        needed = {("quantisation", self._components[component][2]) for component in components}
        for dc, ac in (divmod(selector, 16) for selector in selectors):
            needed |= {(kind, dc if kind == "DC" else ac) for kind in kinds}
        return needed <= self._tables and (count == 1 or sum(samples) <= 10)


def _is_whole_png(content: bytes) -> bool:
    place, chunks = len(PNG_SIGNATURE), []
    while not chunks or chunks[-1][0] != b"IEND":
        length, kind = struct.unpack_from(">I4s", content, place)
        data, end = content[place + 8 : place + 8 + length], place + 12 + length
        if end > len(content) or zlib.crc32(data, zlib.crc32(kind)) != int.from_bytes(content[end - 4 : end]):
            return False
        chunks.append((kind, data))
        place = end
    kinds = [kind for kind, _ in chunks]
    is_known = kinds[0] == b"IHDR" and len(chunks[0][1]) == 13 and ANIMATION not in kinds and place == len(content)
    if not is_known or b"IDAT" not in kinds:
        return False
    first = kinds.index(b"IDAT")
    palette = [len(data) for kind, data in chunks[1:first] if kind == b"PLTE"]
    critical = [kind for kind in kinds if kind[0] < ord("a")]
    data = [data for kind, data in chunks[first:] if kind == b"IDAT"]
    if critical != [b"IHDR", *[b"PLTE"] * len(palette), *[b"IDAT"] * len(data), b"IEND"]:
        return False
    width, height, bits, colour, compression, filters, interlacing = struct.unpack(">IIBBBBB", chunks[0][1])
    if bits not in PNG_BITS.get(colour, ()) or compression or filters or interlacing:
        return False
    has_palette = len(palette) == 1 and 0 < palette[0] <= 768 and palette[0] % 3 == 0
    if ((palette or colour == 3) and not has_palette) or not _is_decoded_size(width, height):
        return False
    row = 1 + (width * bits * PNG_CHANNELS[colour] + 7) // 8
    stream = zlib.decompressobj()
    rows = stream.decompress(b"".join(data), row * height + 1)
    is_consecutive = kinds[first : first + len(data)] == [b"IDAT"] * len(data)
    # A row begins with its filter.
    return is_consecutive and stream.eof and len(rows) == row * height and max(rows[::row]) <= 4


def _is_decoded_size(width: int, height: int) -> bool:
    """Pillow's limit: libjpeg-turbo has one as well, from which on DALI's next decoder fills up what is missing."""
    return 0 < width * height <= 2 * Image.MAX_IMAGE_PIXELS and max(width, height) <= LONGEST_SIDE
