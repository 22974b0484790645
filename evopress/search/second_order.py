"""What every unit's levels change of the fitness, to second order around a genome, for the integer program.

Sensitivities take what a unit holds to be in proportion to its error, which is right where all errors grow or shrink together.
Around a genome that is good already, few units move: moving one from its level's weights Q to Q' changes the fitness by the
derivative along Q' - Q and half the curvature there. Both are of few sequences, so what they say is drawn towards what the
sensitivities say.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evopress.units import Genome, Space

_LEAST_SPREAD = 0.05
"""Least variance of changes around what was expected, as a share of what they vary by over sequences."""


def second_order_values(
    space: Space, genome: Genome, expanded: np.ndarray, expected: Sequence[Sequence[float]]
) -> list[list[float]]:
    """Return values[unit][level] for the integer program: what moving the unit there alone changes, 0 at the genome's own level.

    The rest of a change beyond what was expected, per what the two levels are expected to hold on average, has a standard error
    over sequences. It is shrunk to 0 by empirical Bayes, for each kind of units and each level that they go to: the variance of
    the rests of those units is what they differ by beyond their errors.

    Args:
        expanded: the answer to an `Expansion`, [sequences, units, levels], at least 2 sequences.
        expected: what every level holds by the sensitivities, expected[unit][level] > 0 but for levels without an error.
    """
    means, noises = expanded.mean(axis=0), expanded.var(axis=0, ddof=1) / len(expanded)
    values = [
        [of_unit[level] - of_unit[own] for level in range(len(of_unit))] for of_unit, own in zip(expected, genome, strict=True)
    ]
    groups: dict[tuple[str, int], list[int]] = {}
    for unit, own in enumerate(genome):
        for level in range(len(values[unit])):
            held = expected[unit][level] + expected[unit][own]
            if level != own and held > 0 and np.isfinite(means[unit, level]):
                groups.setdefault((space.units[unit].kind, level), []).append(unit)
    for (_, level), units in groups.items():
        told = np.array([values[unit][level] for unit in units])
        scale = np.array([expected[unit][level] + expected[unit][genome[unit]] for unit in units]) / 2
        rests, noise = (means[units, level] - told) / scale, noises[units, level] / scale**2
        between = max(float(np.mean(rests**2 - noise)), _LEAST_SPREAD * float(np.mean(noise)))
        weight = np.divide(between, between + noise, out=np.ones_like(noise), where=between + noise > 0)
        for unit, value in zip(units, told + scale * weight * rests, strict=True):
            values[unit][level] = float(value)
    return values
