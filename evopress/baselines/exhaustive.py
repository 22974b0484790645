"""Exhaustive search: the optimum itself, for spaces that are small enough to measure every genome (paper, Figure 1).

Genomes that cost exactly the budget are all that is looked at: where every unit of a kind costs the same, as in depth pruning, no
other genome meets the budget without wasting part of it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evopress.baselines.baseline import EXPERTS, MODULES, Baseline, Pass, Planned, Problem, check_minibatch
from evopress.data.tokens import tokens_digest
from evopress.errors import EvoPressError
from evopress.progress import track
from evopress.settings import RunSettings
from evopress.units import Budget, Genome, Space

logger = logging.getLogger(__name__)

_Ways = dict[str, dict[int, int]]
"""Part of the budget to total cost to the number of ways in which the units of that part can cost it."""


_BATCH = 64
"""Genomes that are evaluated together."""


@dataclass(frozen=True)
class Exhaustive(Baseline):
    """The fittest of all genomes on the first search tokens; goes on where an earlier exhaustive search stopped."""

    tokens: int | None
    """Search tokens that every genome is measured on; None: all."""
    limit: int
    serves = (MODULES, EXPERTS)

    def check(self, run: RunSettings) -> None:
        """See `Baseline`."""
        if self.tokens is not None:
            check_minibatch(run, "baselines.exhaustive_tokens", self.tokens)

    def passes(self, plan: Planned) -> list[Pass]:
        """See `Baseline`."""
        count = min(count_genomes(plan.space, plan.budget), self.limit)
        return [Pass(count, self.tokens or plan.search_tokens, on_search_text=True, together=_BATCH)]

    def find(self, problem: Problem) -> dict[str, Genome]:
        """Raise EvoPressError if there are more genomes than the limit."""
        budget, text = problem.budget, problem.search_tokens
        length = text.shape[1]
        rows = len(text) if self.tokens is None else max(self.tokens // length, 1)
        about = {
            "tokens": tokens_digest(text[:rows]),
            "fitness": problem.what_fitness_is,
            "budget": [budget.total, *map(list, budget.by_kind.items())],
        }
        records = problem.records("exhaustive", about)
        known: dict[Genome, float] = {}
        for record in records:
            fitnesses = zip(record["genomes"], record["fitnesses"], strict=True)
            taken = {tuple(map(int, genome)): float(fitness) for genome, fitness in fitnesses if fitness is not None}
            problem.spend(tokens=len(taken.keys() - known) * rows * length, seconds=float(record.get("seconds", 0.0)))
            known |= taken
        started = time.monotonic()

        def keep(measured: dict[Genome, float]) -> None:
            nonlocal started
            genomes, now = ["".join(map(str, genome)) for genome in measured], time.monotonic()
            records.add({"genomes": genomes, "fitnesses": list(measured.values()), "seconds": round(now - started, 3)})
            started = now

        def fitness_of(genomes: Sequence[Genome]) -> list[float]:
            # A generator for each batch: all genomes are measured on the text in the same order, wherever the search goes on.
            fitness = problem.fitness(np.random.default_rng(0), num_sequences=rows)
            return list(fitness(genomes, tokens=rows * length))

        best, _ = exhaustive(problem.space, budget, fitness_of, limit=self.limit, batch=_BATCH, known=known, on_batch=keep)
        return {"exhaustive": best}


def count_genomes(space: Space, budget: Budget) -> int:
    """Count the genomes that cost exactly the budget, and on each kind exactly what its split says, without listing them.

    Further limits are not looked at.
    """
    parts, targets = _parts(space, budget)
    ways = _ways(space, parts, targets)[0]
    return math.prod(ways[part].get(target, 0) for part, target in targets.items())


def all_genomes(space: Space, budget: Budget) -> Iterator[Genome]:
    """List those that `count_genomes` counts and that keep all limits, in lexicographic order.

    So neighbours share long prefixes, which are evaluated once.
    """
    parts, targets = _parts(space, budget)
    ways = _ways(space, parts, targets)

    def complete(genome: Genome, left: dict[str, int]) -> Iterator[Genome]:
        """List the completions of a genome's first levels that spend what is left; it has at least one."""
        if len(genome) == len(space):
            yield genome
            return
        part = parts[len(genome)]
        possible = ways[len(genome) + 1][part]
        for level, cost in enumerate(space.prices[len(genome)]):
            if (rest := left[part] - cost) in possible:
                yield from complete((*genome, level), left | {part: rest})

    if all(target in ways[0][part] for part, target in targets.items()):
        yield from (genome for genome in complete((), targets) if budget.met_by(space, genome))


def count_to_measure(space: Space, budget: Budget, *, limit: int) -> int:
    """Return how many genomes an exhaustive search measures.

    Raises: EvoPressError if they, or those that keep no further limits, are more than the limit (`baselines.exhaustive_limit`), or
        none.
    """
    count = count_genomes(space, budget)
    if count > limit:
        raise EvoPressError(
            f"an exhaustive search would measure {count:,} genomes, more than baselines.exhaustive_limit={limit}: "
            "raise the limit, use larger units (granularity), or leave exhaustive out of the baselines"
        )
    if len(budget.by_kind) < len(budget.limits):
        count = sum(1 for _ in all_genomes(space, budget))
    if not count:
        limits = f" and keeps {', '.join(map(str, budget.limits))}" if budget.limits else ""
        raise EvoPressError(
            f"none of the {len(space)} units' genomes costs exactly the budget {budget.total} "
            f"({budget.target:g} {budget.measure}){limits}: choose another target, or leave exhaustive out of the baselines"
        )
    return count


def exhaustive(
    space: Space,
    budget: Budget,
    fitness_of: Callable[[Sequence[Genome]], Sequence[float]],
    *,
    limit: int,
    batch: int,
    known: Mapping[Genome, float] | None = None,
    on_batch: Callable[[dict[Genome, float]], None] | None = None,
) -> tuple[Genome, list[tuple[Genome, float]]]:
    """Measure every genome that costs exactly the budget and return the fittest, with all of them in lexicographic order.

    Args:
        fitness_of: scores genomes, on the same tokens at every call; lower is better, NaN counts as infinite.
        limit: most genomes to accept (`baselines.exhaustive_limit`).
        batch: genomes per call of `fitness_of`.
        known: fitnesses measured earlier, which are not measured again.
        on_batch: gets the genomes of each call with their fitnesses, to store them.

    Raises: EvoPressError, before anything is measured, if the genomes are more than the limit, or none; and if none is finite.
    """
    count = count_to_measure(space, budget, limit=limit)
    genomes = list(all_genomes(space, budget))
    known = known or {}
    fitnesses = {genome: known[genome] for genome in genomes if genome in known}
    open_genomes = [genome for genome in genomes if genome not in fitnesses]
    logger.info("exhaustive search: %d genomes, %d of them measured already", count, len(fitnesses))
    for start in track(range(0, len(open_genomes), batch), f"exhaustive search, batches of {batch}"):
        part = open_genomes[start : start + batch]
        measured = dict(zip(part, map(float, fitness_of(part)), strict=True))
        fitnesses |= measured
        if on_batch is not None:
            on_batch(measured)
    best = min(genomes, key=lambda genome: math.inf if math.isnan(fitnesses[genome]) else fitnesses[genome])
    if not math.isfinite(fitnesses[best]):
        raise EvoPressError(
            f"none of the {count:,} genomes has a finite fitness: look at the model's outputs or choose another target"
        )
    return best, [(genome, fitnesses[genome]) for genome in genomes]


def _parts(space: Space, budget: Budget) -> tuple[list[str], dict[str, int]]:
    """Return the part of the budget that each unit spends from, and each part's total; "" is what these leave over."""
    split = budget.by_kind
    return [unit.group if unit.group in split else "" for unit in space.units], split | {"": budget.total - sum(split.values())}


def _ways(space: Space, parts: Sequence[str], targets: Mapping[str, int]) -> list[_Ways]:
    """Return, for every i, in how many ways the units from i on can spend what they may of each part."""
    ways: list[_Ways] = [{part: {0: 1} for part in targets}]
    for prices, part in zip(reversed(space.prices), reversed(parts), strict=True):
        sums: dict[int, int] = {}
        for cost, number in ways[-1][part].items():
            for price in prices:
                if (total := cost + price) <= targets[part]:
                    sums[total] = sums.get(total, 0) + number
        ways.append(ways[-1] | {part: sums})
    return ways[::-1]
