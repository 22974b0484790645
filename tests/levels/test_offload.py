"""Blocks in host memory, carried to a device to be run: here the device is the host too, and what travels is copied and counted."""

import pytest
import torch

from evopress.fitness.population import PopulationEvaluator
from evopress.levels.live import LiveModel, enough_to_keep
from evopress.levels.modules import ModuleLevels
from evopress.methods.drop import Drop
from evopress.settings import DropSettings


@pytest.fixture
def carried(live_model, monkeypatch):
    """A live model that carries its blocks, and the sizes of the tensors that it has carried."""
    live, sizes = live_model("opt", num_blocks=3), []
    monkeypatch.setattr(live.blocks, "offload", True)
    monkeypatch.setattr(live.blocks, "_carried", lambda data: sizes.append(data.numel()) or data.clone())
    return live, sizes


def places(block):
    return [tensor.data_ptr() for tensor in (*block.parameters(), *block.buffers())]


def test_a_block_is_copied_and_the_very_tensors_come_back(carried, weights_digest):
    live, sizes = carried
    block, digest = live.blocks.blocks[1], weights_digest(live.blocks.model)
    before = places(block)
    with live.blocks.on_device(1):
        assert not set(places(block)) & set(before)
        for parameter in block.parameters():
            parameter.data.zero_()  # whatever happens there
    assert places(block) == before and weights_digest(live.blocks.model) == digest
    assert sum(sizes) == sum(parameter.numel() for parameter in block.parameters())


def test_an_exception_gives_the_block_back(carried, monkeypatch, weights_digest):
    live, sizes = carried
    block, digest = live.blocks.blocks[0], weights_digest(live.blocks.model)
    before = places(block)

    def full(data):
        if len(sizes) == 3:
            raise MemoryError
        sizes.append(data.numel())
        return data.clone()

    monkeypatch.setattr(live.blocks, "_carried", full)
    with pytest.raises(MemoryError), live.blocks.on_device(0):
        pass
    assert places(block) == before and weights_digest(live.blocks.model) == digest


def test_weights_that_levels_replace_are_not_carried(carried, tokens, weights_digest, monkeypatch):
    live, sizes = carried
    ids, digest = tokens(2, 12), weights_digest(live.blocks.model)
    genomes = [None, (0,) * len(live.space), (1,) * len(live.space), (0,) * len(live.space)]
    live.blocks.prepare(12)
    sizes.clear()
    state_of, states = PopulationEvaluator(live).final_states(genomes, ids)
    weights = {linear.weight.numel() for linear in live.blocks.linears(0).values()}
    assert sizes and not weights & set(sizes)
    assert weights_digest(live.blocks.model) == digest
    monkeypatch.setattr(live.blocks, "offload", False)
    expected_of, expected = PopulationEvaluator(live).final_states(genomes, ids)
    assert state_of == expected_of and all(torch.equal(a, b) for a, b in zip(states, expected, strict=True))


def test_modules_are_dropped_from_blocks_that_are_carried(carried, tokens, monkeypatch):
    dense, _ = carried
    blocks = dense.blocks
    space = Drop(DropSettings(), sparsity=0.5, exchange="name").space(blocks.shapes(), dtype_bits=32)
    ids, genome = tokens(2, 12), (1, 0, 0, 1, 1, 1)[: len(space)]
    found = PopulationEvaluator(LiveModel(blocks, ModuleLevels(space))).final_states([genome], ids)[1]
    monkeypatch.setattr(blocks, "offload", False)
    assert torch.equal(found[0], PopulationEvaluator(LiveModel(blocks, ModuleLevels(space))).final_states([genome], ids)[1][0])


def test_levels_are_decoded_where_they_are_used(live_model):
    live = live_model("llama", num_blocks=2)
    packed = live.levels.read(0, 0, "meta")
    assert packed.codes.is_meta and packed.decode().is_meta
    assert LiveModel(live.blocks, live.levels)._weight(0, 0, torch.device("meta")).is_meta


def test_a_whole_block_is_worth_keeping(live_model):
    space = live_model("llama", num_blocks=2).space
    assert enough_to_keep(space, 4) == 2**28
    block = sum(unit.size for unit in space.units if unit.block == 0)
    assert enough_to_keep(space, 2**20) == 2 * block * 2**20


def test_a_gpu_keeps_a_share_of_what_it_has_free_and_never_more_than_a_third(live_model, monkeypatch):
    space, gpu = live_model("llama", num_blocks=2).space, torch.device("cuda")
    two = 2 * sum(unit.size for unit in space.units if unit.block == 0) * 2**20
    for free, kept in ((16 * two, 2 * two), (4 * two, two), (2 * two, 2 * two // 3), (0, 2**28)):
        monkeypatch.setattr("evopress.levels.live.free_bytes", lambda device, free=free: free)
        assert enough_to_keep(space, 2**20, gpu) == kept
