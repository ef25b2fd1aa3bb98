"""An ONNX file as a network that our evaluation runs."""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import nn

from train.errors import ConfigError, TrainError

PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class OnnxNetwork(nn.Module):
    """Images to logits through ONNX Runtime on the CPU, whatever device the images are on.

    metadata: what the file says of itself. input_shape: one image; None on an axis that takes any size. num_classes:
    None where the file does not say.
    """

    def __init__(self, path: Path) -> None:
        """Raises ConfigError where ONNX Runtime is missing, TrainError for a file that is no classifier of images."""
        super().__init__()
        require_packages("onnxruntime")
        import onnxruntime

        self._path = path
        try:
            self._session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises many types for a file that is damaged or not its own
            raise TrainError(f"{path} cannot be run as ONNX: {first_line(error)}") from error
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].type != "tensor(float)":
            found = ", ".join(f"{one.name} {one.type} {one.shape}" for one in inputs)
            raise TrainError(
                f"{path}: found inputs {found}, allowed: one of float32 images, (N, channels, height, width)"
            )
        if len(outputs) != 1 or len(outputs[0].shape) != 2:
            found = ", ".join(f"{one.name} {one.shape}" for one in outputs)
            raise TrainError(f"{path}: found outputs {found}, allowed: one, logits (N, classes)")
        self._input, self._output = inputs[0].name, outputs[0].name
        self.input_shape = tuple(size if isinstance(size, int) else None for size in inputs[0].shape[1:])
        self.num_classes = outputs[0].shape[1] if isinstance(outputs[0].shape[1], int) else None
        self.metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """float32 (N, channels, height, width) -> logits (N, classes). TrainError for a shape that it does not take."""
        try:
            (logits,) = self._session.run([self._output], {self._input: images.cpu().contiguous().numpy()})
        except Exception as error:
            raise TrainError(
                f"{self._path} does not take images of shape {tuple(images.shape)}: {first_line(error)}"
            ) from error
        return torch.from_numpy(np.asarray(logits)).to(images.device)


def require_packages(*names: str) -> None:
    """Raises ConfigError that names those that are not installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"ONNX needs packages that are not installed: pip install {' '.join(missing)} (or pip install -e '.[onnx]')"
        )


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
