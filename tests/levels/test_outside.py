"""Head and embedding as units: `method.include=[blocks,head,embedding]`."""

import json
from collections.abc import Sequence

import pytest
import torch
from transformers import AutoModelForCausalLM

from evopress.compress.gptq import GPTQ
from evopress.compress.sparsegpt import SparseGPT
from evopress.errors import EvoPressError
from evopress.evaluation.heldout import measure_held_out
from evopress.export import export_checkpoint
from evopress.fitness.measures import HeldOut, KLDivergence
from evopress.fitness.plain import PlainEvaluator
from evopress.fitness.population import PopulationEvaluator, measure_sums
from evopress.levels.build import ensure_database
from evopress.levels.hessians import HessianStore
from evopress.levels.live import LiveModel
from evopress.levels.outside import compress_embedding, token_shares
from evopress.levels.plan import planned
from evopress.levels.store import block_file
from evopress.models.blocks import BlockModel
from evopress.models.families import family_of
from evopress.models.loading import load_pretrained
from evopress.models.outline import outlined
from evopress.models.slots import Slot
from evopress.models.tiny import VOCABULARY, make_tiny, tiny_config
from evopress.stages import probe
from evopress.units import BLOCKS, EMBEDDING, HEAD
from experiments.benchmark.alive import HOST, Alive
from experiments.tiny_any import any_model

WHOLE = (BLOCKS, HEAD, EMBEDDING)
MODELS = [("llama", False), ("llama", True), ("qwen3", True), ("gemma2", True), ("gemma3_text", True), ("opt", True)]
"""Gemma 2 scales the embedding in its decoder and caps its logits softly, Gemma 3 scales inside its embedding."""
NUM_BLOCKS = 2


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Return a tiny model block by block, loaded anew."""
    root = tmp_path_factory.mktemp("models")

    def load(family: str = "llama", tied: bool = False, *, include: Sequence[str] = WHOLE, dtype: str = "float32") -> BlockModel:
        folder = root / f"{family}-{tied}"
        if not folder.exists():
            make_tiny(folder, family, num_blocks=NUM_BLOCKS, tied=tied)
        pretrained = load_pretrained(folder, dtype=dtype)
        blocks = BlockModel(pretrained.model, pretrained.family, include=include)
        blocks.tokenizer = pretrained.tokenizer
        return blocks

    return load


@pytest.fixture(scope="module")
def ids(tokens):
    return tokens(6, 16)


@pytest.fixture(scope="module", params=MODELS, ids=lambda model: f"{model[0]}-{'tied' if model[1] else 'untied'}")
def live(request, load, tmp_path_factory, build_settings, ids, compressor):
    """A tiny model with a database of all of it; dense."""
    blocks = load(*request.param)
    database, reused = ensure_database(build_settings(tmp_path_factory.mktemp("database")), blocks, ids, compressor)
    assert not reused
    return LiveModel(blocks, database)


def is_tied(blocks):
    return blocks.model.get_input_embeddings().weight is blocks.model.get_output_embeddings().weight


def random_genomes(live, count, *, seed=0):
    """Draw a parent and offspring that differ from it in up to three units, those outside the blocks more often than not."""
    generator = torch.Generator().manual_seed(seed)
    outer = [index for index, unit in enumerate(live.space.units) if unit.block >= NUM_BLOCKS]

    def integer(below):
        return int(torch.randint(below, (1,), generator=generator))

    parent = [integer(3) for _ in live.space.units]
    genomes = [tuple(parent)]
    while len(genomes) < count:
        child = list(parent)
        for _ in range(integer(3)):
            child[integer(len(child))] = integer(3)
        for index in outer:
            child[index] = integer(3)
        genomes.append(tuple(child))
    return genomes


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def test_units_outside_the_blocks(live):
    outer = [(unit.kind, unit.block) for unit in live.space.units if unit.kind in (HEAD, EMBEDDING)]
    assert outer == ([(EMBEDDING, 2)] if is_tied(live.blocks) else [(HEAD, 2), (EMBEDDING, 3)])
    inside = sum(linear.weight.numel() for index in range(NUM_BLOCKS) for linear in live.blocks.linears(index).values())
    shared = {
        id(p): p.numel()
        for m in (live.blocks.model.get_input_embeddings(), live.blocks.model.get_output_embeddings())
        for p in [m.weight]
    }
    assert live.space.size == inside + sum(shared.values())
    assert {unit.place for unit in live.space.units[-1:]} == {"embedding"}


@pytest.mark.parametrize(
    ("tied", "include", "expected"),
    [
        (False, (BLOCKS,), []),
        (False, (BLOCKS, HEAD), [("lm_head", HEAD)]),
        (False, (BLOCKS, EMBEDDING), [("model.embed_tokens", EMBEDDING)]),
        (False, WHOLE, [("lm_head", HEAD), ("model.embed_tokens", EMBEDDING)]),
        (True, (BLOCKS, HEAD), [("model.embed_tokens", EMBEDDING)]),
        (True, (BLOCKS, EMBEDDING), [("model.embed_tokens", EMBEDDING)]),
    ],
)
def test_what_is_included_has_slots(tied, include, expected, load):
    blocks = load(tied=tied, include=include)
    outer = [slot for part in blocks.parts[NUM_BLOCKS:] for slot in blocks.slots(part).values()]
    assert [(slot.name, slot.kind) for slot in outer] == expected
    assert (blocks.head_part is not None) == (HEAD in include or (tied and bool(expected)))
    assert (blocks.embedding_part is not None) == (EMBEDDING in include or (tied and bool(expected)))


def test_the_population_evaluator_equals_the_plain_one(live, tokens):
    sequences = tokens(3, 24, seed=7)
    genomes = [None, *random_genomes(live, 9), None]
    _, base = PlainEvaluator(live).final_states([None], sequences)
    mine, count = measure_sums(PopulationEvaluator(live), genomes, sequences, base[0], HeldOut())
    plain, _ = measure_sums(PlainEvaluator(live), genomes, sequences, base[0], HeldOut())
    torch.testing.assert_close(mine[:, :2], plain[:, :2], rtol=1e-5, atol=1e-5)
    kl = mine[:, 0] / count
    assert kl[0].abs() < 1e-5 and kl[-1].abs() < 1e-5
    assert (kl[1:-1] > 1e-3).all() and len({round(value, 6) for value in kl.tolist()}) >= 7


def test_what_is_measured_is_the_models_own_forward(live, tokens):
    sequences = tokens(2, 12, seed=3)
    dense = logits(live.blocks.model, sequences)
    for genome in random_genomes(live, 3, seed=5):
        with live.applied(genome):
            compressed = logits(live.blocks.model, sequences)
        logp, logq = (torch.log_softmax(each[:, :-1].double(), -1) for each in (dense, compressed))
        kl = float((logp.exp() * (logp - logq)).sum(-1).mean())
        nll = float(-logq.gather(-1, sequences[:, 1:, None]).mean())
        (scores,) = measure_held_out(PopulationEvaluator(live), [genome], sequences)
        assert scores.kl == pytest.approx(kl, rel=1e-4)
        assert scores.perplexity == pytest.approx(torch.tensor(nll).exp().item(), rel=1e-4)


def test_a_switch_of_the_head_alone_runs_no_block_and_one_of_the_embedding_all(live, tokens):
    sequences = tokens(2, 12)
    parent = random_genomes(live, 1)[0]
    outer = {unit.kind: index for index, unit in enumerate(live.space.units)}

    def block_tokens(kind):
        child = list(parent)
        child[outer[kind]] = (child[outer[kind]] + 1) % 3
        evaluator = PopulationEvaluator(live)
        evaluator.final_states([parent, tuple(child)], sequences)
        return evaluator.num_block_tokens // sequences.numel()

    assert block_tokens(EMBEDDING) == 2 * NUM_BLOCKS
    if not is_tied(live.blocks):
        assert block_tokens(HEAD) == NUM_BLOCKS


def test_a_genome_applied_and_left_restores_every_byte(live, weights_digest):
    blocks = live.blocks
    before = weights_digest(blocks.model)
    places = [parameter.data_ptr() for parameter in blocks.model.parameters()]
    genome = random_genomes(live, 1, seed=2)[0]
    with live.applied(genome):
        for index, unit in enumerate(live.space.units):
            expected = live.levels.read(index, genome[index]).decode()
            assert torch.equal(blocks.model.get_submodule(unit.name).weight, expected)
        assert is_tied(blocks) == (blocks.head_part == blocks.embedding_part)
        assert weights_digest(blocks.model) != before
        if is_tied(blocks):
            assert torch.equal(blocks.model.get_output_embeddings().weight, blocks.model.get_input_embeddings().weight)
    assert weights_digest(blocks.model) == before
    assert [parameter.data_ptr() for parameter in blocks.model.parameters()] == places
    measure_sums(PopulationEvaluator(live), [None, genome], torch.zeros(1, 4, dtype=torch.int64), None, HeldOut())
    assert weights_digest(blocks.model) == before


def test_an_export_computes_what_was_applied(live, tmp_path, ids):
    blocks = live.blocks
    genome = random_genomes(live, 1, seed=4)[0]
    with live.applied(genome):
        expected = logits(blocks.model, ids)
    folder = export_checkpoint(
        tmp_path / "checkpoint",
        live=live,
        model=blocks.model,
        tokenizer=blocks.tokenizer,
        genome=genome,
        genome_files=(),
        provenance={},
    )
    exported = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(exported, ids), expected, rtol=1e-5, atol=1e-5)
    tied = exported.get_input_embeddings().weight is exported.get_output_embeddings().weight
    assert tied == is_tied(blocks) == json.loads((folder / "config.json").read_text()).get("tie_word_embeddings", True)


def test_files_of_the_blocks_are_those_of_a_database_of_blocks_alone(live, load, build_settings, tmp_path, ids, compressor):
    alone = load(
        live.blocks.family.name if live.blocks.family.name in ("llama", "opt") else live.blocks.model.config.model_type,
        is_tied(live.blocks),
        include=(BLOCKS,),
    )
    database, _ = ensure_database(build_settings(tmp_path), alone, ids, compressor)
    for index in range(NUM_BLOCKS):
        assert (database.folder / block_file(index)).read_bytes() == (live.levels.folder / block_file(index)).read_bytes()
    assert len(list(database.folder.glob("block-*"))) == NUM_BLOCKS


def test_the_heads_hessian_is_of_the_last_hidden_states_as_propagated(live, ids):
    """The stored error is tr(E H Eᵀ) / tr(W H Wᵀ), or the part of it that a tied weight has as a head."""
    blocks, database = live.blocks, live.levels
    part = blocks.head_part
    unit = next(i for i, unit in enumerate(live.space.units) if unit.block == part)
    through = tuple(1 if u.block < NUM_BLOCKS else None for u in live.space.units)  # "3" is what activations leave through
    genome = tuple(level if level is not None else 0 for level in through)
    try:
        for index in range(NUM_BLOCKS):
            live.set_block(index, live.levels_in(genome, index))
        with torch.no_grad():
            X = blocks.decoder(input_ids=ids, use_cache=False).last_hidden_state.reshape(-1, live._slots[part][0].weight.shape[1])
    finally:
        for index in range(NUM_BLOCKS):
            live.restore_block(index)
    W = blocks.model.get_output_embeddings().weight
    shares = token_shares(ids, len(W))
    for level in range(3):
        E = W - database.read(unit, level).decode()
        error = float((X @ E.T).square().sum() / (X @ W.T).square().sum())
        if is_tied(blocks):
            error += float((shares @ E.square().sum(1)) / (shares @ W.square().sum(1)))
        assert database.errors[unit][level] == pytest.approx(error, rel=1e-3)


def test_an_untied_embedding_is_rounded_row_by_row(load, ids):
    slot = Slot("embedding", EMBEDDING, load().model.get_input_embeddings())
    coarse, fine = GPTQ(bits=(3, 2), group_size=16), GPTQ(bits=(3, 2), group_size=16, damping=0.5)
    first, second = (compress_embedding(slot, ids, each) for each in (coarse, fine))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.payload.codes, b.payload.codes)  # H = I spreads no error, whatever the damping
    shares = token_shares(ids, VOCABULARY)
    E = slot.weight - first[0].payload.decode()
    assert first[0].error == pytest.approx(float((shares @ E.square().sum(1)) / (shares @ slot.weight.square().sum(1))), rel=1e-5)


def test_token_shares_count_what_is_seen_and_a_little_what_is_not():
    shares = token_shares(torch.tensor([[3, 3, 1, 0]]), 10)
    torch.testing.assert_close(shares.sum(), torch.tensor(1.0))
    torch.testing.assert_close(shares, torch.tensor([0.235, 0.235, 0.01, 0.46, *[0.01] * 6]))


def test_a_tied_weight_is_compressed_as_a_head_and_errs_as_both(load, ids):
    slot = Slot("embedding", EMBEDDING, load(tied=True).model.get_input_embeddings())
    X = torch.randn(400, 32, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.logspace(0, -2, 32))
    compressor, H = GPTQ(bits=(3, 2), group_size=16), X.T @ X
    of_head = compressor.compress({"head": slot.weight}, H)["head"]
    tied = compress_embedding(slot, ids, compressor, H=H)
    alone = compress_embedding(slot, ids, compressor)
    shares, W = token_shares(ids, VOCABULARY), slot.weight
    for head, both, embedding in zip(of_head, tied, alone, strict=True):
        assert torch.equal(both.payload.codes, head.payload.codes)
        assert not torch.equal(both.payload.codes, embedding.payload.codes)
        of_rows = float((shares @ (W - both.payload.decode()).square().sum(1)) / (shares @ W.square().sum(1)))
        assert both.error == pytest.approx(head.error + of_rows, rel=1e-4)


@pytest.mark.parametrize("lost", [{2}, {3}, {2, 3}, {0, 3}, {1, 2}])
def test_parts_that_are_damaged_alone_are_built_again_with_the_same_bytes(
    lost, live, load, build_settings, tmp_path, ids, compressor
):
    import shutil

    last = len(live.blocks.parts) - 1
    lost = {min(index, last) for index in lost}
    settings = build_settings(tmp_path)
    shutil.copytree(live.levels.folder, settings.folder)
    for index in lost:
        path = settings.folder / block_file(index)
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    _, reused = ensure_database(settings, live.blocks, ids, compressor)
    assert not reused
    for path in live.levels.folder.iterdir():
        assert (settings.folder / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("finished", [1, 2, 3])
def test_a_build_that_was_cut_off_goes_on(finished, load, build_settings, tmp_path, ids, compressor, monkeypatch):
    from evopress.levels import build

    class CutOffError(Exception):
        pass

    whole, _ = ensure_database(build_settings(tmp_path / "whole"), load(), ids, compressor)
    append, count = build.append, 0

    def failing(path, entry):
        nonlocal count
        if count == finished:
            raise CutOffError
        count += 1
        append(path, entry)

    settings = build_settings(tmp_path / "cut")
    with monkeypatch.context() as context:
        context.setattr(build, "append", failing)
        with pytest.raises(CutOffError):
            ensure_database(settings, load(), ids, compressor)
    made = []
    monkeypatch.setattr(build, "write_block", lambda *args, write=build.write_block: made.append(args[1]) or write(*args))
    database, reused = ensure_database(settings, load(), ids, compressor)
    assert not reused and made == list(range(finished, 4))
    assert {path.name: path.read_bytes() for path in database.folder.iterdir()} == {
        path.name: path.read_bytes() for path in whole.folder.iterdir()
    }


def test_a_database_of_other_parts_is_refused(live, load):
    with pytest.raises(EvoPressError, match="is of another model"):
        LiveModel(load(include=(BLOCKS,)), live.levels)


def test_an_embedding_is_compressed_with_nothing_of_its_size_beside_it(ids, compressor):
    slot = Slot("embedding", EMBEDDING, torch.nn.Embedding(VOCABULARY, 32, dtype=torch.bfloat16))
    there = []

    class Watching(GPTQ):
        def compress(self, weights, H):
            there.append(alive.now[HOST] - H.nbytes)
            return super().compress(weights, H)

    with Alive() as alive:
        found = compress_embedding(slot, ids, Watching(bits=(4, 3, 2), group_size=16))
    assert there[0] < slot.weight.nbytes
    assert [each.error for each in found] == [each.error for each in compress_embedding(slot, ids, compressor)]


def test_what_the_parts_need_is_counted(load, build_settings, tmp_path, ids, compressor):
    settings = build_settings(tmp_path)
    alone, of_blocks = planned(settings, load(include=(BLOCKS,)), ids, compressor)
    whole, of_all = planned(settings, load(), ids, compressor)
    assert (
        of_blocks.forwards == 2 * NUM_BLOCKS - 1 and of_all.forwards == 2 * NUM_BLOCKS
    )  # the last block's output is the head's input
    assert of_all.walked == of_blocks.walked == NUM_BLOCKS
    outer = [unit for unit in whole.units if unit.block >= NUM_BLOCKS]
    assert of_all.disk_bytes - of_blocks.disk_bytes == sum(level.stored_bits for unit in outer for level in unit.levels) // 8
    assert of_all.memory_bytes > of_blocks.memory_bytes
    assert whole.size - alone.size == 2 * VOCABULARY * 32


def test_a_group_that_does_not_divide_the_width_names_its_unit(load, build_settings, tmp_path, ids):
    with pytest.raises(EvoPressError, match="group size 48 does not divide the 32 input columns"):
        planned(build_settings(tmp_path), load(), ids, GPTQ(bits=(3, 2), group_size=48))


@pytest.mark.parametrize("tied", [False, True])
def test_pruned_ones_keep_exact_counts_and_a_further_sparsity_runs_no_block(tied, load, build_settings, tmp_path, ids, monkeypatch):
    blocks = load(tied=tied)
    store = HessianStore(tmp_path / "hessians")

    def settings(sparsity):
        recipe = {"sparsity": sparsity}
        return build_settings(tmp_path, method="sparsity", propagate=None, recipe=recipe, hessians=store)

    def pruner(sparsity):
        return SparseGPT(sparsity=sparsity, step=200, num_levels=2, dtype_bits=32)

    first, _ = ensure_database(settings(0.5), blocks, ids, pruner(0.5))
    live = LiveModel(blocks, first)
    genome = tuple(len(unit.levels) - 1 for unit in live.space.units)
    with live.applied(genome):
        kept = [int((blocks.model.get_submodule(unit.name).weight != 0).sum()) for unit in live.space.units]
    assert kept == [unit.levels[-1].cost for unit in live.space.units]
    (scores,) = measure_held_out(PopulationEvaluator(live), [genome], ids)
    (plain,) = measure_held_out(PlainEvaluator(live), [genome], ids)
    assert scores.kl == pytest.approx(plain.kl, rel=1e-4) and scores.kl > 1e-3

    def no_forward(*args, **kwargs):
        raise AssertionError("a block was run")

    def again(root):
        return build_settings(tmp_path / root, method="sparsity", propagate=None, recipe={"sparsity": 0.6}, hessians=None)

    expected, _ = ensure_database(again("without a store"), blocks, ids, pruner(0.6))
    monkeypatch.setattr(blocks, "run", no_forward)
    second, _ = ensure_database(settings(0.6), blocks, ids, pruner(0.6))
    for index in blocks.parts:
        assert (second.folder / block_file(index)).read_bytes() == (expected.folder / block_file(index)).read_bytes()


def test_a_model_of_another_width_inside_than_outside(tmp_path, build_settings, ids, compressor):
    """OPT-350m projects embeddings of 512 to a hidden size of 1024, and back before the head."""
    config = tiny_config("opt", num_blocks=NUM_BLOCKS)
    config.word_embed_proj_dim, config.do_layer_norm_before = 16, False
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.normal_(std=0.15)
    blocks = BlockModel(model, family_of("opt"), include=WHOLE)
    blocks.self_check()
    database, _ = ensure_database(build_settings(tmp_path), blocks, ids, compressor)
    live = LiveModel(blocks, database)
    assert live.space.units[-1].size == 16 * VOCABULARY
    genomes = [None, *random_genomes(live, 4)]
    mine, _ = measure_sums(PopulationEvaluator(live), genomes, ids, None, HeldOut())
    plain, _ = measure_sums(PlainEvaluator(live), genomes, ids, None, HeldOut())
    torch.testing.assert_close(mine[:, :2], plain[:, :2], rtol=1e-5, atol=1e-4)


def test_blocks_that_are_carried_leave_what_lies_outside_in_place(
    load, build_settings, tmp_path, ids, compressor, monkeypatch, weights_digest
):
    blocks = load()
    database, _ = ensure_database(build_settings(tmp_path), blocks, ids, compressor)
    genomes = [None, *random_genomes(LiveModel(blocks, database), 3)]
    expected, _ = measure_sums(PopulationEvaluator(LiveModel(blocks, database)), genomes, ids, None, HeldOut())
    before = weights_digest(blocks.model)
    monkeypatch.setattr(blocks, "offload", True)
    monkeypatch.setattr(blocks, "_carried", lambda data: data.clone())
    mine, _ = measure_sums(PopulationEvaluator(LiveModel(blocks, database)), genomes, ids, None, HeldOut())
    torch.testing.assert_close(mine, expected)
    assert weights_digest(blocks.model) == before


def test_the_probe_tells_what_they_take(load, tokens, compressor, monkeypatch):
    monkeypatch.setattr(probe, "LEAST_PARAMETERS", 0)
    speed = probe.measure_speed(load(), tokens(1, 64), KLDivergence(), compressor, chunk_tokens=32)
    assert set(speed.outside) == {"lm_head", "model.embed_tokens"} and min(speed.outside.values()) > 0
    assert not probe.measure_speed(load(include=(BLOCKS,)), tokens(1, 64), KLDivergence(), compressor, chunk_tokens=32).outside


@pytest.mark.parametrize("include", [(BLOCKS, HEAD), (BLOCKS, EMBEDDING), WHOLE])
@pytest.mark.parametrize("tied", [False, True])
def test_a_corrected_walk_reaches_what_lies_outside(include, tied, load, ids, build_settings, tmp_path):
    blocks = load(tied=tied, include=include)
    settings = build_settings(tmp_path / "levels", correction=0.5)
    database, _ = ensure_database(settings, blocks, ids, GPTQ(bits=(4, 3, 2), group_size=16))
    assert len(database.space) == len(blocks.blocks) * 7 + (1 if tied else len(include) - 1)


def test_the_probe_measures_a_block_of_each_form(tokens, compressor, monkeypatch):
    """A first block without experts says nothing of the others."""
    monkeypatch.setattr(probe, "LEAST_PARAMETERS", 0)
    model = any_model("lfm2_moe")
    blocks = BlockModel(model, outlined(model))
    seen = []

    def took(blocks, index, hidden, compressor):
        seen.append(index)
        return (1.0, 2.0, 3.0) if index == 0 else (10.0, 20.0, 30.0)

    monkeypatch.setattr(probe, "_block_seconds", took)
    probe.measure_speed(blocks, tokens(1, 64), KLDivergence(), compressor, chunk_tokens=32)
    assert len(seen) <= 3, "of many forms the most frequent"
    seen.clear()
    monkeypatch.setattr(probe, "_MOST_FORMS", len(blocks.blocks))
    speed = probe.measure_speed(blocks, tokens(1, 64), KLDivergence(), compressor, chunk_tokens=32)
    count = len(blocks.blocks)
    assert 0 in seen and 1 < len(seen) <= count
    mean = (1 + 10 * (count - 1)) / count
    assert (speed.block, speed.hessians, speed.compress) == pytest.approx((mean, 2 * mean, 3 * mean))
