"""Depth pruning: attention and MLP modules, blocks or pairs of blocks are dropped (paper section 4.1); or experts (not in it)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from evopress.currencies import CURRENCIES, EXPERT, Currency, num_experts, num_modules
from evopress.errors import EvoPressError
from evopress.levels.modules import ATTENTION, BLOCK, DROP, KEEP, MLP, PAIR, dropped_modules
from evopress.methods.method import NO_REST, Rest
from evopress.methods.targets import check_targets, further_limits
from evopress.models.blocks import BlockShape
from evopress.settings import DropSettings, ModuleSettings, RunSettings
from evopress.units import Budget, Genome, Level, Limit, Space, Unit

_Place = tuple[str, int, str, int]
"""Name, first block, kind and number of weights of a unit."""
EXPERTS = CURRENCIES["experts"]
_AT_LEAST = replace(EXPERTS, measure="experts kept: at least", price=lambda unit, level: -EXPERTS.price(unit, level), scale=-1)
"""Experts that are there, negative: a limit on it is a floor."""


def floors(space: Space) -> tuple[Limit, ...]:
    """Return the limits that keep in every layer of experts as many as a token is sent to."""
    reads = {unit.group: unit.read for unit in space.units if num_experts(unit)}
    counts = Counter(unit.group for unit in space.units)
    return tuple(Limit(-round(read * counts[layer]), _AT_LEAST, layer) for layer, read in reads.items())


@dataclass(frozen=True)
class Modules:
    """Offers a level that keeps a module and one that drops it, without weights of its own; see `ModuleSource`."""

    settings: ModuleSettings = field(default_factory=ModuleSettings)
    dropped: Sequence[Any] = ()
    """What is gone from the start; named as in `exclude`."""

    @property
    def name(self) -> str:
        """See `ModuleSource`."""
        return "drop"

    def recipe(self) -> dict[str, Any]:
        """See `ModuleSource`."""
        gone = {"dropped": list(map(str, self.dropped))} if self.dropped else {}
        return {"granularity": self.settings.granularity, "exclude": list(map(str, self.settings.exclude)), **gone}

    def space(self, blocks: Sequence[BlockShape], *, dtype_bits: int) -> Space:
        """Return all units; those that are excluded, or gone from the start, have one level.

        Raises: EvoPressError if pairs come out odd, a name does not exist, or a unit is both excluded and gone.
        """
        count = len(blocks)
        if self.settings.granularity == "pair" and count % 2:
            raise EvoPressError(
                f"the model has {count} blocks, an odd number, and method.granularity=pair drops two at a time: use "
                "method.granularity=block"
            )
        places = self._places(blocks)
        if not places:
            raise EvoPressError(
                "method.granularity=expert drops experts, and no layer of them with one router is found in this model: choose "
                "another model, or another granularity"
            )
        excluded = self._named(self.settings.exclude, places, count, "exclude")
        gone = self._named(self.dropped, places, count, "dropped")
        if both := sorted(excluded & gone):
            raise EvoPressError(f"method.exclude keeps {both[0]}, which method.dropped drops: leave it out of one of them")
        units = []
        reads = {each.name: each.chosen / each.count for shape in blocks if (each := shape.experts) is not None}
        for name, block, kind, size in places:
            bits = size * dtype_bits
            keep = Level(label=KEEP, cost=1, key=KEEP, stored_bits=bits, source="drop")
            drop = Level(label=DROP, cost=0, key=DROP, stored_bits=0, source="drop")
            levels = (keep,) if name in excluded else (drop,) if name in gone else (keep, drop)
            read = reads[name.rpartition(".")[0]] if kind == EXPERT else 1.0
            units.append(Unit(name=name, block=block, kind=kind, size=size, levels=levels, read=read))
        return Space(method="drop", units=tuple(units))

    @property
    def even(self) -> bool:
        """See `ModuleSource`."""
        return False

    @property
    def width(self) -> int:
        """Blocks in a unit that is a block or more."""
        return 2 if self.settings.granularity == "pair" else 1

    def _places(self, blocks: Sequence[BlockShape]) -> list[_Place]:
        """Return name, block, kind and number of weights of every unit."""
        if self.settings.granularity == "block":
            return [(shape.name, index, BLOCK, shape.size) for index, shape in enumerate(blocks)]
        if self.settings.granularity == EXPERT:
            layers = [(index, shape.experts) for index, shape in enumerate(blocks) if shape.experts is not None]
            return [(f"{each.name}.{i}", index, EXPERT, each.size) for index, each in layers for i in range(each.count)]
        if self.settings.granularity == "pair":
            return [(f"{blocks[i].name}-{i + 1}", i, PAIR, blocks[i].size + blocks[i + 1].size) for i in range(0, len(blocks), 2)]
        return [
            place
            for index, shape in enumerate(blocks)
            for place in (
                (f"{shape.name}.attention", index, ATTENTION, shape.attention),
                (f"{shape.name}.mlp", index, MLP, shape.mlp),
            )
            if place[2] in shape.kinds
        ]

    def _named(self, entries: Sequence[Any], places: Sequence[_Place], num_blocks: int, key: str) -> set[str]:
        """Return the names of the units that a setting such as `method.exclude` means."""
        names = [name for name, *_ in places]
        meant: set[str] = set()
        for entry in map(str, entries):
            if entry.isdigit():
                found = {name for name, block, *_ in places if block <= int(entry) < block + self.width}
            else:
                found = {name for name in names if fnmatchcase(name, entry)}
            if not found:
                shown = entry if entry.isdigit() else repr(entry)
                raise EvoPressError(
                    f"method.{key} has {shown}, which is no unit of this model: give numbers of blocks from 0 to "
                    f"{num_blocks - 1}, or names such as {names[0]}, wildcards included"
                )
            meant |= found
        return meant


@dataclass(frozen=True)
class Drop:
    """See `Method`. Every unit costs 1 where it is kept, so the budget counts units."""

    settings: DropSettings
    sparsity: float
    exchange: str
    """The search's: it must not trade attention for MLP modules where as many of each are to go."""
    scale: float = 1.0
    """Factor on the generations that theory gives."""
    limits: tuple[Any, ...] = ()
    mutates: bool = False
    """Evolution draws offspring, so that there must be another genome than the first."""

    @classmethod
    def of(cls, run: RunSettings) -> Drop:
        """Take the method out of a run's settings; raise EvoPressError without a target."""
        if run.sparsity is None:
            raise EvoPressError("method drop needs a target: give sparsity=0.25, the share of blocks to drop")
        evolves = "search" in run.stages and getattr(run.search.strategy, "name", "evolution") == "evolution"
        return cls(
            run.method,
            run.sparsity,
            run.search.exchange,
            run.scale.depth_generations,
            tuple(run.limits),
            mutates=evolves and run.search.generations != 0,
        )

    @property
    def name(self) -> str:
        """See `Method`."""
        return "drop"

    @property
    def weights(self) -> None:
        """Weights stay as they are."""
        return None

    @property
    def modules(self) -> Drop:
        """Modules, checked against the target."""
        return self

    @property
    def currency(self) -> Currency | None:
        """Units that are kept."""
        return EXPERTS if self._of_experts else None

    @property
    def even(self) -> bool:
        """See `ModuleSource`."""
        return self.settings.balanced

    @property
    def _of_experts(self) -> bool:
        return self.settings.granularity == EXPERT

    @property
    def _source(self) -> Modules:
        return Modules(self.settings)

    def check(self, *, searching: bool, typed: str | None = None) -> None:
        """Refuse a sparsity outside (0, 1), and exchanges that cannot keep what the method promises."""
        if not 0.0 < self.sparsity < 1.0:
            what = "experts" if self._of_experts else "blocks"
            target = typed or f"sparsity={self.sparsity:g}"
            raise EvoPressError(f"{target} is out of range: expected a share of {what} in (0, 1), such as 0.25")
        check_targets(None, self.limits)
        if searching and self._of_experts and self.exchange != "fit" and (self.exchange, self.even) != ("name", True):
            raise EvoPressError(
                f"search.exchange={self.exchange} does not keep the number of experts in each block: use search.exchange=name with "
                "method.balanced=true, else search.exchange=fit"
            )
        if not searching or self.settings.granularity != "module":
            return
        if self.settings.balanced and self.exchange != "name":
            raise EvoPressError(
                f"search.exchange={self.exchange} would trade attention for MLP modules: use search.exchange=name, or allow it "
                "with method.balanced=false"
            )
        if not self.settings.balanced and self.exchange in ("name", "size"):
            raise EvoPressError(
                f"method.balanced=false has no effect with search.exchange={self.exchange}, which never trades attention for MLP "
                "modules: use search.exchange=any"
            )

    @property
    def target_is_level(self) -> bool:
        """Some units are kept and some are dropped."""
        return False

    def recipe(self) -> dict[str, Any]:
        """See `ModuleSource`."""
        return self._source.recipe()

    def space(self, blocks: Sequence[BlockShape], *, dtype_bits: int) -> Space:
        """Return all units; those that are excluded have one level.

        Raises: EvoPressError if the target drops no block or all, pairs come out odd, an excluded name does not exist, too few
            units are left, or for evolution just those that are to go.
        """
        layers = [shape.experts for shape in blocks if shape.experts is not None] if self._of_experts else []
        if self._of_experts and not layers:
            self._source.space(blocks, dtype_bits=dtype_bits)  # says that there are none
        count, most, what = len(blocks), len(blocks) - 1, "blocks"
        if layers:
            fewest = min(layers, key=lambda each: each.count)
            count, most, what = fewest.count, fewest.count - fewest.chosen, f"experts, of which a token is sent to {fewest.chosen}"
            if not self.settings.balanced:  # blocks may differ
                count, most = sum(each.count for each in layers), sum(each.count - each.chosen for each in layers)
        num_dropped = self.num_dropped(count)
        if not 0 < num_dropped <= most:
            raise EvoPressError(
                f"sparsity={self.sparsity:g} drops {num_dropped} of {count} {what}, expected 1 to {most}: give "
                f"a share of at least {math.ceil(1e4 / count) / 1e4:g} and below {(most + 1) / count:.4g}"
            )
        if self.settings.granularity == "pair" and (count % 2 or num_dropped % 2):
            what = f"the model has {count}" if count % 2 else f"sparsity={self.sparsity:g} drops {num_dropped} of {count}"
            raise EvoPressError(
                f"{what} blocks, an odd number, and method.granularity=pair drops two at a time: use method.granularity=block or "
                "another sparsity"
            )
        space = self._source.space(blocks, dtype_bits=dtype_bits)
        units = space.units
        budget = self.budget(space)
        if budget.total >= len(units):  # blocks that have one module each
            counts = Counter(unit.group for unit in units)
            none_of = " and ".join(f"none of {n} {kind} units" for kind, n in counts.items())
            least = math.ceil(1e4 / max(counts.values())) / 1e4
            raise EvoPressError(f"sparsity={self.sparsity:g} drops {none_of}: give a share of at least {least:g}")
        fixed = []
        for kind, kept in budget.by_kind.items() or (("", budget.total),):
            members = [unit for unit in units if kind in ("", unit.group)]
            free = sum(len(unit.levels) > 1 for unit in members)
            if free < len(members) - kept:
                raise EvoPressError(
                    f"method.exclude leaves {free} {kind or self.settings.granularity} units to drop, but sparsity="
                    f"{self.sparsity:g} drops {len(members) - kept}: exclude fewer or lower the sparsity"
                )
            fixed.append(f"{free} {kind or self.settings.granularity} units" if free == len(members) - kept else "")
        if self.mutates and all(fixed):
            raise EvoPressError(
                f"method.exclude leaves {' and '.join(fixed)} to drop, and sparsity={self.sparsity:g} drops all of them, which "
                "leaves evolution no other genome: exclude fewer, lower the sparsity, or set search.generations=0"
            )
        return space

    def num_dropped(self, num_blocks: int) -> int:
        """Return how many of so many blocks' attention modules, and MLPs, are dropped: the target, rounded down."""
        return math.floor(self.sparsity * num_blocks + 1e-9)

    def budget(self, space: Space, rest: Rest = NO_REST) -> Budget:
        """Return the units that are kept, of each kind the same number where attention and MLP are dropped equally."""
        kinds = Counter(unit.group for unit in space.units)
        width = self._source.width  # of as many attention modules as MLPs as many are dropped
        parts = tuple(Limit(count - self.num_dropped(count * width) // width, kind=kind) for kind, count in kinds.items())
        by_kind = parts if len(parts) > 1 and self.settings.balanced else ()
        limits = (*by_kind, *(() if self.settings.balanced else floors(space)), *further_limits(self.limits, space, rest))
        measure = EXPERTS.measure if self._of_experts else "depth sparsity"
        total = sum(part.total for part in parts)
        if self._of_experts and not self.settings.balanced:
            total = len(space) - self.num_dropped(len(space))
        return Budget(total=total, target=self.sparsity, measure=measure, limits=limits)

    def generations(self, space: Space) -> int:
        """Return k(n - k) / 1.5 times the scale, for k of the n units of the most frequent kind (paper appendix C, Table 8)."""
        kinds = Counter(unit.group for unit in space.units)
        n = max(kinds.values())
        k = self.num_dropped(n * self._source.width) // self._source.width
        return max(math.ceil(k * (n - k) / 1.5 * self.scale - 1e-9), 1)

    def uniform_name(self, level: Level) -> str:
        """No such row is shown."""
        return f"uniform_{level.key}"

    def costs(self, space: Space, genome: Genome) -> dict[str, Any]:
        """Return the share of attention and MLP modules, or of experts, that are dropped, and their number."""
        if self._of_experts:
            return {"sparsity": 1 - space.cost(genome) / len(space), **experts_dropped(space, genome)}
        dropped = len(dropped_modules(space, genome))
        return {"sparsity": dropped / _num_modules(space), "modules_dropped": dropped}

    def dense_costs(self, bits: int) -> dict[str, Any]:
        """Return sparsity 0."""
        return {"sparsity": 0.0, "experts_dropped" if self._of_experts else "modules_dropped": 0}


def experts_dropped(space: Space, genome: Genome) -> dict[str, int]:
    """Return the column of the result table that says how many experts are dropped; nothing where none can be."""
    there = sum(map(num_experts, space.units))
    return {"experts_dropped": there - space.cost_in(EXPERTS, genome)} if there else {}


def _num_modules(space: Space) -> int:
    return sum(num_modules(unit) for unit in space.units)
