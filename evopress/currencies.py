"""What a genome can cost: bits as the paper counts them, bytes as stored or read, weights kept, modules and experts kept.

A currency prices one level of one unit, in whole numbers, and owns the words that tables, figures and pages use for it. Prices are
computed from a level's own facts, whatever source made it, so levels of several sources can stand in one space and under several
limits. A new currency is one entry here. Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from evopress.errors import EvoPressError

QUANT, SPARSITY, DROP = "quant", "sparsity", "drop"
"""Sources of levels: codes on a grid (or the weight as it is), pruned weights, modules that are kept or dropped."""
EXPERT = "expert"
"""Kind of a unit that is an expert, which is kept or dropped."""


class PricedUnit(Protocol):
    """What a price may depend on of a unit."""

    @property
    def kind(self) -> str: ...

    @property
    def size(self) -> int: ...

    @property
    def read(self) -> float: ...


class PricedLevel(Protocol):
    """What a price may depend on of a level."""

    @property
    def source(self) -> str: ...

    @property
    def cost(self) -> int: ...

    @property
    def stored_bits(self) -> int: ...

    @property
    def drops(self) -> bool: ...


@dataclass(frozen=True)
class Currency:
    """A way to count what a genome costs, and its words."""

    name: str
    """In settings: limits=[{currency: bytes, …}]."""
    price: Callable[[PricedUnit, PricedLevel], int]
    """Whole number of a level of a unit."""
    measure: str
    """What people read: "bits per weight"; the title of an axis."""
    of: Callable[[PricedUnit], int] = lambda unit: unit.size
    """What a unit counts for in an average of the measure; 0 leaves it out."""
    taken_away: bool = False
    """The measure is the share that is gone (sparsity), not what is spent."""
    less: str = "less compressed"
    """What a unit becomes that a switch puts up."""
    more: str = "more compressed"
    """What a unit becomes that a switch puts down."""
    scale: int = 1
    """Whole numbers of `price` in one of what the settings count (bytes are priced in bits)."""

    def measured(self, cost: float, size: int) -> float:
        """Return what a cost means to people: per weight, or the share that is gone."""
        return 1.0 - cost / size if self.taken_away else cost / size


def _coded_bits(unit: PricedUnit, level: PricedLevel) -> int:
    return level.stored_bits if level.source in (SPARSITY, DROP) else level.cost


def _weights(unit: PricedUnit, level: PricedLevel) -> int:
    if level.source == SPARSITY:
        return level.cost
    return 0 if level.drops else unit.size


def num_modules(unit: PricedUnit) -> int:
    """Return how many attention and MLP modules a unit stands for; weights stand for none."""
    return {"attention": 1, "mlp": 1, "block": 2, "pair": 4}.get(unit.kind, 0)


def _modules(unit: PricedUnit, level: PricedLevel) -> int:
    return 0 if level.drops else num_modules(unit)


def num_experts(unit: PricedUnit) -> int:
    """Return 1 for an expert that can be dropped; everything else stands for none."""
    return int(unit.kind == EXPERT)


def _experts(unit: PricedUnit, level: PricedLevel) -> int:
    return 0 if level.drops else num_experts(unit)


def _read(unit: PricedUnit, level: PricedLevel) -> int:
    return round(level.stored_bits * unit.read)


def _own(unit: PricedUnit, level: PricedLevel) -> int:
    return level.cost


CURRENCIES = {
    currency.name: currency
    for currency in (
        Currency("bits", _coded_bits, "bits per weight", less="more bits", more="fewer bits"),
        Currency(
            "bytes",
            lambda unit, level: level.stored_bits,
            "bits per weight as stored",
            less="more bytes",
            more="fewer bytes",
            scale=8,
        ),
        Currency(
            "read",
            _read,
            "bits per weight that a token reads",
            of=lambda unit: round(unit.size * unit.read),
            less="more bytes",
            more="fewer bytes",
            scale=8,
        ),
        Currency("weights", _weights, "sparsity", taken_away=True, less="less sparse", more="sparser"),
        Currency(
            "modules", _modules, "share of modules dropped", of=num_modules, taken_away=True, less="kept again", more="dropped"
        ),
        Currency(
            "experts", _experts, "share of experts dropped", of=num_experts, taken_away=True, less="kept again", more="dropped"
        ),
    )
}
"""By name."""

_OWN = {
    QUANT: replace(CURRENCIES["bits"], price=_own),
    SPARSITY: replace(CURRENCIES["weights"], price=_own),
    DROP: replace(CURRENCIES["modules"], price=_own, of=lambda unit: 1),
}


def own_currency(method: str) -> Currency:
    """Return what the paper counts with a method, the levels' own costs (bits, weights kept, units kept), and its words."""
    return _OWN.get(method, Currency("cost", _own, "cost per weight"))


def currency_of(name: str) -> Currency:
    """Return the currency of this name; raise EvoPressError if there is none."""
    if name not in CURRENCIES:
        raise EvoPressError(f"limits has the currency {name!r:.100}, which is unknown: choose one of {', '.join(CURRENCIES)}")
    return CURRENCIES[name]
