import pytest
import torch
from transformers import AutoModelForCausalLM, OPTConfig, Qwen2MoeConfig

from evopress.errors import EvoPressError
from evopress.models.blocks import BlockModel
from evopress.models.families import FAMILIES, family_of, named_family

TYPES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text", "opt")


def by_blocks(blocks, ids):
    hidden = blocks.embed(ids)
    for index in range(len(blocks.blocks)):
        hidden = blocks.run(index, hidden)
    return blocks.head().logits(blocks.finish(hidden))


def whole(blocks, ids):
    with torch.no_grad():
        return blocks.model(input_ids=ids, use_cache=False).logits.float()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", TYPES)
def test_the_self_check_passes_on_every_family(model_type, dtype, tiny_blocks):
    difference = tiny_blocks(model_type, num_blocks=2, dtype=dtype).self_check()
    assert difference < (1e-4 if dtype == "float32" else 0.1)


@pytest.mark.parametrize("model_type", TYPES)
def test_logits_by_blocks_are_the_models_for_any_batch_and_length(model_type, tiny_blocks, tokens):
    blocks = tiny_blocks(model_type, num_blocks=3)
    for count, length in ((1, 40), (5, 40), (3, 7), (2, 2), (1, 1)):  # windows of the Gemmas are 16 tokens
        ids = tokens(count, length, seed=count)
        torch.testing.assert_close(by_blocks(blocks, ids), whole(blocks, ids), rtol=1e-4, atol=1e-4)


def test_many_lengths_do_not_pile_up(tiny_blocks, tokens):
    blocks = tiny_blocks("gemma2", num_blocks=2)
    for length in (*range(3, 20), 3):
        ids = tokens(2, length)
        torch.testing.assert_close(by_blocks(blocks, ids), whole(blocks, ids), rtol=1e-4, atol=1e-4)
        assert len(blocks._calls) <= 8


def test_the_check_would_see_a_window_or_a_soft_cap_that_is_missed(tiny_blocks, tokens):
    blocks = tiny_blocks("gemma2", num_blocks=2)
    assert blocks.head().softcap == blocks.model.config.final_logit_softcapping is not None
    ids = tokens(2, 40)
    calls = blocks._captured(1, 40)
    blocks._calls[1, 40] = [calls[1], calls[1]]  # the sliding block with the mask of the full one
    assert (by_blocks(blocks, ids) - whole(blocks, ids)).abs().max() > 1e-3


@pytest.mark.parametrize("variant", ["norm_after", "projected", "no_final_norm"])
def test_variants_of_opt(variant, tokens):
    settings = {"norm_after": {"do_layer_norm_before": False}, "projected": {"word_embed_proj_dim": 16}}
    settings["no_final_norm"] = {"_remove_final_layer_norm": True}
    config = OPTConfig(
        vocab_size=64,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        **({"word_embed_proj_dim": 32} | settings[variant]),
    )
    blocks = BlockModel(AutoModelForCausalLM.from_config(config).eval(), family_of("opt"))
    blocks.self_check()
    ids = tokens(2, 9) % 64
    torch.testing.assert_close(by_blocks(blocks, ids), whole(blocks, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", TYPES)
def test_the_units_are_all_linear_weights_of_the_blocks(model_type, tiny_blocks):
    blocks = tiny_blocks(model_type, num_blocks=2)
    assert len(blocks.blocks) == 2
    modules = dict(blocks.model.named_modules())
    prefix = f"{blocks.family.decoder}.layers."
    linears = {name for name, module in modules.items() if isinstance(module, torch.nn.Linear) and name.startswith(prefix)}
    found = {**blocks.linears(0), **blocks.linears(1)}
    assert set(found) == linears
    assert all(modules[name] is linear for name, linear in found.items())
    assert [name.removeprefix(f"{prefix}0.") for name in blocks.linears(0)] == list(blocks.family.linears)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_attention_and_mlp_modules_exist(family, tiny_blocks):
    block = tiny_blocks(next(t for t in family.model_types if t in TYPES), num_blocks=1).blocks[0]
    block.get_submodule(family.attention)
    block.get_submodule(family.mlp)


def test_a_model_whose_blocks_are_run_another_way_fails_the_self_check(tiny_blocks, monkeypatch):
    blocks = tiny_blocks("llama", num_blocks=2)
    run = blocks.run
    monkeypatch.setattr(blocks, "run", lambda index, hidden: run(index, hidden) * 1.01)
    with pytest.raises(EvoPressError, match=r"running llama block by block changes its logits .*fitness\.evaluator=plain"):
        blocks.self_check()


def test_a_product_that_depends_on_how_many_rows_it_has_passes_the_self_check(tiny_blocks):
    # bfloat16 products of some CPUs do: SmolLM2's logits of two sequences together and one by one are 6% apart there.
    blocks = tiny_blocks("llama", num_blocks=2)
    for block in blocks.blocks:
        block.mlp.down_proj.register_forward_hook(lambda module, args, output: output * (1 + 0.5 * len(args[0])))
    assert blocks.self_check() < 1e-4


def test_logits_that_are_not_finite_fail_the_self_check(tiny_blocks):
    blocks = tiny_blocks("llama", num_blocks=1)
    blocks.blocks[0].mlp.down_proj.weight.data.fill_(float("inf"))
    with pytest.raises(EvoPressError, match="not finite"):
        blocks.self_check()


def test_mixture_of_experts_blocks_are_refused_by_name():
    config = Qwen2MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=2,
        num_experts_per_tok=1,
    )
    blocks = BlockModel(AutoModelForCausalLM.from_config(config), family_of("qwen2"))
    with pytest.raises(EvoPressError, match=r"model\.layers\.0\.mlp\.gate_proj is missing, .*mixture-of-experts"):
        blocks.linears(0)


def test_special_linear_modules_are_refused_by_name(tiny_blocks):
    class Special(torch.nn.Linear):
        pass

    blocks = tiny_blocks("llama", num_blocks=1)
    blocks.blocks[0].self_attn.k_proj = Special(32, 16)
    with pytest.raises(EvoPressError, match=r"k_proj is a Special, expected a plain linear layer"):
        blocks.linears(0)


def test_captures_leave_nothing_behind_on_the_model(tiny_blocks, tokens, weights_digest):
    blocks = tiny_blocks("opt", num_blocks=2)
    before = weights_digest(blocks.model)
    by_blocks(blocks, tokens(2, 6))
    assert all("forward" not in vars(block) for block in blocks.blocks)
    assert weights_digest(blocks.model) == before
    with pytest.raises(IndexError):  # a token that does not exist
        blocks.embed(torch.full((1, 4), 10_000))
    assert all("forward" not in vars(block) for block in blocks.blocks)


def test_families_do_not_overlap():
    types = [model_type for family in FAMILIES for model_type in family.model_types]
    assert len(types) == len(set(types))
    assert all(family_of(model_type).name for model_type in types)
    assert named_family("mamba") is None
