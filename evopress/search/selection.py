"""Multi-step selection: stages with more tokens and fewer survivors each.

Source: paper, section 3 and Algorithm 1 (Selection).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from evopress.errors import EvoPressError
from evopress.units import Genome


def check_stages(tokens: Sequence[int], survivors: Sequence[int], num_offspring: int) -> None:
    """Raise EvoPressError unless the survivors go down from at most `num_offspring` to 1, on positive numbers of tokens.

    Args:
        tokens: of each stage, that every candidate is evaluated on.
        survivors: of each stage, the candidates that go on.
    """
    if len(survivors) != len(tokens):
        raise EvoPressError(f"search.survivors {survivors} and search.tokens {tokens} differ in length: give one of each per stage")
    if not tokens:
        raise EvoPressError("the selection has no stage: give at least one number of tokens with 1 survivor")
    if min(tokens) < 1:
        raise EvoPressError(f"the selection's tokens are {tokens}: every stage needs at least 1 token")
    if min(survivors) < 1 or survivors[-1] != 1 or list(survivors) != sorted(survivors, reverse=True):
        raise EvoPressError(f"the selection's survivors are {survivors}: they must descend to 1 and never rise")
    if survivors[0] > num_offspring:
        raise EvoPressError(
            f"the first stage keeps {survivors[0]} survivors of {num_offspring} offspring: "
            "keep at most as many as there are offspring"
        )


def select_fittest(genomes: Sequence[Genome], fitnesses: Sequence[float], k: int) -> list[int]:
    """Return the indices of the k fittest, best first; lower is better, not finite counts as +inf, of equals the first wins."""
    keys = [fitness if math.isfinite(fitness) else math.inf for _, fitness in zip(genomes, fitnesses, strict=True)]
    return sorted(range(len(keys)), key=keys.__getitem__)[:k]


def not_finite(value: float, candidates: int, where: str) -> EvoPressError:
    """Return the error of candidates of which even the best one's fitness is not finite, for `where`: "on 64 tokens"."""
    return EvoPressError(
        f"the best fitness of the {candidates} candidates {where} is {value}, not a finite number: look at the model's outputs at "
        "these levels (overflow in half precision, a damaged level) or raise the target"
    )
