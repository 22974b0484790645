"""What each unit holds, before and after: which records it is taken from, what is said and drawn of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from evopress.reporting.held import held_figure, held_in, held_words
from evopress.units import Level, Space, Unit

KEEP = (Level("keep", 1, "keep", 0, "drop"), Level("drop", 0, "drop", 0, "drop"))
BITS = tuple(Level(f"{bits} bits", bits, str(bits), bits, "quant") for bits in (4, 3, 2))


@pytest.fixture(scope="module")
def space() -> Space:
    """Two MLPs that can be dropped, a weight in each."""
    units = [Unit(f"blocks.{i}.mlp", i, "mlp", 0, KEEP) for i in range(2)]
    units += [Unit(f"blocks.{i}.up", i, "up", 1, BITS) for i in range(2)]
    return Space("joint", tuple(units), None, (None, None, 0, 1))


def records() -> list[dict[str, Any]]:
    return [
        {"generation": 0, "genome": [0, 0, 1, 1], "details": {"held": [9.0] * 4}},
        {"generation": 1, "genome": [0, 1, 0, 1], "details": {"held": [0.0, 0.0, 0.5, 0.25], "dropping": [2.0, 1.0, 0.0, 0.0]}},
        {"generation": 2, "genome": [0, 1, 0, 1], "details": {"held": [0.0, 0.75, 0.1, 0.0], "dropping": [3.0, 0.0, 0.0, 0.0]}},
        {"generation": 3, "genome": [0, 1, 0, 1], "details": {"deltas": []}},
        {"generation": 4, "genome": [0, 1, 0, 2]},
    ]


def test_the_first_and_the_last_round_that_asked_are_shown_with_the_genomes_that_they_asked_about(space) -> None:
    before, after = held_in(records(), space)
    assert (before.generation, before.genome, before.values) == (1, (0, 0, 1, 1), (2.0, 1.0, 0.5, 0.25))
    assert (after.generation, after.genome, after.values) == (2, (0, 1, 0, 1), (3.0, 0.75, 0.1, 0.0))
    assert len(held_in(records()[:2], space)) == 1
    damaged = [{**record, "details": {"held": [None] * 4}} for record in records()]
    assert held_in(damaged, space) == held_in([records()[-1]], space) == []


def test_who_held_most_is_said_without_modules_that_are_kept(space) -> None:
    before, after = held_words(records(), space)
    assert before == "Before, in round 1, most was held by blocks.0.up at 3 bits (0.5000), blocks.1.up at 3 bits (0.2500)."
    assert after == "After, in round 2, most was held by blocks.1.mlp at drop (0.7500), blocks.0.up at 4 bits (0.1000)."


def test_a_module_that_must_stay_counts_for_nothing(space, tmp_path) -> None:
    space = replace(space, units=(replace(space.units[0], levels=KEEP[:1]), *space.units[1:]))
    assert all("blocks.0.mlp" not in words for words in held_words(records(), space))
    held_figure(records(), space, tmp_path)
    assert "Before, in round 1: 0.7500 in all" in (tmp_path / "held.svg").read_text()


def test_the_figure_is_drawn_where_there_is_something_to_draw(space, tmp_path) -> None:
    assert held_figure(records()[-1:], space, tmp_path) == []
    drawn = held_figure(records(), space, tmp_path)
    assert [path.name for path in drawn] == ["held.png", "held.svg"] and all(path.stat().st_size > 2000 for path in drawn)
    text = (tmp_path / "held.svg").read_text()
    assert "Before, in round 1: 0.7500 in all" in text and "After, in round 2: 0.8500 in all" in text, (
        "kept modules are not counted"
    )
