"""Models with a language model inside: it is compressed, the rest is carried through, the export is of the model's class."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from evopress.models.blocks import BlockModel
from evopress.models.loading import load_pretrained
from evopress.models.outline import find_family, num_blocks_of, wrapper_of
from evopress.models.tiny import byte_tokenizer
from experiments.tiny_any import any_config

PICTURES = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wrapper")
    text = any_config("gemma3_text").to_dict()
    config = transformers.Gemma3Config(text_config=text, vision_config=PICTURES, mm_tokens_per_image=4, image_token_index=256)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.Gemma3ForConditionalGeneration(config).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def test_the_language_part_has_levels_and_the_rest_is_carried_through(folder: Path, tmp_path: Path) -> None:
    pretrained = load_pretrained(folder, dtype="float32")
    assert type(pretrained.model).__name__ == "Gemma3ForConditionalGeneration"
    blocks = BlockModel(pretrained.model, pretrained.family)
    assert blocks.self_check(full_length=40) < 1e-4
    config = pretrained.model.config.to_dict()
    assert find_family(config).prefix == pretrained.family.prefix and num_blocks_of(config) == len(blocks.blocks) == 4
    slots = blocks.slots(1)
    assert slots and all("language_model" in name for name in slots)
    slot = next(iter(slots.values()))
    slot.put(torch.zeros_like(slot.weight))
    ids = torch.arange(20)[None]
    expected = pretrained.model(input_ids=ids, use_cache=False).logits
    pretrained.model.save_pretrained(tmp_path)
    loaded = transformers.Gemma3ForConditionalGeneration.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=ids, use_cache=False).logits, expected)
    before, after = pretrained.model.state_dict(), loaded.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if "vision" in name)


def test_fields_of_the_language_part_may_lie_beside_those_of_the_whole(tmp_path: Path) -> None:
    text = any_config("qwen2").to_dict() | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
    pictures = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=pictures)
        transformers.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    nested = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    flat = nested.pop("text_config") | nested
    (tmp_path / "config.json").write_text(json.dumps(flat), encoding="utf-8")
    pretrained = load_pretrained(tmp_path, dtype="float32")
    assert type(pretrained.model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    blocks = BlockModel(pretrained.model, pretrained.family)
    assert blocks.self_check(full_length=40) < 1e-4
    assert num_blocks_of(flat) == len(blocks.blocks) == 4
    assert wrapper_of(any_config("whisper").to_dict() | {"architectures": ["WhisperForCausalLM"]}) is None
