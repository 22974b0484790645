"""Every file of ours says its version: one from a newer evopress is refused or made again, never misread."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from own_files import READERS, Reader, check, read_hessians

from evopress.errors import EvoPressError
from evopress.files import seal
from evopress.finished import stages_done
from evopress.levels.build import _finished_blocks
from evopress.levels.hessians import HessianStore
from evopress.levels.store import DamagedDatabaseError

VERSIONED = [reader for reader in READERS if reader.versioned]
MADE_AGAIN: dict[str, Callable[[Path, Any], bool]] = {
    "journal.jsonl": lambda folder, outcome: 0 not in outcome and 1 in outcome,
    "block-000.json": lambda folder, outcome: 0 not in HessianStore(folder),
    "finished.json": lambda folder, outcome: outcome == [],
}
"""What costs only time is not refused but done again; tells that the file was not taken for what it says."""


def rewrite(reader: Reader, folder: Path, schema: Any) -> None:
    """Give a file another version, in its first line where it has several."""
    path = folder / reader.name
    lines = path.read_text(encoding="utf-8").splitlines() if reader.lines else [path.read_text(encoding="utf-8")]
    document = json.loads(lines[0])
    assert document["schema"] == 1
    document["schema"] = schema
    if schema is None:
        del document["schema"]
    lines[0] = json.dumps(seal(document) if reader.sealed else document)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.parametrize("reader", VERSIONED, ids=lambda reader: reader.name)
@pytest.mark.parametrize("schema", [2, 10**30, 0, -1, "1", True, None])
def test_another_version_is_refused_or_made_again(reader: Reader, schema: Any, tmp_path: Path) -> None:
    reader.make(tmp_path)
    rewrite(reader, tmp_path, schema)
    outcome = check(reader.read, tmp_path)
    if reader.name == "metrics.jsonl" and schema is None:
        assert len(outcome) == 4  # our first versions wrote none: an older one is read
        return
    if reader.name in MADE_AGAIN:
        assert MADE_AGAIN[reader.name](tmp_path, outcome)
        return
    assert isinstance(outcome, EvoPressError), f"{reader.name} of schema {schema} was taken for one of schema 1"
    sentence = str(outcome)
    assert reader.name in sentence
    if reader.name == "manifest.json" and type(schema) is not int:
        assert isinstance(outcome, DamagedDatabaseError)  # built again
        return
    newer = type(schema) is int and schema > 1
    older = type(schema) is int and schema < 1
    said = "update evopress" if newer else "older than" if older else "no schema number"
    assert said in sentence or (older and isinstance(outcome, DamagedDatabaseError)), sentence


def test_what_is_done_again_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reader = next(reader for reader in READERS if reader.name == "block-000.json")
    reader.make(tmp_path)
    rewrite(reader, tmp_path, 2)
    with caplog.at_level(logging.INFO):
        read_hessians(tmp_path)
    assert "schema 2" in caplog.text and "computed again" in caplog.text


def test_the_readers_are_the_programs_own() -> None:
    assert {reader.name for reader in VERSIONED} >= {
        *("genome.json", "metrics.jsonl", "state.json", "result.json", "baselines.json", "finished.json", "manifest.json"),
        *("journal.jsonl", "block-000.json", ".hydra/overrides.json"),
    }
    assert _finished_blocks and stages_done
