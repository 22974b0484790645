"""What becomes of a model's configuration when blocks are left out; dropping itself is tested in `tests/levels/test_modules.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from evopress.errors import EvoPressError
from evopress.levels.live import LiveModel
from evopress.levels.modules import ModuleLevels
from evopress.methods.drop import Modules
from evopress.models.blocks import BlockModel
from evopress.models.dropping import check_fields, shortened, without_dropped
from evopress.models.families import family_of
from evopress.models.outline import outlined
from evopress.models.tiny import tiny_config
from evopress.settings import ModuleSettings
from experiments.tiny_any import any_model

KEPT = (0, 2, 3)


def cut(model_type: str = "llama", **fields: Any) -> Any:
    """Return a configuration of four blocks with further fields, without the second block, as it is read from its file."""
    config = tiny_config(model_type, num_blocks=4)
    for key, value in fields.items():
        setattr(config, key, value)
    return shortened(config, KEPT, 4, family_of(model_type))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eos_token_id", [0, 1, 2, 3]),
        ("suppress_tokens", [5, 6, 7, 8]),
        ("bad_words_ids", [[1], [2], [3], [4]]),
        ("architectures", ["A", "B", "C", "D"]),
        ("id2label", {i: str(i) for i in range(4)}),
        ("rope_parameters", {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": [1.0] * 4, "short_factor": [1.0] * 4}),
        ("some_list", [1, 2, 3]),
        ("some_numbers", {"7": 1, "9": 2}),
    ],
)
def test_what_only_has_the_length_of_the_model_stays(key: str, value: Any) -> None:
    assert getattr(cut(**{key: value}), key) == value


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "ministral", "qwen2", "qwen3"])
def test_the_kinds_of_blocks_are_cut(model_type: str) -> None:
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    config = cut(model_type, layer_types=kinds)
    assert config.layer_types == [kinds[index] for index in KEPT]
    assert config.num_hidden_layers == 3


@pytest.mark.parametrize("number", [int, str])
def test_a_dictionary_by_block_is_numbered_anew(number: Any) -> None:
    heads = {number(1): [0], number(3): [1]}
    config = tiny_config(num_blocks=4)
    config.pruned_heads = heads
    assert shortened(config, KEPT, 4, family_of("llama")).pruned_heads == {number(2): [1]}
    assert config.pruned_heads == heads


@pytest.mark.parametrize(("full", "expected"), [(0, 0), (1, 1), (2, 1), (3, 2), (4, 4), (28, 28)])
def test_the_first_block_with_a_sliding_window_moves_up(full: int, expected: int) -> None:
    assert cut("qwen2", max_window_layers=full).max_window_layers == expected


def test_a_shortened_model_with_sliding_windows_attends_as_its_blocks_did(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tiny_config("qwen2", num_blocks=4)
        config.use_sliding_window, config.sliding_window, config.max_window_layers = True, 4, 2
        config.layer_types = ["full_attention"] * 2 + ["sliding_attention"] * 2
        model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(16)[None] * 7 % 257
    del model.model.layers[1]
    for place, block in enumerate(model.model.layers):
        block.self_attn.layer_idx = place
    model.config = model.model.config = shortened(config, KEPT, 4, family_of("qwen2"))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        model.save_pretrained(tmp_path)
        written = AutoConfig.from_pretrained(tmp_path)
        written.layer_types = None  # what an engine makes of the other fields
        assert type(written)(**written.to_dict()).layer_types == model.config.layer_types
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(loaded(input_ids=ids, use_cache=False).logits, expected)


@pytest.mark.parametrize(
    "fields",
    [{"kv_heads": [1, 2, 1, 2]}, {"num_key_value_heads": (1, 1, 1, 1)}, {"bits_of": {"0": 4, "3": 2}}, {"bits_of": {1: 4}}],
)
def test_what_may_be_an_entry_per_block_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(
        EvoPressError, match=rf"config has {next(iter(fields))}=.* one entry per block, of 4 blocks.*: leave export out"
    ):
        check_fields(fields, 4, family_of("llama"))


def test_every_family_s_own_configuration_can_be_cut(tiny_folder: Callable[..., Path]) -> None:
    for model_type in ("llama", "mistral", "ministral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text", "opt"):
        for num_blocks in (2, 3, 4):
            check_fields(vars(tiny_config(model_type, num_blocks=num_blocks)), num_blocks, family_of(model_type))


@pytest.mark.parametrize("model_type", ["falcon", "llama", "cohere"])
def test_each_module_is_dropped_alone(model_type: str) -> None:
    """Falcon adds to what its MLP returns in place."""
    model = any_model(model_type)
    blocks = BlockModel(model, outlined(model))
    live = LiveModel(blocks, ModuleLevels(Modules(ModuleSettings(granularity="module")).space(blocks.shapes(), dtype_bits=32)))
    ids, seen = torch.arange(24)[None], []
    for unit in range(len(live.space)):
        with torch.no_grad(), live.applied(tuple(int(i == unit) for i in range(len(live.space)))):
            seen.append(model(input_ids=ids, use_cache=False).logits)
    assert all(bool(logits.isfinite().all()) for logits in seen)
    assert len({tuple(logits.flatten().tolist()) for logits in seen}) == len(seen)


LOCAL, GLOBAL = "sliding_attention", "full_attention"
GEMMA4 = {
    "hidden_size_per_layer_input": 0,
    "attention_k_eq_v": True,
    "global_head_dim": 32,
    "num_global_key_value_heads": 2,
    "layer_types": [LOCAL, GLOBAL, LOCAL, GLOBAL],
}


@pytest.mark.parametrize(
    ("model_type", "fields", "gone"),
    [
        ("gemma4_text", GEMMA4, 0),
        ("gemma4_text", GEMMA4, 1),
        ("deepseek_v3", {"first_k_dense_replace": 2}, 1),
        ("deepseek_v3", {"first_k_dense_replace": 2}, 3),
        ("lfm2_moe", {"num_dense_layers": 2}, 0),
        ("ernie4_5_moe", {"moe_layer_start_index": 2}, 1),
        ("qwen3_moe", {"mlp_only_layers": [0, 2], "decoder_sparse_step": 1}, 1),
        ("qwen2_moe", {"mlp_only_layers": [0, 1, 2, 3], "decoder_sparse_step": 1}, 1),
        ("llama4_text", {"interleave_moe_layer_step": 2, "intermediate_size_mlp": 64}, 2),
        ("llama4_text", {"interleave_moe_layer_step": 1}, 0),
        ("bamba", {"attn_layer_indices": [1, 3]}, 0),
        ("mbart", {"encoder_layers": 2}, 1),
        ("whisper", {"encoder_layers": 4}, 1),
        ("xlstm", {}, 1),
    ],
)
def test_blocks_of_several_kinds_are_numbered_anew(model_type: str, fields: dict[str, Any], gone: int, tmp_path: Path) -> None:
    model = any_model(model_type, **fields)
    blocks = BlockModel(model, outlined(model))
    live = LiveModel(blocks, ModuleLevels(Modules(ModuleSettings(granularity="block")).space(blocks.shapes(), dtype_bits=32)))
    ids, genome = torch.arange(24)[None], tuple(int(unit.block == gone) for unit in live.space.units)
    with torch.no_grad(), live.applied(genome):
        wanted = model(input_ids=ids, use_cache=False).logits
    with live.written(genome):
        assert len(model.get_submodule(blocks.family.prefix)) == 3
        model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch.testing.assert_close(loaded(input_ids=ids, use_cache=False).logits, wanted)


def test_that_a_config_cannot_describe_what_is_left_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = any_model("minicpm3")  # whose values depend on how many blocks it has
    blocks = BlockModel(model, outlined(model))
    for _ in range(2):
        with without_dropped(blocks, [(1, 1), *[(0, 0)] * (len(blocks.blocks) - 1)]):
            assert len(model.model.layers) == len(blocks.blocks)
            assert not any(bool(parameter.any()) for parameter in model.model.layers[0].mlp.down_proj.parameters())
    assert caplog.text.count("cannot describe a model without the dropped blocks") == 1
