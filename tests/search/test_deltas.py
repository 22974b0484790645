"""Measured one-step deltas: which neighbours there are, how they are drawn towards what was expected, and what the program gets."""

from __future__ import annotations

import math

import numpy as np
import pytest

from evopress.errors import EvoPressError
from evopress.search.deltas import Deltas
from evopress.search.sensitivity import Expected
from evopress.search.strategy import NEIGHBOURS_TOGETHER, most_genomes


def measure(deltas: Deltas, fitness) -> None:
    while not deltas.finished:
        deltas.tell([fitness(genome) for genome in deltas.ask().genomes])


def test_both_neighbours_of_every_unit_that_is_there_are_measured_beside_the_genome(joint_space) -> None:
    deltas = Deltas(joint_space, (0, 1, 0, 1, 0, 0, 2), tokens=65, parts=2)
    assert deltas.moves == [(0, 1), (1, -1), (2, 1), (3, -1), (3, 1), (6, -1)]
    asked = deltas.ask()
    assert asked.tokens == 32 and asked.genomes[0] == (0, 1, 0, 1, 0, 0, 2) and asked.genomes[4] == (0, 1, 0, 0, 0, 0, 2)
    weights = np.array([5.0, 3.0, 1.0, 1.0, 2.0, 2.0, 0.5])
    measure(deltas, lambda genome: float(weights @ genome))
    assert (deltas.tokens, deltas.evaluations) == (2 * 7 * 32, 14)
    values = deltas.values(Expected(joint_space, [[0.0] * len(unit.levels) for unit in joint_space.units]))
    assert values[0] == [0.0, 5.0] and values[1] == [-3.0, 0.0] and values[3] == [-1.0, 0.0, 1.0]
    assert values[2] == [0.0, 1.0, math.inf] and values[4] == [0.0, math.inf, math.inf] and values[6] == [math.inf, -0.5, 0.0]


def test_a_genome_without_neighbours_is_refused(quant_space) -> None:
    with pytest.raises(
        EvoPressError, match=r"none of the 3 units has a level beside its own .*delta_rounds and approach_tokens at 0"
    ):
        Deltas(quant_space((1,) * 3, bits=(3,)), (0,) * 3, tokens=8, parts=2)


def test_many_neighbours_are_measured_some_at_a_time(quant_space) -> None:
    space = quant_space((1,) * 40, bits=(4, 3, 2))
    deltas = Deltas(space, (1,) * 40, tokens=8, parts=2)
    sizes = []
    while not deltas.finished:
        sizes.append(len(deltas.ask().genomes))
        deltas.tell([float(len(sizes))] * sizes[-1])
    assert sizes == [NEIGHBOURS_TOGETHER + 1] * 2 + [17] * 2
    assert sum(sizes) == 2 * most_genomes(40) == deltas.evaluations
    assert deltas.shrunk(Expected(space, [[0.0] * 3] * 40)) == [0.0] * 80


def test_noise_gives_way_to_what_was_expected_and_signal_does_not(quant_space) -> None:
    space = quant_space((1,) * 30, bits=(4, 3, 2), kinds=("q",) * 30)
    rng = np.random.default_rng(0)
    true = rng.lognormal(size=30)
    right, nothing = [[0.0, 2 * t, 4 * t] for t in true], [[0.0] * 3] * 30

    def errors(expected, noise):
        deltas = Deltas(space, (1,) * 30, tokens=8, parts=2)
        measure(deltas, lambda genome: float(true @ genome) + noise * rng.normal())
        wanted = [by * t for t in true for by in (-1, 1)]
        raw = [each["measured"] for each in deltas.report(Expected(space, expected))]
        return np.std(np.subtract(deltas.shrunk(Expected(space, expected)), wanted)), np.std(np.subtract(raw, wanted))

    shrunk, raw = errors(right, 1.0)
    assert shrunk < 0.5 * raw, "what was expected is right but for its scale"
    shrunk, raw = errors(nothing, 0.01)
    assert shrunk == pytest.approx(raw, rel=0.1), "what was measured is certain"


def test_what_is_not_finite_is_not_to_be_chosen(quant_space) -> None:
    space = quant_space((1,) * 2, bits=(4, 3, 2))
    deltas = Deltas(space, (1, 1), tokens=4, parts=2)
    measure(deltas, lambda genome: float("nan") if genome == (2, 1) else float(sum(genome)))
    assert deltas.values(Expected(space, [[0.0, 1.0, 2.0]] * 2))[0] == [-1.0, 0.0, math.inf]
    with pytest.raises(EvoPressError, match="that of the current one nan"):
        Deltas(space, (1, 1), tokens=4, parts=2).tell([float("nan")] * 5)
