"""Say if two genomes differ by more than chance: differences paired by seed or by sequence, and what counts as a tie.

The one place for it: the terminal, the page of a run, `results.md` and the tables of sweeps all ask here. Standard library only.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

STANDARD_ERRORS = 2.0
"""A difference within so many of its standard errors is a tie."""


@dataclass(frozen=True)
class Difference:
    """One genome against another, pair by pair: both on the same seed, or on the same sequence of text."""

    mean: float
    """NaN without pairs."""
    standard_error: float
    """NaN for less than two pairs, or where one of them is not finite."""
    num_pairs: int

    @classmethod
    def of(cls, ours: Mapping[str, float], theirs: Mapping[str, float]) -> Difference:
        """Pair what both have under one key, such as a seed."""
        return cls._of([ours[key] - theirs[key] for key in ours if key in theirs])

    @classmethod
    def of_sequences(cls, ours: Sequence[float], theirs: Sequence[float]) -> Difference:
        """Pair two rows of numbers of the same sequences; nothing is paired where they are not as many."""
        return cls._of([a - b for a, b in zip(ours, theirs, strict=True)] if len(ours) == len(theirs) else [])

    @classmethod
    def _of(cls, pairs: Sequence[float]) -> Difference:
        finite = all(map(math.isfinite, pairs))
        error = statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 and finite else math.nan
        return cls(statistics.fmean(pairs) if pairs else math.nan, error, len(pairs))

    @property
    def decided(self) -> bool:
        """Tell whether there are pairs enough to say anything, and they are not all the same: what varies nowhere is one pair."""
        return self.num_pairs >= 2 and math.isfinite(self.standard_error) and (self.standard_error > 0 or not self.mean)

    @property
    def is_tie(self) -> bool:
        """Tell whether the difference is no more than chance makes it."""
        return self.decided and abs(self.mean) <= STANDARD_ERRORS * self.standard_error

    def verdict(self, best: Callable[[Iterable[float]], float] | None) -> str:
        """Say "better", "worse" or "tie"; with fewer than two pairs, or equal ones, nothing can be said, and that is said of seeds.

        Args: best: `min` or `max`, which way the measure is good.
        """
        if not self.decided:
            return {0: "", 1: "one seed"}.get(self.num_pairs, "" if math.isnan(self.standard_error) else "alike on all seeds")
        if self.is_tie:
            return "tie"
        return "better" if best is not None and best((self.mean, 0.0)) == self.mean else "worse"
