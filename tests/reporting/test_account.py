"""The account of a search: what its records say, checked against searches whose every step is known."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from evopress.reporting import account
from evopress.search.evolution import Evolution
from evopress.search.strategy import run_search
from evopress.units import Space


@pytest.mark.parametrize("seed", range(4))
def test_ranks_of_winners_are_those_of_the_genomes(evolution: Callable[..., Evolution], seed: int) -> None:
    """Follow each accepted winner through all stages by its genome, and compare with what the records alone say."""
    rng = np.random.default_rng(seed)
    asked: list[list[tuple[Any, list[float]]]] = [[]]
    checked = 0

    def fitness(genomes: Any, *, tokens: int) -> list[float]:
        values = [float(value) for value in rng.random(len(genomes))]
        asked[-1].append((genomes, values))
        return values

    def check(record: Any) -> None:
        nonlocal checked
        if record.accepted:
            expected = []
            for genomes, values in asked[-1][:-1]:
                own = values[genomes.index(record.genome)]
                expected.append(1 + sum(value < own for value in values))
            assert account.winner_ranks(record.to_dict()["stages"]) == expected
            checked += 1
        asked.append([])

    run_search(evolution(6, 9, (64, 5), (128, 3), (256, 1), seed=seed), fitness, on_generation=check)
    assert checked >= 2


def test_records_that_do_not_say_have_no_ranks() -> None:
    assert account.winner_ranks([]) is None
    assert account.winner_ranks([{"survivors": []}]) is None
    assert account.winner_ranks([{"survivors": [0, 1]}, {"survivors": [7]}]) is None
    assert account.winner_ranks([{"survivors": [4]}]) == []


def test_stages_are_accounted_for() -> None:
    def stage(tokens: int, candidates: int, survivors: list[int]) -> dict[str, Any]:
        return {"tokens": tokens, "num_candidates": candidates, "fitnesses": [1.0], "survivors": survivors}

    records = [
        {"generation": 0, "stages": [stage(512, 32, [3])]},
        {"generation": 1, "accepted": True, "stages": [stage(100, 8, [5, 2]), stage(1000, 3, [2])]},
        {"generation": 2, "accepted": False, "stages": [stage(100, 8, [5, 2]), stage(1000, 3, [0])]},
    ]
    rows = [re.findall("<td>(.*?)</td>", row) for row in re.findall("<tr>(.*?)</tr>", account.stages(records))]
    assert rows[1:] == [
        ["stage 1", "100", "8", "2", "1,600", "21%", "2"],
        ["stage 2", "1,000", "3", "1", "6,000", "79%", ""],
    ]
    assert account.stages(records[:1]) == account.stages([]) == ""


def test_rounds_are_accounted_for_apart() -> None:
    def stage(tokens: int, candidates: int, **more: int) -> dict[str, Any]:
        return {"tokens": tokens, "num_candidates": candidates, "fitnesses": [1.0], "survivors": [0], **more}

    records = [
        {"generation": 0, "tokens": 500},
        {"generation": 1, "accepted": True, "details": {"held": []}, "stages": [stage(2048, 6)], "tokens": 500 + 6000 + 12288},
        {"generation": 2, "accepted": True, "details": {"held": []}, "stages": [], "tokens": 18788 + 6000},  # nothing to screen
        {"generation": 3, "details": {"race": {}}, "stages": [stage(11520, 17, spent=34560)], "tokens": 24788 + 34560},
        {"generation": 4, "accepted": True, "stages": [stage(256, 16), stage(4096, 3)], "tokens": 59348 + 16384},
    ]
    rows = [re.findall("<td>(.*?)</td>", row) for row in re.findall("<tr>(.*?)</tr>", account.stages(records))]
    assert rows[1:] == [
        ["rounds (3)", "11,520", "17", "1", "58,848", "78%", ""],
        ["stage 1", "256", "16", "1", "4,096", "5%", ""],
        ["stage 2", "4,096", "3", "1", "12,288", "16%", ""],
    ]


def test_balance_of_switches(space: Space) -> None:
    records = [
        {"accepted": True, "switches": [[0, 4, 2], [7, 1, 2], [99, 1, 2]]},  # two units are q_proj, one does not exist
        {"accepted": True, "switches": [[1, 3, 4]]},
        {"accepted": False, "switches": [[1, 4, 3]]},
    ]
    balance = account.switch_balance(records, space)
    assert balance["q_proj"] == (2, 1)
    assert balance["k_proj"] == (0, 1)
    assert balance["up_proj"] == (0, 0)


def test_ancestry_counts_what_was_taken_back() -> None:
    genomes = [[0, 1, 0, 1], [1, 0, 0, 1], [0, 1, 0, 1], [0, 1, 1, 0], [0, 1, 1, 0]]
    records: list[dict[str, Any]] = [{"generation": 0, "genome": genomes[0], "accepted": False, "switches": []}]
    for generation in range(1, 5):
        before, after = genomes[generation - 1], genomes[generation]
        changed = [[i, a, b] for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
        records.append({"generation": generation, "genome": after, "accepted": bool(changed), "switches": changed})
    text = account.ancestry(records)
    assert "differs from the initial one in 2 of 4 units" in text
    assert "4 units were changed on the way, 2 of them back to the level that they began with" in text
    assert "became the parent in generation 3." in text
    assert account.ancestry(records[:1]) == ""


def test_what_helped_most_comes_first(space: Space) -> None:
    records = [
        {"generation": g, "accepted": True, "fitness": 1.0, "parent_fitness": 1.0 + gain, "switches": [[0, 3, 2]]}
        for g, gain in enumerate([0.1, 0.5, 0.2, 0.05, 0.4, 0.3, 0.01], start=1)
    ]
    text = account.accepted_switches(records, space)
    first, second = text.split("<details>")
    assert re.findall(r"<tr><td>(\d+)</td>", first) == ["2", "5", "6", "3", "1"]
    assert re.findall(r"<tr><td>(\d+)</td>", second) == [str(g) for g in range(1, 8)]
    assert "0.500 (33.3%)" in first  # of the parent's
    assert "What helped most" not in account.accepted_switches(records[:5], space)
