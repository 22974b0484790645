"""`text`: files of one's own, as .txt, .jsonl or .parquet."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from evopress.data.sources import SPLITS, Split, check_split
from evopress.errors import EvoPressError
from evopress.files import given_path, sha256_file
from evopress.json_files import check_extent, clip

_LONGEST_LINE = 256 * 2**20
"""Bytes of one line of .jsonl."""


@dataclass(frozen=True)
class _File:
    path: Path
    sha256: str
    place: int
    """Position of the split among those that share the file."""
    num_shares: int
    """Number of splits that share the file."""


@dataclass(frozen=True, kw_only=True)
class TextFiles:
    """Local files, listed by split.

    .txt is one document a file, .jsonl one a line, .parquet one a row. A file listed for several splits is divided
    among them without overlap: lines and rows in turn, a .txt at paragraph ends into contiguous parts of about equal
    length. Files are the same if their bytes are.
    """

    calibration: tuple[str | Path, ...] = ()
    search: tuple[str | Path, ...] = ()
    evaluation: tuple[str | Path, ...] = ()
    field: str = "text"
    """The field of .jsonl and column of .parquet that holds the text."""
    wikitext: bool = False
    """.txt files have WikiText's layout: one paragraph a line, which is joined to the next by a blank line."""

    @property
    def name(self) -> str:
        return "text"

    def documents(self, split: Split) -> Iterator[str]:
        """Yield a split's documents, file by file as listed.

        Raises: EvoPressError if no file is listed for the split, or one is missing, empty or unreadable.
        """
        check_split(split)
        if not self._files[split]:
            raise EvoPressError(f"data=text has no files for the {split} split: list at least one .txt, .jsonl or .parquet")
        for file in self._files[split]:
            found = False
            for document in self._documents_of(file):
                found = True
                yield document
            if not found:
                if file.num_shares == 1:
                    raise EvoPressError(f"{file.path} has no text: give a file with at least one document")
                raise EvoPressError(
                    f"{file.path} has too little text for the {file.num_shares} splits that share it: give each its own file"
                )

    def identity(self) -> dict[str, Any]:
        """Return name, SHA-256 and division of every file; not its folder, so that files may be moved."""
        return {
            "kind": self.name,
            "field": self.field,
            "wikitext": self.wikitext,
            "files": {
                split: [{"name": file.path.name, "sha256": file.sha256, "share": [file.place, file.num_shares]} for file in files]
                for split, files in self._files.items()
            },
        }

    @cached_property
    def _files(self) -> dict[Split, tuple[_File, ...]]:
        listed: dict[Split, list[tuple[Path, str]]] = {}
        for split in SPLITS:
            listed[split] = []
            for given in getattr(self, split):
                path = given_path(given, f"data.{split}")
                digest = _checked_digest(path)
                if any(digest == other for _, other in listed[split]):
                    raise EvoPressError(f"{path} is listed twice for the {split} split: list each file once")
                listed[split].append((path, digest))
        sharers: dict[str, list[Split]] = {}
        for split, files in listed.items():
            for _, digest in files:
                sharers.setdefault(digest, []).append(split)
        return {
            split: tuple(
                _File(path, digest, place=sharers[digest].index(split), num_shares=len(sharers[digest])) for path, digest in files
            )
            for split, files in listed.items()
        }

    def _documents_of(self, file: _File) -> Iterator[str]:
        if file.path.suffix.lower() == ".txt":
            parts = _parts(_read_txt(file.path, wikitext=self.wikitext), file.num_shares)
            if file.place < len(parts):
                yield parts[file.place]
            return
        read = _READERS[file.path.suffix.lower()]
        yield from islice(read(file.path, self.field), file.place, None, file.num_shares)


def _checked_digest(path: Path) -> str:
    """Return the SHA-256 of a file that exists, can be read, is not empty and has a suffix we read."""
    try:
        if not path.is_file():
            raise EvoPressError(f"text file {path} does not exist: give the path of a .txt, .jsonl or .parquet file")
        if path.suffix.lower() not in (".txt", *_READERS):
            raise EvoPressError(f"text file {path} has the suffix {path.suffix!r}: expected .txt, .jsonl or .parquet")
        if path.stat().st_size == 0:
            raise EvoPressError(f"text file {path} is empty: give a file with at least one document")
        return sha256_file(path)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> EvoPressError:
    return EvoPressError(f"text file {path} cannot be read ({error.strerror or error}): check its name, permissions and disk")


def _named(names: Iterable[str]) -> str:
    """Show the names of fields or columns, however many there are and whatever is in them."""
    return clip(", ".join(islice(names, 32))) or "none"


def _decode(raw: bytes, path: Path, offset: int = 0) -> str:
    try:
        return raw.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        start = offset + error.start + (3 if offset == 0 and raw.startswith(b"\xef\xbb\xbf") else 0)
        raise EvoPressError(f"{path} is not UTF-8 at byte {start}: convert the file to UTF-8") from None


def _read_txt(path: Path, *, wikitext: bool) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    text = _decode(raw, path).replace("\r\n", "\n")
    if not text.strip():
        raise EvoPressError(f"{path} has no text: give a file with at least one document")
    return wikitext_text(text) if wikitext else text


def wikitext_text(text: str) -> str:
    """Return WikiText as perplexity is measured on it: the usual loaders' rows joined by blank lines.

    A row is a line with its newline, or the empty string for a blank line; the original files hold one space there.
    """
    return "\n\n".join(line if line.strip() else "" for line in re.findall(r"[^\n]*\n|[^\n]+", text))


def _parts(text: str, num_parts: int) -> list[str]:
    """Cut text at paragraph ends into contiguous parts of about equal length; fewer if it has too few paragraphs."""
    if num_parts == 1:
        return [text]
    paragraphs = [paragraph for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]
    total, before = sum(map(len, paragraphs)), 0
    parts: list[list[str]] = [[] for _ in range(num_parts)]
    for paragraph in paragraphs:
        middle = before + len(paragraph) / 2
        parts[min(num_parts - 1, int(num_parts * middle / total))].append(paragraph)
        before += len(paragraph)
    if not all(parts):
        return []
    return ["\n\n".join(part) for part in parts]


def _read_jsonl(path: Path, field: str) -> Iterator[str]:
    offset = 0
    for number, raw in enumerate(_raw_lines(path), start=1):
        line = _decode(raw, path, offset)
        offset += len(raw)
        if not line.strip():
            continue
        try:
            check_extent(raw)
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise EvoPressError(f"line {number} of {path} is no JSON object: expected one such as {{{json.dumps(field)}: ...}}")
        if not isinstance(row.get(field), str):
            raise EvoPressError(
                f"line {number} of {path} has no text in the field {field!r} "
                f"(its fields: {_named(row)}): "
                "name the field that holds the text with data.field"
            )
        if not _is_text(row[field]):
            raise EvoPressError(f"line {number} of {path} has half of a surrogate pair in its text: mend the line or leave it out")
        yield row[field]


def _raw_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, none of them longer than memory should hold."""
    try:
        with path.open("rb") as file:
            while raw := file.readline(_LONGEST_LINE + 1):
                if len(raw) > _LONGEST_LINE:
                    raise EvoPressError(f"{path} has a line of more than {_LONGEST_LINE // 2**20} MB: give one document a line")
                yield raw
    except OSError as error:
        raise _unreadable(path, error) from error


def _is_text(text: str) -> bool:
    """Tell whether a string is Unicode text, which any tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise EvoPressError(f"reading {path} needs the package pyarrow: run `pip install pyarrow`") from None
    try:
        with pq.ParquetFile(path) as file:
            column = next((c for c in file.schema_arrow if c.name == field), None)
            if column is None:
                raise EvoPressError(
                    f"{path} has no column {field!r} (its columns: {_named(file.schema_arrow.names)}): "
                    "name the column that holds the text with data.field"
                )
            if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
                raise EvoPressError(f"column {field!r} of {path} holds {clip(str(column.type))}: name a column of strings")
            for batch in file.iter_batches(batch_size=1024, columns=[field]):
                yield from (row or "" for row in batch.column(0).to_pylist())
    except (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        reason = clip(str(error) or type(error).__name__).rstrip(". ")
        raise EvoPressError(f"{path} is no readable Parquet file ({reason}): write it again") from None


_READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
