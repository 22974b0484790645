import math

import numpy as np
import pytest

from evopress.baselines import best_of_random
from evopress.errors import EvoPressError
from evopress.units import Budget, Level, Space, Unit

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
