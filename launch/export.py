"""A checkpoint's network in a form that needs no trainer, compared with the original.

python launch/export.py runs/demo/best.pt --format onnx
python launch/export.py runs/demo/best.pt --format timm --push ORG/NAME
"""

import sys
import tempfile
from argparse import Namespace
from pathlib import Path

# A script's own folder comes first on the path, and there `train` is launch/train.py: put the root in its place.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import cup
from cup import SavedNetwork
from train.checkpoint.network import StoredNetwork, load_network
from train.cli import Parser, end_with, exit_code_of, positive_int
from train.errors import ConfigError
from train.evaluate import DataChanges
from train.export.about import about, preprocessing_of_saved, to_metadata
from train.export.calibration import calibration_batches
from train.export.card import load_call
from train.export.folder import FILES, export_folder
from train.export.hub import push_folder, require_hub
from train.export.int8 import quantise
from train.export.program import BATCH_SIZES, OPSET, SUFFIXES, Exported, export_network
from train.source import source_of

ENDINGS = {**SUFFIXES, "onnx-int8": ".int8.onnx", "timm": ""}
"""Format -> what the checkpoint's name ends in instead; for a folder nothing."""
OPTIONS_OF = {
    "onnx-int8": ("data", "calibration_images"),
    "timm": ("license", "dense", "push"),
}
CALIBRATION_IMAGES = 512


def main(argv: list[str]) -> int:
    """Exit code: 0, 2 for a wrong argument, 1 for any other error that a user can cause."""
    return exit_code_of(lambda: _export(argv), "--debug" in argv)


def _export(argv: list[str]) -> None:
    options = _parse(argv)
    out = _free_out(options)
    if options.push:
        require_hub()
    network = load_network(options.checkpoint, options.model)
    saved = about(network, options.image_size, options.license)
    if options.format == "timm":
        _export_folder(options, network, saved, out)
    elif options.format == "onnx-int8":
        _export_int8(options, network, saved, out)
    else:
        exported = export_network(network.model, saved.input_size, options.format, out, _metadata(network, saved))
        _say_input(saved, f", ONNX opset {OPSET}" if options.format == "onnx" else "")
        _say_exported(exported)


def _parse(argv: list[str]) -> Namespace:
    parser = Parser(prog="launch/export.py", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="of a run (last.pt, best.pt) or of launch/prune.py")
    parser.add_argument(
        "--format",
        choices=tuple(ENDINGS),
        required=True,
        help="onnx; onnx-int8, quantised; torch (torch.export); timm, a folder for cup.load, timm and the Hub",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="PATH",
        help="default: the checkpoint's name with .onnx, .int8.onnx, .pt2 or no ending",
    )
    parser.add_argument(
        "--image-size", type=positive_int, metavar="PIXELS", help="side of the images; default: as trained"
    )
    parser.add_argument("--model", metavar="NAME", help="package.module:factory, if the network is one of your own")
    parser.add_argument("--data", metavar="FOLDER", help="onnx-int8: training images in place of the run's own")
    parser.add_argument(
        "--calibration-images",
        type=positive_int,
        metavar="N",
        help=f"onnx-int8: of the training set, which set the ranges of activations; default: {CALIBRATION_IMAGES}",
    )
    parser.add_argument("--license", metavar="NAME", help="timm: of the weights, in the Hub's words (apache-2.0)")
    parser.add_argument(
        "--dense",
        type=Path,
        metavar="FILE",
        help="timm: checkpoint of the full network, whose top-1 and hours the card shows",
    )
    parser.add_argument(
        "--push", metavar="ORG/NAME", help="timm: upload to the Hugging Face Hub, where a new repository is private"
    )
    parser.add_argument("--force", action="store_true", help="overwrite what is there")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(argv)
    for form, names in OPTIONS_OF.items():
        given = [name for name in names if getattr(options, name) is not None]
        if given and form != options.format:
            raise ConfigError(f"--{given[0].replace('_', '-')} goes with --format {form}, found {options.format}")
    return options


def _free_out(options: Namespace) -> Path:
    """Where to write. Raises ConfigError if that would overwrite something, without --force."""
    out = options.out or options.checkpoint.with_name(options.checkpoint.stem + ENDINGS[options.format])
    written = [out / name for name in FILES] if options.format == "timm" and out.is_dir() else [out]
    if any(path.exists() for path in written) and not options.force:
        raise ConfigError(f"{out} is there already: give another --out, or --force to overwrite it")
    return out


def _metadata(network: StoredNetwork, saved: SavedNetwork) -> dict[str, str]:
    return to_metadata(saved, cup.complexity(network.model, saved.example_input()))


def _export_int8(options: Namespace, network: StoredNetwork, saved: SavedNetwork, out: Path) -> None:
    changes = DataChanges(path=options.data, image_size=options.image_size)
    count = options.calibration_images or CALIBRATION_IMAGES
    batches = calibration_batches(source_of(options.checkpoint, network), changes, count)
    metadata = _metadata(network, saved)
    with tempfile.TemporaryDirectory() as folder:
        exact = export_network(network.model, saved.input_size, "onnx", Path(folder) / "float.onnx", metadata)
        quantised = quantise(exact.path, out, batches, metadata)
    _say_input(saved, f", ONNX opset {OPSET}, int8")
    print(
        f"first guess as of the float network: {quantised.agreement:.2f}% of {quantised.images} calibration images; "
        f"for the accuracy: launch/evaluate.py {out} --data FOLDER"
    )
    print(f"written: {quantised.path}, {quantised.size_bytes / 1e6:.2f} MB (float: {exact.size_bytes / 1e6:.2f} MB)")


def _export_folder(options: Namespace, network: StoredNetwork, saved: SavedNetwork, out: Path) -> None:
    dense = None if options.dense is None else load_network(options.dense, options.model)
    if dense is not None and (dense.architecture != network.architecture or dense.plans):
        raise ConfigError(f"--dense: {options.dense} is not the full network of {options.checkpoint}")
    exported = export_folder(network, saved, out, dense if saved.widths or saved.dropped else network)
    _say_input(saved, "")
    _say_exported(exported)
    print(f"load it with: {load_call(saved, str(out))}")
    if options.push:
        print(f"uploaded: {push_folder(out, options.push)}")


def _say_input(saved: SavedNetwork, more: str) -> None:
    shape = ", ".join(map(str, saved.input_size))
    print(f"input: images, float32 (batch, {shape}); output: logits{more}")
    print(f"images: {preprocessing_of_saved(saved)}")


def _say_exported(exported: Exported) -> None:
    print(
        f"largest difference from the checkpoint's own logits, batches of {' and '.join(map(str, BATCH_SIZES))}: "
        f"{exported.difference:.2e}"
    )
    print(f"written: {exported.path}, {exported.size_bytes / 1e6:.2f} MB")


if __name__ == "__main__":
    end_with(main)
