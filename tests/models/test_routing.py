"""Experts that are dropped: what stays computes what a model without them does, however its router chooses."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from evopress.compress.gptq import GPTQ
from evopress.errors import EvoPressError
from evopress.fitness.plain import PlainEvaluator
from evopress.fitness.population import PopulationEvaluator
from evopress.levels.build import ensure_database
from evopress.levels.calibration import weights_placed
from evopress.levels.live import LiveModel
from evopress.levels.modules import ModuleLevels, bits_read, ensure_modules
from evopress.levels.plan import BuildSettings
from evopress.levels.union import LevelUnion
from evopress.methods.drop import Modules
from evopress.methods.joint import Joint
from evopress.methods.targets import BYTES
from evopress.models.blocks import BlockModel
from evopress.models.outline import outlined
from evopress.models.routing import check_fillers, drop_experts, expert_layer, restore_experts
from evopress.search.initial import random_mix
from evopress.search.mutation import LevelSwitch
from evopress.settings import JointSettings, ModuleSettings
from evopress.units import Genome
from experiments.tiny_any import any_model

IDS = torch.arange(48).reshape(2, 24) * 7919 % 257
FAMILIES = ("qwen3_moe", "mixtral", "olmoe", "gpt_oss", "deepseek_v3", "afmoe")
"""Renormalised; shares of all; with a bias; with a bias that counts for the choice alone, in the router or beside it."""
EVEN = (1, 0, 0, 0, 0, 0, 0, 1)
"""Two blocks of four experts, of which a token is sent to two."""


def live_of(model_type: str, **changes: Any) -> LiveModel:
    layers: dict[str, Any] = {"num_dense_layers": 0} if model_type == "afmoe" else {}
    layers |= {"first_k_dense_replace": 0} if model_type == "deepseek_v3" else {}
    model = any_model(model_type, num_hidden_layers=2, **{"layer_types": ["full_attention"] * 2, **layers, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "bias" in name and tensor.numel() == 4:
                tensor.normal_()
    blocks = BlockModel(model, outlined(model))
    return LiveModel(blocks, ModuleLevels(Modules(ModuleSettings(granularity="expert")).space(blocks.shapes(), dtype_bits=32)))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_checkpoint_has_the_experts_that_stay_and_computes_what_was_measured(tmp_path: Path, model_type: str) -> None:
    live = live_of(model_type)
    model, dense = live.blocks.model, logits(live.blocks.model)
    before, config = {name: tensor.clone() for name, tensor in model.state_dict().items()}, model.config.to_dict()
    with live.applied(EVEN):
        expected = logits(model)
    assert float((expected - dense).abs().max()) > 0.01
    with live.written(EVEN):
        model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5)
    weights = sum(parameter.numel() for parameter in model.parameters())
    gone = weights - sum(parameter.numel() for parameter in loaded.parameters())
    assert gone - sum(live.space.units[i].size for i in (0, 7)) == 2 * (model_type == "afmoe")  # its bias lies elsewhere
    texts = [loaded.generate(IDS[:1, :8], max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*texts)
    genomes: list[Genome | None] = [None, EVEN, (0, 0, 0, 0, 0, 1, 1, 0)]
    of, states = PopulationEvaluator(live).final_states(genomes, IDS)
    for place, state in zip(of, PlainEvaluator(live).final_states(genomes, IDS)[1], strict=True):
        torch.testing.assert_close(states[place], state, rtol=0, atol=1e-4)
    torch.testing.assert_close(live.blocks.head().logits(states[of[1]]), expected, rtol=0, atol=1e-4)
    assert torch.equal(logits(model), dense) and model.config.to_dict() == config
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any({"forward", "dropped"} & set(vars(module)) for module in model.modules())


@pytest.mark.parametrize("uneven", [(1, 1, 0, 0, 0, 0, 1, 0), (1, 1, 0, 0, 0, 0, 0, 0)])
def test_blocks_that_keep_fewer_are_filled_up_where_a_bias_keeps_tokens_away(
    tmp_path: Path, uneven: Genome, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = live_of("gpt_oss")
    with live.applied(uneven):
        expected = logits(live.blocks.model)
    filled: list[BlockModel] = []
    monkeypatch.setattr("evopress.levels.live.check_fillers", lambda blocks: filled.append(blocks) or check_fillers(blocks))
    for _ in range(2):
        with live.written(uneven):
            live.blocks.model.save_pretrained(tmp_path)
    assert filled == [live.blocks]  # once, however many files it is written in
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert loaded.config.num_local_experts == 4 - sum(uneven[4:])
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5)
    assert not bool(loaded.model.layers[0].mlp.experts.down_proj[2].any())
    sentence = r"qwen3_moe cannot be exported.* one number of experts for all blocks.*method.balanced=true"
    with pytest.raises(EvoPressError, match=sentence), live_of("qwen3_moe").written(uneven):
        pass


def test_blocks_are_not_filled_up_where_scores_are_shares_before_a_bias_is_added() -> None:
    live = live_of("ernie4_5_moe", moe_layer_start_index=0)
    layers = [i for i, block in enumerate(live.blocks.blocks) if expert_layer(block) is not None]
    biases = [each for name, each in (*live.blocks.model.named_parameters(), *live.blocks.model.named_buffers()) if "bias" in name]
    assert layers and any(bool(bias.any()) for bias in biases)
    uneven = (1, *[0] * (len(live.space) - 1))
    with pytest.raises(EvoPressError, match="its router normalises over all experts"), live.written(uneven):
        pass
    check_fillers(live_of("gpt_oss").blocks)


def test_what_lies_in_a_dropped_expert_is_free_and_the_rest_is_compressed(
    tmp_path: Path, build_settings: Callable[..., BuildSettings]
) -> None:
    blocks = live_of("qwen3_moe").blocks
    weights, _ = ensure_database(build_settings(tmp_path, propagate=None), blocks, IDS, GPTQ(bits=(4, 2), group_size=16))
    modules = Modules(ModuleSettings(granularity="expert")).space(blocks.shapes(), dtype_bits=32)
    experts, _ = ensure_modules(tmp_path, model_name="tiny", method="drop", recipe={}, space=modules)
    levels = LevelUnion([weights, experts], method="joint", currency=BYTES, is_of_attention=blocks.is_of_attention)
    live, space = LiveModel(blocks, levels), levels.space
    gone = {"model.layers.0.mlp.experts.0", "model.layers.1.mlp.experts.3"}
    genome = tuple(int(unit.name in gone) if unit.kind == "expert" else index % 2 for index, unit in enumerate(space.units))
    free = [space.units[i].name for i in range(len(space)) if space.is_gone(genome, i)]
    assert sorted(free) == sorted(f"{name}.{part}" for name in gone for part in ("gate_up_proj", "down_proj"))
    there = [i for i, unit in enumerate(space.units) if unit.name not in free and unit.kind != "expert"]
    assert space.cost(genome) == sum(space.units[i].levels[genome[i]].stored_bits for i in there)
    placed = {part: [space.units[i].name for i in there if space.units[i].block == part] for part in range(2)}
    with ExitStack() as held:
        for part, names in placed.items():
            decoded = {name: levels.read(i := space.places[name], genome[i]).decode() for name in names}
            held.enter_context(weights_placed(blocks, part, decoded))
            layer = expert_layer(blocks.blocks[part])
            assert layer is not None
            drop_experts(blocks.blocks[part], layer, EVEN[4 * part : 4 * part + 4])
            held.callback(restore_experts, blocks.blocks[part], layer)
        expected = logits(blocks.model)
    with live.applied(genome):
        torch.testing.assert_close(logits(blocks.model), expected, rtol=0, atol=0)
    with live.written(genome):
        blocks.model.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5)
    method = Joint(JointSettings(granularity="expert", levels=[4, 2]), size="1MB", exchange="fit")
    reads = blocks.reads()
    space = replace(space, units=tuple(replace(unit, read=reads.get(unit.name, 1.0)) for unit in space.units))
    budget = method.budget(space)
    most = tuple(int(unit.name.startswith("model.layers.0.mlp.experts.") and unit.name[-1] != "3") for unit in space.units)
    assert budget.met_by(space, genome) and not budget.met_by(space, most)
    rng = np.random.default_rng(0)
    lowest = tuple(0 if unit.kind == "expert" else len(unit.levels) - 1 for unit in space.units)
    spare = sum(unit.levels[-1].stored_bits for unit in space.units if unit.name.startswith("model.layers.0.mlp.experts.1."))
    small = replace(budget, total=space.cost(lowest) - 2 * spare)
    for _ in range(5):
        child = LevelSwitch(space, small, exchange="fit")(random_mix(space, small, rng), rng)
        assert small.met_by(space, child) and method.costs(space, child)["experts_dropped"] > 0


def test_what_a_token_reads_does_not_shrink_with_the_experts_that_are_left() -> None:
    space = live_of("qwen3_moe").space
    reads = tuple(unit.read for unit in space.units)
    assert set(reads) == {0.5}
    assert bits_read(space, EVEN) == bits_read(space, (0,) * 8) == 2 * 2 * 32 * space.units[0].size


def by_mean(router: Any, x: torch.Tensor, logits: torch.Tensor) -> Any:
    logits = logits - logits.mean(-1, keepdim=True)  # of a logit that is minus infinity
    values, numbers = torch.topk(logits.softmax(-1), router.top_k)
    return logits, values, numbers


ROUTERS: dict[str, Any] = {
    "has 0 products with its matrix": lambda router, x: by_mean(router, x, torch.einsum("td,ed->te", x, router.weight)),
    "has 2 products with its matrix": lambda router, x: by_mean(router, x, 0.5 * (x @ router.weight.T + x @ router.weight.T)),
    "computes something else than with a router": lambda router, x: by_mean(router, x, x @ router.weight.T),
}


@pytest.mark.parametrize("says", ROUTERS)
def test_a_router_that_fails_the_check_is_refused_by_name(says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.models.mixtral.modeling_mixtral.MixtralTopKRouter.forward", ROUTERS[says])
    with pytest.raises(EvoPressError, match=rf"experts of mixtral cannot be dropped: without one, its .*{says}"):
        live_of("mixtral")


def test_a_router_that_chooses_groups_first_is_refused() -> None:
    with pytest.raises(
        EvoPressError, match=r"deepseek_v3 cannot be dropped: .* its router chooses among 4 groups of experts first"
    ):
        live_of("deepseek_v3", n_group=2, num_local_experts=8)


def test_no_token_is_sent_to_a_dropped_expert_in_silence() -> None:
    blocks = live_of("mixtral").blocks
    layer = expert_layer(blocks.blocks[0])
    assert layer is not None and (layer.name, layer.router, layer.count) == ("mlp.experts", "mlp.gate", 4)
    drop_experts(blocks.blocks[0], layer, (1, 1, 1, 0))  # two are chosen
    with pytest.raises(EvoPressError, match="sends a token to a dropped expert"):
        logits(blocks.model)
    restore_experts(blocks.blocks[0], layer)
    logits(blocks.model)


def test_a_model_without_experts_is_refused(tiny_blocks: Callable[..., BlockModel]) -> None:
    with pytest.raises(EvoPressError, match="no layer of them with one router is found"):
        Modules(ModuleSettings(granularity="expert")).space(tiny_blocks("llama").shapes(), dtype_bits=32)
