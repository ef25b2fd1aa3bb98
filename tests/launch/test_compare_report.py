"""The report of a comparison: statistics by hand, tables beside the published ones, sentences."""

import math
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from scipy import stats

from launch.grids.disk import Cost
from launch.grids.grid import Entry, Grid
from launch.grids.jobs import Job
from launch.reports.comparison.figure import _style, draw_front, pareto_front
from launch.reports.comparison.results import Comparison, Point, Row, _currency
from launch.reports.comparison.sentences import how_to_read, sentences
from launch.reports.comparison.statistics import Difference, difference, ratio
from launch.reports.comparison.tables import all_rows, slides_table
from launch.reports.read import Run

ACCURACIES = {"dense": (70.0, 71.0, 72.0), "cup_ss": (69.5, 70.0, 71.3), "cup": (70.0, 70.4, 71.6)}
HOURS = {"dense": (10.0, 11.0, 10.5), "cup_ss": (7.0, 7.7, 7.35), "cup": (18.0, 19.0, 18.5)}


def point(entry: Entry, seed: int, top1: float, hours: float, device: str = "cpu", data: str = "imagenet") -> Point:
    first = {"model": "resnet18", "train_images": 1_281_167, "loader": "dali", "shrinks": True, "narrowed": None}
    config = {"config": {"data": {"path": f"datasets/{data}"}, "run": {"seed": seed}}}
    done = {"top1": top1, "top5": 90.0 + seed, "flops_reduction": 1.75, "device": device}
    run = Run(f"{entry.name}_s{seed}", Path("nowhere"), [first | config], [], [], done)
    job = Job(name=run.name, entry=entry, setting="", seed=seed, config=None, options=None, needs=())
    return Point(job, run, Cost(2 * hours, hours))


def comparison(seeds: int = 3, **options: object) -> Comparison:
    entries = {
        "dense": Entry(name="dense", role="control"),
        "cup_ss": Entry(name="cup_ss", published="CUP-RF"),
        "cup": Entry(name="cup", kind="cut", published="CUP"),
    }
    rows = tuple(
        Row(entry, "", tuple(point(entry, s, ACCURACIES[name][s], HOURS[name][s], **options) for s in range(seeds)))
        for name, entry in entries.items()
    )
    paths = {name: Path("nowhere") for name in ("path", "base", "out")}
    grid = Grid(**paths, common={}, seeds=(0, 1, 2), settings={"": {}}, entries=entries)
    return Comparison(grid, rows, _currency([one for row in rows for one in row.points]), ())


def test_a_difference_of_equal_seeds_is_paired():
    found = difference({0: 71.0, 1: 72.5, 2: 70.0}, {0: 70.0, 1: 71.0, 2: 69.5})
    # differences 1, 1.5, 0.5: mean 1, deviation 0.5, standard error 0.5 / sqrt(3); t of 2 degrees of freedom is 4.3027
    half = 4.302652729911275 * 0.5 / math.sqrt(3)
    assert (found.mean, found.low, found.high) == pytest.approx((1.0, 1 - half, 1 + half))
    assert found.sign == 0 and (found.seeds, found.is_paired) == (3, True)
    interval = stats.ttest_rel([71.0, 72.5, 70.0], [70.0, 71.0, 69.5]).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx(tuple(interval))


def test_a_difference_of_other_seeds_is_welchs():
    ours, theirs = [10.0, 12.0, 14.0], [8.0, 9.0]
    found = difference(dict(enumerate(ours)), {7: 8.0, 8: 9.0})
    # variances 4 / 3 and 0.5 / 2; degrees of freedom (19/12)^2 / ((4/3)^2 / 2 + (1/4)^2 / 1)
    freedom = (19 / 12) ** 2 / ((4 / 3) ** 2 / 2 + (1 / 4) ** 2)
    half = stats.t.ppf(0.975, freedom) * math.sqrt(19 / 12)
    assert (found.mean, found.low, found.high) == pytest.approx((3.5, 3.5 - half, 3.5 + half))
    assert (found.seeds, found.is_paired) == (2, False)
    assert (found.low, found.high) == pytest.approx(
        tuple(stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95))
    )


def test_one_seed_or_no_scatter_gives_no_interval():
    assert difference({0: 2.0}, {0: 1.0}) == Difference(1.0, None, None, 1, True)
    assert difference({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0}) == Difference(1.0, None, None, 2, True)
    assert difference({0: 2.0, 1: 3.0}, {5: 1.0}) == Difference(1.5, None, None, 1, False)


def test_a_ratio_of_costs_is_taken_in_logarithms():
    found = ratio({0: 7.0, 1: 14.0}, {0: 10.0, 1: 20.0})
    assert found.mean == pytest.approx(-0.3) and found.low is None
    found = ratio({0: 8.0, 1: 4.0}, {0: 4.0, 1: 4.0})
    assert found.mean == pytest.approx(math.sqrt(2) - 1)
    half = stats.t.ppf(0.975, 1) * math.log(2) / 2
    assert found.high == pytest.approx(math.exp(math.log(2) / 2 + half) - 1)


def test_the_front_holds_what_nothing_beats():
    points = [(3.0, 80.0), (1.0, 70.0), (2.0, 69.0), (2.5, 80.0), (4.0, 80.0), (1.0, 60.0), (5.0, 81.0)]
    assert pareto_front(points) == [(1.0, 70.0), (2.5, 80.0), (5.0, 81.0)]


def test_no_two_of_forty_entries_look_alike():
    assert len({_style(number) for number in range(42)}) == 42


def test_sentences_say_whether_the_seeds_tell_apart():
    by_method = dict(sentences(comparison()))
    assert set(by_method) == {"cup_ss", "cup"}
    # differences -0.5, -1.0, -0.7: mean -0.7333, deviation 0.2517, half an interval 0.6252
    assert by_method["cup_ss"] == [
        "against dense: top-1 -0.73 points (-1.36 to -0.11, three seeds): worse; CPU hours -30.0%: three seeds."
    ]
    # differences 0, -0.6, -0.4: mean -0.3333, deviation 0.3055
    [sentence] = by_method["cup"]
    assert sentence.startswith(
        "against dense: top-1 -0.33 points (-1.09 to +0.43, three seeds): three seeds do not tell"
    )
    [alone] = dict(sentences(comparison(seeds=1)))["cup_ss"]
    chance = "one seed, so no interval"
    assert alone == f"against dense: top-1 -0.50 points: {chance}; CPU hours -30.0%: one seed."


def test_one_seed_gets_no_deviation():
    assert not any("±" in cell for line in all_rows(comparison(seeds=1)).rows for cell in line)
    assert any("±" in cell for line in all_rows(comparison()).rows for cell in line)


@pytest.mark.parametrize("retrained", [True, False])
def test_the_slides_tables_hold_the_measured_beside_the_published(retrained: bool):
    table = slides_table(comparison(), retrained)
    lines = {(line[0], line[1]): line for line in table.rows}
    measured = lines["resnet18", "CUP" if retrained else "CUP-RF"]
    published = ["1.75", "-1.00", "-0.79"] if retrained else ["1.75", "-2.37", "-1.40"]
    ours = ["1.75 ± 0.00", "-0.33 ± 0.31" if retrained else "-0.73 ± 0.25", "+0.00 ± 0.00"]
    assert measured[2:8] == published + ours
    assert lines["resnet34", "CUP" if retrained else "CUP-RF"][5:] == ["", "", "", ""]
    assert len(table.rows) == 9, "the slides' rows, and ours among them"


def test_other_data_is_not_put_beside_published_numbers():
    table = slides_table(comparison(data="digits"), retrained=True)
    assert table.rows[0][:3] == ["resnet18 on digits, 1,281,167 images", "cup (CUP)", ""]
    assert len(table.rows) == 10 and all(line[5:] == ["", "", "", ""] for line in table.rows[1:])


def test_cpu_hours_are_taken_only_where_every_run_has_them():
    points = [one for row in comparison().rows for one in row.points]
    currency = _currency(points)
    assert currency.name == "CPU hours" and currency.hours(points[0]) == 10.0
    uncounted = Point(points[0].job, points[0].run, Cost(20.0, None))
    currency = _currency([*points[1:], uncounted])
    assert currency.name == "GPU hours" and currency.hours(uncounted) == 20.0
    on_gpus = [one for row in comparison(device="cuda").rows for one in row.points]
    assert _currency(on_gpus).name == "GPU hours" and _currency(on_gpus).hours(on_gpus[0]) == 20.0


def test_the_figure_shows_every_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn: list[tuple[float, float]] = []
    honest = Axes.scatter

    def scatter(axis: Axes, x: object, y: object, **style: object) -> object:
        if not isinstance(x, float):  # a mean is a number
            x, y = list(x), list(y)
            drawn.extend(zip(x, y, strict=True))
        return honest(axis, x, y, **style)

    monkeypatch.setattr(Axes, "scatter", scatter)
    draw_front(comparison(), tmp_path / "front.png")
    assert sorted(drawn) == sorted(pair for name in HOURS for pair in zip(HOURS[name], ACCURACIES[name], strict=True))


def test_only_sentences_with_an_interval_count_among_those_that_chance_may_decide():
    assert "of 2 such sentences some 0.1 would find" in how_to_read(comparison())
    assert "of 0 such sentences" in how_to_read(comparison(seeds=1))
