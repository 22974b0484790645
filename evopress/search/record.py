"""What one generation did, as it is written to the run's records."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from evopress.units import Genome


@dataclass(frozen=True)
class StageRecord:
    """One stage of one generation; indices count its candidates (in the last stage 0 is the parent)."""

    tokens: int
    num_candidates: int
    fitnesses: tuple[float, ...]
    survivors: tuple[int, ...]
    """Indices of the candidates that went on, best first."""
    spent: int | None = None
    """Tokens of all candidates together where they were not measured on as many each; None: tokens times candidates."""


@dataclass(frozen=True, kw_only=True)
class GenerationRecord:
    """One finished generation; generation 0 is the choice of the initial genome."""

    generation: int
    genome: Genome
    """The winner: parent of the next generation."""
    fitness: float | None
    """Of the winner in the last stage; None where nothing was evaluated (a uniform initial genome)."""
    accepted: bool
    """The winner is an offspring, not the parent."""
    parent_fitness: float | None
    """Of the previous parent on the last stage's minibatch; None in generation 0."""
    stages: tuple[StageRecord, ...] = ()
    """Empty where the strategy has no such thing."""
    switches: tuple[tuple[int, int, int], ...] = ()
    """(unit index, from level, to level) of the units in which the winner differs from the previous parent."""
    tokens: int
    """Tokens evaluated so far, summed over candidates."""
    evaluations: int
    """Candidates evaluated so far, summed over stages."""
    cost: int
    """Cost of the winner."""
    non_finite: int = 0
    """Candidates of this generation that lost because their fitness was not a finite number."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What else the strategy has to say, JSON-able."""
    milestone: bool = False
    """Measured on held-out text though `evaluation.every` generations have not passed, unless that is 0; not written down."""

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON-able values; a number that is not finite becomes None.

        `non_finite` is left out at 0, `details` where there are none, `spent` where it is tokens times candidates.
        """
        left_out = {"milestone", *(key for key in ("non_finite", "details") if not getattr(self, key))}
        values = {key: _jsonable(value) for key, value in asdict(self).items() if key not in left_out}
        for stage in values["stages"]:
            if stage["spent"] is None:
                del stage["spent"]
        return values


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
