"""The cost model against images a second that others have published for named devices; nothing is timed."""

import argparse
from collections.abc import Sequence
from statistics import median

import torch
from scipy.stats import spearmanr

import cup
from launch.benches.measure import write_result
from launch.projections.published_rates import PUBLISHED_RATES, PublishedRate
from train.network.models import build_model

IMAGE_SIZE = 224
"""Pixels, of all the published rates."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    devices = sorted({rate.device for rate in PUBLISHED_RATES})
    parser.add_argument("--devices", nargs="+", choices=devices, default=devices, metavar="NAME", help="default: all")


def measure(options: argparse.Namespace) -> None:
    """Print the table, write the result."""
    rows = _rows([rate for rate in PUBLISHED_RATES if rate.device in options.devices])
    print("images a second, published and modelled; modelled over published, less 1")
    print("| device | network | | batch | published by | published | modelled | error |")
    print("|---|---|---|---:|---|---:|---:|---:|")
    for rate, modelled in rows:
        how = f"{'training' if rate.training else 'inference'}, {rate.precision}{', compiled' if rate.fused else ''}"
        print(
            f"| {rate.device} | {rate.network} | {how} | {rate.batch_size} | {rate.source} | "
            f"{rate.images_per_s:,.0f} | {modelled:,.0f} | {modelled / rate.images_per_s - 1:+.0%} |"
        )
    summary = {device: _summary([row for row in rows if row[0].device == device]) for device in options.devices}
    for device, found in summary.items():
        ranks = found["rank_correlation"]
        print(
            f"{device}: {found['rates']} rates, median absolute error {found['median_abs_error']:.1%}"
            + ("" if ranks is None else f", rank correlation {ranks:.2f}")
        )
    if options.out:
        write_result(
            options.out,
            {
                "benchmark": "rates: modelled against published",
                "rows": [vars(rate) | {"modelled": modelled} for rate, modelled in rows],
                "summary": summary,
            },
        )


def _rows(rates: Sequence[PublishedRate]) -> list[tuple[PublishedRate, float]]:
    """Each rate with the modelled one. Networks one after the other, for some are large."""
    modelled = {}
    for network in dict.fromkeys(rate.network for rate in rates):
        model = build_model(network, 1000)
        groups = cup.channel_groups(model, torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE))
        for rate in rates:
            if rate.network == network:
                cost = cup.device_cost(
                    rate.device,
                    precision=rate.precision,
                    batch_size=rate.batch_size,
                    training=rate.training,
                    fused=rate.fused,
                )
                modelled[rate] = rate.batch_size / cost.of(model, groups).now
    return [(rate, modelled[rate]) for rate in rates]


def _summary(rows: Sequence[tuple[PublishedRate, float]]) -> dict[str, float | None]:
    published, modelled = [rate.images_per_s for rate, _ in rows], [found for _, found in rows]
    errors = [abs(ours / theirs - 1) for ours, theirs in zip(modelled, published, strict=True)]
    correlation = float(spearmanr(published, modelled).statistic) if len(rows) > 2 else None
    return {"rates": len(rows), "median_abs_error": median(errors), "rank_correlation": correlation}
