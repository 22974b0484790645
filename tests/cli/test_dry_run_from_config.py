"""`dry_run=true` where a model's config.json is there and its weights are not."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from hydra import compose, initialize_config_dir

from evopress import config as configuration
from evopress import pipeline
from evopress.errors import EvoPressError
from evopress.models import opening
from evopress.models.first_block import first_block
from evopress.models.loading import load_pretrained
from evopress.models.opening import find_model, fitted
from evopress.models.tiny import tiny_config
from evopress.settings import ModelSettings
from evopress.stages import preflight, probe
from evopress.stages.preflight import Plan
from experiments.tiny_any import any_config

DRY = "dry_run=true"
ARCHITECTURES = {
    "gemma3_4b_it": "gemma3",
    "gemma4_12b_it": "gemma4_unified_text",
    "glm4_9b": "glm4",
    "gpt_oss_20b": "gpt_oss",
    "granite4_h_tiny": "granitemoehybrid",
    "hub": "llama",
    "llama2_7b": "llama",
    "llama31_8b": "llama",
    "llama3_8b": "llama",
    "local": "opt",
    "ministral3_8b": "ministral3",
    "mistral_7b_v03": "mistral",
    "olmo3_7b": "olmo3",
    "phi3_medium_128k_instruct": "phi3",
    "qwen3_30b_a3b": "qwen3_moe",
    "qwen3_5_27b": "qwen3_5_text",
    "qwen3_5_35b_a3b": "qwen3_5_moe_text",
    "qwen3_8b": "qwen3",
    "smollm3_3b": "smollm3",
}
"""What tiny model stands for that of a YAML."""
OWN = ("smollm2_135m", "tiny")
"""Which are made on the spot."""


def config_of(model_type: str) -> Any:
    if model_type == "gemma3":  # a language model inside another
        pictures = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = transformers.Gemma3Config(text_config=any_config("gemma3_text").to_dict(), vision_config=pictures)
        config.architectures = ["Gemma3ForConditionalGeneration"]
        return config
    return tiny_config(model_type) if model_type in ("llama", "phi3", "opt") else any_config(model_type)


@pytest.fixture
def plan_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    """Return the plan of a dry run that these overrides compose."""
    configuration.register()
    plans: list[Plan] = []
    planned = preflight.preflight
    monkeypatch.setattr(pipeline, "preflight", lambda *args, **kwargs: plans.append(planned(*args, **kwargs)) or plans[-1])
    monkeypatch.setenv("EVOPRESS_CACHE", str(tmp_path / "cache"))

    def plan(*overrides: str) -> Plan:
        with initialize_config_dir(version_base="1.3", config_dir=str(configuration.config_folder())):
            settings = fitted(configuration.to_settings(compose("config", overrides=[DRY, *overrides])))
        fitness = pipeline.run(settings, tmp_path / "run", config={}, command="", environment={})
        assert math.isnan(fitness)
        return plans[-1]

    return plan


def test_every_yaml_is_covered() -> None:
    names = {path.stem for path in (configuration.config_folder() / "model").glob("*.yaml")}
    assert names == {*ARCHITECTURES, *OWN}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_dry_run_needs_no_more_than_the_config(name: str, plan_of: Callable[..., Plan], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    config_of(ARCHITECTURES[name]).save_pretrained(folder)
    assert [path.name for path in folder.iterdir() if path.name != "generation_config.json"] == ["config.json"]
    sizes = ("model.sequence_length=64", "model.group_size=16", "data.calibration_tokens=1024", "data.search_tokens=4096")
    plan = plan_of("+method=quant", "bits=2.5", f"model={name}", f"model.path={folder}", *sizes)
    needs = {each.stage: each for each in plan.stages}
    assert list(needs) == ["database", "baselines", "search", "evaluate", "export", "report"]
    assert needs["database"].tokens == 1024 and needs["database"].memory > 0
    assert min(sum(needs[stage].disk.values()) for stage in ("database", "export", "report")) > 0
    assert min(needs[stage].block_tokens for stage in ("baselines", "search", "evaluate")) > 0


def test_what_is_said_without_weights_is_what_is_said_with_them(
    plan_of: Callable[..., Plan], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """But for the text, which is counted as what was asked for, and here as long."""
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(tiny_folder() / "config.json", bare)
    same = ("+method=joint", "size=100kB", "+debug=tiny", "model.name=same")
    without, with_weights = (plan_of(*same, f"model.path={folder}").stages for folder in (bare, tiny_folder()))
    assert without == with_weights


@pytest.mark.parametrize(
    ("names", "model_type", "engine"),
    [("mlx,gguf", "llama", "none"), ("compressed_tensors", "opt", "vllm"), ("gptq", "opt", "none")],
)
def test_what_packed_formats_take_is_said_without_weights(
    names: str,
    model_type: str,
    engine: str,
    plan_of: Callable[..., Plan],
    tiny_folder: Callable[..., Path],
    tmp_path: Path,
) -> None:
    tiny_config(model_type).save_pretrained(tmp_path / "bare")
    same = ("+method=quant", "bits=3.5", "+debug=tiny", "model.name=same", "model.group_size=32", "stages=[database,search,export]")
    same = (*same, f"export=[{names}]", f"engine={engine}")
    without, with_weights = (
        plan_of(*same, f"model.path={folder}").stages for folder in (tmp_path / "bare", tiny_folder(model_type))
    )
    assert without == with_weights and sum(without[-1].disk.values()) > 0


def test_the_first_block_is_as_fast_as_that_of_the_model(
    tiny_folder: Callable[..., Path], plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is the model's own first block, in its dtype, with as many weights; times come from it."""
    config = load_pretrained(tiny_folder("gemma2"), dtype="float32").model.config.to_dict()
    first = first_block(config, dtype=torch.bfloat16, device=torch.device("cpu"), most_bytes=2**30)
    assert first is not None and first.dtype == torch.bfloat16 and len(first.blocks) == 1
    whole = load_pretrained(tiny_folder("gemma2"), dtype="float32").model
    layer = whole.model.layers[0]
    assert {name: p.shape for name, p in first.blocks[0].named_parameters()} == {n: p.shape for n, p in layer.named_parameters()}
    assert first_block(config, dtype=torch.float32, device=torch.device("cpu"), most_bytes=2**10) is None
    monkeypatch.setattr(probe, "LEAST_PARAMETERS", 0)
    any_config("qwen3_moe").save_pretrained(tmp_path / "moe")
    plan = plan_of("+method=quant", "bits=2.5", "+debug=tiny", f"model.path={tmp_path / 'moe'}", "stages=[database,search]")
    assert all(needs.seconds is not None and needs.seconds > 0 for needs in plan.stages)


def test_what_this_machine_lacks_is_said_and_refuses_nothing(
    plan_of: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_config().save_pretrained(tmp_path / "model")
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 100_000}))
    plan_of("+method=quant", "bits=2.5", "+debug=tiny", f"model.path={tmp_path / 'model'}", "stages=[evaluate]")
    assert "on this machine the run would be refused: building the level database needs" in caplog.text


def test_weights_that_this_machine_has_no_room_for_are_planned_by_their_config(
    plan_of: Callable[..., Plan],
    tiny_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As those that are not there: on a login node, for example, whose files a cluster shares."""
    same = ("+method=quant", "bits=2.5", "+debug=tiny", f"model.path={tiny_folder()}", "stages=[database,search]")
    with_room = plan_of(*same).stages
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    caplog.set_level("INFO")
    monkeypatch.setattr(opening, "load_pretrained", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr(preflight, "first_block", lambda *_, **__: None)
    assert [needs.stage for needs in plan_of(*same).stages] == [needs.stage for needs in with_room]
    assert "on this machine the run would be refused: the model takes" in caplog.text
    assert "its weights are more than this machine has room for, so only config.json is read" in caplog.text


def test_of_the_hub_the_small_files_are_fetched_alone(
    plan_of: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def snapshot_download(name: str, *, allow_patterns: list[str], **_: Any) -> str:
        asked.append(allow_patterns)
        tiny_config("qwen3").save_pretrained(tmp_path / "hub")
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    plan_of("+method=drop", "sparsity=0.5", "+debug=tiny", "model.path=some/model")
    assert asked and not any("safetensors" in pattern for patterns in asked for pattern in patterns if pattern != "*.json")


def test_the_command_says_that_nothing_but_the_config_was_read(evopress: Callable[..., Any], tmp_path: Path) -> None:
    tiny_config().save_pretrained(tmp_path / "model")
    outcome = evopress("+method=quant", "bits=2.5", "+debug=tiny", "model.path=model", "stages=[database]", DRY)
    assert outcome.code == 0, outcome.text
    assert "its weights are not in model, so only config.json is read" in outcome.text
    assert "dry run: nothing was built or searched" in outcome.text
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "none"}), encoding="utf-8")
    with pytest.raises(EvoPressError, match="is unknown to transformers"):
        find_model(ModelSettings(path=str(tmp_path / "model")), tmp_path, weights=False)


def test_experts_that_are_not_there_cannot_be_tied(plan_of: Callable[..., Plan], tmp_path: Path) -> None:
    tiny_config().save_pretrained(tmp_path / "model")
    with pytest.raises(EvoPressError, match="but this model has no experts"):
        plan_of("+method=quant", "bits=2.5", "+debug=tiny", f"model.path={tmp_path / 'model'}", "method.experts=layer")
