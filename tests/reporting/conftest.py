"""A made-up run in the shape of a real one: 210 units in 30 blocks, five levels, a search of 40 generations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from evopress.search.evolution import Evolution, SearchSettings
from evopress.units import Budget, Genome, Level, Space, Unit

SIZES = {
    "self_attn.q_proj": 331776,
    "self_attn.k_proj": 110592,
    "self_attn.v_proj": 110592,
    "self_attn.o_proj": 331776,
    "mlp.gate_proj": 884736,
    "mlp.up_proj": 884736,
    "mlp.down_proj": 884736,
}
BITS = (6, 5, 4, 3, 2)


def quant_space(blocks: int) -> Space:
    units = [
        Unit(
            f"model.layers.{block}.{name}",
            block,
            name.rpartition(".")[2],
            size,
            tuple(Level(f"{bits} bits", bits * size, str(bits), bits * size + size // 4) for bits in BITS),
        )
        for block in range(blocks)
        for name, size in SIZES.items()
    ]
    return Space("quant", tuple(units))


@dataclass
class Run:
    space: Space
    genome: Genome
    genomes: dict[str, Genome]
    records: list[dict[str, Any]]
    result: dict[str, Any]
    config: dict[str, Any]
    baselines: dict[str, float]


def switch(space: Space, genome: Genome, rng: np.random.Generator) -> tuple[Genome, list[list[int]]]:
    """Exchange one bit between two units of equal size, early blocks being the likelier to gain."""
    for _ in range(1000):
        up, down = sorted(rng.choice(len(space), size=2, replace=False))
        if space.units[up].size == space.units[down].size and genome[up] > 0 and genome[down] < len(BITS) - 1:
            child = list(genome)
            child[up] -= 1
            child[down] += 1
            return tuple(child), [[int(up), genome[up], child[up]], [int(down), genome[down], child[down]]]
    raise AssertionError("no switch was found")


def made_up_run(*, seed: int = 0, generations: int = 40) -> Run:
    rng = np.random.default_rng(seed)
    space = quant_space(30)
    genome: Genome = tuple(int(level) for level in rng.permutation([3] * 105 + [4] * 105))
    start = genome
    kl, records, tokens, evaluations = 1.9, [], 0, 0
    for generation in range(generations + 1):
        accepted, switches = generation > 0 and bool(rng.random() < 0.7), []
        if accepted:
            for _ in range(int(rng.integers(1, 4))):
                genome, more = switch(space, genome, rng)
                switches += more
            kl *= 0.985
        tokens += 16 * 512 + 5 * 2048 if generation else 32 * 512
        evaluations += 21 if generation else 32
        records.append(
            {
                "schema": 1,
                "generation": generation,
                "genome": list(genome),
                "accepted": accepted,
                "fitness": kl * float(rng.lognormal(0, 0.05)),
                "parent_fitness": kl * 1.02 if generation else None,
                "stages": [{"tokens": 512, "num_candidates": 16, "fitnesses": [kl] * 16, "survivors": [0, 3, 5, 7]}],
                "switches": switches,
                "tokens": tokens,
                "evaluations": evaluations,
                "seconds": generation * 7.3 + 4,
                "cost": space.cost(genome),
            }
        )
        if generation % 5 == 0:
            records[-1]["held_out"] = {"kl": kl * 1.08, "perplexity": {"python_docs": 20 * np.exp(kl * 1.05)}}

    def row(name: str, bits: float, kl: float) -> dict[str, Any]:
        return {
            "name": name,
            "bits_per_weight": bits,
            "bits_per_weight_with_metadata": bits + 0.25,
            "bytes": int(space.size * (bits + 0.25) / 8),
            "kl": kl,
            "top1_agreement": float(np.exp(-kl / 1.6)),
            "perplexity": {"python_docs": 20 * float(np.exp(kl * 0.97)), "text": 31 * float(np.exp(kl * 0.9))},
        }

    dense = {"name": "dense", "bytes": space.size * 2, "perplexity": {"python_docs": 20.1, "text": 31.4}}
    rows = [
        dense,
        row("uniform_3", 3.0, 0.45),
        row("uniform_2", 2.0, 4.31),
        row("best_of_32", space.cost(start) / space.size, 1.812),
        row("dp", space.cost(genome) / space.size, 1.334),
        row("evopress", space.cost(genome) / space.size, kl * 1.08),
    ]
    result = {
        "schema": 1,
        "rows": rows,
        "search": {
            "generations": generations,
            "tokens": tokens,
            "seconds": generations * 7.3 + 4,
            "evaluations": evaluations,
        },
        "database": {"path": "level_db/smollm2/quant-1f2e3d4c", "bytes": 271_000_000, "seconds": 92.4, "reused": False},
        "memory": {"peak_rss_bytes": 2_900_000_000, "peak_device_bytes": 0},
    }
    config = {
        "model": {"name": "smollm2_135m", "path": None, "dtype": "bfloat16"},
        "method": {"name": "quant", "bits": [6, 5, 4, 3, 2], "group_size": 128},
        "bits": 2.5,
        "data": {"name": "python_docs"},
        "search": {"name": "quantization", "num_offspring": 16, "survivors": [4, 1]},
        "scale": {"name": "mini"},
        "fitness": {"name": "kl"},
        "seed": 0,
    }
    genomes = {
        "uniform_3": space.uniform("3 bits"),
        "best_of_32": start,
        "dp": tuple(2 if unit.kind in ("k_proj", "v_proj") else 3 + (unit.block % 3 > 0) for unit in space.units),
        "evopress": genome,
    }
    baselines = {row["name"]: row["kl"] for row in rows[1:-1]}
    return Run(space, genome, genomes, records, result, config, baselines)


@pytest.fixture
def run() -> Run:
    return made_up_run()


@pytest.fixture
def space() -> Space:
    """A small space: 2 blocks of 7 units."""
    return quant_space(2)


@pytest.fixture
def evolution(space: Space) -> Callable[..., Evolution]:
    """Return a maker of searches at 3.5 bits per weight: `evolution(generations, offspring, (tokens, survivors), …, seed=0)`."""

    def make(generations: int, num_offspring: int, *stages: tuple[int, int], seed: int = 0) -> Evolution:
        settings = SearchSettings(
            generations=generations,
            num_offspring=num_offspring,
            survivors=[survivors for _, survivors in stages],
            tokens=[tokens for tokens, _ in stages],
            initial_candidates=4,
            initial_tokens=32,
            max_switches=3,
            distribution="min_uniform",
            exchange="size",
        )
        budget = Budget(total=int(3.5 * space.size), target=3.5, measure="bits per weight")
        rngs = [np.random.default_rng(seed) for seed in (2 * seed, 2 * seed + 1)]
        return Evolution(space, budget, settings, rng_initial=rngs[0], rng_mutation=rngs[1])

    return make
