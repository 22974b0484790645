"""What a run says that it will take of memory is what is counted, within a fifth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from evopress.models.blocks import BlockModel
from evopress.models.experts import copied_for_export, gathered
from evopress.models.outline import find_family
from experiments.benchmark import peaks
from experiments.benchmark.alive import BOTH, DEVICE, HOST, Alive
from experiments.tiny_any import any_model


def near(said: Mapping[str, int], counted: Mapping[str, int]) -> None:
    """Check every stage."""
    ratios = {stage: said[stage] / counted[stage] for stage in counted}
    assert all(0.8 < ratio < 1.2 for ratio in ratios.values()), ratios


@pytest.mark.parametrize("case", peaks.CASES[:2], ids=lambda case: case.model)
def test_of_large_models_of_shapes_alone(case: peaks.Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVOPRESS_CACHE", str(tmp_path / "cache"))
    said, counted = peaks.planned(case, tmp_path), peaks.counted(case)
    near({stage: said[stage][HOST] for stage in said}, {stage: counted[stage][BOTH] for stage in counted})


SMALL = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 2, "vocab_size": 512}


@pytest.mark.parametrize(("dtype", "cache"), [("float32", 1_572_864), ("bfloat16", 786_432)])
def test_of_small_models_that_run(dtype: str, cache: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVOPRESS_CACHE", str(tmp_path / "cache"))
    near(*peaks.counted_in_run(peaks.Case("small", SMALL, dtype, 128, 2048, 4, 1024, 512, str(cache)), tmp_path))


@pytest.mark.parametrize("offload", [False, True])
def test_what_lies_on_a_device_is_said_of_it_and_not_of_the_host(
    offload: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is torch's meta device, for the run that says and for the work that is counted."""
    monkeypatch.setenv("EVOPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("evopress.workspace.pick_device", lambda name: torch.device("meta"))
    case = peaks.Case("small", SMALL, "bfloat16", 128, 2048, 8, 2048, 512, "786432")
    said, counted = peaks.planned(case, tmp_path, f"model.offload={offload}"), peaks.counted(case, copied=True, offload=offload)
    for place in (HOST, DEVICE):
        sizes = {stage: (said[stage][place], counted[stage][place]) for stage in peaks.STAGES}
        assert all(size == found == 0 or 0.8 * found < size < 1.2 * found for size, found in sizes.values()), (place, sizes)


@pytest.mark.parametrize(
    ("name", "own", "stages"),
    [
        ("SparseGPT", ("method.num_levels=4",), ("database",)),
        ("corrected, refined", ("method.levels=[4,3,2]",), ("database", "search", "refine")),
        ("corrected, refined", ("method.levels=[4,3,2]", "refine.scale_epochs=1"), ("database", "search", "refine")),
    ],
)
def test_of_levels_of_other_methods(
    name: str, own: tuple[str, ...], stages: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVOPRESS_CACHE", str(tmp_path / "cache"))
    method = (*peaks.METHODS[name], *own, "level_db.batch_tokens=512")
    case = peaks.Case("small", SMALL, "float32", 128, 1024, 2, 1024, 512, "1572864", method, stages, blocks=1)
    near(*peaks.counted_in_run(case, tmp_path))


def test_a_refinement_has_the_largest_block_beside_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVOPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("evopress.stages.refine_needs.part_bytes", lambda blocks, units, *_, **__: 2**30 * (1 + units[0].block))

    def said(cache: int) -> int:
        case = peaks.Case("small", SMALL, "float32", 128, 1024, 2, 1024, 512, str(cache), measured=("database", "search", "refine"))
        (folder := tmp_path / f"{cache} kept").mkdir()
        return peaks.planned(case, folder)["refine"][HOST]

    block, least = 4 * (4 * 128 * 128 + 3 * 128 * 384), said(0)
    assert 0 < least - 2 * 2**30 < 2**24
    assert said(2 * block) - least == block, "those of one block are in place in any case"


def test_of_a_search_from_random_mixes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target is between two levels: all the mixes are there at once, more than any generation has."""
    monkeypatch.setenv("EVOPRESS_CACHE", str(tmp_path / "cache"))
    method = ("+method=quant", "bits=2.5", "method.recipe=paper", "method.levels=[4,3,2]", "search.initial_tokens=1024")
    stages = ("database", "search")
    near(*peaks.counted_in_run(peaks.Case("small", SMALL, "float32", 128, 1024, 2, 1024, 512, "1572864", method, stages), tmp_path))


def test_of_experts(tmp_path: Path) -> None:
    """All tokens go to both; levels of them are copied together, and apart again, for an export."""
    model = AutoModelForCausalLM.from_config(peaks.Case("small", {**SMALL, "num_local_experts": 2}, "float32", blocks=1).config)
    blocks = BlockModel(model.requires_grad_(False), find_family(model.config.to_dict()))
    slots = [slot for name, slot in blocks.slots(0).items() if ".experts." in name]
    with Alive() as alive:
        for slot in slots:
            slot.put(slot.weight.clone())
        hidden = torch.rand(2, 128, 128)
        blocks.prepare(128)
        alive.begin()
        before = alive.peak[BOTH]
        blocks.run(0, hidden)
        near({"forward": blocks.forward_bytes(256, 256)}, {"forward": alive.peak[BOTH] - before})
        alive.begin()
        with gathered(model):
            model.save_pretrained(tmp_path)
        near(
            {"export": copied_for_export(model, levels=True, kept=1.0, fewer=False)},
            {"export": alive.peak[BOTH] - before},
        )


def test_what_is_alive_is_counted_where_it_lies() -> None:
    with Alive(shapes=True) as alive:
        first = torch.zeros(1000)
        there = first.to("meta")
        both = torch.cat([there, there])
        assert (alive.now[HOST], alive.now[DEVICE]) == (4000, 12_000)
        del there, both
        assert alive.now[DEVICE] == 0 and alive.peak == {HOST: 4000, DEVICE: 12_000, BOTH: 16_000}
        assert bool(first.isfinite().all()) and first.sum().tolist() == 1.0


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_attention_that_holds_its_scores(model_type: str, dtype: torch.dtype) -> None:
    sizes = {"max_position_embeddings": 2048, "head_dim": 16, "num_attention_heads": 8, "num_key_value_heads": 4}
    model = any_model(model_type, hidden_size=128, **sizes).to(dtype)
    blocks = BlockModel(model, find_family(model.config.to_dict()))
    assert (model.config._attn_implementation == "eager") == (model_type != "llama")
    with Alive() as alive, torch.no_grad():
        hidden = torch.rand(1, 512, 128).to(dtype)
        blocks.prepare(512)
        alive.begin()
        before = alive.peak[BOTH]
        blocks.run(0, hidden)
        taken = alive.peak[BOTH] - before
    assert 0.9 * taken < blocks.forward_bytes(512, 512) < 2.5 * taken
