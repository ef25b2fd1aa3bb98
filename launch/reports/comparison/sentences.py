"""Each method against each control, in words: the differences, how sure they are, and what that means."""

from launch.reports.comparison.results import Comparison, Row, reduction, spread_of, top1
from launch.reports.comparison.statistics import CONFIDENCE, Difference, difference, ratio

UNEQUAL = 0.03
"""Share by which two FLOPs reductions may differ without a word."""
NUMBERS = {1: "one seed", 2: "two seeds", 3: "three seeds", 4: "four seeds", 5: "five seeds"}


def sentences(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """(method, a sentence for each of its controls)."""
    return [
        (method.name, [_sentence(comparison, method, control) for control in comparison.controls_of(method)])
        for method in comparison.methods
    ]


def how_to_read(comparison: Comparison) -> str:
    pairs = [(method, control) for method in comparison.methods for control in comparison.controls_of(method)]
    accuracies = [difference(method.by_seed(top1), control.by_seed(top1)) for method, control in pairs]
    count = sum(found.low is not None for found in accuracies)
    return (
        f"Intervals are at {CONFIDENCE:.0%} confidence, of the mean difference seed by seed (Student's t): runs of one "
        "seed share initial weights, order of images and augmentation, and some are made from each other, so they are "
        "not independent, and Welch's interval is taken only where two sides have no seed in common. They tell of the "
        "chance that is in a seed, not of that in the validation images. Each holds for itself: of "
        f"{count} such sentences some "
        f"{count * (1 - CONFIDENCE):.1f} would find a difference in top-1 where there is none."
    )


def _sentence(comparison: Comparison, method: Row, control: Row) -> str:
    accuracy = difference(method.by_seed(top1), control.by_seed(top1))
    hours = ratio(method.by_seed(comparison.currency.hours), control.by_seed(comparison.currency.hours))
    points = f"top-1 {accuracy.mean:+.2f} points{_interval(accuracy, lambda value: f'{value:+.2f}')}"
    cost = f"{comparison.currency.name} {hours.mean:+.1%}{_interval(hours, lambda value: f'{value:+.1%}')}"
    against = f"against {control.name}{_unequal(method, control)}"
    return f"{against}: {points}: {_verdict(accuracy)}; {cost}: {_cost_verdict(hours)}."


def _unequal(method: Row, control: Row) -> str:
    """Where a control that should be as small as the method is not."""
    ours, theirs = (spread_of(row.by_seed(reduction))[0] for row in (method, control))
    is_dense = theirs == 1
    return "" if is_dense or abs(ours / theirs - 1) < UNEQUAL else f" (at FR {theirs:.2f}, the method at {ours:.2f})"


def _interval(found: Difference, words) -> str:
    if found.low is None:
        return ""
    how = "" if found.is_paired else ", Welch's"
    return f" ({words(found.low)} to {words(found.high)}, {_seeds(found.seeds)}{how})"


def _verdict(found: Difference) -> str:
    if found.seeds == 1:
        return "one seed, so no interval"
    if found.low is None:
        return "the same for each seed, so there is no scatter to judge it by"
    return {0: f"{_seeds(found.seeds)} do not tell them apart", 1: "better", -1: "worse"}[found.sign]


def _cost_verdict(found: Difference) -> str:
    if found.low is None:
        return _seeds(found.seeds)
    return {0: f"{_seeds(found.seeds)} do not tell them apart", 1: "dearer", -1: "cheaper"}[found.sign]


def _seeds(count: int) -> str:
    return NUMBERS.get(count, f"{count} seeds")
