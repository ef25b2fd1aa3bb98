"""A trained network in forms that need no trainer: ONNX (also int8), PyTorch's exported program, a folder."""
