"""A run by an engine's rules: what is searched, refined, evaluated and exported is what the engine loads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evopress.models.tiny import byte_tokenizer
from experiments.tiny_any import any_model

GROUPS = "model.group_size=32"
EVEN = "method.levels=[6,4,2]"
"""Bits of which 16 rows, those of the tiny model's k and v, fill words."""


def test_a_run_by_vllm_s_rules(evopress: Callable[..., Any], tmp_path: Path) -> None:
    target = ("size=80kB", "search.exchange=fit", "search/strategy=guided")
    stages = "stages=[database,baselines,search,refine,evaluate,export]"
    few = (
        "evaluation.every=0",
        "engine=vllm",
        "export=[compressed_tensors]",
        stages,
        "baselines.names=[uniform,best_of_random,dp]",
    )
    outcome = evopress("+method=quant", "+debug=tiny", GROUPS, EVEN, "hydra.run.dir=run", *target, *few)
    assert outcome.code == 0, outcome.text
    run = tmp_path / "run"
    units = json.loads((run / "genome.json").read_text())["units"]
    levels = {unit["name"]: unit["label"] for unit in units}
    assert len(levels) == 14 and len(set(levels.values())) > 1
    for block in range(2):
        prefix = f"model.layers.{block}."
        assert len({levels[f"{prefix}self_attn.{part}_proj"] for part in "qkv"}) == 1
        assert len({levels[f"{prefix}mlp.{part}_proj"] for part in ("gate", "up")}) == 1
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {len(record["genome"]) for record in records} == {8}
    result = json.loads((run / "result.json").read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert {"best_of_4", "dp", "evopress", "evopress_refined"} <= set(rows)
    exported = run / "exports" / "compressed_tensors"
    weights = (exported / "model.safetensors").read_bytes()
    (row,) = [row for row in rows.values() if "exports" in row]
    assert row["exports"] == {"compressed_tensors": {"bytes": len(weights)}} and row["name"] == "evopress_refined"
    assert len(weights) - 8 - int.from_bytes(weights[:8], "little") == row["bytes"], (
        "the table's size is the file's, its header aside"
    )
    assert row["bytes"] <= 80_000
    config = json.loads((exported / "config.json").read_text())["quantization_config"]
    assert {name for group in config["config_groups"].values() for name in group["targets"]} == set(levels)
    again = evopress("resume=run", "stages=[export]", "export=[mlx]")
    assert again.code == 0 and (run / "exports" / "mlx" / "README.md").is_file(), again.text
    other = evopress("resume=run", "stages=[search]", "engine=none")
    assert other.code == 1 and "engine 'vllm' there, 'none' here" in other.errors[0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            [GROUPS, "export=[compressed_tensors]"],
            "q_proj and k_proj, v_proj at levels of their own: vLLM fuses q_proj, k_proj, v_proj into",
        ),
        (
            ["engine=vllm"],
            "engine=vllm cannot hold model.layers.0.self_attn.q_proj at 6 bits in groups of 16: vLLM has groups of 32",
        ),
        (
            [GROUPS, "engine=vllm"],
            "engine=vllm cannot hold model.layers.0.self_attn.k_proj at 5 bits in groups of 32, which has 16 rows: vLLM fuses",
        ),
    ],
)
def test_what_an_engine_cannot_hold_is_refused_before_anything_is_built(
    arguments: list[str], sentence: str, tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evopress.databases.ensure_database", lambda *a, **k: pytest.fail("levels were built"))
    outcome = tiny(*arguments)
    assert outcome.code == 1 and len(outcome.errors) == 1 and sentence in outcome.errors[0], outcome.text
    assert not (tmp_path / "run").exists()


SIZED = ("size=80kB", "search.exchange=fit")
LIMITED = ("bits=3", "search.exchange=fit", "limits=[{currency: bytes, total: 80kB}]")
JOINT = ("method=joint", "max_kl=0.1")


@pytest.mark.parametrize(
    ("target", "engine", "exporter", "option", "told"),
    [
        (
            SIZED,
            "mlx",
            "mlx",
            "scales=float32",
            "size=80kB: sizes count what the file of engine=mlx takes without export_options.mlx.",
        ),
        (LIMITED, "mlx", "mlx", "scales=float32", "limits with currency: bytes: sizes count"),
        (("budgets=[70kB,80kB]",), "vllm", "compressed_tensors", "dtype=bfloat16", "budgets=['70kB', '80kB']: sizes count"),
        (JOINT, "vllm", "compressed_tensors", "dtype=float16", "max_kl=0.1: sizes count"),
        (SIZED, "llama_cpp", "gguf", "dense=Q8_0", "without export_options.gguf.dense=Q8_0, which gives it other bits"),
        (SIZED, "llama_cpp", "gguf", "dense=float16", "without export_options.gguf.dense=float16, which gives it other bits"),
        (SIZED, "vllm", "compressed_tensors", "dtype=float32", None),  # the tiny model's own
        (("bits=3",), "mlx", "mlx", "scales=float32", None),
        (SIZED, "none", "mlx", "scales=float32", None),
    ],
)
def test_an_option_that_a_size_does_not_count_is_refused_before_the_search(
    target: tuple[str, ...], engine: str, exporter: str, option: str, told: str | None, evopress: Callable[..., Any]
) -> None:
    method = "gguf" if engine == "llama_cpp" else "quant"
    levels = () if method == "gguf" else (EVEN,)
    what = (f"engine={engine}", f"export=[dequantized,{exporter}]", f"+export_options.{exporter}.{option}", "dry_run=true")
    first, *others = target if target[0].startswith("method=") else (f"method={method}", *target)
    outcome = evopress(f"+{first}", "+debug=tiny", GROUPS, *others, *levels, *what)
    if told is None:
        assert outcome.code == 0, outcome.text
    else:
        assert outcome.code == 1 and len(outcome.errors) == 1 and told in outcome.errors[0], outcome.text


def test_a_file_that_is_larger_than_was_counted_is_told(evopress: Callable[..., Any], tmp_path: Path) -> None:
    """A wider option of a later command, another engine's format, and of neither the header, which is large in a tiny file."""
    few = ("evaluation.every=0", "engine=mlx", "export=[mlx]", "stages=[database,search,evaluate,export]")
    outcome = evopress("+method=quant", "+debug=tiny", GROUPS, EVEN, *SIZED, *few, "hydra.run.dir=run")
    assert outcome.code == 0, outcome.text
    larger = re.compile(r"(\w+) has ([\d.]+) MB of weights where ([\d.]+) were counted: (.*)")
    assert [found[3] for found in larger.findall(outcome.text)] == [
        "a file's header is not counted, which is large where weights are tiny; lower the size"
    ]
    outcome = evopress("resume=run", "stages=[export]", "export=[mlx,gguf]", "+export_options.mlx.scales=float32")
    assert outcome.code == 0, outcome.text
    assert {found[0]: found[3] for found in larger.findall(outcome.text)} == {
        "mlx": "export_options.mlx.scales=float32 is not counted; lower the size",
        "gguf": "engine=mlx does not count this format's bits; lower the size",
    }
    (row,) = (row for row in json.loads((tmp_path / "run" / "result.json").read_text())["rows"] if row["name"] == "evopress")
    assert row["exports"]["mlx"]["bytes"] > 1.05 * row["bytes"]


@pytest.mark.parametrize(
    ("model_type", "engine", "sentence"),
    [
        (
            "mixtral",
            "vllm",
            "export=[compressed_tensors] is not written for this model: checkpoints of mixtral have no model.layers.0.mlp.experts.",
        ),
        ("mixtral", "gptqmodel", "engine=gptqmodel is not written for experts"),
        ("opt", "mlx", "engine=mlx: export=[mlx] is not written for models of type opt: it knows"),
        (
            "phi3",
            "gptqmodel",
            "engine=gptqmodel: export=[gptq] cannot hold a model of type phi3: GPTQModel splits its gate_up_proj",
        ),
        ("stablelm", "vllm", "engine=vllm: export=[compressed_tensors] cannot hold a model of type stablelm: vLLM does not find"),
    ],
)
def test_a_search_for_a_file_that_is_not_written_does_not_begin(
    model_type: str, engine: str, sentence: str, evopress: Callable[..., Any], tmp_path: Path
) -> None:
    """Not even where that file is not exported yet."""
    any_model(model_type).save_pretrained(tmp_path / model_type)
    byte_tokenizer().save_pretrained(tmp_path / model_type)
    model = ("model=local", f"model.path={tmp_path / model_type}", GROUPS, "model.sequence_length=64")
    levels = ("+debug=tiny", EVEN)
    for targets in (("bits=4",), ("budgets=[3,4]",))[: 1 + (engine == "mlx")]:
        outcome = evopress("+method=quant", *targets, *levels, *model, f"engine={engine}", "dry_run=true")
        assert outcome.code == 1 and sentence in outcome.errors[0] and outcome.errors[0].endswith("engine=none"), outcome.text


@pytest.mark.parametrize("kept", [2, 3])
def test_zeros_of_modules_that_are_dropped_alone_are_told_where_they_were_not_counted(
    kept: int, evopress: Callable[..., Any], tmp_path: Path
) -> None:
    """Of three that are kept, one is alone in its block; of two there may be none."""
    limits = f"limits=[{{currency: modules, total: {kept}}}]"
    stages = "stages=[database,search,evaluate,export]"
    few = ("evaluation.every=0", "engine=vllm", "export=[compressed_tensors]", stages, "method.include=[blocks]")
    outcome = evopress("+method=joint", "+debug=tiny", GROUPS, EVEN, "size=75kB", "hydra.run.dir=run", limits, *few)
    assert outcome.code == 0, outcome.text
    (row,) = (row for row in json.loads((tmp_path / "run" / "result.json").read_text())["rows"] if row["name"] == "evopress")
    weights = (tmp_path / "run" / "exports" / "compressed_tensors" / "model.safetensors").stat().st_size
    assert row["modules_dropped"] >= 4 - kept
    told = "modules dropped alone are counted as nothing, but stored as zeros" in outcome.text
    assert told == (weights > 1.05 * row["bytes"])
