"""Metrics: the right numbers under names that do not change."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from evopress.reporting import metrics as metrics_module
from evopress.reporting.curve import held_out_curve
from evopress.reporting.metrics import (
    SearchMetrics,
    baseline_lines,
    best_fitness,
    best_metrics,
    final_metrics,
    gain,
    levels_table,
    search_history,
    switches_table,
)
from evopress.search.evolution import Evolution
from evopress.search.strategy import run_search
from evopress.units import Genome, Space

Make = Callable[..., Evolution]


def searched(space: Space, evolution: Make) -> list[dict[str, Any]]:
    """Run a toy search in three stages and return its records, one second each."""
    target = np.random.default_rng(5).integers(0, 5, len(space))

    def fitness(genomes: Any, *, tokens: int) -> list[float]:
        return [float(np.abs(np.array(genome) - target).sum()) + 1.0 for genome in genomes]

    records: list[dict[str, Any]] = []
    run_search(
        evolution(8, 8, (64, 4), (128, 2), (256, 1)),
        fitness,
        on_generation=lambda record: records.append({**record.to_dict(), "seconds": len(records) + 1.0}),
    )
    records[-1]["held_out"] = {"kl": 0.5, "top1_agreement": 0.75, "perplexity": {"python_docs": 20.0, "wiki": math.nan}}
    return records


def test_the_numbers_of_a_search(space: Space, evolution: Make) -> None:
    records = searched(space, evolution)
    metrics = SearchMetrics(space)
    numbers = [metrics.add(record) for record in records]
    assert "parent_fitness" not in numbers[0] and "gain" not in numbers[0] and "acceptance_rate" not in numbers[0]
    for index, (shown, record) in enumerate(zip(numbers[1:], records[1:], strict=True), start=1):
        assert shown["gain"] == pytest.approx(record["parent_fitness"] - record["fitness"])
        assert shown["gain"] >= 0
        assert (shown["gain"] > 0) == bool(shown["accepted"]) == bool(shown["num_switches"])
        assert shown["acceptance_rate"] == pytest.approx(sum(r["accepted"] for r in records[1 : index + 1]) / index)
        assert shown["distance"] == sum(a != b for a, b in zip(records[0]["genome"], record["genome"], strict=True))
        assert shown["generation_seconds"] == 1.0
        assert shown["tokens_per_second"] == record["tokens"] - records[index - 1]["tokens"]
        assert [shown[f"stage/{stage}/best"] for stage in (1, 2, 3)] == [min(s["fitnesses"]) for s in record["stages"]]
    assert sum(shown["accepted"] for shown in numbers) > 0
    last = numbers[-1]
    assert (last["held_out/kl"], last["held_out/top1_agreement"], last["held_out/ppl_python_docs"]) == (0.5, 0.75, 20.0)
    assert "held_out/ppl_wiki" not in last  # not a number
    kinds = {unit.kind for unit in space.units}
    assert {key.removeprefix("budget/") for key in last if key.startswith("budget/")} == kinds
    sizes = {kind: sum(unit.size for unit in space.units if unit.kind == kind) for kind in kinds}
    assert sum(last[f"budget/{kind}"] * size for kind, size in sizes.items()) == pytest.approx(records[-1]["cost"])


def test_a_resumed_search_goes_on_with_the_same_numbers(space: Space, evolution: Make) -> None:
    records = searched(space, evolution)
    whole = SearchMetrics(space)
    expected = [whole.add(record) for record in records]
    for cut in (1, 4):
        resumed = SearchMetrics(space, records[:cut])
        assert [resumed.add(record) for record in records[cut:]] == expected[cut:]


def test_earlier_records_are_counted_without_their_numbers(space: Space, evolution: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    records = searched(space, evolution)
    monkeypatch.setattr(metrics_module, "averages", lambda *args, **options: pytest.fail("what was told is reckoned again"))
    assert SearchMetrics(space, iter(records)).num_records == len(records)


def test_without_a_space_or_most_of_a_record() -> None:
    assert SearchMetrics().add({"generation": 0}) == {"accepted": 0.0, "num_switches": 0, "distance": 0}
    shown = SearchMetrics().add(
        {"generation": 3, "accepted": True, "fitness": 2.0, "genome": [1, 2], "stages": [{"fitnesses": [None]}]}
    )
    assert shown == {"fitness": 2.0, "accepted": 1.0, "acceptance_rate": 1.0, "num_switches": 0, "distance": 0}
    assert gain({"fitness": 1.0, "parent_fitness": None}) is None
    assert best_fitness({"fitnesses": [math.nan, 3.0, None, 2.0]}) == 2.0


def test_final_numbers() -> None:
    rows = [
        {"name": "dense", "kl": 0.0, "perplexity": {"docs": 10.0}},
        {
            "name": "evopress",
            "sparsity": 0.7,
            "kl": math.nan,
            "perplexity": {"docs": 20.0, "wiki": 30.0},
            "zero_shot": {"piqa": 0.6},
            "zero_shot_mean": 0.6,
        },
    ]
    assert final_metrics(rows) == {
        "final/dense/kl": 0.0,
        "final/dense/perplexity": 10.0,
        "final/dense/ppl_docs": 10.0,
        "final/evopress/sparsity": 0.7,
        "final/evopress/perplexity": 20.0,
        "final/evopress/ppl_docs": 20.0,
        "final/evopress/ppl_wiki": 30.0,
        "final/evopress/zero_shot_piqa": 0.6,
        "final/evopress/zero_shot_mean": 0.6,
    }
    assert final_metrics([]) == {}


def test_tables_of_levels_and_switches(space: Space) -> None:
    genome: Genome = tuple(index % 5 for index in range(len(space)))
    columns, rows = levels_table(space, genome)
    assert columns == ["unit", "block", "kind", "level", "bits per weight"]
    assert rows[1] == ["model.layers.0.self_attn.k_proj", 0, "k_proj", "5 bits", 5.0]
    assert len(rows) == len(space)
    records = [
        {"generation": 1, "accepted": False, "switches": []},
        {"generation": 2, "accepted": True, "switches": [[0, 3, 2], [3, 2, 3]], "fitness": 1.0, "parent_fitness": 1.5},
    ]
    columns, rows = switches_table(records, space)
    assert [row[:2] for row in rows] == [[2, "model.layers.0.self_attn.q_proj"], [2, "model.layers.0.self_attn.o_proj"]]
    assert rows[0][columns.index("from") :] == ["3 bits", "4 bits", 0.5]


def measured(kl: float, tokens: int = 100) -> dict[str, Any]:
    return {"kl": kl, "perplexity": {"docs": 10 * kl}, "num_tokens": tokens}


def test_the_best_is_of_one_text() -> None:
    records = [
        {"generation": 0, "held_out": measured(0.1, 50)},
        *({"generation": i, "held_out": measured(4.0 / i)} for i in (1, 4)),
    ]
    records += [{"generation": 5}, {"generation": 6, "held_out": measured(1.5)}]
    assert best_metrics(records) == {"best/kl": 1.0, "best/ppl_docs": 10.0, "best/generation": 4}
    assert best_metrics([{"generation": 0}]) == best_metrics([]) == {}


def test_baselines_are_lines_from_the_first_generation_to_the_last() -> None:
    records = [{"generation": i, "tokens": 10 * i, "seconds": i / 2, "held_out": measured(2.0)} for i in range(3)]
    rows = [{"name": name, "held_out_in_search": measured(kl)} for name, kl in (("dense", 0.0), ("dp", 1.5), ("evopress", 2.0))]
    numbers, axes = baseline_lines(held_out_curve(records, rows))
    assert numbers == {"baseline/dp/kl": 1.5, "baseline/dp/ppl_docs": 15.0}
    assert axes == [{"generation": 0, "tokens": 0, "seconds": 0.0}, {"generation": 2, "tokens": 20, "seconds": 1.0}]
    assert baseline_lines(held_out_curve([], rows)) == ({}, [])


def test_the_history_is_what_was_logged(run: Any) -> None:
    metrics = SearchMetrics(run.space)
    logged = [{**metrics.add(record), "generation": record["generation"]} for record in run.records]
    assert search_history(run.records, run.space) == logged
    assert [row["generation"] for row in logged] == list(range(41))
