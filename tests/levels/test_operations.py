"""What fast paths may cost, in operations: sweeps and factors per block, forwards, loads and bytes per stage of selection."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from evopress.compress import gptq, sparsegpt
from evopress.compress.hessian import HessianSum
from evopress.fitness.population import PopulationEvaluator
from evopress.levels.build import ensure_database
from evopress.levels.live import LiveModel

INPUTS = 4  # of a Llama block: q, k and v share one, gate and up another; o and down have their own


@pytest.fixture
def calls(monkeypatch: Any) -> dict[str, int]:
    """Count the calls of what a build should do once per input, not once per unit and level."""
    counts: dict[str, int] = {}

    def counted(module: Any, name: str) -> None:
        original = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            key = f"{module.__name__.rsplit('.', 1)[-1]}.{name}"
            counts[key] = counts.get(key, 0) + 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    for module in (gptq, sparsegpt):
        counted(module, "sweep")
        counted(module, "inverse_factor")
    counted(sparsegpt, "regularized")
    counted(HessianSum, "add")
    return counts


def test_a_block_takes_a_hessian_a_factor_and_a_sweep_per_input(
    calls: dict[str, int], tiny_blocks: Any, tokens: Any, build_settings: Any, compressor: Any, tmp_path: Any
) -> None:
    database, _ = ensure_database(build_settings(tmp_path), tiny_blocks(num_blocks=2), tokens(6, 16), compressor)
    assert sum(len(unit.levels) for unit in database.space.units) == 2 * 7 * 3  # 42 sweeps one at a time
    batches = 2  # 6 sequences of 16 tokens, 64 tokens a forward
    assert calls == {"gptq.sweep": 2 * INPUTS, "gptq.inverse_factor": 2 * INPUTS, "HessianSum.add": 2 * INPUTS * batches}


def test_pruning_takes_a_sweep_per_input_too(
    calls: dict[str, int], tiny_blocks: Any, tokens: Any, build_settings: Any, tmp_path: Any
) -> None:
    pruner = sparsegpt.SparseGPT(sparsity=0.5, step=64, num_levels=3, dtype_bits=32)
    settings = build_settings(tmp_path, propagate=None, method="sparsity")
    ensure_database(settings, tiny_blocks(num_blocks=2), tokens(6, 16), pruner)
    assert calls["sparsegpt.sweep"] == calls["sparsegpt.inverse_factor"] == 2 * INPUTS


def test_the_best_recipe_takes_one_set_of_inverses_per_input(
    calls: dict[str, int], tiny_blocks: Any, tokens: Any, build_settings: Any, tmp_path: Any
) -> None:
    pruner = sparsegpt.SparseGPT(sparsity=0.5, step=64, num_levels=3, dtype_bits=32, recipe="best")
    settings = build_settings(tmp_path, propagate=None, method="sparsity")
    ensure_database(settings, tiny_blocks(num_blocks=2), tokens(6, 16), pruner)
    assert calls["sparsegpt.regularized"] == 2 * INPUTS
    assert "sparsegpt.sweep" not in calls


def test_a_stage_loads_each_level_that_it_needs_once_and_reads_no_other_byte(
    live_model: Any, tokens: Any, monkeypatch: Any
) -> None:
    live = live_model("llama", num_blocks=4)
    database, space = live.levels, live.space
    parent = tuple(i % 3 for i in range(len(space)))
    genomes = [parent]
    for unit in (2, 9, 9, 16, 23, 27):  # single switches, two of them in one unit
        level = (genomes[-1] if unit == 9 else parent)[unit]
        genomes.append((*parent[:unit], (level + 1) % 3, *parent[unit + 1 :]))
    needed = {(unit, genome[unit]) for genome in genomes for unit in range(len(space))}
    read: list[tuple[int, int]] = []
    original = type(database).read

    def recorded(self: Any, unit: int, level: int, *device: Any) -> Any:
        read.append((unit, level))
        return original(self, unit, level, *device)

    monkeypatch.setattr(type(database), "read", recorded)
    fresh = LiveModel(live.blocks, database)
    with torch.no_grad():
        PopulationEvaluator(fresh).final_states(genomes, tokens(3, 24, seed=1))
    assert sorted(read) == sorted(needed)
    assert fresh.num_loads == len(needed) < len(genomes) * len(space) / 4
    PopulationEvaluator(fresh).final_states(genomes, tokens(3, 24, seed=2))  # the next stage finds them decoded
    assert len(read) == len(needed)
    stored = sum(space.units[unit].levels[level].stored_bits for unit, level in needed) // 8
    dequantized = sum(4 * space.units[unit].size for unit, _ in needed)
    assert stored < dequantized / 4
