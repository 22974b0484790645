"""Checkpoints in FP8 and MXFP4, which transformers dequantizes as it loads them."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from evopress.errors import EvoPressError
from evopress.levels.build import ensure_database
from evopress.models.blocks import BlockModel
from evopress.models.loading import find_weights, load_pretrained
from evopress.models.opening import ModelSource
from evopress.models.tiny import byte_tokenizer
from evopress.settings import ModelSettings
from experiments.tiny_any import any_model

Weights = dict[str, Tensor]
BLOCK = 24
"""Rows and columns that have one scale; sizes of tiny models are no multiples."""
_FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def in_blocks(weights: Weights, expected: Weights) -> dict[str, Any]:
    """FP8 as DeepSeek has it: a scale for each square block."""
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        W = weights[name]
        rows, columns = (torch.arange(size) // BLOCK for size in W.shape)  # the block that each belongs to: the last is cut off
        scales = torch.zeros(int(rows[-1]) + 1, int(columns[-1]) + 1)
        for i, j in itertools.product(*map(range, scales.shape)):
            scales[i, j] = W[rows == i][:, columns == j].abs().max() / 448
        each = scales[rows][:, columns]
        weights[name] = (W / each).to(torch.float8_e4m3fn)
        expected[name] = weights[name].float() * each
        weights[name.replace("weight", "weight_scale_inv")] = scales
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}


def by_tensor(weights: Weights, expected: Weights) -> dict[str, Any]:
    """FP8 as Ministral 3 has it: a scale for each weight, another for its inputs."""
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        scale = weights[name].abs().max() / 448
        codes = (weights[name] / scale).to(torch.float8_e4m3fn)
        expected[name], weights[name] = codes.float() * scale, codes
        weights[name.replace("weight", "weight_scale_inv")] = scale
        weights[name.replace("weight", "activation_scale")] = torch.tensor(0.1)
    skipped = {"modules_to_not_convert": ["lm_head"], "weight_block_size": None}
    return {"quant_method": "fp8", "activation_scheme": "static", "dequantize": False, **skipped}


def of_experts(weights: Weights, expected: Weights) -> dict[str, Any]:
    """MXFP4 as gpt-oss has it: 32 numbers of 4 bits share a power of two, along the inputs."""
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = weights.pop(name).shape
        blocks = torch.randint(256, (experts, rows, columns // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(122, 126, (experts, rows, columns // 32), dtype=torch.uint8, generator=generator)
        numbers = _FP4[torch.stack([blocks & 15, blocks >> 4], -1).long()].flatten(3)
        expected[name] = (numbers * 2.0 ** (scales.float() - 127)[..., None]).flatten(2).transpose(1, 2)
        weights[f"{name}_blocks"], weights[f"{name}_scales"] = blocks, scales
    return {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]}


FORMATS = {
    "deepseek_v3": (in_blocks, "FP8"),
    "ministral3": (by_tensor, "FP8"),
    "gpt_oss": (of_experts, "MXFP4"),
}


@pytest.fixture(params=FORMATS)
def stored(request: Any, tmp_path: Path) -> tuple[str, Path, Weights]:
    """Return a model type, the folder of a tiny model of it whose weights are quantized, and what they are."""
    make, folder = FORMATS[request.param][0], tmp_path / "model"
    any_model(request.param).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    weights, path = load_file(folder / "model.safetensors"), folder / "config.json"
    expected = dict(weights)
    config = json.loads(path.read_text(encoding="utf-8")) | {"quantization_config": make(weights, expected)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    path.write_text(json.dumps(config), encoding="utf-8")
    return request.param, folder, expected


def test_weights_are_what_their_codes_stand_for(
    stored: tuple[str, Path, Weights],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    tokens: Any,
    build_settings: Any,
    compressor: Any,
) -> None:
    model_type, folder, expected = stored
    with caplog.at_level(logging.WARNING):
        pretrained = load_pretrained(folder, dtype="float32")
    assert f"its weights are stored as {FORMATS[model_type][1]} and dequantized to float32" in caplog.text
    pretrained.model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(again[name].float(), weight, rtol=1e-5, atol=1e-6)
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text(encoding="utf-8"))
    blocks = BlockModel(pretrained.model, pretrained.family)
    assert blocks.self_check(full_length=40) < 1e-4
    database, _ = ensure_database(build_settings(tmp_path), blocks, tokens(4, 32), compressor)
    assert all(level >= 0 for unit in database.errors for level in unit) and len(database.space) > 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    torch.testing.assert_close(plain(tokens(1, 8)).logits, pretrained.model(tokens(1, 8)).logits, rtol=1e-4, atol=1e-4)


def test_their_config_alone_says_what_they_are(stored: tuple[str, Path, Weights], tmp_path: Path) -> None:
    _, folder, expected = stored
    settings = ModelSettings(path=str(folder), sequence_length=32)
    source = ModelSource(settings, cache=tmp_path, device=torch.device("cpu"), dtype="float32")
    shapes = source.linear_shapes()
    assert shapes and all(shapes[name] == tuple(expected[name].shape) for name in shapes if name in expected)
    (folder / "model.safetensors").unlink()
    outline = ModelSource(settings, cache=tmp_path, device=torch.device("cpu"), dtype="float32", dry_run=True)
    assert outline.is_outline and outline.linear_shapes() == shapes
    assert next(outline.pretrained.model.parameters()).is_meta


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors"])
def test_others_are_refused_by_their_name(method: str, tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    config = json.loads((tiny_folder() / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}), encoding="utf-8")
    with pytest.raises(EvoPressError, match=rf"already quantized \({method}\): .* \(of MXFP4, FP8, MXFP8 that is done here"):
        find_weights(tmp_path)
