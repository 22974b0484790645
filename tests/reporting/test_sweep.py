"""Which sweep a run is a job of, read from what Hydra leaves in the folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evopress.reporting.sweep import experiment_name, job_name, sweep_folder, sweep_name, tracked_as


def job(folder: Path, sweep: Path, *overrides: str) -> Path:
    (folder / ".hydra").mkdir(parents=True)
    (sweep / "multirun.yaml").write_text("hydra: {}\n")
    (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- {override}\n" for override in overrides))
    return folder


def test_a_job_of_a_named_sweep(tmp_path: Path) -> None:
    sweep = tmp_path / "multirun" / "table4"
    folder = job(sweep / "min_uniform_3_seed-0", sweep, "search.max_switches=3", "seed=0", "+experiment=table4")
    assert sweep_folder(folder) == sweep
    assert (sweep_name(folder), job_name(folder), experiment_name(folder)) == ("table4", "min_uniform_3_seed-0", "table4")


def test_a_job_deeper_down(tmp_path: Path) -> None:
    sweep = tmp_path / "table4"
    assert job_name(job(sweep / "bits-3" / "seed-0", sweep)) == "bits-3/seed-0"


def test_a_sweep_that_is_named_by_the_time(tmp_path: Path) -> None:
    sweep = tmp_path / "multirun" / "2026-11-22" / "03-14-15-926535"
    folder = job(sweep / "1", sweep, "+method=quant", "bits=3")
    assert (sweep_name(folder), job_name(folder)) == ("2026-11-22_03-14-15-926535", "1")
    assert experiment_name(folder) is None


def test_a_run_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "multirun" / "2026-11-22" / "03-14-15"
    folder.mkdir(parents=True)
    assert (sweep_folder(folder), sweep_name(folder), job_name(folder), experiment_name(folder)) == (None, None, None, None)


@pytest.mark.parametrize("line", ["experiment=table6", "+experiment=table6", "'+experiment=table6'"])
def test_the_experiment_however_it_is_written(tmp_path: Path, line: str) -> None:
    assert experiment_name(job(tmp_path / "sweep" / "0", tmp_path / "sweep", "bits=3", line)) == "table6"


def test_other_settings_are_no_experiment(tmp_path: Path) -> None:
    assert experiment_name(job(tmp_path / "sweep" / "0", tmp_path / "sweep", "tracker.tags=[experiment=x]")) is None


def test_what_a_run_is_called_by_trackers(tmp_path: Path) -> None:
    def called(run_dir: Path, **changes: Any) -> tuple[str, str, list[str]]:
        return tracked_as(run_dir, **{"method": "quant", "key": "bits", "target": 2.5, "seed": 0} | changes)

    assert called(tmp_path / "alone") == ("quant-2.5-seed0", "quant-2.5", ["quant", "bits=2.5"])
    sweep = tmp_path / "table4"
    for job in ("seed-3", "constant_3_seed-1", "7"):
        (sweep / job).mkdir(parents=True)
    (sweep / "multirun.yaml").touch()
    assert called(sweep / "seed-3", seed=3)[:2] == ("quant-2.5-seed3", "table4")
    assert called(sweep / "7", seed=3)[0] == "quant-2.5-seed3 7"
    sparse = {"method": "sparsity", "key": "sparsity", "target": 0.7, "seed": 1}
    named = called(sweep / "constant_3_seed-1", **sparse)
    assert named == ("sparsity-0.7-seed1 constant_3_seed-1", "table4", ["sparsity", "sparsity=0.7"])
