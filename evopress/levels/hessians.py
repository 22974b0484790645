"""Hessians kept on disk, so that further levels of the same model and text need no forward pass.

They are those of dense activations: levels that activations do not propagate through never change them. One folder per model, dtype
and calibration text; one file per block.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from evopress.errors import EvoPressError
from evopress.files import is_sealed, make_folder, seal, sha256_file, write_atomically, write_bytes
from evopress.json_files import load_document
from evopress.levels.entries import leaves_folder
from evopress.levels.locking import alone_in
from evopress.levels.store import fingerprint_in, save_tensors

logger = logging.getLogger(__name__)
_SCHEMA = 1
_TEMPORARIES = (".block-*.tmp", ".tmp*")
"""Not those of activations, which another process may be about to map."""


@dataclass(frozen=True)
class BlockHessians:
    """One block's Hessians, one for each distinct input."""

    owners: dict[str, str]
    """Unit name to the unit whose Hessian it shares."""
    hessians: dict[str, Tensor]
    """Owner to H, float32 [C, C], undamped."""


@dataclass(frozen=True)
class HessianStore:
    """A folder of Hessians."""

    folder: Path

    def __contains__(self, index: int) -> bool:
        """Tell whether block `index`'s Hessians are there and whole."""
        record, path = self._record(index), self._file(index)
        if record is None:
            return False
        try:
            whole = sha256_file(path) == record["sha256"]
        except OSError as error:
            logger.warning("%s cannot be read (%s); its Hessians are computed again", path, error.strerror or error)
            return False
        if not whole:
            logger.warning("%s is damaged; its Hessians are computed again", path)
        return whole

    def has_record(self, index: int) -> bool:
        """Tell whether block `index`'s Hessians seem to be there; does not look into the file."""
        return self._record(index) is not None

    def read(self, index: int) -> BlockHessians:
        """Return block `index`'s Hessians on the host; the block must be in the store.

        Raises: EvoPressError if its file is whole but holds something else.
        """
        record, path = self._record(index), self._file(index)
        assert record is not None, f"block {index} is not in {self.folder}"
        owners: dict[str, str] = record["owners"]
        try:
            with safe_open(path, framework="pt") as file:
                for owner in set(owners.values()):
                    part = file.get_slice(owner)
                    shape = part.get_shape()
                    if part.get_dtype() != "F32" or len(shape) != 2 or shape[0] != shape[1]:
                        raise SafetensorError(f"{owner} is {part.get_dtype()} {shape}, expected a square of float32")
            return BlockHessians(dict(owners), load_file(path))
        except (OSError, SafetensorError) as error:
            raise EvoPressError(
                f"{path} holds no Hessians ({error}): remove {self.folder}, they are then computed again"
            ) from error

    def write(self, index: int, block: BlockHessians) -> None:
        """Keep block `index`'s Hessians; the record that makes them count is written last.

        Raises: EvoPressError if they cannot be written, or another process never stops writing to the store.
        """
        make_folder(self.folder)
        path = self._file(index)
        tensors = {owner: H.cpu().contiguous() for owner, H in block.hessians.items()}
        with alone_in(self.folder, temporaries=_TEMPORARIES):
            write_atomically(path, lambda temporary: save_tensors(tensors, temporary))
            record = {"schema": _SCHEMA, "store": fingerprint_in(self.folder), "block": index, "owners": block.owners}
            text = json.dumps(seal({**record, "sha256": sha256_file(path)}))
            write_bytes(path.with_suffix(".json"), text.encode())

    def _file(self, index: int) -> Path:
        return self.folder / f"block-{index:03d}.safetensors"

    def _record(self, index: int) -> dict[str, Any] | None:
        path = self._file(index)
        about = path.with_suffix(".json")
        if not about.exists() or not path.is_file() or leaves_folder(path, self.folder):
            return None
        try:
            record = load_document(about, what="record of Hessians", newest=_SCHEMA)
        except EvoPressError as error:
            logger.warning("%s (here they are computed again)", error)
            return None
        if "digest" in record and not is_sealed(record):  # records of our first versions have none
            logger.warning("%s is damaged; its Hessians are computed again", about)
            return None
        named = fingerprint_in(self.folder)
        if record.get("block", index) != index or record.get("store", named) != named:
            logger.warning("%s is of another block or store; its Hessians are computed again", about)
            return None
        owners = record.get("owners")
        whole = isinstance(owners, dict) and all(isinstance(owner, str) for owner in owners.values())
        return record if whole and isinstance(record.get("sha256"), str) else None
