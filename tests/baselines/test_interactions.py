"""Interactions of pairs: the best genome by energy is the best of all, where the measured KL is such an energy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from evopress.baselines.exhaustive import all_genomes
from evopress.baselines.interactions import Interactions, energy
from evopress.errors import EvoPressError
from evopress.units import Budget, Level, Limit, Space, Unit

LEVELS = (Level("keep", 1, "keep", 0), Level("drop", 0, "drop", 0))


@dataclass
class Measured:
    kl: float


class Ising:
    """A model whose KL is an energy of pairs."""

    def __init__(self, seed: int, budget: Budget, *kinds: str) -> None:
        self.space = Space("drop", tuple(Unit(f"{kind}.{i}", i, kind, 1, LEVELS) for i, kind in enumerate(kinds)))
        self.rng, self.budget = np.random.default_rng(seed), budget
        count = len(kinds)
        self.h, J = self.rng.uniform(0.5, 2, count), self.rng.normal(0, 0.5, (count, count))
        self.J = np.triu(J, 1) + np.triu(J, 1).T
        self.search_tokens, self.tokens = torch.zeros(8, 4, dtype=torch.int64), 0

    def kept(self, name, about):
        return {}

    def measure(self, genomes, tokens, *, what, levels=None):
        self.tokens += len(genomes) * tokens.numel()
        return [Measured(slowly(genome, self.h, self.J)) for genome in genomes]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("split", [(), (Limit(4, kind="attention"), Limit(3, kind="mlp"))], ids=["any", "split"])
def test_the_genome_is_the_best_of_all(seed, split) -> None:
    problem = Ising(seed, Budget(7, 0.4, "sparsity", split), *["attention", "mlp"] * 6)
    (genome,) = Interactions(tokens=16).find(problem).values()
    energies = {each: slowly(each, problem.h, problem.J) for each in all_genomes(problem.space, problem.budget)}
    assert genome == min(energies, key=energies.__getitem__)
    assert energy(genome, problem.h, problem.J) == pytest.approx(energies[genome])
    assert problem.tokens == 16 * (12 + 66)


def slowly(genome, h, J) -> float:
    gone = [i for i, level in enumerate(genome) if level]
    return sum(h[i] for i in gone) + sum(J[i, j] for i in gone for j in gone if i < j)


def test_a_unit_that_must_stay_stays_and_what_is_not_finite_is_one_sentence() -> None:
    problem = Ising(0, Budget(3, 0.5, "sparsity"), *["block"] * 6)
    problem.h[0] = -9.0
    units = problem.space.units
    problem.space = Space("drop", (Unit("block.0", 0, "block", 1, LEVELS[:1]), *units[1:]))
    (genome,) = Interactions(tokens=16).find(problem).values()
    assert genome[0] == 0 and problem.space.cost(genome) == 3
    problem.h[2] = np.nan
    with pytest.raises(EvoPressError, match=r"without block\.2 the KL divergence is not a finite number"):
        Interactions(tokens=16).find(problem)
