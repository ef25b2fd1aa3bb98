"""A network as a folder: weights, configuration, and a model card; `cup.load` and timm read it."""

import dataclasses
import tempfile
from functools import partial
from pathlib import Path

import torch

import cup
from cup import SavedNetwork
from cup.saved import CONFIG_FILE, WEIGHTS_FILE
from train.checkpoint.network import StoredNetwork
from train.export.card import Figures, model_card
from train.export.program import Exported, ExportError, compared, samples_of
from train.files import why_unwritten
from train.network.models import build_model
from train.network.own import is_factory

CARD_FILE = "README.md"
FILES = (WEIGHTS_FILE, CARD_FILE, CONFIG_FILE)
"""In the order in which they take their places: a configuration never stands without what it describes."""


def export_folder(network: StoredNetwork, saved: SavedNetwork, folder: Path, dense: StoredNetwork | None) -> Exported:
    """Write the network's files to `folder`, once `cup.load` is known to give it back. Other files there stay.

    saved: what is said of it. dense: the full network trained, for the card; None where there is none.
    Raises ExportError, with nothing changed in the folder, if what was written computes something else.
    """
    model = network.model.eval()
    samples = samples_of(model, saved.input_size)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as temporary:
            part = Path(temporary)
            cup.save(model, part, saved)
            (part / CARD_FILE).write_text(_card(network, saved, dense), encoding="utf-8")
            loaded = cup.load(part, partial(build_model, saved.name) if is_factory(saved.name) else None)
            difference = max(compared(loaded, sample) for sample in samples)
            size_bytes = sum((part / name).stat().st_size for name in FILES)
            for name in FILES:
                (part / name).replace(folder / name)
    except OSError as error:
        raise ExportError(f"could not write {folder}: {why_unwritten(error, folder / CONFIG_FILE)}") from error
    return Exported(folder, difference, size_bytes)


def _card(network: StoredNetwork, saved: SavedNetwork, dense: StoredNetwork | None) -> str:
    images = torch.zeros(1, *saved.input_size)
    full = Figures(cost=cup.complexity(build_model(saved.name, saved.num_classes, saved.input_size[-1]), images))
    if dense is not None:
        full = dataclasses.replace(full, top1=dense.top1, gpu_hours=dense.gpu_hours)
    now = Figures(cost=cup.complexity(network.model, images), top1=network.top1, gpu_hours=network.gpu_hours)
    return model_card(saved, full, now)
