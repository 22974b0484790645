"""A run's text: its splits, what further held-out sets may be called, and that nothing is read before it is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from evopress.data.opening import RunText
from evopress.errors import EvoPressError
from evopress.settings import DataSettings, EvaluationSettings, ModelSettings

LENGTH = 32


@pytest.fixture
def text(tiny_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., RunText]:
    """Return the text of a run whose splits have files of their own, with a tiny model's tokenizer of bytes."""
    for split in ("calibration", "search", "evaluation"):
        (tmp_path / f"{split}.txt").write_text(f"Words of the {split} split. " * 40)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder())

    def make(*, rows: int | None = None, **changes: Any) -> RunText:
        files = {split: [str(tmp_path / f"{split}.txt")] for split in ("calibration", "search", "evaluation")}
        sizes = {f"{split}_tokens": 4 * LENGTH for split in files}
        data = DataSettings(source="text", **(files | sizes | changes.pop("data", {})))
        return RunText(
            data,
            EvaluationSettings(**changes),
            ModelSettings(sequence_length=LENGTH, separator=None),
            tokenizer=lambda: tokenizer,
            embedding_rows=lambda: rows,
            cache=tmp_path,
        )

    return make


def test_the_splits_are_sequences_of_their_own_files(text: Callable[..., RunText], tiny_folder: Callable[..., Path]) -> None:
    run, tokenizer = text(), AutoTokenizer.from_pretrained(tiny_folder())
    assert set(run.evaluation) == {"text"}
    for split, tokens in (("calibration", run.calibration), ("search", run.search), ("evaluation", run.evaluation["text"])):
        assert tokens.shape == (4, LENGTH)
        assert f"Words of the {split}" in tokenizer.decode(tokens[0])


def test_text_after_the_search_is_what_comes_next(text: Callable[..., RunText]) -> None:
    run = text()
    longer = text(data={"search_tokens": 6 * LENGTH})
    assert run.after_search(2 * LENGTH + 1).equal(longer.search[4:])


def test_too_little_text_after_the_search_names_both_settings(text: Callable[..., RunText]) -> None:
    with pytest.raises(
        EvoPressError, match=r"\(data\.search_tokens\), the stage refine the 1600000 after these \(refine\.tokens\)$"
    ):
        text().after_search(50000 * LENGTH)


def test_an_unknown_set_is_told_with_the_choices(text: Callable[..., RunText]) -> None:
    with pytest.raises(EvoPressError, match=r"evaluation\.data 'books' is unknown: choose among python_docs, wikitext2, c4"):
        text().source("books")


def test_a_held_out_file_may_not_be_trained_on_or_share_a_name(text: Callable[..., RunText], tmp_path: Path) -> None:
    with pytest.raises(EvoPressError, match=r"evaluation\.files has 'mine', which is also a search file: give another one"):
        text(files={"mine": str(tmp_path / "search.txt")}).check_files()
    with pytest.raises(EvoPressError, match=r"evaluation\.files has 'text', which is already the name of another data set"):
        text(files={"text": str(tmp_path / "other.txt")}).check_files()


def test_the_field_of_further_files_is_their_own(text: Callable[..., RunText], tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text(json.dumps({"body": "Words of its own. " * 40}) + "\n")
    files = {"files": {"own": str(tmp_path / "own.jsonl")}}
    assert text(field="body", data={"field": "content"}, **files).evaluation["own"].shape == (4, LENGTH)
    with pytest.raises(EvoPressError, match=r"name the field that holds the text with evaluation\.field$"):
        text(data={"field": "body"}, **files).evaluation  # noqa: B018


def test_a_token_that_the_embedding_lacks_is_refused(text: Callable[..., RunText]) -> None:
    with pytest.raises(EvoPressError, match=r"^the calibration text \(text\) has the token .*embedding has 40 rows"):
        text(rows=40).calibration  # noqa: B018


def test_a_source_that_does_not_keep_its_splits_apart_is_told_of(
    text: Callable[..., RunText], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = text()
    assert len(run.calibration) == len(run.search) == len(run.evaluation["text"]) and not caplog.records
    monkeypatch.setattr(type(run.own_source), "streams", lambda self, split, left_out: iter([["The same words. " * 40]]))
    monkeypatch.setattr(type(run.own_source), "identity", lambda self: {"kind": "same"})
    same = text()
    assert same.calibration.equal(same.evaluation["text"])
    distinct = len({tuple(row) for row in same.calibration.tolist()})
    (record,) = caplog.records
    start = f"{distinct} of the {distinct} sequences of the evaluation text (text) are in the calibration text, too: results on"
    assert record.levelname == "WARNING" and record.getMessage().startswith(start)
