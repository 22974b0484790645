"""`text`: files of one's own, as .txt, .json, .jsonl or .parquet."""

from __future__ import annotations

import glob
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evopress.data.chat import ChatTemplate
from evopress.data.formats import EXPECTED, Row, kind_of, paragraphs, read_rows, read_text, unreadable
from evopress.data.repeats import NOT_COMPARED, SET_ASIDE, Listed, Seen, WholeKey, content_key, deal
from evopress.data.sources import SPLITS, Split, check_split
from evopress.errors import EvoPressError
from evopress.files import given_path, sha256_file

PARAGRAPH_CHARS = 60
"""Paragraphs of a .txt with at least this many characters are compared with the documents and paragraphs of other files."""
_TAKEN = len(SPLITS)
"""Takes documents before the splits: those of `apart_from`."""


@dataclass(frozen=True)
class _File:
    path: Path
    sha256: str
    splits: tuple[int, ...]
    """Positions in SPLITS of those that it is listed for."""

    @property
    def is_txt(self) -> bool:
        return kind_of(self.path) == ".txt"

    @property
    def mask(self) -> int:
        """Its splits as bits."""
        return sum(1 << split for split in self.splits)


@dataclass(frozen=True, kw_only=True)
class TextFiles:
    """Local files, listed by split: paths, folders (all text files in them) or patterns such as "*.jsonl".

    .txt is one document a file, .jsonl one a line, .json one an entry of its array, .parquet one a row. A file listed for several
    splits is divided among them: documents in turn, a .txt at paragraph ends into contiguous parts of about equal length. Files
    are the same if their bytes are. Where several splits list the same document, white space aside, in whatever files, one of
    them gets it; so it is with the paragraphs of .txt that other files have, also inside their documents.
    """

    calibration: tuple[str | Path, ...] = ()
    search: tuple[str | Path, ...] = ()
    evaluation: tuple[str | Path, ...] = ()
    field: str = "text"
    """The field of .json, .jsonl and column of .parquet that holds the text, "outer.inner" inside another."""
    field_key: str = "data.field"
    """The setting that says so."""
    wikitext: bool = False
    """.txt files have WikiText's layout: one paragraph a line, which is joined to the next by a blank line."""
    chat: ChatTemplate | None = None
    """Renders rows that are chats; None refuses them."""
    apart_from: TextFiles | None = None
    """What these calibrate and search on is set aside here."""

    @property
    def name(self) -> str:
        return "text"

    def documents(self, split: Split) -> Iterator[str]:
        """Yield a split's documents, file by file as listed; see `streams`."""
        for pieces in self.streams(split, Counter()):
            yield "".join(pieces)

    def streams(self, split: Split, left_out: Counter[str]) -> Iterator[Iterable[str]]:
        """Yield a split's documents, each in pieces that are to be taken before the next document, and count what is left out.

        Raises: EvoPressError if no file is listed for the split, or one is missing, empty or unreadable.
        """
        check_split(split)
        if not self._files[split]:
            raise EvoPressError(f"data=text has no files for the {split} split: list at least one {EXPECTED}")
        for file in self._files[split]:
            found, before = False, left_out["repeated"]
            read = self._of_txt if file.is_txt else self._of_rows
            for pieces in read(file, SPLITS.index(split), left_out):
                found = True
                yield pieces
            if found:
                continue
            if left_out["repeated"] > before:
                if len(self._files[split]) == 1:
                    raise EvoPressError(
                        f"all documents of {file.path} for the {split} split are duplicates: give that split its own text"
                    )
            elif len(file.splits) == 1:
                raise EvoPressError(f"{file.path} has no text: give a file with at least one document")
            else:
                raise EvoPressError(
                    f"{file.path} has too little text for the {len(file.splits)} splits that share it: give each its own file"
                )

    def identity(self) -> dict[str, Any]:
        """Return name, SHA-256 and division of every file; not its folder, so that files may be moved."""
        rows = any(not file.is_txt for files in self._files.values() for file in files)
        return {
            "kind": self.name,
            "field": self.field,
            "wikitext": self.wikitext,
            "files": {
                split: [
                    {"name": file.path.name, "sha256": file.sha256, "share": [file.splits.index(i), len(file.splits)]}
                    for file in files
                ]
                for i, (split, files) in enumerate(self._files.items())
            },
            **({"by_content": 3} if self._may_repeat else {}),
            **({"apart_from": sorted(file.sha256 for file in self._taken)} if self._taken else {}),
            **self._apart_read_as(),
            **({"chat_template": self.chat.digest} if rows and self.chat and self.chat.digest else {}),
        }

    def _apart_read_as(self) -> dict[str, Any]:
        """Return how the files are read that these documents are apart from, where that is not the ordinary way."""
        other = self.apart_from
        if other is None or not self._taken or (other.field, other.wikitext) == (TextFiles.field, TextFiles.wikitext):
            return {}
        return {"apart_from_read_as": [other.field, other.wikitext]}

    def digests(self, split: Split) -> list[str]:
        """Return the SHA-256 of each file of a split."""
        return [file.sha256 for file in self._files[split]]

    @cached_property
    def _files(self) -> dict[Split, tuple[_File, ...]]:
        listed: dict[Split, dict[str, Path]] = {}
        for split in SPLITS:
            listed[split] = {}
            for given in getattr(self, split):
                expanded = _expanded(given, f"data.{split}")
                for path in expanded:
                    digest = _checked_digest(path)
                    if digest in listed[split] and len(expanded) == 1:
                        raise EvoPressError(f"{path} is listed twice for the {split} split: list each file once")
                    listed[split].setdefault(digest, path)
        return {
            split: tuple(
                _File(path, digest, tuple(i for i, other in enumerate(SPLITS) if digest in listed[other]))
                for digest, path in files.items()
            )
            for split, files in listed.items()
        }

    @cached_property
    def _taken(self) -> tuple[_File, ...]:
        """Files whose documents are set aside here."""
        if self.apart_from is None:
            return ()
        files = {file.sha256: file for split in ("calibration", "search") for file in self.apart_from._files[split]}
        return tuple(_File(file.path, digest, (_TAKEN,)) for digest, file in files.items())

    def _read_as(self, file: _File) -> TextFiles:
        """Return whose field and layout a file has: those of `apart_from` have its own."""
        return self.apart_from if self.apart_from is not None and _TAKEN in file.splits else self

    @cached_property
    def _compared(self) -> dict[str, _File]:
        """All files by digest, each once."""
        return {file.sha256: file for files in (*self._files.values(), self._taken) for file in files}

    @property
    def _may_repeat(self) -> bool:
        """Whether two splits can have the same document."""
        files = self._compared.values()
        return len({split for file in files for split in file.splits}) > 1

    @cached_property
    def _owners(self) -> dict[str, NDArray[np.int8]] | None:
        """The split of each document of a file, of each paragraph of a .txt; None: no two splits can have the same.

        Reads all files once, in bounded memory but for 10 bytes a document, and 16 a long paragraph inside rows beside a .txt.
        """
        if not self._may_repeat:
            return None
        listed, inside, wholes = {}, {}, {}
        mixed = any(file.is_txt for file in self._compared.values())  # rows are compared with
        for digest, file in self._compared.items():
            listed[digest], inside[digest] = Listed(in_turn=not file.is_txt), _Inside()
            mask = file.mask  # of every row
            if file.is_txt:
                whole = WholeKey()
                for paragraph, split in self._placed(file):
                    whole.add(paragraph)
                    long = _is_long(paragraph)
                    listed[digest].add(content_key(paragraph) if long else 0, 1 << split if long else 0)
                wholes[digest] = int(whole)
                continue
            for i, row in enumerate(self._read_as(file)._rows(file)):
                text = row if isinstance(row, str) else "\n".join(map(_said, row or ()))
                blank = not text.strip()
                listed[digest].add(0 if blank else content_key(text), 0 if blank else mask)
                if mixed and not blank:
                    inside[digest].add(i, text)
        owners = deal(listed, first=_TAKEN)
        self._set_aside(owners, listed, inside, wholes)
        return owners

    def _set_aside(
        self,
        owners: Mapping[str, NDArray[np.int8]],
        listed: Mapping[str, Listed],
        inside: Mapping[str, _Inside],
        wholes: Mapping[str, int],
    ) -> None:
        """Set aside what `deal` cannot see: texts that are cut otherwise in another file, and paragraphs inside rows.

        A row that is all of a .txt gives way to it, a .txt to one before it, and paragraphs of a .txt to rows that have them. To
        `apart_from` all give way: rows with more than half of their long paragraphs there.
        """
        files = self._compared
        txts, rows = ([digest for digest, file in files.items() if file.is_txt is kind] for kind in (True, False))
        ours = {digest for digest, file in files.items() if _TAKEN not in file.splits}
        # Of one long paragraph alone `deal` has seen all.
        unseen = [digest for digest in txts if len(listed[digest].masks) != 1 or not listed[digest].masks[0]]
        as_wholes = Seen((np.array([wholes[digest]], np.uint64), np.array([files[digest].mask], np.uint8)) for digest in unseen)
        taken = Seen(listed[digest].compared for digest in txts if digest not in ours)
        for digest in rows:
            if digest in ours:
                own = _bits(owners[digest])
                there = as_wholes.splits(listed[digest].arrays[0])
                owners[digest][(own > 0) & (there & ~own > 0)] = SET_ASIDE
                owners[digest][inside[digest].mostly(taken)] = SET_ASIDE
        taken_rows = Seen(listed[digest].compared for digest in rows if digest not in ours)
        elsewhere = {digest: np.full_like(owners[digest], _TAKEN) for digest in rows if digest not in ours}  # they are dealt
        parts = Seen(inside[digest].kept(elsewhere.get(digest, owners[digest])) for digest in rows)
        before: dict[int, list[str]] = {}  # .txt by their whole keys
        for digest in sorted(txts, key=lambda digest: digest in ours):
            if digest in ours:
                keys, masks = listed[digest].arrays
                owners[digest][(masks > 0) & (parts.splits(keys) & ~masks > 0)] = SET_ASIDE
                alone = files[digest].splits if len(files[digest].splits) == 1 else None
                others = [other for other in before.get(wholes[digest], ()) if files[other].splits != alone]
                others = [other for other in others if other not in ours or (owners[other] != SET_ASIDE).any()]
                # Of what is cut alike `deal` has seen the long paragraphs.
                again = any(listed[other].keys != listed[digest].keys or not masks.any() for other in others)
                if again or (digest in unseen and taken_rows.splits(np.array([wholes[digest]], np.uint64))[0]):
                    owners[digest][:] = SET_ASIDE
            before.setdefault(wholes[digest], []).append(digest)

    def _rows(self, file: _File) -> Iterator[Row]:
        return read_rows(file.path, self.field, key=self.field_key)

    def _of_rows(self, file: _File, split: int, left_out: Counter[str]) -> Iterator[Iterable[str]]:
        """Yield those documents of a file that a split gets."""
        owners = None if self._owners is None else self._owners[file.sha256]
        for i, row in enumerate(self._rows(file)):
            if row is None:
                left_out["null"] += 1
                continue
            if owners is not None:
                owner = file.splits[0] if owners[i] == NOT_COMPARED else owners[i]
                left_out["repeated"] += int(owner == SET_ASIDE)
                if owner != split:
                    continue
            if isinstance(row, list):
                where = f"row {i + 1} of {file.path}"
                if self.chat is None:
                    raise EvoPressError(f"{where} is a chat: name a field of text with {self.field_key}")
                row = self.chat.render(row, where)
            yield (row,)

    def _of_txt(self, file: _File, split: int, left_out: Counter[str]) -> Iterator[Iterable[str]]:
        """Yield the document that a split gets of a .txt, if it gets one."""
        owners = None if self._owners is None else self._owners[file.sha256]
        aside = 0 if owners is None else np.count_nonzero(owners == SET_ASIDE)
        if len(file.splits) == 1 and not aside:
            yield read_text(file.path, wikitext=self.wikitext)
            return
        counts = self._parts(file)[1]
        if not all(counts):  # a part would be empty
            return

        def kept() -> Iterator[str]:
            between = ""
            for i, (paragraph, place) in enumerate(self._placed(file)):
                if owners is not None and owners[i] not in (NOT_COMPARED, place):
                    left_out["repeated"] += int(place == split)
                elif place == split:
                    yield between + paragraph
                    between = "\n\n"

        pieces = kept()
        if first := next(pieces, None):
            yield _after(first, pieces)

    def _placed(self, file: _File) -> Iterator[tuple[str, int]]:
        """Yield the paragraphs of a .txt, each with the split whose part it is in."""
        read = paragraphs(read_text(file.path, wikitext=self._read_as(file).wikitext))
        if len(file.splits) == 1:
            yield from ((paragraph, file.splits[0]) for paragraph in read)
            return
        total, before = self._parts(file)[0], 0
        for paragraph in read:
            yield paragraph, file.splits[_part(before, len(paragraph), total, len(file.splits))]
            before += len(paragraph)

    def _parts(self, file: _File) -> tuple[int, list[int]]:
        """Return the characters in a .txt's paragraphs, and the paragraphs in each of its parts of about equal length."""
        made: dict[str, tuple[int, list[int]]] = self.__dict__.setdefault("_parts_made", {})
        if file.sha256 not in made:
            read = [len(paragraph) for paragraph in paragraphs(read_text(file.path, wikitext=self.wikitext))]
            total, before, counts = sum(read), 0, [0] * len(file.splits)
            for length in read:
                counts[_part(before, length, total, len(file.splits))] += 1
                before += length
            made[file.sha256] = total, counts
        return made[file.sha256]


_SAID_BESIDE = ("name", "reasoning_content", "thinking", "tool_calls", "tool_call_id", "function_call")
"""What templates print of a message beside its role and content."""


def _said(message: Mapping[str, Any]) -> str:
    """Return a chat's message as it is compared: who says what, and calls what."""
    beside = {key: message[key] for key in _SAID_BESIDE if key in message}
    called = f"\n{json.dumps(beside, sort_keys=True, default=str)}" if beside else ""
    return f"{message['role']}: {message.get('content')}{called}"


class _Inside:
    """Long paragraphs inside the rows of a file."""

    def __init__(self) -> None:
        """Begin with none."""
        self._keys, self._rows = array("Q"), array("Q")

    def add(self, row: int, text: str) -> None:
        """Add those of a row, if it has several."""
        found = list(paragraphs([text]))
        for paragraph in found if len(found) > 1 else ():
            if _is_long(paragraph):
                self._keys.append(content_key(paragraph))
                self._rows.append(row)

    def mostly(self, seen: Seen) -> NDArray[np.int64]:
        """Return the rows of whose long paragraphs more than half have been seen."""
        rows = np.asarray(self._rows, np.int64)
        of_row = np.bincount(rows)
        found = np.bincount(rows[seen.splits(np.asarray(self._keys, np.uint64)) > 0], minlength=len(of_row))
        return np.flatnonzero(2 * found > of_row)

    def kept(self, owners: NDArray[np.int8]) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
        """Return their keys, and the split of each, as a bit, for those rows that a split gets."""
        bits = _bits(owners[np.asarray(self._rows, np.int64)])
        return np.asarray(self._keys, np.uint64)[bits > 0], bits[bits > 0]


def _bits(owners: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Return splits as bits of masks; 0 for what no split gets."""
    return np.where(owners >= 0, np.left_shift(1, owners.clip(0)), 0).astype(np.uint8)


def _is_long(paragraph: str) -> bool:
    """Tell whether a paragraph is compared."""
    return len(paragraph) >= PARAGRAPH_CHARS and len(" ".join(paragraph.split())) >= PARAGRAPH_CHARS


def _part(before: int, length: int, total: int, num_parts: int) -> int:
    """Return the part that a paragraph's middle is in."""
    return min(num_parts - 1, int(num_parts * (before + length / 2) / total))


def _after(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _expanded(given: str | Path, key: str) -> list[Path]:
    """Return the files that a path, a folder or a pattern stands for, in the order of their names."""
    path = given_path(given, key)
    if path.is_dir():
        files = sorted(
            file
            for file in path.rglob("*")
            if file.is_file() and kind_of(file) and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
        if not files:
            raise EvoPressError(f"{key}={given} is a folder without text files: expected {EXPECTED} in it")
        return files
    if glob.has_magic(str(path)) and not path.exists():
        files = sorted(Path(found) for found in glob.glob(str(path), recursive=True) if Path(found).is_file())
        if not files:
            raise EvoPressError(f"{key}={given} matches no file: check the pattern and the folder that the command is run in")
        return files
    return [path]


def _checked_digest(path: Path) -> str:
    """Return the SHA-256 of a file that exists, can be read, is not empty and has a suffix we read."""
    try:
        if not path.is_file():
            raise EvoPressError(f"text file {path} does not exist: give the path of a .txt, .jsonl or .parquet file")
        if kind_of(path) is None:
            raise EvoPressError(f"text file {path} has the suffix {path.suffix!r}: expected {EXPECTED}")
        if path.stat().st_size == 0:
            raise EvoPressError(f"text file {path} is empty: give a file with at least one document")
        return sha256_file(path)
    except OSError as error:
        raise unreadable(path, error) from error
