"""Read JSON that may be damaged, foreign, hostile or of another version: a value, or one sentence.

All JSON of ours is read here. Size, depth and number of values are bounded before the parser sees a file; it then takes strict
JSON alone: no NaN, no infinity (1e999 is one), no key twice in an object.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from evopress.errors import EvoPressError

MAX_BYTES = 256 * 2**20
"""Of one file, where its reader names no other limit."""
MAX_DEPTH = 64
"""Objects and lists inside one another; files of ours have fewer than 10."""
MAX_VALUES = 5_000_000
"""In one document: a few bytes of text can make an object of a hundred."""
_TOKENS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)


def load_json(path: str | Path, *, limit: int = MAX_BYTES, what: str = "JSON file of ours") -> Any:
    """Read a JSON file.

    Args: limit: bytes that the file may have; what: names the kind of file where it has more.

    Raises: EvoPressError if it is missing, no ordinary file, too large, too deep, or not strict JSON.
    """
    return parse_json(load_bytes(path, limit=limit, what=what), path)


def load_document(path: str | Path, *, what: str, newest: int) -> dict[str, Any]:
    """Read a JSON file of ours and check its version: see `load_json` and `check_schema`."""
    return check_schema(load_json(path, what=what), path, what=what, newest=newest)


def check_schema(document: Any, source: str | Path, *, what: str, newest: int) -> dict[str, Any]:
    """Return a document after checking that it is an object of a version that this code reads.

    Args:
        source: the file, for the sentence.
        what: what the file should be: "search state".

    Raises: EvoPressError if it is no object, has no schema number, or one above `newest` or below 1.
    """
    schema = document.get("schema") if isinstance(document, dict) else None
    if type(schema) is not int:
        raise EvoPressError(f"{source} is not a {what}: it has no schema number; give the file that evopress wrote, or remove it")
    if schema > newest:
        raise EvoPressError(
            f"{source} has schema {shown(schema)} but this version of evopress reads up to {newest}: update evopress, or start a "
            "new run folder"
        )
    if schema < 1:
        raise EvoPressError(
            f"{source} has schema {shown(schema)}, older than this version of evopress reads (from 1): remove it, and it is made "
            "again"
        )
    return document


def parse_json(data: bytes, source: str | Path, *, most: int = MAX_VALUES) -> Any:
    """Parse strict JSON in UTF-8, with or without a byte order mark.

    Args: most: values that it may have.

    Raises: EvoPressError that names the source and says what is wrong.
    """
    try:
        text = decode(data, source)
        check_extent(data, most)
        return json.loads(text, object_pairs_hook=_object, parse_float=_finite, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise EvoPressError(f"{source} is not valid JSON ({clip(str(error))}): restore or remove it") from error


def decode(data: bytes, source: str | Path) -> str:
    """Return UTF-8 text without its byte order mark.

    Raises: EvoPressError if it is no UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise EvoPressError(f"{source} is not UTF-8 text (byte {error.start}): restore or remove it") from error


def load_bytes(path: str | Path, *, limit: int = MAX_BYTES, what: str = "file of ours") -> bytes:
    """Read an ordinary file of at most `limit` bytes.

    Raises: EvoPressError if it is missing, no ordinary file, cannot be read, or is larger.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise EvoPressError(f"{path} is not an ordinary file: give the path of a file")
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = getattr(error, "strerror", None) or error
        raise EvoPressError(f"cannot read {path} ({reason}): check the path") from error
    if len(data) > limit:
        raise EvoPressError(f"{path} is larger than {limit // 2**20} MB, which no {what} is: check the path")
    return data


def shown(value: Any) -> str:
    """Show a value from a file in an error: escaped and short."""
    try:
        return clip(repr(value))
    except (ValueError, RecursionError):  # an integer of thousands of digits
        return f"<{type(value).__name__}>"


def clip(text: str, most: int = 100) -> str:
    """Return a text on one line, with nothing that does not print, cut to at most so many characters."""
    text = "".join(character if character.isprintable() else " " for character in text[:most]) + text[most : most + 1]
    return text if len(text) <= most else text[: most - 1] + "…"


def check_extent(data: bytes, most: int = MAX_VALUES) -> None:
    """Raise ValueError if a JSON text is deeper than any of ours, or of more values than `most`; looks at its bytes alone."""
    opened = data.count(b"[") + data.count(b"{")
    if opened + data.count(b",") + data.count(b":") > most:
        raise ValueError(f"it has more than {most} values")
    if opened <= MAX_DEPTH:
        return
    depth = 0
    for match in _TOKENS.finditer(data):
        token = data[match.start()]
        if token in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise ValueError(f"it is more than {MAX_DEPTH} levels deep")
        elif token in b"]}":
            depth -= 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(twice)} is there twice")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{clip(text)} is too large a number")
    return value


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON number")
