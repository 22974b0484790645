"""What a run folder forgets of an earlier genome, and what it says of the exports that stay."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import pytest

from evopress.stages.results import OF_FOUND, REFINED_ROW, forget_found


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """A run that was exported three times: as it is, refined, and of a genome before this one; a fourth export was cut off."""
    (tmp_path / "genome.json").write_text("now", encoding="utf-8")
    for name, genome, told in (
        ("checkpoint", "now", {"refined": {}}),
        ("exports/gguf", "now", {}),
        ("exports/mlx", "before", {}),
        ("exports/.gptq", "now", {}),
    ):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "genome.json").write_text(genome, encoding="utf-8")
        (folder / "evopress.json").write_text(json.dumps(told), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("names", "damaged", "told"),
    [
        (OF_FOUND, False, ["checkpoint, exports/gguf still hold the previous weights: the stage export writes the new ones"]),
        (OF_FOUND, True, ["checkpoint, exports/gguf still hold the previous weights: the stage export writes the new ones"]),
        ([REFINED_ROW], False, ["checkpoint still holds the previous weights: the stage export writes the new ones"]),
        ([REFINED_ROW], True, []),
    ],
)
def test_exports_of_what_is_forgotten_are_named(
    names: Sequence[str], damaged: bool, told: list[str], exported: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if damaged:
        (exported / "checkpoint" / "evopress.json").write_text("{", encoding="utf-8")
    with caplog.at_level(logging.INFO, logger="evopress"):
        forget_found(exported, names)
    assert caplog.messages == told
