from dataclasses import dataclass, replace

from evopress.baselines import uniform_genomes
from evopress.baselines.uniform import Uniform
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
