"""What allocators from outside the paper share: a number for every unit at every level, and the integer program of their sum.

They look at the search text alone, and their numbers depend on no budget: they are kept beside the level database, so that runs of
other budgets find them there, with what they took.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import MutableMapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor

from evopress.baselines.baseline import WEIGHTS, Baseline, Problem, remembered
from evopress.data.minibatch import Minibatch, draw_equal
from evopress.data.tokens import tokens_digest
from evopress.errors import EvoPressError
from evopress.fitness.gradients import Score
from evopress.levels.store import fingerprint
from evopress.levels.union import LevelSource
from evopress.progress import track
from evopress.search.program import best_in
from evopress.search.sensitivity import with_modules_kept
from evopress.settings import RunSettings
from evopress.units import BLOCKS, Genome, Space, is_module

DENSE = -1
"""The level of a weight that is the dense one."""
SEQUENCES = 8
"""Into which search text is divided, at least, as far as there are so many; and whose gradients AutoScheme adds up."""
TOGETHER = 64
"""Genomes that are measured at a time."""


@dataclass(frozen=True)
class Allocator(Baseline):
    """The genome with the least sum of numbers within the budget and all its limits; modules that could be dropped stay."""

    tokens: int
    """Search tokens of one measurement, at most."""
    serves = (WEIGHTS,)
    name: ClassVar[str]
    """Of its row."""

    def check(self, run: RunSettings) -> None:
        """See `Baseline`."""
        check_tokens(self.name, self.tokens)
        if run.method.include != [BLOCKS]:
            raise EvoPressError(
                f"baseline {self.name} supports method.include=[blocks] only, not {run.method.include}: leave it out of "
                "baselines.names, or change method.include"
            )
        if run.fitness.evaluator == "plain":
            raise EvoPressError(f"baseline {self.name} needs fitness.evaluator=population, not plain: leave one of them out")

    def find(self, problem: Problem) -> dict[str, Genome]:
        """Raise EvoPressError if a unit has no level with a finite number; without a genome within the budget there is no row."""
        space, text = problem.space, problem.search_tokens
        minibatch = draw_equal(*text.shape, tokens=self.tokens, sequences=SEQUENCES, rng=problem.rng)
        (ids,) = minibatch.tensors(text)
        kept = problem.kept(self.name, {"text": tokens_digest(ids), **asdict(self)})
        values = [
            [math.inf if value is None or not math.isfinite(value) else value for value in of_unit]
            for of_unit in self.values(problem, minibatch, ids, kept)
        ]
        values = with_modules_kept(space, values)
        for i, unit in enumerate(space.units):
            if not any(map(math.isfinite, values[i])):
                raise EvoPressError(
                    f"baseline {self.name} found no finite number for any level of {unit.name}: look at the model's outputs at "
                    "these levels, or leave it out of baselines.names"
                )
        genome = best_in(space, problem.budget, values)
        return {} if genome is None else {self.name: genome}

    @abstractmethod
    def values(
        self, problem: Problem, minibatch: Minibatch, ids: Tensor, kept: MutableMapping[str, Any]
    ) -> Sequence[Sequence[float | None]]:
        """Return values[unit][level], None for one that is not finite; those of modules are not looked at.

        Args:
            minibatch: which search text to look at.
            ids: its tokens, int64 [b, l].
            kept: what a run that looked at the same has left.
        """


def levels_everywhere(space: Space) -> list[Genome]:
    """Return a genome for every index of a level: all units that have it are there, others at their last; all modules stay."""
    count = max(len(unit.levels) for unit in space.units)
    return [tuple(0 if is_module(unit) else min(level, len(unit.levels) - 1) for unit in space.units) for level in range(count)]


def scored(
    problem: Problem, genome: Genome | None, errors_of: Sequence[Genome], minibatch: Minibatch, score: Score, *, together: int
) -> list[list[float]]:
    """Return scores[genome][unit], summed over batches of so many sequences; see `Problem.gradient_scores`."""
    starts = range(0, len(minibatch.indices), together)
    batches = [
        Minibatch(minibatch.indices[start : start + together], minibatch.lengths[start : start + together]) for start in starts
    ]
    scores = [problem.gradient_scores(genome, errors_of, batch, score) for batch in track(batches, "scores by gradients")]
    found: list[list[float]] = sum(scores).tolist()  # type: ignore[union-attr]
    return found


def by_unit(space: Space, scores: Sequence[Sequence[float]]) -> list[list[float]]:
    """Turn scores of `levels_everywhere`, [genome][unit], into values[unit][level]."""
    return [[scores[level][i] for level in range(len(unit.levels))] for i, unit in enumerate(space.units)]


def levels_of_weights(space: Space) -> list[int]:
    """Return of every unit how many levels it has to be measured alone at; modules stay, and have none."""
    return [0 if is_module(unit) else len(unit.levels) for unit in space.units]


def key_of(space: Space, genomes: Sequence[Genome]) -> str:
    """Return the key of what is kept of some genomes: it stands for the level that each of them has of every unit.

    A database of weights serves runs whose modules differ: some must stay there, or are gone from the start.
    """

    def named(genome: Genome) -> list[str]:
        return ["dense" if level == DENSE else unit.levels[level].key for unit, level in zip(space.units, genome, strict=True)]

    return f"genomes {fingerprint({'genomes': [named(genome) for genome in genomes]})}"


def alone(space: Space, unit: int, level: int) -> Genome:
    """Return the genome with one weight at a level and all others dense."""
    return tuple(level if i == unit else 0 if is_module(other) else DENSE for i, other in enumerate(space.units))


def measured_alone(
    problem: Problem, ids: Tensor, kept: MutableMapping[str, Any], *, levels: LevelSource | None = None
) -> list[list[float | None]]:
    """Return the KL divergence with one weight at a level and all others dense, as values[unit][level]; None: it is not finite.

    Modules stay, and have no values.

    Args: levels: that are measured, in the place of the run's own.
    """
    space = problem.space if levels is None else levels.space
    counts = levels_of_weights(space)
    genomes = [alone(space, i, level) for i, count in enumerate(counts) for level in range(count)]
    values = iter(divergences(problem, genomes, ids, kept, what="one weight at a time", levels=levels))
    return [[next(values) for _ in range(count)] for count in counts]


def divergences(
    problem: Problem,
    genomes: Sequence[Genome],
    ids: Tensor,
    kept: MutableMapping[str, Any],
    *,
    what: str,
    levels: LevelSource | None = None,
) -> list[float | None]:
    """Return the KL divergence of genomes, measured as far as it is not kept, some at a time; None: it is not finite."""

    def measured(key: str) -> list[float | None]:
        found: list[float | None] = remembered(
            problem, kept, key, lambda: [score.kl for score in problem.measure(batches[key], ids, what=what, levels=levels)]
        )
        return found

    space = problem.space if levels is None else levels.space
    parts = [genomes[start : start + TOGETHER] for start in range(0, len(genomes), TOGETHER)]
    keys = [key_of(space, some) for some in parts]
    batches = dict(zip(keys, parts, strict=True))
    found = {key: measured(key) for key in batches if key in kept}
    missing = [key for key in batches if key not in found]
    found |= {key: measured(key) for key in track(missing, f"{what}, batches of {TOGETHER}")}
    return [kl for key in keys for kl in found[key]]


def check_tokens(name: str, tokens: int) -> None:
    """Raise EvoPressError unless so many tokens can be divided."""
    if tokens < 2 * SEQUENCES:
        raise EvoPressError(
            f"baselines.options.{name}.tokens={tokens} is out of range: expected at least {2 * SEQUENCES}, 2 of each of "
            f"{SEQUENCES} sequences"
        )
