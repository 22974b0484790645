"""The level database on disk: one safetensors file per block, and a manifest that is written last.

    <root>/<model>/<method>-<fingerprint>/block-000.safetensors … manifest.json

While a database is built, `journal.jsonl` has one line per finished block; the manifest replaces it. No manifest, no database.
A block's file is known by its SHA-256, the manifest and each line of the journal by a digest of their own, a whole database by the
fingerprint in its folder's name: what a disk, a crash or a hand has changed or exchanged is never taken for what was written.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from evopress.compress.compressor import Compressed, Payload
from evopress.compress.gguf_levels import GGUFWeight
from evopress.compress.gptq import Dense, Quantized
from evopress.compress.sparse import Sparse
from evopress.currencies import Currency
from evopress.endings import is_out_of_memory, os_error
from evopress.errors import EvoPressError
from evopress.files import canonical_json, is_read_only, is_sealed, seal, sha256_file, unreadable, write_atomically, write_bytes
from evopress.json_files import parse_json, shown
from evopress.levels.codec import CODECS
from evopress.levels.entries import block_file, check_file, check_units, leaves_folder
from evopress.units import Level, Space, Unit

SCHEMA = 1
MANIFEST = "manifest.json"
_SOURCES = {Quantized.codec: "quant", Dense.codec: "quant", GGUFWeight.codec: "quant", Sparse.codec: "sparsity"}
"""Codec to what makes levels of it; modules that are dropped have none."""
MANIFEST_BYTES = 2**30
"""Of a manifest, or a journal. A mixture of experts may have a million levels, of some 20 values and 300 bytes each."""
_MANIFEST_VALUES = 50_000_000
Encoded = tuple[dict[str, Tensor], list[dict[str, Any]]]
"""What a block's file has of some units: tensors on the host, and a record for each unit."""


class DamagedDatabaseError(EvoPressError):
    """A database whose files do not match its manifest."""


class NewerDatabaseError(EvoPressError):
    """A database of a later version, not to be touched."""


def damage_in(folder: Path, error: DamagedDatabaseError) -> DamagedDatabaseError | None:
    """Return what was found of a folder if it is damage; None: there is no whole database yet."""
    return error if os.path.lexists(folder / MANIFEST) else None


@contextmanager
def told_of(damage: DamagedDatabaseError | None) -> Iterator[None]:
    """Let a refusal to write to a place that may only be read say first that the database there is damaged."""
    try:
        yield
    except EvoPressError as error:
        if damage is None or not is_read_only(error):
            raise
        raise EvoPressError(f"{damage}, and it cannot be built again: {error}") from error


def fingerprint(recipe: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits that stand for everything that decides a database's content."""
    return hashlib.sha256(canonical_json({"schema": SCHEMA, **recipe}).encode()).hexdigest()[:16]


def fingerprint_in(folder: Path) -> str | None:
    """Return the fingerprint that a folder's name ends with, if it does."""
    named = re.search(r"-([0-9a-f]{16})$", folder.name)
    return named[1] if named else None


def encoded(compressed: Mapping[str, list[Compressed]], units: Mapping[str, Unit]) -> Encoded:
    """Return what a block's file has of some units."""
    tensors: dict[str, Tensor] = {}
    records = []
    for name, results in compressed.items():
        levels = []
        for level, result in zip(units[name].levels, results, strict=True):
            codec = CODECS[result.payload.codec]
            parts, meta = codec.encode(result.payload)
            tensors |= {_key(name, level.key, part): tensor.cpu().contiguous() for part, tensor in parts.items()}
            levels.append(
                {
                    "label": level.label,
                    "key": level.key,
                    "cost": level.cost,
                    "stored_bits": level.stored_bits,
                    "error": result.error,
                    "damping": result.damping,
                    "codec": result.payload.codec,
                    "meta": meta,
                }
            )
        unit = units[name]
        records.append({"name": name, "block": unit.block, "kind": unit.kind, "size": unit.size, "levels": levels})
    return tensors, records


def write_block(folder: Path, index: int, parts: Sequence[Encoded], order: Sequence[str]) -> dict[str, Any]:
    """Write one block's file and return its manifest entry: file, bytes, SHA-256 and one record per unit, in this order.

    Args: parts: what `encoded` returned of some of its units each.
    """
    path = folder / block_file(index)
    tensors = {key: tensor for those, _ in parts for key, tensor in those.items()}
    records = sorted((record for _, those in parts for record in those), key=lambda record: order.index(record["name"]))
    # No metadata: safetensors does not keep its order, and equal content must be equal bytes.
    write_atomically(path, lambda temporary: save_tensors(tensors, temporary))
    return {"block": index, "file": path.name, "bytes": path.stat().st_size, "sha256": sha256_file(path), "units": records}


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file that others may read as they may any new file; errors of the disk are OSErrors."""
    path.touch()
    mode = path.stat().st_mode  # safetensors puts a file in its place that only the owner can read
    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:
        raise os_error(error) from error
    path.chmod(mode)


def _key(unit: str, level: str, part: str) -> str:
    return f"{unit}/{level}/{part}"


def check_block(folder: Path, entry: Mapping[str, Any]) -> None:
    """Raise DamagedDatabaseError unless a block's file has its entry's size and SHA-256; EvoPressError if it cannot be read."""
    path = folder / block_file(int(entry["block"]))
    if path.name != entry["file"]:
        raise DamagedDatabaseError(f"{folder} names {entry['file']!r} for block {entry['block']}, expected {path.name}")
    try:
        if not path.is_file():
            raise DamagedDatabaseError(f"{path} is missing")
        if leaves_folder(path, folder):
            raise DamagedDatabaseError(f"{path} is a link out of its folder")
        if path.stat().st_size != entry["bytes"]:
            raise DamagedDatabaseError(f"{path} has {path.stat().st_size} bytes, expected {entry['bytes']}")
        if sha256_file(path) != entry["sha256"]:
            raise DamagedDatabaseError(f"{path} is damaged: its SHA-256 differs from the manifest's")
    except OSError as error:  # not damage: the next read may succeed
        raise unreadable(error, path) from error


def write_manifest(
    folder: Path,
    *,
    method: str,
    fingerprint: str,
    recipe: Mapping[str, Any],
    entries: list[dict[str, Any]],
    further: Mapping[str, Any] | None = None,
) -> None:
    """Write the manifest; from here on the database is there. Entries without a file are of levels that store no weights.

    Args: further: what else it says, under keys of its own.
    """
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "method": method,
        "fingerprint": fingerprint,
        "recipe": recipe,
        "files": [{key: entry[key] for key in ("block", "file", "bytes", "sha256")} for entry in entries if "file" in entry],
        "units": [unit for entry in entries for unit in entry["units"]],
        **(further or {}),
    }
    text = json.dumps(seal(manifest), indent=1, sort_keys=True) + "\n"
    write_bytes(folder / MANIFEST, text.encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check a manifest: its form, its digest, and that it is the one that the folder's name means.

    Raises: EvoPressError for a newer schema, or one that cannot be read; DamagedDatabaseError for one that is missing, damaged, of
        another database, or no manifest of ours.
    """
    path = folder / MANIFEST
    try:
        with path.open("rb") as file:
            data = file.read(MANIFEST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedDatabaseError(f"{path} is missing") from None
    except OSError as error:
        raise unreadable(error, path) from error
    if len(data) > MANIFEST_BYTES:
        raise DamagedDatabaseError(f"{path} is larger than {MANIFEST_BYTES} bytes")
    try:
        manifest = parse_json(data, "its content", most=_MANIFEST_VALUES)
        schema = manifest["schema"] if isinstance(manifest, dict) and "schema" in manifest else None
        # A newer version's digest is over its own schema number; a digest that fits ours says that the number is what was damaged.
        if isinstance(schema, int) and schema > SCHEMA and not is_sealed({**manifest, "schema": SCHEMA}):
            raise NewerDatabaseError(
                f"{path} has schema {schema}, this version reads up to {SCHEMA}: update evopress or rebuild elsewhere"
            )
        if type(schema) is not int or schema != SCHEMA:
            raise DamagedDatabaseError(f"{path} has schema {shown(schema)}, expected {SCHEMA}")
        if not is_sealed(manifest):
            raise DamagedDatabaseError(f"{path} is damaged: its content does not match its digest")
        _check_form(manifest)
    except (NewerDatabaseError, DamagedDatabaseError):
        raise
    except (EvoPressError, ValueError) as error:
        raise DamagedDatabaseError(f"{path} is damaged: {error}") from error
    if fingerprint_in(folder) not in (None, manifest["fingerprint"]):
        raise DamagedDatabaseError(f"{path} is of another database, {manifest['fingerprint']!r}")
    return manifest


def _check_form(manifest: Mapping[str, Any]) -> None:
    """Raise ValueError unless a manifest says what `write_manifest` does."""
    texts = all(isinstance(manifest.get(key), str) for key in ("method", "fingerprint"))
    if not texts or not isinstance(manifest.get("recipe"), dict):
        raise ValueError("it has no method, no fingerprint or no recipe")
    files = manifest.get("files")
    if not isinstance(files, list):
        raise ValueError(f"its files are {shown(files)}, expected a list")
    for entry in files:
        check_file(entry)
    check_units(manifest.get("units"), of_blocks=[entry["block"] for entry in files] or None)
    space_of(manifest)


def entries_of(manifest: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Return the entries that `write_block` made, by block."""
    return {
        file["block"]: {**file, "units": [unit for unit in manifest["units"] if unit["block"] == file["block"]]}
        for file in manifest["files"]
    }


def space_of(manifest: Mapping[str, Any]) -> Space:
    """Return the manifest's units and levels."""
    units = tuple(
        Unit(
            name=str(unit["name"]),
            block=int(unit["block"]),
            kind=str(unit["kind"]),
            size=int(unit["size"]),
            levels=tuple(
                Level(str(v["label"]), int(v["cost"]), str(v["key"]), int(v["stored_bits"]), _SOURCES.get(v.get("codec"), "drop"))
                for v in unit["levels"]
            ),
        )
        for unit in manifest["units"]
    )
    return Space(method=str(manifest["method"]), units=units)


@dataclass(frozen=True)
class LevelDatabase:
    """An opened, verified level database."""

    folder: Path
    manifest: dict[str, Any]
    currency: Currency | None = None
    """What its space is priced in; None: what its levels count by themselves."""

    @classmethod
    def open(cls, folder: Path) -> LevelDatabase:
        """Open a database and check every file against the manifest.

        Raises: DamagedDatabaseError that names the file; EvoPressError for a newer schema.
        """
        manifest = read_manifest(folder)
        for entry in manifest["files"]:
            check_block(folder, entry)
        return cls(folder, manifest)

    @property
    def fingerprint(self) -> str:
        return str(self.manifest["fingerprint"])

    @cached_property
    def space(self) -> Space:
        return space_of(self.manifest).priced(self.currency)

    @property
    def recipe(self) -> dict[str, Any]:
        """What decides its content."""
        recipe: dict[str, Any] = self.manifest["recipe"]
        return recipe

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of all block files and the manifest."""
        return sum(entry["bytes"] for entry in self.manifest["files"]) + (self.folder / MANIFEST).stat().st_size

    @cached_property
    def errors(self) -> list[list[float]]:
        """Relative output error of every unit at every level, in database order; 0 where modules are kept or dropped."""
        return [[float(level.get("error", 0.0)) for level in unit["levels"]] for unit in self.manifest["units"]]

    @cached_property
    def _files(self) -> dict[int, Any]:
        return {}

    def read(self, unit: int, level: int, device: torch.device | str = "cpu") -> Payload:
        """Read unit `unit` at level `level`, both indices in database order, packed to a device, where it is unpacked."""
        record = self.manifest["units"][unit]
        stored = record["levels"][level]
        block = record["block"]
        path = self.folder / block_file(block)
        try:
            if block not in self._files:
                self._files[block] = safe_open(path, framework="pt")
            file = self._files[block]
            level_of = _key(record["name"], stored["key"], "")
            tensors = {part: file.get_tensor(level_of + part).to(device) for part in self._parts(block).get(level_of, [])}
            return CODECS[stored["codec"]].decode(tensors, stored["meta"])
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise DamagedDatabaseError(f"{path} cannot be read ({error}): start again, the file is then rebuilt") from error

    @cached_property
    def _parts_of(self) -> dict[int, dict[str, list[str]]]:
        return {}

    def _parts(self, block: int) -> dict[str, list[str]]:
        """Return the parts that a block's file has of each level of its units: a mixture of experts has thousands of them."""
        if block not in self._parts_of:
            found: dict[str, list[str]] = {}
            for key in self._files[block].keys():  # noqa: SIM118  (a safetensors file is no mapping)
                level_of, slash, part = key.rpartition("/")
                found.setdefault(level_of + slash, []).append(part)
            self._parts_of[block] = found
        return self._parts_of[block]
