"""What a compression method is to the pipeline: sources of levels, and a target that becomes a budget.

A new one costs a module here, a schema in `settings.py`, a YAML and a test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from evopress.compress.compressor import Compressor
from evopress.currencies import Currency
from evopress.models.blocks import BlockShape
from evopress.units import Budget, Genome, Level, Space


@dataclass(frozen=True)
class Rest:
    """What of a model is no unit: norms, and embedding and head unless these are included, each tied weight once."""

    bits: int = 0
    weights: int = 0


NO_REST = Rest()


class WeightSource(Protocol):
    """Offers levels that are compressed weights."""

    @property
    def name(self) -> str:
        """Begins the names of its level databases' folders."""

    @property
    def include(self) -> tuple[str, ...]:
        """What of a model has units: "blocks", and "head" or "embedding" beside them."""

    @property
    def propagate(self) -> str | None:
        """Key of the level through which activations leave a block while the database is built; None: dense."""

    @property
    def correction(self) -> float:
        """Share of what activations have lost there that levels make good, in [0, 1]."""

    @property
    def experts_together(self) -> bool:
        """Whether the experts of a block have one level for all their weights of a name."""

    def compressor(self, sizes: Sequence[int], *, dtype_bits: int) -> Compressor:
        """Return the compressor that makes the levels.

        Args:
            sizes: weights of every unit of the model; empty where they are not known yet.
            dtype_bits: bits of a weight of the model.

        Raises: EvoPressError if a setting is out of range or does not fit the model.
        """


class ModuleSource(Protocol):
    """Offers levels that keep or drop modules; its level database stores no weights."""

    @property
    def name(self) -> str:
        """Begins the names of its level databases' folders."""

    def space(self, blocks: Sequence[BlockShape], *, dtype_bits: int) -> Space:
        """Return all units with their levels.

        Args: blocks: all blocks of the model, in order; sizes may be missing where only names are known yet.

        Raises: EvoPressError if the target or a setting does not fit the model.
        """

    def recipe(self) -> dict[str, Any]:
        """Return what decides the space beside the model."""

    @property
    def even(self) -> bool:
        """Whether of every layer of experts as many are kept."""


class Method(Protocol):
    """A method with its target. The space of a run is the union of what its sources offer."""

    @property
    def name(self) -> str:
        """As `+method=` takes it; the name of its spaces."""

    @property
    def weights(self) -> WeightSource | None:
        """The source of compressed weights, if there is one."""

    @property
    def modules(self) -> ModuleSource | None:
        """The source of modules that can be dropped, if there is one."""

    @property
    def currency(self) -> Currency | None:
        """What the budget counts; None: the levels' own costs."""

    def check(self, *, searching: bool, typed: str | None = None) -> None:
        """Raise EvoPressError if no genome can meet the target, from settings alone, before any model work.

        Args:
            searching: refuse also a target that leaves nothing to search.
            typed: what the target is in sentences; None: the setting that gives it.
        """

    @property
    def target_is_level(self) -> bool:
        """Tell whether one level everywhere costs just what the target allows."""

    def budget(self, space: Space, rest: Rest = NO_REST) -> Budget:
        """Return the total cost that the target allows, and its further limits."""

    def generations(self, space: Space) -> int | None:
        """Return how many generations theory gives for this target; None where the settings must say."""

    def uniform_name(self, level: Level) -> str:
        """Name the row of the genome with this level everywhere."""

    def costs(self, space: Space, genome: Genome) -> dict[str, Any]:
        """Return the columns of the result table that say what a genome spends."""

    def dense_costs(self, bits: int) -> dict[str, Any]:
        """Return the same columns for the dense model, whose weights have so many bits."""
