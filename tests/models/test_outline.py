"""Models without an adapter of their own: what is found, and that it is the whole model's."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from evopress.errors import EvoPressError
from evopress.models.blocks import BlockModel, by_blocks
from evopress.models.dropping import shortened, without_dropped
from evopress.models.families import family_of
from evopress.models.head import scale_of
from evopress.models.loading import check_folder
from evopress.models.outline import find_family, outlined, skeleton
from experiments.model_types import TOLERANCE, page, survey
from experiments.tiny_any import any_config, any_model


def opened(model_type: str, **changes: Any) -> BlockModel:
    model = any_model(model_type, **changes)
    family = outlined(model)
    with by_blocks(family):
        return BlockModel(model, family)


def checked(model_type: str) -> None:
    blocks = opened(model_type)
    with by_blocks(blocks.family):
        blocks.self_check()


@pytest.mark.parametrize("model_type", ["gpt2", "nemotron_h", "gemma4_text"])
def test_a_model_without_an_adapter_goes_through_all_methods(model_type: str) -> None:
    (row,) = survey([model_type])
    assert row.works and row.units > 0.9, row
    assert row.differences and max(value for _, value in row.differences) < TOLERANCE, row.differences
    assert row.cache and bool(row.no_drop) == (model_type == "gemma4_text"), row
    assert row.experts == ("" if model_type == "nemotron_h" else None)
    of = f"{model_type}, without shared layers" if model_type == "gemma4_text" else model_type
    assert f"| {of} | {row.units:.0%} |" in page([row])


@pytest.mark.slow
def test_every_causal_architecture_works_or_is_refused_in_a_sentence() -> None:
    from experiments.tiny_any import causal_types

    rows = survey(causal_types())
    assert not [row for row in rows if "BROKEN" in row.refused or "WRONG" in row.refused + row.no_drop + (row.experts or "")]
    assert sum(row.works for row in rows) >= 130
    assert {row.model_type for row in rows if row.works and row.cache is False} <= {"glm_moe_dsa"}  # why is not known yet


def test_a_forward_is_planned_by_the_widest_mlp_of_a_model_whose_blocks_have_widths_of_their_own() -> None:
    blocks = opened("gemma3n_text", intermediate_size=[64, 96, 64, 32])
    assert blocks.inner_size == 96 and blocks.forward_bytes(48, 24) > 0


def test_a_model_without_attention_holds_no_scores() -> None:
    blocks = opened("falcon_mamba")
    assert blocks.scores_bytes(24) == 0 < blocks.forward_bytes(48, 24)


def test_the_config_alone_tells_what_a_running_model_shows() -> None:
    for model_type in ("gpt2", "lfm2", "falcon_h1"):
        blocks = opened(model_type)
        from_config = find_family(blocks.model.config.to_dict())
        assert from_config.prefix == blocks.family.prefix
        for index in range(len(blocks.blocks)):
            there, here = from_config.parts(index), blocks.family.parts(index)
            assert set(there.linears) == set(here.linears)
            assert (there.attention, there.mlp) == (here.attention, here.mlp)


def test_what_is_found_of_a_llama_is_what_is_known_of_it(tiny_blocks: Callable[..., BlockModel]) -> None:
    known = tiny_blocks("llama")
    found = BlockModel(known.model, outlined(known.model))
    assert (found.family.decoder, found.family.blocks) == (known.family.decoder, known.family.blocks)
    assert list(found.linears(0)) == list(known.linears(0))
    assert found.family.parts(0).returns == {"": 0, "self_attn": 2, "mlp": 0}
    ids = torch.arange(24).reshape(2, 12)
    hidden = [each.finish(each.run(1, each.run(0, each.embed(ids)))) for each in (known, found)]
    assert torch.equal(*hidden)


def test_it_is_said_once_what_was_found(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        opened("nemotron_h")
    (said,) = [record.getMessage() for record in caplog.records if "no adapter" in record.getMessage()]
    assert "found 4 blocks in model.layers (" in said
    assert "1 NemotronHMamba2Mixer" in said or "1 NemotronHMambaMixer" in said
    assert "% of their weights in linears" in said


def test_tiny_projections_routers_and_norms_stay_dense() -> None:
    blocks = opened("qwen3_5_text")
    reasons = blocks.family.dense
    assert set(reasons.values()) == {"less than 16 wide"}
    assert {name.rsplit(".", 1)[-1] for name in reasons} == {"in_proj_a", "in_proj_b"}
    assert not set(reasons) & {f"{i}.{name}" for i in range(4) for name in blocks.family.parts(i).linears}


def test_a_head_s_scale_is_the_model_s() -> None:
    ids = torch.arange(12)[None]
    scaled = {"cohere": {"logit_scale": 0.25}, "granite": {"logits_scaling": 8.0}, "hyperclovax": {"logits_scaling": 0.125}}
    for model_type, changes in scaled.items():
        blocks = opened(model_type, **changes)
        assert blocks.head().scale == (0.25 if model_type == "cohere" else 0.125)
        assert blocks.self_check() < TOLERANCE
        states = blocks.finish(blocks._through(ids))[0]
        some = torch.tensor([[3, 5]] * 12)
        expected = blocks.model(input_ids=ids).logits[0].gather(1, some)
        torch.testing.assert_close(blocks.head().logits_of(states, some), expected, rtol=1e-4, atol=1e-5)


def test_a_scale_inside_a_model_with_pictures_is_its_text_part_s() -> None:
    for model_type, field in (("hyperclovax_vision_v2", "logits_scaling"), ("muse_glimmer", "output_multiplier")):
        text = CONFIG_MAPPING[model_type](text_config={field: 0.125}).get_text_config()
        assert scale_of(text) == 0.125


def test_what_a_window_changes_shows_only_at_the_run_s_own_length(tiny_blocks: Callable[..., BlockModel]) -> None:
    blocks = tiny_blocks("gemma3_text")  # a window of 16 tokens
    captured = blocks.capture

    def wrong(ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls = captured(ids, *args, **kwargs)
        unmasked = [replace(call, kwargs=call.kwargs | {"attention_mask": None}) for call in calls]
        return calls if ids.shape[1] <= 16 else unmasked

    blocks.capture = wrong  # type: ignore[method-assign]
    blocks.self_check(length=16)
    with pytest.raises(EvoPressError, match=r"changes its last hidden state of 40 tokenss by"):
        blocks.self_check(length=16, full_length=40)


def test_what_a_model_keeps_between_calls_fails_the_self_check() -> None:
    blocks = opened("gpt2")
    kept: list[torch.Tensor] = []

    def keeping(module: Any, args: Any, output: torch.Tensor) -> None:
        kept[:] = [output]

    def using(module: Any, args: tuple[torch.Tensor, ...]) -> Any:
        return (args[0] + kept[0][-1:], *args[1:])

    blocks.blocks[0].register_forward_hook(keeping)
    blocks.blocks[2].register_forward_pre_hook(using)
    with pytest.raises(EvoPressError, match="gpt2 block by block changes its logits"):
        blocks.self_check()


@pytest.mark.parametrize(
    ("model_type", "says"),
    [
        ("jetmoe", r"only \d+% of the weights of jetmoe's blocks .* are in JetMoeParallelExperts"),
        ("hrm_text", "no list of .* blocks of their own"),
        ("xlnet", r"have the shape \[6, 2, 32\]"),
        ("electra", "running electra block by block failed"),
    ],
)
def test_what_cannot_be_run_is_one_sentence(model_type: str, says: str) -> None:
    with pytest.raises(EvoPressError, match=says):
        checked(model_type)


def test_blocks_that_use_the_keys_of_earlier_ones_are_refused_by_the_config_alone(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    for model_type in ("gemma3n_text", "gemma4_text"):
        any_config(model_type, num_kv_shared_layers=2, layer_types=kinds).save_pretrained(tmp_path)
        with pytest.raises(EvoPressError, match=rf"the last 2 blocks of this {model_type} use the keys and values of earlier ones"):
            check_folder(tmp_path)


def test_a_config_that_cannot_be_built_is_one_sentence() -> None:
    with pytest.raises(EvoPressError, match="cannot build 'gpt2' from its config"):
        skeleton(any_config("gpt2", n_head=5).to_dict())


def test_blocks_that_cannot_be_described_stay_with_weights_of_zeros(tmp_path: Path) -> None:
    blocks = opened("lfm2")
    with without_dropped(blocks, [(0, 0), (1, 1), (0, 1), (0, 0)]):
        blocks.model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"] == 3
    blocks = opened("diffllama")  # whose attention depends on the block's number
    with without_dropped(blocks, [(0, 0), (1, 1), (0, 1), (0, 0)]):
        stay = blocks.model.get_submodule(blocks.family.prefix)
        assert len(stay) == 4
        assert not any(bool(each.weight.any()) for each in (stay[1].self_attn.q_proj, stay[1].mlp.down_proj))
        assert bool(stay[2].self_attn.q_proj.weight.any()) and not bool(stay[2].mlp.down_proj.weight.any())
    assert bool(blocks.blocks[1].self_attn.q_proj.weight.any())


@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "falcon_mamba", "falcon_h1", "bamba", "jamba", "recurrent_gemma"])
def test_kinds_of_blocks_that_a_config_works_out_need_not_be_cut(model_type: str, tmp_path: Path) -> None:
    blocks = opened(model_type)
    with without_dropped(blocks, [(0, 0), (0, 0), (0, 0), (1, 1)]):
        assert len(blocks.model.get_submodule(blocks.family.prefix)) == 3
        blocks.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(loaded.get_submodule(blocks.family.prefix)) == 3


def test_kinds_of_blocks_that_are_worked_out_otherwise_are_not_described() -> None:
    blocks = opened("recurrent_gemma")  # every third block is one of attention
    with pytest.raises(EvoPressError, match="layer_types of the model's config is worked out from other fields"):
        shortened(blocks.model.config, (1, 2, 3), 4, blocks.family)


def test_named_families_keep_their_names() -> None:
    assert find_family({"model_type": "llama"}) is family_of("llama")
