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

from safetensors.torch import load_file
from torch import Tensor

from evopress.files import make_folder, sha256_file, write_atomically
from evopress.levels.store import save_tensors

logger = logging.getLogger(__name__)
_SCHEMA = 1


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
        whole = sha256_file(path) == record["sha256"]
        if not whole:
            logger.warning("%s is damaged; its Hessians are computed again", path)
        return whole

    def has_record(self, index: int) -> bool:
        """Tell whether block `index`'s Hessians seem to be there; does not look into the file."""
        return self._record(index) is not None

    def read(self, index: int) -> BlockHessians:
        """Return block `index`'s Hessians on the host; the block must be in the store."""
        record = self._record(index)
        assert record is not None, f"block {index} is not in {self.folder}"
        return BlockHessians(dict(record["owners"]), load_file(self._file(index)))

    def write(self, index: int, block: BlockHessians) -> None:
        """Keep block `index`'s Hessians; the record that makes them count is written last."""
        make_folder(self.folder)
        path = self._file(index)
        tensors = {owner: H.cpu().contiguous() for owner, H in block.hessians.items()}
        write_atomically(path, lambda temporary: save_tensors(tensors, temporary))
        record = json.dumps({"schema": _SCHEMA, "owners": block.owners, "sha256": sha256_file(path)})
        write_atomically(path.with_suffix(".json"), lambda temporary: _write_text(temporary, record))

    def _file(self, index: int) -> Path:
        return self.folder / f"block-{index:03d}.safetensors"

    def _record(self, index: int) -> dict[str, Any] | None:
        path = self._file(index)
        try:
            record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            whole = record["schema"] == _SCHEMA and isinstance(record["owners"], dict) and path.is_file()
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return record if whole else None


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
