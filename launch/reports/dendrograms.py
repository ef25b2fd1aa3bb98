"""Dendrograms of chosen layers, from the checkpoints that runs left."""

from pathlib import Path

import cup
from launch.dendrogram import draw_dendrograms
from launch.reports.figures import Figure
from launch.reports.read import Group, Run
from train.checkpoint.file import CheckpointError
from train.checkpoint.network import load_network
from train.errors import ConfigError
from train.log.rundir import RunDir


def draw_layers(groups: list[Group], layers: list[str], directory: Path) -> tuple[list[Figure], list[str]]:
    """DIRECTORY/dendrograms_GROUP/LAYER.png for the first run of each group; also what could not be drawn, in words.

    Raises ConfigError for a layer that a network does not have, CheckpointError for a file that cannot be read.
    """
    figures: list[Figure] = []
    missing = []
    for group in groups if layers else ():
        run = group.one
        checkpoint = RunDir(run.directory).last
        if not checkpoint.exists():
            missing.append(f"{run.name}: no dendrogram, for there is no checkpoint {checkpoint}")
            continue
        try:
            figures += _draw(run, checkpoint, layers, directory / f"dendrograms_{group.name.replace('/', '_')}")
        except CheckpointError as error:
            missing.append(f"{run.name}: no dendrogram: {error}")
    return figures, missing


def _draw(run: Run, checkpoint: Path, layers: list[str], directory: Path) -> list[Figure]:
    network = load_network(checkpoint)
    groups = network.groups or cup.channel_groups(network.model, network.architecture.example_input())
    names = ("features", "use_bias", "scope")
    settings = {name: run.settings[f"prune.{name}"] for name in names if f"prune.{name}" in run.settings}
    # Each tree from the weights as they are, not as cuts of the layers before it would leave them.
    options = cup.PlanOptions(**settings, sequential=False)
    prunable = {group.name: group for group in cup.prunable_groups(groups, options.scope)}
    if unknown := [name for name in layers if name not in prunable]:
        raise ConfigError(f"--dendrogram: found {', '.join(unknown)}; allowed for {run.name}: {', '.join(prunable)}")
    t = run.resizes[-1]["threshold"] if run.resizes else None
    chosen = [prunable[name] for name in layers]
    cuts = cup.cut_groups(
        network.model, chosen, lambda group, ranking: group.width if t is None else ranking.width_at(t), options
    )
    caption = "Ward's tree of the layer's filters, as trained to the end"
    if t is not None:
        caption += f"; what would go and stay if they were cut once more at the last cut's height, t {t:.3f}, unrounded"
    return [
        Figure(path, f"Dendrogram: {run.name}, {name}", f"{caption}.")
        for path, name in zip(draw_dendrograms(cuts, t, directory), layers, strict=True)
    ]
