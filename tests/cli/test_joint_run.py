"""A run of method joint, and of method quant under a size, from the command to the folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evopress.models.tiny import byte_tokenizer
from experiments.tiny_any import any_model


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in read(folder / "result.json")["rows"]}


@pytest.mark.parametrize("arguments", [("size=4bpw",), ("size=40kB", "limits=[{currency: modules, total: 3}]")])
def test_a_joint_run_ends_within_its_limits(evopress: Callable[..., Any], tmp_path: Path, arguments: tuple[str, ...]) -> None:
    outcome = evopress("+method=joint", "+debug=tiny", "hydra.run.dir=run", *arguments)
    assert outcome.code == 0, outcome.text
    found, genome = rows(tmp_path / "run"), read(tmp_path / "run" / "genome.json")
    assert genome["spent"] <= genome["budget"] and genome["currency"] == "bytes"
    size = 40_000 if len(arguments) > 1 else 4 * found["dense"]["bytes"] / 32  # float32
    assert found["evopress"]["bytes"] <= size
    kept = sum(unit["label"] == "keep" for unit in genome["units"])
    assert found["evopress"]["modules_dropped"] == 4 - kept
    if len(arguments) > 1:
        assert kept <= 3
    kinds = {unit["name"].rsplit(".", 1)[-1] for unit in genome["units"]}
    assert {"attention", "mlp", "q_proj", "embed_tokens"} <= kinds
    assert (tmp_path / "run" / "figures" / "level_heatmap.png").is_file()
    assert (tmp_path / "run" / "checkpoint" / "config.json").is_file()
    again = evopress(f"resume={tmp_path / 'run'}", "stages=[evaluate,report]")
    assert again.code == 0, again.text
    assert rows(tmp_path / "run")["evopress"]["kl"] == found["evopress"]["kl"]


def test_quant_takes_a_size_too(evopress: Callable[..., Any], tmp_path: Path) -> None:
    outcome = evopress("+method=quant", "size=78kB", "+debug=tiny", "hydra.run.dir=run", "search.exchange=fit")
    assert outcome.code == 0, outcome.text
    assert rows(tmp_path / "run")["evopress"]["bytes"] <= 78_000


def test_what_cannot_be_met_is_one_sentence(evopress: Callable[..., Any], tmp_path: Path) -> None:
    outcome = evopress("+method=quant", "size=1kB", "+debug=tiny", "hydra.run.dir=run")
    assert outcome.code == 1 and "size=1kB is too small" in outcome.text and "Traceback" not in outcome.text
    limits = ("search/strategy=evolution", "limits=[{currency: bytes, total: 90kB}]")
    outcome = evopress("+method=quant", "bits=3.5", "+debug=tiny", "hydra.run.dir=other", *limits)
    assert outcome.code == 1 and "search.exchange=fit" in outcome.text and "Traceback" not in outcome.text


@pytest.mark.parametrize(
    ("architecture", "sentence"),
    [
        ("lfm2", ""),
        ("falcon_h1", "needs one mixer and one MLP in each block, which falcon_h1 does not have: use search/strategy=evo"),
    ],
)
def test_hybrids_are_searched_or_refused_before_their_levels_are_built(
    evopress: Callable[..., Any], tmp_path: Path, architecture: str, sentence: str
) -> None:
    """Blocks of convolutions and of attention have gates each; attention and mamba side by side have none."""
    any_model(architecture).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    model = (f"model.path={tmp_path / 'model'}", "model.name=hybrid", "model.builtin=null", "stages=[database,search]")
    outcome = evopress("+method=joint", "+debug=tiny", "size=5bpw", "hydra.run.dir=run", *model)
    assert outcome.code == bool(sentence), outcome.text
    assert sentence in outcome.text and "Traceback" not in outcome.text
    assert ("level database" in outcome.text) is not bool(sentence)
