"""The planner that is corrected by a clock: what is timed lands on the target, and what was asked for is not taken on
trust. The clock is another device's model, so it is exact.
"""

from dataclasses import replace

import pytest
import torch
from cup_twins import Untouched, make_network

import cup

FLAT = cup.Device("flat", "fp32", dict.fromkeys(cup.KERNELS, cup.Rate(1e9, 1e9)), 0.0, 1, "made up")
COST = cup.device_cost(FLAT, batch_size=8)
OPTIONS = cup.PlanOptions(scope="all", criterion="l2")


class Clock:
    """By how much a network is faster on another device. asked: how often it was read."""

    def __init__(self, device, images, model):
        self.cost, self.images, self.asked = cup.device_cost(device, batch_size=8), images, 0
        self.before = self.seconds(model)

    def seconds(self, model):
        return self.cost.of(model, cup.channel_groups(model, self.images)).now

    def __call__(self, network):
        self.asked += 1
        return self.before / self.seconds(network)


def device(launch_s=0.0, **rates):
    given = {kernel: rates.get(kernel.split(".")[0], cup.Rate(1e9, 1e9)) for kernel in cup.KERNELS}
    return replace(FLAT, rates=given, launch_s=launch_s, overlap=0.0)


SLOW_WEIGHTS = device(optimizer=cup.Rate(1e9, 2e7))
"""Wide layers take longer than modelled, so a cut saves more; as on a CPU whose allocator clears large blocks."""
SLOW_LAUNCHES = device(launch_s=1e-3)
"""Each kernel takes a time that no width changes, so a cut saves less."""


@pytest.mark.parametrize("target", [1.3, 1.8])
@pytest.mark.parametrize("found", [SLOW_WEIGHTS, SLOW_LAUNCHES], ids=["saves more", "saves less"])
@pytest.mark.parametrize("name", ["resnet18", "resnet20_cifar"])
def test_the_timed_speed_up_lands_on_the_target_where_the_model_is_wrong(name, found, target):
    model, images = make_network(name)
    groups, clock, before = cup.channel_groups(model, images), Clock(found, images, model), Untouched(model)
    plan = cup.plan_by_clock(model, groups, target, OPTIONS, cost=COST, speedup=clock)
    before.check()
    seconds = clock.cost.of(model, groups)
    timed = seconds.now / seconds.at(plan.new_widths)
    assert target <= timed <= target * (1 + cup.CLOCK_TOLERANCE) and clock.asked <= 5
    open_loop = cup.plan_by_time(model, groups, target, OPTIONS, cost=COST)
    assert not target <= seconds.now / seconds.at(open_loop.new_widths) <= target * (1 + cup.CLOCK_TOLERANCE)
    modelled = COST.of(model, groups)
    modelled = modelled.now / modelled.at(plan.new_widths)
    assert plan.note == f"timed {timed:.3f} times faster (modelled {modelled:.3f}) after {clock.asked} rounds"


def test_where_the_model_is_right_its_plan_is_timed_once_and_kept():
    model, images = make_network("resnet20_cifar")
    groups, clock = cup.channel_groups(model, images), Clock(FLAT, images, model)
    plan = cup.plan_by_clock(model, groups, 1.6, OPTIONS, cost=COST, speedup=clock)
    assert clock.asked == 1
    assert plan.digest() == cup.plan_by_time(model, groups, 1.6, OPTIONS, cost=COST).digest()


def test_a_target_that_no_cut_reaches_on_the_clock_is_said_to_be_missed():
    model, images = make_network("resnet20_cifar")
    groups = cup.channel_groups(model, images)
    plan = cup.plan_by_clock(model, groups, 1.6, OPTIONS, cost=COST, speedup=lambda network: 0.99, rounds=3)
    assert plan.note.startswith("timed 0.990 times faster (modelled 1.6")
    assert "after 3 rounds, the nearest to 1.6 that was found" in plan.note


def test_narrowest_widths_are_timed_once_and_the_planner_s_word_is_passed_on():
    model, images = make_network("resnet20_cifar")
    options, timed = replace(OPTIONS, min_channels=12), []

    def speedup(network):
        timed.append(sum(parameter.numel() for parameter in network.parameters()))
        return 1.05 + 0.01 * len(timed)

    groups = cup.channel_groups(model, images)
    plan = cup.plan_by_clock(model, groups, 1.8, options, cost=COST, speedup=speedup, rounds=9)
    assert len(timed) == len(set(timed)) < 9
    assert f"timed {1.05 + 0.01 * len(timed):.3f}" in plan.note and "a speed-up of" in plan.note.split("planner: ")[1]


def test_of_plans_that_miss_the_nearest_is_taken():
    """Not one that is ten times as fast, on a machine that was busy when the others were timed."""
    model, images = make_network("resnet20_cifar")
    times = iter([1.45, 15.0, 1.48])
    groups = cup.channel_groups(model, images)
    plan = cup.plan_by_clock(model, groups, 1.5, OPTIONS, cost=COST, speedup=lambda n: next(times), rounds=3)
    assert "timed 1.480 times faster" in plan.note and "nearest to 1.5" in plan.note


def test_blocks_may_go_too():
    model, images = make_network("resnet18")
    groups, clock = cup.channel_groups(model, images), Clock(SLOW_LAUNCHES, images, model)
    launches = cup.Device("slow", "fp32", dict.fromkeys(cup.KERNELS, cup.Rate(1e15, 1e15)), 1e-5, 1, "made up")
    settings = {"cost": cup.device_cost(launches, batch_size=8), "speedup": clock}
    assert not cup.plan_by_clock(model, groups, 1.2, OPTIONS, **settings).dropped
    assert cup.plan_by_clock(model, groups, 1.2, OPTIONS, **settings, drop_blocks=True).dropped


def test_wrong_arguments_and_clocks_are_one_line():
    model, images = make_network("resnet20_cifar")
    groups = cup.channel_groups(model, images)
    for wrong, word in [
        ({"rounds": 0}, "rounds"),
        ({"rounds": 2.5}, "rounds"),
        ({"tolerance": 0}, "tolerance"),
        ({"target": None}, "target"),
        ({"target": 1.0}, "target"),
    ]:
        settings = {"target": 1.5, "cost": COST, "speedup": lambda network: 1.5} | wrong
        with pytest.raises(cup.CupError, match=word):
            cup.plan_by_clock(model, groups, **settings)
    for found in (0.0, float("nan"), float("inf")):
        with pytest.raises(cup.CupError, match="speedup: it returned"):
            cup.plan_by_clock(model, groups, 1.5, cost=COST, speedup=lambda network, found=found: found)


def test_the_copy_that_is_timed_may_be_changed():
    model, images = make_network("resnet20_cifar")
    groups, before = cup.channel_groups(model, images), Untouched(model)

    def speedup(network):
        network.train()(images).sum().backward()
        torch.nn.init.zeros_(next(network.parameters()))
        return 1.6

    cup.plan_by_clock(model, groups, 1.6, OPTIONS, cost=COST, speedup=speedup)
    before.check()
