"""Groups of 128 on a local model whose widths are multiples of that, from its files to its logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from evopress.compress.gptq import GPTQ
from evopress.fitness.measures import KLDivergence
from evopress.fitness.minibatch import base_states
from evopress.fitness.population import PopulationEvaluator, measure_sums
from evopress.levels.build import ensure_database
from evopress.levels.live import LiveModel
from evopress.models.blocks import BlockModel
from evopress.models.loading import load_pretrained
from evopress.models.tiny import VOCABULARY, byte_tokenizer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_eight_bits_are_within_rounding_of_dense_and_dense_is_bit_for_bit(
    dtype: str, tmp_path: Path, tokens: Callable[..., Any], build_settings: Callable[..., Any]
) -> None:
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    pretrained = load_pretrained(tmp_path / "model", dtype=dtype)
    blocks = BlockModel(pretrained.model, pretrained.family)
    compressor = GPTQ(bits=(8, 2), group_size=128, recipe="best", dense_bits=8 * blocks.dtype.itemsize)
    database, _ = ensure_database(build_settings(tmp_path, propagate=None), blocks, tokens(8, 32), compressor)
    live, ids = LiveModel(blocks, database), tokens(4, 32, seed=1)
    assert {slot.weight.shape[1] for slot in blocks.slots(0).values()} == {128, 256, 384}
    before = {name: slot.weight.clone() for name, slot in blocks.slots(0).items()}
    dense, eight, two = ((level,) * len(live.space) for level in range(3))
    with live.written(dense):
        assert all(torch.equal(slot.weight, before[name]) for name, slot in blocks.slots(0).items())
    evaluator = PopulationEvaluator(live)
    base = base_states(evaluator, ids, batch_tokens=128)
    sums, count = measure_sums(evaluator, [dense, eight, two], ids, base, KLDivergence(), chunk_tokens=64)
    kl = (sums[:, 0] / count).tolist()
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[1] < 1e-3 * kl[2]
    _, states = evaluator.final_states([None, dense], ids)
    assert all(torch.equal(states[0], each) for each in states)
    with live.written(eight):
        for name, slot in blocks.slots(0).items():  # a step of 8 bits is a 255th of a group's range
            W = before[name].float().unflatten(1, (-1, 128))
            step = (W.amax(-1) - W.amin(-1)) / 255
            assert bool(((slot.weight.float().unflatten(1, (-1, 128)) - W).abs().mean(-1) < step).all())
