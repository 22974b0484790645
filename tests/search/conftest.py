"""Toy spaces for the search's tests."""

from collections.abc import Callable, Sequence

import pytest

from evopress.units import Budget, Level, Space, Unit


def _quant_space(
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


@pytest.fixture(scope="session")
def quant_space() -> Callable[..., Space]:
    return _quant_space


@pytest.fixture(scope="session")
def budget_of() -> Callable[[Space, float], Budget]:
    """Make the budget of a number of bits per weight."""
    return lambda space, bits: Budget(int(bits * space.size), bits, "bits per weight")
