"""Evolutionary search for widths inside a FLOPs window (MetaPruning, Liu et al., ICCV 2019, arXiv 1903.10258)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cup.errors import CupError

Candidate = tuple[int, ...]
"""For each group of a `WidthSpace`, in its order, the number of one of its allowed widths."""
Widths = dict[str, int]
"""Group -> channels."""

STEPS_TO_WINDOW = 1000
"""A walk that has not come to the window by then jumps from one side of it to the other."""
TRIES_FOR_ONE = 10
"""Attempts at a network that is new and inside the window, for each that is wanted."""


@dataclass(frozen=True)
class EvolutionOptions:
    """How long and how wide a search is; the defaults are the authors'."""

    population: int = 50
    """Networks of a generation. Half of them are mutated parents and half are crossed ones; what is missing of them,
    for want of new ones inside the window, is drawn at random, as the whole first generation is."""
    generations: int = 20
    parents: int = 10
    """The best so far, from which the next generation is made."""
    mutation: float = 0.1
    """Probability for each group of a mutated network to get another width."""

    def __post_init__(self) -> None:
        checks = [
            ("population", self.population >= 1, "a whole number from 1"),
            ("generations", self.generations >= 1, "a whole number from 1"),
            ("parents", self.parents >= 2, "a whole number from 2"),
            ("mutation", 0 < self.mutation <= 1, "above 0, up to 1"),
        ]
        for name, ok, allowed in checks:
            if not ok:
                raise CupError(f"{name}: found {getattr(self, name)!r}, allowed: {allowed}")


class WidthSpace:
    """The networks to choose from: each group at one of its allowed widths, all together inside a FLOPs window."""

    def __init__(
        self, allowed: Mapping[str, Sequence[int]], flops: Callable[[Widths], int], window: tuple[float, float]
    ) -> None:
        """allowed: group -> widths, ascending. flops: of the network at some widths, rising with each of them.

        window: (least, most) FLOPs. Raises CupError where not even the narrowest or the widest network reaches it.
        """
        self._allowed = {name: tuple(widths) for name, widths in allowed.items()}
        self._flops, self.window = flops, window
        self._counts = np.array([len(widths) for widths in self._allowed.values()])
        narrowest, widest = (self._flops_of(ends) for ends in (0 * self._counts, self._counts - 1))
        least, most = window
        if narrowest > most or widest < least:
            raise CupError(
                f"no network with {least:,.0f} to {most:,.0f} FLOPs: the allowed widths lead to {narrowest:,} to "
                f"{widest:,}"
            )

    def widths(self, candidate: Candidate) -> Widths:
        return {name: widths[number] for (name, widths), number in zip(self._allowed.items(), candidate, strict=True)}

    def __contains__(self, candidate: Candidate) -> bool:
        least, most = self.window
        return least <= self._flops_of(candidate) <= most

    def draw(self, rng: np.random.Generator) -> Candidate | None:
        """A random network of the window: random widths, then random groups one step narrower, or wider, until inside.

        None where the walk does not end there.
        """
        numbers = rng.integers(self._counts)
        for _ in range(STEPS_TO_WINDOW):
            flops = self._flops_of(numbers)
            if self.window[0] <= flops <= self.window[1]:
                return tuple(numbers.tolist())
            step = -1 if flops > self.window[1] else 1
            movable = np.flatnonzero((numbers + step >= 0) & (numbers + step < self._counts))
            numbers[rng.choice(movable)] += step
        return None

    def mutate(self, parent: Candidate, probability: float, rng: np.random.Generator) -> Candidate:
        """Each group gets, with this probability, one of its other widths."""
        hit = rng.random(len(parent)) < probability
        shift = 1 + rng.integers(np.maximum(self._counts - 1, 1))
        return tuple(((np.array(parent) + hit * shift) % self._counts).tolist())

    def cross(self, one: Candidate, other: Candidate, rng: np.random.Generator) -> Candidate:
        """Each group has the width of either parent."""
        return tuple(np.where(rng.random(len(one)) < 0.5, one, other).tolist())

    def _flops_of(self, candidate: Sequence[int]) -> int:
        return self._flops(self.widths(candidate))


def evolve(
    space: WidthSpace,
    options: EvolutionOptions,
    seed: int,
    score: Callable[[int, list[Widths]], list[float]],
) -> tuple[Widths, float]:
    """The best network that so many generations find, and its score.

    score: (generation, from 1, and its networks) -> a number each, the higher the better; no network is asked for
        twice. Equal scores: what was found first is better.
    The same seed and scores lead to the same networks, so a search that was broken off goes on by being repeated with
    the scores that are known. It ends early where no new network is found. Raises CupError if there is none at all.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    seen: set[Candidate] = set()
    best: list[tuple[float, Candidate]] = []
    for generation in range(1, options.generations + 1):
        candidates = _next_generation(space, options, [candidate for _, candidate in best], seen, rng)
        if not candidates:
            break
        scores = score(generation, [space.widths(candidate) for candidate in candidates])
        best += zip(scores, candidates, strict=True)
        best = sorted(best, key=lambda scored: -scored[0])[: options.parents]
    if not best:
        raise CupError(
            f"no network with {space.window[0]:,.0f} to {space.window[1]:,.0f} FLOPs was found: widen the window"
        )
    return space.widths(best[0][1]), best[0][0]


def _next_generation(
    space: WidthSpace,
    options: EvolutionOptions,
    parents: Sequence[Candidate],
    seen: set[Candidate],
    rng: np.random.Generator,
) -> list[Candidate]:
    """New networks of the window, at most a population; `seen` learns of them."""
    found: list[Candidate] = []

    def find(count: int, propose: Callable[[], Candidate | None]) -> None:
        wanted = len(found) + count
        for _ in range(TRIES_FOR_ONE * count):
            if len(found) == wanted:
                return
            candidate = propose()
            if candidate is not None and candidate not in seen and candidate in space:
                seen.add(candidate)
                found.append(candidate)

    def parent() -> Candidate:
        return parents[rng.integers(len(parents))]

    def crossed() -> Candidate:
        one, other = rng.choice(len(parents), 2, replace=False)
        return space.cross(parents[one], parents[other], rng)

    if parents:
        find(options.population // 2, lambda: space.mutate(parent(), options.mutation, rng))
    if len(parents) > 1:
        find(options.population // 2, crossed)
    find(options.population - len(found), lambda: space.draw(rng))
    return found
