"""The guided search's two ideas, slowly: every genome listed, and the shrinkage as the note has it, unit by unit."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

from evopress.units import Genome


def best_of_all(
    prices: Sequence[Sequence[int]],
    total: int,
    values: Sequence[Sequence[float]],
    near: Genome | None = None,
    most_changes: int | None = None,
) -> float | None:
    """Return the least sum of values over all genomes within the total that differ from `near` in few enough units."""
    best = None
    for genome in itertools.product(*(range(len(of_unit)) for of_unit in prices)):
        if sum(of_unit[level] for of_unit, level in zip(prices, genome, strict=True)) > total:
            continue
        if near is not None and most_changes is not None and sum(a != b for a, b in zip(genome, near, strict=True)) > most_changes:
            continue
        value = sum(of_unit[level] for of_unit, level in zip(values, genome, strict=True))
        best = value if best is None else min(best, value)
    return best


def shrunk(held: Sequence[Sequence[float]], errors: Sequence[float], kinds: Sequence[str]) -> list[float]:
    """Return alpha of every unit, all errors positive and all kinds' attributions of a positive sum."""
    m = [statistics.fmean(column) for column in zip(*held, strict=True)]
    v = [statistics.variance(column) / len(held) for column in zip(*held, strict=True)]
    alpha = [0.0] * len(errors)
    for kind in set(kinds):
        units = [u for u in range(len(errors)) if kinds[u] == kind]
        pi = sum(m[u] for u in units) / sum(errors[u] for u in units)
        r = {u: m[u] / (pi * errors[u]) for u in units}
        vr = {u: v[u] / (pi * errors[u]) ** 2 for u in units}
        tau2 = max(statistics.fmean((r[u] - 1) ** 2 - vr[u] for u in units), 0.05 * statistics.fmean(vr[u] for u in units))
        for u in units:
            alpha[u] = pi * max(1 + tau2 / (tau2 + vr[u]) * (r[u] - 1), 0.1) / 2
    return alpha
