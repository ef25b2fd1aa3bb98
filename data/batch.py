"""What every loader hands to training: the batch, the contract, and the options that describe the data."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch

Split = Literal["train", "val"]
Interpolation = Literal["bilinear", "bicubic"]
ResizedSide = Literal["shorter", "both", "longer"]

# ImageNet's channel statistics, as everybody uses them (torchvision, DALI examples), for pixels in 0..1.
MEAN_RGB = (0.485, 0.456, 0.406)
STD_RGB = (0.229, 0.224, 0.225)
# Mean and deviation by number of channels; grey takes the mean of the colours'.
NORMALISATION = {1: ((0.449,), (0.226,)), 3: (MEAN_RGB, STD_RGB)}

# Options that change nothing about the images of a data set: which and where they are, how they are read,
ON_DISK = ("path", "prepare", "exclude", "threads", "mmap")
# and how a GPU decodes them.
DECODING_ON_GPU = (
    *("hw_decoder_load", "decoder_width_hint", "decoder_height_hint"),
    *("decoder_device_memory", "decoder_host_memory"),
)

# What RandAugment and TrivialAugment put where an image is moved away: grey, as DALI does by default.
FILL = 128

MAX_PIXELS = 16384
"""Of a side: a larger number is a slip, and would fill the memory instead of ending in a line."""


class DataError(Exception):
    """The data set is not what training needs; the message says what was found and what to do."""


class Batch(NamedTuple):
    """One step of one rank: every batch has the same size, and padding is marked, never counted.

    images: float32 (B, channels, size, size) in channels-last memory format on the loader's device, normalised per
        channel; size is the epoch's `train_size` in training, image_size in validation.
    labels: int64 (B,) on the loader's device, index into the loader's `classes`.
    valid: bool (B,) on the loader's device; False marks padding at the end of a validation set.
    """

    images: torch.Tensor
    labels: torch.Tensor
    valid: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What makes a network's input of an image; of training images all but the resize and the centre crop.

    image_size: side of the square input, pixels. resize_size: what `resized_side` is resized to before the crop of the
        centre, pixels. val_size: side in validation, where it is another one than in training: then what
        is resized follows in proportion, as `validation` has it.
    resized_side: shorter; both, which changes the proportions (timm's squash); or longer, with a border of the mean
        colour around the image (timm's border).
    mean, std: of each channel, for pixels in 0..1.
    """

    image_size: int = 224
    resize_size: int = 256
    val_size: int | None = None
    resized_side: ResizedSide = "shorter"
    interpolation: Interpolation = "bilinear"
    mean: tuple[float, ...] = MEAN_RGB
    std: tuple[float, ...] = STD_RGB

    def at_size(self, image_size: int) -> "Preprocessing":
        """For inputs of another side, in validation too, with the same share of the image."""
        resize_size = max(1, self.resize_size * image_size // self.image_size)
        return dataclasses.replace(self, image_size=image_size, resize_size=resize_size, val_size=None)

    @property
    def validation(self) -> "Preprocessing":
        """What validation images go through, at the side that they have."""
        return self.at_size(self.val_size or self.image_size)

    def __str__(self) -> str:
        mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        sides = {"shorter": "the shorter side", "both": "both sides", "longer": "the longer side"}[self.resized_side]
        seen = self.validation
        trained = "" if seen.image_size == self.image_size else f" (in training {self.image_size})"
        return (
            f"{sides} resized to {seen.resize_size} pixels ({self.interpolation}), the centre {seen.image_size}"
            f"{trained}, mean {mean}, deviation {std}"
        )


class Loader(Protocol):
    """One split of one rank. All ranks have equally many steps, always."""

    kind: str
    """dali, folder or synthetic."""
    num_classes: int
    classes: tuple[str, ...] | None
    """Names of the classes, by label; None where the images are made."""
    num_images: int
    """Images in the whole split, all ranks together."""
    num_excluded: int
    """Images of the split that the exclude list leaves out; they are not in `num_images`."""
    unmatched: tuple[str, ...]
    """Lines of the exclude list that match nothing in either split."""
    passed_over: tuple[str, ...]
    """Names in the split's folders that are none of its images', such as those of folders within a class."""
    waiting_since: float | None
    """Since when (time.monotonic) an iteration has waited for images, or `close` for reads that were under way; None
    while neither does. For other threads."""

    def __len__(self) -> int:
        """Steps of an epoch; equal on all ranks."""

    def go_to(self, epoch: int, step: int = 0) -> None:
        """Make the next iteration begin at this step of this epoch (0, 1, ...), each of which has its own order.

        Where it would begin there anyway, as after a `load_state_dict`, the random state stays as it is.
        """

    def __iter__(self) -> Iterator[Batch]:
        """The batches from the loader's position to the end of the epoch; without a `go_to` the next epoch follows.

        A batch may be overwritten by the next one: do not keep it.
        """

    def state_dict(self) -> dict[str, Any]:
        """This rank's position and random state as plain data; equal states give bit-equal batches from there on."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict` of the same rank, world size and options; DataError if it is another's."""

    def same_images(self, state: dict[str, Any]) -> bool:
        """Whether a `state_dict`, of any rank, is of the same images with the same names and labels."""

    def close(self) -> None:
        """End threads and worker processes; there is no iteration after it."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, how they are read and how they are augmented."""

    path: str = "datasets/imagenet"
    """Image folder (PATH/train/CLASS/*.jpg and PATH/val/CLASS/*.jpg, JPEG or PNG), file lists (PATH/train.txt and
    PATH/val.txt, a line each `FILE CLASS`; DALI takes s3:// and gs:// files too), shards by launch/prepare.py, or a
    Hugging Face set (hf:FOLDER, Arrow or Parquet)."""
    exclude: str = ""
    """List of images to leave out, as `launch/prepare.py check` writes it; empty = PATH/exclude.txt, if it is there."""
    held_out: int = 0
    """Images of each class that training leaves out, the same ones always, so that launch/search.py can judge networks
    by them (MetaPruning holds out 50 of ImageNet's 1,300)."""
    prepare: Literal["none", "digits"] = "none"
    """Make the data set at `path` if nothing is there: digits = scikit-learn's 1,797 handwritten digits as JPEGs."""
    loader: Literal["auto", "dali", "folder", "synthetic"] = "auto"
    """auto = DALI where it imports, else folder with a warning; folder = torchvision; synthetic = made, no disk."""
    batch_size: int = 256
    """Global batch size: images a step, all ranks together; a multiple of the number of ranks."""
    image_size: int | None = None
    """Side of the square network input, pixels; null = as model.checkpoint or model.weights say, 224 without."""
    resize_size: int | None = None
    """Validation: resized_side is resized to this before the centre crop of image_size, pixels; at least image_size
    where it is the shorter one. null = as model.checkpoint or model.weights say, 8/7 of image_size without."""
    val_size: int | None = None
    """Validation: side of the square input, pixels, where it is another than image_size; resize_size follows in
    proportion. null = as model.checkpoint or model.weights say, image_size without."""
    resized_side: ResizedSide | None = None
    """Validation: shorter; both, which changes the proportions; longer, with a border of the mean colour. null = as
    model.checkpoint or model.weights say, shorter without."""
    interpolation: Interpolation | None = None
    """Of resized images. null = as model.checkpoint or model.weights say, bilinear without."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel, for pixels in 0 to 1. null = as model.checkpoint or model.weights say, ImageNet's
    without."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel. null = as model.checkpoint or model.weights say, ImageNet's without."""
    channels: Literal[1, 3] = 3
    """3 = RGB, 1 = grey (LeNet and MLP on MNIST)."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Training: area of the random crop as a share of the image, lowest and highest."""
    crop_ratio: tuple[float, float] = (0.75, 1.3333333333333333)
    """Training: width over height of the random crop, lowest and highest."""
    flip: float = 0.5
    """Training: probability of a left-right flip."""
    color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Training: brightness, contrast and saturation are multiplied by 1 - x to 1 + x, hue is turned by up to x of the
    circle (0 to 0.5); 0 = not."""
    auto_augment: Literal["none", "randaugment", "trivialaugment"] = "none"
    """Training: random operations on each image; needs channels: 3."""
    randaugment_ops: int = 2
    """RandAugment: operations an image, 1 to 5; DALI needs seconds to build the graph, more for each of them."""
    randaugment_magnitude: int = 9
    """RandAugment: strength of the operations, 0 to 30."""
    start_size: int = 0
    """Training: side of the images in the first epoch, pixels, from where it grows to image_size; 0 = image_size."""
    grow_epochs: int = 0
    """Training: epochs until image_size is reached, with start_size."""
    size_step: int = 32
    """Training: a growing side is start_size and a multiple of this, pixels."""
    threads: int = 0
    """Decoding threads (DALI) or worker processes (folder) a rank; 0 = the cores shared among the ranks, at most 8."""
    mmap: bool = True
    """DALI: map files into memory; false reads them, which network file systems prefer. Shards are always read."""
    hw_decoder_load: float = 0.65
    """DALI on a GPU: share of the images that the hardware JPEG engine decodes, 0 to 1."""
    decoder_width_hint: int = 5980
    """DALI on a GPU: width to allocate decoding buffers for, pixels; with the next three large enough, nothing is
    allocated in the middle of an epoch. The defaults are those of NVIDIA's ImageNet examples."""
    decoder_height_hint: int = 6430
    """DALI on a GPU: height to allocate decoding buffers for, pixels."""
    decoder_device_memory: int = 211025920
    """DALI on a GPU: memory of the GPU for each decoding thread, bytes."""
    decoder_host_memory: int = 140544512
    """DALI on a GPU: page-locked memory of the machine for each decoding thread, bytes."""
    synthetic_images: int = 1024
    """Synthetic loader: training images; validation has a quarter of them."""
    synthetic_classes: int = 10
    """Synthetic loader: number of classes."""

    def __post_init__(self) -> None:
        """Raises ValueError naming the field, the value found and what is allowed."""
        jitter = self.color_jitter
        hints = ("decoder_width_hint", "decoder_height_hint", "decoder_device_memory", "decoder_host_memory")
        checks = [
            ("path", self.path != "", "a folder"),
            ("held_out", self.held_out >= 0, "a whole number from 0"),
            ("batch_size", self.batch_size >= 1, "a whole number from 1"),
            ("image_size", self.image_size is None or 8 <= self.image_size <= MAX_PIXELS, f"8 to {MAX_PIXELS}"),
            ("val_size", self.val_size is None or 8 <= self.val_size <= MAX_PIXELS, f"8 to {MAX_PIXELS}"),
            ("resize_size", self.resize_size is None or 1 <= self.resize_size <= MAX_PIXELS, f"1 to {MAX_PIXELS}"),
            ("mean", self._are_of_channels(self.mean), f"{self.channels} finite numbers"),
            ("std", self._are_of_channels(self.std) and min(self.std or (1,)) > 0, f"{self.channels} above 0"),
            ("crop_scale", 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1, "0 < lowest <= highest <= 1"),
            ("crop_ratio", 0 < self.crop_ratio[0] <= self.crop_ratio[1] < math.inf, "0 < lowest <= highest, finite"),
            ("flip", 0 <= self.flip <= 1, "0 to 1"),
            ("color_jitter", all(0 <= x <= 1 for x in jitter) and jitter[3] <= 0.5, "0 to 1 each, hue 0 to 0.5"),
            ("color_jitter", self.channels == 3 or not any(jitter[2:]), "saturation and hue 0 with channels: 1"),
            ("auto_augment", self.channels == 3 or self.auto_augment == "none", "none with channels: 1"),
            ("randaugment_ops", 1 <= self.randaugment_ops <= 5, "a whole number from 1 to 5"),
            ("randaugment_magnitude", 0 <= self.randaugment_magnitude <= 30, "a whole number from 0 to 30"),
            (
                "start_size",
                self.start_size == 0 or 8 <= self.start_size <= (self.image_size or MAX_PIXELS),
                f"0, or 8 to {self.image_size or MAX_PIXELS}",
            ),
            ("grow_epochs", self.grow_epochs >= (1 if self.start_size else 0), "a whole number from 1 with start_size"),
            ("size_step", self.size_step >= 1, "a whole number from 1"),
            ("threads", self.threads >= 0, "a whole number from 0"),
            ("hw_decoder_load", 0 <= self.hw_decoder_load <= 1, "0 to 1"),
            *((name, getattr(self, name) >= 0, "a whole number from 0") for name in hints),
            ("synthetic_images", 4 <= self.synthetic_images <= 10**7, "4 to 10,000,000"),
            ("synthetic_classes", 2 <= self.synthetic_classes <= 10**5, "2 to 100,000"),
        ]
        for name, ok, allowed in checks:
            if not ok:
                raise ValueError(f"{name}: found {getattr(self, name)!r}, allowed: {allowed}")

    def _are_of_channels(self, values: tuple[float, ...] | None) -> bool:
        return values is None or (len(values) == self.channels and all(map(math.isfinite, values)))


def preprocessing_of(config: DataConfig, own: Preprocessing | None = None) -> Preprocessing:
    """What `config` says, and where it says nothing what the network's weights want, else what is usual for ImageNet.

    own: of the weights. An image size without a resize size keeps the share of the image.
    """
    mean, std = NORMALISATION[config.channels]
    base = Preprocessing(mean=mean, std=std) if own is None else own
    if len(base.mean) != config.channels:
        base = dataclasses.replace(base, mean=mean, std=std)
    if config.image_size not in (None, base.image_size):
        base = base.at_size(config.image_size)
    names = [field.name for field in dataclasses.fields(Preprocessing)]
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    return dataclasses.replace(base, **given)


def require_sizes(config: DataConfig, own: Preprocessing | None = None) -> None:
    """Raises ValueError where sizes do not go together, once it is known what weights want."""
    used = preprocessing_of(config, own)
    if config.resize_size is not None and used.resized_side == "shorter" and used.resize_size < used.image_size:
        allowed = f"image_size ({used.image_size}) to {MAX_PIXELS}"
        raise ValueError(f"resize_size: found {used.resize_size}, allowed: {allowed}")
    if config.start_size > used.image_size:
        raise ValueError(f"start_size: found {config.start_size}, allowed: 0, or 8 to {used.image_size}")


def with_preprocessing(config: DataConfig, own: Preprocessing | None = None) -> DataConfig:
    """The options with `preprocessing_of` them, so that none of it is left open."""
    return dataclasses.replace(config, **vars(preprocessing_of(config, own)))


def of_split(config: DataConfig, split: Split) -> DataConfig:
    """The options of one split, in which image_size is the side of its own images at last, and val_size is null.

    config: with nothing left open (`with_preprocessing`).
    """
    if split == "train" or config.val_size in (None, config.image_size):
        return dataclasses.replace(config, val_size=None)
    return dataclasses.replace(config, **vars(preprocessing_of(config).validation), start_size=0)


def train_size(config: DataConfig, epoch: int) -> int:
    """Side of the training images of an epoch (0, 1, ...), pixels: a pure function, so that a resume needs no state.

    config: with its image_size (`with_preprocessing`).
    """
    if not config.start_size or epoch >= config.grow_epochs:
        return config.image_size
    grown = (config.image_size - config.start_size) * epoch // config.grow_epochs
    return config.start_size + grown // config.size_step * config.size_step
