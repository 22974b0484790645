"""Causal attention by chunks against torch's own, alone and inside models."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from evopress.errors import EvoPressError
from evopress.models.attention import NAME, causal_attention, register
from evopress.models.loading import load_pretrained
from evopress.models.tiny import make_tiny


@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 300])
def test_equals_torchs_causal_attention(length):
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(2, 3, length, 16, generator=generator) for _ in range(3))
    expected = scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    torch.testing.assert_close(causal_attention(q, k, v, scale=0.3), expected, rtol=1e-5, atol=1e-5)


def test_later_tokens_do_not_reach_earlier_ones():
    q, k, v = (torch.randn(1, 1, 200, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    before = causal_attention(q, k, v, scale=1.0)
    k[:, :, 150:], v[:, :, 150:] = 9.0, 9.0
    after = causal_attention(q, k, v, scale=1.0)
    assert torch.equal(before[:, :, :150], after[:, :, :150])
    assert not torch.equal(before[:, :, 150:], after[:, :, 150:])


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3"])
def test_models_give_the_logits_that_they_give_with_torchs_attention(family, tmp_path):
    folder = make_tiny(tmp_path / family, family)
    ids = torch.randint(0, 257, (3, 140), generator=torch.Generator().manual_seed(0))
    ours, torchs = (load_pretrained(folder, dtype="float32", attn_implementation=name).model for name in (None, "sdpa"))
    assert ours.config._attn_implementation == NAME == register()
    torch.testing.assert_close(ours(ids).logits, torchs(ids).logits, rtol=1e-4, atol=1e-4)
    padded = torch.ones_like(ids)
    padded[1, :20] = 0  # a mask is given: torch's attention takes over
    torch.testing.assert_close(
        ours(ids, attention_mask=padded).logits[1, 20:], torchs(ids, attention_mask=padded).logits[1, 20:], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("device", "dtype", "capabilities", "suits"),
    [
        ("cpu", "float32", {"amx_bf16": True}, True),
        ("cpu", "bfloat16", {"amx_bf16": True}, False),
        ("cpu", "bfloat16", {"amx_bf16": False}, True),
        ("cpu", "bfloat16", {}, True),
        ("cuda", "float32", {}, False),
    ],
)
def test_torchs_own_attention_runs_where_it_is_faster(device, dtype, capabilities, suits, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    model = load_pretrained(make_tiny(tmp_path / "llama"), dtype=dtype, device=device).model
    assert (model.config._attn_implementation == NAME) is suits
    assert model.config._attn_implementation in (NAME, "sdpa")


def test_generation_with_a_cache_equals_generation_without(tmp_path):
    model = load_pretrained(make_tiny(tmp_path / "llama"), dtype="float32").model
    prompt = torch.arange(20).unsqueeze(0)
    kwargs = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    assert torch.equal(model.generate(prompt, use_cache=True, **kwargs), model.generate(prompt, use_cache=False, **kwargs))


def test_other_families_keep_their_own_attention(tmp_path):
    asked = load_pretrained(make_tiny(tmp_path / "llama", "llama"), dtype="float32", attn_implementation=NAME)
    assert asked.model.config._attn_implementation == NAME
    with pytest.raises(EvoPressError, match=rf"^model.attn_implementation={NAME} does not support gemma2 models"):
        load_pretrained(make_tiny(tmp_path / "other", "gemma2"), dtype="float32", attn_implementation=NAME)
    assert load_pretrained(make_tiny(tmp_path / "gemma2", "gemma2"), dtype="float32").model.config._attn_implementation != NAME
