"""Image folders through NVIDIA DALI: CPU pipelines without a GPU, `mixed` decoding with one.

DALI has no say in which image comes when: an external source names the files of each step by data/sharding.py, so
shards, order, padding and file names are those of every other loader. The pipeline is one endless stream that runs
across the epochs: it is never reset, and it decodes the next epoch's first batches during validation.

DALI is imported inside functions only; `import data` must work, and be quick, without it.
"""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from data.batch import NORMALISATION, DataConfig
from data.folder import ImageList, decode_failure
from data.sharding import Sharding

if TYPE_CHECKING:
    from nvidia.dali import Pipeline
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

PREFETCHED_BATCHES = 2
# nvJPEG's buffers, sized once for ImageNet's largest photographs instead of growing in the middle of an epoch; the
# presets of NVIDIA's ImageNet examples, in bytes and pixels.
MIXED_DECODER_PRESETS = {
    "device_memory_padding": 211025920,
    "host_memory_padding": 140544512,
    "preallocate_width_hint": 5980,
    "preallocate_height_hint": 6430,
}


def import_failure() -> ImportError | None:
    """Why DALI cannot be imported here; None if it can."""
    try:
        import nvidia.dali.plugin.pytorch  # noqa: F401
    except ImportError as error:
        return error
    return None


def identity(device: torch.device) -> dict[str, str]:
    """What DALI itself adds to a loader's identity: its checkpoints fit only the same version and the same graph."""
    import nvidia.dali

    return {"dali": nvidia.dali.__version__, "decoder": _decoder(device)}


class DaliSource:
    """Images of one split by a DALI pipeline.

    The images are DALI's own memory, not a copy: they may be overwritten by the next step's.
    """

    def __init__(
        self,
        config: DataConfig,
        images: ImageList,
        *,
        sharding: Sharding,
        augment: bool,
        seed: int,
        threads: int,
        device: torch.device,
    ) -> None:
        self._config = config
        self._images = images
        self._sharding = sharding
        self._augment = augment
        self._seed = seed
        self._threads = threads
        self._device = device
        self._iterator: DALIGenericIterator | None = None
        # The stream begins at step `_first`, of all epochs together, and goes on from `_checkpoint` if there is one.
        self._first = 0
        self._next = 0
        self._checkpoint: bytes | None = None

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
            images = next(self._iterator)[0]["images"]
        except Exception as error:
            # DALI names no file, and it may have failed at a batch ahead of this one.
            raise decode_failure(self._paths_ahead(), error) from error
        self._next += 1
        return images

    def state_dict(self) -> dict[str, Any]:
        """`pipeline` is DALI's own checkpoint, under 500 bytes, as uint8 (n,); empty if no batch was taken yet."""
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

    def _open(self) -> "DALIGenericIterator":
        from nvidia.dali.plugin.pytorch import DALIGenericIterator

        return DALIGenericIterator([self._pipeline()], ["images"], size=-1, prepare_first_batch=False)

    def _pipeline(self) -> "Pipeline":
        from nvidia.dali import pipeline_def

        stream_seed = np.random.SeedSequence([self._seed, self._sharding.rank, self._first]).generate_state(1)[0]
        graph = _train_graph if self._augment else _val_graph
        return pipeline_def(graph)(
            self._config,
            self._step_paths(),
            _decoder(self._device),
            batch_size=self._sharding.batch_size,
            num_threads=self._threads,
            device_id=_device_id(self._device),
            seed=int(stream_seed) >> 1,
            prefetch_queue_depth=PREFETCHED_BATCHES,
            enable_checkpointing=True,
            checkpoint=self._checkpoint,
        )

    def _paths_ahead(self) -> list[str]:
        """Files of the step that is due and of those that DALI may have begun already."""
        due = self._next - self._first
        return [path for step in range(due, due + PREFETCHED_BATCHES + 1) for path in self._step_paths().paths(step)]

    def _step_paths(self) -> "_StepPaths":
        return _StepPaths(self._images, self._sharding, self._first)


@dataclass(frozen=True)
class _StepPaths:
    """The external source: step since the stream began -> this rank's files.

    Not a method of `DaliSource`: the pipeline would then be freed late, by the garbage collector, and crash a forked
    process that happens to run it.
    """

    images: ImageList
    sharding: Sharding
    first: int

    def __call__(self, stream_step: int) -> list[np.ndarray]:
        """Paths as bytes, uint8 (length,) each."""
        return [np.frombuffer(os.fsencode(path), dtype=np.uint8) for path in self.paths(stream_step)]

    def paths(self, stream_step: int) -> list[str]:
        epoch, step = divmod(self.first + stream_step, self.sharding.steps)
        indices_B, _ = self.sharding.indices(epoch, step)
        return [self.images.path(index) for index in indices_B]


def _decoder(device: torch.device) -> str:
    return "mixed" if device.type == "cuda" else "cpu"


def _device_id(device: torch.device) -> int | None:
    """None keeps DALI off GPUs altogether, so that it needs no driver."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def _train_graph(config: DataConfig, step_paths, decoder: str):
    """Random crop (only its pixels are decoded), resize, flip, normalise."""
    from nvidia.dali import fn

    images = fn.decoders.image_random_crop(
        _read(step_paths),
        random_area=list(config.crop_scale),
        random_aspect_ratio=list(config.crop_ratio),
        **_decoder_options(config, decoder, presets=True),
    )
    images = fn.resize(images, size=(config.image_size, config.image_size), antialias=True)
    return _normalised(images, config, mirror=fn.random.coin_flip(probability=config.flip))


def _val_graph(config: DataConfig, step_paths, decoder: str):
    """Resize of the shorter side, centre crop, normalise: the same sizes and pixels as torchvision's.

    The sizes are computed here, as DALI's own options round them the other way, which moves many images by a pixel.
    """
    from nvidia.dali import fn, types

    encoded = _read(step_paths)
    shape_hw = fn.peek_image_shape(encoded, adjust_orientation=False)[:2]
    resized_hw = shape_hw * config.resize_size // fn.reductions.min(shape_hw)
    margin_hw = resized_hw - config.image_size
    half_hw = margin_hw // 2
    # Half a pixel goes to the even side: Python's round(), which torchvision uses.
    start_hw = half_hw + (margin_hw & half_hw & 1)

    # Fancy upsampling: the GPU's pixels are then the CPU's, and an accuracy does not depend on the machine.
    images = fn.decoders.image(encoded, jpeg_fancy_upsampling=True, **_decoder_options(config, decoder, presets=False))
    images = fn.resize(images, size=fn.cast(resized_hw, dtype=types.FLOAT), antialias=True)
    images = fn.slice(images, start=fn.cast(start_hw, dtype=types.INT32), shape=[config.image_size] * 2, axes=[0, 1])
    return _normalised(images, config)


def _read(step_paths):
    from nvidia.dali import fn, types

    return fn.io.file.read(fn.external_source(source=step_paths, batch=True, ndim=1, dtype=types.UINT8))


def _decoder_options(config: DataConfig, decoder: str, presets: bool) -> dict[str, Any]:
    from nvidia.dali import types

    options = {
        "device": decoder,
        "output_type": types.GRAY if config.channels == 1 else types.RGB,
        # As Pillow and with it torchvision's published accuracies: pixels as stored.
        "adjust_orientation": False,
    }
    if decoder == "mixed":
        # Not for validation: the buffers cost hundreds of MB a thread, and a pause there costs little.
        options |= {"hw_decoder_load": config.hw_decoder_load, **(MIXED_DECODER_PRESETS if presets else {})}
    return options


def _normalised(images, config: DataConfig, mirror=0):
    from nvidia.dali import fn, types

    mean, std = NORMALISATION[config.channels]
    return fn.crop_mirror_normalize(
        images,
        dtype=types.FLOAT,
        output_layout="CHW",
        mean=[255 * value for value in mean],
        std=[255 * value for value in std],
        mirror=mirror,
    )
