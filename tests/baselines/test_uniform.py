from evopress.baselines import uniform_genomes
from evopress.units import Level, Space, Unit


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
