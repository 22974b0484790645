"""Zero-shot tasks of a run: from its command to its rows and tables, refused before any work if they are not to be had."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from evopress.evaluation import zero_shot
from evopress.evaluation.tasks import load_tasks, questions_digest

pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval[hf] is not installed")

ANIMALS = ("ant", "bee", "cat", "dog", "elk", "fox")


@pytest.fixture
def tasks_path(tmp_path: Path) -> Iterator[Path]:
    """A folder with one task, its questions kept out of the user's cache."""
    import datasets

    folder = tmp_path / "questions"
    folder.mkdir()
    rows = [
        {"question": f"Which comes after {a}, {b}?", "options": [b, a, "owl"], "gold": i % 3}
        for i, (a, b) in enumerate((a, b) for a in ANIMALS for b in ANIMALS if a != b)
    ]
    (folder / "animals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "animals",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "animals.jsonl"}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "gold",
        "doc_to_choice": "{{options}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "animals.yaml").write_text(yaml.safe_dump(task))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
        yield folder


def test_an_interrupted_evaluation_keeps_the_answers_that_it_has(
    finished: Any, tasks_path: Path, evopress: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, whole = (shutil.copytree(finished.folder, tmp_path / name) for name in ("again", "whole"))
    arguments = ("stages=[evaluate]", "evaluation.tasks=[animals]", f"evaluation.tasks_path={tasks_path}")
    assert evopress(f"resume={whole}", *arguments).code == 0
    asked, answers = [], zero_shot._answers

    def counted(lm: Any, *rest: Any) -> Any:
        asked.append(lm.genome)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return answers(lm, *rest)

    monkeypatch.setattr(zero_shot, "_answers", counted)
    assert evopress(f"resume={run}", *arguments).code == 130
    assert evopress(f"resume={run}", *arguments).code == 0
    there = json.loads((whole / "result.json").read_text())["rows"]
    assert json.loads((run / "result.json").read_text())["rows"] == there
    assert len(asked) == len(there) + 1 and asked[2] == asked[3], "two models' answers were kept"
    digest = questions_digest(load_tasks(["animals"], tasks_path=str(tasks_path)))
    file = tasks_path / "animals.jsonl"
    file.write_text(file.read_text().replace('"gold": 2', '"gold": 1'))
    assert questions_digest(load_tasks(["animals"], tasks_path=str(tasks_path))) != digest, "other answers are right"


@pytest.mark.parametrize("earlier", ["finished", "finished_sparse"])
def test_rows_have_accuracies_and_flips(
    earlier: str, tasks_path: Path, evopress: Callable[..., Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = tmp_path / "again"
    shutil.copytree(request.getfixturevalue(earlier).folder, folder)
    before = json.loads((folder / "result.json").read_text())["rows"]
    arguments = ("evaluation.tasks=[animals]", f"evaluation.tasks_path={tasks_path}", "evaluation.task_limit=20")
    outcome = evopress(f"resume={folder}", "stages=[evaluate,report]", *arguments)
    assert outcome.code == 0, outcome.text
    rows = json.loads((folder / "result.json").read_text())["rows"]
    assert [row["name"] for row in rows] == [row["name"] for row in before]
    for row, old in zip(rows, before, strict=True):
        assert row["zero_shot_questions"] == {"animals": 20}
        assert row["zero_shot"]["animals"] == row["zero_shot_mean"]
        assert row["zero_shot_mean"] * 20 == pytest.approx(round(row["zero_shot_mean"] * 20))
        assert row["zero_shot_stderr"]["animals"] == row["zero_shot_mean_stderr"]
        assert ("flip_rate" in row) == (row["name"] != "dense")
        assert row["kl"] == pytest.approx(old["kl"], abs=1e-6)
    assert any(row.get("flip_rate", 0) > 0 for row in rows), "no genome answers otherwise than the dense model"
    assert f"zero-shot: {len(rows)} models on 20 questions of animals" in outcome.text
    assert "flip rate" in (folder / "results.csv").read_text().splitlines()[0]
    assert " ± " in (folder / "results.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("evaluation.tasks=[plants]",), "evaluation.tasks has 'plants', which is not among the task files"),
        (("evaluation.tasks=[]",), "is given but evaluation.tasks is empty: name tasks"),
        (("evaluation.tasks=[animals]", "evaluation.task_limit=0"), "evaluation.task_limit=0 is out of range"),
        (("evaluation.tasks=[animals]", "evaluation.task_batch_size=0"), "evaluation.task_batch_size=0 is out of range"),
        (("evaluation=zero_shot",), "evaluation.tasks has 'arc_challenge'"),
    ],
)
def test_wrong_tasks_are_refused_before_any_work(
    arguments: tuple[str, ...], sentence: str, tasks_path: Path, tiny: Callable[..., Any], tmp_path: Path
) -> None:
    outcome = tiny(f"evaluation.tasks_path={tasks_path}", *arguments)
    assert outcome.code == 1
    assert len(outcome.errors) == 1, outcome.text
    assert sentence in outcome.errors[0]
    assert not (tmp_path / "run" / "baselines.json").exists()
    assert "model:" not in outcome.text


def test_tasks_are_not_asked_for_where_nothing_is_evaluated(tiny: Callable[..., Any], tmp_path: Path) -> None:
    outcome = tiny("stages=[database]", "evaluation.tasks=[plants]", f"evaluation.tasks_path={tmp_path / 'none'}")
    assert outcome.code == 0, outcome.text
