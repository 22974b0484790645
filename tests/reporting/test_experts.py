"""What experts got: which numbers are drawn, and that nothing is drawn of a model without them."""

from __future__ import annotations

from pathlib import Path

import pytest

from evopress.currencies import CURRENCIES
from evopress.levels.tied import tied
from evopress.reporting.experts import expert_figure, of_experts
from evopress.units import Level, Space, Unit


def levels(size: int) -> tuple[Level, ...]:
    return tuple(Level(f"{bits} bits", bits * size, str(bits), (bits + 1) * size, "quant") for bits in (4, 2))


@pytest.fixture
def space() -> Space:
    """One attention weight, and in blocks 1 and 2 three experts of two weights, of which a token is sent to one."""
    units = [Unit("blocks.0.attn.q_proj", 0, "q_proj", 8, levels(8))]
    for block in (1, 2):
        for expert in range(3):
            for part, size in (("up_proj", 6), ("down_proj", 3)):
                name = f"blocks.{block}.mlp.experts.{expert}.{part}"
                units.append(Unit(name, block, f"experts.{part}", size, levels(size), 1 / 3))
    return Space("quant", tuple(units))


def test_an_expert_s_number_is_of_all_its_weights(space: Space, tmp_path: Path) -> None:
    genome = (1, *(0, 1), *(1, 1), *(0, 0), *[0] * 6)
    found = of_experts(space, genome)
    assert len(found) == 6
    assert found[0, 1] == pytest.approx((4 * 6 + 2 * 3) / 9) and found[1, 1] == 2 and found[2, 1] == found[0, 2] == 4
    assert [path.name for path in expert_figure(space, genome, tmp_path)] == ["experts.png", "experts.svg"]
    assert not expert_figure(Space("quant", space.units[:1]), (0,), tmp_path)


def test_a_token_reads_a_share_of_the_experts(space: Space) -> None:
    read = CURRENCIES["read"]
    assert space.cost_in(read, (0,) * 13) == 8 * 5 + 6 * (6 + 3) * 5 // 3
    assert read.measured(space.cost_in(read, (0,) * 13), sum(read.of(unit) for unit in space.units)) == 5  # as stored


def test_experts_that_are_tied_are_one_unit_for_each_weight_of_a_block(space: Space) -> None:
    layer = tied(space, None, experts=True)
    assert [unit.name for unit in layer.units] == [
        "blocks.0.attn.q_proj",
        *(f"blocks.{block}.mlp.experts.{part}" for block in (1, 2) for part in ("up_proj", "down_proj")),
    ]
    genome = (0, 1, 0, 0, 1)
    for currency in (None, *CURRENCIES.values()):
        assert layer.priced(currency).cost(genome) == space.priced(currency).cost(layer.unfold(genome))
    assert of_experts(layer, genome)[2, 1] == pytest.approx((2 * 6 + 4 * 3) / 9)
