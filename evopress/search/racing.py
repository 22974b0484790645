"""Paired racing: candidates are measured on one small minibatch after another, all on the same, and those that are behind drop out.

What tells two genomes apart is the difference of their fitness on the same tokens, whose mean has a standard error over
minibatches. Tokens that are saved on a candidate that is clearly behind are spent on those that are close. Not in the paper, whose
selection has stages of fixed sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evopress.errors import EvoPressError
from evopress.search.record import StageRecord
from evopress.search.selection import not_finite
from evopress.search.strategy import Question
from evopress.units import Genome

_FEWEST = 3
"""Minibatches before a standard error says anything."""


@dataclass
class RaceRules:
    """How candidates race, in the settings of strategies that let them."""

    race_parts: int = 8
    """Minibatches that the tokens of a race are divided into, if nobody drops out."""
    race_margin: float = 2.0
    """Standard errors behind the leader at which a candidate drops out of a race."""
    race_accept: float = 1.0
    """Standard errors that the winner must be ahead of a current genome that has not dropped out; at most the margin counts."""

    def __post_init__(self) -> None:
        for name, least in (("race_parts", _FEWEST), ("race_margin", 0), ("race_accept", 0)):
            if not (value := getattr(self, name)) >= least:
                raise EvoPressError(f"search.strategy.{name}={value:g} is out of range: expected at least {least}")


class Race:
    """Genomes against each other, the current one first."""

    def __init__(self, genomes: Sequence[Genome], *, tokens: int, rules: RaceRules) -> None:
        """Take the candidates.

        Args: tokens: to spend in all, at most.
        """
        self.genomes, self._rules = tuple(genomes), rules
        self._part = max(tokens // (rules.race_parts * len(self.genomes)), 2)
        self._left = tokens
        self._running = list(range(len(self.genomes)))
        self._values: list[list[float]] = [[] for _ in self.genomes]
        self.tokens = self.evaluations = self.lost = 0
        """Spent so far, candidates so far, and those that dropped out because their fitness was not a finite number."""

    def ask(self) -> Question:
        """Return the candidates that are left, and one more minibatch."""
        return Question(tuple(self.genomes[i] for i in self._running), self._part)

    def tell(self, answer: Sequence[float]) -> None:
        """Take the fitnesses of what was asked for, and let those drop out that are behind.

        Raises: EvoPressError if their number is wrong, or none of them is finite.
        """
        running = self._running
        for i, value in zip(running, self.ask().numbers(answer), strict=True):
            self._values[i].append(value)
        self.tokens += self._part * len(running)
        self._left -= self._part * len(running)
        self.evaluations += len(running)
        finite = [i for i in running if math.isfinite(self._values[i][-1])]
        self.lost += len(running) - len(finite)
        if not finite:
            raise not_finite(self._values[running[0]][-1], len(running), f"on {self._part} tokens")
        self._running = finite
        leader = self._leader
        if len(self._values[leader]) >= _FEWEST:
            self._running = [i for i in finite if i == leader or not self._is_behind(i, leader, self._rules.race_margin)]

    @property
    def finished(self) -> bool:
        """Tell whether one is left, or too few tokens for another minibatch."""
        enough = self._left >= self._part * len(self._running)
        return len(self._running) == 1 or (not enough and self.num_parts >= _FEWEST)

    @property
    def num_parts(self) -> int:
        """Minibatches so far."""
        return max(map(len, self._values))

    @property
    def winner(self) -> int:
        """Index of the leader, or of the current genome while it is in the race and the leader not ahead of it beyond doubt."""
        leader = self._leader
        if leader and 0 in self._running and not self._is_behind(0, leader, self._rules.race_accept):
            return 0
        return leader

    @property
    def means(self) -> list[float]:
        """The leader's mean fitness, and of every other what it is behind that on the minibatches that it took part in."""
        leader = self._values[self._leader]
        return [float(np.mean(leader) + np.mean(np.subtract(values, leader[: len(values)]))) for values in self._values]

    def record(self) -> StageRecord:
        """Return the race as a stage of selection: tokens of a candidate that was in it to the end, and of all."""
        return StageRecord(self._part * self.num_parts, len(self.genomes), tuple(self.means), (self.winner,), self.tokens)

    def report(self) -> dict[str, list[int] | int]:
        """Say how long each candidate was in the race, in minibatches, and their tokens."""
        return {"tokens": self._part, "parts": [len(values) for values in self._values]}

    @property
    def _leader(self) -> int:
        return min(self._running, key=lambda i: (float(np.mean(self._values[i])), i))

    def _is_behind(self, one: int, other: int, errors: float) -> bool:
        differences = np.array(self._values[one]) - np.array(self._values[other])
        if not differences.any():
            return False
        return bool(differences.mean() > errors * differences.std(ddof=1) / math.sqrt(len(differences)))
