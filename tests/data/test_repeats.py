"""Each document stands in one split alone, whatever files and kinds of files it is in."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evopress.data.python_docs import PythonDocs
from evopress.data.repeats import content_key, without_repeats
from evopress.data.sources import SPLITS
from evopress.data.text_files import TextFiles
from evopress.errors import EvoPressError


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def parquet(path: Path, texts: list[str]) -> Path:
    pq.write_table(pa.table({"text": texts}), path)
    return path


def array_of(path: Path, texts: list[str]) -> Path:
    path.write_text(json.dumps(texts), encoding="utf-8")
    return path


def txt(path: Path, texts: list[str]) -> Path:
    path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    return path


def documents(i: int) -> str:
    return f"Document {i} says at some length what it has to say, so that its words are its own: {i * i}."


def read(source: TextFiles) -> tuple[dict[str, list[str]], dict[str, int]]:
    """Return the documents of each split, and how many were set aside while it was read."""
    found, aside = {}, {}
    for split in SPLITS:
        left_out: Counter[str] = Counter()
        found[split] = ["".join(pieces) for pieces in source.streams(split, left_out)]
        aside[split] = left_out["repeated"]
    return found, aside


def contents(texts: list[str]) -> set[str]:
    """Return what is in texts, white space aside, a paragraph each."""
    return {" ".join(part.split()) for text in texts for part in text.split("\n\n") if part.strip()}


def check_apart(found: dict[str, list[str]], everything: list[str]) -> None:
    """Check that no two splits share anything, that each has something and that together they have all."""
    parts = {split: contents(texts) for split, texts in found.items()}
    assert all(parts.values())
    assert sum(map(len, parts.values())) == len(set.union(*parts.values()))
    assert set.union(*parts.values()) == contents(everything)


def test_white_space_does_not_count() -> None:
    assert content_key("a  b\n") == content_key("\ta b") != content_key("ab")
    assert list(without_repeats(["a b", "c", " a\nb ", "c", "d"])) == ["a b", "c", "d"]


def test_one_line_per_question_on_the_same_context(tmp_path: Path) -> None:
    contexts = [documents(i) for i in range(40)]
    path = jsonl(tmp_path / "a.jsonl", [context + " " * j for j in range(10) for context in contexts])
    found, aside = read(TextFiles(calibration=(path,), search=(path,), evaluation=(path,)))
    check_apart(found, contexts)
    assert [len(found[split]) for split in SPLITS] == [14, 13, 13]
    assert set(aside.values()) == {360}


@pytest.mark.parametrize("write", [jsonl, parquet, array_of])
def test_the_same_documents_in_two_files(write: Callable[..., Path], tmp_path: Path) -> None:
    texts = [documents(i) for i in range(400)]
    one, other = (
        jsonl(tmp_path / "one.jsonl", texts),
        write(tmp_path / f"other.{write.__name__.replace('array_of', 'json')}", texts[::-1]),
    )
    found, aside = read(TextFiles(calibration=(one,), search=(one,), evaluation=(other,)))
    check_apart(found, texts)
    assert [len(found[split]) for split in SPLITS] == [134, 133, 133]
    assert aside == {"calibration": 133, "search": 133, "evaluation": 267}


def test_a_few_documents_in_two_files(tmp_path: Path) -> None:
    texts = [documents(i) for i in range(50)]
    train, test = jsonl(tmp_path / "train.jsonl", texts[:40]), parquet(tmp_path / "test.parquet", texts[34:])
    found, aside = read(TextFiles(calibration=(train,), search=(train,), evaluation=(test,)))
    check_apart(found, texts)
    assert sum(map(len, found.values())) == 50 and found["evaluation"][-10:] == texts[40:]
    assert aside["evaluation"] == 4


@pytest.mark.parametrize("write", [jsonl, parquet, txt])
def test_paragraphs_of_a_txt_that_other_files_have(write: Callable[..., Path], tmp_path: Path) -> None:
    texts = [documents(i) for i in range(40)]
    book = txt(tmp_path / "book.txt", texts[:30])
    other = write(tmp_path / f"other.{write.__name__}", texts[20:])
    found, aside = read(TextFiles(calibration=(book,), search=(book,), evaluation=(other,)))
    check_apart(found, texts)
    assert sum(aside.values()) == 10


def test_short_paragraphs_of_a_txt_may_repeat(tmp_path: Path) -> None:
    one = txt(tmp_path / "one.txt", ["* * *", documents(0), "* * *"])
    other = txt(tmp_path / "other.txt", ["* * *", documents(1)])
    source = TextFiles(calibration=(one,), evaluation=(other,))
    assert list(source.documents("calibration")) == [one.read_text()] and list(source.documents("evaluation")) == [
        other.read_text()
    ]


def test_repeats_within_one_split_stay(tmp_path: Path) -> None:
    texts = [documents(0), documents(1), documents(0)]
    train, test = jsonl(tmp_path / "train.jsonl", texts), jsonl(tmp_path / "test.jsonl", [documents(2)])
    assert list(TextFiles(calibration=(train,), evaluation=(test,)).documents("calibration")) == texts
    assert list(TextFiles(calibration=(train,)).documents("calibration")) == texts


def test_files_without_repeats_are_divided_as_ever(tmp_path: Path) -> None:
    """Documents in turn from the first of each file on, whatever other files there are."""
    texts = [documents(i) for i in range(22)]
    one, two = jsonl(tmp_path / "one.jsonl", texts[:11]), parquet(tmp_path / "two.parquet", texts[11:20])
    held_out = jsonl(tmp_path / "held_out.jsonl", texts[20:])
    found, aside = read(TextFiles(calibration=(one, two), search=(two, one), evaluation=(held_out,)))
    # Of the second file each split's share begins as in `islice(rows, place, None, 2)`.
    assert found["calibration"] == texts[0:11:2] + texts[11:20:2]
    assert found["search"] == texts[12:20:2] + texts[1:11:2]
    assert found["evaluation"] == texts[20:] and not any(aside.values())


def test_held_out_files_of_their_own_leave_out_what_is_trained_on(tmp_path: Path) -> None:
    texts = [documents(i) for i in range(30)]
    train, test = jsonl(tmp_path / "train.jsonl", texts[:20]), jsonl(tmp_path / "test.jsonl", texts[25:])
    own = TextFiles(calibration=(train,), search=(train,), evaluation=(test,))
    further = parquet(tmp_path / "further.parquet", [text + "\n" for text in texts[10:]])
    left_out: Counter[str] = Counter()
    source = TextFiles(evaluation=(further,), apart_from=own)
    assert contents(["".join(pieces) for pieces in source.streams("evaluation", left_out)]) == contents(texts[20:])
    assert left_out["repeated"] == 10
    assert source.identity() != TextFiles(evaluation=(further,)).identity()
    copied = array_of(tmp_path / "copied.json", texts[:5])
    with pytest.raises(EvoPressError, match=r"all documents of .*copied\.json .* are duplicates: give that split its own text"):
        list(TextFiles(evaluation=(copied,), apart_from=own).documents("evaluation"))


def test_no_two_splits_of_the_python_docs_share_a_document() -> None:
    keys = [content_key(document) for split in SPLITS for document in PythonDocs().documents(split)]
    assert len(set(keys)) == len(keys) > 50


def test_how_the_runs_own_files_are_read_is_part_of_what_is_held_out(tmp_path):
    rows = [{"text": f"line {i}", "content": f"other {i}"} for i in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "held.jsonl").write_text("".join(json.dumps({"text": f"other {i}"}) + "\n" for i in range(12)))
    identities = []
    for field, count in (("text", 12), ("content", 4)):
        own = TextFiles(calibration=(tmp_path / "train.jsonl",), field=field)
        source = TextFiles(evaluation=(tmp_path / "held.jsonl",), apart_from=own)
        assert len(list(source.documents("evaluation"))) == count
        identities.append(source.identity())
    assert identities[0] != identities[1] and "apart_from_read_as" not in identities[0]


def test_a_paragraph_in_several_parts_of_a_shared_txt_is_in_the_first(tmp_path: Path) -> None:
    notice, texts = documents(99), [documents(i) for i in range(30)]
    book = txt(tmp_path / "book.txt", [notice, *texts[:9], notice, *texts[9:20], notice, *texts[20:], texts[0]])
    found, aside = read(TextFiles(calibration=(book,), search=(book,), evaluation=(book,)))
    check_apart(found, [notice, *texts])
    assert "\n\n".join(found["calibration"]).split("\n\n").count(notice) == 2, "what repeats in one part stays"
    assert aside == {"calibration": 0, "search": 1, "evaluation": 1}


def test_chats_that_differ_in_what_they_call_are_different(tmp_path: Path) -> None:
    def chat(i: int) -> list[dict[str, object]]:
        return [{"role": "user", "content": "How is the weather?"}, {"role": "assistant", "tool_calls": [{"city": f"town {i}"}]}]

    path = tmp_path / "calls.jsonl"
    path.write_text("".join(json.dumps({"messages": chat(i % 6)}) + "\n" for i in range(12)), encoding="utf-8")
    calls = Calls()
    found, aside = read(TextFiles(calibration=(path,), search=(path,), evaluation=(path,), chat=calls))  # type: ignore[arg-type]
    assert sorted(text for texts in found.values() for text in texts) == [f"town {i}" for i in range(6)]
    assert all(len(texts) == 2 for texts in found.values()) and all(aside.values())


def test_chats_that_differ_in_what_no_template_prints_are_one(tmp_path: Path) -> None:
    for name, day in (("a", 1), ("b", 2)):
        rows = ([{"role": "user", "content": f"Question {i}?", "timestamp": 100 * day + i}] for i in range(6))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))

    class Content(Calls):
        def render(self, messages: list[dict[str, object]], where: str) -> str:
            return str(messages[0]["content"])

    given = {"calibration": (tmp_path / "a.jsonl",), "search": (), "evaluation": (tmp_path / "b.jsonl",)}
    source = TextFiles(**given, chat=Content())  # type: ignore[arg-type]
    texts = [list(source.documents(split)) for split in ("calibration", "evaluation")]
    assert sorted(texts[0] + texts[1]) == [f"Question {i}?" for i in range(6)] and all(texts)


class Calls:
    """Stands for a chat template that prints what is called."""

    digest = "calls"

    def render(self, messages: list[dict[str, object]], where: str) -> str:
        return str(messages[1]["tool_calls"][0]["city"])  # type: ignore[index]
