"""Weights and modules in one live model: equal to a model that is changed by hand, and given back bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from evopress.currencies import CURRENCIES
from evopress.export import export_checkpoint
from evopress.fitness.plain import PlainEvaluator
from evopress.fitness.population import PopulationEvaluator
from evopress.levels.build import ensure_database
from evopress.levels.live import LiveModel
from evopress.levels.modules import dropped_modules, ensure_modules
from evopress.levels.union import LevelUnion
from evopress.methods.drop import Modules
from evopress.models.blocks import BlockModel
from evopress.models.loading import load_pretrained
from evopress.models.tiny import make_tiny
from evopress.units import BLOCKS, EMBEDDING, HEAD, Genome, is_module

NUM_BLOCKS = 3


@pytest.fixture(scope="module", params=["llama", "gemma2", "opt"])
def live(request: Any, tmp_path_factory: Any, build_settings: Any, tokens: Any, compressor: Any) -> LiveModel:
    root = tmp_path_factory.mktemp("joint")
    pretrained = load_pretrained(make_tiny(root / "model", request.param, num_blocks=NUM_BLOCKS), dtype="float32")
    blocks = BlockModel(pretrained.model, pretrained.family, include=(BLOCKS, HEAD, EMBEDDING))
    blocks.tokenizer = pretrained.tokenizer  # type: ignore[attr-defined]
    weights, _ = ensure_database(build_settings(root), blocks, tokens(6, 16), compressor)
    space = Modules().space(blocks.shapes(), dtype_bits=32)
    modules, _ = ensure_modules(root, model_name="tiny", method="drop", recipe={"modules": 1}, space=space)
    union = LevelUnion([weights, modules], method="joint", currency=CURRENCIES["bytes"], is_of_attention=blocks.is_of_attention)
    return LiveModel(blocks, union)


def genomes(live: LiveModel, count: int = 6) -> list[Genome]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        found.append(tuple(int(torch.randint(len(unit.levels), (1,), generator=generator)) for unit in live.space.units))
    modules = [i for i, unit in enumerate(live.space.units) if is_module(unit)]
    whole = list(found[0])
    for i in modules:
        whole[i] = int(live.space.units[i].block == 1)  # one block gone, nothing else
    return [*found, tuple(whole)]


def by_hand(live: LiveModel, genome: Genome, ids: torch.Tensor) -> torch.Tensor:
    """A copy of the model with every weight replaced, and the outputs of dropped modules multiplied by zero."""
    model, family = copy.deepcopy(live.blocks.model), live.blocks.family
    for i, (unit, level) in enumerate(zip(live.space.units, genome, strict=True)):
        if not is_module(unit):
            model.get_submodule(unit.name).weight.data = live.levels.read(i, level).decode()

    def zero(module: torch.nn.Module, args: object, output: Any) -> object:
        return (output[0] * 0.0, *output[1:]) if isinstance(output, tuple) else output * 0.0

    layers = model.get_submodule(f"{family.decoder}.{family.blocks}")
    for block, kind in dropped_modules(live.space, genome):
        name = family.attention if kind == "attention" else family.mlp
        layers[block].get_submodule(name).register_forward_hook(zero)
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def test_the_space_has_weights_and_modules_which_cost_nothing_themselves(live: LiveModel) -> None:
    kinds = [unit.kind for unit in live.space.units]
    assert kinds.count("attention") == kinds.count("mlp") == NUM_BLOCKS
    assert all(
        price == 0 for unit, prices in zip(live.space.units, live.space.prices, strict=True) if is_module(unit) for price in prices
    )
    for i, unit in enumerate(live.space.units):
        module = live.space.inside[i]
        if is_module(unit) or unit.is_outside:
            assert module is None
        else:
            assert live.space.units[module].block == unit.block  # type: ignore[index]
            assert live.space.units[module].kind == ("attention" if "self_attn" in unit.name else "mlp")  # type: ignore[index]


def test_both_evaluators_compute_what_a_model_changed_by_hand_does(live: LiveModel, tokens: Any) -> None:
    ids = tokens(2, 16)
    all_genomes: Sequence[Genome] = genomes(live)
    for evaluator in (PopulationEvaluator(live), PlainEvaluator(live)):
        state_of, states = evaluator.final_states([*all_genomes, None], ids)
        for genome, state in zip(all_genomes, state_of, strict=False):
            with live.applied(genome):
                found = live.blocks.head().weight
                logits = states[state] @ found.T
            expected = by_hand(live, genome, ids)
            if getattr(live.blocks.model.config, "final_logit_softcapping", None):
                cap = live.blocks.model.config.final_logit_softcapping
                logits = torch.tanh(logits / cap) * cap
            assert torch.allclose(logits, expected, atol=2e-5)


def test_levels_of_what_lies_in_a_dropped_module_do_not_matter(live: LiveModel) -> None:
    genome = list(genomes(live)[-1])
    other = list(genome)
    gone = [i for i in range(len(genome)) if live.space.is_gone(genome, i)]
    assert gone
    for i in gone:
        other[i] = (genome[i] + 1) % len(live.space.units[i].levels)
    assert live.space.cost(genome) == live.space.cost(other)
    for part in live.blocks.parts:
        assert live.levels_in(tuple(genome), part) == live.levels_in(tuple(other), part)
    assert live.skips(live.levels_in(tuple(genome), 1)) and not live.skips(live.levels_in(tuple(genome), 0))


def test_everything_comes_back(live: LiveModel, weights_digest: Callable[..., str], tokens: Any) -> None:
    ids, model = tokens(2, 16), live.blocks.model
    before = weights_digest(model)
    with torch.no_grad():
        dense = model(input_ids=ids, use_cache=False).logits
    for genome in genomes(live):
        with live.applied(genome):
            pass
        with live.written(genome):
            pass
        PopulationEvaluator(live).final_states([genome], ids)
    assert weights_digest(model) == before
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, dense)


def test_a_checkpoint_computes_the_same_and_lacks_the_blocks_that_are_gone(live: LiveModel, tmp_path: Path, tokens: Any) -> None:
    ids, genome = tokens(2, 16), genomes(live)[-1]
    for name in ("genome.json", "genome.txt"):
        (tmp_path / name).write_text("{}")
    folder = export_checkpoint(
        tmp_path / "checkpoint",
        live=live,
        model=live.blocks.model,
        tokenizer=live.blocks.tokenizer,  # type: ignore[attr-defined]
        genome=genome,
        genome_files=(tmp_path / "genome.json", tmp_path / "genome.txt"),
        provenance={},
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.num_hidden_layers == NUM_BLOCKS - 1
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids, use_cache=False).logits, by_hand(live, genome, ids), atol=2e-5)
