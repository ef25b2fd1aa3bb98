"""A network in a form that runs without this program: ONNX, or PyTorch's exported program.

Nothing is believed unseen: what was written is read back, run, and compared with the network that it came from.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from train.errors import TrainError
from train.export.onnx_network import PACKAGES, OnnxNetwork, first_line, require_packages
from train.files import why_unwritten

Format = Literal["onnx", "torch"]
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torch": ".pt2"}

TOLERANCE = 1e-4
"""Difference that counts as rounding, relative to the largest logit."""

OPSET = 18
"""Of ONNX: the one that torch's exporter writes without conversion; TensorRT 10 and OpenVINO read it."""

BATCH_SIZES = (1, 5)
"""Neither is the one that the network is traced with."""

BATCH_AXIS = ({0: Dim("batch")},)
"""Which axes of the inputs take any size, and their names."""

Run = Callable[[torch.Tensor], torch.Tensor]


class ExportError(TrainError):
    """A network that cannot be exported, or whose exported form computes something else."""


@dataclass(frozen=True)
class Exported:
    """What was written. difference: the largest one of any logit from the network's own. size_bytes: of the file."""

    path: Path
    difference: float
    size_bytes: int


def export_network(
    model: nn.Module,
    input_shape: tuple[int, int, int],
    form: Format,
    path: Path,
    metadata: Mapping[str, str],
) -> Exported:
    """Write `model` in evaluation mode to `path`, for any batch size, once the file is known to compute the same.

    model: on the CPU; put into evaluation mode. input_shape: one image, (channels, height, width). metadata: goes into
    the file: among ONNX's metadata, or as extra files of PyTorch's program.
    Raises ExportError, with nothing left at `path` that was not there before; ConfigError where a package is missing.
    """
    if form == "onnx":
        require_packages(*PACKAGES)
    write, read = (_write_onnx, OnnxNetwork) if form == "onnx" else (_write_torch, _read_torch)
    samples = samples_of(model.eval(), input_shape)
    program = _trace(model, samples[0].images.expand(2, *input_shape))  # 1 would be taken for a constant
    with whole_or_not_at_all(path) as temporary:
        write(program, temporary, metadata)
        difference = max(compared(read(temporary), sample) for sample in samples)
        size_bytes = temporary.stat().st_size
    return Exported(path, difference, size_bytes)


@contextmanager
def whole_or_not_at_all(path: Path) -> Iterator[Path]:
    """A name to write under inside; afterwards the file is `path`, or gone after any error. OSError -> ExportError."""
    temporary = path.with_name(path.name + ".part")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise ExportError(f"could not write {path}: {why_unwritten(error, path)}") from error
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True, eq=False)
class Sample:
    """Random images and what the network itself makes of them."""

    images: torch.Tensor
    logits: torch.Tensor


def samples_of(model: nn.Module, input_shape: tuple[int, int, int]) -> list[Sample]:
    """One of each of `BATCH_SIZES`. ExportError if the network does not take such images, or gives NaN."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for batch in BATCH_SIZES:
        images = torch.randn(batch, *input_shape, generator=generator)
        try:
            with torch.no_grad():
                samples.append(Sample(images, model(images)))
        except RuntimeError as error:
            raise ExportError(
                f"the network does not take images of shape {input_shape}: {first_line(error)}"
            ) from error
        if not samples[-1].logits.isfinite().all():
            raise ExportError("the network's own logits are not finite: its weights hold NaN or far too large values")
    return samples


def _trace(model: nn.Module, images: torch.Tensor) -> ExportedProgram:
    try:
        return torch.export.export(model, (images,), dynamic_shapes=BATCH_AXIS)
    except Exception as error:  # torch.export raises many types for what it cannot follow
        raise ExportError(f"torch.export cannot follow {type(model).__name__}: {first_line(error)}") from error


def compared(run: Run, sample: Sample) -> float:
    """The largest difference of the logits that `run` gives from the network's own. ExportError beyond rounding."""
    with torch.no_grad():
        found = run(sample.images)
    if found.shape != sample.logits.shape:
        raise ExportError(f"exported, it gives logits {tuple(found.shape)}, not {tuple(sample.logits.shape)}")
    difference = (found - sample.logits).abs().max().item()
    allowed = TOLERANCE * sample.logits.abs().max().item()
    if not difference <= allowed:  # NaN is not
        raise ExportError(
            f"exported, its logits differ by {difference:.3g}, allowed: {allowed:.3g}; nothing was kept of it"
        )
    return difference


def _write_torch(program: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> None:
    with path.open("wb") as file:  # a path would have to end in .pt2
        torch.export.save(program, file, extra_files=dict(metadata))


def _read_torch(path: Path) -> Run:
    with path.open("rb") as file:
        return torch.export.load(file).module()


def _write_onnx(program: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> None:
    try:
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=BATCH_AXIS,  # a second time, for the axis's name
            opset_version=OPSET,
            external_data=False,
            verbose=False,
        )
        onnx_program.model.metadata_props.update(metadata)
        onnx_program.save(path, external_data=False)
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(f"torch.onnx cannot express this network: {first_line(error)}") from error
