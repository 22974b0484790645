"""The MLX format: decoded by a literal twin of MLX's own, and, where mlx-lm is installed, run by it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlx_literal import dequantize
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from evopress.errors import EvoPressError
from evopress.export.exporter import INTEGERS, SPARSE, Export, Form, write_export
from evopress.export.mlx import _WITHOUT_WINDOWS, MLX, MODEL_TYPES, engine_config
from evopress.export.rules import window_left_out
from evopress.units import is_module

FILE = "model.safetensors"


def decoded(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return all weights of an exported folder as a checkpoint has them, decoded by the twin and rounded to a dtype."""
    layers, tensors = json.loads((folder / "config.json").read_text())["quantization"], load_file(folder / FILE)
    state = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part in ("scales", "biases"):
            continue
        if part == "weight" and f"{module}.scales" in tensors:
            parts = [tensors[f"{module}.{part}"].numpy() for part in ("weight", "scales", "biases")]
            tensor = torch.from_numpy(dequantize(*parts, **layers[module])).to(dtype)
        state[name] = tensor
    return state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_weight_is_what_its_payload_decodes_to(
    model_type: str, dtype: torch.dtype, exported: Callable[..., Export], tmp_path: Path
) -> None:
    export = exported(model_type, dtype=dtype)
    before = {name: tensor.clone() for name, tensor in export.model.state_dict().items()}
    state = decoded(write_export(MLX(scales="float32"), tmp_path / "mlx", export), dtype)
    units = {}
    for index, (unit, level) in enumerate(zip(export.live.space.units, export.genome, strict=True)):
        units[f"{unit.name}.weight"] = export.levels.read(index, level).decode()
    assert len(units) >= 12 and set(units) <= set(state)
    for name, weight in units.items():
        assert torch.equal(state[name], weight), name
    tied = {"lm_head.weight"} if export.model.config.tie_word_embeddings else set()
    assert set(state) == set(before) - tied
    for name in set(state) - set(units):
        assert torch.equal(state[name], before[name]) and state[name].dtype == dtype, name
    assert all(torch.equal(tensor, before[name]) for name, tensor in export.model.state_dict().items())


@pytest.mark.parametrize("tied", [False, True])
def test_head_and_embedding_are_units_like_any_other(tied: bool, exported: Callable[..., Export], tmp_path: Path) -> None:
    export = exported(tied=tied, include=("blocks", "head", "embedding"))
    folder = write_export(MLX(scales="float32"), tmp_path / "mlx", export)
    layers, state = json.loads((folder / "config.json").read_text())["quantization"], decoded(folder, torch.float32)
    assert ("lm_head.weight" in state) is not tied
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is tied
    names = {unit.name for unit in export.live.space.units if unit.is_outside}
    assert names == ({"model.embed_tokens"} if tied else {"model.embed_tokens", "lm_head"})
    for index, unit in enumerate(export.live.space.units):
        if unit.is_outside:
            assert unit.name in layers
            assert torch.equal(state[f"{unit.name}.weight"], export.levels.read(index, export.genome[index]).decode())


DROPPED = [(0, "attention"), (1, "attention"), (1, "mlp"), (2, "mlp")]


@pytest.mark.parametrize("scales", ["float16", "float32"])
@pytest.mark.parametrize(
    "given", [{}, {"tied": True, "include": ("blocks", "embedding")}, {"dropped": DROPPED}, {"model_type": "gemma2"}], ids=str
)
def test_the_size_is_known_to_the_byte(scales: str, given: dict[str, Any], exported: Callable[..., Export], tmp_path: Path) -> None:
    export, exporter = exported(**given), MLX(scales=scales)
    said = exporter.num_bytes(export)
    assert not list(tmp_path.iterdir())
    assert (write_export(exporter, tmp_path / "mlx", export) / FILE).stat().st_size == said


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float16_takes_as_many_bits_as_a_database_and_differs_by_less_than_the_card_says(
    dtype: torch.dtype, exported: Callable[..., Export], tmp_path: Path
) -> None:
    export = exported(dtype=dtype)
    folders = [write_export(MLX(scales=scales), tmp_path / scales, export) for scales in ("float16", "float32")]
    half, whole = (decoded(folder, torch.float32) for folder in folders)
    cards = [(folder / "README.md").read_text() for folder in folders]
    name = str(dtype).removeprefix("torch.")
    assert "Scales and biases are float16: no weight held" in cards[0] and f"which was measured rounded to {name}" in cards[0]
    assert f"those that were measured, bit for bit once they are rounded to {name}" in cards[1]
    said = float(cards[0].split("more than ")[1].split(" of a step")[0])
    assert 0 < said <= 2**-11 * 258  # the largest zero that was made up is 257
    groups, worst, of_measured = 0, 0.0, 0.0
    for index, (unit, level) in enumerate(zip(export.live.space.units, export.genome, strict=True)):
        payload: Any = export.levels.read(index, level)
        if not hasattr(payload, "scales"):
            continue
        groups += payload.scales.numel()
        step = payload.scales.float().repeat_interleave(payload.codes.shape[1] // payload.scales.shape[1], dim=1)
        weight, exact = half[f"{unit.name}.weight"], whole[f"{unit.name}.weight"]
        worst = max(worst, float(((weight - exact).abs() / step)[step > 0].max()))
        of_measured = max(of_measured, float(((weight - payload.decode()).abs() / step)[step > 0].max()))
        assert torch.equal(exact.to(dtype), payload.decode())
    assert said / 2 < worst <= said * 1.06  # said with two digits
    assert (of_measured > 1.06 * said) is (dtype == torch.bfloat16)  # so that the card has to say what was measured
    sizes = [num_data(folder / FILE) for folder in folders]
    assert sizes[1] - sizes[0] == 4 * groups


def num_data(path: Path) -> int:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    assert length % 8 == 0  # so that tensors lie at even places
    return path.stat().st_size - 8 - length


def test_the_file_and_its_config_say_what_mlx_lm_asks(exported: Callable[..., Export], tmp_path: Path) -> None:
    export = replace(exported(), licence="Apache-2.0", command="python -m evopress x", table="| name |", provenance={"a": 1})
    folder = write_export(MLX(), tmp_path / "mlx", export)
    with safe_open(folder / FILE, framework="np") as file:
        assert file.metadata() == {"format": "mlx"}
    header = json.loads((folder / FILE).read_bytes()[8:].split(b"}}")[0] + b"}}")
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"] and config["quantization"]["mode"] == "affine"
    for index, (unit, form) in enumerate(zip(export.live.space.units, export.forms, strict=True)):
        rows, columns = export.levels.read(index, export.genome[index]).decode().shape
        entry = header[f"{unit.name}.weight"]
        if form.kind != INTEGERS:
            assert unit.name not in config["quantization"] and entry["dtype"] == "F32"
            continue
        assert config["quantization"][unit.name] == {"group_size": form.group_size, "bits": form.bits}
        assert entry["dtype"] == "U32" and entry["shape"] == [rows, columns * form.bits // 32]
        for part in ("scales", "biases"):
            assert header[f"{unit.name}.{part}"]["dtype"] == "F16"
            assert header[f"{unit.name}.{part}"]["shape"] == [rows, columns // form.group_size]
    card = (folder / "README.md").read_text()
    for said in ("license: apache-2.0", "mlx_lm.generate --model .", "| name |", "`python -m evopress x`", "base_model: tiny"):
        assert said in card
    assert AutoTokenizer.from_pretrained(folder)("ab", add_special_tokens=False)["input_ids"]
    assert json.loads((folder / "evopress.json").read_text()) == {"a": 1}


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def test_the_rotary_embedding_is_told_where_mlx_lm_reads_it(exported: Callable[..., Export]) -> None:
    """It would take 10,000 and no scaling, without a word."""
    plain = engine_config(exported(config={"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}).model, {})
    assert plain["rope_theta"] == 5e5 and plain["rope_scaling"] is None and "quantization" not in plain
    scaled = engine_config(exported(config={"rope_parameters": {**LLAMA3, "rope_theta": 1e6}}).model, {})
    assert scaled["rope_theta"] == 1e6 and scaled["rope_scaling"] == {**LLAMA3, "type": "llama3"}
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    gemma = engine_config(exported("gemma3_text", config={"rope_parameters": rope}).model, {})
    assert (gemma["rope_theta"], gemma["rope_local_base_freq"]) == (1e6, 2e4)
    assert gemma["rope_scaling"] == {"type": "linear", "rope_type": "linear", "factor": 8.0}


def test_gemma_3_is_told_which_blocks_have_full_attention(exported: Callable[..., Export]) -> None:
    sliding, full = "sliding_attention", "full_attention"
    for kinds, every in (([sliding, full, sliding], 2), ([sliding, sliding, full], 3), ([full] * 3, 1)):
        config = engine_config(exported("gemma3_text", config={"layer_types": kinds}).model, {})
        assert config["sliding_window_pattern"] == every
    for kinds, blocks in (([full, sliding, sliding], r"\[0\]"), ([sliding] * 3, r"\[\]")):
        with pytest.raises(EvoPressError, match=rf"whose full-attention blocks are {blocks}"):
            engine_config(exported("gemma3_text", config={"layer_types": kinds}).model, {})


def test_dropped_blocks_are_left_out_and_dropped_modules_are_zeros_of_two_bits(
    exported: Callable[..., Export], tmp_path: Path, ids: torch.Tensor
) -> None:
    export = exported("qwen3", dropped=DROPPED)
    with export.live.applied(export.genome):
        expected = export.model(input_ids=ids, use_cache=False).logits
    folder = write_export(MLX(scales="float32"), tmp_path / "mlx", export)
    config = json.loads((folder / "config.json").read_text())
    assert config["num_hidden_layers"] == 2 and export.model.config.num_hidden_layers == 3
    zeros = [f"model.layers.0.self_attn.{part}_proj" for part in "qkvo"]
    zeros += [f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")]
    state = decoded(folder, torch.float32)
    for name in zeros:
        assert config["quantization"][name] == {"group_size": 128, "bits": 2} and not state[f"{name}.weight"].any()
    kept = [unit.name for unit in export.live.space.units if not is_module(unit)]
    assert sum(name.endswith("proj.weight") for name in state) == len(kept) * 2 // 3
    configuration = type(export.model.config)(**{**config, "quantization_config": None, "quantization": None})
    model = AutoModelForCausalLM.from_config(configuration).eval()
    model.load_state_dict(state)
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids, use_cache=False).logits, expected, atol=2e-5)


def test_llama_s_blocks_are_without_what_is_dropped(exported: Callable[..., Export], tmp_path: Path) -> None:
    """As mlx-lm's nemotron-nas has them, which the engine's own test runs."""
    export = exported(dropped=DROPPED)
    folder = write_export(MLX(), tmp_path / "mlx", export)
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / FILE)
    assert config["model_type"] == "nemotron-nas" and config["num_hidden_layers"] == 2
    first, second = config["block_configs"]
    assert first["attention"] == second["ffn"] == {"no_op": True} and second["attention"] == {"n_heads_in_group": 2}
    least = int(2 * round(first["ffn"]["ffn_mult"], 6) * 128 / 3)  # mlx-lm rounds up to a multiple of 256
    assert 0 < least <= 256
    parts = {".".join(name.split(".")[2:4]) for name in tensors if name.startswith("model.layers.")}
    assert parts == {"0.post_attention_layernorm", "0.mlp", "1.input_layernorm", "1.self_attn"}
    assert all(f"{name}.scales" in tensors for name in config["quantization"] if name.startswith("model."))
    assert AutoTokenizer.from_pretrained(folder)("ab")["input_ids"]


@pytest.mark.parametrize(
    ("dropped", "config"),
    [
        (DROPPED, {"intermediate_size": 192}),
        (DROPPED, {"head_dim": 32}),
        ([(block, "attention") for block in range(3)], {}),
        ([(1, "attention"), (1, "mlp")], {}),
    ],
)
def test_what_nemotron_nas_is_not_keeps_its_architecture(
    dropped: Any, config: dict[str, int], exported: Callable[..., Export], tmp_path: Path
) -> None:
    folder = write_export(MLX(), tmp_path / "mlx", exported(dropped=dropped, config=config))
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize(
    ("form", "sentence"),
    [
        (Form("a.q_proj", "7 bits", INTEGERS, 7, 64), "a.q_proj at 7 bits in groups of 64: MLX has 1, 2, 3, 4, 5, 6, 8 bits"),
        (Form("a.q_proj", "4 bits", INTEGERS, 4, 16), "a.q_proj at 4 bits in groups of 16: MLX has groups of 32, 64, 128"),
        (Form("a.q_proj", "4 bits", INTEGERS, 4, 576), "groups of 576"),
        (Form("a.q_proj", "-1", SPARSE), r"sparse weights \(a.q_proj at -1\)"),
    ],
)
def test_what_mlx_cannot_hold_is_refused(form: Form, sentence: str) -> None:
    MLX().check({"model_type": "llama"}, [Form("a", "4 bits", INTEGERS, 4, 64)])
    with pytest.raises(EvoPressError, match=sentence):
        MLX().check({"model_type": "llama"}, [form])


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "llama", "hidden_act": "gelu"}, "a llama with hidden_act=gelu, where mlx-lm computes silu"),
        ({"model_type": "qwen3", "attention_bias": True}, "a qwen3 with attention_bias=True, where mlx-lm has no place"),
        ({"model_type": "gemma2", "attention_bias": True}, "a gemma2 with attention_bias=True"),
        ({"model_type": "gemma", "hidden_act": "relu"}, "a gemma with hidden_act=relu, where mlx-lm computes gelu"),
        ({"model_type": "gemma2", "hidden_activation": "silu"}, "a gemma2 with hidden_activation=silu, where"),
        ({"model_type": "gemma3_text", "hidden_activation": "relu"}, "a gemma3_text with hidden_activation=relu"),
        ({"model_type": "gemma2", "attn_logit_softcapping": None}, "a gemma2 with attn_logit_softcapping=null, where"),
        ({"model_type": "gemma2", "final_logit_softcapping": None}, "a gemma2 with final_logit_softcapping=null, where"),
    ],
)
def test_what_mlx_lm_computes_otherwise_is_refused(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(EvoPressError, match=sentence):
        MLX().check(config, [])
    MLX().check({"model_type": "llama", "hidden_act": "silu", "attention_bias": True}, [])
    gemma = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False}
    for model_type in ("gemma", "gemma2", "gemma3_text"):
        MLX().check({"model_type": model_type, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0} | gemma, [])


@pytest.mark.parametrize("model_type", ["qwen2", "phi3"])
def test_heads_of_another_size_are_refused(model_type: str) -> None:
    config = {"model_type": model_type, "hidden_size": 128, "num_attention_heads": 4}
    for fits in ({}, {"head_dim": None}, {"head_dim": 32}):
        MLX().check(config | fits, [])
    MLX().check(config | {"model_type": "qwen3", "head_dim": 64}, [])
    with pytest.raises(EvoPressError, match=rf"a {model_type} with head_dim=64, where mlx-lm takes .* = 128 / 4: use "):
        MLX().check(config | {"head_dim": 64}, [])


def test_sliding_windows_that_mlx_lm_does_not_know_are_said() -> None:
    left_out = partial(window_left_out, model_types=_WITHOUT_WINDOWS)
    phi3 = {"model_type": "phi3", "sliding_window": 2047, "max_position_embeddings": 4096}
    assert left_out(phi3) == 2047
    assert left_out(phi3 | {"max_position_embeddings": 2047}) is None, "no text is longer"
    assert left_out(phi3 | {"sliding_window": None}) is None
    assert left_out({"model_type": "gemma3_text", "sliding_window": 16}) is None, "mlx-lm has these"
    qwen2 = {"model_type": "qwen2", "sliding_window": 64, "max_position_embeddings": 512}
    assert left_out(qwen2 | {"layer_types": ["full_attention"] * 2}) is None
    assert left_out(qwen2 | {"layer_types": ["full_attention", "sliding_attention"]}) == 64


@pytest.mark.parametrize(("scales", "per_group"), [("float16", 32), ("float32", 64)])
def test_a_weight_takes_what_is_said_before_it_is_built(
    scales: str, per_group: int, exported: Callable[..., Export], tmp_path: Path
) -> None:
    export = exported()
    form = next(form for form in export.forms if form.kind == INTEGERS)
    said = form.rows * form.columns * form.bits + per_group * form.rows * form.columns // form.group_size
    assert MLX(scales=scales).most_bits(form) == said
    with safe_open(write_export(MLX(scales=scales), tmp_path / "mlx", export) / "model.safetensors", framework="pt") as file:
        parts = [file.get_tensor(f"{form.unit}.{part}") for part in ("weight", "scales", "biases")]
    assert said == 8 * sum(part.nbytes for part in parts)


@pytest.mark.parametrize("model_type", ["opt", "mixtral"])
def test_models_that_it_is_not_written_for_are_refused(model_type: str) -> None:
    with pytest.raises(EvoPressError, match=rf"^export=\[mlx\] is not written for models of type {model_type}: it knows llama, "):
        MLX().check({"model_type": model_type}, [])


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(EvoPressError, match="scales=bfloat16 is unknown"):
        MLX(scales="bfloat16")


def test_biases_that_float16_cannot_hold_are_refused_and_leave_nothing(exported: Callable[..., Export], tmp_path: Path) -> None:
    export = exported()
    read = export.levels.read

    class Large:
        folder, space = export.levels.folder, export.levels.space

        def read(self, unit: int, level: int, device: Any = "cpu") -> Any:
            payload: Any = read(unit, level)
            return (
                replace(payload, scales=payload.scales * 60000, zeros=payload.zeros * 100) if hasattr(payload, "zeros") else payload
            )

    export.live.levels = Large()  # type: ignore[assignment]
    with pytest.raises(EvoPressError, match="too large for float16"):
        write_export(MLX(), tmp_path / "mlx", export)
    assert list(tmp_path.iterdir()) == []


RUN = """
import sys
import mlx.core as mx
import numpy as np
from pathlib import Path
from mlx_lm.utils import load_model
mx.set_default_device(mx.cpu)
model, config = load_model(Path(sys.argv[1]))
ids = np.load(sys.argv[2])
np.save(sys.argv[3], np.array(model(mx.array(ids)).astype(mx.float32)))
"""


@pytest.mark.engine
@pytest.mark.skipif(find_spec("mlx_lm") is None, reason="mlx-lm is not installed: pip install -e '.[mlx]'")
@pytest.mark.parametrize("scales", ["float16", "float32"])
@pytest.mark.parametrize(
    "given",
    [
        *({"model_type": model_type} for model_type in MODEL_TYPES),
        {"tied": True, "include": ("blocks", "embedding")},
        {"dropped": DROPPED},
        {"model_type": "qwen3", "dropped": DROPPED},
        {"config": {"rope_parameters": {**LLAMA3, "rope_theta": 1e6}}},
    ],
    ids=str,
)
def test_mlx_lm_computes_what_was_searched(
    given: dict[str, Any], scales: str, exported: Callable[..., Export], ids: torch.Tensor, tmp_path: Path
) -> None:
    export = exported(**given)
    with export.live.applied(export.genome):
        expected = export.model(input_ids=ids, use_cache=False).logits
    folder = write_export(MLX(scales=scales), tmp_path / "mlx", export)
    np.save(tmp_path / "ids.npy", ids.numpy())
    command = [sys.executable, "-c", RUN, str(folder), str(tmp_path / "ids.npy"), str(tmp_path / "logits.npy")]
    subprocess.run(command, check=True, timeout=300, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})
    logits = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    kl = (
        torch.nn.functional.kl_div(logits.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="none")
        .sum(-1)
        .mean()
    )
    assert float(kl) < (1e-3 if scales == "float16" else 1e-7)
