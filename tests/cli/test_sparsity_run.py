"""A sparsity run from its command to its folder: exact counts everywhere, OWL's second database, Hessians that are reused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from evopress.compress.sparse import kept_at
from evopress.levels import build, compressing
from evopress.levels.store import LevelDatabase
from evopress.models.tiny import byte_tokenizer
from experiments.tiny_any import any_model

SEARCH = "stages=[database,search]"


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in read(folder / "result.json")["rows"]}


def database_of(folder: Path) -> LevelDatabase:
    return LevelDatabase.open(Path(read(folder / "result.json")["database"]["path"]))


def target(database: LevelDatabase, sparsity: float) -> int:
    """Return what uniform sparsity keeps."""
    return sum(kept_at(unit.size, sparsity) for unit in database.space.units)


def refused(outcome: Any, *parts: str) -> None:
    assert outcome.code == 1, outcome.text
    assert "Traceback" not in outcome.text
    (sentence,) = outcome.errors
    for part in parts:
        assert part in sentence, sentence


# Exact counts


def test_the_levels_of_allocators_are_not_expanded(evopress: Callable[..., Any], tmp_path: Path) -> None:
    """OWL's are the model's too, and no unit's that the search has."""
    asked = ("baselines.names=[uniform,owl]", "search/strategy=guided", "search.strategy.second_order_rounds=1")
    where = f"hydra.run.dir={tmp_path / 'run'}"
    outcome = evopress("+debug=tiny", "+method=sparsity", "sparsity=0.7", *asked, where, "stages=[database,baselines,search]")
    assert outcome.code == 0, outcome.text
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert any(record.get("details", {}).get("second_order") for record in records)


def test_a_run_compares_uniform_owl_and_the_search(finished_sparse: Any) -> None:
    found = rows(finished_sparse.folder)
    assert list(found) == ["dense", "uniform", "owl", "evopress"]
    assert found["dense"]["kl"] == 0.0 and found["dense"]["sparsity"] == 0.0
    assert all(found[name]["kl"] > 0 for name in ("uniform", "owl", "evopress"))
    records = [json.loads(line) for line in (finished_sparse.folder / "metrics.jsonl").read_text().splitlines()]
    assert (records[0]["fitness"], records[0]["tokens"]) == (None, 0)  # the target is a level: nothing to choose
    assert "best on calibration text" in finished_sparse.outcome.text
    assert "weights kept" in (finished_sparse.folder / "results.md").read_text(encoding="utf-8")


def test_all_rows_and_files_keep_exactly_as_many_weights(finished_sparse: Any) -> None:
    folder = finished_sparse.folder
    genome, database = read(folder / "genome.json"), database_of(folder)
    kept = target(database, 0.5)
    assert genome["budget"] == genome["cost"] == sum(unit["cost"] for unit in genome["units"]) == kept
    for name in ("uniform", "owl", "evopress"):
        assert rows(folder)[name]["weights_kept"] == kept
        assert rows(folder)[name]["sparsity"] == 1 - kept / database.space.size
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {record["cost"] for record in records} == {kept}

    weights = load_file(folder / "checkpoint" / "model.safetensors")
    counted = 0
    for i, unit in enumerate(genome["units"]):
        payload = database.read(i, unit["level"])
        weight = weights[f"{unit['name']}.weight"]
        assert int(payload.mask.sum()) == unit["cost"]
        assert torch.equal(weight, payload.decode())
        assert int((weight != 0).sum()) == unit["cost"]  # random weights: none that is kept is 0
        counted += int((weight != 0).sum())
    assert counted == kept
    provenance = read(folder / "checkpoint" / "evopress.json")
    assert provenance["weights_kept"] == kept


def test_owl_is_uniform_inside_a_block(finished_sparse: Any) -> None:
    stored, database = read(finished_sparse.folder / "baselines.json"), database_of(finished_sparse.folder)
    (name,) = stored["further"]
    owl = LevelDatabase.open(database.folder.with_name(name))
    shares: dict[int, list[float]] = {}
    total = 0
    for unit, own, level in zip(owl.space.units, database.space.units, stored["genomes"]["owl"], strict=True):
        kept = unit.levels[level - len(own.levels)].cost
        shares.setdefault(unit.block, []).append(kept / unit.size)
        total += kept
    assert total == target(database, 0.5)
    for share in shares.values():
        assert max(share) - min(share) < 2 / 512  # whole weights of the smallest unit
    assert max(map(max, shares.values())) - min(map(min, shares.values())) > 0.02


def test_owls_levels_are_made_as_the_databases_are(finished_sparse: Any) -> None:
    (name,) = read(finished_sparse.folder / "baselines.json")["further"]
    database = database_of(finished_sparse.folder)
    owl = LevelDatabase.open(database.folder.with_name(name)).manifest["recipe"]
    ours = database.manifest["recipe"]
    assert {key: owl[key] for key in ("model", "data", "propagate")} == {key: ours[key] for key in ("model", "data", "propagate")}
    assert {**owl["compressor"], "kept": None} == {
        **{key: value for key, value in ours["compressor"].items() if key not in ("sparsity", "step", "num_levels")},
        "kept": None,
    }


# Going on


def test_stages_alone_on_an_earlier_run(finished_sparse: Any, evopress: Callable[..., Any], tmp_path: Path) -> None:
    folder = shutil.copytree(finished_sparse.folder, tmp_path / "earlier")
    expected = rows(folder)
    (folder / "report.html").unlink()
    outcome = evopress("resume=earlier", "stages=[evaluate,report]")
    assert outcome.code == 0, outcome.text
    assert rows(folder) == expected
    assert (folder / "report.html").exists()
    assert "OWL: a grid" not in outcome.text


def test_owls_database_is_missed_by_name(finished_sparse: Any, evopress: Callable[..., Any], cache: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished_sparse.folder, tmp_path / "earlier")
    root = shutil.copytree(cache / "levels", tmp_path / "levels")
    (name,) = read(folder / "baselines.json")["further"]
    shutil.rmtree(root / "tiny" / name)
    refused(evopress("resume=earlier", "stages=[evaluate]", f"level_db.root={root}"), name, "baselines.json", "baselines again")


def test_a_genome_with_levels_that_do_not_exist(finished_sparse: Any, evopress: Callable[..., Any], tmp_path: Path) -> None:
    folder = shutil.copytree(finished_sparse.folder, tmp_path / "earlier")
    genome = read(folder / "genome.json")
    genome["units"][3]["level"] = 17  # 0 to 16 are there; OWL's come after them
    (folder / "genome.json").write_text(json.dumps(genome), encoding="utf-8")
    refused(evopress("resume=earlier", "stages=[evaluate]"), genome["units"][3]["name"], "level 17", "expected 0 to 16")


# Hessians


def test_another_sparsity_runs_no_block_for_its_levels(
    finished_sparse: Any, sparse: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compressing, "collect_hessians", lambda *a, **k: pytest.fail("Hessians were computed again"))
    monkeypatch.setattr(build, "propagate", lambda *a, **k: pytest.fail("activations were computed again"))
    outcome = sparse("sparsity=0.37", "stages=[database]")  # one that no other test builds in the shared cache
    assert outcome.code == 0, outcome.text
    database = database_of(tmp_path / "run")
    assert database.folder != database_of(finished_sparse.folder).folder
    assert read(tmp_path / "run" / "result.json")["database"]["reused"] is False
    assert database.manifest["recipe"]["compressor"]["sparsity"] == 0.37


def test_owl_computes_hessians_that_an_earlier_build_did_not_keep(sparse: Callable[..., Any], tmp_path: Path) -> None:
    root = f"level_db.root={tmp_path / 'levels'}"
    few = ("baselines.names=[uniform]", "level_db.keep_hessians=false")
    assert sparse(root, "stages=[database]", *few).code == 0
    assert not list((tmp_path / "levels").rglob("hessians-*"))
    outcome = sparse(root, "stages=[database,baselines]")
    assert outcome.code == 0, outcome.text
    assert "level database: reused" in outcome.text
    assert set(read(tmp_path / "run" / "baselines.json")["genomes"]) == {"uniform", "owl"}
    assert len(list((tmp_path / "levels").rglob("hessians-*/block-*.safetensors"))) == 2


# A target beside the levels' centre


def test_uniform_is_pruned_anew_where_the_target_is_not_the_centre(sparse: Callable[..., Any], tmp_path: Path) -> None:
    """Also head and embedding; it is exported as any baseline is, and no search can start from it."""
    own = ("method.centre=0.45", "baselines.names=[uniform]", "method.include=[blocks,head,embedding]", "evaluation.every=0")
    stages = "stages=[database,baselines,search,evaluate]"
    refused(sparse(*own, stages, "level_db.keep_hessians=false"), "baseline uniform needs stored Hessians", "keep_hessians=true")
    refused(sparse(*own, stages, "search.starts=[uniform]"), "search.starts has 'uniform'", "not searched: leave it out")
    assert not (tmp_path / "run" / "result.json").exists()
    outcome = sparse(*own, stages, "search.generations=1")
    assert outcome.code == 0, outcome.text
    folder = tmp_path / "run"
    kept, found = target(database_of(folder), 0.5), rows(folder)
    assert list(found) == ["dense", "uniform", "evopress"] and found["uniform"]["weights_kept"] == kept
    refused(sparse(*own, "stages=[search]", "search.starts=[uniform]"), "search.starts has 'uniform'", "not searched: leave it out")
    outcome = sparse(*own, "stages=[evaluate,export]", "genome=uniform")
    assert outcome.code == 0, outcome.text
    weights = load_file(folder / "genomes" / "uniform" / "checkpoint" / "model.safetensors")
    for unit in database_of(folder).space.units:
        if not unit.is_outside:
            assert int((weights[f"{unit.name}.weight"] != 0).sum()) == kept_at(unit.size, 0.5)


def test_owl_stands_beside_a_uniform_one_that_is_pruned_anew(sparse: Callable[..., Any], tmp_path: Path) -> None:
    outcome = sparse("method.centre=0.4", "stages=[database,baselines,evaluate]")
    assert outcome.code == 0, outcome.text
    kept, found = target(database_of(tmp_path / "run"), 0.5), rows(tmp_path / "run")
    assert [found[name]["weights_kept"] for name in ("uniform", "owl")] == [kept] * 2
    assert found["uniform"]["kl"] != found["owl"]["kl"]


# Choices


@pytest.mark.parametrize("compressor", ["wanda", "magnitude"])
def test_other_pruners(compressor: str, finished_sparse: Any, sparse: Callable[..., Any], tmp_path: Path) -> None:
    outcome = sparse(
        f"method.compressor={compressor}",
        "search.generations=1",
        "evaluation.every=0",
        "stages=[database,baselines,search,evaluate]",
    )
    assert outcome.code == 0, outcome.text
    folder = tmp_path / "run"
    database = database_of(folder)
    (name,) = read(folder / "baselines.json")["further"]
    for each in (database, LevelDatabase.open(database.folder.with_name(name))):
        assert each.manifest["recipe"]["compressor"]["compressor"] == compressor
    kept = target(database, 0.5)
    assert [rows(folder)[row]["weights_kept"] for row in ("uniform", "owl", "evopress")] == [kept] * 3
    errors = (sum(level[8] for level in each.errors) for each in (database_of(finished_sparse.folder), database))
    assert next(errors) < next(errors)  # SparseGPT's at the target are lower


def test_a_target_that_sizes_round_differently_starts_uniform(sparse: Callable[..., Any], tmp_path: Path) -> None:
    """0.7 of 512 weights is 69.9% of them, 0.7 of 1024 is 70.0%; both are the target."""
    outcome = sparse(
        "sparsity=0.7", "search.max_level=1", "search.max_total_deviation=4", "search.num_offspring=6", SEARCH, "evaluation.every=0"
    )
    assert outcome.code == 0, outcome.text
    database, genome = database_of(tmp_path / "run"), read(tmp_path / "run" / "genome.json")
    assert genome["cost"] == genome["budget"] == target(database, 0.7)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [unit.levels[level].key for unit, level in zip(database.space.units, records[0]["genome"], strict=True)] == ["0"] * 14
    keys = [int(unit.levels[entry["level"]].key) for unit, entry in zip(database.space.units, genome["units"], strict=True)]
    assert max(map(abs, keys)) <= 1 and sum(map(abs, keys)) <= 4
    assert (tmp_path / "run" / "genome.txt").read_text(encoding="utf-8").splitlines() == [
        f"{unit['name']}: {key}" for unit, key in zip(genome["units"], keys, strict=True)
    ]


def test_a_step_of_ones_own_and_other_baselines(sparse: Callable[..., Any], tmp_path: Path) -> None:
    outcome = sparse("method.step=100", "method.num_levels=2", "baselines.names=[uniform,dp]", "stages=[database,baselines]")
    assert outcome.code == 0, outcome.text
    database = database_of(tmp_path / "run")
    for unit in database.space.units:
        costs = [level.cost for level in unit.levels]
        assert costs == [unit.size // 2 + i * 100 for i in (2, 1, 0, -1, -2)]
    genomes = read(tmp_path / "run" / "baselines.json")["genomes"]
    assert set(genomes) == {"uniform", "dp"}
    assert database.space.cost(genomes["uniform"]) == database.space.cost(genomes["dp"]) == target(database, 0.5)
    assert genomes["dp"] != genomes["uniform"]


def test_owl_keeps_the_experts_of_a_block_together(evopress: Callable[..., Any], tmp_path: Path) -> None:
    any_model("mixtral").save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    model = (f"model.path={tmp_path / 'model'}", "model.name=mixtral", "model.builtin=null", "method.experts=layer")
    outcome = evopress("+method=sparsity", "+debug=tiny", "sparsity=0.5", "hydra.run.dir=run", *model)
    assert outcome.code == 0, outcome.text
    found = rows(tmp_path / "run")
    assert 0 <= found["uniform"]["weights_kept"] - found["owl"]["weights_kept"] < 8
