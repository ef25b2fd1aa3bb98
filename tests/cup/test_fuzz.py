"""Random networks (tests/experiments/fuzz.py runs thousands): cut, they compute what their silenced twins do."""

import cup_twins
import pytest
from random_networks import Step, check_program, failure_of, random_program, shrunk

import cup.tracing.trace


@pytest.mark.parametrize("seed", range(100))
def test_a_random_network_is_cut_right(seed):
    check_program(random_program(seed), seed)


def test_the_networks_have_something_to_cut():
    free = [sum(not group.frozen for group in check_program(random_program(seed), seed)) for seed in range(10)]
    assert sum(count > 0 for count in free) >= 5


CHAIN = (
    Step("conv", (0,), 1),
    Step("relu", (1,), 2),
    Step("scaled conv", (2,), 3),
    Step("batch norm", (3,), 4),
    Step("conv", (4,), 5),
)


def test_the_fuzzer_finds_a_mistake_and_shrinks_it(monkeypatch):
    """Without the check on narrower copies nobody sees that the convolution's width scales what it gives."""
    assert failure_of(CHAIN) == ""
    monkeypatch.setattr(cup.tracing.trace, "freeze_what_breaks", lambda groups, retrace: groups)
    assert failure_of(CHAIN).startswith("AssertionError")
    smallest = shrunk(CHAIN, lambda program: failure_of(program) != "")
    assert [step.operation for step in smallest] == ["conv", "nothing", "scaled conv", "nothing", "nothing"]


def test_the_fuzzer_notices_a_wrong_index(monkeypatch):
    def shifted(model, plan, groups):
        kept = {name: tuple(sorted({(c + 1) % plan.widths[name] for c in kept})) for name, kept in plan.kept.items()}
        return cup.apply_plan(model, cup.PrunePlan(kept, plan.widths), groups)

    monkeypatch.setattr(cup_twins, "apply_plan", shifted)
    assert failure_of(CHAIN).startswith("AssertionError")
