"""The comparison of a run's zero-shot numbers with the lm-eval command line's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.zero_shot import run as zero_shot

ROW = {
    "name": "evopress",
    "zero_shot": {"arc_easy": 0.5, "piqa": 0.75},
    "zero_shot_stderr": {"arc_easy": 0.16, "piqa": 0.14},
    "zero_shot_questions": {"arc_easy": 8, "piqa": 8},
    "zero_shot_mean": 0.625,
    "zero_shot_mean_stderr": 0.1,
    "flip_rate": 0.25,
    "flip_rate_by_task": {"arc_easy": 0.25, "piqa": 0.25},
}


def fake_lm_eval(results: dict[str, float] | None, asked: list[list[str]]) -> Any:
    """Stand in for the command: write what lm-eval writes, or fail as it does."""

    def run(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
        asked.append([*command, str(kwargs["cwd"])])
        if results is None:
            return subprocess.CompletedProcess(command, 1, "", "Traceback\nValueError: no such task")
        folder = Path(command[command.index("--output_path") + 1]) / "model"
        folder.mkdir()
        document = {"results": {f"{task}_local": {"acc,none": accuracy} for task, accuracy in results.items()}}
        (folder / "results_1.json").write_text(json.dumps(document))
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def main(monkeypatch: Any, run_folder: Path, out: Path, *, limit: str = "8") -> None:
    arguments = [str(run_folder), "--tasks-path", str(out.parent), "--checkpoint", f"evopress={out.parent}", "--limit", limit]
    monkeypatch.setattr(sys, "argv", ["run", *arguments, "--out", str(out)])
    zero_shot.main()


def test_differences_are_counted_in_answers(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    (tmp_path / "result.json").write_text(json.dumps({"schema": 1, "rows": [ROW, {**ROW, "name": "dp"}, {"name": "uniform"}]}))
    asked: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", fake_lm_eval({"arc_easy": 0.5, "piqa": 0.5}, asked))
    main(monkeypatch, tmp_path, tmp_path / "out")
    assert "| evopress | arc_easy | 8 | 0.500 ± 0.160 | 0.500 | 0 | 0.250 |" in capsys.readouterr().out
    assert "| evopress | piqa | 8 | 0.750 ± 0.140 | 0.500 | 2 | 0.250 |" in (tmp_path / "out" / "table.md").read_text()
    assert "| dp | 0.625 ± 0.100 | 0.250 |" in (tmp_path / "out" / "table.md").read_text()
    assert "dp,piqa,8,0.75,0.14,,,0.25" in (tmp_path / "out" / "results.csv").read_text().splitlines()
    (command,) = asked
    assert command[-1] == str(tmp_path) and command[command.index("--limit") + 1] == "8"
    assert "arc_easy_local,piqa_local" in command


@pytest.mark.parametrize(
    ("results", "rows", "sentence"), [(None, [ROW], "no such task"), ({}, [], "no zero-shot numbers of 'evopress'")]
)
def test_failures_are_one_sentence(results: Any, rows: Any, sentence: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    (tmp_path / "result.json").write_text(json.dumps({"schema": 1, "rows": rows}))
    monkeypatch.setattr(subprocess, "run", fake_lm_eval(results, []))
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, tmp_path, tmp_path / "out")
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and line.startswith("error: ") and sentence in line
    assert not (tmp_path / "out").exists()
