"""Images stored at the size that training needs, instead of decoded at full size in every epoch.

What FFCV does with `max_resolution` and `jpeg_quality` when it writes a data set (github.com/libffcv/ffcv,
ffcv/fields/rgb_image.py): of a 12-megapixel photograph a crop for 224 pixels uses a fraction, and decoding is most of
what a loader does.
"""

import io
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

from data.batch import DataError

SMALLEST_SIDE = 32
QUALITIES = range(1, 101)
DECODED_AS = {"RGB": "RGB", "RGBA": "RGB", "P": "RGB", "CMYK": "RGB", "L": "L", "LA": "L", "1": "L"}
"""Pillow's mode -> what is stored. Images of other modes (16 bits) stay as they are: JPEG has 8."""
REDUCING_GAP = 2.0
"""libjpeg may halve an image while it decodes, as long as it stays so many times larger than what is wanted."""
ORIENTATION = 0x0112


@dataclass(frozen=True)
class Smaller:
    """Images whose shorter side is longer than `short_side` pixels become JPEGs of it; others keep their bytes.

    quality: of the JPEG, 1 to 100. Raises DataError for values out of range.
    """

    short_side: int
    quality: int = 90

    def __post_init__(self) -> None:
        if self.short_side < SMALLEST_SIDE:
            raise DataError(f"short side: found {self.short_side}, allowed: pixels, from {SMALLEST_SIDE}")
        if self.quality not in QUALITIES:
            raise DataError(f"quality: found {self.quality}, allowed: 1 to {QUALITIES[-1]}")

    def of(self, content: bytes) -> bytes:
        """The bytes to store for an image file. Raises ValueError for one that cannot be decoded."""
        try:
            with Image.open(io.BytesIO(content)) as image:
                if min(image.size) <= self.short_side or image.mode not in DECODED_AS:
                    return content
                return self._reduced(image)
        except (OSError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise ValueError(str(error)) from error

    def _reduced(self, image: Image.Image) -> bytes:
        scale = self.short_side / min(image.size)
        size = tuple(max(1, round(side * scale)) for side in image.size)
        orientation = image.getexif().get(ORIENTATION)
        image.draft(None, tuple(int(REDUCING_GAP * side) for side in size))
        reduced = image.convert(DECODED_AS[image.mode]).resize(size, Image.Resampling.BICUBIC)
        exif = Image.Exif()
        if orientation is not None:  # loaders differ in whether they turn such an image, and are to go on differing
            exif[ORIENTATION] = orientation
        stored = io.BytesIO()
        reduced.save(stored, "JPEG", quality=self.quality, exif=exif.tobytes())
        return stored.getvalue()
