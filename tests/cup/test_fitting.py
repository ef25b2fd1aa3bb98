"""A device is found again from kernels that took as long as it says."""

import random

import numpy as np
import pytest

import cup
from cup.cost.fitting import TimedKernel, fit_device
from cup.cost.seconds import kernel_seconds

RATES = {
    "conv.forward": cup.Rate(2e11, 5e9),
    "pointwise.forward": cup.Rate(9e10, 1e10),
    "linear.forward": cup.Rate(1e11, 8e9),
    "batch_norm.forward": cup.Rate(1e18, 2e10),
    "unary.forward": cup.Rate(1e10, 4e10),
}


def kernels(granularity, overlap, noise=0.0, seed=0):
    rng = random.Random(seed)
    timed = []
    for kernel, rate in RATES.items():
        for _ in range(12):
            reads, writes, pixels = rng.randint(8, 300), rng.randint(8, 300), rng.choice([49, 196, 784, 3136])
            reads = 1 if kernel.startswith(("batch", "unary")) else reads
            flops, moved = 2.0 * pixels, 4.0 * pixels * (reads + writes)
            up = [n if n == 1 else -(-n // granularity) * granularity for n in (reads, writes)]
            if kernel == "batch_norm.forward":
                flops = 0.0
            computing, moving = np.array(flops * up[0] * up[1] / rate.flops_per_s), np.array(moved / rate.bytes_per_s)
            seconds = float(kernel_seconds(computing, moving, 1e-6, overlap)) * rng.uniform(1 - noise, 1 + noise)
            timed.append(TimedKernel(kernel, reads, writes, flops, moved, seconds))
    return timed


@pytest.mark.parametrize("overlap", [0.0, 1.0])
@pytest.mark.parametrize("granularity", [1, 8, 32])
def test_rates_and_granularity_are_found_again(granularity, overlap):
    device = fit_device("made up", "fp32", kernels(granularity, overlap), 1e-6, overlap, "")
    assert device.granularity == granularity
    for kernel in ("conv.forward", "pointwise.forward", "linear.forward"):
        assert device.rates[kernel].flops_per_s == pytest.approx(RATES[kernel].flops_per_s, rel=0.01)
    assert device.rates["batch_norm.forward"].bytes_per_s == pytest.approx(2e10, rel=0.01)


def test_one_layer_that_falls_out_of_line_does_not_bend_the_rest():
    timed = kernels(1, 0.0, noise=0.02)
    slow = timed[3]
    timed[3] = TimedKernel(slow.kernel, slow.reads, slow.writes, slow.flops, slow.moved, 20 * slow.seconds)
    device = fit_device("made up", "fp32", timed, 1e-6, 0.0, "")
    assert device.rates["conv.forward"].flops_per_s == pytest.approx(2e11, rel=0.1)


def test_kinds_that_were_not_timed_take_the_rates_of_others():
    device = fit_device("made up", "fp32", kernels(1, 0.0), 1e-6, 0.0, "")
    assert device.rates["attention.forward"] == device.rates["linear.forward"]
    assert device.rates["dropout.backward"] == device.rates["unary.forward"]
    with pytest.raises(cup.CupError, match="no timed kernel of unary"):
        fit_device("", "fp32", [one for one in kernels(1, 0.0) if not one.kernel.startswith("unary")], 0.0, 0.0, "")
