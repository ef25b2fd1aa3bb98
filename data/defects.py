"""Which images cannot be trained on, why, and the errors that name them."""

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from data.batch import DataError
from data.images import ImageList, in_words, is_remote, open_image
from data.plain import is_plainly_whole

READERS = 16
"""Files looked at together: a network file system takes its time for each."""
MAX_COMPARED = 2000
"""Pixels a side; of larger images every second one, or fewer."""
MAX_APART = 1.2
"""Of 255, on average: what decoders may differ by, as rounding and the upsampling of colours leave it to them."""


OF_THE_GPU = re.compile(
    r"(?:CUDA (?:runtime|driver) (?:API error|failure)|CUDA allocation failed|nvml error"
    r"|NVJPEG_STATUS_(?:NOT_INITIALIZED|ALLOCATOR_FAILURE|EXECUTION_FAILED|ARCH_MISMATCH|INTERNAL_ERROR)).*",
    re.IGNORECASE,
)
"""How DALI (dali/core/cuda_error.h) and nvImageCodec begin what CUDA told them, and the states of nvJPEG that no image
brings about; NVJPEG_STATUS_BAD_JPEG is one that an image does."""
MEMORY_IS_FULL = ("MemoryAllocation", "OUT_OF_MEMORY", "allocation failed", "ALLOCATOR_FAILURE")


class Decoder(Protocol):
    """What another loader decodes with."""

    name: str

    def decode(self, content: bytes) -> np.ndarray:
        """RGB, uint8 (height, width, 3). Raises whatever the decoder does. Several threads may call it."""


def defect(content: bytes, decoder: Decoder | None) -> str:
    """Why the bytes of an image cannot be trained on, in words; empty if they can.

    Pillow decodes them, and so does `decoder`, if there is one: where it fails, or sees another image, networks would
    see one that depends on the loader. Raises MemoryError where the decoder does, for which the image is not to blame.
    """
    try:
        pixels = np.asarray(open_image(content, "RGB"))
    except Exception as error:  # a broken image can fail anywhere in its decoder
        return in_words(error)
    if decoder is None:
        return ""
    try:
        others = decoder.decode(content)
    except MemoryError:
        raise
    except Exception as error:
        return f"{decoder.name} does not decode it: {last_words(error)}"
    every = 1 + max(pixels.shape) // MAX_COMPARED
    one, other = (image[::every, ::every].astype(np.int16) for image in (pixels, others))
    if others.shape != pixels.shape or np.abs(one - other).mean() > MAX_APART:
        return f"{decoder.name} decodes it to another image than Pillow does"
    return ""


def find_defects(
    images: ImageList, indices: Iterable[int], decoder: Decoder | None, *, suspect: bool = False
) -> dict[int, str]:
    """Those of the images that cannot be read or trained on, index -> why; not those that lie in object storage.

    What is plainly a whole JPEG or PNG is not decoded, unless suspect.
    """

    def look(index: int) -> str:
        if is_remote(images.names[index]):
            return ""
        try:
            content = images.read(index)
        except OSError as error:
            return in_words(error)
        return defect(content, decoder) if suspect or not is_plainly_whole(content) else ""

    looked_at = list(dict.fromkeys(indices))
    with ThreadPoolExecutor(READERS) as pool:
        found = zip(looked_at, pool.map(look, looked_at), strict=True)
        return {index: why for index, why in found if why}


def unreadable(images: ImageList, defects: dict[int, str]) -> DataError:
    """The error that names images by index and what is wrong with them, three at most."""
    named = ", ".join(f"{images.where(index)} ({why})" for index, why in list(defects.items())[:3])
    return DataError(
        f"cannot read {named}: replace or remove such files, or let launch/prepare.py check list them, and start again"
    )


def decode_failure(
    images: ImageList, indices: np.ndarray, cause: Exception, decoder: Decoder | None = None
) -> DataError:
    """The error to raise when one of these images could not be read: names those that are to blame.

    indices: int64 (n,). cause: what the loader raised, quoted where no image is to blame. decoder: the loader's own,
    where that is not Pillow. No image is looked at where the GPU has failed.
    """
    if fault := OF_THE_GPU.search(str(cause)):
        return DataError(gpu_failure(fault[0].strip(" :")))
    if defects := find_defects(images, indices.tolist(), decoder, suspect=True):
        return unreadable(images, defects)
    first, last = images.where(indices[0]), images.where(indices[-1])
    return DataError(f"reading failed at one of {len(indices)} images from {first} to {last}: {last_words(cause)}")


def gpu_failure(words: str) -> str:
    """What to say and do where DALI's GPU has failed. words: CUDA's own."""
    if any(sign in words for sign in MEMORY_IS_FULL):
        remedy = "lower data.batch_size, data.threads or data.decoder_device_memory"
    else:
        remedy = "see nvidia-smi and the kernel's log for it; training itself may have caused it, at an earlier step"
    return f"the GPU failed while DALI worked, and no image is to blame ({words}): {remedy}"


def last_words(error: Exception) -> str:
    """The cause in a message of many lines: behind DALI's traceback of the pipeline, at the end of a worker's."""
    _, encountered, cause = str(error).rpartition("encountered:")
    lines = [line.strip(" :") for line in (cause if encountered else str(error)).splitlines() if line.strip()]
    return lines[0 if encountered else -1] if lines else in_words(error)
