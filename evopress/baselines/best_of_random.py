"""The random baseline: the best of k random mixes of the two levels next to the target."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import numpy as np

from evopress.baselines.baseline import Baseline, Pass, Planned, Problem, check_minibatch
from evopress.errors import EvoPressError
from evopress.progress import tracked
from evopress.search.initial import random_mixes
from evopress.search.selection import select_fittest
from evopress.search.strategy import Fitness
from evopress.settings import RunSettings
from evopress.units import Budget, Genome, Space

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BestOfRandom(Baseline):
    """The fittest of some random mixes."""

    num_candidates: int
    tokens: int

    def check(self, run: RunSettings) -> None:
        """See `Baseline`."""
        check_minibatch(run, "baselines.random_tokens", self.tokens)

    def passes(self, plan: Planned) -> list[Pass]:
        """See `Baseline`."""
        return [Pass(self.num_candidates, self.tokens, on_search_text=True)]

    def find(self, problem: Problem) -> dict[str, Genome]:
        """See `Baseline`."""
        genome, _ = best_of_random(
            problem.space,
            problem.budget,
            problem.fitness(),
            num_candidates=self.num_candidates,
            tokens=self.tokens,
            rng=problem.rng,
        )
        return {f"best_of_{self.num_candidates}": genome}


def best_of_random(
    space: Space,
    budget: Budget,
    fitness: Fitness,
    *,
    num_candidates: int,
    tokens: int,
    rng: np.random.Generator,
) -> tuple[Genome, list[float]]:
    """Draw distinct random mixes, score them on one minibatch and return the fittest, with all fitnesses.

    Source: paper, appendix F.1, Table 16 (best of 32). Where the target is a level, the only mix is the uniform genome.

    Args:
        space: units and levels.
        budget: the cost that no mix exceeds.
        fitness: scores the mixes; lower is better.
        num_candidates: mixes to draw.
        tokens: size of the minibatch.
        rng: draws the mixes.

    Raises: EvoPressError if the budget cannot be met or no mix has a finite fitness.
    """
    genomes = random_mixes(space, budget, num_candidates=num_candidates, rng=rng)
    found = "" if len(genomes) == num_candidates else f", of which there {'is' if len(genomes) == 1 else 'are'} {len(genomes)}"
    logger.info("best of %d random%s: %d tokens each", num_candidates, found, tokens)
    with tracked(f"best of {num_candidates} random"):  # the drawing is not part of it: the time left is that of the models
        fitnesses = [float(value) for value in fitness(genomes, tokens=tokens)]
    (best,) = select_fittest(genomes, fitnesses, 1)
    if not math.isfinite(fitnesses[best]):
        raise EvoPressError(
            f"none of {len(genomes)} random mixes has a finite fitness on {tokens} tokens: "
            "look at the model's outputs at these levels or raise the target"
        )
    return genomes[best], fitnesses
