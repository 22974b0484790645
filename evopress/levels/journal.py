"""The journal of a level database that is being built: a line per finished block, so that a killed build goes on after the last."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from evopress.errors import EvoPressError
from evopress.files import explained, is_sealed, seal, write_bytes
from evopress.json_files import load_bytes, parse_json, shown
from evopress.levels.entries import check_file, check_units
from evopress.levels.store import MANIFEST_BYTES, SCHEMA

logger = logging.getLogger(__name__)
JOURNAL = "journal.jsonl"


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the entries of a journal, those that are cut off, damaged, or of another database or version left out."""
    if not path.is_file():
        return
    for number, line in enumerate(load_bytes(path, limit=MANIFEST_BYTES, what="journal").splitlines(), start=1):
        try:
            entry = parse_json(line, f"line {number} of {path}")
            check_file(entry)
            check_units(entry.get("units"), of_blocks=[entry["block"]])
            if type(entry.get("schema")) is not int or entry["schema"] != SCHEMA:
                raise ValueError(f"it has schema {shown(entry.get('schema'))}, expected {SCHEMA}")
            if not is_sealed(entry) or entry.get("database") != path.parent.name:
                raise ValueError("its content does not match its digest, or it is of another database")
        except (EvoPressError, ValueError) as error:
            logger.info(
                "line %d of %s is cut off, damaged or of another version; its block is built again: %s", number, path, error
            )
            continue
        yield entry


def append(path: Path, entry: dict[str, Any]) -> None:
    """Add a finished block, safe on the disk when this returns."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(journal_line(path, entry))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise explained(error, path) from error


def rewrite_journal(path: Path, entries: Mapping[int, dict[str, Any]]) -> None:
    """Let the journal name just the blocks that are whole."""
    text = "".join(journal_line(path, entries[index]) for index in sorted(entries))
    write_bytes(path, text.encode())


def journal_line(path: Path, entry: Mapping[str, Any]) -> str:
    """Return a line that holds for one database alone, and shows any change of it."""
    return json.dumps(seal({"schema": SCHEMA, "database": path.parent.name, **entry})) + "\n"
