"""The vocabulary every room shares: units, their levels, genomes and the budget. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral

from evopress.errors import EvoPressError

Genome = tuple[int, ...]
"""One level index per unit, in database order; 0 is the least compressed level."""

BLOCKS, HEAD, EMBEDDING = "blocks", "head", "embedding"
"""Parts of a model that can have units. A unit of a block is of a kind of its own; the last two are also the kinds of theirs."""


@dataclass(frozen=True)
class Level:
    """One stored version of a unit."""

    label: str
    """Shown to people: "3 bits"."""
    cost: int
    """What the level spends of the budget (quantization: bits x weights of the unit)."""
    key: str
    """The level's name in `genome.txt`, the file format of the authors' code (quantization: the bit width)."""
    stored_bits: int
    """Bits that storing the unit at this level takes, scales and zeros (or masks) included."""


@dataclass(frozen=True)
class Unit:
    """What gets a level: a linear weight, or an attention or MLP module when dropping."""

    name: str
    """Full module name: "model.layers.0.self_attn.q_proj"."""
    block: int
    """Index of the transformer block that holds it; the head and the embedding count on after the last one."""
    kind: str
    """Last part of the name: "q_proj"; outside the blocks "head" or "embedding" (a tied head's too); when dropping "attention",
    "mlp", "block" or "pair"."""
    size: int
    """Number of weights."""
    levels: tuple[Level, ...]
    """Least compressed first, so costs strictly descend."""

    @property
    def is_outside(self) -> bool:
        """Whether the unit lies in no block."""
        return self.kind in (HEAD, EMBEDDING)

    @property
    def place(self) -> str:
        """Where the unit lies, for people: the block's number, or "head" or "embedding"."""
        return self.kind if self.is_outside else str(self.block)


@dataclass(frozen=True)
class Space:
    """All units of a model with their levels: what a genome is a point of."""

    method: str
    units: tuple[Unit, ...]

    def __len__(self) -> int:
        return len(self.units)

    @cached_property
    def size(self) -> int:
        """Weights in all units together."""
        return sum(unit.size for unit in self.units)

    def cost(self, genome: Sequence[int]) -> int:
        """Add up what a genome spends of the budget."""
        return sum(unit.levels[level].cost for unit, level in zip(self.units, genome, strict=True))

    def cost_of(self, kind: str, genome: Sequence[int]) -> int:
        """Add up what a genome spends on the units of one kind."""
        return sum(unit.levels[level].cost for unit, level in zip(self.units, genome, strict=True) if unit.kind == kind)

    def stored_bits(self, genome: Sequence[int]) -> int:
        """Add up the bits that storing a genome's levels takes, metadata included."""
        return sum(unit.levels[level].stored_bits for unit, level in zip(self.units, genome, strict=True))

    @property
    def least_cost(self) -> int:
        """Cost with every unit at its most compressed level."""
        return sum(unit.levels[-1].cost for unit in self.units)

    @property
    def greatest_cost(self) -> int:
        """Cost with every unit at its least compressed level."""
        return sum(unit.levels[0].cost for unit in self.units)

    def uniform(self, label: str) -> Genome | None:
        """Return the genome with every unit at the level of this label; None if a unit lacks it."""
        genome = []
        for unit in self.units:
            index = next((i for i, level in enumerate(unit.levels) if level.label == label), None)
            if index is None:
                return None
            genome.append(index)
        return tuple(genome)

    def check(self, genome: Sequence[int]) -> Genome:
        """Return the genome as a tuple; raise EvoPressError unless it has one existing level for each unit."""
        if len(genome) != len(self.units):
            raise EvoPressError(
                f"the genome has {len(genome)} levels but the level database has {len(self.units)} units: "
                "use the database that the genome was found with"
            )
        for unit, level in zip(self.units, genome, strict=True):
            if not isinstance(level, Integral) or isinstance(level, bool) or not 0 <= level < len(unit.levels):
                most = len(unit.levels) - 1
                raise EvoPressError(f"level {level!s:.60} of {unit.name} does not exist: it has levels 0 to {most}")
        return tuple(int(level) for level in genome)


@dataclass(frozen=True)
class Budget:
    """The total cost that a genome may spend."""

    total: int
    target: float
    """What was asked for, in `measure`: 2.5."""
    measure: str
    """What the target counts: "bits per weight"."""
    split: tuple[tuple[str, int], ...] = ()
    """The part of the total that each kind of unit spends, where that is fixed too (as many attention as MLP modules)."""

    def met_by(self, space: Space, genome: Sequence[int]) -> bool:
        """Tell whether a genome is within the total and spends on each kind what the split says."""
        within = space.cost(genome) <= self.total
        return within and all(space.cost_of(kind, genome) == part for kind, part in self.split)

    def check(self, space: Space) -> None:
        """Raise EvoPressError unless some genome of the space meets the budget and not all of them do trivially."""
        if self.total < space.least_cost:
            first = space.units[0]
            least = space.least_cost / space.size
            raise EvoPressError(
                f"target {self.target:g} {self.measure} is below what the {len(space)} units can reach "
                f"(least {least:g}; first: {first.name}, least {first.levels[-1].label}): "
                "add a more compressed level or raise the target"
            )
        if self.total > space.greatest_cost:
            most = space.greatest_cost / space.size
            raise EvoPressError(
                f"target {self.target:g} {self.measure} is above the least compressed level ({most:g}): "
                "add a less compressed level or lower the target"
            )
