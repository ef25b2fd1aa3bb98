"""When a cut happens and how deep: epochs count from 1."""

import pytest

import cup


@pytest.mark.parametrize(
    ("epoch", "slope", "offset", "wanted"),
    [(1, 0.03, 0.3, 0.3), (2, 0.03, 0.3, 0.33), (11, 0.03, 0.3, 0.6), (1, 0.02, 0.0, 0.0), (51, 0.01, 0.0, 0.5)],
)
def test_threshold_is_the_offset_at_epoch_one_and_climbs_by_the_slope(epoch, slope, offset, wanted):
    assert cup.threshold_at(epoch, slope, offset) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("epoch", "target", "last_epoch", "wanted"),
    [(1, 2.2, 13, 1.0), (7, 2.2, 13, 1.6), (13, 2.2, 13, 2.2), (14, 2.2, 13, 2.2), (1, 3.0, 1, 3.0), (2, 3.0, 1, 3.0)],
)
def test_reduction_climbs_from_one_to_the_target_and_stays_there(epoch, target, last_epoch, wanted):
    assert cup.reduction_at(epoch, target, last_epoch) == pytest.approx(wanted)


def test_reduction_never_falls_from_one_epoch_to_the_next():
    path = [cup.reduction_at(epoch, 2.5, 20) for epoch in range(1, 30)]
    assert path == sorted(path)


@pytest.mark.parametrize(
    ("every", "last_epoch", "wanted"),
    [(1, 4, [1, 2, 3, 4]), (2, 5, [1, 3, 5]), (2, 6, [1, 3, 5, 6]), (3, 8, [1, 4, 7, 8]), (10, 1, [1])],
)
def test_cuts_fall_on_the_first_epoch_every_nth_after_it_and_the_last(every, last_epoch, wanted):
    assert [epoch for epoch in range(1, 20) if cup.is_cut_epoch(epoch, every, last_epoch)] == wanted


@pytest.mark.parametrize(
    ("reduction", "target", "tolerance", "wanted"),
    [
        *((2.2, 2.2, 0.0, True), (2.19, 2.2, 0.0, False), (2.19, 2.2, 0.01, True), (2.17, 2.2, 0.01, False)),
        *((5.0, 2.2, 0.0, True), (1.0, 2.2, 0.01, False)),
    ],
)
def test_stop_rule_holds_at_the_target_or_within_the_tolerance_below_it(reduction, target, tolerance, wanted):
    assert cup.has_reached(reduction, target, tolerance) is wanted
