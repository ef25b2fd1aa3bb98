"""A checkpoint's network, at its widths, as ONNX or as PyTorch's exported program (.pt2), compared with the original.

python launch/export.py runs/demo/best.pt --format onnx
"""

import sys
from pathlib import Path

# A script's own folder comes first on the path, and there `train` is launch/train.py: put the root in its place.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from train.checkpoint.network import load_network
from train.cli import Parser, exit_code_of, positive_int
from train.errors import ConfigError
from train.export import BATCH_SIZES, SUFFIXES, export_network
from train.preprocessing import own_preprocessing


def main(argv: list[str]) -> int:
    """Exit code: 0, 2 for a wrong argument, 1 for any other error that a user can cause."""
    return exit_code_of(lambda: _export(argv), "--debug" in argv)


def _export(argv: list[str]) -> None:
    parser = Parser(prog="launch/export.py", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="of a run (last.pt, best.pt) or of launch/prune.py")
    parser.add_argument("--format", choices=tuple(SUFFIXES), required=True, help="onnx, or torch (torch.export)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: the checkpoint's name with .onnx or .pt2")
    parser.add_argument(
        "--image-size", type=positive_int, metavar="PIXELS", help="side of the images; default: as trained"
    )
    parser.add_argument("--model", metavar="NAME", help="package.module:factory, if the network is one of your own")
    parser.add_argument("--force", action="store_true", help="overwrite what is there")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(argv)
    out = options.out or options.checkpoint.with_suffix(SUFFIXES[options.format])
    if out.exists() and not options.force:
        raise ConfigError(f"{out} is there already: give another --out, or --force to overwrite it")
    network = load_network(options.checkpoint, options.model)
    channels, height, width = network.architecture.input_shape
    shape = (channels, options.image_size or height, options.image_size or width)
    own, whose = own_preprocessing(network.architecture, network.preprocessing, options.checkpoint)
    images = own and own.at_size(shape[-1])
    exported = export_network(network.model, shape, options.format, out, network.classes, images)
    print(f"input: images, float32 (N, {', '.join(map(str, shape))}); output: logits")
    print(f"images: {images} (as {whose} says)" if images else "images: normalised as in training, whatever that was")
    print(
        f"largest difference from the checkpoint's own logits, batches of {' and '.join(map(str, BATCH_SIZES))}: "
        f"{exported.difference:.2e}"
    )
    print(f"written: {out}, {exported.size_bytes / 1e6:.2f} MB")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
