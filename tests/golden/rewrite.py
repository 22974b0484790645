"""Rewrite the pinned traces: `python tests/golden/rewrite.py`. Review the diff like code."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evopress.search.evolution import Evolution, SearchSettings
from evopress.search.strategy import run_search
from evopress.units import Budget, Genome, Level, Space, Unit

SEARCH_TRACE = Path(__file__).parent / "search_trace.json"
SIZES = {"q": 3, "k": 1, "v": 1, "o": 3, "up": 8, "down": 8}


def search_trace() -> list[dict[str, Any]]:
    """Run a tiny search at 2.5 bits on three blocks, under an integer-valued fitness, and return its records."""
    units = tuple(
        Unit(f"blocks.{b}.{kind}", b, kind, n, tuple(Level(f"{x} bits", x * n, str(x), x * n) for x in (6, 5, 4, 3, 2)))
        for b in range(3)
        for kind, n in SIZES.items()
    )
    space = Space("quant", units)

    def fitness(genomes: Sequence[Genome], *, tokens: int) -> list[float]:
        # Squared level times a weight, plus a term that depends on the tokens, as a minibatch's would: whole numbers, so exact.
        weights = [3 + (7 * i) % 11 + (i * tokens) % 5 for i in range(len(space))]
        return [float(sum(w * level**2 for w, level in zip(weights, genome, strict=True))) for genome in genomes]

    settings = SearchSettings(
        generations=8,
        num_offspring=6,
        survivors=[3, 1],
        tokens=[2, 9],
        initial_candidates=4,
        initial_tokens=3,
        max_switches=3,
        distribution="min_uniform",
        exchange="size",
    )
    rng_initial, rng_mutation = np.random.default_rng(2024).spawn(2)
    budget = Budget(5 * space.size // 2, 2.5, "bits per weight")
    records: list[dict[str, Any]] = []
    run_search(
        Evolution(space, budget, settings, rng_initial=rng_initial, rng_mutation=rng_mutation),
        fitness,
        on_generation=lambda record: records.append(record.to_dict()),
    )
    return records


def main() -> None:
    lines = ",\n".join(json.dumps(record) for record in search_trace())
    SEARCH_TRACE.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
