"""A resume that is refused changes nothing: whatever the setting, refusals come first (trials, section 10)."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evopress.models.tiny import make_tiny

BY_SETTINGS = {
    "another target": "bits=3",
    "another seed": "seed=1",
    "another fitness": "fitness.name=perplexity",
    "more offspring": "search.num_offspring=5",
    "other tokens": "search.tokens=[64,256]",
    "other survivors": "search.survivors=[3,1]",
    "another exchange": "search.exchange=any",
    "another distribution": "search.distribution=constant",
    "other switches": "search.max_switches=2",
    "other initial candidates": "search.initial_candidates=5",
    "other initial tokens": "search.initial_tokens=64",
    "other search text": "data.search_tokens=1024",
    "a target out of range": "bits=99",
}
"""Seen without the model."""
BY_MODEL = {
    "other levels": "method.levels=[5,4,3,2]",
    "another damping": "method.damping=0.02",
    "another group size": "model.group_size=32",
    "other calibration text": "data.calibration_tokens=512",
    "another dtype": "model.dtype=bfloat16",
    "another model": "model.path=other",
    "a start that nobody found": "search.starts=[nobody]",
}
DAMAGED = (
    *(("state.json", "search"), ("metrics.jsonl", "search"), ("metrics.jsonl", "report"), ("genome.json", "export")),
    *(("genome.json", "evaluate"), ("baselines.json", "evaluate"), ("result.json", "database")),
)
"""A file, and a stage that needs it."""
ALONE = ("[evaluate]", "[export]", "[report]", "[database]")


def contents(folder: Path) -> dict[str, bytes]:
    """Return every byte of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def no_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evopress.pipeline.make_tracker", lambda settings: pytest.fail("a tracker was made before the refusal"))


@pytest.fixture
def refused(finished: Any, evopress: Callable[..., Any], tmp_path: Path, no_tracker: None) -> Callable[..., str]:
    """Resume a copy of the whole run with a setting; return the sentence, every byte of the folder being as before."""
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    before = contents(folder)
    assert {"finished.json", "result.json", "evopress.log", ".hydra/config.yaml", ".hydra/overrides.json"} <= set(before)

    def check(*arguments: str) -> str:
        outcome = evopress("resume=run", *arguments)
        assert outcome.code == 1, f"{arguments} was not refused: {outcome.text}"
        assert "Traceback" not in outcome.text
        assert "has done is kept" not in outcome.text, "nothing was under way"
        (sentence,) = outcome.errors
        assert re.search(": |; ", sentence.removeprefix("error: "))
        after = contents(folder)
        assert [name for name in before | after if before.get(name) != after.get(name)] == [], arguments
        return sentence

    return check


def test_what_settings_tell_is_refused_before_a_model_is_loaded(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "evopress.models.opening.load_pretrained", lambda *a, **k: pytest.fail("a model was loaded before the refusal")
    )
    for setting in BY_SETTINGS.values():
        sentence = refused(setting)
        assert "other settings" in sentence or "bits=99" in sentence
    assert "bits 3.5 there, 3.0 here" in refused("bits=3")
    for stage in ALONE:
        assert "bits 3.5 there, 3.0 here" in refused("bits=3", f"stages={stage}")
        assert "num_offspring 4 there, 5 here" in refused("search.num_offspring=5", f"stages={stage}")


def test_what_the_model_tells_is_refused_before_the_first_change(refused: Callable[..., str], tmp_path: Path) -> None:
    make_tiny(tmp_path / "other", num_blocks=2, seed=1)
    for setting in BY_MODEL.values():
        sentence = refused(setting)
        assert "level database" in sentence or "search.starts has 'nobody'" in sentence, sentence
    for stage in ALONE[:3]:
        assert "found with level database" in refused("method.damping=0.02", f"stages={stage}")


def test_what_is_damaged_is_refused_before_the_first_change(
    finished: Any, evopress: Callable[..., Any], tmp_path: Path, no_tracker: None
) -> None:
    for name, stage in DAMAGED:
        folder = shutil.copytree(finished.folder, tmp_path / "run")
        (folder / name).write_text("[]\n", encoding="utf-8")
        before = contents(folder)
        outcome = evopress("resume=run", f"stages=[{stage}]")
        assert outcome.code == 1 and name in outcome.errors[0], outcome.text
        assert contents(folder) == before, (name, stage)
        shutil.rmtree(folder)


def test_a_run_of_an_earlier_version_is_refused_another_target_too(
    finished: Any, evopress: Callable[..., Any], tmp_path: Path, no_tracker: None
) -> None:
    """Its state does not say the target; its budget does."""
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    del state["asked"]["bits"], state["asked"]["sparsity"], state["digest"]
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    before = contents(folder)
    for stage in ("[search]", "[report]"):
        outcome = evopress("resume=run", "bits=3", f"stages={stage}")
        assert outcome.code == 1 and "budget" in outcome.errors[0], outcome.text
        assert contents(folder) == before
