"""The model card: a README.md as the Hugging Face Hub shows it, with the network's cost and accuracy."""

from collections.abc import Callable
from dataclasses import dataclass

from cup import Complexity, SavedNetwork
from cup.networks import OWN_MODELS
from cup.saved import CONFIG_FILE, WEIGHTS_FILE
from train.network.own import is_factory


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What is known of one network. top1: percent. gpu_hours: spent on its weights, those before a cut included."""

    cost: Complexity
    top1: float | None = None
    gpu_hours: float | None = None


ROWS: tuple[tuple[str, Callable[[Figures, Figures], str]], ...] = (
    ("FLOPs reduction (FR)", lambda one, full: f"{full.cost.flops / one.cost.flops:.2f} x"),
    ("multiply-adds (MACs)", lambda one, full: f"{one.cost.macs / 1e6:,.1f} M"),
    ("parameters", lambda one, full: f"{one.cost.params:,}"),
    ("top-1 (%)", lambda one, full: "not recorded" if one.top1 is None else f"{one.top1:.2f}"),
    ("GPU hours of training", lambda one, full: "not recorded" if one.gpu_hours is None else f"{one.gpu_hours:.2f}"),
)


def model_card(saved: SavedNetwork, full: Figures, now: Figures) -> str:
    """Markdown. full: of the network before any cut. now: of the one that is saved."""
    rows = [f"| {name} | {cell(full, full)} | {cell(now, full)} |" for name, cell in ROWS]
    table = "\n".join(["|  | full network | this network |", "|---|---:|---:|", *rows])
    parts = [
        _front_matter(saved),
        f"# {saved.name}, {saved.num_classes} classes",
        table,
        "`top-1` is exact, over the validation set of the training run.",
        "## Use",
        f"```python\n{_example(saved)}\n```",
        _images(saved),
    ]
    return "\n\n".join(parts) + "\n"


def _images(saved: SavedNetwork) -> str:
    channels, height, width = saved.input_size
    return (
        f"Images: {height} x {width} pixels, {channels} channel(s) in 0 to 1, less the mean {list(saved.mean)}, "
        f"divided by the deviation {list(saved.std)}; for evaluation the centre of an image resized to "
        f"{saved.resize_size} pixels ({saved.crop_mode}, {saved.interpolation}). `{CONFIG_FILE}` holds the same, the "
        "widths of all layers that shrank, the blocks that are gone, and the names of the classes in the order of the "
        "logits."
    )


def _front_matter(saved: SavedNetwork) -> str:
    licence = [] if saved.licence is None else [f"license: {saved.licence}"]
    return "\n".join(["---", *licence, "pipeline_tag: image-classification", "tags:", "- pruning", "---"])


def _example(saved: SavedNetwork) -> str:
    """Python that gives the network back: with the library, and where a package builds the full network without."""
    where = "# where these files lie; in evaluation mode, on the CPU"
    load = ["import cup", *_own_import(saved), "", f"model = {load_call(saved, 'FOLDER')}  {where}"]
    build = _build_call(saved)
    if build is None:
        return "\n".join(load)
    package, call = build
    images = f"torch.zeros(1, {', '.join(map(str, saved.input_size))})"
    dropped = ', dropped=config["cup"]["dropped"]' if saved.dropped else ""
    shrink = [f'cup.shrink_to(model, config["cup"]["widths"], {images}{dropped})'] if saved.widths or dropped else []
    by_hand = [
        "",
        f"# or with {package}'s own class",
        f"import json, safetensors.torch, torch, {package}",
        "",
        f'config = json.load(open("FOLDER/{CONFIG_FILE}"))',
        f"model = {call}",
        *shrink,
        f'safetensors.torch.load_model(model, "FOLDER/{WEIGHTS_FILE}")',
        "model.eval()",
    ]
    return "\n".join([*load, *by_hand])


def load_call(saved: SavedNetwork, folder: str) -> str:
    build = f", build={saved.name.partition(':')[2]}" if is_factory(saved.name) else ""
    return f'cup.load("{folder}"{build})'


def _own_import(saved: SavedNetwork) -> list[str]:
    """The line that imports a network of the user's own, whose code is not in the folder."""
    module, _, factory = saved.name.partition(":")
    return [f"from {module} import {factory}"] if is_factory(saved.name) else []


def _build_call(saved: SavedNetwork) -> tuple[str, str] | None:
    """The package that has the full network, and its call; None for one of the library's own or of the user's."""
    arguments = 'config["architecture"], num_classes=config["num_classes"]'
    if saved.name.startswith("timm:"):
        return "timm", f"timm.create_model({arguments})"
    if saved.name in OWN_MODELS or ":" in saved.name:
        return None
    if saved.name in ("googlenet", "inception_v3"):
        arguments += ", aux_logits=False, init_weights=False"
    if saved.name.startswith("vit_"):
        arguments += f", image_size={saved.input_size[-1]}"
    return "torchvision", f"torchvision.models.get_model({arguments})"
