import pytest
import torch

from evopress.errors import EvoPressError
from evopress.levels.build import ensure_database
from evopress.levels.live import LiveModel


class BrokenError(Exception):
    pass


@pytest.fixture(scope="module")
def live(live_model):
    return live_model("llama", num_blocks=4)


def mixed(live, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, (len(live.space),), generator=generator).tolist())


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2", "opt"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_genome_applied_and_left_restores_every_byte(family, dtype, live_model, weights_digest):
    live = live_model(family, num_blocks=2, dtype=dtype)
    linears = [linear for i in range(2) for linear in live.blocks.linears(i).values()]
    before, places = weights_digest(live.blocks.model), [linear.weight.data_ptr() for linear in linears]
    genome = mixed(live)
    with live.applied(genome):
        for unit, (linear, level) in enumerate(zip(linears, genome, strict=True)):
            assert torch.equal(linear.weight, live.levels.read(unit, level).decode())
            assert linear.weight.dtype == getattr(torch, dtype)
        assert weights_digest(live.blocks.model) != before
    assert weights_digest(live.blocks.model) == before
    assert [linear.weight.data_ptr() for linear in linears] == places, "the dense weights were copied"


def test_an_exception_inside_restores_every_byte_too(live, weights_digest):
    before = weights_digest(live.blocks.model)
    with pytest.raises(BrokenError), live.applied(mixed(live)):
        raise BrokenError
    assert weights_digest(live.blocks.model) == before


def test_a_failing_read_in_the_middle_restores_every_byte(live, weights_digest, monkeypatch):
    fresh = LiveModel(live.blocks, live.levels)
    before, read, count = weights_digest(live.blocks.model), type(live.levels).read, 0

    def failing(database, unit, level, *device):
        nonlocal count
        count += 1
        if count > 9:
            raise BrokenError
        return read(database, unit, level, *device)

    monkeypatch.setattr(type(live.levels), "read", failing)
    with pytest.raises(BrokenError), fresh.applied(mixed(live)):
        pass
    assert weights_digest(live.blocks.model) == before


def test_none_is_the_dense_model(live, weights_digest):
    before = weights_digest(live.blocks.model)
    with live.applied(None):
        assert weights_digest(live.blocks.model) == before


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda g: g[:-1], "27 levels but the level database has 28 units"),
        (lambda g: (*g, 0), "29 levels"),
        (lambda g: (*g[:-1], 3), "level 3 of .*down_proj does not exist: it has levels 0 to 2"),
        (lambda g: (-1, *g[1:]), "level -1 of .*q_proj does not exist"),
    ],
)
def test_a_wrong_genome_is_refused(live, change, sentence, weights_digest):
    before = weights_digest(live.blocks.model)
    with pytest.raises(EvoPressError, match=sentence), live.applied(change(mixed(live))):
        pass
    assert weights_digest(live.blocks.model) == before


@pytest.mark.parametrize("family", ["gemma2", "opt"])
def test_tied_embeddings_are_untouched(family, live_model):
    live = live_model(family, num_blocks=2)
    model = live.blocks.model
    embeddings = model.get_input_embeddings().weight
    before = embeddings.clone()
    assert model.get_output_embeddings().weight is embeddings
    with live.applied(mixed(live)):
        assert model.get_output_embeddings().weight is embeddings
        assert torch.equal(embeddings, before)


def test_what_is_kept_stays_within_its_bound_and_is_of_the_block_that_was_last(live):
    block_bytes = sum(linear.weight.numel() * 4 for linear in live.blocks.linears(0).values())
    small = LiveModel(live.blocks, live.levels, cache_bytes=block_bytes)
    for seed in range(4):
        with small.applied(mixed(live, seed)):
            assert sum(weight.nbytes for weight in small._decoded) == small._decoded.num_bytes <= block_bytes
    with small.applied((0,) * len(live.space)):
        pass
    loads = small.num_loads
    small.set_block(3, (0,) * 7)  # the block that was applied last is still there
    small.restore_block(3)
    assert small.num_loads == loads
    small.set_block(0, (0,) * 7)
    small.restore_block(0)
    assert small.num_loads == loads + 7


def test_a_weight_used_again_outlives_one_used_before_it(live):
    size = live.blocks.linears(0)["model.layers.0.self_attn.q_proj"].weight.numel() * 4
    two = LiveModel(live.blocks, live.levels, cache_bytes=2 * size)

    def loads(level):
        before = two.num_loads
        two._weight(0, level, torch.device("cpu"))
        return two.num_loads - before

    assert [loads(level) for level in (0, 1, 0, 2, 0, 1)] == [1, 1, 0, 1, 0, 1]


def test_walks_with_room_for_half_of_the_blocks_load_the_other_half(live):
    block_bytes = sum(linear.weight.numel() * 4 for linear in live.blocks.linears(0).values())
    half, loads = LiveModel(live.blocks, live.levels, cache_bytes=3 * block_bytes), []
    for _ in range(3):
        before = half.num_loads
        for block in range(4):
            half.set_block(block, (0,) * 7)
            half.restore_block(block)
        loads.append(half.num_loads - before)
    assert loads == [28, 7, 7]


def test_no_cache_reads_every_time(live):
    none = LiveModel(live.blocks, live.levels, cache_bytes=0)
    for _ in range(2):
        with none.applied(mixed(live)):
            pass
    assert none.num_loads == 2 * len(live.space)
    cached = LiveModel(live.blocks, live.levels)
    for _ in range(2):
        with cached.applied(mixed(live)):
            pass
    assert cached.num_loads == len(live.space)


@pytest.mark.parametrize("family", ["phi3", "opt"])
def test_a_database_of_another_model_is_refused(family, live, tiny_blocks):
    with pytest.raises(EvoPressError, match="of another model"):
        LiveModel(tiny_blocks(family, num_blocks=4), live.levels)


def test_a_database_of_a_model_of_other_widths_is_refused(live, tiny_blocks, monkeypatch):
    blocks = tiny_blocks("llama", num_blocks=4)
    blocks.linears(2)["model.layers.2.mlp.up_proj"].weight.data = torch.zeros(80, 32)
    with pytest.raises(EvoPressError, match="of another model"):
        LiveModel(blocks, live.levels)


def test_a_database_with_other_levels_still_applies(tmp_path, live, build_settings, tokens):
    from evopress.compress.gptq import GPTQ

    settings = build_settings(tmp_path, propagate="8")
    database, _ = ensure_database(settings, live.blocks, tokens(2, 8), GPTQ(bits=(8, 1), group_size=None))
    other = LiveModel(live.blocks, database)
    with other.applied((0, 1) * 14):
        pass
    with pytest.raises(EvoPressError, match="levels 0 to 1"), other.applied((2,) * 28):
        pass
