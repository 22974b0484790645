"""Databases side by side: indices of the first stay, those of the others follow, one model applies them all."""

import pytest
import torch

from evopress.compress.sparse import PruneTo
from evopress.compress.sparsegpt import SparseGPT
from evopress.errors import EvoPressError
from evopress.levels.build import ensure_database
from evopress.levels.live import LiveModel
from evopress.levels.plan import plan_space
from evopress.levels.union import LevelUnion


@pytest.fixture(scope="module")
def blocks(tiny_blocks):
    return tiny_blocks("llama", num_blocks=2)


@pytest.fixture(scope="module")
def databases(tmp_path_factory, build_settings, blocks, tokens):
    """Three levels around a half, then other counts, a different number of them for each unit."""
    root = tmp_path_factory.mktemp("union")
    around = SparseGPT(sparsity=0.5, step=40, num_levels=1, dtype_bits=32)
    units = plan_space(blocks, around, method="sparsity").units
    chosen = PruneTo(pruner=around, kept={unit.name: [300, 200, 100][: 1 + i % 3] for i, unit in enumerate(units)})
    built = []
    for name, compressor in (("sparsity", around), ("owl", chosen)):
        settings = build_settings(root, propagate=None, method=name, recipe={"name": name})
        built.append(ensure_database(settings, blocks, tokens(4, 16), compressor)[0])
    return built


def test_levels_follow_those_of_the_first(databases):
    first, second = databases
    union = LevelUnion(databases)
    assert (union.folder, union.space.method) == (first.folder, "sparsity")
    for i, unit in enumerate(union.space.units):
        own, further = first.space.units[i].levels, second.space.units[i].levels
        assert unit.levels == (*own, *further)
        for level in range(len(unit.levels)):
            source = first.read(i, level) if level < 3 else second.read(i, level - 3)
            read = union.read(i, level)
            assert torch.equal(read.decode(), source.decode())
            assert int(read.mask.sum()) == unit.levels[level].cost
        with pytest.raises(EvoPressError, match=f"{unit.name} has no such level"):
            union.read(i, len(unit.levels))


def test_genomes_of_both_cost_what_they_say(databases):
    first, second = databases
    union = LevelUnion(databases)
    genome = tuple(i % len(unit.levels) for i, unit in enumerate(second.space.units))
    moved = union.genome_of_last(genome)
    assert moved == tuple(3 + level for level in genome)
    assert union.space.cost(union.space.check(moved)) == second.space.cost(genome)
    assert union.space.cost((1,) * 14) == first.space.cost((1,) * 14)


def test_a_union_of_one_is_that_one(databases):
    union = LevelUnion(databases[:1])
    assert union.space == databases[0].space
    assert union.genome_of_last((2,) * 14) == (2,) * 14


def test_a_live_model_applies_levels_of_all(databases, blocks, weights_digest):
    before = weights_digest(blocks.model)
    live = LiveModel(blocks, LevelUnion(databases))
    genome = tuple(i % len(unit.levels) for i, unit in enumerate(live.space.units))
    assert max(genome) > 3
    with live.applied(genome):
        weights = [linear.weight for index in range(2) for linear in blocks.linears(index).values()]
        for unit, weight, level in zip(live.space.units, weights, genome, strict=True):
            assert int((weight != 0).sum()) == unit.levels[level].cost
    assert weights_digest(blocks.model) == before


def test_databases_of_different_models_are_refused(databases, tiny_blocks, build_settings, tokens, tmp_path):
    blocks = tiny_blocks("phi3", num_blocks=2)
    compressor = SparseGPT(sparsity=0.5, step=40, num_levels=1, dtype_bits=32)
    settings = build_settings(tmp_path, propagate=None, method="sparsity")
    other, _ = ensure_database(settings, blocks, tokens(4, 16), compressor)
    with pytest.raises(EvoPressError, match="of different models"):
        LevelUnion([databases[0], other])
