"""`+method=gguf`: levels that are types of GGUF, from the database to the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from evopress.compress.gguf_types import GGUF_TYPES
from evopress.errors import EvoPressError
from evopress.methods.quant import Quantization
from evopress.settings import QuantSettings


def test_a_guided_run_by_llama_cpp_s_rules_ends_with_a_file_of_the_bits_that_the_table_says(
    evopress: Callable[..., Any], tmp_path: Path
) -> None:
    few = ("method.levels=[Q5_0,Q4_1,Q4_0]", "baselines.names=[uniform]", "stages=[database,baselines,search,evaluate,export]")
    by = ("search/strategy=guided", "engine=llama_cpp")
    outcome = evopress("+method=gguf", "bits=4.9", "+debug=tiny", "export=[gguf]", "hydra.run.dir=run", *few, *by)
    assert outcome.code == 0, outcome.text
    rows = {row["name"]: row for row in json.loads((tmp_path / "run" / "result.json").read_text())["rows"]}
    assert rows["uniform_Q4_1"]["bits_per_weight"] == 5.0 and rows["uniform_Q4_0"]["bits_per_weight"] == 4.5
    genome = json.loads((tmp_path / "run" / "genome.json").read_text())
    path = tmp_path / "run" / "exports" / "gguf" / "model.gguf"
    assert rows["evopress"]["exports"] == {"gguf": {"bytes": path.stat().st_size}}
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    held = [tensors[name] for name in tensors if name.startswith("blk.") and "norm" not in name]
    assert sorted(tensor.tensor_type.name for tensor in held) == sorted(unit["label"] for unit in genome["units"])
    assert 8 * sum(tensor.n_bytes for tensor in held) == genome["cost"] <= genome["budget"]
    bits = 8 * sum(tensor.n_bytes for tensor in held) / sum(tensor.n_elements for tensor in held)
    assert rows["evopress"]["bits_per_weight"] == rows["evopress"]["bits_per_weight_with_metadata"] == bits <= 4.9


def test_other_formats_refuse_types_before_anything_is_built(evopress: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evopress.databases.ensure_database", lambda *a, **k: pytest.fail("levels were built"))
    outcome = evopress("+method=gguf", "bits=5.5", "+debug=tiny", "hydra.run.dir=run", "export=[mlx]")
    sentence = "export=[mlx] cannot hold GGUF's types (model.layers.0.self_attn.q_proj at Q8_0): set method.grid"
    assert outcome.code == 1 and len(outcome.errors) == 1 and sentence in outcome.errors[0], outcome.text


def test_targets_are_compared_with_the_bits_that_types_take() -> None:
    settings = QuantSettings(grid="gguf", levels=["Q8_0", "Q2_K"], propagate_bits=None)
    Quantization(settings, 2.7).check(searching=True)
    for bits, sentence in ((8.6, "above the highest level .8.5 bits"), (2.6, "below the lowest level .2.625 bits")):
        with pytest.raises(EvoPressError, match=sentence):
            Quantization(settings, bits).check(searching=True)


def test_types_and_bit_widths_are_not_mixed() -> None:
    assert QuantSettings(grid="gguf", levels=list(GGUF_TYPES), propagate_bits=None).grid == "gguf"
    for wrong, sentence in (
        ({"grid": "gguf"}, r"method.levels has 6, expected names of GGUF's types such as \[Q6_K,Q4_K\]: \+method=gguf names them"),
        ({"grid": "integer"}, "method.grid"),
        ({"levels": ["Q4_K"]}, "method.levels has 'Q4_K', expected a bit width from 1 to 8 or dense"),
    ):
        with pytest.raises(EvoPressError, match=sentence):
            QuantSettings(**{"propagate_bits": None, **wrong})  # type: ignore[arg-type]
