"""What a unit's level costs in fitness: the sensitivity of the unit, from its attributions, times the error of the level."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from evopress.errors import EvoPressError
from evopress.units import Genome, Space, is_module

_LEAST = 0.1
"""Least sensitivity of a unit, as a share of its kind's."""
_LEAST_KIND = 1e-3
"""Least sensitivity of a kind whose attributions do not add up to anything, as a share of the model's."""
_LEAST_MODULE = 0.02
"""Least of what dropping a module adds, as a share of the median of its kind's."""
_LEAST_SPREAD = 0.05
"""Least variance between units of a kind, as a share of what their attributions vary by over sequences."""


def errors_of(space: Space, errors: Sequence[Sequence[float]]) -> list[np.ndarray]:
    """Return the relative error of every unit at every level; that of a module is 1 where it is dropped, else 0.

    Args: errors: as a level database has them; of modules it has none that tell, and where there is nothing else, none at all.

    Raises: EvoPressError unless every level of a weight has an error.
    """
    modules = [is_module(unit) for unit in space.units]
    if len(errors) != len(space) and not all(modules):
        raise EvoPressError(
            f"there are errors of {len(errors)} units but {len(space)} units, and search/strategy=guided needs them all: use "
            "search/strategy=evolution, or build the level database again"
        )
    found = []
    for index, unit in enumerate(space.units):
        values = [float(level.drops) for level in unit.levels] if modules[index] else errors[index]
        if len(values) != len(unit.levels) or not all(math.isfinite(value) and value >= 0 for value in values):
            raise EvoPressError(
                f"the errors of {unit.name} are {list(values)}, and search/strategy=guided needs {len(unit.levels)} finite ones: "
                "use search/strategy=evolution, or build the level database again"
            )
        found.append(np.asarray(values, dtype=np.float64))
    return found


def is_droppable(space: Space, unit: int) -> bool:
    """Tell whether a unit is a module that can be dropped or is gone from the start, not one that must stay."""
    return any(level.drops for level in space.units[unit].levels)


def with_modules_kept(space: Space, values: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return values[unit][level] of weights, with those of modules: 0, and infinite for dropping one that is not gone anyway."""
    found = [list(of_unit) for of_unit in values]
    for index, unit in enumerate(space.units):
        if is_module(unit):
            stays = not all(level.drops for level in unit.levels)
            found[index] = [math.inf if stays and level.drops else 0.0 for level in unit.levels]
    return found


def errors_at(space: Space, errors: Sequence[np.ndarray], genome: Genome) -> np.ndarray:
    """Return the errors that attributions at a genome are of: 0 for what lies in a dropped module, 1 for what can be dropped."""
    found = np.array([of_unit[level] for of_unit, level in zip(errors, genome, strict=True)])
    for unit in range(len(space)):
        if is_droppable(space, unit):
            found[unit] = 1.0
        elif space.is_gone(genome, unit):
            found[unit] = 0.0
    return found


class Expected:
    """What is expected of genomes: the sum of values[unit][level]; what lies in a dropped module counts for nothing."""

    def __init__(self, space: Space, values: Sequence[Sequence[float]]) -> None:
        self.space, self.values = space, values
        self._members: dict[int, list[int]] = {}
        for unit, module in enumerate(space.inside):
            if module is not None:
                self._members.setdefault(module, []).append(unit)

    def of(self, genome: Genome) -> float:
        """Return what a genome holds."""
        chosen = enumerate(zip(self.values, genome, strict=True))
        return sum(of_unit[level] for unit, (of_unit, level) in chosen if not self.space.is_gone(genome, unit))

    def change(self, levels: Sequence[int], unit: int, by: int) -> float:
        """Return what moving a unit that is there by so many levels changes."""
        options, old, values = self.space.units[unit].levels, levels[unit], self.values[unit]
        changed = values[old + by] - values[old]
        if options[old + by].drops != options[old].drops:
            inside = sum(self.values[member][levels[member]] for member in self._members.get(unit, ()))
            changed += -inside if options[old + by].drops else inside
        return changed


def latest_sensitivities(space: Space, genome: Genome, held: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Return the sensitivity of every unit by one attribution: a module's is what dropping it adds, from its dense weights on.

    Args:
        held: attributions at the genome, [sequences, units].
        errors: those at the genome, as of `errors_at`.
    """
    kinds = [unit.kind for unit in space.units]
    modules = [is_droppable(space, unit) for unit in range(len(space))]
    found = of_modules(sensitivities(held, errors, kinds), held, kinds, modules)
    return from_dense(space, genome, found, errors)


def from_dense(space: Space, genome: Genome, sensitivities: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Count what dropping a module that is kept adds from its dense weights on: by what those in it hold at a genome, too.

    Args: errors: those at the genome.
    """
    found = sensitivities.copy()
    for unit, module in enumerate(space.inside):
        if module is not None and not space.is_gone(genome, unit):
            found[module] += sensitivities[unit] * errors[unit]
    return found


def of_modules(found: np.ndarray, held: np.ndarray, kinds: Sequence[str], modules: Sequence[bool]) -> np.ndarray:
    """Return sensitivities in which every module has its own: they differ by powers of ten, far beyond their errors.

    Drawn towards a mean that a few of them make up, all the others would be alike.

    Args:
        found: of all units.
        held: attributions [sequences, units].
    """
    found, means = found.copy(), held.mean(axis=0) / 2
    for kind in {kind for kind, module in zip(kinds, modules, strict=True) if module}:
        of_kind = np.array([module and each == kind for each, module in zip(kinds, modules, strict=True)])
        positive = means[of_kind & (means > 0)]
        least = _LEAST_MODULE * float(np.median(positive)) if len(positive) else 1.0
        found[of_kind] = np.maximum(means[of_kind], least)
    return found


def sensitivities(held: np.ndarray, errors: np.ndarray, kinds: Sequence[str]) -> np.ndarray:
    """Return α_u, the fitness per unit of relative error: each unit's own drawn towards its kind's, positive.

    The ratio r_u of a unit's sensitivity to its kind's has a standard error over sequences; it is shrunk to 1 by empirical Bayes,
    the variance of r between units of the kind being what they differ by beyond those errors.

    Args:
        held: attributions [sequences, units], at least 2 sequences.
        errors: e_u at the genome that they are of, [units], not negative; a unit without error says nothing and gets its kind's.
        kinds: of every unit.
    """
    means, variances = held.mean(axis=0), held.var(axis=0, ddof=1) / len(held)
    known = errors > 0
    overall = means[known].sum() / errors[known].sum() if known.any() else 0.0
    overall = overall if overall > 0 else 1.0
    found = np.full(len(kinds), overall)
    for kind in dict.fromkeys(kinds):
        of_kind = np.array([each == kind for each in kinds])
        used = of_kind & known
        if not used.any():
            continue
        of_all = max(means[used].sum() / errors[used].sum(), _LEAST_KIND * overall)
        scale = of_all * errors[used]
        ratios, noise = means[used] / scale, variances[used] / scale**2
        between = max(float(np.mean((ratios - 1) ** 2 - noise)), _LEAST_SPREAD * float(np.mean(noise)))
        weight = np.divide(between, between + noise, out=np.ones_like(noise), where=between + noise > 0)
        found[of_kind] = of_all
        found[used] = of_all * np.maximum(1 + weight * (ratios - 1), _LEAST)
    return found / 2
