"""The stage refine in a run: both rows, the export, what it leaves alone, and where there is nothing to do."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evopress.data.python_docs import PythonDocs
from evopress.data.tokens import token_sequences, tokens_digest
from evopress.finished import settings_digest, stages_done
from evopress.settings import (
    DataSettings,
    LevelDatabaseSettings,
    PathsSettings,
    QuantSettings,
    RefineSettings,
    RunSettings,
    ScaleSettings,
)
from evopress.stages.refine import made_otherwise

ON = "scale.refine=true"
WITH = "stages=[database,baselines,search,refine,evaluate,export]"
AFTER = "stages=[refine,evaluate,export]"


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of a run by name, without what only an export adds, and what the clock says."""
    found, others = {row["name"]: row for row in read(folder / "result.json")["rows"]}, ("checkpoint_bytes", "seconds_spent")
    return {name: {key: value for key, value in row.items() if key not in others} for name, row in found.items()}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def kl_of_checkpoint(folder: Path, cache: Path) -> tuple[float, float]:
    """Return a checkpoint's KL divergence from the dense model and its perplexity, by transformers alone."""
    ids = token_sequences(PythonDocs(), "evaluation", AutoTokenizer.from_pretrained(folder), sequence_length=64, num_tokens=1024)
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (folder, cache / "models" / "tiny-llama")]
    with torch.no_grad():
        logq, logp = (torch.log_softmax(model(ids).logits[:, :-1].float(), -1) for model in models)
    nll = torch.nn.functional.nll_loss(logq.flatten(0, 1), ids[:, 1:].flatten())
    return float((logp.exp() * (logp - logq)).sum(-1).mean()), math.exp(nll)


@pytest.fixture
def again(plain: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a run that finished without the stage."""
    return Path(shutil.copytree(plain("quant"), tmp_path / "run"))


def test_both_rows_are_reported_and_the_refined_one_is_exported(
    plain: Callable[..., Path], tiny: Callable[..., Any], cache: Path, tmp_path: Path
) -> None:
    database = Path(read(plain("quant") / "result.json")["database"]["path"])
    before = tree(database)
    outcome = tiny(ON, WITH)
    assert outcome.code == 0, outcome.text
    run = tmp_path / "run"
    found = rows(run)
    assert list(found)[-2:] == ["evopress", "evopress_refined"]
    assert found["evopress"] == rows(plain("quant"))["evopress"], "what is found does not depend on what follows"
    costs = ("bits_per_weight", "bits_per_weight_with_metadata", "bytes")
    assert [found["evopress_refined"][key] for key in costs] == [found["evopress"][key] for key in costs]
    assert found["evopress_refined"]["kl"] != found["evopress"]["kl"]
    kl, perplexity = kl_of_checkpoint(run / "checkpoint", cache)
    assert kl == pytest.approx(found["evopress_refined"]["kl"], rel=1e-3)
    assert perplexity == pytest.approx(found["evopress_refined"]["perplexity"]["python_docs"], rel=1e-4)

    (refined,) = (run / "refined").iterdir()
    manifest = read(refined / "manifest.json")
    provenance = read(run / "checkpoint" / "evopress.json")["refined"]
    assert "RUN_FOLDER" not in read(run / "checkpoint" / "evopress.json")["command"], "its own stages refine"
    summary = read(run / "result.json")["refine"]
    assert provenance["fingerprint"] == manifest["fingerprint"] == refined.name.rpartition("-")[2]
    assert summary["kept"] == provenance["kept"] == sum(step["kept"] for step in manifest["steps"]) > 0
    assert summary["kl_after"] < summary["kl_before"]
    assert (summary["blocks"], summary["tokens"]) == (2, 256)
    assert tree(database) == before, "the level database stays as it was"
    sizes = {row["name"]: row.get("checkpoint_bytes") for row in read(run / "result.json")["rows"]}
    assert [name for name, size in sizes.items() if size] == ["evopress_refined"]
    assert "256 tokens of held-back search text" in outcome.text
    assert read(run / "finished.json")["stages"][3] == "refine"


def test_what_decides_is_text_that_neither_search_nor_evaluation_has(tiny: Callable[..., Any], tmp_path: Path) -> None:
    from evopress.fitness.suffix import SuffixLoss
    from evopress.workspace import Workspace

    seen: dict[str, torch.Tensor] = {}
    with pytest.MonkeyPatch.context() as patch:
        original, made = SuffixLoss.__init__, Workspace.read_text

        def judging(self: Any, live: Any, genome: Any, sequences: torch.Tensor, **options: Any) -> None:
            seen["judged"] = sequences
            original(self, live, genome, sequences, **options)

        def reading(self: Workspace) -> None:
            made(self)
            seen["search"], seen["evaluation"] = self.search_tokens, next(iter(self.evaluation_data.values()))

        patch.setattr(SuffixLoss, "__init__", judging)
        patch.setattr(Workspace, "read_text", reading)
        assert tiny(ON, "stages=[database,search,refine]").code == 0
    assert seen["judged"].shape == (4, 64)
    assert seen["search"].shape == (32, 64)
    for other in ("search", "evaluation"):
        assert not {tuple(row) for row in seen["judged"].tolist()} & {tuple(row) for row in seen[other].tolist()}


def test_off_unless_asked_at_mini_and_on_above(plain: Callable[..., Path], tiny: Callable[..., Any]) -> None:
    assert not (plain("quant") / "refined").exists()
    assert "evopress_refined" not in rows(plain("quant"))
    assert "refine" not in read(plain("quant") / "result.json")
    for scale, stages in (("mini", False), ("small", True), ("paper", True)):
        shown = tiny(f"scale={scale}", "--cfg", "job", "--resolve").text
        assert ("- refine\n" in shown) is stages
        assert f"refine: {str(stages).lower()}" in shown


def test_a_finished_run_is_refined_later(again: Path, evopress: Callable[..., Any], cache: Path) -> None:
    before = rows(again)
    outcome = evopress(f"resume={again}", AFTER)
    assert outcome.code == 0, outcome.text
    after = rows(again)
    assert {name: row for name, row in after.items() if name != "evopress_refined"} == before
    assert kl_of_checkpoint(again / "checkpoint", cache)[0] == pytest.approx(after["evopress_refined"]["kl"], rel=1e-3)
    second_pass = " && python -m evopress resume=RUN_FOLDER 'stages=[refine,evaluate,export,report]'"
    assert read(again / "checkpoint" / "evopress.json")["command"].endswith(second_pass)
    assert read(again / "finished.json")["stages"] == ["database", "baselines", "search", "refine", "evaluate", "export"]
    bytes_before = tree(again / "refined")
    assert "done: 2 blocks" in evopress(f"resume={again}", AFTER, "dry_run=true").text
    took = read(again / "result.json")["refine"]["seconds"]
    assert evopress(f"resume={again}", "stages=[refine]").code == 0
    assert read(again / "result.json")["refine"]["seconds"] == took, "nothing was made anew"
    outcome = evopress(f"resume={again}", "stages=[evaluate,export]")  # what is refined stays so
    assert outcome.code == 0, outcome.text
    assert rows(again) == after
    assert tree(again / "refined") == bytes_before
    assert read(again / "finished.json")["stages"] == ["database", "baselines", "search", "refine", "evaluate", "export"]


def test_other_settings_make_it_again(again: Path, evopress: Callable[..., Any]) -> None:
    assert evopress(f"resume={again}", "stages=[refine]").code == 0
    (first,) = (again / "refined").iterdir()
    outcome = evopress(f"resume={again}", "stages=[refine,evaluate]", "refine.tokens=128")
    assert outcome.code == 0, outcome.text
    (second,) = (again / "refined").iterdir()
    assert second.name != first.name
    assert "it is made again" in outcome.text
    assert read(again / "result.json")["refine"]["tokens"] == 128


def test_a_report_has_no_row_of_what_is_made_again(again: Path, evopress: Callable[..., Any]) -> None:
    assert evopress(f"resume={again}", AFTER).code == 0
    assert "evopress_refined" in rows(again)
    other = ("refine.correction=0", "stages=[refine,report]")
    assert "done: 2 blocks" not in evopress(f"resume={again}", *other, "dry_run=true").text, "the plan knows"
    outcome = evopress(f"resume={again}", *other)
    assert outcome.code == 0, outcome.text
    assert "evopress_refined" not in rows(again) and "refined" not in (again / "results.md").read_text(encoding="utf-8")
    assert read(again / "result.json")["refine"]["kept"] is not None


def test_refined_levels_of_another_genome_are_left_out(again: Path, evopress: Callable[..., Any]) -> None:
    assert evopress(f"resume={again}", AFTER).code == 0
    genome = read(again / "genome.json")
    units = genome["units"]
    was, level = int(units[0]["label"][0]), 4 if units[0]["level"] == 3 else 3
    units[0] |= {"level": level, "label": f"{6 - level} bits", "cost": units[0]["cost"] // was * (6 - level)}
    genome["cost"] = sum(unit["cost"] for unit in units)
    (again / "genome.json").write_text(json.dumps(genome), encoding="utf-8")
    (again / "state.json").unlink()  # which says what the search found
    outcome = evopress(f"resume={again}", "stages=[evaluate,export]")
    assert outcome.code == 0, outcome.text
    assert "is of another genome or level database, so it is left out" in outcome.text
    assert "evopress_refined" not in rows(again)
    assert "refine" not in read(again / "result.json")
    told = read(again / "checkpoint" / "evopress.json")
    assert "refined" not in told and "refine" not in told["command"]


def test_damage_is_one_sentence_and_the_stage_mends_it(again: Path, evopress: Callable[..., Any]) -> None:
    assert evopress(f"resume={again}", AFTER).code == 0
    expected, whole = tree(again / "refined"), rows(again)
    path = next((again / "refined").glob("*/block-001.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    for stage in ("evaluate", "export"):
        outcome = evopress(f"resume={again}", f"stages=[{stage}]")
        assert outcome.code == 1
        (error,) = outcome.errors
        assert "block-001.safetensors is damaged" in error
        assert "run the stage refine again" in error
    outcome = evopress(f"resume={again}", AFTER)
    assert outcome.code == 0, outcome.text
    assert tree(again / "refined") == expected
    assert rows(again) == whole


def test_refined_levels_of_another_correction_are_left_out(again: Path, evopress: Callable[..., Any]) -> None:
    assert evopress(f"resume={again}", AFTER).code == 0
    outcome = evopress(f"resume={again}", "stages=[evaluate,export]", "refine.correction=0.25")
    assert outcome.code == 0, outcome.text
    assert re.search(r"was made with refine\.correction=\S+, so it is left out: ", outcome.text)
    assert "evopress_refined" not in rows(again) and "refined" not in read(again / "checkpoint" / "evopress.json")


def test_scales_are_learned_where_that_is_asked_for(again: Path, evopress: Callable[..., Any], cache: Path) -> None:
    assert evopress(f"resume={again}", AFTER).code == 0
    fitted, (walked,) = rows(again)["evopress_refined"], (again / "refined").iterdir()
    learned = ("refine.scale_epochs=2", "refine.scale_rate=0.01")
    assert "done: 2 blocks" not in evopress(f"resume={again}", AFTER, *learned, "dry_run=true").text
    outcome = evopress(f"resume={again}", AFTER, *learned)
    assert outcome.code == 0, outcome.text
    assert "learning scales of 14 units on 2048 tokens of search text, 2 times" in outcome.text
    assert "recompressing" not in outcome.text, "the walk is done"
    (folder,) = (again / "refined").iterdir()
    assert folder.name != walked.name and not (folder / "learning.safetensors").exists()
    told, row = read(again / "result.json")["refine"], rows(again)["evopress_refined"]
    assert (
        told["scales"]["kept"]
        and told["scales"]["after"] < told["scales"]["before"]
        and told["kl_after"] == told["scales"]["after"]
    )
    assert told["scales"]["tokens"] == 2 * 2048
    assert row["kl"] != fitted["kl"] and row["bytes"] == fitted["bytes"]
    assert kl_of_checkpoint(again / "checkpoint", cache)[0] == pytest.approx(row["kl"], rel=1e-3)
    assert "refine.scale_epochs=2" in read(again / "checkpoint" / "evopress.json")["command"]
    before = tree(again / "refined")
    (folder / "learning.safetensors").write_bytes(b"of a run that was killed between its last two writes")
    outcome = evopress(f"resume={again}", AFTER, *learned)
    assert outcome.code == 0 and "learning scales" not in outcome.text and tree(again / "refined") == before
    outcome = evopress(f"resume={again}", "stages=[evaluate,export]", "refine.scale_epochs=0")
    assert outcome.code == 0, outcome.text
    assert "was made with refine.scale_epochs=2 refine.scale_rate=0.01, so it is left out: " in outcome.text
    assert "evopress_refined" not in rows(again)


@pytest.mark.parametrize(
    ("scales", "told"),
    [
        (None, "refine.scale_epochs=0"),
        ({"epochs": 1, "rate": 0.002}, "refine.scale_epochs=1 refine.scale_rate=0.002"),
        ({"epochs": 2, "rate": 0.002, "text": "another"}, "scales that were learned on other text"),
    ],
)
def test_how_other_levels_were_made_is_told_by_settings(scales: dict[str, Any] | None, told: str) -> None:
    text = torch.zeros(2, 8, dtype=torch.int64)
    workspace: Any = SimpleNamespace(
        settings=SimpleNamespace(refine=RefineSettings(correction=0.0, scale_epochs=2, scale_rate=0.002)), search_tokens=text
    )
    assert made_otherwise(workspace, {"scales": scales}) == told
    assert made_otherwise(workspace, {"scales": {"epochs": 2, "rate": 0.002, "text": tokens_digest(text)}}) is None


def test_a_killed_learning_leaves_the_walk_done(again: Path, evopress: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    learned = ("stages=[refine,evaluate]", "refine.scale_epochs=1")

    def cut(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("evopress.fitness.scales.ScaleLearner.learn", cut)
        assert "resume with" in evopress(f"resume={again}", *learned).text
    assert evopress(f"resume={again}", "stages=[evaluate]", *learned[1:]).code == 0, (
        "levels whose scales were not learned are left out"
    )
    assert "evopress_refined" not in rows(again)
    monkeypatch.setattr("evopress.levels.refine.compress_units", cut)
    outcome = evopress(f"resume={again}", *learned)
    assert outcome.code == 0, outcome.text
    assert "evopress_refined" in rows(again) and len(list((again / "refined").iterdir())) == 1


def test_scales_that_are_worse_stay_as_they_were(tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from evopress.fitness.scales import ScaleLearner

    def worse(self: ScaleLearner, state: Path) -> None:
        for logarithms in self.levels.logarithms.values():
            logarithms.fill_(1.0)

    monkeypatch.setattr(ScaleLearner, "learn", worse)
    outcome = tiny(ON, "stages=[database,search,refine]", "refine.scale_epochs=1")
    assert outcome.code == 0, outcome.text
    assert "learned scales do not stay" in outcome.text
    told = read(tmp_path / "run" / "result.json")["refine"]
    assert (
        not told["scales"]["kept"]
        and told["scales"]["after"] > told["scales"]["before"]
        and told["kl_after"] < told["scales"]["after"]
    )


def test_the_plan_of_learning_has_all_that_it_takes(again: Path, evopress: Callable[..., Any], sparse: Callable[..., Any]) -> None:
    def planned(*stages: str, epochs: int) -> list[str]:
        outcome = evopress(f"resume={again}", f"stages=[{','.join(stages)}]", f"refine.scale_epochs={epochs}", "dry_run=true")
        assert outcome.code == 0, outcome.text
        found = re.search(
            r"^refine +2 blocks anew(?:, scales learned)? .* ([\d.]+ [kM]?B) +([\d.]+ [kM]?B)", outcome.text, re.MULTILINE
        )
        assert found is not None, outcome.text
        return list(found.groups())

    (disk, alone), (_, plain) = planned("refine", epochs=2), planned("refine", epochs=0)
    assert planned("search", "refine", epochs=2) == [disk, alone], (
        "the dense model's states of the search text are held in either case"
    )
    assert alone != plain
    assert "scales learned" not in sparse(ON, WITH, "refine.scale_epochs=2", "dry_run=true").text, "of which there are none"


def test_a_plan_survives_a_manifest_of_anything(again: Path, evopress: Callable[..., Any]) -> None:
    assert evopress(f"resume={again}", "stages=[refine]").code == 0
    (manifest,) = (again / "refined").glob("*/manifest.json")
    told = read(manifest)
    manifest.write_text(json.dumps({**told, "recipe": {**told["recipe"], "correction": "much"}}), encoding="utf-8")
    outcome = evopress(f"resume={again}", "stages=[refine]", "dry_run=true")
    assert outcome.code == 0, outcome.text
    assert "2 blocks anew" in outcome.text


def test_unfinished_refined_levels_are_left_out(again: Path, evopress: Callable[..., Any]) -> None:
    assert evopress(f"resume={again}", "stages=[refine]").code == 0
    (folder,) = (again / "refined").iterdir()
    (folder / "manifest.json").unlink()
    outcome = evopress(f"resume={again}", "stages=[evaluate]")
    assert outcome.code == 0, outcome.text
    assert "is not finished, so it is left out" in outcome.text
    assert "evopress_refined" not in rows(again)


def test_sparse_levels_are_refined_and_owl_stays_what_it_was(
    plain: Callable[..., Path], sparse: Callable[..., Any], cache: Path, tmp_path: Path
) -> None:
    outcome = sparse(ON, WITH)
    assert outcome.code == 0, outcome.text
    found = rows(tmp_path / "run")
    assert {name: row for name, row in found.items() if name != "evopress_refined"} == rows(plain("sparsity"))
    assert found["evopress_refined"]["weights_kept"] == found["evopress"]["weights_kept"]
    assert kl_of_checkpoint(tmp_path / "run" / "checkpoint", cache)[0] == pytest.approx(found["evopress_refined"]["kl"], rel=1e-3)


def test_dropped_modules_have_nothing_to_refine(evopress: Callable[..., Any], tmp_path: Path) -> None:
    outcome = evopress(
        "+method=drop", "sparsity=0.5", "+debug=tiny", ON, WITH, "baselines.names=[]", f"hydra.run.dir={tmp_path / 'run'}"
    )
    assert outcome.code == 0, outcome.text
    assert "method drop stores no weights, so there is nothing to refine" in outcome.text
    assert not (tmp_path / "run" / "refined").exists()
    assert "evopress_refined" not in rows(tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("stages=[database,refine]",), ("there is no genome.json", "run the stage search first")),
        ((ON, "refine.tokens=63"), ("refine.tokens=63 does not fill one sequence of model.sequence_length=64",)),
        ((ON, "refine.tokens=1"), ("refine.tokens=1 is out of range",)),
        ((ON, "refine.tokens=900000"), ("the search uses 2048 of them (data.search_tokens)", "refine.tokens")),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    arguments: tuple[str, ...], words: tuple[str, ...], tiny: Callable[..., Any]
) -> None:
    outcome = tiny(*arguments, "level_db.root=never")
    assert outcome.code == 1
    (error,) = outcome.errors
    assert all(word in error for word in words)
    assert "level database: built" not in outcome.text


def test_runs_of_earlier_versions_count_as_finished(tmp_path: Path) -> None:
    """Their digest knew nothing of the stage, and says the same still; what they have not done is all that is missing."""
    settings = RunSettings(
        method=QuantSettings(),
        data=DataSettings(source="python_docs"),
        level_db=LevelDatabaseSettings(root="levels"),
        scale=ScaleSettings(name="mini"),
        paths=PathsSettings(cache="cache"),
    )
    assert "refine" not in settings.stages
    done = ["database", "baselines", "search", "evaluate", "export", "report"]
    (tmp_path / "result.json").write_text(json.dumps({"schema": 1, "rows": [{"name": "evopress", "kl": 1.0}]}))
    finished = {"schema": 1, "settings": settings_digest(settings), "stages": done}
    (tmp_path / "finished.json").write_text(json.dumps(finished))
    assert stages_done(settings, tmp_path) == done
    settings.refine, settings.scale.refine, settings.scale.refine_tokens = RefineSettings(tokens=99), True, 7
    assert stages_done(settings, tmp_path) == done, "only the stage itself reads them"
    settings.stages = [*done[:3], "refine", *done[3:]]
    assert stages_done(settings, tmp_path) == done[:3], "what comes after the stage has to be done again"
    (tmp_path / "finished.json").write_text(
        json.dumps({**finished, "stages": settings.stages, "refine": {"tokens": 99, "correction": 0.5}})
    )
    assert stages_done(settings, tmp_path) == settings.stages
    settings.refine = RefineSettings(tokens=98)
    assert stages_done(settings, tmp_path) == done[:3]
