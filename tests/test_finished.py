"""What counts as done: the same settings, digested as the first version did it (trials, section 11)."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from evopress import finished
from evopress.config import kept_settings
from evopress.finished import best_fitness, settings_digest, stages_done
from evopress.result_settings import HOW_IT_RUNS, result_settings_before
from evopress.settings import (
    DataSettings,
    DropSettings,
    EvaluationSettings,
    LevelDatabaseSettings,
    ModelSettings,
    PathsSettings,
    QuantSettings,
    RunSettings,
    SparsitySettings,
    TrackerSettings,
)

PINNED = {
    # made by the first version's code
    "quant": "e5dd36e27f12e5860d142dffa1afdacf4f75175b41c61ba550af2da068245c62",
    "sparsity": "54afdf9dd4df897ee6aa75d328b98ac5412e08c63389edb065044ee2ec791210",
    "drop": "3fcf920c51bd09444d8b3bcb86d743043e6724f851f2963bdf65ae1ef8ee87b7",
}
TARGETS: dict[str, dict[str, Any]] = {
    "quant": {"method": QuantSettings(recipe="paper"), "bits": 3.0},
    "sparsity": {"method": SparsitySettings(step=5, recipe="paper"), "sparsity": 0.5},
    "drop": {"method": DropSettings(), "sparsity": 0.25, "seed": 3},
}


def run_settings(method: str) -> RunSettings:
    return RunSettings(
        model=ModelSettings(dtype="bfloat16"),
        data=DataSettings(source="text", calibration=["a.txt"]),
        evaluation=EvaluationSettings(every_tokens=4096, files={"wiki": "w.txt"}),
        **TARGETS[method],
    )


def write_finished(folder: Path, digest: str) -> None:
    (folder / "finished.json").write_text(json.dumps({"schema": 1, "settings": digest, "stages": ["search"]}))


@pytest.mark.parametrize("method", PINNED)
def test_jobs_of_the_first_version_are_known_by_the_digest_that_they_had(method: str, tmp_path: Path) -> None:
    """A setting that came later must not count where it asks for what the first version did: else list it in `earlier_versions`."""
    write_finished(tmp_path, PINNED[method])
    assert stages_done(run_settings(method), tmp_path) == ["search"]
    assert stages_done(replace(run_settings(method), seed=7), tmp_path) == []


def test_what_came_later_counts_where_it_asks_for_something_else() -> None:
    digests = {
        settings_digest(settings)
        for quant in (run_settings("quant"),)
        for settings in (
            quant,
            replace(quant, seed=1),
            replace(quant, evaluation=EvaluationSettings(every_tokens=4096, files={"wiki": "v.txt"})),
            replace(quant, model=ModelSettings(dtype="bfloat16", bos="true")),
            replace(quant, method=QuantSettings(recipe="best")),
            replace(quant, method=QuantSettings(recipe="paper", include=["blocks", "head"])),
            replace(quant, method=QuantSettings(recipe="paper", symmetric=True)),
        )
    }
    assert len(digests) == 7
    asked = replace(run_settings("quant"), stages=["report"], dry_run=True, resume="x")
    assert settings_digest(asked) == settings_digest(run_settings("quant"))


@pytest.mark.parametrize(
    ("fitnesses", "best"), [([2.0, 1.5], 1.5), ([0.0], 0.0), ([2.0, None], 2.0), ([None], math.nan), ([], math.nan)]
)
def test_a_job_returns_the_fitness_of_what_it_found(fitnesses: list[float | None], best: float, tmp_path: Path) -> None:
    """On search text; what was measured on held-out text is never looked at. A generation that asked nothing changed nothing."""
    records = [{"generation": i, "fitness": value, "held_out": {"kl": 9.0}} for i, value in enumerate(fitnesses)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    (tmp_path / "result.json").write_text(json.dumps({"schema": 1, "rows": [{"name": "evopress", "kl": 9.0}]}))
    assert best_fitness(tmp_path) == pytest.approx(best, nan_ok=True)


MOVED = LevelDatabaseSettings(root="/moved/levels", cache_bytes=0, activations="disk", keep_hessians=False)


def test_how_a_run_is_followed_and_where_its_levels_lie_does_not_count(tmp_path: Path) -> None:
    settings = replace(run_settings("quant"), stages=["search"])
    followed = replace(settings, threads=2, tracker=TrackerSettings(name="none"), level_db=MOVED)
    assert settings_digest(followed) == settings_digest(settings)
    write_finished(tmp_path, settings_digest(settings))
    assert stages_done(followed, tmp_path) == ["search"]
    assert stages_done(replace(followed, seed=1), tmp_path) == []


def test_a_run_whose_earlier_version_counted_that_is_known_by_what_its_folder_keeps(tmp_path: Path) -> None:
    """The first versions counted tracker, paths and threads, later ones the level database's settings alone."""
    settings = replace(run_settings("quant"), stages=["search"])
    cache = PathsSettings(cache="/cache")
    then = replace(
        settings,
        threads=2,
        paths=cache,
        tracker=TrackerSettings(project="evopress"),
        level_db=LevelDatabaseSettings(root="/cache/levels"),
    )
    kept = {key: value for key, value in asdict(then).items() if key in HOW_IT_RUNS}
    kept["level_db"] |= {"root": "${paths.cache}/levels"}
    (tmp_path / ".hydra").mkdir()
    uncounted = replace(then, tracker=TrackerSettings(project="evopress"), paths=PathsSettings(), threads=None)
    for counting in (then, uncounted):
        write_finished(tmp_path, finished._digest(result_settings_before(asdict(counting))))
        OmegaConf.save(OmegaConf.create(kept), tmp_path / ".hydra" / "config.yaml")
        there = kept_settings(tmp_path, HOW_IT_RUNS)
        assert stages_done(replace(settings, level_db=MOVED), tmp_path, there) == ["search"]
        assert stages_done(replace(settings, level_db=MOVED, seed=1), tmp_path, there) == []
        (tmp_path / ".hydra" / "config.yaml").write_text("{")
        assert kept_settings(tmp_path, HOW_IT_RUNS) == {}
        assert stages_done(replace(settings, level_db=MOVED), tmp_path) == []
        assert stages_done(then, tmp_path) == ["search"]
