"""Evolutionary search for widths: what it may propose, what it finds, and that it can be repeated."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

import cup
from cup import CupError, EvolutionOptions, FlopsByWidths, WidthSpace, evolve
from train.network.models import build_model

SMALL = EvolutionOptions(population=12, generations=6, parents=4, mutation=0.3)
ALLOWED = {f"layer{number}": tuple(range(2, 33, 2)) for number in range(6)}


def plain_space(least: float = 90, most: float = 100) -> WidthSpace:
    return WidthSpace(ALLOWED, lambda widths: sum(widths.values()), (least, most))


def recorded(score: Callable[[dict[str, int]], float]) -> tuple[list[list[dict]], Callable]:
    """A score for `evolve`, and the generations that it was asked about."""
    asked: list[list[dict]] = []

    def scores(generation: int, networks: list[dict]) -> list[float]:
        asked.append(networks)
        assert generation == len(asked)
        return [score(widths) for widths in networks]

    return asked, scores


def wide_at_the_end(widths: dict[str, int]) -> float:
    return float(np.dot(list(widths.values()), range(len(widths))))


def test_every_network_of_every_generation_is_new_and_inside_the_window_of_a_real_network():
    model, example = build_model("resnet20_cifar", 10), torch.zeros(1, 3, 32, 32)
    groups, dense = cup.channel_groups(model, example), cup.complexity(model, example)
    by_widths = FlopsByWidths(model, groups, dense)
    allowed = {group.name: range(1, group.width + 1) for group in cup.prunable_groups(groups)}
    window = (dense.flops / 2.02, dense.flops / 2)
    space = WidthSpace(allowed, lambda w: by_widths.after({name: range(k) for name, k in w.items()}), window)
    asked, score = recorded(wide_at_the_end)
    evolve(space, SMALL, 0, score)
    assert [len(networks) for networks in asked] == [12] * 6
    networks = [widths for some in asked for widths in some]
    assert len({tuple(widths.values()) for widths in networks}) == len(networks)
    for widths in networks[::7]:  # counted by running them, not by the search's own arithmetic
        narrow = build_model("resnet20_cifar", 10)
        cup.shrink_to(narrow, widths, example)
        assert 2 <= dense.flops / cup.complexity(narrow, example).flops <= 2.02
    assert all(window[0] <= by_widths.after({n: range(k) for n, k in w.items()}) <= window[1] for w in networks)


def test_generations_get_better_and_the_best_network_of_all_is_returned():
    asked, score = recorded(wide_at_the_end)
    best, top = evolve(plain_space(), SMALL, 3, score)
    heights = [max(map(wide_at_the_end, networks)) for networks in asked]
    assert top == max(heights) == wide_at_the_end(best)
    assert heights[-1] > heights[0]


def test_equal_scores_let_the_network_that_was_found_first_win():
    asked, score = recorded(lambda widths: 1.0)
    best, _ = evolve(plain_space(), SMALL, 0, score)
    assert best == asked[0][0]


def test_a_search_repeated_with_the_same_scores_asks_for_the_same_networks_and_another_seed_for_others():
    runs = []
    for seed in (5, 5, 6):
        asked, score = recorded(wide_at_the_end)
        evolve(plain_space(), SMALL, seed, score)
        runs.append(asked)
    assert runs[0] == runs[1] != runs[2]


def test_mutation_changes_a_width_with_its_probability_and_to_any_other_one():
    space, rng = plain_space(), np.random.default_rng(0)
    parent = (0, 3, 5, 7, 9, 15)
    children = np.array([space.mutate(parent, 0.25, rng) for _ in range(4000)])
    changed = children != np.array(parent)
    assert abs(changed.mean() - 0.25) < 0.02
    for group, own in enumerate(parent):
        assert set(children[changed[:, group], group]) == set(range(16)) - {own}


def test_a_crossed_network_has_each_width_from_either_parent():
    space, rng = plain_space(), np.random.default_rng(0)
    one, other = (0, 1, 2, 3, 4, 5), (10, 11, 12, 13, 14, 15)
    children = np.array([space.cross(one, other, rng) for _ in range(500)])
    from_one = children == np.array(one)
    assert (from_one | (children == np.array(other))).all()
    assert abs(from_one.mean() - 0.5) < 0.05 and len(np.unique(children, axis=0)) == 2**6


def test_a_search_ends_early_where_there_are_no_more_networks():
    space = WidthSpace({"a": (1, 2), "b": (1, 2)}, lambda widths: sum(widths.values()), (3, 3))
    asked, score = recorded(lambda widths: float(widths["a"]))
    best, _ = evolve(space, SMALL, 0, score)
    assert best == {"a": 2, "b": 1}
    assert sum(map(len, asked)) == 2


def test_a_window_that_no_network_reaches_is_an_error_that_says_what_there_is():
    with pytest.raises(CupError, match="200 to 300 FLOPs: the allowed widths lead to 12 to 192"):
        plain_space(200, 300)
    with pytest.raises(CupError, match="91 to 91 FLOPs was found: widen the window"):
        evolve(plain_space(91, 91), SMALL, 0, recorded(wide_at_the_end)[1])  # all widths are even


@pytest.mark.parametrize(
    ("field", "value"), [("population", 0), ("generations", 0), ("parents", 1), ("mutation", 0.0), ("mutation", 1.5)]
)
def test_options_out_of_range(field: str, value: float):
    with pytest.raises(CupError, match=f"{field}: found {value}"):
        EvolutionOptions(**{field: value})
