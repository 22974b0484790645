"""A mixture of experts from the command to the report, with levels per expert and per block of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from evopress.models.tiny import byte_tokenizer
from evopress.reporting.tables import markdown_table
from experiments.tiny_any import any_model

LEVELS = (
    "model.dtype=float32",
    "method.levels=[4,3,2]",
    "method.propagate_bits=null",
    "model.sequence_length=64",
    "model.group_size=16",
)

STAGES = "stages=[database,baselines,search,evaluate,export]"


@pytest.fixture(params=["qwen3_moe", "gpt_oss"])
def folder(request: Any, tmp_path: Path) -> Path:
    """A checkpoint of a tiny model with four experts in each of two blocks, of which a token is sent to two."""
    model_type = request.param
    layers = {"layer_types": ["sliding_attention", "full_attention"]} if model_type == "gpt_oss" else {}
    any_model(model_type, num_hidden_layers=2, **layers).save_pretrained(tmp_path / model_type)
    byte_tokenizer().save_pretrained(tmp_path / model_type)
    return tmp_path / model_type


def test_every_expert_has_levels_and_what_a_token_reads_is_counted(
    folder: Path, evopress: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # figures are drawn here
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    parameters = dict(model.named_parameters())
    experts = [p for name, p in parameters.items() if name.endswith(("gate_up_proj", "down_proj"))]
    others = [p for name, p in parameters.items() if name.endswith("_proj.weight")]
    weights = sum(p.numel() for p in experts) // 2 + sum(p.numel() for p in others)  # that a token reads
    most = weights * 5 * 9 // (8 * 10)  # nine tenths of what uniform 3 bits read: their scales and zeros are 2 more
    limit = f"limits=[{{currency: read, total: {most}}}]"
    arguments = ("+method=quant", "bits=3", "+debug=tiny", "model=local", f"model.path={folder}", *LEVELS, "hydra.run.dir=run")
    whole = folder.name == "gpt_oss"  # the figures of one of them will do
    outcome = evopress(*arguments, "search.exchange=fit", limit, *(() if whole else (STAGES,)))
    assert outcome.code == 0, outcome.text
    run = tmp_path / "run"
    units = json.loads((run / "genome.json").read_text(encoding="utf-8"))["units"]
    assert len([unit for unit in units if ".experts." in unit["name"]]) == 2 * 2 * 4
    read = 0.0
    for unit in units:
        parts, bits = unit["name"].split("."), int(unit["label"].split()[0])
        if ".experts." in unit["name"]:
            read += parameters[".".join([*parts[:-2], parts[-1]])][0].numel() * (bits + 2) / 8 / 2
        else:
            read += parameters[f"{unit['name']}.weight"].numel() * (bits + 2) / 8
    assert read <= most
    rest = sum(p.numel() for p in parameters.values()) - sum(p.numel() for p in (*experts, *others))
    rest -= model.get_input_embeddings().weight[1:].numel()  # untied: a token reads one row
    rows = {row["name"]: row for row in json.loads((run / "result.json").read_text(encoding="utf-8"))["rows"]}
    assert rows["evopress"]["bytes_read_per_token"] == pytest.approx(read + 4 * rest, abs=2)
    assert rows["dense"]["bytes_read_per_token"] == 4 * (weights + rest)
    assert " MB read per token " in markdown_table([*rows.values()])
    if whole:
        assert (run / "figures" / "experts.png").stat().st_size > 1000
        assert "All weights of an expert together" in (run / "report.html").read_text(encoding="utf-8")
    assert type(AutoModelForCausalLM.from_pretrained(run / "checkpoint")).__name__ == type(model).__name__


def test_the_experts_of_a_block_can_have_one_level(folder: Path, evopress: Callable[..., Any], tmp_path: Path) -> None:
    sparse = folder.name == "gpt_oss"  # one method for each of them
    method = ("+method=sparsity", "sparsity=0.5") if sparse else ("+method=quant", "bits=3")
    levels = [each for each in LEVELS if not sparse or each.startswith("model.")]
    arguments = (*method, "+debug=tiny", "model=local", f"model.path={folder}", *levels, "hydra.run.dir=run")
    outcome = evopress(*arguments, "method.experts=layer", "search.exchange=fit", STAGES)
    assert outcome.code == 0, outcome.text
    units = json.loads((tmp_path / "run" / "genome.json").read_text(encoding="utf-8"))["units"]
    levels: dict[tuple[str, str], list[int]] = {}
    for unit in units:
        if ".experts." in unit["name"]:
            block, part = unit["name"].split(".experts.")[0], unit["name"].rpartition(".")[2]
            levels.setdefault((block, part), []).append(unit["level"])
    assert len(levels) == 4 and all(len(each) == 4 and len(set(each)) == 1 for each in levels.values())
    assert len({each[0] for each in levels.values()}) > 1  # not all that there is to it
    assert (tmp_path / "run" / "checkpoint" / "model.safetensors").is_file()


def test_experts_are_dropped_from_the_command_to_a_smaller_checkpoint(
    folder: Path, evopress: Callable[..., Any], tmp_path: Path
) -> None:
    arguments = ("sparsity=0.25", "+debug=tiny", "model=local", f"model.path={folder}", "model.dtype=float32", "hydra.run.dir=run")
    uneven = ("method.balanced=false", "search.exchange=fit") if folder.name == "gpt_oss" else ()
    outcome = evopress("+method=experts", *arguments, "model.sequence_length=64", *uneven, STAGES)
    assert outcome.code == 0, outcome.text
    run = tmp_path / "run"
    units = json.loads((run / "genome.json").read_text(encoding="utf-8"))["units"]
    assert len(units) == 8 and sum(unit["label"] == "drop" for unit in units) == 2
    rows = {row["name"]: row for row in json.loads((run / "result.json").read_text(encoding="utf-8"))["rows"]}
    assert {"dense", "best_of_4", "least_routed", "evopress"} == set(rows)
    assert rows["evopress"]["sparsity"] == 0.25 and rows["evopress"]["experts_dropped"] == 2
    assert rows["evopress"]["bytes_read_per_token"] == rows["dense"]["bytes_read_per_token"]
    assert " experts dropped " in markdown_table([*rows.values()])
    written = AutoModelForCausalLM.from_pretrained(run / "checkpoint", dtype=torch.float32)
    if not uneven:
        assert sum(4 * parameter.numel() for parameter in written.parameters()) == rows["evopress"]["bytes"]


REFUSED_EXPERTS = {
    "guided": (("search/strategy=guided",), "an expert that receives no tokens has no gradient: use search/strategy=evolution"),
    "uneven": (("method.balanced=false", "search.exchange=fit"), "its config has one number of experts for all blocks"),
    "packed": (
        ("export=[compressed_tensors]",),
        "export=[compressed_tensors] is not written for this model: checkpoints of",
    ),
}


def test_what_experts_cannot_be_is_refused_before_anything_is_built(evopress: Callable[..., Any], tmp_path: Path) -> None:
    any_model("qwen3_moe", num_hidden_layers=2).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    model = ("model=local", "model.path=model", "model.sequence_length=64")
    arguments = ("+method=experts", "sparsity=0.25", "+debug=tiny", *model, "hydra.run.dir=run")
    for further, sentence in REFUSED_EXPERTS.values():
        outcome = evopress(*arguments, *further)
        assert outcome.code == 1 and "Traceback" not in outcome.text, outcome.text
        (said,) = outcome.errors
        assert sentence in said
