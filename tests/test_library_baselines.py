"""The genomes that a search is compared with, and further limits, as function calls."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import evopress
from evopress.errors import EvoPressError


@pytest.fixture
def model(tiny_folder: Callable[..., Path]) -> Any:
    return evopress.load_model(tiny_folder(), dtype="float32", device="cpu", sequence_length=32)


def test_they_are_those_of_a_run(model: Any, tokens: Any, tmp_path: Path, weights_digest: Any) -> None:
    levels = evopress.build_levels(model, tokens(8, 32), bits=2.5, group_size=16, levels=[4, 3, 2])
    before, names = weights_digest(model.model), ["uniform", "dp", "fisher", "best_of_random"]
    numbers = {"num_random": 4, "random_tokens": 64, "options": {"fisher": {"tokens": 64}}}
    found = evopress.find_baselines(levels, tokens(8, 32, seed=1), names, folder=tmp_path / "run", **numbers)
    assert list(found) == ["uniform_3", "uniform_2", "best_of_4", "dp", "fisher"] and len(set(found.values())) == 5
    assert [found[f"uniform_{bits}"] for bits in (3, 2)] == [levels.space.uniform(f"{bits} bits") for bits in (3, 2)]
    within = {name: genome for name, genome in found.items() if name != "uniform_3"}
    assert all(levels.space.cost(genome) <= 2.5 * levels.space.size for genome in within.values())
    errors = levels.workspace.database.errors

    def error(genome: Any) -> float:
        return sum(of_unit[level] for of_unit, level in zip(errors, genome, strict=True))

    assert error(found["dp"]) == min(map(error, within.values()))
    assert weights_digest(model.model) == before
    assert all(evopress.evaluate(levels, tokens(4, 32, seed=2), genome).kl > 0 for genome in found.values())
    stored = json.loads((tmp_path / "run" / "baselines.json").read_text())
    assert {name: tuple(genome) for name, genome in stored["genomes"].items()} == found
    assert stored["spent"]["fisher"]["tokens"] == 3 * 64 and stored["spent"]["best_of_4"]["tokens"] == 4 * 64
    again = evopress.find_baselines(levels, tokens(8, 32, seed=1), names, folder=tmp_path / "run", **numbers)
    assert again == found and json.loads((tmp_path / "run" / "baselines.json").read_text()) == stored
    others = evopress.find_baselines(levels, tokens(8, 32, seed=1), ["best_of_random"], seed=1, **numbers)
    assert others.keys() == {"best_of_4"}


def test_depth_has_its_own(model: Any, tokens: Any) -> None:
    levels = evopress.build_levels(model, tokens(8, 32), method="drop", sparsity=0.5)
    found = evopress.find_baselines(levels, tokens(8, 32, seed=1), ["exhaustive", "shortgpt"], importance_tokens=128)
    assert list(found) == ["shortgpt", "exhaustive"] and all(sum(genome) == 2 for genome in found.values())


def test_further_limits_bind_searches_and_baselines(model: Any, tokens: Any) -> None:
    asked = {"group_size": 16, "levels": [4, 3, 2], "bits": 3.0}
    free = evopress.build_levels(model, tokens(8, 32), **asked)
    best = evopress.find_baselines(free, tokens(8, 32, seed=1), ["dp"])["dp"]
    units = [unit.name.rsplit(".", 1)[1] for unit in free.space.units]

    def bits(genome: Any) -> int:
        return sum(cost[level] for name, cost, level in zip(units, free.space.prices, genome, strict=True) if name == "v_proj")

    limit = [{"currency": "bits", "total": bits(best) - 1, "kind": "v_proj"}]
    levels = evopress.build_levels(model, tokens(8, 32), limits=limit, **asked)
    small = {"generations": 3, "num_offspring": 4, "survivors": [1], "tokens": [64], "initial_tokens": 64}
    found = evopress.search(levels, tokens(8, 32, seed=1), **small)
    within = evopress.find_baselines(levels, tokens(8, 32, seed=1), ["dp"])["dp"]
    assert bits(found.genome) < bits(best) and bits(within) < bits(best)


@pytest.mark.parametrize(
    ("names", "settings", "said"),
    [
        (["nope"], {}, r"^baselines\.names has 'nope', which is unknown: choose among uniform, "),
        ("dp", {}, r"^find_baselines takes no names='dp': expected "),
        (["dp"], {"num_random": 0}, r"^baselines\.num_random=0"),
        (["dp"], {"rounds": 3}, r"^find_baselines has no setting rounds: choose among names, num_random, "),
        (["best_of_random"], {"random_tokens": 10**6}, r"^baselines\.random_tokens asks for a minibatch of 1000000 tokens"),
    ],
)
def test_what_cannot_be_found_is_one_sentence(model: Any, tokens: Any, names: Any, settings: Any, said: str) -> None:
    levels = evopress.build_levels(model, tokens(8, 32), bits=3.0, group_size=16, levels=[4, 3, 2])
    with pytest.raises(EvoPressError, match=said):
        evopress.find_baselines(levels, tokens(8, 32, seed=1), names, **settings)


def test_levels_of_their_own_are_the_commands(model: Any, tokens: Any) -> None:
    levels = evopress.build_levels(model, tokens(8, 32), method="sparsity", sparsity=0.5)
    with pytest.raises(EvoPressError, match=r"lack: leave owl out, or .*\+method=sparsity baselines\.names=\[owl\]$"):
        evopress.find_baselines(levels, tokens(8, 32, seed=1), ["dp", "owl"], owl_tokens=128)
    beside = evopress.build_levels(model, tokens(8, 32), method="sparsity", sparsity=0.5, centre=0.4)
    with pytest.raises(EvoPressError, match=r"lack: leave uniform out, or .*\+method=sparsity baselines\.names=\[uniform\]$"):
        evopress.find_baselines(beside, tokens(8, 32, seed=1), ["dp", "uniform"])
    with pytest.raises(EvoPressError, match=r"^limits has 3: expected"):
        evopress.build_levels(model, tokens(8, 32), method="sparsity", sparsity=0.5, limits=[3])  # type: ignore[list-item]
