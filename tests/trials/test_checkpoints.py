"""Checkpoints that hold more than their config says: what is dropped in silence elsewhere is named here, or refused."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from torch import Tensor

from evopress.errors import EvoPressError
from evopress.models.loading import fetch_from_hub, find_weights, load_pretrained
from evopress.models.stored import INDEX, WEIGHTS
from evopress.models.tiny import byte_tokenizer
from experiments.tiny_any import any_model

Weights = dict[str, Tensor]


@pytest.fixture
def checkpoint(tiny_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Return a tiny checkpoint whose weights and config a test changes."""

    def make(change: Callable[[Weights], Weights | None] | None = None, *, num_blocks: int = 2, **config: object) -> Path:
        folder = shutil.copytree(tiny_folder("llama", num_blocks=num_blocks), tmp_path / "model")
        if config:
            path = folder / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | config), encoding="utf-8")
        if change is not None:
            weights = load_file(folder / WEIGHTS)
            save_file(change(weights) or weights, folder / WEIGHTS, metadata={"format": "pt"})
        return folder

    return make


def float8_with_scales(weights: Weights) -> None:
    for name in [name for name in weights if name.endswith("proj.weight")]:
        scale = weights[name].abs().max() / 448
        weights[name] = (weights[name] / scale).to(torch.float8_e4m3fn)
        weights[name.replace("weight", "weight_scale")] = scale
        weights[name.replace("weight", "input_scale")] = torch.tensor(1.0)


def float8_alone(weights: Weights) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name].to(torch.float8_e5m2)


def int8_alone(weights: Weights) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    weights[name] = (weights[name] * 100).to(torch.int8)


def scales_beside_weights(weights: Weights) -> None:
    weights["model.layers.0.self_attn.k_proj.k_scale"] = torch.tensor(0.1)


def packed(weights: Weights) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name.replace("weight", "qweight")] = weights.pop(name).to(torch.int32)


@pytest.mark.parametrize("change", [float8_with_scales, float8_alone, int8_alone, scales_beside_weights, packed])
def test_tensors_of_quantized_weights_are_told_without_a_mark_in_the_config(change: Any, checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(EvoPressError, match=r"already quantized \('model\.layers\.\d\.[a-z._]+' is stored as [A-Z0-9_]+\): give"):
        find_weights(checkpoint(change))


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "gptq"}},
        {"compression_config": {"format": "pack-quantized"}},
        {"quantization": {"group_size": 64, "bits": 4}},
        {"text_config": {"quantization_config": {"bits": 4}}},
        {"dtype": "float8_e4m3fn"},
    ],
)
def test_a_mark_in_the_config_counts_whatever_its_key(config: dict[str, Any], checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(EvoPressError, match=r"already quantized .*original weights"):
        find_weights(checkpoint(**config))


@pytest.mark.parametrize(
    "config",
    [
        {"audio_encoder_config": {"num_quantizers": 32, "vector_quantization_hidden_dimension": 256}},
        {"num_semantic_quantizers": 1, "quantization_levels": [8, 8], "quantizer_dropout": 0.1},
        {"quantiles": [0.1, 0.5, 0.9]},
    ],
)
def test_sizes_of_an_audio_codec_are_no_mark(config: dict[str, Any], checkpoint: Callable[..., Path]) -> None:
    assert find_weights(checkpoint(**config))


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json", "quant_model_description.json"])
def test_a_mark_in_a_file_counts_whatever_its_name(name: str, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    (folder / name).write_text("{}", encoding="utf-8")
    with pytest.raises(EvoPressError, match=rf"already quantized \({name}\).*remove this file"):
        find_weights(folder)
    (folder / name).unlink()
    assert find_weights(folder)


def mlp_biases(weights: Weights) -> None:
    for name in [name for name in weights if ".mlp." in name]:
        weights[name.replace("weight", "bias")] = torch.ones(len(weights[name]))


def adapter_inside(weights: Weights) -> None:
    weights["model.layers.0.mlp.up_proj.lora_A.weight"] = torch.ones(2, 32)


def pictures(weights: Weights) -> None:
    weights["model.vision_tower.patch.weight"] = torch.ones(2, 32)


def experts(weights: Weights) -> None:
    weights["model.layers.0.mlp.experts.0.up_proj.weight"] = torch.ones(2, 32)


def other_norms(weights: Weights) -> None:
    weights["model.layers.0.self_attn.q_norm.weight"] = torch.ones(16)


@pytest.mark.parametrize(
    ("change", "settings", "first", "guess"),
    [
        (mlp_biases, {}, "model.layers.0.mlp.down_proj.bias", "biases that it does not switch on"),
        (None, {"num_blocks": 4, "num_hidden_layers": 2}, "model.layers.2.input_layernorm.weight", "num_hidden_layers=2"),
        (adapter_inside, {}, "model.layers.0.mlp.up_proj.lora_A.weight", "a LoRA adapter"),
        (pictures, {}, "model.vision_tower.patch.weight", "pictures or sound"),
        (experts, {}, "model.layers.0.mlp.experts.0.up_proj.weight", "experts"),
        (other_norms, {}, "model.layers.0.self_attn.q_norm.weight", "another architecture"),
    ],
)
def test_tensors_without_a_place_are_refused_with_what_they_probably_are(
    change: Any, settings: dict[str, Any], first: str, guess: str, checkpoint: Callable[..., Path]
) -> None:
    with pytest.raises(EvoPressError, match=r"no place for, probably .*: correct config\.json") as caught:
        load_pretrained(checkpoint(change, **settings))
    assert first in str(caught.value) and guess in str(caught.value)


def test_tensors_under_other_names_are_named_with_those_that_lack(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint(lambda weights: {f"language_model.{name}": tensor for name, tensor in weights.items()})
    with pytest.raises(EvoPressError, match=r"lack lm_head\.weight and 20 others .* but hold language_model\.lm_head\.weight"):
        load_pretrained(folder)


def old_buffers(weights: Weights) -> None:
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    weights["model.position_ids"] = torch.arange(8)


def tied_head(weights: Weights) -> None:
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()


@pytest.mark.parametrize(("change", "settings"), [(old_buffers, {}), (tied_head, {"tie_word_embeddings": True})])
def test_what_is_known_to_be_harmless_is_taken(
    change: Any, settings: dict[str, Any], checkpoint: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert load_pretrained(checkpoint(change, **settings)).left_out == ()
    assert "further head" not in caplog.text


def several_tokens(weights: Weights) -> None:
    weights["mtp.0.weight"] = torch.ones(4, 4)
    weights["mtp.1.weight"] = torch.ones(4, 4)


def several_tokens_as_a_block(weights: Weights) -> None:
    weights["model.layers.2.eh_proj.weight"] = torch.ones(4, 8)
    weights["model.layers.2.mlp.up_proj.weight"] = torch.ones(4, 4)


def value_head(weights: Weights) -> None:
    weights["v_head.summary.weight"] = torch.ones(1, 32)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (several_tokens, ("mtp.0.weight", "mtp.1.weight")),
        (several_tokens_as_a_block, ("model.layers.2.eh_proj.weight", "model.layers.2.mlp.up_proj.weight")),
        (value_head, ("v_head.summary.weight",)),
    ],
)
def test_a_further_head_is_named_in_a_warning(
    change: Any, names: tuple[str, ...], checkpoint: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert load_pretrained(checkpoint(change)).left_out == names
    assert names[0] in caplog.text and "neither used nor exported" in caplog.text


@pytest.mark.parametrize(
    ("model_type", "names"),
    [
        ("qwen3_next", ("mtp.fc.weight", "mtp.layers.0.mlp.gate.weight")),
        ("mimo_v2_flash", ("model.mtp.layers.0.eh_proj.weight",)),
        ("deepseek_v3", ("model.layers.61.eh_proj.weight", "model.layers.61.self_attn.o_proj.weight")),
        ("glm4_moe", ("model.layers.4.eh_proj.weight", "model.layers.4.mlp.up_proj.weight")),
    ],
)
def test_a_further_head_that_a_class_leaves_out_by_its_name_is_named_too(
    model_type: str, names: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    any_model(model_type).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    with caplog.at_level(logging.WARNING):
        assert load_pretrained(tmp_path, dtype="float32").left_out == ()
        save_file(weights | {name: torch.ones(4, 4) for name in names}, tmp_path / WEIGHTS, metadata={"format": "pt"})
        assert load_pretrained(tmp_path, dtype="float32").left_out == names
    assert f"a further head ({names[0]}" in caplog.text


def test_blocks_of_a_decoder_beside_a_shorter_encoder_are_no_further_head(tmp_path: Path) -> None:
    any_model("mbart", encoder_layers=1).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert load_pretrained(tmp_path, dtype="float32").left_out == ()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_beside_the_weights_is_refused_as_one(name: str, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    (folder / name).write_bytes(b"{}")
    with pytest.raises(EvoPressError, match=rf"holds a LoRA adapter \({name}\): merge it"):
        find_weights(folder)


def test_an_adapter_alone_is_refused_as_one(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(EvoPressError, match="holds a LoRA adapter"):
        find_weights(tmp_path)


EXTRA = (
    *("consolidated.safetensors", "consolidated.00.pth", "pytorch_model.bin", "original/params.json", "onnx/model.onnx"),
    *("original/model.safetensors", "fp16/model.safetensors", "tokenizer.model", "chat_template.jinja", "original/tokenizer.model"),
)


@pytest.fixture
def hub(tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return a repository's folder and let `snapshot_download` copy from it what its own filter lets through."""
    repository, fetched = tmp_path / "repository", tmp_path / ("a" * 40)
    revisions: list[Any] = []

    def snapshot_download(name: str, *, revision: Any, allow_patterns: Any, ignore_patterns: Any = None, **_: Any) -> str:
        revisions.append(revision)
        files = [str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file()]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (fetched / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(repository / file, fetched / file)
        return str(fetched)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)

    def make(*, shards: bool = False) -> Path:
        shutil.copytree(tiny_folder(), repository)
        for name in EXTRA:
            (repository / name).parent.mkdir(exist_ok=True)
            (repository / name).write_bytes(b"{}")
        if shards:
            tensors = load_file(repository / WEIGHTS)
            (repository / WEIGHTS).unlink()
            halves = [dict(list(tensors.items())[i::2]) for i in range(2)]
            for i, half in enumerate(halves):
                save_file(half, repository / f"model-0000{i + 1}-of-00002.safetensors", metadata={"format": "pt"})
            places = {name: f"model-0000{i + 1}-of-00002.safetensors" for i, half in enumerate(halves) for name in half}
            (repository / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")
        return repository

    make.revisions = revisions  # type: ignore[attr-defined]
    return make


@pytest.mark.parametrize("shards", [False, True])
def test_of_a_repository_only_what_is_loaded_is_fetched(shards: bool, hub: Any) -> None:
    hub(shards=shards)
    folder = fetch_from_hub("some/model", revision="main")
    weights = {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)} if shards else {WEIGHTS}
    small = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"}
    small |= {"chat_template.jinja"} | ({INDEX} if shards else set())
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == weights | small
    assert hub.revisions[0] == "main" and set(hub.revisions[1:]) == {folder.name}  # the branch may move meanwhile
    (folder / "tokenizer.model").unlink()  # made up
    assert load_pretrained(folder).left_out == ()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("adapter_config.json", "{}", "LoRA adapter"),
        ("hf_quant_config.json", "{}", "already quantized"),
        ("config.json", '{"model_type": "llama", "quantization_config": {"quant_method": "awq"}}', r"already quantized \(awq\)"),
        ("config.json", '{"model_type": "t5"}', "'t5' is no causal language model"),
    ],
)
def test_what_cannot_be_used_is_refused_before_its_weights_are_fetched(name: str, content: str, says: str, hub: Any) -> None:
    (hub() / name).write_text(content, encoding="utf-8")
    with pytest.raises(EvoPressError, match=says):
        fetch_from_hub("some/model", revision=None)
    assert len(hub.revisions) == 1
