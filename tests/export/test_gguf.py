"""The GGUF format: decoded by the `gguf` package, and, where its library is installed, run by llama.cpp."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from evopress.compress.gguf_levels import GGUFWeight
from evopress.compress.gptq import Quantized
from evopress.engines import ENGINES
from evopress.errors import EvoPressError
from evopress.export.exporter import DENSE, GGUF_TYPE, INTEGERS, OF_EXPERT, SPARSE, Export, Form, write_export
from evopress.export.gguf import FILE, GGUF, as_blocks, type_of
from evopress.export.gguf_model import ARCHITECTURES, frequency_factors
from evopress.export.gguf_tokenizer import add_tokenizer, split_name
from evopress.export.rules import refuse_unfit
from evopress.models.tiny import byte_tokenizer
from experiments.exports import llama_cpp


def decoded(path: Path, export: Export) -> dict[str, Tensor]:
    """Return the weights under their names in the model, rows in their order there, in float32, by the gguf package."""
    config = export.model.config
    name_of = gguf.get_tensor_name_map(gguf.MODEL_ARCH[ARCHITECTURES[config.model_type]], 3)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    state = {}
    for name in export.model.state_dict():
        if (tensor := found.get(name_of.get_name(name, try_suffixes=(".weight", ".bias")))) is None:
            continue
        weight = np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2], 0)
        if heads and ARCHITECTURES[config.model_type] == "LLAMA":
            weight = weight.reshape(heads, -1, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
        state[name] = torch.from_numpy(weight)
    assert len(state) == len(found) - ("rope_freqs.weight" in found)
    return state


def with_biases(export: Export) -> Export:
    for name, parameter in export.model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.1)
    return export


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
BIASED = {"config": {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}}


@pytest.mark.parametrize(
    ("model_type", "given"),
    [
        ("llama", BIASED),
        ("mistral", {"dtype": torch.bfloat16}),
        ("qwen2", {"include": ("blocks", "head", "embedding")}),
        ("qwen3", {"tied": True, "include": ("blocks", "embedding"), "dtype": torch.float16}),
    ],
)
def test_every_weight_is_what_its_payload_decodes_to_and_the_size_is_known(
    model_type: str, given: dict[str, Any], exported: Callable[..., Export], tmp_path: Path
) -> None:
    export, exporter = with_biases(exported(model_type, **given)), GGUF(exact=True)
    exporter.check(export.model.config.to_dict(), [])
    before = {name: tensor.clone() for name, tensor in export.model.state_dict().items()}
    said = exporter.num_bytes(export)
    assert not list(tmp_path.iterdir())
    path = write_export(exporter, tmp_path / "gguf", export) / FILE
    assert path.stat().st_size == said
    state, units = decoded(path, export), {}
    for index, (unit, level) in enumerate(zip(export.live.space.units, export.genome, strict=True)):
        units[f"{unit.name}.weight"] = export.levels.read(index, level).decode()
    tied = {"lm_head.weight"} if given.get("tied") else set()
    assert set(state) == set(before) - tied and set(units) <= set(state)
    for name, weight in state.items():
        assert torch.equal(weight.to(export.model.dtype), units.get(name, before[name])), name
    assert all(torch.equal(tensor, before[name]) for name, tensor in export.model.state_dict().items())


def payload(bits: int, zeros: tuple[int, int], *, group_size: int, columns: int) -> Quantized:
    """Return integers of all codes whose zeros lie between two, both ends among them."""
    rng = torch.Generator().manual_seed(bits)
    shape = (4, columns // group_size)
    drawn = torch.randint(zeros[0], zeros[1] + 1, shape, generator=rng)
    drawn[0, 0], drawn[1, 0] = zeros
    codes = torch.randint(2**bits, (4, columns), generator=rng)
    codes[:, 0], codes[:, 1] = 0, 2**bits - 1
    scales = (0.5 + torch.rand(shape, generator=rng)) * 0.01
    return Quantized(codes.to(torch.uint8), scales.to(torch.float16), drawn.to(torch.int16), bits, torch.float32)


@pytest.mark.parametrize(
    ("bits", "zeros", "sizes", "exact", "expected"),
    [
        (2, (0, 3), (32, 64), False, "Q4_0"),
        (3, (0, 7), (64, 128), False, "Q4_0"),
        (3, (-2, 7), (32, 32), False, "Q4_1"),  # a step of 9
        (3, (-2, 7), (32, 32), True, "Q5_0"),
        (4, (8, 8), (64, 128), False, "Q4_0"),
        (4, (0, 15), (64, 128), False, "Q4_1"),
        (4, (0, 15), (64, 128), True, "Q5_0"),
        (5, (16, 16), (64, 64), False, "Q5_0"),
        (5, (0, 31), (64, 64), False, "Q5_1"),
        (5, (0, 31), (64, 64), True, "Q8_0"),
        (6, (0, 63), (64, 64), False, "Q8_0"),
        (7, (0, 127), (64, 64), False, "Q8_0"),
        (8, (128, 128), (64, 64), False, "Q8_0"),
        (8, (0, 255), (64, 64), False, None),
        (2, (0, 15), (256, 512), False, "Q2_K"),
        (2, (0, 15), (128, 512), False, "Q4_1"),  # a K type's scales are multiples of one
        (3, (4, 4), (256, 512), False, "Q3_K"),
        (3, (0, 7), (512, 512), False, "Q4_K"),
        (4, (0, 63), (256, 256), False, "Q4_K"),
        (5, (0, 63), (256, 256), False, "Q5_K"),
        (6, (32, 32), (256, 256), False, "Q6_K"),
        (4, (0, 15), (48, 96), False, None),
    ],
)
def test_the_smallest_type_that_holds_the_integers_is_taken(
    bits: int, zeros: tuple[int, int], sizes: tuple[int, int], exact: bool, expected: str | None
) -> None:
    integers = payload(bits, zeros, group_size=sizes[0], columns=sizes[1])
    of = type_of(integers, exact=exact)
    assert (of and of.name) == expected
    if of is None:
        return
    found = gguf.quants.dequantize(of.pack(as_blocks(integers, of)).numpy(), gguf.GGMLQuantizationType[of.name])
    off = (torch.from_numpy(found) - integers.decode()).abs()
    steps = (off.reshape(4, -1, sizes[0]) / integers.scales.float().unsqueeze(2)).max()
    assert steps == 0.0 if of.mins != (1, 1) else 0.0 < steps <= 2**-11 * max(map(abs, zeros))


def test_scales_that_float16_does_not_hold_have_no_type() -> None:
    integers = payload(3, (0, 7), group_size=32, columns=32)
    assert type_of(replace(integers, scales=integers.scales.float())) is not None
    assert type_of(replace(integers, scales=integers.scales.float() * 1.0001)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_minima_are_rounded_by_what_the_card_says(dtype: torch.dtype, exported: Callable[..., Export], tmp_path: Path) -> None:
    export = exported(dtype=dtype)
    folder = write_export(GGUF(), tmp_path / "gguf", replace(export, licence="Apache-2.0", table="| name |"))
    card = (folder / "README.md").read_text()
    for said in ("license: apache-2.0", f"llama-server -m ./{FILE}", "| name |", "as Q4_1", "as Q5_1", "as Q8_0"):
        assert said in card
    assert f"which was measured rounded to {str(dtype).removeprefix('torch.')}, the model's dtype" in card
    said, worst = float(card.split("more than ")[1].split(" of a step")[0]), 0.0
    state = decoded(folder / FILE, export)
    for index, unit in enumerate(export.live.space.units):
        stored: Any = export.levels.read(index, export.genome[index])
        as_integers = isinstance(stored, Quantized) and type_of(stored) is not None
        measured = replace(stored, dtype=torch.float32) if as_integers else stored
        off = (state[f"{unit.name}.weight"] - measured.decode()).abs()
        if as_integers:
            step = stored.scales.float().repeat_interleave(off.shape[1] // stored.scales.shape[1], dim=1)
            worst = max(worst, float((off / step).max()))
        else:
            assert not off.any()
    assert said * 0.9 < worst <= said * 1.06  # said with two digits


def test_levels_that_are_types_are_written_as_they_are(exported: Callable[..., Export], tmp_path: Path) -> None:
    export = exported()
    weights = {unit.name: export.levels.read(i, 0).decode().numpy() for i, unit in enumerate(export.live.space.units)}
    kinds = {name: ("Q4_1", "Q5_0", "Q8_0")[i % 3] for i, name in enumerate(weights)}
    stored = {
        name: GGUFWeight(
            torch.from_numpy(gguf.quants.quantize(weight, gguf.GGMLQuantizationType[kinds[name]])), kinds[name], torch.float32
        )
        for name, weight in weights.items()
    }

    class Typed:
        space, folder = export.live.space, Path()

        def read(self, unit: int, level: int, device: Any = "cpu") -> GGUFWeight:
            return stored[self.space.units[unit].name]

    export.live.levels = Typed()
    forms = tuple(Form(form.unit, kinds[form.unit], GGUF_TYPE) for form in export.forms)
    export = replace(export, forms=forms)
    GGUF().check({"model_type": "llama"}, forms)
    path = write_export(GGUF(), tmp_path / "gguf", export) / FILE
    assert path.stat().st_size == GGUF().num_bytes(export)
    state = decoded(path, export)
    for name, payload in stored.items():
        assert torch.equal(state[f"{name}.weight"], payload.decode()), name
    bits = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert bits["blk.0.attn_q.weight"] == kinds["model.layers.0.self_attn.q_proj"]
    wrong = replace(export, forms=tuple(replace(form, label="Q4_0") for form in forms))
    with pytest.raises(EvoPressError, match="at Q4_0 does not match what the level database stores"):
        write_export(GGUF(), tmp_path / "wrong", wrong)


DROPPED = [(0, "attention"), (1, "attention"), (1, "mlp"), (2, "mlp")]


OTHERS = [(0, "mlp"), (1, "attention"), (1, "mlp"), (2, "attention")]


@pytest.mark.parametrize(
    ("model_type", "dropped", "name", "heads", "widths", "zeros", "missing"),
    [
        ("llama", DROPPED, "deci", [2, 2], [256, 1], "attn", ""),  # llama.cpp takes the size of a head from the first block
        ("llama", OTHERS, "deci", [2, 0], [1, 256], "", "attn"),
        ("qwen2", DROPPED, "qwen2", 2, 256, "attn ffn", ""),
    ],
)
def test_dropped_blocks_are_left_out_and_dropped_modules_where_llama_cpp_can_do_without(
    model_type: str,
    dropped: list[tuple[int, str]],
    name: str,
    heads: Any,
    widths: Any,
    zeros: str,
    missing: str,
    exported: Callable[..., Export],
    tmp_path: Path,
) -> None:
    export = exported(model_type, dropped=dropped)
    path = write_export(GGUF(exact=True), tmp_path / "gguf", export) / FILE
    assert path.stat().st_size == GGUF(exact=True).num_bytes(export)
    reader = gguf.GGUFReader(path)
    keys = ("block_count", "attention.head_count", "feed_forward_length")
    assert reader.fields["general.architecture"].contents() == name
    assert [reader.fields[f"{name}.{key}"].contents() for key in keys] == [2, heads, widths]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert {name.split(".")[1] for name in tensors if name.startswith("blk.")} == {"0", "1"}
    places = {kind: next(i for i, block in enumerate((0, 2)) if (block, kind) in dropped) for kind in ("attention", "mlp")}
    of_attention = [f"blk.{places['attention']}.attn_{part}.weight" for part in ("q", "k", "v", "output")]
    of_mlp = [f"blk.{places['mlp']}.ffn_{part}.weight" for part in ("gate", "up", "down")]
    if missing:
        norm = f"blk.{places['attention']}.attn_norm.weight"
        assert not set(tensors) & {*of_attention, norm} and f"blk.{places['attention']}.ffn_norm.weight" in tensors
    if "ffn" not in zeros:
        assert [tensors[name].shape.tolist() for name in of_mlp] == [[128, 1], [128, 1], [1, 128]]  # GGUF says columns first
    gone = [*of_mlp, *([] if missing else of_attention)]
    for each in gone:
        assert not gguf.quants.dequantize(tensors[each].data, tensors[each].tensor_type).any()
        if each[6:].split("_")[0] in zeros.split():
            assert tensors[each].tensor_type.name == ("Q2_K" if "ffn_down" in each else "Q4_0")
    kept = next(i for i, unit in enumerate(export.live.space.units) if unit.name == "model.layers.2.mlp.up_proj")
    if (2, "mlp") not in dropped:
        found = gguf.quants.dequantize(tensors["blk.1.ffn_up.weight"].data, tensors["blk.1.ffn_up.weight"].tensor_type)
        assert np.array_equal(found, export.levels.read(kept, export.genome[kept]).decode().numpy())


def test_whole_blocks_that_are_dropped_leave_an_ordinary_model(exported: Callable[..., Export], tmp_path: Path) -> None:
    export = exported(dropped=[(1, "attention"), (1, "mlp")])
    reader = gguf.GGUFReader(write_export(GGUF(), tmp_path / "gguf", export) / FILE)
    assert reader.fields["general.architecture"].contents() == "llama" and reader.fields["llama.block_count"].contents() == 2


def test_matrices_that_are_no_units_take_the_dtype_that_is_asked_for(exported: Callable[..., Export], tmp_path: Path) -> None:
    path = write_export(GGUF(dense="float16"), tmp_path / "gguf", exported()) / FILE
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "F16"
    assert kinds["output_norm.weight"] == kinds["blk.0.attn_norm.weight"] == "F32"


def test_matrices_that_are_no_units_are_rounded_as_llama_cpp_rounds_them(exported: Callable[..., Export], tmp_path: Path) -> None:
    export = exported()
    path = write_export(GGUF(dense="Q8_0"), tmp_path / "gguf", export) / FILE
    assert path.stat().st_size == GGUF(dense="Q8_0").num_bytes(export)
    (found,) = [tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "token_embd.weight"]
    embedding = export.model.get_input_embeddings().weight.data.numpy()
    assert np.array_equal(found.data, gguf.quants.quantize(embedding, gguf.GGMLQuantizationType.Q8_0))


@pytest.mark.parametrize(("dense", "kind"), [("float16", "F16"), ("Q8_0", "Q8_0")])
def test_units_at_a_dense_level_stay_as_they_were_measured(
    dense: str, kind: str, exported: Callable[..., Export], tmp_path: Path
) -> None:
    export = exported()
    folder = write_export(GGUF(dense=dense), tmp_path / "gguf", export)
    units = [form.unit for form in export.forms if form.kind == DENSE]
    assert units
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(folder / FILE).tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    assert {kinds[f"{names.get_name(name)}.weight"] for name in units} == {"F32"} and kinds["token_embd.weight"] == kind
    assert f"Matrices that are no units are rounded to {kind}." in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("form", "sentence"),
    [
        (
            Form("a.q_proj", "4 bits", INTEGERS, 4, 16),
            "4 bits in groups of 16: GGUF has a scale for 32 weights; set method.group_size",
        ),
        (Form("a.q_proj", "8 bits", INTEGERS, 8, 64), "8 bits in groups of 64: .* set method.symmetric=true, or leave 8 out"),
        (Form("a.q_proj", "4 bits", INTEGERS, 4, 64, False, "float32"), "with float32 scales: set method.scale_dtype=float16"),
        (Form("a.q_proj", "-1", SPARSE), r"sparse weights \(a.q_proj at -1\)"),
    ],
)
def test_levels_that_gguf_cannot_hold_are_refused(form: Form, sentence: str) -> None:
    GGUF().check({"model_type": "llama"}, [Form("a", "8 bits", INTEGERS, 8, 64, True)])
    with pytest.raises(EvoPressError, match=sentence):
        GGUF().check({"model_type": "llama"}, [form])


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "gemma3_text"}, "of type gemma3_text: it knows llama, mistral, qwen2, qwen3"),
        ({"model_type": "llama", "hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"model_type": "qwen3", "attention_bias": True}, "a qwen3 with attention_bias=True, where llama.cpp has no place"),
        ({"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}}, r"rotary embedding \(dynamic\)"),
        (
            {"model_type": "llama", "rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}},
            r"\(yarn with mscale\)",
        ),
    ],
)
def test_models_that_llama_cpp_computes_otherwise_are_refused(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(EvoPressError, match=sentence):
        GGUF().check(config, [])
    GGUF().check({"model_type": "llama", "attention_bias": True}, [])
    GGUF().check({"model_type": "qwen3", "attention_bias": False}, [])


@pytest.mark.parametrize("model_type", ["qwen2"])
def test_heads_of_another_size_are_refused(model_type: str) -> None:
    config = {"model_type": model_type, "hidden_size": 128, "num_attention_heads": 4}
    for fits in ({}, {"head_dim": None}, {"head_dim": 32}):
        GGUF().check(config | fits, [])
    GGUF().check(config | {"model_type": "qwen3", "head_dim": 64}, [])
    with pytest.raises(EvoPressError, match=rf"a {model_type} with head_dim=64, where llama.cpp takes .* = 128 / 4: use "):
        GGUF().check(config | {"head_dim": 64}, [])


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7])
def test_no_weight_takes_more_than_was_said_before_it_was_built(bits: int, symmetric: bool, exact: bool) -> None:
    rng = torch.Generator().manual_seed(bits)
    for group_size in (32, 64, 256):
        shape = (8, 512 // group_size)
        codes = torch.randint(2**bits, (8, 512), generator=rng).to(torch.uint8)
        zeros = torch.full(shape, 2 ** (bits - 1)) if symmetric else torch.randint(2**bits, shape, generator=rng)
        scales = torch.rand(shape, generator=rng).to(torch.float16)
        of = type_of(Quantized(codes, scales, zeros.to(torch.int16), bits, torch.float32), exact=exact)
        form = Form("a", "", INTEGERS, bits, group_size, symmetric, rows=8, columns=512)
        assert of is not None and 8 * 8 * of.row_bytes(512) <= GGUF(exact=exact).most_bits(form)


@pytest.mark.parametrize(("model_type", "said"), [("mistral", True), ("llama", False)])
def test_sliding_windows_that_llama_cpp_does_not_know_are_said(
    model_type: str, said: bool, exported: Callable[..., Export], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    folder = write_export(GGUF(), tmp_path / "gguf", exported(model_type, config={"sliding_window": 16}))
    sentence = f"llama.cpp knows no sliding window of a {model_type}: on texts of more than 16 tokens it computes something else."
    assert [sentence in told for told in (caplog.text, (folder / "README.md").read_text())] == [said] * 2


def test_the_engine_asks_for_types_and_others_refuse_them() -> None:
    types, integers = [Form("a.q_proj", "Q4_K", GGUF_TYPE)], [Form("a.q_proj", "4 bits", INTEGERS, 4, 64)]
    refuse_unfit(ENGINES["llama_cpp"], types, asked="engine=llama_cpp", otherwise="use engine=none")
    with pytest.raises(EvoPressError, match=r"engine=llama_cpp cannot hold a.q_proj at 4 bits .* use \+method=gguf"):
        refuse_unfit(ENGINES["llama_cpp"], integers, asked="engine=llama_cpp", otherwise="use engine=none")
    with pytest.raises(EvoPressError, match=r"cannot hold GGUF's types \(a.q_proj at Q4_K\): set method.grid=integers"):
        refuse_unfit(ENGINES["mlx"], types, asked="export=[mlx]", otherwise="use engine=none")
    dropped = [Form("a.experts.0", "dropped", OF_EXPERT)]
    with pytest.raises(EvoPressError, match=r"not written for models whose experts are dropped \(a.experts.0 at dropped\)"):
        refuse_unfit(ENGINES["vllm"], dropped, asked="export=[compressed_tensors]", otherwise="use export=[dequantized]")


def test_options_are_checked() -> None:
    with pytest.raises(EvoPressError, match="dense=int8 is unknown: choose float32, float16, bfloat16, Q8_0"):
        GGUF(dense="int8")
    with pytest.raises(EvoPressError, match="exact=1 is neither"):
        GGUF(exact=1)  # type: ignore[arg-type]


def test_llama_3_divides_frequencies_as_transformers_does(exported: Callable[..., Export]) -> None:
    config = exported(config={"rope_parameters": LLAMA3}).model.config
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = LLAMA3["rope_theta"] ** (-torch.arange(0, 64, 2) / 64)  # type: ignore[operator]
    found = frequency_factors(config.to_dict())
    assert found is not None and len(found.unique()) > 3
    assert torch.allclose(plain / found, scaled, rtol=1e-5)


LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("pattern", "name"), [(LLAMA_3, "llama-bpe"), (LLAMA_3.replace("{1,3}", ""), "qwen2"), (TEKKEN, "tekken"), (r"\w+", None)]
)
def test_how_text_is_split_has_a_name(pattern: str, name: str | None) -> None:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    steps = [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}, byte_level]
    if name is not None:
        assert split_name(steps) == name
        return
    with pytest.raises(EvoPressError, match=r"pre-tokenizer \(Split and ByteLevel\): give it, such as"):
        split_name(steps)


def test_smollm2_and_gpt_2_split_text_by_digits_or_not() -> None:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    assert split_name([byte_level]) == "gpt-2"
    assert split_name([{"type": "Digits", "individual_digits": True}, byte_level]) == "smollm"
    with pytest.raises(EvoPressError, match=r"pre-tokenizer \(ByteLevel\)"):
        split_name([{**byte_level, "add_prefix_space": True}])


def metadata(tokenizer: Any, path: Path, **options: Any) -> dict[str, Any]:
    writer = gguf.GGUFWriter(path, "llama")
    add_tokenizer(writer, tokenizer, **options)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return {key.removeprefix("tokenizer.ggml."): field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def characters() -> PreTrainedTokenizerFast:
    """Return a tokenizer as Llama 2 and Mistral have it: merges of characters, bytes for what has no token."""
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁a", "ab", "a", "b", "▁", "▁ab"]
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b"), ("▁", "ab")]
    model = models.BPE(
        {token: i for i, token in enumerate(vocabulary)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def test_a_tokenizer_of_characters_has_scores_for_merges(tmp_path: Path) -> None:
    found = metadata(characters(), tmp_path / FILE, vocabulary=300)
    assert found["model"] == "llama" and found["add_space_prefix"] is True and found["add_bos_token"] is False
    tokens, scores, types = found["tokens"], found["scores"], found["token_type"]
    assert tokens[:3] == ["<unk>", "<s>", "</s>"] and types[:4] == [2, 3, 3, 6] and tokens[299] == "[PAD299]" and types[299] == 5
    score = dict(zip(tokens, scores, strict=True))
    assert score["▁a"] > score["ab"] > score["▁ab"] > score["b"] and types[tokens.index("▁ab")] == 1


def test_a_byte_level_tokenizer_has_its_special_tokens_and_its_template(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["hello"])
    tokenizer.chat_template = "{{ messages }}"
    found = metadata(tokenizer, tmp_path / FILE, vocabulary=260)
    assert (found["model"], found["pre"], found["eos_token_id"]) == ("gpt2", "gpt-2", 0)
    assert (found["token_type"][0], found["token_type"][1], found["token_type"][257]) == (3, 1, 4) and found["tokens"][
        257
    ] == "hello"
    assert found["tokenizer.chat_template"] == "{{ messages }}" and "bos_token_id" not in found
    assert metadata(tokenizer, tmp_path / "named.gguf", vocabulary=260, pre="falcon")["pre"] == "falcon"
    with pytest.raises(EvoPressError, match=r"token 257 \('hello'\) of the tokenizer, since the embedding has 257 rows"):
        metadata(tokenizer, tmp_path / "small.gguf", vocabulary=257)


IN_LLAMA_CPP = """
import json, sys
from pathlib import Path
from experiments.exports.llama_cpp import opened

asked = json.loads(sys.stdin.read())
with opened(Path(sys.argv[1]), length=len(asked["tokens"][0])) as loaded:
    logits = [loaded.logits(tokens).tolist() for tokens in asked["tokens"]]
    print(json.dumps({"logits": logits, "texts": [loaded.tokens_of(text) for text in asked["texts"]]}))
"""


@pytest.mark.engine
@pytest.mark.skipif(not llama_cpp.is_there(), reason="llama.cpp is not installed: pip install -e '.[llama_cpp]'")
@pytest.mark.parametrize(
    ("model_type", "given"),
    [
        ("llama", BIASED),
        ("qwen2", {"dropped": DROPPED}),
        ("qwen3", {"tied": True}),
        ("mistral", {"dropped": DROPPED, "config": {"attention_bias": True, "mlp_bias": True}}),
        ("llama", {"dropped": OTHERS, **BIASED}),
    ],
)
def test_llama_cpp_computes_what_was_measured(
    model_type: str, given: dict[str, Any], exported: Callable[..., Export], ids: Tensor, tmp_path: Path
) -> None:
    export = with_biases(exported(model_type, **given))
    path = write_export(GGUF(exact=True), tmp_path / "gguf", export) / FILE
    texts = ["ab 12", "Hello,\n  world"]
    asked = json.dumps({"tokens": ids.tolist(), "texts": texts})
    command = [sys.executable, "-c", IN_LLAMA_CPP, str(path)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=120, input=asked, text=True).stdout)
    assert found["texts"] == [export.tokenizer(text)["input_ids"] for text in texts]
    with export.live.applied(export.genome), torch.no_grad():
        ours = export.model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
    theirs = torch.tensor(found["logits"], dtype=torch.float64).log_softmax(-1)
    divergence = float((ours.exp() * (ours - theirs)).sum(-1).mean())
    assert divergence < 2e-3  # it rounds activations to 8 bits; a wrong order of heads' rows gives 0.06
