import importlib
import math

import numpy as np
import pytest

from evopress.baselines import best_of_random
from evopress.errors import EvoPressError
from evopress.progress import _Lines
from evopress.units import Budget, Level, Space, Unit

module = importlib.import_module("evopress.baselines.best_of_random")  # the package has a function of its name
SPACE = Space(
    "quant",
    tuple(Unit(f"u{i}", i, "q", 4, tuple(Level(f"{b} bits", 4 * b, str(b), 4 * b) for b in (4, 3, 2))) for i in range(10)),
)


def test_the_fittest_of_distinct_mixes_is_returned():
    calls = []

    def fitness(genomes, *, tokens):
        calls.append((list(genomes), tokens))
        return [float(sum(i * level for i, level in enumerate(genome))) for genome in genomes]

    rng = np.random.default_rng(0)
    best, values = best_of_random(SPACE, Budget(100, 2.5, "bits per weight"), fitness, num_candidates=32, tokens=64, rng=rng)
    ((genomes, tokens),) = calls  # one call: one minibatch for all
    assert tokens == 64
    assert len(set(genomes)) == len(values) == 32
    assert values == fitness(genomes, tokens=64)
    assert best == genomes[int(np.argmin(values))]
    assert all(SPACE.cost(genome) <= 100 and set(genome) == {1, 2} for genome in genomes)


def test_where_the_target_is_a_level_the_mix_is_uniform():
    best, values = best_of_random(
        SPACE,
        Budget(120, 3, "bits per weight"),
        lambda genomes, *, tokens: [1.0] * len(genomes),
        num_candidates=32,
        tokens=64,
        rng=np.random.default_rng(0),
    )
    assert best == (1,) * 10
    assert values == [1.0]


def test_what_is_told_begins_when_the_mixes_are_drawn_and_says_how_many_there_are(monkeypatch, caplog):
    open_at = []

    def drawn(*args, **kwargs):
        open_at.append(len(_Lines.open))
        return [(1,) * 10]

    def fitness(genomes, *, tokens):
        open_at.append(len(_Lines.open))
        return [1.0]

    monkeypatch.setattr(module, "random_mixes", drawn)
    with caplog.at_level("INFO"):
        best_of_random(
            SPACE,
            Budget(120, 3, "bits per weight"),
            fitness,
            num_candidates=32,
            tokens=64,
            rng=np.random.default_rng(0),
        )
    assert open_at == [0, 1]  # the time left is that of the models
    assert caplog.messages == ["best of 32 random, of which there is 1: 64 tokens each"]


def test_no_finite_fitness_is_an_error():
    with pytest.raises(EvoPressError, match="none of 4 random mixes"):
        best_of_random(
            SPACE,
            Budget(100, 2.5, "bits per weight"),
            lambda genomes, *, tokens: [math.nan] * len(genomes),
            num_candidates=4,
            tokens=64,
            rng=np.random.default_rng(0),
        )
