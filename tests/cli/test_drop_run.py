"""A run of depth pruning from its command to its folder: baselines, caches, the shorter checkpoint, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evopress.data.python_docs import PythonDocs
from evopress.data.tokens import token_sequences
from evopress.models.tiny import make_tiny

RANKED = ["shortgpt", "sliding_window", "weight_subcloning", "shortened_llama", "shortened_llama_kl", "l2", "l2_normalized"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny model with six blocks."""
    return make_tiny(tmp_path_factory.mktemp("model") / "six", num_blocks=6)


@pytest.fixture
def drop(evopress: Callable[..., Any], model: Path) -> Callable[..., Any]:
    """Run depth pruning on it."""
    return lambda *arguments: evopress(
        "+method=drop", "sparsity=0.34", "+debug=tiny", f"model.path={model}", "model.separator=null", *arguments
    )


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in read(folder / "result.json")["rows"]}


def test_a_run_compares_all_block_scores_and_the_search(
    drop: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[list[str]] = []
    monkeypatch.setattr("evopress.stages.report.dropped_modules_figure", lambda dropped, *_: shown.append(list(dropped)) or [])
    outcome = drop("hydra.run.dir=run", "baselines.names=[" + ",".join([*RANKED, "best_of_random", "exhaustive"]) + "]")
    assert outcome.code == 0, outcome.text
    folder = tmp_path / "run"
    found = rows(folder)
    assert list(found) == ["dense", "best_of_4", *RANKED, "exhaustive", "evopress"]
    assert {row["modules_dropped"] for name, row in found.items() if name != "dense"} == {4}
    assert found["dense"]["modules_dropped"] == 0 and found["dense"]["kl"] == 0.0
    result, genome = read(folder / "result.json"), read(folder / "genome.json")
    database = Path(result["database"]["path"])
    assert [path.name for path in database.iterdir() if path.suffix == ".safetensors"] == []  # no weights are stored
    labels = [unit["label"] for unit in genome["units"]]
    assert labels.count("drop") == 4 and genome["cost"] == genome["budget"] == 8
    assert [unit["name"].rsplit(".", 1)[1] for unit in genome["units"] if unit["label"] == "drop"].count("mlp") == 2
    baselines = read(folder / "baselines.json")
    assert set(baselines["orders"]) == set(RANKED) - {"sliding_window"}
    assert all(sorted(order) == list(range(6)) for order in baselines["orders"].values())
    for name in set(RANKED) - {"sliding_window"}:  # whole blocks, the first of the order
        gone = {i // 2 for i, level in enumerate(baselines["genomes"][name]) if level}
        assert gone == set(baselines["orders"][name][:2])
    window = sorted(i for i, level in enumerate(baselines["genomes"]["sliding_window"]) if level)
    assert window == list(range(window[0], window[0] + 4)) and window[0] % 2 == 0
    record = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["generation"] == 3 and record["cost"] == 8
    assert (folder / "report.html").is_file() and (folder / "figures" / "level_heatmap.png").is_file()
    assert {"ShortGPT", "best of 4", "EvoPress"} <= set(shown[0]) and "shortgpt" not in shown[0]


def test_the_exhaustive_optimum_is_nowhere_beaten_on_its_own_text(drop: Callable[..., Any], tmp_path: Path) -> None:
    """15 x 15 genomes, each on the whole search text; a search on the same tokens cannot find a better one."""
    whole = ("search.tokens=[2048]", "search.survivors=[1]", "search.initial_tokens=2048", "search.generations=6")
    outcome = drop("hydra.run.dir=run", "baselines.names=[exhaustive]", *whole)
    assert outcome.code == 0, outcome.text
    (path,) = Path(read(tmp_path / "run" / "result.json")["database"]["path"]).glob("exhaustive-*.jsonl")
    batches = [json.loads(line) for line in path.read_text().splitlines()]
    fitness = {g: f for batch in batches for g, f in zip(batch["genomes"], batch["fitnesses"], strict=True)}
    assert len(fitness) == math.comb(6, 2) ** 2
    best = "".join(map(str, read(tmp_path / "run" / "baselines.json")["genomes"]["exhaustive"]))
    assert fitness[best] == min(fitness.values())
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        genome = "".join(map(str, record["genome"]))
        assert record["fitness"] == pytest.approx(fitness[genome], rel=1e-5)
    assert all(batch.pop("seconds") > 0 for batch in batches)
    kept = [json.loads(line) | {"seconds": 1000} for line in path.read_text().splitlines()[:2]]
    path.write_text("".join(json.dumps(batch) + "\n" for batch in kept))  # as if it had been cut off
    again = drop("hydra.run.dir=again", "baselines.names=[exhaustive]", "stages=[database,baselines]")
    assert again.code == 0 and "128 of them measured already" in again.text
    first, second = (read(tmp_path / name / "baselines.json") for name in ("run", "again"))
    assert first["genomes"] == second["genomes"]
    assert first["spent"]["exhaustive"]["tokens"] == second["spent"]["exhaustive"]["tokens"] == 15 * 15 * 2048
    assert second["spent"]["exhaustive"]["seconds"] > 2000  # what was measured before took its time, too
    after = [json.loads(line) for line in path.read_text().splitlines()]
    assert [batch | {"seconds": 0} for batch in after] == [batch | {"schema": 1, "seconds": 0} for batch in batches]


def test_scores_are_measured_once(drop: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = "stages=[database,baselines]"
    assert drop("hydra.run.dir=first", stages).code == 0
    monkeypatch.setattr("evopress.baselines.block_importance.measure_spans", lambda *a, **k: pytest.fail("measured again"))
    monkeypatch.setattr("evopress.stages.baselines.measure_held_out", lambda *a, **k: pytest.fail("measured again"))
    assert drop("hydra.run.dir=second", stages).code == 0
    others = "baselines.names=[" + ",".join(name for name in RANKED if name != "sliding_window") + "]"
    assert drop("hydra.run.dir=third", stages, "sparsity=0.5", others).code == 0  # another target has other windows only
    first, second = (read(tmp_path / name / "baselines.json") for name in ("first", "second"))
    for each in (first, second):
        each["spent"] = {name: told["tokens"] for name, told in each["spent"].items()}  # the second took its own time
        del each["digest"]
    assert first == second
    (path,) = Path(read(tmp_path / "first" / "result.json")["database"]["path"]).glob("scores-*.json")
    path.write_text("{")
    monkeypatch.undo()
    outcome = drop("hydra.run.dir=fourth", stages)
    assert outcome.code == 0 and "measured again" in outcome.text


@pytest.mark.parametrize(("granularity", "blocks"), [("block", 4), ("pair", 4), ("module", None)])
def test_the_checkpoint_has_the_perplexity_that_was_reported(
    drop: Callable[..., Any], tmp_path: Path, granularity: str, blocks: int | None
) -> None:
    outcome = drop("hydra.run.dir=run", f"method.granularity={granularity}", "stages=[database,search,evaluate,export]")
    assert outcome.code == 0, outcome.text
    checkpoint = tmp_path / "run" / "checkpoint"
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    if blocks is not None:
        assert loaded.config.num_hidden_layers == blocks and len(loaded.model.layers) == blocks
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = token_sequences(
        PythonDocs(), "evaluation", tokenizer, sequence_length=64, num_tokens=1024, cache_dir=tmp_path, separator=None
    )
    with torch.no_grad():
        logits = loaded(input_ids=ids).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))
    assert math.exp(loss) == pytest.approx(rows(tmp_path / "run")["evopress"]["perplexity"]["python_docs"], rel=1e-4)
    out = loaded.generate(ids[:1, :8], max_new_tokens=5, do_sample=False, use_cache=True)
    assert torch.equal(out, loaded.generate(ids[:1, :8], max_new_tokens=5, do_sample=False, use_cache=False))


REFUSED = {
    "nothing to drop": (["sparsity=0.1"], ["sparsity=0.1", "0 of 6 blocks"]),
    "everything": (["sparsity=1"], ["sparsity=1 "]),
    "odd pairs": (["method.granularity=pair", "sparsity=0.5"], ["3 of 6 blocks", "two at a time"]),
    "too few left": (["method.exclude=[0,1,2,3,4]"], ["leaves 1 attention", "drops 2"]),
    "one genome left": (["method.exclude=[0,1,2,3]"], ["leaves 2 attention units and 2 mlp units to drop", "drops all of them"]),
    "a name that does not exist": (["method.exclude=[model.layers.9.mlp]"], ["'model.layers.9.mlp'"]),
    "a baseline of another method": (["baselines.names=[dp]"], ["'dp'", "method drop", "shortgpt"]),
    "a bound in levels": (["search.max_level=1"], ["search.max_level=1"]),
    "tokens for scores": (["baselines.importance_tokens=4096"], ["baselines.importance_tokens=4096", "1024"]),
    "tokens for the exhaustive search": (
        ["baselines.names=[exhaustive]", "baselines.exhaustive_tokens=4096"],
        ["baselines.exhaustive_tokens", "4096"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_sentence_before_any_model_is_loaded(
    case: str, drop: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "evopress.models.opening.load_pretrained", lambda *a, **k: pytest.fail("a model was loaded before the error")
    )
    arguments, parts = REFUSED[case]
    outcome = drop("hydra.run.dir=run", *arguments)
    assert outcome.code == 1 and "Traceback" not in outcome.text, outcome.text
    (sentence,) = outcome.errors
    for part in parts:
        assert part in sentence, sentence


def test_an_exhaustive_search_that_is_too_large_is_refused_with_the_count(drop: Callable[..., Any]) -> None:
    outcome = drop("hydra.run.dir=run", "baselines.names=[exhaustive]", "baselines.exhaustive_limit=100")
    assert outcome.code == 1
    (sentence,) = outcome.errors
    assert "225 genomes" in sentence and "baselines.exhaustive_limit=100" in sentence


def test_baselines_of_whole_blocks_need_enough_whole_blocks(drop: Callable[..., Any]) -> None:
    stuck = [*(f"model.layers.{i}.mlp" for i in range(3)), *(f"model.layers.{i}.attention" for i in (3, 4))]
    exclude = f"method.exclude=[{','.join(stuck)}]"
    outcome = drop("hydra.run.dir=run", exclude, "baselines.names=[shortgpt]")
    assert outcome.code == 1
    (sentence,) = outcome.errors
    assert "leaves 1 whole blocks" in sentence and "shortgpt" in sentence
