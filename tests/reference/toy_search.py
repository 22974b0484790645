"""Toy spaces, a budget and settings for tests of the search."""

from collections.abc import Sequence

from evopress.currencies import currency_of
from evopress.search.evolution import SearchSettings
from evopress.units import Budget, Level, Space, Unit

SETTINGS = SearchSettings(
    generations=12,
    num_offspring=8,
    survivors=[4, 2, 1],
    tokens=[10, 40, 160],
    initial_candidates=6,
    initial_tokens=20,
    max_switches=3,
    distribution="min_uniform",
    exchange="size",
)


def quant_space(
    sizes: Sequence[int], bits: Sequence[int] | Sequence[Sequence[int]] = (6, 5, 4, 3, 2), kinds: Sequence[str] = ()
) -> Space:
    """Build a space of bit widths: units of these sizes, with one list of widths for all or one list each."""
    units = []
    for i, size in enumerate(sizes):
        widths = bits if isinstance(bits[0], int) else bits[i]
        levels = tuple(Level(f"{b} bits", b * size, str(b), b * size) for b in widths)
        kind = kinds[i] if kinds else f"size_{size}"
        units.append(Unit(f"blocks.{i}.{kind}", i, kind, size, levels))
    return Space("quant", tuple(units))


def budget_of(space: Space, bits: float) -> Budget:
    """Make the budget of a number of bits per weight."""
    return Budget(int(bits * space.size), bits, "bits per weight")


def joint_space() -> Space:
    """Two modules that can be dropped, with two weights in each, and a weight in none."""
    keep = (Level("keep", 1, "keep", 0, "drop"), Level("drop", 0, "drop", 0, "drop"))
    units = [Unit(f"blocks.{i}.mlp", i, "mlp", 0, keep) for i in range(2)]
    bits = tuple(Level(f"{b} bits", b, str(b), b, "quant") for b in (4, 3, 2))
    units += [Unit(f"blocks.{i // 2}.{kind}", i // 2, kind, 1, bits) for i, kind in enumerate(("up", "down") * 2)]
    units.append(Unit("head", 2, "head", 1, bits))
    return Space("joint", tuple(units), currency_of("bits"), (None, None, 0, 0, 1, 1, None))
