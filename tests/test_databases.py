"""A run's level databases: nothing is opened or built before it is asked for, and what decides them is all that does."""

from __future__ import annotations

from pathlib import Path

import pytest

from evopress.workspace import Workspace
from experiments.composed import settings_of


def opened(folder: Path, *overrides: str, beside: Workspace | None = None) -> Workspace:
    common = ("+debug=tiny", "tracker=none", f"paths.cache={folder / 'cache'}", f"level_db.root={folder / 'levels'}")
    return Workspace(settings_of([*common, *overrides]), folder / "run", beside=beside)


def built(folder: Path) -> list[Path]:
    return [path for path in folder.glob("levels/*/quant-*") if path.is_dir()]


def test_what_is_missing_is_planned_then_built_once_and_found_again(tmp_path: Path) -> None:
    first = opened(tmp_path, "+method=quant", "bits=3")
    assert "blocks" not in vars(first) and not built(tmp_path)
    space, needs = first.databases.plan()
    fingerprint = first.databases.fingerprint
    assert needs is not None and needs.num_blocks == needs.all_blocks > 0 and not built(tmp_path)
    assert first.database.space == space and first.databases.fingerprint == fingerprint
    assert not first.databases.reused and len(built(tmp_path)) == 1

    second = opened(tmp_path, "+method=quant", "bits=2.5", "seed=7")
    _, needs = second.databases.plan()
    assert needs is not None and not needs.num_blocks
    assert second.database.fingerprint == fingerprint and second.databases.reused and len(built(tmp_path)) == 1


@pytest.mark.parametrize(
    "change",
    [
        "method.levels=[4,3,2]",
        "method.recipe=paper",
        "model.dtype=bfloat16",
        "data.calibration_tokens=512",
        "model.sequence_length=32",
    ],
)
def test_whatever_decides_levels_gives_a_database_of_its_own(change: str, tmp_path: Path) -> None:
    plain, other = opened(tmp_path, "+method=quant", "bits=3"), opened(tmp_path, "+method=quant", "bits=3", change)
    assert plain.databases.fingerprint != other.databases.fingerprint


def test_a_run_at_another_target_shares_them(tmp_path: Path) -> None:
    whole = opened(tmp_path, "+method=joint", "size=3bpw")
    beside = opened(tmp_path, "+method=joint", "size=2.5bpw", beside=whole)
    assert beside.databases is whole.databases and beside.database is whole.database
    assert {unit.levels[0].source for unit in beside.database.space.units} == {"quant", "drop"}
    assert beside.budget.total < whole.budget.total
