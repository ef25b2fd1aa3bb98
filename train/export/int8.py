"""Post-training quantisation: the weights and activations of an ONNX network in 8 bits.

By ONNX Runtime's static quantisation. It comes with every release of ONNX Runtime, and what it writes is an ONNX file
with QuantizeLinear and DequantizeLinear, which ONNX Runtime and OpenVINO read. torchao's, for convolutions, is compiled
by torch for the machine at hand, and gives no such file.
"""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from train.export.onnx_network import OnnxNetwork, first_line, require_packages
from train.export.program import ExportError, whole_or_not_at_all


@dataclass(frozen=True)
class Quantised:
    """What was written. agreement: percent of the calibration images whose first guess is that of the float network."""

    path: Path
    agreement: float
    images: int
    size_bytes: int


def quantise(source: Path, path: Path, batches: list[torch.Tensor], metadata: Mapping[str, str]) -> Quantised:
    """Write the ONNX network in `source` to `path` in int8, with the ranges that its activations have on `batches`.

    batches: images as the network takes them, (N, channels, height, width), on the CPU. metadata: goes into the file.
    Raises ExportError, with nothing left at `path` that was not there before.
    """
    require_packages("onnx", "onnxruntime")
    with whole_or_not_at_all(path) as temporary:
        _write(source, temporary, batches, metadata)
        float_network, int8_network = OnnxNetwork(source), OnnxNetwork(temporary)
        equal = sum(int((float_network(b).argmax(1) == int8_network(b).argmax(1)).sum()) for b in batches)
        size_bytes = temporary.stat().st_size
    images = sum(map(len, batches))
    return Quantised(path, 100 * equal / images, images, size_bytes)


def _write(source: Path, path: Path, batches: list[torch.Tensor], metadata: Mapping[str, str]) -> None:
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        try:
            quant_pre_process(source, prepared)
            quantize_static(
                prepared,
                path,
                _Batches(batches),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8,  # of signed ones ONNX Runtime is slower on a CPU than of floats
                weight_type=QuantType.QInt8,
                per_channel=True,
                reduce_range=True,  # 7 bits of weights: CPUs without VNNI add in 16 bits, which 8 would overflow
            )
        except OSError:
            raise
        except Exception as error:  # ONNX Runtime raises many types for what it cannot quantise
            raise ExportError(f"ONNX Runtime cannot quantise this network: {first_line(error)}") from error
    model = onnx.load(path)
    onnx.helper.set_model_props(model, dict(metadata))  # quantisation drops what the source holds
    onnx.save(model, path)


class _Batches:
    """Images in the form that ONNX Runtime calibrates with: a dictionary at a time, None after the last."""

    def __init__(self, batches: list[torch.Tensor]) -> None:
        self._batches: Iterator[torch.Tensor] = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"images": batch.numpy()}
