"""What scripts' command lines share: a user's error is one sentence, and nobody who has had enough is told so."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

MISSING = {
    "exports.run": ["{there}/none.gguf", "--results", "{there}/results.csv"],
    "exports.decoded": ["{there}/none", "{there}"],
    "levels.errors": ["{there}/none.safetensors"],
    "levels.sparse": ["--inputs", "{there}/none.safetensors", "--out", "{there}/sparse.csv"],
    "heldout.run": ["{there}/none"],
    "benchmark.alone": ["--size", "smoke", "--row", "quant", "--evaluator", "plain", "--database", "{there}/none"],
}
WRONG = {
    "exports.run": (["{there}", "--results", "{there}/results.csv"], "is no .gguf file and no folder with a config.json"),
    "levels.measure": (["--out", "{there}/results.csv", "--seeds", "0", "--", "bit=3"], "bit"),
    "theorem1.run": (["--seeds", "0", "--out", "{there}"], "--seeds 0 is out of range"),
    "model_types": (["lama"], "lama is no model type that transformers has a causal language model for: choose among llama"),
    "levels.sparse": (["--recipes", "bets", "--out", "{there}/sparse.csv"], "method.recipe=bets is unknown"),
}


def ended(name: str, words: list[str], there: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a script that refuses its command line; return the sentence."""
    script = import_module(f"experiments.{name}")
    monkeypatch.setattr(sys, "argv", [name, *(word.format(there=there) for word in words)])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code in (1, 2)
    return [line for line in capsys.readouterr().err.splitlines() if "error: " in line][-1]


@pytest.mark.parametrize("name", MISSING)
def test_a_file_that_is_not_there_is_named(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    sentence = ended(name, MISSING[name], tmp_path, monkeypatch, capsys)
    assert f"there is no file or folder {tmp_path}/none" in sentence and "name one that is there" in sentence


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_is_one_sentence(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    words, part = WRONG[name]
    assert part in ended(name, words, tmp_path, monkeypatch, capsys)


FOLDER = Path(__file__).parents[2] / "experiments"
SCRIPTS = sorted(
    ".".join(path.relative_to(FOLDER).with_suffix("").parts)
    for path in FOLDER.rglob("*.py")
    if "\ndef main(" in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_a_usage_and_nothing_is_measured(name: str, monkeypatch, capsys) -> None:
    script = import_module(f"experiments.{name}")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 0 and capsys.readouterr().out.startswith("usage: ")


def test_a_reader_who_has_had_enough_is_told_nothing() -> None:
    script = "from experiments.scripts import in_one_sentence\nwith in_one_sentence():\n    print('line\\n' * 100_000)"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"line\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1
