"""Several budgets, and the smallest that keeps a limit, as function calls: what a run with `budgets=` or `max_kl=` finds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from in_process import invoke

import evopress
from evopress.errors import EvoPressError

FEW: dict[str, Any] = {
    "generations": 2,
    "num_offspring": 4,
    "survivors": [1],
    "tokens": [64],
    "initial_candidates": 4,
    "initial_tokens": 64,
}


@pytest.fixture
def model(tiny_folder: Callable[..., Path]) -> Any:
    return evopress.load_model(tiny_folder(), dtype="float32", device="cpu", sequence_length=32)


@pytest.mark.parametrize(
    ("method", "target", "settings", "budgets", "limit"),
    [
        ("quant", "bits=3", {"bits": 2.5, "group_size": 16}, [2.5, 3.5], 0.05),
        ("sparsity", "sparsity=0.5", {"sparsity": 0.5}, [0.45, 0.55], 0.05),
    ],
    ids=["quant", "sparsity"],
)
def test_they_are_those_of_a_run(
    method: str,
    target: str,
    settings: dict[str, Any],
    budgets: list[float],
    limit: float,
    tmp_path: Path,
    text_of_tiny: Callable[..., Any],
) -> None:
    cache = tmp_path / "cache"
    command = [
        f"+method={method}",
        "+debug=tiny",
        "search/strategy=evolution",
        "stages=[database,search]",
        "evaluation.every=0",
        *(f"search.{key}={json.dumps(value).replace(' ', '')}" for key, value in FEW.items()),
        *([] if method == "quant" else [f"method.centre={target.split('=')[1]}"]),
    ]
    runs = {
        "front": f"budgets={json.dumps(budgets).replace(' ', '')}",
        "smallest": f"max_kl={limit}",
    }
    for name, several in runs.items():
        done = invoke(*command, several, f"hydra.run.dir={tmp_path / name}", cache=cache, cwd=tmp_path)
        assert done.code == 0, done.text

    model = evopress.load_model("tiny", dtype="float32", device="cpu", sequence_length=64, cache=cache)
    text = text_of_tiny(model, cache)
    levels = evopress.build_levels(model, text.calibration, method=method, **settings)
    front = evopress.search_budgets(levels, text.search, budgets, **FEW)
    assert [found.budget for found in front] == [f"{budget:g}" for budget in sorted(budgets, reverse=method == "quant")]
    for found in front:
        there = json.loads((tmp_path / "front" / "points" / str(found.budget) / "genome.json").read_text())
        assert list(found.genome) == [unit["level"] for unit in there["units"]]
    assert evopress.evaluate(levels, text.search, front[0]).kl < evopress.evaluate(levels, text.search, front[1]).kl

    smallest = evopress.find_smallest(levels, text.search, max_kl=limit, **FEW)
    told = json.loads((tmp_path / "smallest" / "front.json").read_text())
    there = json.loads((tmp_path / "smallest" / "points" / told["answer"] / "genome.json").read_text())
    assert smallest.budget == told["answer"] and list(smallest.genome) == [unit["level"] for unit in there["units"]]
    assert evopress.evaluate(levels, text.search, smallest).kl <= limit


def test_they_go_on_in_a_folder_and_sizes_are_budgets_too(model: Any, tokens: Any, tmp_path: Path) -> None:
    levels = evopress.build_levels(model, tokens(8, 32), bits=2.5, group_size=16, levels=[4, 3, 2])
    ids = tokens(8, 32, seed=1)
    front = evopress.search_budgets(levels, ids, ["79kB", "77kB"], folder=tmp_path / "run", **FEW)
    assert [found.budget for found in front] == ["79kB", "77kB"]
    before = (tmp_path / "run" / "points" / "79kB" / "metrics.jsonl").read_bytes()
    again = evopress.search_budgets(levels, ids, ("79kB", "77kB"), folder=tmp_path / "run", **FEW)
    assert [found.genome for found in again] == [found.genome for found in front]
    assert (tmp_path / "run" / "points" / "79kB" / "metrics.jsonl").read_bytes() == before
    smallest = evopress.find_smallest(levels, ids, min_agreement=0.01, budgets=["79kB", "77kB"], folder=tmp_path / "run", **FEW)
    assert smallest.budget == "77kB" and smallest.genome == front[1].genome
    with pytest.raises(EvoPressError, match=r"other settings \(seed 0 there, 1 here"):
        evopress.search_budgets(levels, ids, ["79kB", "77kB"], folder=tmp_path / "run", seed=1, **FEW)


def test_what_cannot_be_met_or_is_no_budget_is_refused_before_any_search(model: Any, tokens: Any, tmp_path: Path) -> None:
    levels = evopress.build_levels(model, tokens(8, 32), bits=2.5, group_size=16, levels=[4, 3, 2])
    ids = tokens(8, 32, seed=1)
    for budgets, sentence in [
        ([1.5, 3], r"budget 1.5 is below the lowest level"),
        ([3, 3], r"budgets=\[3, 3\] has one twice"),
        ([], "budgets is empty"),
        ("3", r"takes no budgets='3'"),
        (3, "takes no budgets=3"),
        (["3", "60MB"], "mixes units"),
        (["much"], "is no budget"),
    ]:
        with pytest.raises(EvoPressError, match=sentence):
            evopress.search_budgets(levels, ids, budgets, folder=tmp_path / "none", **FEW)
    assert not list((tmp_path / "none").rglob("state.json"))
    for limit, sentence in [
        ({}, "find_smallest has no limit"),
        ({"max_kl": 1.0, "min_agreement": 0.5}, "are both given"),
        ({"max_kl": -1}, "max_kl=-1"),
        ({"max_kl": "low"}, "takes no max_kl='low'"),
        ({"max_kl": 1e-9, "budgets": [3]}, "is kept by no budget"),
    ]:
        with pytest.raises(EvoPressError, match=sentence):
            evopress.find_smallest(levels, ids, **limit, **FEW)


def test_a_start_that_exceeds_one_of_the_budgets_is_refused_before_any_search(model: Any, tokens: Any, tmp_path: Path) -> None:
    levels = evopress.build_levels(model, tokens(8, 32), bits=2.5, group_size=16, levels=[4, 3, 2])
    few = {**FEW, "starts": ["uniform_3"], "folder": tmp_path / "run"}
    sentence = r"^budget 2.5: search.starts has 'uniform_3', which exceeds the budget of 2.5 bits per weight"
    with pytest.raises(EvoPressError, match=sentence):
        evopress.search_budgets(levels, tokens(8, 32, seed=1), [2.5, 3.5], **few)
    with pytest.raises(EvoPressError, match=sentence):
        evopress.find_smallest(levels, tokens(8, 32, seed=1), budgets=[2.5, 3.5], max_kl=1.0, **few)
    assert not list((tmp_path / "run").rglob("metrics.jsonl"))


def test_a_budget_without_another_genome_is_refused_before_any_search(model: Any, tokens: Any, tmp_path: Path) -> None:
    """At 2.02 bits no unit has more than the lowest level."""
    ids = tokens(8, 32, seed=1)
    levels, at = (evopress.build_levels(model, tokens(8, 32), bits=bits, group_size=16, levels=[4, 3, 2]) for bits in (2.5, 2.02))
    few, stuck = {**FEW, "folder": tmp_path / "run"}, 'exchange "size" with at most 3 switches found no other genome'
    with pytest.raises(EvoPressError, match=f"^budget 2.02: {stuck}"):
        evopress.search_budgets(levels, ids, [2.02, 2.5, 3], **few)
    with pytest.raises(EvoPressError, match=f"^budget 2.02: {stuck}"):
        evopress.find_smallest(levels, ids, budgets=[2.02, 3], max_kl=1.0, **few)
    with pytest.raises(EvoPressError, match=f"^{stuck}"):
        evopress.search(at, ids, **few)
    assert not list((tmp_path / "run").rglob("*.json*"))
    assert len(evopress.search_budgets(levels, ids, [2.02, 3], folder=tmp_path / "first", **{**FEW, "generations": 0})) == 2
