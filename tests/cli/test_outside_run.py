"""A run whose units are all weights of the model, embedding and head among them, from its command to its folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from evopress.data.python_docs import PythonDocs
from evopress.data.tokens import token_sequences
from evopress.levels.store import LevelDatabase
from evopress.models.tiny import make_tiny

WHOLE = ("method.include=[blocks,head,embedding]", "bits=2.5", "search.exchange=any", "search.starts=[dp]")


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def whole(request: Any, invoked: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run, with the folder of its model."""
    root = tmp_path_factory.mktemp("whole")
    model = make_tiny(root / "model", tied=request.param)
    outcome = invoked(*WHOLE, f"model.path={model}", f"hydra.run.dir={root / 'run'}", cwd=root)
    assert outcome.code == 0, outcome.text
    return root / "run", model, request.param, outcome


def test_both_averages_and_bytes_are_of_all_weights(whole: Any) -> None:
    folder, model, tied, outcome = whole
    weights = load_file(model / "model.safetensors")
    matrices = sum(weight.numel() for weight in weights.values() if weight.ndim == 2)
    rest = sum(weight.numel() for weight in weights.values() if weight.ndim == 1)
    database = LevelDatabase.open(Path(read(folder / "result.json")["database"]["path"]))
    assert database.space.size == matrices
    assert len(database.space) == 14 + (1 if tied else 2)
    rows = {row["name"]: row for row in read(folder / "result.json")["rows"]}
    assert rows["dense"]["bytes"] == 4 * (matrices + rest)
    found, genome = rows["evopress"], read(folder / "genome.json")
    levels = [unit["level"] for unit in genome["units"]]
    assert found["bits_per_weight"] == database.space.cost(levels) / matrices <= 2.5
    assert found["bytes"] == 4 * rest + -(-database.space.stored_bits(levels) // 8)
    assert "2 of 2 blocks, " + ("embedding" if tied else "head, embedding") in outcome.text


def test_the_checkpoint_holds_the_levels_and_gives_the_reported_perplexity(whole: Any) -> None:
    folder, _, tied, _ = whole
    genome, weights = read(folder / "genome.json"), load_file(folder / "checkpoint" / "model.safetensors")
    database = LevelDatabase.open(Path(read(folder / "result.json")["database"]["path"]))
    for i, unit in enumerate(genome["units"]):
        assert torch.equal(weights[f"{unit['name']}.weight"], database.read(i, unit["level"]).decode())
    assert ("lm_head.weight" in weights) != tied
    names = [line.split(":")[0] for line in (folder / "genome.txt").read_text().splitlines()]
    assert names[14:] == (["model.embed_tokens"] if tied else ["lm_head", "model.embed_tokens"])
    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoint", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "checkpoint")
    ids = token_sequences(PythonDocs(), "evaluation", tokenizer, sequence_length=64, num_tokens=1024)
    with torch.no_grad():
        logq = torch.log_softmax(model(ids, use_cache=False).logits[:, :-1].double(), -1)
    nll = -logq.gather(-1, ids[:, 1:, None]).mean()
    (perplexity,) = next(row for row in read(folder / "result.json")["rows"] if row["name"] == "evopress")["perplexity"].values()
    assert perplexity == pytest.approx(float(nll.exp()), rel=1e-4)


def test_figures_and_page_know_what_lies_outside(whole: Any) -> None:
    folder, _, tied, _ = whole
    assert {path.stem for path in (folder / "figures").glob("*.png")} >= {"level_heatmap", "level_profile"}
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert f"2 transformer blocks{'' if tied else ' and the head'} and the embedding of" in page


def test_one_that_cannot_trade_is_named(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", tied=True)
    outcome = tiny("method.include=[blocks,embedding]", "dry_run=true", f"model.path={model}")
    assert outcome.code == 0, outcome.text
    assert "no other unit has the size of model.embed_tokens" in outcome.text
