"""What every level is taken to hold of the fitness: its unit's sensitivity, as the last attributions had it, times its error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from evopress.errors import EvoPressError
from evopress.search.second_order import second_order_values
from evopress.search.sensitivity import Expected, errors_at, errors_of, is_droppable, latest_sensitivities
from evopress.search.strategy import Attribution, Expansion
from evopress.units import Space, is_module


class LevelValues:
    """values[unit][level] for the integer program, and the sensitivities that they are made of; without any, the plain errors."""

    def __init__(self, space: Space, errors: Sequence[Sequence[float]], *, averaged: int) -> None:
        """Begin without sensitivities.

        Args:
            errors: of the level database, [unit][level].
            averaged: number of attributions whose sensitivities are averaged.

        Raises: EvoPressError unless every level of a weight has an error.
        """
        self._space, self._averaged = space, averaged
        self._errors = errors_of(space, errors)
        self.droppable = [is_droppable(space, unit) for unit in range(len(space))]
        """Of every unit: it is a module that can be dropped, or is gone from the start."""
        self.sensitivities: list[list[float]] = []
        """Of every unit, by the last attributions, the latest last."""

    def plain(self) -> list[list[float]]:
        """Return the errors themselves."""
        return [of_unit.tolist() for of_unit in self._errors]

    def all(self) -> list[list[float]]:
        """Return values[unit][level] by the geometric mean of the sensitivities."""
        return self._of(_mean(self.sensitivities) if self.sensitivities else np.ones(len(self._errors)))

    def expected(self) -> Expected:
        """Return what is expected of genomes by them."""
        return Expected(self._space, self.all())

    def restore(self, sensitivities: Any) -> None:
        """Take the sensitivities of a state.

        Raises: ValueError or another error of Python's if they are damaged.
        """
        found = np.asarray(sensitivities, dtype=np.float64).reshape(-1, len(self._space))
        if not bool(np.isfinite(found).all()) or not bool((found > 0).all()):
            raise ValueError("its sensitivities are not all positive numbers")
        self.sensitivities = found.tolist()

    def take_over(self, sensitivities: Any) -> list[list[float]] | None:
        """Begin with the mean of the sensitivities found at another budget; return the values by it, None where there are none."""
        found = np.asarray(sensitivities, dtype=np.float64).reshape(-1, len(self._space))
        if not len(found):
            return None
        mean = _mean(found)
        self.sensitivities = [mean.tolist()]
        return self._of(mean)

    def learn(self, question: Attribution, answer: Any) -> dict[str, Any]:
        """Add the sensitivities of an attribution; return what each unit holds, for the round's record.

        A module that is kept holds nothing, and what dropping it would add stands apart.

        Raises: EvoPressError if the answer has not the numbers that were asked for, or some are not finite.
        """
        space, genome = self._space, question.genome
        held = np.asarray(answer, dtype=np.float64)
        if held.ndim != 2 or held.shape[1] != len(space) or len(held) < 2 or not bool(np.isfinite(held).all()):
            raise EvoPressError(
                f"the attribution returned {'x'.join(map(str, held.shape))} numbers for at least 2 sequences of "
                f"{len(space)} units, or some that are not finite: look at the model's outputs at these levels, or use "
                "search/strategy=evolution"
            )
        latest = latest_sensitivities(space, genome, held, errors_at(space, self._errors, genome))
        self.sensitivities = [*self.sensitivities, latest.tolist()][-self._averaged :]
        means = [round(float(value), 9) for value in held.mean(axis=0) / 2]
        modules = [is_module(unit) for unit in space.units]
        kept = [modules[i] and not unit.levels[genome[i]].drops for i, unit in enumerate(space.units)]
        found = {"held": [0.0 if there else value for there, value in zip(kept, means, strict=True)]}
        if any(modules):
            found["dropping"] = [value if there else 0.0 for there, value in zip(kept, means, strict=True)]
        return found

    def expanded(self, question: Expansion, answer: Any) -> list[list[float]]:
        """Return values[unit][level] by an expansion, what every level changes, drawn towards what the sensitivities say.

        Raises: EvoPressError if the answer has not the numbers that were asked for, or some are infinite.
        """
        space = self._space
        found = np.asarray(answer, dtype=np.float64)
        shape = (len(space), max(len(unit.levels) for unit in space.units))
        if found.ndim != 3 or found.shape[1:] != shape or len(found) < 2 or bool(np.isinf(found).any()):
            raise EvoPressError(
                f"the expansion returned {'x'.join(map(str, found.shape))} numbers for at least 2 sequences of {shape[0]} units "
                f"with {shape[1]} levels, or infinite ones: use search.strategy.second_order_rounds=0"
            )
        return second_order_values(space, question.genome, found, self.all())

    def _of(self, sensitivities: np.ndarray) -> list[list[float]]:
        return [(weight * of_unit).tolist() for weight, of_unit in zip(sensitivities, self._errors, strict=True)]


def _mean(sensitivities: Any) -> np.ndarray:
    """Return the geometric mean over attributions."""
    found: np.ndarray = np.exp(np.log(sensitivities).mean(axis=0))
    return found
