"""A safetensors file whose size is known before it is written, written tensor by tensor: no more than one unit is in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from evopress.errors import EvoPressError

_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint32: "U32",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Entry:
    """A tensor that will be there."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Section:
    """Tensors that are made together, in the order of the file."""

    entries: tuple[Entry, ...]
    make: Callable[[], Sequence[Tensor]]
    """Returns them; called once, when they are written."""


def header(sections: Sequence[Section], metadata: Mapping[str, str]) -> bytes:
    """Return what the file begins with: its length in 8 bytes, then JSON, then spaces up to a multiple of 8."""
    described: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for section in sections:
        for entry in section.entries:
            start, end = end, end + entry.num_bytes
            described[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def num_bytes(sections: Sequence[Section], metadata: Mapping[str, str]) -> int:
    """Return the size of the whole file."""
    return len(header(sections, metadata)) + sum(entry.num_bytes for section in sections for entry in section.entries)


def write_sections(path: Path, sections: Sequence[Section], metadata: Mapping[str, str]) -> None:
    """Write the file.

    Raises: EvoPressError if a tensor is made in another shape or dtype than was said; OSError as the disk does.
    """
    with path.open("wb") as file:
        file.write(header(sections, metadata))
        for section in sections:
            for entry, tensor in zip(section.entries, section.make(), strict=True):
                if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
                    raise EvoPressError(
                        f"{entry.name} is {tensor.dtype} {list(tensor.shape)} in the level database, expected {entry.dtype} "
                        f"{list(entry.shape)}: it was built with other settings; remove it, it is then rebuilt"
                    )
                flat = tensor.contiguous().cpu().reshape(-1)
                if flat.stride(0) != 1:  # of one number: contiguous, whatever its strides
                    flat = flat.clone(memory_format=torch.contiguous_format)
                file.write(flat.view(torch.uint8).numpy().data)
