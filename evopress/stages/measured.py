"""What the stage evaluate has measured so far, in the run folder: one that was killed goes on with what is missing."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from evopress.errors import EvoPressError
from evopress.evaluation.heldout import Scores
from evopress.evaluation.zero_shot import TaskScore, ZeroShot
from evopress.files import canonical_json, is_sealed, seal
from evopress.reporting.records import append_record, read_records

logger = logging.getLogger(__name__)
_ROWS = "by_sequence"
MEASURED = "measured.jsonl"
"""The file's name; it is gone when the stage has ended, whose results are in `result.json`."""


class Measured:
    """Lines of a file, each with what was measured and what decides it to the bit; damaged ones are as if not there."""

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        """Read what there is.

        Args: about: what decides all numbers: model, levels, machine, versions, code; JSON-able.
        """
        self._path = folder / MEASURED
        self._about = canonical_json(about)
        self._said = False
        try:
            lines = read_records(self._path) if self._path.exists() else []
        except EvoPressError as error:
            logger.warning("%s; what it had is measured again", error)
            self._path.unlink(missing_ok=True)
            lines = []
        self._known: dict[str, Any] = {
            line["key"]: line["value"] for line in lines if is_sealed(line) and {"key", "value"} <= line.keys()
        }

    def find(self, asked: Any) -> Any:
        """Return what was kept of something, JSON-able as it was given; None: nothing."""
        value = self._known.get(self._key(asked))
        if value is not None and not self._said:
            logger.info("evaluation: resuming from %s", self._path)
            self._said = True
        return value

    def keep(self, asked: Any, value: Any) -> None:
        """Keep a value, JSON-able."""
        append_record(self._path, seal({"schema": 1, "key": self._key(asked), "value": value}))

    def of(self, asked: Any, measure: Callable[[], Any]) -> Any:
        """Return what was kept of something, measured and kept first where there is nothing."""
        if (value := self.find(asked)) is None:
            self.keep(asked, value := measure())
        return value

    def _key(self, asked: Any) -> str:
        return hashlib.sha256(f"{self._about}\n{canonical_json(asked)}".encode()).hexdigest()


def scores_as_json(scores: Scores) -> dict[str, Any]:
    """Return scores as JSON holds them, numbers that are not finite as words."""
    numbers = {field.name: _told(getattr(scores, field.name)) for field in fields(scores) if field.name != _ROWS}
    return {**numbers, _ROWS: {name: [_told(each) for each in row] for name, row in scores.by_sequence.items()}}


def scores_of_json(told: Mapping[str, Any]) -> Scores:
    """Return the scores that `scores_as_json` was given."""
    numbers: dict[str, Any] = {
        name: value if name == "num_tokens" else float(value) for name, value in told.items() if name != _ROWS
    }
    return Scores(**numbers, by_sequence={name: tuple(map(float, row)) for name, row in told[_ROWS].items()})


def answers_as_json(answers: ZeroShot) -> dict[str, Any]:
    """Return answers as JSON holds them."""
    return {task: list(score.correct) for task, score in answers.tasks.items()}


def answers_of_json(told: Mapping[str, Any]) -> ZeroShot:
    """Return the answers that `answers_as_json` was given."""
    return ZeroShot({task: TaskScore(tuple(correct)) for task, correct in told.items()})


def _told(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
