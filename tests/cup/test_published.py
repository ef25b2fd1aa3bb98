"""What the published settings of other methods cost, by arithmetic alone; docs/methods.md holds the table."""

import functools
from pathlib import Path

import pytest
import torch
import torchvision

import cup

DOCS = Path(__file__).resolve().parents[2] / "docs" / "methods.md"

# Reductions of FLOPs on ImageNet that the papers report: SFP (arXiv 1808.06866), FPGM (arXiv 1811.00250) and L1 (Li et
# al. 2017, table 1).
PUBLISHED = {
    ("SFP and FPGM", "resnet18", "30%"): 0.418,
    ("SFP and FPGM", "resnet34", "30%"): 0.411,
    ("FPGM", "resnet50", "30%"): 0.422,
    ("SFP", "resnet50", "30%"): 0.418,
    ("FPGM", "resnet50", "40%"): 0.535,
    ("L1", "resnet34", "A"): 0.155,
    ("L1", "resnet34", "B"): 0.242,
}
L1_RATES = {"A": (0.3, 0.3, 0.3, 0.0), "B": (0.5, 0.6, 0.4, 0.0)}
L1_SKIPPED = (2, 8, 14, 16, 26, 28, 30, 32)
"""Convolutions at the edges of stages, numbered from 1 without the shortcuts'."""


@functools.cache
def traced(name: str) -> tuple[torch.nn.Module, list[cup.ChannelGroup], cup.Complexity]:
    model, sample = torchvision.models.get_model(name), torch.zeros(1, 3, 224, 224)
    return model, cup.channel_groups(model, sample), cup.complexity(model, sample)


def macs_of_filters_gone(name: str, rate: float) -> float:
    """MACs left over MACs of the full network, as SFP's and FPGM's authors count a rate.

    Every convolution but the shortcuts' loses its share of filters, the last ones of blocks, too, whose outputs they
    scatter back into a stream of full width. So what reads the stream reads all of it, but for the first block, which
    reads the pruned stem. Their ResNet-50 has its strides in the 1 x 1 convolutions and they leave out the classifier.
    """
    keep, full, left = 1 - rate, 0.0, 0.0
    for layer in traced(name)[2].layers:
        stage, _, last = layer.name.partition(".")
        if layer.kind != "Conv2d":
            continue
        early_stride = name == "resnet50" and layer.name.endswith(".0.conv1") and stage != "layer1"
        macs = layer.macs / 4 if early_stride else layer.macs
        writes = 1 if "downsample" in last else keep
        reads_stem = layer.name.startswith("layer1.0.") and ("downsample" in last or last.endswith("conv1"))
        reads_stream = layer.name == "conv1" or "downsample" in last or last.endswith("conv1")
        reads = keep if reads_stem or not reads_stream else 1
        full, left = full + macs, left + macs * writes * reads
    return left / full


def l1_plan(setting: str) -> cup.PrunePlan:
    """Filters of the first convolution of each block go, at their stage's rate."""
    model, groups, _ = traced("resnet34")
    convs = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d) and "downsample" not in n]
    rates = {
        name: L1_RATES[setting][int(name[len("layer")]) - 1]
        for number, name in enumerate(convs, start=1)
        if name.endswith(".conv1") and number not in L1_SKIPPED
    }
    widths = {group.name: round(group.width * (1 - rates[group.name])) for group in groups if group.name in rates}
    return cup.plan_first_channels(groups, widths)


def reductions(name: str, plan: cup.PrunePlan) -> tuple[float, float]:
    """MACs and FLOPs of the full network over those after the plan."""
    model, groups, dense = traced(name)
    after = cup.complexity_after(model, groups, plan, dense)
    return dense.macs / after.macs, dense.flops / after.flops


def uniform(name: str, rate: float, scope: str) -> tuple[float, float]:
    groups = traced(name)[1]
    widths = cup.uniform_widths(groups, rate, cup.PlanOptions(scope=scope))
    return reductions(name, cup.plan_first_channels(groups, widths))


@pytest.mark.parametrize("key", list(PUBLISHED), ids=" ".join)
def test_the_published_settings_cost_what_is_published(key: tuple[str, str, str]):
    """As FR, full over left, within 1%."""
    method, name, setting = key
    if method == "L1":
        found, _ = reductions(name, l1_plan(setting))
    else:
        found = 1 / macs_of_filters_gone(name, int(setting[:-1]) / 100)
    assert found == pytest.approx(1 / (1 - PUBLISHED[key]), rel=0.01)


def table() -> list[str]:
    rows = []
    for name in ("resnet18", "resnet34", "resnet50"):
        for rate in (0.3, 0.4):
            said = {m: gone for (m, n, setting), gone in PUBLISHED.items() if n == name and setting == f"{rate:.0%}"}
            published = ", ".join(f"{1 / (1 - gone):.3f} ({method})" for method, gone in said.items())
            theirs = 1 / macs_of_filters_gone(name, rate)
            ours = " | ".join(f"{m:.3f} | {f:.3f}" for m, f in (uniform(name, rate, s) for s in ("inner", "all")))
            rows.append(f"| SFP, FPGM | {name} | {rate:.0%} | {published} | {theirs:.3f} | {ours} |")
    for setting in L1_RATES:
        gone, (macs, flops) = PUBLISHED["L1", "resnet34", setting], reductions("resnet34", l1_plan(setting))
        rows.append(f"| L1 | resnet34 | {setting} | {1 / (1 - gone):.3f} | {macs:.3f} | {macs:.3f} | {flops:.3f} | | |")
    return rows


def test_the_table_in_the_documentation_is_this_one():
    text = DOCS.read_text(encoding="utf-8")
    assert [row for row in table() if row not in text] == []
