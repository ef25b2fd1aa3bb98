"""Images through NVIDIA DALI: CPU pipelines without a GPU, `mixed` decoding with one.

DALI has no say in which image comes when: an external source gives the files of each step by data/sharding.py, or
their bytes where they lie in shards, so that order, padding and names are those of every other loader. DALI's own
readers shuffle within a window, carry an epoch's leftovers into the next one and know no exclude list. The pipeline is
one endless stream that runs across the epochs: it is never reset, and it decodes the next epoch's first batches during
validation.

DALI is imported inside functions only; `import data` must work, and be quick, without it.
"""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from data.ahead import OneAhead
from data.batch import FILL, DataConfig, DataError, Split, train_size
from data.defects import decode_failure, find_defects, last_words, unreadable
from data.images import ImageList
from data.remote import require_answer
from data.sharding import Sharding

if TYPE_CHECKING:
    from nvidia.dali import Pipeline
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

Encoded = Callable[[int], list[np.ndarray]]

PREFETCHED_BATCHES = 2
POOLED_FROM = "256k"
"""Host buffers of this size and more come from DALI's own pool. By itself it leaves those up to 32 MiB to malloc, where
they fragment the memory over the epochs (`launch/bench.py memory`)."""


def import_failure() -> ImportError | None:
    """Why DALI cannot be imported here; None if it can."""
    try:
        import nvidia.dali.plugin.pytorch  # noqa: F401
    except ImportError as error:
        return error
    return None


def identity(config: DataConfig, device: torch.device) -> dict[str, str]:
    """What DALI itself adds to a loader's identity: its checkpoints fit only the same version and the same graph."""
    import nvidia.dali

    decoder = _decoder(device) if config.channels == 3 else f"{_decoder(device)}, grey from colours"
    return {"dali": nvidia.dali.__version__, "decoder": decoder}


def read_failure(names: list[str]) -> str:
    """Why DALI cannot read one of these files, in words; empty if it can. Takes as long as DALI tries."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=len(names), num_threads=1, device_id=None, prefetch_queue_depth=1)
    def graph():
        return fn.io.file.read(fn.external_source(name="names", ndim=1, dtype=types.UINT8))

    pipeline = graph()
    pipeline.feed_input("names", [np.frombuffer(os.fsencode(name), dtype=np.uint8) for name in names])
    try:
        pipeline.run()
    except Exception as error:  # DALI's own of many kinds
        return last_words(error)
    return ""


class DaliSource:
    """Images of one split by a DALI pipeline.

    The images are DALI's own memory, not a copy: they may be overwritten by the next step's.
    """

    def __init__(
        self,
        config: DataConfig,
        images: ImageList,
        *,
        split: Split,
        sharding: Sharding,
        seed: int,
        threads: int,
        device: torch.device,
    ) -> None:
        self._config = config
        self._images = images
        self._sharding = sharding
        self._training = split == "train"
        self._seed = seed
        self._threads = threads
        self._device = device
        self._iterator: DALIGenericIterator | None = None
        self._ahead: OneAhead[list[np.ndarray]] | None = None
        # The stream begins at step `_first`, of all epochs together, and goes on from `_checkpoint` if there is one.
        self._first = 0
        self._next = 0
        self._checkpoint: bytes | None = None
        self._looked_at = _LookedAt(np.zeros(len(images.names), dtype=bool))

    def start(self, epoch: int, step: int) -> None:
        reached = self._sharding.stream_step(*divmod(self._next, self._sharding.steps))
        wanted = self._sharding.stream_step(epoch, step)
        if reached != wanted:
            self.close()
            self._first = self._next = wanted
            self._checkpoint = None
        if self._iterator is None:
            self._iterator = self._open()

    def next_images(self) -> torch.Tensor:
        try:
            images = next(self._iterator)[0]["images"].permute(0, 3, 1, 2)
        except DataError:
            raise
        except Exception as error:
            # DALI names no file, and it may have failed at a batch ahead of this one.
            raise decode_failure(self._images, self._indices_ahead(), error, self._looked_at.decoder) from error
        if self._next in self._looked_at.defects:
            raise unreadable(self._images, self._looked_at.defects[self._next])
        self._next += 1
        return images

    def state_dict(self) -> dict[str, Any]:
        """`pipeline` is DALI's own checkpoint, at most some kB, as uint8 (n,); empty if no batch was taken yet."""
        checkpoint = self._checkpoint if self._iterator is None else self._iterator.checkpoints()[0]
        return {
            "stream_first": self._first,
            "stream_next": self._next,
            "pipeline": torch.tensor(list(checkpoint or b""), dtype=torch.uint8),
        }

    def load_state_dict(self, state: dict[str, Any], epoch: int, step: int) -> None:
        self.close()
        self._first, self._next = state["stream_first"], state["stream_next"]
        self._checkpoint = bytes(state["pipeline"].tolist()) or None

    def close(self) -> None:
        self._iterator = None
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None
        self._looked_at.decoder.close()
        self._looked_at = replace(self._looked_at, defects={})

    def _open(self) -> "DALIGenericIterator":
        require_answer(self._images)
        os.environ.setdefault("DALI_MALLOC_POOL_THRESHOLD", POOLED_FROM)  # read once, before DALI's first buffer
        from nvidia.dali.plugin.pytorch import DALIGenericIterator

        return DALIGenericIterator([self._pipeline()], ["images"], size=-1, prepare_first_batch=False)

    def _pipeline(self) -> "Pipeline":
        from nvidia.dali import pipeline_def

        step_inputs = self._step_inputs()
        self._ahead = OneAhead(step_inputs.encoded)
        stream_seed = np.random.SeedSequence([self._seed, self._sharding.rank, self._first]).generate_state(1)[0]
        return pipeline_def(_train_graph if self._training else _val_graph, enable_conditionals=True)(
            self._config,
            step_inputs,
            self._ahead.take,
            _decoder(self._device),
            batch_size=self._sharding.local_batch_size,
            num_threads=self._threads,
            device_id=_device_id(self._device),
            seed=int(stream_seed) >> 1,
            prefetch_queue_depth=PREFETCHED_BATCHES,
            enable_checkpointing=True,
            checkpoint=self._checkpoint,
        )

    def _indices_ahead(self) -> np.ndarray:
        """Images of the step that is due and of those that DALI may have begun already."""
        due, inputs = self._next - self._first, self._step_inputs()
        return np.concatenate([inputs.indices(step) for step in range(due, due + PREFETCHED_BATCHES + 1)])

    def _step_inputs(self) -> "_StepInputs":
        return _StepInputs(self._config, self._images, self._sharding, self._first, self._looked_at)


class DaliDecoder:
    """DALI's decoder for one image at a time, on the CPU: a `Decoder` of data/defects.py. Raises what DALI does.

    In a large batch it crashes the process on some broken images (2.4.0), without a word; of a single one it says why.
    """

    name = "DALI"

    def __init__(self) -> None:
        self._idle: list[Pipeline] = []

    def decode(self, content: bytes) -> np.ndarray:
        try:
            pipeline = self._idle.pop()
        except IndexError:  # other threads have them all
            pipeline = self._graph()
        pipeline.feed_input("encoded", [np.frombuffer(content, dtype=np.uint8)])
        [images] = pipeline.run()
        pixels = np.array(images.as_array()[0])
        self._idle.append(pipeline)  # not after an error: it is of no more use then
        return pixels

    def close(self) -> None:
        """Free its memory; it can be used again."""
        self._idle.clear()

    def _graph(self) -> "Pipeline":
        from nvidia.dali import fn, pipeline_def, types

        @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
        def graph():
            encoded = fn.external_source(name="encoded", ndim=1, dtype=types.UINT8)
            return fn.decoders.image(
                encoded, device="cpu", output_type=types.RGB, adjust_orientation=False, jpeg_fancy_upsampling=True
            )

        return graph()


@dataclass(frozen=True)
class _LookedAt:
    """What is known of the images of a split, in this process."""

    sound_N: np.ndarray
    """Images that were looked at and are sound, bool (N,)."""
    defects: dict[int, dict[int, str]] = field(default_factory=dict)
    """Step of the stream at which broken images are due -> those by index, and why. No exceptions: their tracebacks
    would keep the pipeline alive, see `_StepInputs`."""
    decoder: DaliDecoder = field(default_factory=DaliDecoder)


@dataclass(frozen=True)
class _StepInputs:
    """The external sources: step since the stream began -> what the pipeline needs of it.

    DALI asks for them on the thread that launches kernels, so what takes time, `encoded`, is made on another, a step
    ahead (`OneAhead`; DALI's own `parallel=True` would need all of this in a process of its own).

    Not a method of `DaliSource`: the pipeline would then be freed late, by the garbage collector, and crash a forked
    process that happens to run it.
    """

    config: DataConfig
    images: ImageList
    sharding: Sharding
    first: int
    looked_at: _LookedAt
    """`encoded` adds to it."""

    def encoded(self, stream_step: int) -> list[np.ndarray]:
        """Paths, or the images as stored where they lie in shards, uint8 (length,) each."""
        indices_B = self._sound(stream_step)
        if self.in_shards:
            self.images.places.will_read(self.indices(stream_step + 1))
            content_B = [self.images.read(index) for index in indices_B]
        else:
            content_B = [os.fsencode(self.images.path(index)) for index in indices_B]
        return [np.frombuffer(content, dtype=np.uint8) for content in content_B]

    def _sound(self, stream_step: int) -> np.ndarray:
        """The step's images, int64 (B,), with others in place of broken ones, which DALI must not meet.

        The error that names those is raised when the step is due, as DALI is some steps ahead; at once, if no sound
        image is known yet.
        """
        indices_B, sound_N = self.indices(stream_step), self.looked_at.sound_N
        new = indices_B[~sound_N[indices_B]]
        if not len(new):
            return indices_B
        defects = find_defects(self.images, new.tolist(), self.looked_at.decoder)
        sound_N[[index for index in new.tolist() if index not in defects]] = True
        if not defects:
            return indices_B
        if not sound_N.any():
            raise unreadable(self.images, defects)
        self.looked_at.defects[self.first + stream_step] = defects
        return np.where(sound_N[indices_B], indices_B, sound_N.argmax())

    def train_sizes(self, stream_step: int) -> list[np.ndarray]:
        """(height, width) of the training images, float32 (2,) each."""
        epoch, _ = self._place(stream_step)
        return [np.full(2, train_size(self.config, epoch), dtype=np.float32)] * self.sharding.local_batch_size

    @property
    def in_shards(self) -> bool:
        return self.images.places is not None

    def indices(self, stream_step: int) -> np.ndarray:
        return self.sharding.indices(*self._place(stream_step))[0]

    def _place(self, stream_step: int) -> tuple[int, int]:
        """(epoch, step in it)"""
        return divmod(self.first + stream_step, self.sharding.steps)


def _decoder(device: torch.device) -> str:
    return "mixed" if device.type == "cuda" else "cpu"


def _device_id(device: torch.device) -> int | None:
    """None keeps DALI off GPUs altogether, so that it needs no driver."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def _train_graph(config: DataConfig, step_inputs: _StepInputs, encoded: Encoded, decoder: str):
    """Random crop (only its pixels are decoded), resize to the epoch's side, augment, flip, normalise."""
    from nvidia.dali import fn, types

    size_hw = fn.external_source(source=step_inputs.train_sizes, batch=True, ndim=1, dtype=types.FLOAT)
    images = fn.decoders.image_random_crop(
        _read(config, step_inputs, encoded),
        random_area=list(config.crop_scale),
        random_aspect_ratio=list(config.crop_ratio),
        **_decoder_options(config, decoder, hints=True),
    )
    images = fn.resize(_in_channels(images, config), size=size_hw, antialias=True, interp_type=_interpolation(config))
    images = _colour_jittered(_auto_augmented(images, config), config)
    return _normalised(images, config, mirror=fn.random.coin_flip(probability=config.flip))


def _val_graph(config: DataConfig, step_inputs: _StepInputs, encoded: Encoded, decoder: str):
    """Resize, centre crop, normalise: the same sizes and pixels as torchvision's, or timm's.

    The sizes are computed here, as DALI's own options round them the other way, which moves many images by a pixel.
    """
    from nvidia.dali import fn, types

    content = _read(config, step_inputs, encoded)
    shape_hw = fn.peek_image_shape(content, adjust_orientation=False)[:2]
    resized_hw = _resized_shape(shape_hw, config)
    margin_hw = resized_hw - config.image_size
    half_hw = margin_hw // 2  # towards zero: where there is a border, the odd pixel is behind the image
    # Half a pixel goes to the even side: Python's round(), which torchvision uses.
    start_hw = half_hw + (margin_hw & half_hw & 1) * (margin_hw > 0)

    # Fancy upsampling: the GPU's pixels are then the CPU's, and an accuracy does not depend on the machine.
    images = fn.decoders.image(content, jpeg_fancy_upsampling=True, **_decoder_options(config, decoder, hints=False))
    images = _in_channels(images, config)
    size = fn.cast(resized_hw, dtype=types.FLOAT)
    images = fn.resize(images, size=size, antialias=True, interp_type=_interpolation(config))
    is_longer = config.resized_side == "longer"
    images = fn.slice(
        images,
        start=fn.cast(start_hw, dtype=types.INT32),
        shape=[config.image_size] * 2,
        axes=[0, 1],
        out_of_bounds_policy="pad",
        fill_values=[round(255 * value) if is_longer else 0 for value in config.mean],
    )
    return _normalised(images, config)


def _resized_shape(shape_hw, config: DataConfig):
    """Height and width before the centre crop, whole numbers."""
    from nvidia.dali import fn

    side = config.resize_size
    if config.resized_side == "shorter":
        return shape_hw * side // fn.reductions.min(shape_hw)
    if config.resized_side == "both":
        return shape_hw * 0 + side
    longer = fn.reductions.max(shape_hw)
    return (2 * shape_hw * side + longer) // (2 * longer)


def _interpolation(config: DataConfig):
    from nvidia.dali import types

    known = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
    if config.interpolation not in known:
        raise DataError(f"data.interpolation: found {config.interpolation!r}, allowed: {' or '.join(known)}")
    return known[config.interpolation]


def _read(config: DataConfig, step_inputs: _StepInputs, encoded: Encoded):
    """The encoded images of a step. encoded: as of `_StepInputs`."""
    from nvidia.dali import fn, types

    content = fn.external_source(source=encoded, batch=True, ndim=1, dtype=types.UINT8)
    return content if step_inputs.in_shards else fn.io.file.read(content, dont_use_mmap=not config.mmap)


def _decoder_options(config: DataConfig, decoder: str, hints: bool) -> dict[str, Any]:
    from nvidia.dali import types

    options = {
        "device": decoder,
        "output_type": types.RGB,
        # As Pillow and with it torchvision's published accuracies: pixels as stored.
        "adjust_orientation": False,
    }
    if decoder == "mixed":
        options["hw_decoder_load"] = config.hw_decoder_load
        if hints:  # not for validation: the buffers cost hundreds of MB a thread, and a pause there costs little
            options |= {
                "preallocate_width_hint": config.decoder_width_hint,
                "preallocate_height_hint": config.decoder_height_hint,
                "device_memory_padding": config.decoder_device_memory,
                "host_memory_padding": config.decoder_host_memory,
            }
    return options


def _in_channels(images, config: DataConfig):
    """Grey is made of the colours, as by Pillow: decoding to grey heeds a PNG's gamma and leaves a JPEG's unclipped."""
    from nvidia.dali import fn, types

    if config.channels == 3:
        return images
    return fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)


def _auto_augmented(images, config: DataConfig):
    from nvidia.dali.auto_aug import rand_augment, trivial_augment

    if config.auto_augment == "none":
        return images
    # DALI warns, whatever the filters, that its own auto_aug calls operators by names of old.
    with warnings.catch_warnings(record=True):
        if config.auto_augment == "trivialaugment":
            return trivial_augment.trivial_augment_wide(images, fill_value=FILL)
        ops, magnitude = config.randaugment_ops, config.randaugment_magnitude
        return rand_augment.rand_augment(images, n=ops, m=magnitude, fill_value=FILL)


def _colour_jittered(images, config: DataConfig):
    from nvidia.dali import fn

    def drawn(neutral: float, most: float):
        return fn.random.uniform(range=[neutral - most, neutral + most]) if most else neutral

    brightness, contrast, saturation, hue = config.color_jitter
    if not any(config.color_jitter):
        return images
    factors = {"brightness": drawn(1, brightness), "contrast": drawn(1, contrast)}
    if config.channels == 1:
        return fn.brightness_contrast(images, **factors)
    return fn.color_twist(images, **factors, saturation=drawn(1, saturation), hue=drawn(0, 360 * hue))


def _normalised(images, config: DataConfig, mirror=0):
    from nvidia.dali import fn, types

    return fn.crop_mirror_normalize(
        images,
        dtype=types.FLOAT,
        output_layout="HWC",  # channels-last, as convolutions read it: `DaliSource` only renames the axes
        mean=[255 * value for value in config.mean],
        std=[255 * value for value in config.std],
        mirror=mirror,
    )
