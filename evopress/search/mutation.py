"""The level-switch mutation and the offspring it makes of a parent.

Source: paper, section 3, Algorithm 1 (Mutation) and appendix B.1 (how many switches).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from evopress.errors import EvoPressError
from evopress.search.constraint import make_exchange
from evopress.units import Budget, Genome, Space


class Mutation(Protocol):
    """Make a changed copy of a genome within the budget."""

    def __call__(self, parent: Genome, rng: np.random.Generator) -> Genome:
        """Return a genome that differs from the parent; raise EvoPressError if none can be found."""
        ...


def _min_uniform(max_switches: int, rng: np.random.Generator) -> int:
    return int(min(rng.integers(max_switches), rng.integers(max_switches))) + 1


def _constant(max_switches: int, rng: np.random.Generator) -> int:
    return max_switches


DISTRIBUTIONS: dict[str, Callable[[int, np.random.Generator], int]] = {
    "min_uniform": _min_uniform,
    "constant": _constant,
}
"""Switches per offspring: min(U1, U2), U ~ uniform{1..max_switches} (the paper's), or exactly max_switches (Table 4)."""


class LevelSwitch:
    """Compress some units one level more and others one level less, under the budget and the exchange rule.

    Source: paper, section 3. Later switches of one offspring may undo earlier ones; an offspring equal to the
    parent is drawn again.

    Args:
        space: units and levels.
        budget: the cost that no offspring of a parent within it exceeds.
        exchange: a name in `constraint.EXCHANGES`.
        max_switches: largest number of switches per offspring, at least 1.
        distribution: a name in `DISTRIBUTIONS`.
        max_attempts: draws for one offspring.
        allowed: further bound on offspring; None: none.

    Raises: EvoPressError if a value is unknown or out of range; when called, if the parent has no legal switch.
    """

    def __init__(
        self,
        space: Space,
        budget: Budget,
        *,
        exchange: str = "size",
        max_switches: int = 3,
        distribution: str = "min_uniform",
        max_attempts: int = 100,
        allowed: Callable[[Genome], bool] | None = None,
    ) -> None:
        if distribution not in DISTRIBUTIONS:
            raise EvoPressError(f'distribution "{distribution}" is unknown: choose one of {", ".join(DISTRIBUTIONS)}')
        if max_switches < 1:
            raise EvoPressError(f"max_switches is {max_switches}: an offspring needs at least 1")
        self._space, self._budget = space, budget
        self._exchange_name, self._exchange = exchange, make_exchange(exchange, space, budget)
        self._max_switches, self._draw_num_switches = max_switches, DISTRIBUTIONS[distribution]
        self._max_attempts = max_attempts
        self._allowed = allowed

    def __call__(self, parent: Genome, rng: np.random.Generator) -> Genome:
        """Return an offspring of the parent, different from it and within the budget."""
        for _ in range(self._max_attempts):
            levels = list(parent)
            num_switches = self._draw_num_switches(self._max_switches, rng)
            found = self._exchange(levels, num_switches, rng) and (child := tuple(levels)) != parent
            if found and (self._allowed is None or self._allowed(child)):
                return child
        raise EvoPressError(
            f'exchange "{self._exchange_name}" with at most {self._max_switches} switches found no other genome from the '
            f"current one in {self._max_attempts} attempts ({len(parent)} units, cost {self._space.cost(parent)}, "
            f"budget {self._budget.total}): choose a target between the lowest and the highest level, "
            + ("another exchange or wider bounds" if self._allowed else "or another exchange")
        )


def offspring(mutation: Mutation, parent: Genome, num_offspring: int, rng: np.random.Generator) -> list[Genome]:
    """Draw offspring that differ from each other and from the parent.

    Args:
        mutation: makes one offspring.
        parent: left as it is.
        num_offspring: how many to make, at least 1.
        rng: the mutation's generator.

    Returns: `num_offspring` genomes in order of creation; fewer where the attempts found no more (a small space).
    Raises: EvoPressError from the mutation, naming the constraint, where there is none at all.
    """
    attempts = 100 + 10 * num_offspring
    found: dict[Genome, None] = {}  # a set that keeps its order
    for _ in range(attempts):
        child = mutation(parent, rng)
        if child != parent:
            found[child] = None
        if len(found) == num_offspring:
            break
    if not found:
        raise EvoPressError(
            f"the mutation made no offspring that differs from its parent in {attempts} attempts: choose another exchange or target"
        )
    return list(found)
