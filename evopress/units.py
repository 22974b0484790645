"""The vocabulary every room shares: units, their levels, the space of genomes, limits and the budget. Standard library only."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from evopress.currencies import EXPERT, Currency, num_experts, num_modules, own_currency
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
    """What the level's source counts (quantization: bits x weights of the unit; pruning: weights kept; dropping: 1 where kept)."""
    key: str
    """The level's name in `genome.txt`, the file format of the authors' code (quantization: the bit width)."""
    stored_bits: int
    """Bits that storing the unit at this level takes, scales and zeros (or masks) included."""
    source: str = ""
    """What made it: "quant", "sparsity" or "drop"; see `currencies`."""

    @property
    def drops(self) -> bool:
        """Whether the unit is a module that is not there at this level."""
        return self.key == "drop"


@dataclass(frozen=True)
class Unit:
    """What gets a level: a linear weight, or an attention or MLP module when dropping."""

    name: str
    """Full module name: "model.layers.0.self_attn.q_proj"."""
    block: int
    """Index of the transformer block that holds it; the head and the embedding count on after the last one."""
    kind: str
    """Last part of the name: "q_proj"; outside the blocks "head" or "embedding" (a tied head's too); when dropping "attention",
    "mlp", "block", "pair" or "expert"."""
    size: int
    """Number of weights."""
    levels: tuple[Level, ...]
    """Least compressed first, so costs strictly descend."""
    read: float = 1.0
    """Share of it that a token reads, in (0, 1]: an expert by how many of how many a token is sent to, an embedding by one row."""

    @property
    def is_outside(self) -> bool:
        """Whether the unit lies in no block."""
        return self.kind in (HEAD, EMBEDDING)

    @property
    def group(self) -> str:
        """What it is one of, where as many of each are to stay: its kind, of an expert the layer that it is in."""
        return self.name.rpartition(".")[0] if self.kind == EXPERT else self.kind

    @property
    def kinds(self) -> set[str | None]:
        """Where it counts: among units of its kind, of its group, and of none in particular."""
        return {None, self.kind, self.group}

    def is_of(self, kind: str | None) -> bool:
        """Tell whether it counts where units of a kind, or of a group, do; None: all do."""
        return kind in self.kinds

    @property
    def place(self) -> str:
        """Where the unit lies, for people: the block's number, or "head" or "embedding"."""
        return self.kind if self.is_outside else str(self.block)


def is_module(unit: Unit) -> bool:
    """Tell whether a unit stands for modules, or an expert, that are kept or dropped, not for a weight."""
    return num_modules(unit) + num_experts(unit) > 0


def is_of_expert(unit: Unit) -> bool:
    """Tell whether a unit is an expert's weight, whose kind names what holds it: "experts.down_proj"."""
    return "." in unit.kind


@dataclass(frozen=True)
class Space:
    """All units of a model with their levels, priced in a currency: what a genome is a point of."""

    method: str
    units: tuple[Unit, ...]
    currency: Currency | None = None
    """What `cost` counts; None: the levels' own costs, which are all of one source."""
    inside: tuple[int | None, ...] = ()
    """Of every unit the index of the module that it lies in, where that can be dropped; what lies in a dropped one is free."""
    untied: Space | None = None
    """Where several weights are one unit: the space with a unit for each, as the level database has it."""
    members: tuple[tuple[int, ...], ...] = ()
    """Of every unit the indices of the units of `untied` that it stands for."""

    def __len__(self) -> int:
        return len(self.units)

    @cached_property
    def size(self) -> int:
        """Weights in all units together."""
        return sum(unit.size for unit in self.units)

    @property
    def whole(self) -> Space:
        """The space with a unit for each weight."""
        return self if self.untied is None else self.untied

    @cached_property
    def places(self) -> dict[str, int]:
        """Of every unit of `whole` the unit that gives it its level, by name."""
        if self.untied is None:
            return {unit.name: index for index, unit in enumerate(self.units)}
        return {self.untied.units[member].name: index for index, members in enumerate(self.members) for member in members}

    def unfold(self, genome: Sequence[int]) -> Genome:
        """Return a genome as one of `whole`."""
        return tuple(genome[self.places[unit.name]] for unit in self.whole.units)

    def fold(self, genome: Sequence[int]) -> Genome:
        """Undo `unfold`.

        Raises: EvoPressError if weights that are one unit have different levels.
        """
        if self.untied is None:
            return tuple(genome)
        for index, members in enumerate(self.members):
            for member in members[1:]:
                if genome[member] != genome[members[0]]:
                    one, other = (self.untied.units[i] for i in (members[0], member))
                    raise EvoPressError(
                        f"the genome has {one.name} at {one.levels[genome[members[0]]].label} and {other.name} at "
                        f"{other.levels[genome[member]].label}, which share one level here, {self.units[index].name}: give them "
                        f"one level, or use {'method.experts=each' if is_of_expert(one) else 'engine=none'}"
                    )
        return tuple(genome[members[0]] for members in self.members)

    @cached_property
    def words(self) -> Currency:
        """The currency that tables and figures show: the one that the space is priced in."""
        return self.currency or own_currency(self.method)

    @cached_property
    def prices(self) -> tuple[tuple[int, ...], ...]:
        """What every level of every unit costs by itself, as prices[unit][level]."""
        return self.prices_in(self.words)

    def prices_in(self, currency: Currency) -> tuple[tuple[int, ...], ...]:
        """Return what every level of every unit costs by itself in a currency."""
        if currency not in self._prices:
            self._prices[currency] = tuple(tuple(currency.price(unit, level) for level in unit.levels) for unit in self.units)
        return self._prices[currency]

    @cached_property
    def _prices(self) -> dict[Currency, tuple[tuple[int, ...], ...]]:
        return {}

    def priced(self, currency: Currency | None) -> Space:
        """Return the same units and levels, priced in a currency."""
        return replace(self, currency=currency, untied=None if self.untied is None else self.untied.priced(currency))

    def is_gone(self, genome: Sequence[int], unit: int) -> bool:
        """Tell whether a unit lies in a module that a genome drops, so that its level does not matter."""
        module = self.inside[unit] if self.inside else None
        return module is not None and self.units[module].levels[genome[module]].drops

    def total(self, prices: Sequence[Sequence[int]], genome: Sequence[int], kind: str | None = None) -> int:
        """Add up a genome's prices[unit][level], of all units or of one kind or group; what lies in a dropped module is free."""
        chosen = zip(self.units, prices, genome, strict=True)
        return sum(
            of_unit[level]
            for index, (unit, of_unit, level) in enumerate(chosen)
            if unit.is_of(kind) and not (self.inside and self.is_gone(genome, index))
        )

    def cost(self, genome: Sequence[int]) -> int:
        """Add up what a genome spends of the budget.

        Raises: EvoPressError as `check`.
        """
        return self.total(self.prices, self.check(genome))

    def cost_in(self, currency: Currency, genome: Sequence[int], kind: str | None = None) -> int:
        """Add up what a genome costs in any currency, on all units or on those of one kind.

        Raises: EvoPressError as `check`.
        """
        return self.total(self.prices_in(currency), self.check(genome), kind)

    def stored_bits(self, genome: Sequence[int]) -> int:
        """Add up the bits that storing a genome's levels takes, metadata included.

        Raises: EvoPressError as `check`.
        """
        return self.total(tuple(tuple(level.stored_bits for level in unit.levels) for unit in self.units), self.check(genome))

    @property
    def least_cost(self) -> int:
        """Cost with every unit at its most compressed level."""
        return self.total(self.prices, tuple(len(unit.levels) - 1 for unit in self.units))

    @property
    def greatest_cost(self) -> int:
        """Cost with every unit at its least compressed level."""
        return self.total(self.prices, (0,) * len(self.units))

    def uniform(self, label: str) -> Genome:
        """Return the genome with every unit at the level of this label, such as "3 bits".

        Raises: EvoPressError if a unit lacks it.
        """
        genome = []
        for unit in self.units:
            index = next((i for i, level in enumerate(unit.levels) if level.label == label), None)
            if index is None:
                labels = ", ".join(level.label for level in unit.levels)
                raise EvoPressError(f"{unit.name} has no level {label!r:.60}: choose one that all units have, it has {labels}")
            genome.append(index)
        return tuple(genome)

    def has(self, genome: Sequence[int]) -> bool:
        """Tell whether a genome is of the space's own levels; those that baselines add come after them."""
        return all(level < len(unit.levels) for unit, level in zip(self.units, genome, strict=True))

    def check(self, genome: Sequence[int]) -> Genome:
        """Return the genome as a tuple; raise EvoPressError unless it has one existing level for each unit."""
        if len(genome) != len(self.units):
            raise EvoPressError(
                f"the genome has {len(genome)} levels but the level database has {len(self.units)} units: "
                "use the database that the genome was found with"
            )
        checked = []
        for unit, given in zip(self.units, genome, strict=True):
            try:
                level = given if isinstance(given, bool) else operator.index(given)  # numpy's and torch's whole numbers, too
            except TypeError:
                level = given
            if type(level) is not int or not 0 <= level < len(unit.levels):
                most = len(unit.levels) - 1
                raise EvoPressError(f"level {level!r:.60} of {unit.name} does not exist: it has levels 0 to {most}")
            checked.append(level)
        return tuple(checked)


@dataclass(frozen=True)
class Limit:
    """A total that a genome may not exceed, beside the budget's own."""

    total: int
    """In whole numbers of the currency's prices."""
    currency: Currency | None = None
    """None: what the space is priced in."""
    kind: str | None = None
    """Units of which kind, or group, count; None: all."""

    def spent(self, space: Space, genome: Sequence[int]) -> int:
        """Return what a genome of the space spends of it."""
        return space.total(space.prices_in(self.currency or space.words), genome, self.kind)

    def bounds(self, space: Space) -> tuple[int, int]:
        """Return the least and the most that genomes spend of it, each unit for itself; what can be dropped is free."""
        counted = [
            (0 if module is not None and any(level.drops for level in space.units[module].levels) else min(prices), max(prices))
            for unit, prices, module in zip(
                space.units, space.prices_in(self.currency or space.words), space.inside or (None,) * len(space), strict=True
            )
            if unit.is_of(self.kind)
        ]
        return sum(least for least, _ in counted), sum(most for _, most in counted)

    @property
    def scale(self) -> int:
        """Prices that are one of what is shown."""
        return 1 if self.currency is None else self.currency.scale

    def __str__(self) -> str:
        counted = f" {self.currency.name}" if self.currency is not None else ""
        return f"{self.total // self.scale}{counted}{f' of {self.kind}' if self.kind else ''}"


@dataclass(frozen=True)
class Budget:
    """The total cost that a genome may spend, and what else limits it."""

    total: int
    target: float
    """What was asked for, in `measure`: 2.5."""
    measure: str
    """What the target counts: "bits per weight"."""
    limits: tuple[Limit, ...] = ()
    """Further ones, in other currencies or of one kind of unit (as many attention as MLP modules)."""
    beside: int = field(default=0, compare=False)
    """What the target counts beside the total, in the same: the bits of what is no unit."""
    wider: str = field(default="", compare=False)
    """What brings the levels to a target out of their reach; empty: a further level does."""

    def met_by(self, space: Space, genome: Sequence[int]) -> bool:
        """Tell whether a genome of the space is within the total and all further limits."""
        return space.total(space.prices, genome) <= self.total and all(
            limit.spent(space, genome) <= limit.total for limit in self.limits
        )

    def exceeded(self, space: Space, genome: Sequence[int]) -> str:
        """Say which limits a genome goes over: "9500 bytes (11520)"; nothing where it keeps the budget and all of them."""
        over = [f"{self.target:g} {self.measure}"] if space.cost(genome) > self.total else []
        for limit in self.limits:
            if (spent := limit.spent(space, genome)) > limit.total:
                over.append(f"{limit} ({spent // limit.scale})")
        return " and ".join(over)

    @property
    def by_kind(self) -> dict[str, int]:
        """The further limits that part the total between kinds of units, or groups, by their names."""
        return {limit.kind: limit.total for limit in self.limits if limit.currency is None and limit.kind is not None}

    def _shown(self, space: Space, cost: int) -> str:
        """Say a cost as the target is said: per weight, or as the size of the whole model."""
        if space.words.scale == 8:
            return f"{self.target * (cost + self.beside) / (self.total + self.beside):.4g} {self.measure}"
        return f"{space.words.measured(cost, space.size):g}"

    def check(self, space: Space) -> None:
        """Raise EvoPressError unless genomes of the space meet the budget and each limit, and not all meet the budget trivially."""
        for unit, prices in zip(space.units, space.prices, strict=True):
            if prices[-1] > min(prices):
                last, better = unit.levels[-1], unit.levels[prices.index(min(prices))]
                ours, least = (space.words.measured(price, unit.size) for price in (prices[-1], min(prices)))
                raise EvoPressError(
                    f"{unit.name} takes {ours:.4g} {space.words.measure} at {last.label}, its most compressed level, and "
                    f"{least:.4g} at {better.label}: leave {last.label} out, or give it larger groups"
                )
        taken = space.words.taken_away  # a sparsity that is higher spends less
        if self.total < space.least_cost:
            first, side, end, way = space.units[0], *(("above", "most", "lower") if taken else ("below", "least", "raise"))
            raise EvoPressError(
                f"target {self.target:g} {self.measure} is {side} what the {len(space)} units can reach "
                f"({end} {self._shown(space, space.least_cost)}; first: {first.name}, {end} {first.levels[-1].label}): "
                f"{self.wider or 'add a more compressed level'} or {way} the target"
            )
        if self.total > space.greatest_cost:
            side, way = ("below", "raise") if taken else ("above", "lower")
            raise EvoPressError(
                f"target {self.target:g} {self.measure} is {side} the least compressed level "
                f"({self._shown(space, space.greatest_cost)}): {self.wider or 'add a less compressed level'} or {way} the target"
            )
        for limit in self.limits:
            lowest, highest = limit.bounds(space)
            if lowest == highest == 0:  # floors are priced below nothing
                raise EvoPressError(f"limits has {limit}, which no level of this run counts towards: leave it out")
            if limit.total < lowest:
                raise EvoPressError(
                    f"limits has {limit}, but at their most compressed levels the units take {lowest // limit.scale} in total: "
                    "raise it, or add a more compressed level"
                )
