"""Experts as linears of their own: what they compute, what reaches them, and the parameter that they look at."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attribution_literal import attribute_plainly

from evopress.compress.gptq import GPTQ
from evopress.errors import EvoPressError
from evopress.fitness.attribution import attribute
from evopress.fitness.measures import KLDivergence
from evopress.fitness.minibatch import base_states
from evopress.fitness.population import PopulationEvaluator
from evopress.levels import calibration
from evopress.levels.build import ensure_database
from evopress.levels.calibration import collect_hessians
from evopress.levels.live import LiveModel
from evopress.levels.plan import BuildSettings
from evopress.models import experts
from evopress.models.blocks import BlockModel
from evopress.models.experts import gathered, linears_of, together
from evopress.models.outline import outlined
from experiments.tiny_any import any_model

IDS = torch.arange(48).reshape(2, 24) * 7919 % 257
FORMS = ("qwen3_moe", "gpt_oss", "llama4_text", "nemotron_h")
"""Plain; transposed, interleaved, with biases; transposed and handed all tokens; without a gate."""


def opened(model_type: str) -> BlockModel:
    model = any_model(model_type)
    return BlockModel(model, outlined(model))


def logits(blocks: BlockModel) -> torch.Tensor:
    with torch.no_grad():
        return blocks.model(input_ids=IDS, use_cache=False).logits


def layer_of(blocks: BlockModel) -> tuple[int, Any]:
    """Return the first block with experts, and what holds them."""
    return next((i, module) for i, block in enumerate(blocks.blocks) for module in block.modules() if linears_of(module))


@pytest.mark.parametrize("model_type", FORMS)
def test_experts_one_after_another_are_the_experts_together(model_type: str) -> None:
    model = any_model(model_type)
    before, names = (
        {name: each.clone() for name, each in model.state_dict().items()},
        [name for name, _ in model.named_parameters()],
    )
    with torch.no_grad():
        expected = model(input_ids=IDS, use_cache=False).logits
    blocks = BlockModel(model, outlined(model))
    torch.testing.assert_close(logits(blocks), expected, rtol=1e-4, atol=1e-5)
    with together(model):
        torch.testing.assert_close(logits(blocks), expected, rtol=0, atol=0)
    assert [name for name, _ in model.named_parameters()] == names
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    index, experts = layer_of(blocks)
    units = [name for name in blocks.slots(index) if ".experts." in name and "shared" not in name]
    assert len(units) == 2 * len(experts.down_proj)
    assert {blocks.slots(index)[name].kind.split(".")[0] for name in units} == {"experts"}


@pytest.mark.parametrize("model_type", FORMS)
def test_a_level_of_one_expert_is_its_own_and_is_gathered_for_an_export(model_type: str) -> None:
    blocks = opened(model_type)
    dense = logits(blocks)
    index, experts = layer_of(blocks)
    name = next(name for name in blocks.slots(index) if name.endswith("experts.2.down_proj"))
    slot = blocks.slots(index)[name]
    kept, parameter = slot.weight, experts.down_proj
    whole = parameter.detach().clone()
    slot.put(torch.zeros_like(kept))
    changed = logits(blocks)
    assert not torch.equal(changed, dense)
    assert torch.equal(parameter, whole)
    with gathered(blocks.model):
        assert not bool(experts.down_proj[2].any())
        assert torch.equal(experts.down_proj[[0, 1, 3]], whole[[0, 1, 3]])
        with together(blocks.model):
            torch.testing.assert_close(logits(blocks), changed, rtol=1e-4, atol=1e-5)
    assert experts.down_proj.data_ptr() == parameter.data_ptr() and torch.equal(parameter, whole)
    slot.put(kept)
    assert torch.equal(logits(blocks), dense)


def hessians_of(blocks: BlockModel, index: int) -> Any:
    hidden = blocks.embed(IDS)
    for block in range(index):
        hidden = blocks.run(block, hidden)
    return collect_hessians(blocks, index, hidden, 1)


def test_an_expert_s_hessian_is_that_of_the_tokens_routed_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "LEAST_TOKENS", 1)
    blocks = opened("qwen3_moe")
    index, experts = layer_of(blocks)
    handed: list[tuple[torch.Tensor, torch.Tensor]] = []
    hook = experts.register_forward_pre_hook(lambda module, args: handed.append((args[0], args[1])))
    found = hessians_of(blocks, index)
    hook.remove()
    for expert in range(4):
        rows = torch.cat([hidden[(numbers == expert).any(-1)] for hidden, numbers in handed[-2:]]).double()
        H = found.hessians[f"model.layers.{index}.mlp.experts.{expert}.gate_up_proj"].double()
        torch.testing.assert_close(H / H.trace(), rows.T @ rows / (rows.T @ rows).trace(), rtol=1e-4, atol=1e-6)


def test_experts_that_saw_few_tokens_share_the_mean_and_are_named(caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    blocks = opened("qwen3_moe")
    index, _ = layer_of(blocks)
    monkeypatch.setattr(calibration, "LEAST_TOKENS", 1)
    own = hessians_of(blocks, index)
    names = [f"model.layers.{index}.mlp.experts.{expert}.gate_up_proj" for expert in range(4)]
    monkeypatch.setattr(calibration, "LEAST_TOKENS", 10_000)
    with caplog.at_level(logging.WARNING):
        pooled = hessians_of(blocks, index)
    assert {pooled.owners[name] for name in names} == {names[0]}
    mean, sums = pooled.hessians[names[0]], sum(own.hessians[name] for name in names if name in own.hessians)
    torch.testing.assert_close(mean / mean.trace(), sums / sums.trace(), rtol=1e-4, atol=1e-6)  # type: ignore[union-attr,operator]
    assert f"model.layers.{index}.mlp.experts: 4 of 4 experts saw fewer than 10000 calibration tokens (0, 1, 2, 3)" in caplog.text


def live_of(model_type: str, root: Path, build_settings: Callable[..., BuildSettings]) -> LiveModel:
    blocks = opened(model_type)
    database, _ = ensure_database(build_settings(root, propagate=None), blocks, IDS, GPTQ(bits=(4, 2), group_size=16))
    return LiveModel(blocks, database)


def test_what_an_expert_holds_is_that_of_the_tokens_routed_to_it(
    tmp_path: Path, build_settings: Callable[..., BuildSettings]
) -> None:
    live = live_of("qwen3_moe", tmp_path, build_settings)
    base = base_states(PopulationEvaluator(live), IDS, batch_tokens=48)
    genome = tuple(index % 2 for index in range(len(live.space)))
    found = attribute(live, genome, IDS, base, KLDivergence())
    expected = attribute_plainly(live, genome, IDS, KLDivergence())
    experts = [i for i, unit in enumerate(live.space.units) if unit.kind.startswith("experts.")]
    assert float(expected[:, experts].abs().max()) > 1e-4
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_experts_travel_with_their_block(tmp_path: Path, build_settings: Callable[..., BuildSettings], monkeypatch: Any) -> None:
    live = live_of("qwen3_moe", tmp_path, build_settings)
    genomes = [None, (1,) * len(live.space)]
    _, states = PopulationEvaluator(live).final_states(genomes, IDS)
    monkeypatch.setattr(live.blocks, "offload", True)
    monkeypatch.setattr(live.blocks, "_carried", lambda data: data.clone())
    index, experts = layer_of(live.blocks)
    at_home = {name: linear.weight.data_ptr() for name, linear in linears_of(experts).items()}
    with live.blocks.on_device(index):
        assert not set(at_home.values()) & {linear.weight.data_ptr() for linear in linears_of(experts).values()}
    _, carried = PopulationEvaluator(live).final_states(genomes, IDS)
    assert all(torch.equal(one, other) for one, other in zip(states, carried, strict=True))
    assert {name: linear.weight.data_ptr() for name, linear in linears_of(experts).items()} == at_home


@pytest.mark.parametrize("seed", range(4))
def test_a_rounding_that_sends_a_token_elsewhere_is_no_other_model(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = any_model("mixtral", seed=seed).to(torch.bfloat16)
    blocks = BlockModel(model, outlined(model))
    blocks.self_check(full_length=64)
    forward = experts._forward
    monkeypatch.setattr(experts, "_forward", lambda *args, **kwargs: 1.5 * forward(*args, **kwargs))
    experts._LOOPED.clear()
    wrong = any_model("mixtral", seed=seed).to(torch.bfloat16)
    try:
        with pytest.raises(EvoPressError, match="changes its experts' outputs by"):
            BlockModel(wrong, outlined(wrong)).self_check()
    finally:
        experts._LOOPED.clear()


def test_linears_look_at_a_model_that_was_moved_since() -> None:
    model = any_model("qwen3_moe")
    outline = outlined(model)
    BlockModel(model, outline)
    model.to(torch.bfloat16)
    blocks = BlockModel(model, outline)
    _, layer = layer_of(blocks)
    weights = [linear.weight for linear in linears_of(layer).values()]
    assert {weight.dtype for weight in weights} == {torch.bfloat16}
    assert weights[0].data_ptr() in {parameter.data_ptr() for parameter in layer.parameters()}
    blocks.self_check()
