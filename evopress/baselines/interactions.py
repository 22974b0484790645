"""Second-order interactions of modules: what every pair that is dropped adds to the KL divergence, and the best set by their sum.

Source: block removal as constrained binary optimization (arXiv:2602.00161), an Ising model of gates: E(S) = Σ h_i + Σ J_ij over the
dropped i < j. Differs from it: there h and J are derivatives of the loss in the gates, here they are measured, h_i = KL(i) and
J_ij = KL(i, j) - h_i - h_j; and what is dropped is whatever the method's units are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations

import numpy as np

from evopress.baselines.allocation import SEQUENCES, TOGETHER, check_tokens, divergences
from evopress.baselines.baseline import MODULES, Baseline, Pass, Planned, Problem
from evopress.data.minibatch import draw_equal
from evopress.data.tokens import tokens_digest
from evopress.errors import EvoPressError
from evopress.search.initial import random_mixes
from evopress.settings import RunSettings
from evopress.units import Budget, Genome, Space

_STARTS = 64
"""Random genomes from which exchanges descend."""


@dataclass(frozen=True)
class Interactions(Baseline):
    """The genome with the least energy that exchanges reach."""

    tokens: int = 512
    """Search tokens of each pair, at most."""
    serves = (MODULES,)

    def check(self, run: RunSettings) -> None:
        """See `Baseline`."""
        check_tokens("interactions", self.tokens)

    def passes(self, plan: Planned) -> list[Pass]:
        """See `Baseline`."""
        count = sum(len(unit.levels) > 1 for unit in plan.space.units)
        return [Pass(count * (count + 1) // 2, min(self.tokens, plan.search_tokens), together=TOGETHER, shared="interactions")]

    def find(self, problem: Problem) -> dict[str, Genome]:
        """Raise EvoPressError if dropping a module or two makes the KL divergence something that is not finite."""
        space, text = problem.space, problem.search_tokens
        (ids,) = draw_equal(*text.shape, tokens=self.tokens, sequences=SEQUENCES, rng=problem.rng).tensors(text)
        kept = problem.kept("interactions", {"text": tokens_digest(ids), **asdict(self)})
        units = [i for i, unit in enumerate(space.units) if len(unit.levels) > 1]
        sets = [*((i,) for i in units), *combinations(units, 2)]
        found = divergences(problem, [without(space, dropped) for dropped in sets], ids, kept, what="pairs of modules")
        lost = next((dropped for dropped, kl in zip(sets, found, strict=True) if kl is None or not math.isfinite(kl)), None)
        if lost is not None:
            raise EvoPressError(
                f"without {' and '.join(space.units[i].name for i in lost)} the KL divergence is not a finite number: use "
                "model.dtype=bfloat16 or float32, or leave interactions out of baselines.names"
            )
        J = np.zeros((len(space), len(space)))
        for dropped, kl in zip(sets, found, strict=True):
            J[dropped[0], dropped[-1]] = J[dropped[-1], dropped[0]] = kl
        h = J.diagonal().copy()
        J -= h[:, None] + h
        np.fill_diagonal(J, 0.0)
        starts = random_mixes(space, problem.budget, num_candidates=_STARTS, rng=problem.rng)
        return {"interactions": least_energy(space, problem.budget, h, J, starts)}


def without(space: Space, dropped: Sequence[int]) -> Genome:
    """Return the genome without some units."""
    return tuple(len(unit.levels) - 1 if i in dropped else 0 for i, unit in enumerate(space.units))


def energy(genome: Genome, h: np.ndarray, J: np.ndarray) -> float:
    """Return Σ h_i + Σ J_ij over the dropped i < j."""
    gone = np.array(genome, dtype=bool).astype(float)
    return float(h @ gone + gone @ J @ gone / 2)


def least_energy(space: Space, budget: Budget, h: np.ndarray, J: np.ndarray, starts: Sequence[Genome]) -> Genome:
    """Return the genome of the least energy that exchanges of a dropped unit for another reach from any start.

    Of the exchanges that keep the budget the best one is made, until none is better.

    Args:
        h: of every unit, [n].
        J: of every pair, symmetric [n, n] with zeros on its diagonal.
        starts: genomes within the budget, which none that is returned exceeds.
    """
    movable = np.array([len(unit.levels) > 1 for unit in space.units])

    def better(genome: Genome) -> Genome | None:
        gone = np.array(genome, dtype=bool) & movable
        field = h + J[:, gone].sum(1)
        change = field[None, :] - field[:, None] - J  # [back, dropped instead]
        change[~gone, :], change[:, gone | ~movable] = np.inf, np.inf
        for place in np.argsort(change, axis=None):
            back, instead = divmod(int(place), len(space))
            if not change[back, instead] < -1e-12:
                return None
            exchanged = without(space, [*(i for i in range(len(space)) if gone[i] and i != back), instead])
            if budget.met_by(space, exchanged):
                return exchanged
        return None

    ends = []
    for genome in starts:
        following: Genome | None = genome
        while following is not None:
            genome, following = following, better(following)
        ends.append(genome)
    return min(ends, key=lambda genome: energy(genome, h, J))
