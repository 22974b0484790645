from dataclasses import dataclass, replace
from typing import Any

import pytest

from evopress.baselines import uniform_genomes
from evopress.baselines.baseline import Planned
from evopress.baselines.uniform import Uniform
from evopress.compress.magnitude import Magnitude
from evopress.compress.sparse import PruneTo
from evopress.currencies import currency_of
from evopress.units import Budget, Level, Limit, Space, Unit


def space_of(*widths: tuple[int, ...]) -> Space:
    units = (
        Unit(f"u{i}", i, "q", 4, tuple(Level(f"{b} bits", 4 * b, str(b), 4 * b) for b in bits)) for i, bits in enumerate(widths)
    )
    return Space("quant", tuple(units))


def test_one_genome_for_each_level_that_all_units_have():
    assert uniform_genomes(space_of((4, 3, 2), (4, 3, 2))) == {
        "uniform_4": (0, 0),
        "uniform_3": (1, 1),
        "uniform_2": (2, 2),
    }


def test_levels_are_matched_by_label_not_by_index():
    assert uniform_genomes(space_of((6, 4, 3), (4, 3, 2))) == {"uniform_4": (1, 0), "uniform_3": (2, 1)}


@dataclass
class Asked:
    """What a uniform baseline looks at."""

    space: Space
    budget: Budget

    def uniform_name(self, level: Level) -> str:
        return level.key


def test_the_uniform_ones_beside_the_budget_keep_its_limits_or_do_not():
    space, stored = space_of((4, 3, 2), (4, 3, 2)), currency_of("bytes")
    budget = Budget(24, 3.0, "bits per weight")
    assert list(Uniform().find(Asked(space, budget))) == ["3"]
    limited = replace(budget, limits=(Limit(20, stored),))  # 3 bits take 24
    assert list(Uniform().find(Asked(space, limited))) == ["3", "2"]
    assert list(Uniform().find(Asked(space, replace(budget, total=25)))) == ["4", "3"]


@pytest.mark.parametrize("sparsity", [0.5, 0.6])
def test_pruned_units_are_all_at_the_target_in_levels_of_their_own_unless_all_have_it(sparsity: float) -> None:
    pruner = Magnitude(sparsity=0.5, step=20, num_levels=2)
    units = tuple(Unit(f"u{size}", 0, "q", size, pruner.levels((1, size))) for size in (100, 205))
    space = Space("sparsity", units)
    kept = {"u100": (40,), "u205": (82,)}
    budget = Budget(122 if sparsity == 0.6 else 50 + 103, sparsity, "sparsity")
    planned, added = Planned(space, budget, 0), []

    class Pruned(Asked):
        def compressor(self) -> Any:
            return pruner

        def hessians(self) -> None:
            added.append("hessians")

        def add_levels(self, name: str, compressor: PruneTo) -> Any:
            added.extend((name, compressor))
            return self

        def genome_of_last(self, genome: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(len(unit.levels) + level for unit, level in zip(units, genome, strict=True))

    found = Uniform().find(Pruned(space, budget))
    assert Uniform().num_genomes(planned) == len(found) == 1
    if sparsity == 0.5:
        assert found == {"0": (2, 2)} and Uniform().further(planned, pruner) is None and not added
    else:
        expected = PruneTo(pruner=pruner, kept=kept)
        assert found == {"uniform": (5, 5)} and Uniform().further(planned, pruner) == expected
        assert added == ["hessians", "uniform", expected]
