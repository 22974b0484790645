"""Read and write the files of a run folder: `metrics.jsonl`, JSON files and genomes.

A file is replaced as a whole (temporary name, sync, rename) or grows by one synced line, so a run that is killed at any
moment leaves files that can be read.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from evopress.errors import EvoPressError
from evopress.files import explained, is_sealed, seal, sync_folder, write_bytes
from evopress.json_files import check_schema, decode, load_bytes, load_document, load_json, parse_json, shown
from evopress.reporting.dropped_words import is_words, levels_of_words
from evopress.units import Budget, Genome, Space

SCHEMA = 1
"""Version of the files written here; a reader refuses a newer one."""
MAX_GENOME_BYTES = 64 * 2**20
MAX_RECORDS_BYTES = 2**30
_NUMBERS = re.compile(r"\[\n *((?:-?\d[\d.e+-]*|null)(?:,\n *(?:-?\d[\d.e+-]*|null))*)\n *\]")
"""A list of numbers with one on each line; no string of JSON holds a line break."""


def plain(value: Any) -> Any:
    """Return the value as what strict JSON can hold: NaN and infinities become None, NumPy numbers become numbers."""
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # NumPy arrays and booleans
        return plain(value.tolist())
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON: {value!r}")


def write_json(path: str | Path, data: Any, *, sealed: bool = False) -> None:
    """Replace a JSON file as a whole; NaN and infinities are written as null, a list of numbers on one line.

    Args: sealed: an object gets its own digest, so that `read_document` sees any change.

    Raises: EvoPressError if the folder cannot be written to.
    """
    data = seal(plain(data)) if sealed else plain(data)
    text = json.dumps(data, indent=2, allow_nan=False)
    text = _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)
    write_bytes(path, f"{text}\n".encode())


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises: EvoPressError if it is missing, too large, or is not strict JSON.
    """
    return load_json(path)


def read_document(path: str | Path, *, what: str) -> dict[str, Any]:
    """Read a JSON file of a run folder that has a schema number.

    Args: what: what the file should be: "search state".

    Raises: EvoPressError as `read_json`, and if it is no object, of another schema, or another than was written and sealed.
    """
    document = load_document(path, what=what, newest=SCHEMA)
    if "digest" in document and not is_sealed(document):
        raise EvoPressError(f"{path} is damaged, or was changed by hand: restore it, or remove it to make it again")
    return document


def append_record(path: str | Path, record: Mapping[str, Any]) -> None:
    """Append one record as a line to `metrics.jsonl` and sync it to the disk; NaN and infinities are written as null.

    What an interrupted write left behind the last whole record is cut off first.

    Raises: EvoPressError if the file cannot be written to.
    """
    path = Path(path)
    line = (json.dumps(plain(record), allow_nan=False) + "\n").encode()
    try:
        new = not path.exists()
        with open(path, "a+b") as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":
                    line = _mend(path, file) + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        if new:
            sync_folder(path.parent)
    except OSError as error:
        raise explained(error, path) from error


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Read `metrics.jsonl`: one dict per record, none if there is no such file.

    A last line that an interrupted write left unfinished is dropped.

    Raises: EvoPressError if any other line is not a JSON object.
    """
    return list(each_record(path))


def each_record(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield what `read_records` returns, record by record: of many, a list takes several times their file's bytes."""
    return (record for _, record in _lines(Path(path)))


def truncate_records(path: str | Path, generation: int) -> None:
    """Keep only the records up to and including a generation: a resumed run writes the later ones again.

    Raises: EvoPressError if a line is not a record.
    """
    path = Path(path)
    if not path.exists():
        return
    kept = []
    for line, record in _lines(path):
        number = record.get("generation")
        if not isinstance(number, int):
            raise EvoPressError(f"a record of {path} has no generation: move the file away to start a new one")
        if number <= generation:
            kept.append(line + b"\n")
    write_bytes(path, b"".join(kept))


def write_genome(
    path_json: str | Path,
    path_txt: str | Path,
    *,
    space: Space,
    genome: Genome,
    database: str,
    budget: Budget | int,
) -> None:
    """Write a genome as `genome.json` and as `genome.txt`, the `name: level` lines of the authors' code.

    Args:
        database: fingerprint of the level database that the level indices refer to.
        budget: what the genome was allowed to cost.

    Raises: EvoPressError if the genome is not one of the space or a file cannot be written.
    """
    genome = space.check(genome)
    units, levels = space.whole.units, space.unfold(genome)  # a line for each weight, whatever shares a level here
    chosen = [(unit.name, index, unit.levels[index]) for unit, index in zip(units, levels, strict=True)]
    document = {
        "schema": SCHEMA,
        "method": space.method,
        "database": database,
        "units": [{"name": name, "level": index, "label": level.label, "cost": level.cost} for name, index, level in chosen],
        "budget": budget.total if isinstance(budget, Budget) else budget,
        "cost": sum(level.cost for _, _, level in chosen),
    }
    if space.currency is not None:
        document |= {"currency": space.currency.name, "spent": space.cost(genome)}
    write_bytes(path_txt, "".join(f"{name}: {level.key}\n" for name, _, level in chosen).encode())
    write_json(path_json, document)


def read_genome(path: str | Path, space: Space, *, database: str | None = None) -> Genome:
    """Read a genome of a space from `genome.json` or, by any other suffix, from the authors' lines or words.

    Lines are `name: level`, words say what each block drops.

    Units may come in any order. A text file says nothing of its database, so there only names and levels are checked.

    Args:
        database: fingerprint that a JSON file must name; None accepts any database that has such levels, in whatever order.

    Raises: EvoPressError if the file is missing, damaged, too new or too large, or is of other units or levels.
    """
    path, tied = Path(path), space
    space = tied.whole
    data = load_bytes(path, limit=MAX_GENOME_BYTES, what="genome file")
    pairs = (
        _genome_from_json(path, data, space, database) if path.suffix.lower() == ".json" else _genome_from_lines(path, data, space)
    )
    known = {unit.name for unit in space.units}
    levels: dict[str, int] = {}
    for name, level in pairs:
        if name not in known:
            raise EvoPressError(f"{path} names {shown(name)}, which is no unit here: use a genome of this model")
        if name in levels:
            raise EvoPressError(f"{path} names {shown(name)} twice: each unit must have one level; remove one")
        levels[name] = level
    missing = [unit.name for unit in space.units if unit.name not in levels]
    if missing:
        raise EvoPressError(
            f"{path} has no level for {len(missing)} of {len(space)} units (first: {missing[0]}): "
            "use a genome of the same model and method"
        )
    return tied.fold(space.check([levels[unit.name] for unit in space.units]))


def _genome_from_json(path: Path, data: bytes, space: Space, database: str | None) -> Iterator[tuple[str, int]]:
    document = check_schema(parse_json(data, path), path, what="genome file", newest=SCHEMA)
    if document.get("method") != space.method:
        raise EvoPressError(
            f"{path} is a genome of method {shown(document.get('method'))} but this run's method is {space.method!r}: "
            "use the method that it was found with"
        )
    if database is not None and document.get("database") != database:
        raise EvoPressError(
            f"{path} was found with level database {shown(document.get('database'))} but this run uses {database!r}: "
            "build that database (same model, data and method settings) or search again with this one"
        )
    units = document.get("units")
    if not isinstance(units, list):
        raise EvoPressError(f"{path} is damaged: 'units' is not a list; write it again from the run")
    of = {unit.name: unit for unit in space.units}
    total = 0
    for entry in units:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise EvoPressError(f"{path} is damaged: a unit has no name; write it again from the run")
        name, index = entry["name"], entry.get("level")
        if (unit := of.get(name)) is None:
            index = 0  # refused by name
        else:
            label, cost = entry.get("label"), entry.get("cost")
            if database is None and type(index) is int:  # another database may list its levels otherwise
                index = next((i for i, each in enumerate(unit.levels) if (each.label, each.cost) == (label, cost)), index)
            if type(index) is not int or not 0 <= index < len(unit.levels):
                raise EvoPressError(
                    f"{path} gives {name} level {shown(index)}: expected 0 to {len(unit.levels) - 1}, "
                    "so it is of another database; use the one it was found with"
                )
            level = unit.levels[index]
            if label != level.label or cost != level.cost:
                raise EvoPressError(
                    f"{path} says level {index} of {name} is {shown(label)} at cost "
                    f"{shown(cost)} but here it is {level.label!r} at cost {level.cost}: "
                    "use the database that it was found with"
                )
            total += level.cost
        yield name, index
    if document.get("cost") != total:
        raise EvoPressError(
            f"{path} is damaged: it says cost {shown(document.get('cost'))} but its units cost {total}; write it again from the run"
        )
    budget = document.get("budget")
    if type(budget) is not int:
        raise EvoPressError(f"{path} is damaged: its budget is {shown(budget)}, not an integer; write it again")


def _genome_from_lines(path: Path, data: bytes, space: Space) -> Iterator[tuple[str, int]]:
    of = {unit.name: unit for unit in space.units}
    text = decode(data, path)
    if is_words(text):
        yield from levels_of_words(path, text, space)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        name, colon, key = (part.strip() for part in line.rpartition(":"))
        if not colon:
            raise EvoPressError(f"line {number} of {path} is {shown(line)}: expected 'unit name: level'")
        unit = of.get(name)
        level = 0
        if unit is not None:
            keys = [level.key for level in unit.levels]
            if key not in keys:
                raise EvoPressError(f"line {number} of {path} gives {name} level {shown(key)}: this database has {', '.join(keys)}")
            level = keys.index(key)
        yield name, level


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield the whole records of a file of JSON lines, each with its line."""
    if not path.exists():
        return
    *lines, last = load_bytes(path, limit=MAX_RECORDS_BYTES, what="file of records").split(b"\n")
    if last:
        try:
            _parse_record(last, path, len(lines) + 1)
        except EvoPressError:
            pass  # the write was interrupted
        else:
            lines.append(last)
    for number, line in enumerate(lines, start=1):
        if line.strip():
            record = _parse_record(line, path, number)
            if "schema" in record:  # lines of our first runs have none
                check_schema(record, f"line {number} of {path}", what="record", newest=SCHEMA)
            yield line, record


def _mend(path: Path, file: Any) -> bytes:
    """End a file after its last whole record; return the newline that this record may still lack."""
    file.seek(0)
    content = file.read()
    start = content.rfind(b"\n") + 1
    try:
        _parse_record(content[start:], path, 0)
    except EvoPressError:
        file.truncate(start)
        return b""
    return b"\n"


def _parse_record(line: bytes, path: Path, number: int) -> dict[str, Any]:
    record = parse_json(line, f"line {number} of {path}")
    if not isinstance(record, dict):
        raise EvoPressError(f"line {number} of {path} is not a record: move the file away to start a new one")
    return record
