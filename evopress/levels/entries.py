"""What the entries of a manifest or a journal may say, checked before anything of it is believed.

An entry names no path: a block's file has the one name that its number gives it, and lies in the database's own folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from evopress.json_files import shown
from evopress.levels.codec import CODECS, check_meta

_MOST = 2**44
"""Weights, bits or bytes: far above any model's."""
_MOST_BLOCKS = 100_000
_NAME = re.compile(r"[^\x00-\x20\x7f/\\]{1,512}")
_SHA256 = re.compile("[0-9a-f]{64}")


def block_file(index: int) -> str:
    """Name the file of block `index`."""
    return f"block-{index:03d}.safetensors"


def leaves_folder(path: Path, folder: Path) -> bool:
    """Tell whether a file, its links followed, lies outside the folder that it should be in."""
    return path.resolve().parent != folder.resolve()


def check_file(entry: Any) -> None:
    """Raise ValueError unless an entry says block, file, bytes and SHA-256 as `write_block` does."""
    _check_object(entry, "a block's entry")
    block = _integer(entry, "block", most=_MOST_BLOCKS)
    if entry.get("file") != block_file(block):
        raise ValueError(f"block {block} names the file {shown(entry.get('file'))}, expected {block_file(block)}")
    _integer(entry, "bytes", most=_MOST)
    if not isinstance(entry.get("sha256"), str) or not _SHA256.fullmatch(entry["sha256"]):
        raise ValueError(f"block {block} has the SHA-256 {shown(entry.get('sha256'))}, expected 64 hexadecimal digits")


def check_units(units: Any, *, of_blocks: Iterable[int] | None = None) -> None:
    """Raise ValueError unless units and their levels have the names, types and ranges of what we write.

    Args: of_blocks: the blocks that have files, so that their units' levels are stored; None: levels store no weights.
    """
    if not isinstance(units, list):
        raise ValueError(f"its units are {shown(units)}, expected a list")
    stored = None if of_blocks is None else set(of_blocks)
    names: set[str] = set()
    for unit in units:
        _check_object(unit, "a unit")
        name = _string(unit, "name", _NAME)
        if name in names:
            raise ValueError(f"the unit {name} is there twice")
        names.add(name)
        block = _integer(unit, "block", most=_MOST_BLOCKS)
        if stored is not None and block not in stored:
            raise ValueError(f"the unit {name} is of block {block}, which has no file")
        _string(unit, "kind", _NAME)
        _check_levels(name, unit.get("levels"), size=_integer(unit, "size", most=_MOST), stored=stored is not None)


def _check_levels(name: str, levels: Any, *, size: int, stored: bool) -> None:
    if not isinstance(levels, list) or not levels:
        raise ValueError(f"the levels of {name} are {shown(levels)}, expected a list of at least one")
    above = _MOST + 1
    for level in levels:
        _check_object(level, f"a level of {name}")
        _string(level, "key", _NAME)
        if not isinstance(level.get("label"), str):
            raise ValueError(f"a level of {name} has the label {shown(level.get('label'))}, expected text")
        cost = _integer(level, "cost", most=_MOST)
        if cost >= above:
            raise ValueError(f"the costs of {name} do not descend")
        above = cost
        _integer(level, "stored_bits", most=_MOST)
        if stored:
            if not isinstance(level.get("error"), int | float) or isinstance(level["error"], bool):
                raise ValueError(f"a level of {name} has the error {shown(level.get('error'))}, expected a number")
            if not isinstance(level.get("codec"), str) or level["codec"] not in CODECS:
                raise ValueError(f"a level of {name} has the codec {shown(level.get('codec'))}, expected {' or '.join(CODECS)}")
            check_meta(level["codec"], level.get("meta"), size=size)
    if len({level["key"] for level in levels}) < len(levels):
        raise ValueError(f"two levels of {name} have the same key")


def _check_object(value: Any, what: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {shown(value)}, expected an object")


def _integer(of: Mapping[str, Any], key: str, *, most: int) -> int:
    value = of.get(key)
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{key} is {shown(value)}, expected an integer from 0 to {most}")
    return value


def _string(of: Mapping[str, Any], key: str, pattern: re.Pattern[str]) -> str:
    value = of.get(key)
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(f"{key} is {shown(value)}, expected a name without spaces, slashes or control characters")
    return value
