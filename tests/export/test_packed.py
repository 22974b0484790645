"""The formats of compressed-tensors and GPTQModel: decoded by literal twins, and, where installed, by compressed-tensors itself."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import packed_literal
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from evopress.compress.gptq import Dense, Quantized
from evopress.engines import ENGINES, Shape
from evopress.errors import EvoPressError
from evopress.export.compressed_tensors import CompressedTensors
from evopress.export.exporter import DENSE, INTEGERS, SPARSE, Export, Exporter, Form, write_export
from evopress.export.gptq import GPTQFiles
from evopress.export.named import make_exporters
from evopress.export.tensors_file import Entry, Section, header, write_sections
from evopress.export.written import names_in_checkpoint
from evopress.levels.live import LiveModel
from evopress.models.blocks import BlockModel
from evopress.models.outline import outlined
from evopress.models.tiny import byte_tokenizer
from evopress.units import Level, Space, Unit, is_module
from experiments.tiny_any import any_config, any_model

FILE = "model.safetensors"
EXPORTERS: dict[str, Callable[..., Exporter]] = {"compressed_tensors": CompressedTensors, "gptq": GPTQFiles}
PARTS = {
    "compressed_tensors": ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape"),
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
}


def as_numpy(tensor: torch.Tensor) -> Any:
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def schemes(folder: Path) -> Callable[[str], tuple[int, int] | None]:
    """Return what tells a module's bits and group size by an exported folder's configuration; None: it is not packed."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    if config["quant_method"] == "compressed-tensors":
        groups = list(config["config_groups"].values())
        assert all(group["weights"]["symmetric"] is False and group["format"] == "pack-quantized" for group in groups)
        found = {name: (g["weights"]["num_bits"], g["weights"]["group_size"]) for g in groups for name in g["targets"]}
        return lambda name: None if name in config["ignore"] else found[name]

    def of(name: str) -> tuple[int, int] | None:
        for pattern, own in config["dynamic"].items():  # as GPTQModel reads them
            if re.match(pattern[2:], name):
                return None if pattern[0] == "-" else (own["bits"], own["group_size"])
        return config["bits"], config["group_size"]

    return of


def decoded(folder: Path, what: str) -> dict[str, torch.Tensor]:
    """Return all weights of an exported folder as a checkpoint has them, packed ones in float32."""
    scheme_of, tensors = schemes(folder), load_file(folder / FILE)
    state = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part == PARTS[what][0]:
            own = {part: as_numpy(tensors[f"{module}.{part}"]) for part in PARTS[what]}
            scheme = scheme_of(module)
            assert scheme is not None
            if what == "gptq":
                assert len(own["g_idx"]) // len(own["scales"]) == scheme[1] or scheme[1] == -1
                weight = packed_literal.gptq(own, bits=scheme[0])
            else:
                weight = packed_literal.compressed_tensors(own, num_bits=scheme[0], group_size=scheme[1])
            state[f"{module}.weight"] = torch.from_numpy(weight)
        elif part not in PARTS[what]:
            if part == "weight" and module.endswith("_proj"):
                assert scheme_of(module) is None
            state[name] = tensor
    return state


@pytest.mark.parametrize(
    ("what", "model_type"),
    [
        *(("compressed_tensors", each) for each in ("llama", "qwen3", "phi3", "gemma3_text", "opt")),
        *(("gptq", each) for each in ("llama", "qwen3", "gemma3_text")),
    ],
)
def test_every_weight_is_what_its_payload_decodes_to(
    what: str, model_type: str, exported: Callable[..., Export], tmp_path: Path
) -> None:
    config = {"ffn_dim": 256} if model_type == "opt" else {}
    export, exporter = exported(model_type, packed=True, config=config), EXPORTERS[what]()
    exporter.check({"model_type": model_type}, export.forms)
    before = {name: tensor.clone() for name, tensor in export.model.state_dict().items()}
    said = exporter.num_bytes(export)
    folder = write_export(exporter, tmp_path / what, export)
    assert (folder / FILE).stat().st_size == said
    state, units, widths = decoded(folder, what), set(), set()
    for index, (unit, level) in enumerate(zip(export.live.space.units, export.genome, strict=True)):
        payload = export.levels.read(index, level)
        assert torch.equal(state[f"{unit.name}.weight"], payload.decode()), unit.name
        units.add(f"{unit.name}.weight")
        widths |= {payload.bits} if isinstance(payload, Quantized) else {32}
    assert widths == {2, 3, 4, 5, 6, 7, 8, 32}
    assert set(state) == set(before) - ({"lm_head.weight"} if export.model.config.tie_word_embeddings else set())
    assert all(torch.equal(state[name], before[name]) for name in set(state) - units)
    assert all(torch.equal(tensor, before[name]) for name, tensor in export.model.state_dict().items())
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == model_type and config["dtype"] == "float32" and config["architectures"]


@pytest.mark.parametrize("what", EXPORTERS)
def test_a_weight_as_it_is_lies_as_the_model_holds_it(what: str, tmp_path: Path) -> None:
    """GPT-2's are transposed."""
    model = any_model("gpt2")
    blocks = BlockModel(model, outlined(model))
    slots = [(part, slot) for part in blocks.parts for slot in blocks.slots(part).values()]
    dense = (Level("dense", 32, DENSE, 32, "quant"),)
    units = tuple(Unit(slot.name, part, slot.kind, slot.weight.numel(), dense) for part, slot in slots)
    read = lambda unit, level, device="cpu": Dense(slots[unit][1].weight)  # noqa: E731
    levels: Any = SimpleNamespace(space=Space("quant", units), folder=Path(), read=read)
    forms = tuple(Form(unit.name, "dense", DENSE) for unit in units)
    export = Export(LiveModel(blocks, levels), model, byte_tokenizer(), (0,) * len(units), forms)
    state = load_file(write_export(EXPORTERS[what](), tmp_path / what, export) / FILE)
    before = model.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())
    assert {f"{unit.name}.weight" for unit in units} < state.keys()
    assert schemes(tmp_path / what)("transformer.h.0.attn.c_attn") is None


@pytest.mark.parametrize(
    ("model_type", "in_model", "in_file"),
    [("gpt_neox", "lm_head", "embed_out"), ("lfm3", "model.layers.2.self_attn.g_proj", "model.layers.2.self_attn.gate_proj")],
)
def test_tensors_have_the_names_of_checkpoints_where_vllm_reads_them(
    model_type: str, in_model: str, in_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPTQModel fills transformers' own model by the names that it has."""
    model = any_model(model_type, **({"num_key_value_heads": 2} if model_type == "lfm3" else {}))  # rows of 32
    blocks = BlockModel(model, outlined(model))
    slots = [(part, slot) for part in blocks.parts for slot in blocks.slots(part).values()]
    four = (Level("4 bits", 4, "4", 4, "quant"),)
    units = tuple(Unit(slot.name, part, slot.kind, slot.weight.numel(), four) for part, slot in slots)

    def read(unit: int, level: int, device: str = "cpu") -> Quantized:
        rows, columns = slots[unit][1].weight.shape
        scales = torch.ones(rows, columns // 32, dtype=torch.float16)
        return Quantized(torch.ones(rows, columns, dtype=torch.uint8), scales, scales.to(torch.int16), 4, torch.float32)

    levels: Any = SimpleNamespace(space=Space("quant", units), folder=Path(), read=read)
    forms = tuple(
        Form(unit.name, "4 bits", INTEGERS, 4, 32, rows=slot.weight.shape[0], columns=slot.weight.shape[1])
        for unit, (_, slot) in zip(units, slots, strict=True)
    )
    export = Export(LiveModel(blocks, levels), model, byte_tokenizer(), (0,) * len(units), forms)
    CompressedTensors().check(model.config.to_dict(), forms)
    model.save_pretrained(tmp_path / "checkpoint")
    asked: list[Any] = []
    monkeypatch.setattr(
        "evopress.export.compressed_tensors.names_in_checkpoint", lambda model: asked.append(model) or names_in_checkpoint(model)
    )
    folder = write_export(CompressedTensors(), tmp_path / "packed", export)
    assert len(asked) == 1
    assert CompressedTensors().num_bytes(export) == (folder / FILE).stat().st_size
    ends = r"\.weight(_packed|_scale|_zero_point|_shape)?$"
    found, expected = ({re.sub(ends, "", name) for name in load_file(each / FILE)} for each in (folder, tmp_path / "checkpoint"))
    assert found == expected and in_file in found and in_model not in found
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    told = {*config["ignore"], *(name for group in config["config_groups"].values() for name in group["targets"])}
    assert in_file in told and told - {"lm_head"} <= found  # which may be tied to the embedding
    gptq = load_file(write_export(GPTQFiles(), tmp_path / "gptq", export) / FILE)
    assert any(name.startswith(f"{in_model}.") for name in gptq) and not any(name.startswith(f"{in_file}.") for name in gptq)


def test_a_model_whose_checkpoints_have_other_tensors_is_refused() -> None:
    config = any_config("olmo_hybrid").to_dict()
    with pytest.raises(EvoPressError, match=r"checkpoints of olmo_hybrid have no .*conv1d.weight, .*; use export=\[dequantized\]"):
        CompressedTensors().check(config, [])
    GPTQFiles().check(config, [])


@pytest.mark.parametrize(
    ("what", "option", "value"),
    [("mlx", "scales", [16]), ("compressed_tensors", "dtype", ["float16"]), ("gguf", "pre_tokenizer", 3)],
)
def test_an_option_of_another_type_is_refused(what: str, option: str, value: Any) -> None:
    with pytest.raises(EvoPressError, match=rf"export_options\.{what}\.{option}="):
        make_exporters([what], {what: {option: value}})


@pytest.mark.parametrize("what", EXPORTERS)
def test_experts_are_refused_before_a_search(what: str) -> None:
    form = Form("experts.0.down_proj", "4 bits", INTEGERS, 4, 64, rows=64, columns=64, of_expert=True)
    untied = [integers(name, bits) for name, bits in ((Q, 4), (K, 3), (V, 2))]  # which engine=vllm would not help
    with pytest.raises(EvoPressError, match=r"is not written for experts \(experts\.0\.down_proj at 4 bits"):
        EXPORTERS[what]().check({"model_type": "mixtral"}, iter([*untied, form]))


@pytest.mark.parametrize("model_type", ["phi3", "glm4"])
def test_models_whose_weights_gptqmodel_splits_are_refused(model_type: str) -> None:
    """It would load them, and leave what lies in the file as gate_up_proj unread."""
    with pytest.raises(
        EvoPressError, match=rf"^export=\[gptq\] cannot hold a model of type {model_type}: GPTQModel splits its gate_up_proj"
    ):
        GPTQFiles().check({"model_type": model_type}, [])


@pytest.mark.parametrize("model_type", ["bloom", "falcon_h1", "gptj", "stablelm", "zamba2"])
def test_models_whose_packed_weights_vllm_does_not_load_are_refused(model_type: str) -> None:
    with pytest.raises(
        EvoPressError, match=rf"^export=\[compressed_tensors\] cannot hold a model of type {model_type}: vLLM does not"
    ):
        CompressedTensors().check({"model_type": model_type}, [])


def test_a_weight_takes_what_its_engine_is_said_to_store(exported: Callable[..., Export]) -> None:
    """The price that a search pays is the file's, its header aside."""
    export = exported(packed=True)
    for what, engine in (("compressed_tensors", "vllm"), ("gptq", "gptqmodel")):
        exporter: Any = EXPORTERS[what](**({"dtype": "float16"} if what == "compressed_tensors" else {}))
        sections = exporter._sections(
            export, *([_Ignored(), names_in_checkpoint(export.model)] if what == "compressed_tensors" else [])
        )[0]
        sizes = {s.entries[0].name.rpartition(".")[0]: sum(entry.num_bytes for entry in s.entries) for s in sections}
        for form in export.forms:
            if form.kind == INTEGERS:
                shape = Shape(form.rows, form.columns, form.bits, form.rows * form.columns // form.group_size, 16)
                assert sizes[form.unit] * 8 == ENGINES[engine].stored_bits(shape), form
        assert len(header(sections, {})) % 8 == 0


def test_a_tensor_of_one_number_is_written_whatever_its_strides(tmp_path: Path) -> None:
    """As the packed zeros of 16 rows of 2 bits in one group are, transposed."""
    number = torch.tensor([[7, 8]], dtype=torch.int32)[:, :1].T
    section = Section((Entry("a", torch.int32, (1, 1)),), lambda: [number])
    write_sections(tmp_path / FILE, [section], {})
    assert torch.equal(load_file(tmp_path / FILE)["a"], number) and number.stride() != (1, 1)


class _Ignored:
    worst = 0.0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_scales_are_in_the_dtype_that_is_served_and_the_card_says_what_that_changes(
    dtype: str, exported: Callable[..., Export], tmp_path: Path
) -> None:
    export = exported(packed=True, dtype=torch.bfloat16)
    options = {} if dtype == "bfloat16" else {"dtype": dtype}
    folder = write_export(CompressedTensors(**options), tmp_path / "ct", export)
    tensors = load_file(folder / FILE)
    floating = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    assert floating == {getattr(torch, dtype)}
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
    worst, state = 0.0, decoded(folder, "compressed_tensors")
    for index, (unit, level) in enumerate(zip(export.live.space.units, export.genome, strict=True)):
        payload = export.levels.read(index, level)
        if isinstance(payload, Quantized):
            exact = replace(payload, dtype=torch.float32).decode()
            there = exact != 0
            worst = max(worst, float(((state[f"{unit.name}.weight"] - exact).abs()[there] / exact.abs()[there]).max()))
    card = (folder / "README.md").read_text()
    if dtype == "float16":
        assert worst == 0.0 and "holds their scales as they are" in card
    else:
        said = float(card.split("at most ")[1].split(" of itself")[0])
        assert 0 < worst <= said * 1.06 and said < 2**-8 * 1.06 and "method.scale_dtype=bfloat16" in card
    assert f"vllm serve . --dtype {dtype}" in card


@pytest.mark.parametrize("what", EXPORTERS)
def test_dropped_blocks_are_left_out_and_dropped_modules_are_zeros(
    what: str, exported: Callable[..., Export], tmp_path: Path, ids: torch.Tensor
) -> None:
    export = exported(packed=True, dropped=[(0, "attention"), (1, "attention"), (1, "mlp"), (2, "mlp")])
    with export.live.applied(export.genome):
        expected = export.model(input_ids=ids, use_cache=False).logits
    exporter = EXPORTERS[what]()
    said = exporter.num_bytes(export)
    folder = write_export(exporter, tmp_path / what, export)
    assert (folder / FILE).stat().st_size == said
    state = decoded(folder, what)
    gone = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkvo"]
    gone += [f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
    assert not any(state[name].any() for name in gone) and not any(".layers.2." in name for name in state)
    fewest = min(form.bits for form in export.forms if form.kind == INTEGERS)
    assert {schemes(folder)(name.removesuffix(".weight")) for name in gone} <= {(fewest, 128), (fewest, 256)}
    config = json.loads((folder / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    model = AutoModelForCausalLM.from_config(type(export.model.config)(**{**config, "quantization_config": None})).eval()
    model.load_state_dict(state)
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids, use_cache=False).logits, expected, atol=2e-5)
    assert len([unit for unit in export.live.space.units if not is_module(unit)]) == 21


@pytest.mark.parametrize("what", EXPORTERS)
def test_zeros_that_are_no_codes_are_refused_and_leave_nothing(what: str, exported: Callable[..., Export], tmp_path: Path) -> None:
    export = exported(packed=True)
    with pytest.raises(EvoPressError, match=r"zeros reach from -2 to \d+ and are packed as codes, 0 to \d+; .*method.zeros=codes"):
        write_export(EXPORTERS[what](), tmp_path / what, _with_other_zeros(export))
    assert list(tmp_path.iterdir()) == []


def _with_other_zeros(export: Export) -> Export:
    read = export.levels.read

    class Levels:
        folder, space = export.levels.folder, export.levels.space

        def read(self, unit: int, level: int, device: Any = "cpu") -> Any:
            payload = read(unit, level)
            return replace(payload, zeros=payload.zeros - 2) if isinstance(payload, Quantized) else payload

    export.live.levels = Levels()  # type: ignore[assignment]
    return export


def integers(name: str, bits: int, group_size: int = 64, **given: Any) -> Form:
    return Form(name, f"{bits} bits", INTEGERS, bits, group_size, **{"rows": 64, "columns": 128, **given})


Q, K, V = (f"model.layers.0.self_attn.{part}_proj" for part in "qkv")
SAME = [integers(name, 4) for name in (Q, K, V)]


@pytest.mark.parametrize(
    ("what", "forms", "sentence"),
    [
        ("compressed_tensors", [integers("a.o_proj", 1)], "a.o_proj at 1 bits in groups of 64: vLLM has 2, 3, 4, 5, 6, 7, 8 bits"),
        ("compressed_tensors", [integers("a.o_proj", 4, 256)], "groups of 256: vLLM has groups of 32, 64, 128; set"),
        ("compressed_tensors", [integers("lm_head", 4, outside=True)], r"lm_head at 4 bits .*set method.include=\[blocks\]"),
        ("compressed_tensors", [Form("a.o_proj", "-1", SPARSE)], "sparse weights"),
        (
            "compressed_tensors",
            [integers(Q, 4), integers(K, 3), integers(V, 4)],
            "q_proj at 4 bits in groups of 64 beside .*k_proj at 3 bits .*fuses q_proj, k_proj, v_proj into qkv_proj, .*=vllm",
        ),
        ("compressed_tensors", [*SAME[:2], Form(V, "dense", DENSE)], "v_proj at dense"),
        (
            "compressed_tensors",
            [integers(name, bits) for name in (Q, K, V) for bits in (4, 3)],
            "self_attn.q_proj and k_proj, v_proj at levels of their own: .*engine=vllm",
        ),
        (
            "compressed_tensors",
            [integers(Q, 3, rows=240), *(integers(name, 3, rows=80) for name in (K, V))],
            "q_proj at 3 bits .* has 240 rows: .* into qkv_proj and cuts off .* method.levels to some of 2, 4, 6, 8 bits, or use",
        ),
        (
            "compressed_tensors",
            [integers(f"model.layers.0.mlp.{part}_proj", 5, rows=65) for part in ("gate", "up")],
            "gate_proj at 5 bits .* has 65 rows: .* must be a multiple of 32; use",
        ),
        ("gptq", [integers("a.o_proj", 4, 576)], "groups of 32, 64, 128, 256, 512, 1024, or whole rows"),
        ("gptq", [integers("a.o_proj", 4, rows=48)], r"\[48, 128\]: GPTQModel packs integers in 32-bit words"),
        ("gptq", [integers("a.o_proj", 4, scale_dtype="float32")], "whose scales are float32: GPTQModel has float16"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(what: str, forms: list[Form], sentence: str) -> None:
    with pytest.raises(EvoPressError, match=rf"^export=\[{what}\] cannot hold .*{sentence}"):
        EXPORTERS[what]().check({"model_type": "llama"}, forms)


def test_what_fits_is_not_refused() -> None:
    tied = [integers(name, bits, tied="model.layers.0.self_attn.qkv_proj") for name in (Q, K, V) for bits in (4, 3)]
    odd = [integers(name, 4, rows=rows) for name, rows in ((Q, 240), (K, 80), (V, 80))] + [integers("a.o_proj", 3, rows=80)]
    for forms in (SAME, tied, odd, [integers("model.layers.0.mlp.gate_proj", 4), integers("model.layers.1.mlp.up_proj", 3)]):
        CompressedTensors().check({"model_type": "llama"}, forms)
    GPTQFiles().check({}, [integers(Q, 4), integers(K, 3), integers(V, 4), integers("a.o_proj", 4, 576, columns=576)])
    with pytest.raises(EvoPressError, match="dtype=int8 is unknown"):
        CompressedTensors(dtype="int8")


@pytest.mark.engine
@pytest.mark.skipif(
    find_spec("compressed_tensors") is None,
    reason="compressed-tensors is not installed: pip install -e '.[compressed_tensors]'",
)
def test_the_formats_own_code_decodes_what_was_stored(exported: Callable[..., Export], tmp_path: Path) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    export = exported(packed=True)
    folder = write_export(CompressedTensors(), tmp_path / "ct", export)
    config = QuantizationConfig(**json.loads((folder / "config.json").read_text())["quantization_config"])
    tensors = load_file(folder / FILE)
    own = BaseCompressor.get_value_from_registry("pack-quantized")
    seen = 0
    for index, (unit, level) in enumerate(zip(export.live.space.units, export.genome, strict=True)):
        scheme = next((group for group in config.config_groups.values() if unit.name in group.targets), None)
        if scheme is None:
            assert unit.name in config.ignore
            continue
        parts = {part: tensors[f"{unit.name}.{part}"] for part in PARTS["compressed_tensors"]}
        weight = own.decompress(parts, scheme)["weight"]
        assert torch.equal(weight, export.levels.read(index, level).decode()), unit.name
        seen += 1
    assert seen > 15
