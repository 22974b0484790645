"""Kinds of text files: each gives the same documents, packed or not, whatever pieces it is read in."""

from __future__ import annotations

import gzip
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evopress.data import formats
from evopress.data.chat import ChatTemplate
from evopress.data.formats import paragraphs, read_rows, read_text
from evopress.data.text_files import TextFiles
from evopress.errors import EvoPressError
from evopress.models.tiny import byte_tokenizer

TEXTS = ["first", "zweites, äöü “quoted” \\ and \t tab", "third\nwith two lines", "] , [ {"]
CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def packed_zst(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def array_of(rows: list[Any]) -> bytes:
    return json.dumps(rows, indent=2, ensure_ascii=False).encode()


def write_parquet(path: Path, column: Any, name: str = "text") -> Path:
    pq.write_table(pa.table({name: column}), path)
    return path


def as_files(folder: Path, rows: list[Any]) -> Iterator[Path]:
    """Write rows as every kind of file that takes any."""
    contents = {"a.jsonl": lines(rows), "a.json": array_of(rows), "b.json": lines(rows)}
    for name, content in contents.items():
        for suffix, pack in {"": bytes, ".gz": gzip.compress, ".zst": packed_zst}.items():
            path = folder / f"{name}{suffix}"
            path.write_bytes(pack(content))
            yield path


@pytest.fixture(params=[1, 7, 2**20])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(formats, "_CHUNK", request.param)
    return int(request.param)


def test_every_kind_gives_the_same_documents(tmp_path: Path, chunk: int) -> None:
    for path in as_files(tmp_path, [{"n": [1, {"x": "]"}], "text": text} for text in TEXTS]):
        assert list(read_rows(path, "text")) == TEXTS, path.name
    assert list(read_rows(write_parquet(tmp_path / "a.parquet", TEXTS), "text")) == TEXTS


def test_an_array_may_be_of_strings_and_empty(tmp_path: Path, chunk: int) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf " + array_of(TEXTS))
    assert list(read_rows(path, "text")) == TEXTS
    path.write_bytes(b" [ ] ")
    assert list(read_rows(path, "text")) == []


def test_null_rows_are_told_from_empty_ones_in_every_kind(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": None}, None, {"text": ""}, {"text": []}, {"text": "b"}]
    for path in as_files(tmp_path, rows):
        assert list(read_rows(path, "text")) == ["a", None, None, "", None, "b"], path.name
    path = write_parquet(tmp_path / "a.parquet", ["a", None, "", "b"])
    assert list(read_rows(path, "text")) == ["a", None, "", "b"]
    assert list(read_rows(write_parquet(tmp_path / "b.parquet", pa.nulls(3)), "text")) == [None] * 3


def test_null_rows_are_skipped_and_counted(tmp_path: Path) -> None:
    for path in [
        *as_files(tmp_path, [{"text": "a"}, {"text": None}, {"text": "b"}]),
        write_parquet(tmp_path / "a.parquet", ["a", None, "b"]),
    ]:
        left_out: Counter[str] = Counter()
        source = TextFiles(calibration=(path,))
        assert ["".join(pieces) for pieces in source.streams("calibration", left_out)] == ["a", "b"]
        assert +left_out == {"null": 1}, path.name


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["a", "b", "a"]).dictionary_encode(),
        pa.array(["a", "b", "a"], pa.large_string()),
        pa.array(["a", "b", "a"], pa.string_view()),
        pa.array([["a"], ["b"], ["a"]]),
    ],
    ids=["dictionary", "large", "view", "lists"],
)
def test_parquet_columns_of_strings_of_any_kind(column: Any, tmp_path: Path) -> None:
    assert list(read_rows(write_parquet(tmp_path / "a.parquet", column), "text")) == ["a", "b", "a"]


def test_text_inside_other_fields(tmp_path: Path) -> None:
    rows = [{"doc": {"body": "a", "n": 1}}, {"doc": {"body": None, "n": 2}}, {"doc": None}, {"doc": {"body": "b", "n": 3}}]
    paths = [*as_files(tmp_path, rows), write_parquet(tmp_path / "a.parquet", [row["doc"] for row in rows], "doc")]
    for path in paths:
        assert list(read_rows(path, "doc.body")) == ["a", None, None, "b"], path.name
        with pytest.raises(EvoPressError, match=r"'doc\.title'"):
            list(read_rows(path, "doc.title"))
    pq.write_table(pa.table({"doc.body": ["dotted"], "n": [1]}), tmp_path / "b.parquet")
    assert list(read_rows(tmp_path / "b.parquet", "doc.body")) == ["dotted"]


def test_a_list_of_strings_is_one_document_of_paragraphs(tmp_path: Path) -> None:
    for path in as_files(tmp_path, [{"text": ["one", None, "two"]}]):
        assert list(read_rows(path, "text")) == ["one\n\ntwo"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b"[1]", "entry 1 .* no JSON object"),
        ("a.json", b'[{"text": "a"}, {"text": ', "entry 2 .* no JSON"),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', "no JSON array after its entry 1"),
        ("a.json", b'[{"text": "a"}', "no JSON array after its entry 1"),
        ("a.json", b'[{"text": "a"}]\n[{"text": "b"}]', "has data after its JSON array"),
        ("a.json", b'[] {"text": "a"}', "has data after its JSON array"),
        ("a.json", b'{"rows": []}', "line 1 .* field 'text' .*rows"),
        ("a.json", b'["\\ud800"]', "entry 1 .* surrogate"),
        ("a.json", b"[" * 100_000, "entry 1 .* no JSON"),
        ("a.jsonl", b'{"messages": "hello"}\n', "line 1 .* no text in the field 'text'"),
        ("a.jsonl.gz", b"no gzip", "cannot be unpacked"),
        ("a.jsonl.gz", gzip.compress(lines([{"text": "x" * 9999}] * 9), mtime=0)[:-20], "cannot be unpacked"),
        ("a.jsonl.zst", b"no zstd", "cannot be unpacked"),
        ("a.txt.zst", packed_zst(b"some text" * 999)[:-5], "cannot be unpacked"),
        ("a.txt.gz", gzip.compress(b"good \xff bad", mtime=0), "not UTF-8 at byte 5"),
        ("a.txt.gz", gzip.compress(b" \n", mtime=0), "no text"),
        ("a.parquet.gz", gzip.compress(b"PAR1", mtime=0), r"suffix '\.gz'"),
        ("a.gz", gzip.compress(b"text", mtime=0), r"suffix '\.gz'"),
    ],
)
def test_what_cannot_be_read_is_told_in_one_sentence(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(EvoPressError, match=words) as caught:
        list(TextFiles(calibration=(path,)).documents("calibration"))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


# .txt


def test_text_is_the_same_in_any_pieces(tmp_path: Path, chunk: int) -> None:
    text = "\r\n \r\n Title äöü\r\n\r\nbody\rwith €uro 🦊 \r\n\n\n \n end\r"
    for suffix, pack in {"": bytes, ".gz": gzip.compress, ".zst": packed_zst}.items():
        path = tmp_path / f"a.txt{suffix}"
        path.write_bytes(pack(b"\xef\xbb\xbf" + text.encode()))
        assert "".join(read_text(path)) == text.replace("\r\n", "\n")
        assert "".join(read_text(path, wikitext=True)) == "".join(formats._wikitext_pieces([text.replace("\r\n", "\n")]))


@pytest.mark.parametrize("cut", [b"\xff", b"\xe2\x82", b"\xed\xa0\x80"])
def test_the_place_of_what_is_no_utf8_is_exact(cut: bytes, tmp_path: Path, chunk: int) -> None:
    path = tmp_path / "a.txt"
    for mark in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(mark + "gut €".encode() + cut)
        with pytest.raises(EvoPressError, match=f"not UTF-8 at byte {len(mark) + 7}:"):
            list(read_text(path))


def test_paragraphs_are_the_same_in_any_pieces() -> None:
    text = "\n\n one\ntwo \n \t\n\nthree\n\n\n   four \n\n"
    expected = [" one\ntwo ", "three", "   four "]
    for size in range(1, len(text) + 1):
        assert list(paragraphs(text[i : i + size] for i in range(0, len(text), size))) == expected


def test_a_paragraph_without_end_is_cut_at_white_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "LONGEST_PARAGRAPH", 20)
    text = "word " * 50 + "x" * 50
    parts = list(paragraphs(text[i : i + 9] for i in range(0, len(text), 9)))
    assert "".join(parts) == text and max(map(len, parts)) <= 20
    assert all(part.endswith(" ") for part in parts[:12])


# Folders and patterns


def test_folders_and_patterns_are_their_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "data" / "inner").mkdir(parents=True)
    (tmp_path / "data" / ".hidden").mkdir()
    for name in ("b.jsonl", "a.jsonl", "inner/c.jsonl", ".hidden/d.jsonl", ".e.jsonl"):
        (tmp_path / "data" / name).write_bytes(lines([{"text": name}]))
    (tmp_path / "data" / "README.md").write_text("no data")

    def get(given: str) -> list[str]:
        return list(TextFiles(calibration=(tmp_path / given,)).documents("calibration"))

    assert get("data") == ["a.jsonl", "b.jsonl", "inner/c.jsonl"]
    assert get("data/*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert get("data/**/[bc].jsonl") == ["b.jsonl", "inner/c.jsonl"]
    (tmp_path / "[odd].jsonl").write_bytes(lines([{"text": "odd"}]))
    assert get("[odd].jsonl") == ["odd"]
    (tmp_path / "empty").mkdir()
    for given, words in {"empty": "a folder without text files", "data/*.txt": "matches no file", "data/*": "suffix '.md'"}.items():
        with pytest.raises(EvoPressError, match=words):
            get(given)


def test_a_folder_with_the_same_file_twice_has_it_once(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(lines([{"text": "same"}]))
    assert list(TextFiles(calibration=(tmp_path,)).documents("calibration")) == ["same"]


# Chats


def chat_template(given: str | None = "auto", *, own: str | None = TEMPLATE, bos: str | None = None) -> ChatTemplate:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = own
    if bos:
        tokenizer.add_special_tokens({"bos_token": bos})
    return ChatTemplate(lambda: tokenizer, given)


def read_chats(path: Path, chat: ChatTemplate | None, **settings: Any) -> list[str]:
    return list(TextFiles(calibration=(path,), chat=chat, **settings).documents("calibration"))


def test_chats_are_rendered_in_every_kind(tmp_path: Path) -> None:
    rows = [{"messages": CHAT}, {"messages": None}, {"messages": []}, {"text": "plain", "messages": CHAT}]
    for path in as_files(tmp_path, rows):
        assert read_chats(path, chat_template()) == ["<user>Why?<assistant>So.", "plain"], path.name
    path = write_parquet(tmp_path / "a.parquet", [CHAT, None, CHAT[:1]], "messages")
    assert read_chats(path, chat_template()) == ["<user>Why?<assistant>So.", "<user>Why?"]
    path = write_parquet(tmp_path / "b.parquet", [CHAT], "talk")
    assert read_chats(path, chat_template(), field="talk") == ["<user>Why?<assistant>So."]


def test_a_template_may_be_a_file_and_its_bos_is_left_to_the_sequences(tmp_path: Path) -> None:
    path, template = tmp_path / "a.jsonl", tmp_path / "t.jinja"
    path.write_bytes(lines([{"messages": CHAT}]))
    template.write_text("{{ messages | length }} messages")
    assert read_chats(path, chat_template(str(template), own=None)) == ["2 messages"]
    assert read_chats(path, chat_template(bos="Ā")) == ["<user>Why?<assistant>So."]


def test_a_template_that_tells_the_date_tells_the_same_on_any_day(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([{"messages": CHAT}]))
    own = "Today Date: {{ strftime_now('%d %b %Y') }}." + TEMPLATE
    assert read_chats(path, chat_template(own=own)) == ["Today Date: 26 Jul 2024.<user>Why?<assistant>So."]


def fails(message: str) -> str:
    return "{{ raise_exception('" + message + "') }}"


@pytest.mark.parametrize(
    ("chat", "words"),
    [
        (None, "row 2 .* is a chat: name a field"),
        (chat_template(None), r"is a chat, and data\.chat_template is null"),
        (chat_template(own=None), "this tokenizer has no chat template: set data.chat_template=FILE"),
        (chat_template(own=fails("roles must alternate")), "roles must alternate.*: fix the row"),
        (chat_template(own="{{ messages[7].content.x }}"), "cannot be rendered"),
        (chat_template("nowhere.jinja"), "data.chat_template=nowhere.jinja cannot be read"),
    ],
)
def test_a_chat_that_cannot_be_rendered_is_told(chat: ChatTemplate | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([{"text": "plain"}, {"messages": CHAT}]))
    with pytest.raises(EvoPressError, match=words) as caught:
        read_chats(path, chat)
    assert "\n" not in str(caught.value)


def test_half_a_surrogate_pair_in_a_chat_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"messages": [{"role": "user", "content": "a \\ud800"}]}\n')
    with pytest.raises(EvoPressError, match=r"line 1 of .* has an unpaired surrogate"):
        read_chats(path, chat_template())


def test_a_parquet_file_with_one_column_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), path)
    with pytest.raises(EvoPressError, match="has two columns 'text': write it again"):
        list(read_rows(path, "text"))
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array([1]), pa.array([2])], names=["text", "x", "x"]), path)
    assert list(read_rows(path, "text")) == ["a"]


@pytest.mark.parametrize("messages", [[{"content": "no role"}], ["text", {"role": "user"}], {"role": "user"}, [{"role": 3}]])
def test_what_is_no_chat_is_refused(messages: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([{"messages": messages}]))
    with pytest.raises(EvoPressError, match="no text in the field 'text'"):
        read_chats(path, chat_template())


def test_the_identity_knows_the_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([{"messages": CHAT}]))

    def identity(chat: ChatTemplate | None, name: Path = path) -> dict[str, Any]:
        return TextFiles(calibration=(name,), chat=chat).identity()

    assert identity(chat_template()) != identity(chat_template(own=TEMPLATE + "!")) != identity(None)
    assert identity(chat_template(own=None)) == identity(None)
    (tmp_path / "a.txt").write_text("text")
    never: Callable[[], Any] = lambda: pytest.fail("the tokenizer was loaded for a .txt")  # noqa: E731
    assert identity(ChatTemplate(never), tmp_path / "a.txt") == identity(None, tmp_path / "a.txt")


def test_a_long_entry_does_not_slow_down_those_after_it(tmp_path: Path) -> None:
    """Seconds in proportion to the file: what is read is let go of once a piece, not once an entry."""
    texts = ["long " * 400_000, *(f"document number {number}" for number in range(20_000))]
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (tmp_path / "array.json").write_text(json.dumps([{"text": text} for text in texts]))
    seconds = {}
    for name in ("lines.jsonl", "array.json"):
        began = time.perf_counter()
        assert list(read_rows(tmp_path / name, "text")) == texts
        seconds[name] = time.perf_counter() - began
    assert seconds["array.json"] < 1 + 5 * seconds["lines.jsonl"]
