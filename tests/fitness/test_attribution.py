"""What each unit holds of the fitness: block by block as by the whole model's gradients, and as by differences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from attribution_literal import (
    attribute_by_differences,
    attribute_plainly,
    expand_plainly,
    gate_by_differences,
    gates_plainly,
)

from evopress.currencies import CURRENCIES
from evopress.errors import EvoPressError
from evopress.fitness.attribution import attribute, derivatives, expand
from evopress.fitness.measures import KLDivergence, NegativeLogLikelihood, TopkKL
from evopress.fitness.minibatch import MinibatchFitness, base_states
from evopress.fitness.population import PopulationEvaluator, measure_sequences
from evopress.levels.build import ensure_database
from evopress.levels.live import LiveModel
from evopress.levels.modules import ModuleLevels, ensure_modules
from evopress.levels.union import LevelUnion
from evopress.methods.drop import Modules
from evopress.models.blocks import BlockModel
from evopress.models.loading import load_pretrained
from evopress.models.outline import outlined
from evopress.models.tiny import make_tiny
from evopress.settings import ModuleSettings
from evopress.units import is_module
from experiments.tiny_any import any_model

MODELS = [("llama", False), ("llama", True), ("gemma2", True), ("qwen3", True), ("opt", True), ("phi3", False)]
MEASURES = [KLDivergence(), KLDivergence(fused=True), TopkKL(5), NegativeLogLikelihood()]


@dataclass(frozen=True)
class Case:
    live: LiveModel
    ids: torch.Tensor
    base: torch.Tensor


@pytest.fixture(scope="module", params=MODELS, ids=lambda model: f"{model[0]}-{'tied' if model[1] else 'untied'}")
def case(request, tmp_path_factory, build_settings, tokens, compressor) -> Case:
    """A tiny model with levels of all of it, head and embedding too."""
    folder = tmp_path_factory.mktemp("model") / "model"
    make_tiny(folder, request.param[0], num_blocks=2, tied=request.param[1])
    pretrained = load_pretrained(folder, dtype="float32")
    blocks = BlockModel(pretrained.model, pretrained.family, include=("blocks", "head", "embedding"))
    database, _ = ensure_database(build_settings(tmp_path_factory.mktemp("database")), blocks, tokens(6, 16), compressor)
    live, ids = LiveModel(blocks, database), tokens(3, 12, seed=5)
    return Case(live, ids, base_states(PopulationEvaluator(live), ids, batch_tokens=48))


def genome_of(live) -> tuple[int, ...]:
    return tuple((1 + 2 * index) % 3 for index in range(len(live.space)))


def close(found, expected) -> None:
    assert float((found - expected).abs().max()) < 1e-5 * max(float(expected.abs().max()), 1.0)
    assert float(expected.abs().max()) > 1e-3, "there is something to attribute"


@pytest.mark.parametrize("measure", MEASURES, ids=["kl", "fused", "topk_kl", "perplexity"])
def test_block_by_block_equals_the_whole_model_s_gradients(case, measure, weights_digest) -> None:
    case.live.blocks.model.get_output_embeddings().weight.requires_grad_()
    genome, before = genome_of(case.live), weights_digest(case.live.blocks.model)
    flags = [(p.requires_grad, None) for p in case.live.blocks.model.parameters()]
    found = attribute(case.live, genome, case.ids, case.base, measure, max_tokens_in_flight=24, chunk_tokens=7)
    plain = KLDivergence() if isinstance(measure, KLDivergence) else measure
    close(found, attribute_plainly(case.live, genome, case.ids, plain))
    assert weights_digest(case.live.blocks.model) == before
    assert [(p.requires_grad, p.grad) for p in case.live.blocks.model.parameters()] == flags
    assert not any(module._forward_hooks for module in case.live.blocks.model.modules())


def test_an_expansion_is_the_whole_model_s_taylor_series(case, weights_digest) -> None:
    genome, before = genome_of(case.live), weights_digest(case.live.blocks.model)
    uniform = torch.rand(3, 11, generator=torch.Generator().manual_seed(2))
    found = expand(case.live, genome, case.ids, case.base, KLDivergence(), uniform=uniform, max_tokens_in_flight=24, chunk_tokens=7)
    expected = expand_plainly(case.live, genome, case.ids, KLDivergence(), uniform)
    inside = [0 <= unit.block < len(case.live.blocks.blocks) for unit in case.live.space.units]
    assert not all(inside), "head and embedding are units"
    close(found[:, inside], expected[:, inside])
    for unit, level in enumerate(genome):
        assert bool((found[:, unit, level] == 0).all())
        others = [other for other in range(found.shape[2]) if other != level]
        assert bool(found[:, unit, others].isnan().all()) is not inside[unit], "what lies outside the blocks is not expanded"
    assert weights_digest(case.live.blocks.model) == before
    assert not any(module._forward_hooks for module in case.live.blocks.model.modules())


def test_the_host_waits_no_more_often_for_more_units(live_model, tokens, monkeypatch) -> None:
    """What a block's units get comes at once, and whether they differ from the dense ones: a GPU stands still at each wait."""
    live, ids = live_model("llama", num_blocks=2), tokens(2, 12)
    base, waits = base_states(PopulationEvaluator(live), ids, batch_tokens=48), []
    for name in ("cpu", "tolist", "__bool__"):
        wait = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, wait=wait: waits.append(self) or wait(self))
    attribute(live, genome_of(live), ids, base, KLDivergence(), max_tokens_in_flight=24)
    assert len(waits) < 2 * 7 + 9, "of two blocks of seven units: entering, gradients, errors and whether there are any, and around"


def test_an_expansion_of_some_levels_is_that_of_all(case) -> None:
    """What further levels a model has, of baselines, is not asked about."""
    genome, counts = (0,) * len(case.live.space), [1 + index % 3 for index in range(len(case.live.space))]
    of = (case.live, genome, case.ids, case.base, KLDivergence())
    uniform = torch.rand(3, 11, generator=torch.Generator().manual_seed(2))
    whole, some = expand(*of, uniform=uniform), expand(*of, uniform=uniform, counts=counts)
    assert some.shape[2] == 3 == max(counts)
    for unit, count in enumerate(counts):
        assert torch.equal(some[:, unit, :count].nan_to_num(7), whole[:, unit, :count].nan_to_num(7))
        assert bool(some[:, unit, count:].isnan().all())


def test_an_expansion_tells_what_a_small_step_changes(live_model, tokens) -> None:
    """On average over drawn labels, and where the other level is near: the levels here are 4, 3 and 2 bits."""
    live, ids = live_model("llama", num_blocks=2), tokens(1, 12, seed=5)
    base = base_states(PopulationEvaluator(live), ids, batch_tokens=48)
    genome = (1,) * len(live.space)
    draws = [torch.rand(1, 11, generator=torch.Generator().manual_seed(seed)) for seed in range(40)]
    told = torch.stack([expand(live, genome, ids, base, KLDivergence(), uniform=uniform)[0] for uniform in draws]).mean(0)
    moved = [tuple(0 if i == unit else 1 for i in range(len(genome))) for unit in range(len(genome))]
    sequences = torch.stack([measured(live, each, ids, base) for each in (genome, *moved)])
    changed = sequences[1:] - sequences[0]
    assert np.corrcoef(told[:, 0].numpy(), changed.numpy())[0, 1] > 0.9


def measured(live, genome, ids, base) -> torch.Tensor:
    sums = measure_sequences(PopulationEvaluator(live), [genome], ids, base, KLDivergence(), chunk_tokens=256)
    return sums[0, 0].sum() / (ids.shape[1] - 1) / len(ids)


def test_the_attribution_is_the_derivative_in_the_scale_of_a_unit_s_error(live_model, tokens) -> None:
    live, ids = live_model("llama", num_blocks=4), tokens(1, 12, seed=5)
    base = base_states(PopulationEvaluator(live), ids, batch_tokens=48)
    genome = genome_of(live)
    found = attribute(live, genome, ids, base, KLDivergence())[0]
    for unit in (0, 5, 9, 27):
        expected = attribute_by_differences(live, genome, ids, KLDivergence(), unit, step=1e-3)
        assert float(found[unit]) == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_how_it_is_cut_changes_only_rounding(live_model, tokens) -> None:
    live, ids = live_model("llama", num_blocks=4), tokens(5, 12, seed=5)
    base, genome = base_states(PopulationEvaluator(live), ids, batch_tokens=48), genome_of(live)
    whole = attribute(live, genome, ids, base, KLDivergence())
    pieces = attribute(live, genome, ids, base, KLDivergence(), max_tokens_in_flight=12, chunk_tokens=5)
    close(pieces, whole)
    alone = torch.cat([attribute(live, genome, ids[i : i + 1], base[i : i + 1], KLDivergence()) for i in range(5)])
    close(alone, whole)
    close(attribute(live, genome, ids[:, :8], base, KLDivergence()), attribute_plainly(live, genome, ids[:, :8], KLDivergence()))


def test_a_unit_without_error_holds_nothing(live_model, tokens) -> None:
    live, ids = live_model("llama", num_blocks=4), tokens(2, 12, seed=5)
    base, genome = base_states(PopulationEvaluator(live), ids, batch_tokens=48), genome_of(live)

    class DenseFirst(LiveModel):
        """Level 0 is the dense weight."""

        def _weight(self, unit, level, device):
            if level:
                return super()._weight(unit, level, device)
            block = self.space.units[unit].block
            return self._dense[block][self._weights[block].index(unit)]

    found = attribute(DenseFirst(live.blocks, live.levels), genome, ids, base, KLDivergence())
    zero = [index for index, level in enumerate(genome) if level == 0]
    assert zero and bool((found[:, zero] == 0).all())
    assert bool((found[:, [index for index, level in enumerate(genome) if level]] != 0).all())


def test_the_minibatch_s_attributions_are_of_fresh_sequences_of_one_length(live_model, tokens) -> None:
    live, sequences = live_model("llama", num_blocks=4), tokens(10, 16, seed=3)
    base = base_states(PopulationEvaluator(live), sequences, batch_tokens=48)

    def fitness(seed=0):
        return MinibatchFitness(
            PopulationEvaluator(live), sequences, base=base, rng=np.random.default_rng(seed), measure=KLDivergence()
        )

    first, genome = fitness(), genome_of(live)
    cut = first.attribute(genome, tokens=32, sequences=4)
    rows = np.random.default_rng(0).choice(10, size=4, replace=False).tolist()
    close(torch.tensor(cut), attribute(live, genome, sequences[rows, :8], base[rows], KLDivergence()))
    assert first.attribute(genome, tokens=32, sequences=4) != cut, "fresh ones"
    assert fitness().attribute(genome, tokens=32, sequences=4) == cut, "drawn by the seed alone"
    assert len(fitness().attribute(genome, tokens=64, sequences=2)) == 4, "whole sequences, so more of them"
    assert len(fitness().attribute(genome, tokens=160, sequences=16)) == 10, "no more than there are"
    with pytest.raises(EvoPressError, match="3 tokens of 2 sequences predict nothing"):
        fitness().attribute(genome, tokens=3, sequences=2)


def test_numbers_that_are_not_finite_are_told_with_the_unit(live_model, tokens) -> None:
    live, ids = live_model("llama", num_blocks=4), tokens(2, 12, seed=5)
    base = base_states(PopulationEvaluator(live), ids, batch_tokens=48)
    base[1, 3] = torch.nan
    with pytest.raises(EvoPressError, match=r"the attribution of .* is not finite on sequence 1"):
        attribute(live, genome_of(live), ids, base, KLDivergence())


@pytest.fixture(scope="module", params=["llama", "gemma2", "opt"])
def joint(request, tmp_path_factory, build_settings, tokens, compressor) -> LiveModel:
    """A tiny model whose weights have levels and whose modules can be dropped."""
    root = tmp_path_factory.mktemp("joint")
    pretrained = load_pretrained(make_tiny(root / "model", request.param, num_blocks=3), dtype="float32")
    blocks = BlockModel(pretrained.model, pretrained.family)
    weights, _ = ensure_database(build_settings(root), blocks, tokens(6, 16), compressor)
    space = Modules().space(blocks.shapes(), dtype_bits=32)
    modules, _ = ensure_modules(root, model_name="tiny", method="drop", recipe={"modules": 1}, space=space)
    union = LevelUnion([weights, modules], method="joint", currency=CURRENCIES["bytes"], is_of_attention=blocks.is_of_attention)
    return LiveModel(blocks, union)


def some_dropped(live) -> tuple[int, ...]:
    """The attention of the first block, all of the second, and the MLP of the third are gone."""
    genome = list(genome_of(live))
    for index, unit in enumerate(live.space.units):
        if is_module(unit):
            genome[index] = int(unit.block == 1 or (unit.block, unit.kind) in ((0, "attention"), (2, "mlp")))
    return tuple(genome)


@pytest.mark.parametrize("measure", [KLDivergence(fused=True), TopkKL(257)], ids=["kl", "topk_kl"])
def test_gates_of_modules_equal_the_whole_model_s_gradients(joint, measure, tokens, weights_digest) -> None:
    ids = tokens(3, 12, seed=5)
    base = base_states(PopulationEvaluator(joint), ids, batch_tokens=48)
    uniform, genome = torch.rand(3, 11, generator=torch.Generator().manual_seed(2)), some_dropped(joint)
    before = weights_digest(joint.blocks.model)
    first, second = derivatives(joint, genome, ids, base, measure, uniform=uniform, max_tokens_in_flight=24, chunk_tokens=7)
    expected = gates_plainly(joint, genome, ids, KLDivergence(), uniform)
    units = [index for index, unit in enumerate(joint.space.units) if is_module(unit)]
    gone = [index for index in range(len(joint.space)) if joint.space.is_gone(genome, index)]
    close(first[:, units], expected[0][:, units])
    if isinstance(measure, KLDivergence):  # the most likely labels come first there, so that others are drawn
        close(second, expected[1])
    assert bool((first[:, units] != 0).all()) and bool((first[:, gone] == 0).all())
    held = attribute(joint, genome, ids, base, measure, uniform=uniform)
    for unit in units:
        expected = first[:, unit] if genome[unit] else 2 * first[:, unit] + second[:, unit]
        assert torch.allclose(held[:, unit], expected, atol=1e-6)
    assert weights_digest(joint.blocks.model) == before
    assert not any(module._forward_hooks for module in joint.blocks.model.modules())


def test_a_gate_s_derivative_is_that_of_differences(joint, tokens) -> None:
    ids, genome = tokens(1, 12, seed=5), some_dropped(joint)
    base = base_states(PopulationEvaluator(joint), ids, batch_tokens=48)
    first, _ = derivatives(joint, genome, ids, base, KLDivergence(), uniform=torch.full((1, 11), 0.5))
    for unit in [index for index, unit in enumerate(joint.space.units) if is_module(unit)]:
        expected = gate_by_differences(joint, genome, ids, KLDivergence(), unit, step=1e-3)
        assert float(first[0, unit]) == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("granularity", ["module", "block", "pair"])
def test_at_the_dense_model_the_curvature_tells_and_several_modules_have_one_gate(tiny_blocks, tokens, granularity) -> None:
    blocks = tiny_blocks("llama", num_blocks=2)
    live = LiveModel(blocks, ModuleLevels(Modules(ModuleSettings(granularity=granularity)).space(blocks.shapes(), dtype_bits=32)))
    ids = tokens(2, 12, seed=5)
    base, uniform = (
        base_states(PopulationEvaluator(live), ids, batch_tokens=48),
        torch.rand(2, 11, generator=torch.Generator().manual_seed(2)),
    )
    dense = (0,) * len(live.space)
    first, second = derivatives(live, dense, ids, base, KLDivergence(), uniform=uniform)
    assert float(first.abs().max()) < 1e-5 and bool((second > 0).all())
    close(second, gates_plainly(live, dense, ids, KLDivergence(), uniform)[1])
    if granularity != "pair":
        genome = (1, *dense[1:])
        close(
            torch.cat(derivatives(live, genome, ids, base, KLDivergence(), uniform=uniform)),
            torch.cat(gates_plainly(live, genome, ids, KLDivergence(), uniform)),
        )


@pytest.mark.parametrize("architecture", ["lfm2", "qwen3_5_text"])
def test_blocks_of_a_hybrid_have_gates_of_their_own(architecture, tokens) -> None:
    """What adds to the residual stream is called otherwise in a block of convolutions, or of linear attention."""
    model = any_model(architecture)
    blocks = BlockModel(model, outlined(model))
    live = LiveModel(blocks, ModuleLevels(Modules().space(blocks.shapes(), dtype_bits=32)))
    ids = tokens(1, 12, seed=5)
    base = base_states(PopulationEvaluator(live), ids, batch_tokens=48)
    genome = tuple(int(index in (1, 4)) for index in range(len(live.space)))
    first, _ = derivatives(live, genome, ids, base, KLDivergence(), uniform=torch.full((1, 11), 0.5))
    for unit in range(len(live.space)):
        expected = gate_by_differences(live, genome, ids, KLDivergence(), unit, step=1e-3)
        assert float(first[0, unit]) == pytest.approx(expected, rel=2e-2, abs=1e-4)


def test_gates_hold_where_a_block_adds_to_their_outputs_in_place(tokens) -> None:
    """Falcon adds what its attention returns to what its MLP returns."""
    model = any_model("falcon")
    blocks = BlockModel(model, outlined(model))
    live = LiveModel(blocks, ModuleLevels(Modules().space(blocks.shapes(), dtype_bits=32)))
    ids, uniform = tokens(2, 12, seed=5), torch.rand(2, 11, generator=torch.Generator().manual_seed(2))
    base = base_states(PopulationEvaluator(live), ids, batch_tokens=48)
    for dropped in ((), (3,), (0, 5)):
        genome = tuple(int(index in dropped) for index in range(len(live.space)))
        found = derivatives(live, genome, ids, base, KLDivergence(), uniform=uniform)
        close(torch.cat(found), torch.cat(gates_plainly(live, genome, ids, KLDivergence(), uniform)))


def test_the_minibatch_draws_labels_where_there_are_modules(tiny_blocks, tokens) -> None:
    blocks = tiny_blocks("llama", num_blocks=2)
    live = LiveModel(blocks, ModuleLevels(Modules().space(blocks.shapes(), dtype_bits=32)))
    sequences = tokens(6, 12, seed=3)
    base = base_states(PopulationEvaluator(live), sequences, batch_tokens=48)

    def found(seed):
        rng = np.random.default_rng(seed)
        fitness = MinibatchFitness(PopulationEvaluator(live), sequences, base=base, rng=rng, measure=KLDivergence())
        return fitness.attribute((0, 1, 0, 0), tokens=48, sequences=4)

    assert found(0) == found(0) != found(1)
