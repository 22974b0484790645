"""Read text files of many kinds in pieces: .txt, .json, .jsonl and .parquet, the first three also packed by gzip or zstd."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from codecs import getincrementaldecoder
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

from evopress.errors import EvoPressError
from evopress.json_files import check_extent, clip

KINDS = (".txt", ".json", ".jsonl", ".parquet")
_PACKED = (".gz", ".zst")
EXPECTED = ".txt, .json, .jsonl (also .gz, .zst) or .parquet"
CHAT_FIELD = "messages"
_CHUNK = 2**20
"""Bytes read at a time."""
LONGEST_PARAGRAPH = 2**20
"""Characters; what is longer is taken in parts that end at white space."""
_LONGEST_LINE = 256 * 2**20
"""Bytes of one line of .jsonl, characters of one entry of .json."""
_GAP = re.compile(r"\n\s*\n")

Row = str | list[dict[str, Any]] | None
"""A document: text, the messages of a chat, or nothing where the row is null."""


def kind_of(path: Path) -> str | None:
    """Return .txt, .json, .jsonl or .parquet by a file's name, packed or not; None: it is of no kind that is read."""
    name, packed = path.name.lower(), False
    for suffix in _PACKED:
        if name.endswith(suffix):
            name, packed = name.removesuffix(suffix), True
    kind = Path(name).suffix
    return kind if kind in KINDS and not (packed and kind == ".parquet") else None


def read_rows(path: Path, field: str, *, key: str = "data.field") -> Iterator[Row]:
    """Yield the documents of a file of rows in their order, None for each that is null.

    Args:
        field: what holds the text, "outer.inner" inside another; where it is not there, `messages` is a chat.
        key: the setting that names the field.

    Raises: EvoPressError that names the row, if it has no text or the file cannot be read.
    """
    kind = kind_of(path)
    if kind == ".parquet":
        return _parquet_rows(path, field, key)
    return _array_rows(path, field, key) if kind == ".json" and _begins_array(path) else _line_rows(path, field, key)


def read_text(path: Path, *, wikitext: bool = False) -> Iterator[str]:
    """Yield the text of a .txt in pieces; line ends are "\\n".

    Args: wikitext: the file has WikiText's layout, see `_wikitext_pieces`.

    Raises: EvoPressError if it has nothing but white space, is not UTF-8 or cannot be read.
    """
    start, chunks = "", _text_chunks(path)
    for chunk in chunks:
        start += chunk
        if start.strip():
            break
    else:
        raise EvoPressError(f"{path} has no text: give a file with at least one document")

    def pieces() -> Iterator[str]:
        yield start
        yield from chunks

    yield from _wikitext_pieces(pieces()) if wikitext else pieces()


def paragraphs(pieces: Iterable[str]) -> Iterator[str]:
    """Yield what lies between blank lines, in bounded memory: one that is very long comes in parts that end at white space."""
    rest = ""
    for piece in pieces:
        rest += piece
        start = 0
        for gap in _GAP.finditer(rest, 0, len(rest.rstrip())):  # white space at the end may go on in the next piece
            yield from _not_blank(rest[start : gap.start()])
            start = gap.end()
        rest = rest[start:]
        while len(rest) > LONGEST_PARAGRAPH:
            window = rest[:LONGEST_PARAGRAPH]
            cut = max(map(window.rfind, " \n\t")) + 1 or LONGEST_PARAGRAPH
            yield from _not_blank(rest[:cut])
            rest = rest[cut:]
    for paragraph in _GAP.split(rest):
        yield from _not_blank(paragraph)


def unreadable(path: Path, error: OSError) -> EvoPressError:
    """Turn an operating system's error on reading a text file into one sentence."""
    return EvoPressError(f"text file {path} cannot be read ({error.strerror or error}): check its name, permissions and disk")


def _not_blank(text: str) -> Iterator[str]:
    if text.strip():
        yield text


def _wikitext_pieces(pieces: Iterable[str]) -> Iterator[str]:
    """Join lines by blank lines, a blank line counting as an empty one: so the usual loaders' rows are joined for perplexity."""
    rest, between = "", ""
    for piece in pieces:
        *lines, rest = re.split(r"(?<=\n)", rest + piece)
        for line in lines:
            yield between + (line if line.strip() else "")
            between = "\n\n"
    if rest:
        yield between + (rest if rest.strip() else "")


# Bytes and characters


def _open(path: Path) -> IO[bytes] | gzip.GzipFile:
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rb")
    if path.name.lower().endswith(".zst"):
        stream: IO[bytes] = _pyarrow(path).input_stream(str(path), compression="zstd")
        return stream
    return path.open("rb")


def _byte_chunks(path: Path) -> Iterator[bytes]:
    try:
        with _open(path) as file:
            while chunk := file.read(_CHUNK):
                yield chunk
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged(path, error) from None
    except OSError as error:
        if error.errno is None:  # of the unpacking
            raise _damaged(path, error) from None
        raise unreadable(path, error) from error


def _damaged(path: Path, error: Exception) -> EvoPressError:
    reason = clip(str(error) or type(error).__name__).rstrip(". ")
    return EvoPressError(f"{path} cannot be unpacked ({reason}): write it again")


def _text_chunks(path: Path) -> Iterator[str]:
    """Yield the characters of a UTF-8 file, without its byte order mark, line ends as newlines."""
    decoder, offset, held, start = getincrementaldecoder("utf-8")(), 0, "", True
    for chunk in _byte_chunks(path):
        text, offset = _decoded(decoder, chunk, path, offset), offset + len(chunk)
        if start and text:
            text, start = text.removeprefix("\ufeff"), False
        text = held + text
        held = "\r" if text.endswith("\r") else ""
        yield text.removesuffix("\r").replace("\r\n", "\n")
    yield held + _decoded(decoder, b"", path, offset, final=True)


def _decoded(decoder: Any, chunk: bytes, path: Path, offset: int, *, final: bool = False) -> str:
    pending = len(decoder.getstate()[0])
    try:
        text: str = decoder.decode(chunk, final)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, offset - pending + error.start) from None
    return text


def _not_utf8(path: Path, place: int) -> EvoPressError:
    return EvoPressError(f"{path} is not UTF-8 at byte {place}: convert the file to UTF-8")


def _raw_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, none of them longer than memory should hold."""
    parts: list[bytes] = []
    for chunk in _byte_chunks(path):
        for line in re.findall(rb"[^\n]*\n|[^\n]+", chunk):
            parts.append(line)
            if sum(map(len, parts)) > _LONGEST_LINE:
                raise EvoPressError(f"{path} has a line of more than {_LONGEST_LINE // 2**20} MB: give one document a line")
            if line.endswith(b"\n"):
                yield b"".join(parts)
                parts.clear()
    if parts:
        yield b"".join(parts)


# Rows


def _line_rows(path: Path, field: str, key: str) -> Iterator[Row]:
    offset = 0
    for number, raw in enumerate(_raw_lines(path), start=1):
        try:
            line = raw.decode("utf-8-sig" if offset == 0 else "utf-8")
        except UnicodeDecodeError as error:
            mark = 3 if offset == 0 and raw.startswith(b"\xef\xbb\xbf") else 0
            raise _not_utf8(path, offset + error.start + mark) from None
        offset += len(raw)
        if not line.strip():
            continue
        where = f"line {number} of {path}"
        try:
            check_extent(raw)
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = False
        if row is not None and not isinstance(row, dict):
            raise EvoPressError(f"{where} is no JSON object: expected one such as {{{json.dumps(field)}: ...}}")
        yield None if row is None else _document(row, field, where, key)


def _begins_array(path: Path) -> bool:
    start = next((text for chunk in _text_chunks(path) if (text := chunk.strip())), "")
    return start.startswith("[")


def _array_rows(path: Path, field: str, key: str) -> Iterator[Row]:
    for number, entry in enumerate(_entries(path), start=1):
        where = f"entry {number} of {path}"
        if entry is None or isinstance(entry, str):
            yield None if entry is None else _text(entry, where)
        elif isinstance(entry, dict):
            yield _document(entry, field, where, key)
        else:
            raise EvoPressError(f"{where} is no JSON object: expected one such as {{{json.dumps(field)}: ...}}")


def _entries(path: Path) -> Iterator[Any]:
    """Yield the values in the array that a JSON file is, holding little more than one of them at a time."""
    decoder, chunks, buffer, place, number = json.JSONDecoder(), _text_chunks(path), "", 0, 0
    end_of = re.compile(r"\s*([\[,\]])\s*")

    def more() -> bool:
        """Let go of what is read, and read as much again as is left."""
        nonlocal buffer, place
        left = len(buffer) - place
        parts = [buffer[place:]]
        while sum(map(len, parts)) <= min(2 * left, _LONGEST_LINE) and (chunk := next(chunks, None)) is not None:
            parts.append(chunk)
        buffer, place = "".join(parts), 0
        return len(buffer) > left

    more()
    while True:
        mark = end_of.match(buffer, place)
        while (mark is None or mark.end() == len(buffer)) and more():
            mark = end_of.match(buffer, place)
        if mark is None or (mark[1] == "[") != (number == 0):
            raise EvoPressError(f"{path} is no JSON array after its entry {number}: write it again")
        if mark[1] == "]" or (number == 0 and buffer.startswith("]", mark.end())):
            rest = buffer[mark.end() :].lstrip().removeprefix("]" if mark[1] == "[" else "").strip()
            if rest or any(chunk.strip() for chunk in chunks):
                raise EvoPressError(
                    f"{path} has data after its JSON array: put all documents into the array, or write one a line (.jsonl)"
                )
            return
        place, number = mark.end(), number + 1
        while True:
            try:
                entry, place = decoder.raw_decode(buffer, place)
                break
            except (ValueError, RecursionError):
                if not more():
                    raise EvoPressError(f"entry {number} of {path} is no JSON: write the file again") from None
        yield entry


def _parquet_rows(path: Path, field: str, key: str) -> Iterator[Row]:
    pa = _pyarrow(path)
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            name = field if field in schema.names else field.split(".")[0]
            if name not in schema.names and CHAT_FIELD in schema.names:
                name = field = CHAT_FIELD
            if schema.names.count(name) > 1:
                raise EvoPressError(f"{path} has two columns {name!r}: write it again with one of each")
            leaf = (
                _leaf(schema.field(name).type, field if name == field else field.partition(".")[2], name)
                if name in schema.names
                else None
            )
            if leaf is None:
                raise EvoPressError(
                    f"{path} has no column {field!r} (its columns: {_named(schema.names)}): "
                    f"name the column that holds the text with {key}"
                )
            if not _holds_text(leaf):
                raise EvoPressError(f"column {field!r} of {path} holds {clip(str(leaf))}: name a column of strings")
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=[name]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield _document({name: value}, field, f"row {number} of {path}", key)
    except (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        reason = clip(str(error) or type(error).__name__).rstrip(". ")
        raise EvoPressError(f"{path} is no readable Parquet file ({reason}): write it again") from None


def _leaf(kind: Any, inner: str, name: str) -> Any:
    """Return the type of a field inside a column's structs; None if it is not there."""
    import pyarrow as pa

    if inner == name:
        return kind
    for part in inner.split("."):
        if not pa.types.is_struct(kind) or kind.get_field_index(part) < 0:
            return None
        kind = kind.field(part).type
    return kind


def _holds_text(kind: Any) -> bool:
    """Tell whether values of a type are strings, in a dictionary or not, lists of them, or chats."""
    import pyarrow as pa

    types = pa.types
    if types.is_list(kind) or types.is_large_list(kind):
        kind = kind.value_type
        if types.is_struct(kind):
            return bool(kind.get_field_index("role") >= 0)
    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_null(kind))


def _document(row: dict[str, Any], field: str, where: str, key: str) -> Row:
    """Return what a row holds in a field: text, several texts as paragraphs, a chat, or None for null."""
    found, value = _value(row, field)
    if not found and isinstance(row.get(CHAT_FIELD, ""), list | None):
        found, value = True, row[CHAT_FIELD]
    if found and (value is None or value == []):
        return None
    if isinstance(value, str):
        return _text(value, where)
    if isinstance(value, list) and all(isinstance(part, str | None) for part in value):
        return _text("\n\n".join(part for part in value if part is not None), where)
    if isinstance(value, list) and all(isinstance(part, dict) and isinstance(part.get("role"), str) for part in value):
        _text(json.dumps(value, ensure_ascii=False, default=str), where)
        return [{key: said for key, said in message.items() if said is not None} for message in value]
    raise EvoPressError(
        f"{where} has no text in the field {field!r} (its fields: {_named(row)}): name the field that holds the text with {key}"
    )


def _value(row: dict[str, Any], field: str) -> tuple[bool, Any]:
    """Find a field, inside others where it is named so; an object that is null has null inside."""
    if field in row:
        return True, row[field]
    value: Any = row
    for part in field.split("."):
        if value is None:
            return True, None
        if not isinstance(value, dict) or part not in value:
            return False, None
        value = value[part]
    return True, value


def _text(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise EvoPressError(f"{where} has an unpaired surrogate in its text: fix the line or leave it out") from None
    return text


def _named(names: Iterable[str]) -> str:
    """Show the names of fields or columns, however many there are and whatever is in them."""
    return clip(", ".join(islice(names, 32))) or "none"


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise EvoPressError(f"reading {path} needs the package pyarrow: run `pip install pyarrow`") from None
    return pyarrow
