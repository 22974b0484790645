"""Activations on their way through a block and back, in batches: the next one travels to the device while the present is computed.

Where the device has room they stay there. Otherwise they lie in the host's memory, pinned where there is a GPU, so that copies
neither wait nor are waited for; or in a mapped file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import psutil
import torch
from torch import Tensor

from evopress.compress.compressor import free_bytes

SHARE_OF_DEVICE = 0.4
"""Of a GPU's free memory that activations may take; the Hessians, the sweeps and a forward need the rest."""
SHARE_OF_HOST = 0.8
"""Of the host's free memory that pinned activations may take."""


def room_for_activations(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialised tensor: on a GPU where it has room, else in the host's memory, pinned where there is a GPU."""
    size = math.prod(shape) * dtype.itemsize
    if stay_on_device(size, device):
        return torch.empty(shape, dtype=dtype, device=device)
    give_back_pinned()
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=_is_pinned(size, device))
    except RuntimeError:  # the system allows no more of it
        return torch.empty(shape, dtype=dtype)


def held_on_host(size: int, device: torch.device) -> int:
    """Return what a buffer of so many bytes takes of the host's memory: torch pins the next power of two."""
    return _rounded(size) if _is_pinned(size, device) else size


def _is_pinned(size: int, device: torch.device) -> bool:
    """Tell whether a buffer is pinned: where there is a GPU, and room for the power of two."""
    return device.type == "cuda" and _rounded(size) <= SHARE_OF_HOST * psutil.virtual_memory().available


def _rounded(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


def give_back_pinned() -> None:
    """Give pinned memory that nobody holds any more back to the system; torch keeps it for buffers to come."""
    if torch.cuda.is_initialized() and (empty := getattr(torch._C, "_host_emptyCache", None)) is not None:
        empty()


def stay_on_device(size: int, device: torch.device) -> bool:
    """Tell whether activations of so many bytes lie on a GPU."""
    return device.type == "cuda" and size <= SHARE_OF_DEVICE * free_bytes(device)


class Passage:
    """One walk over activations [N, L, d]: iterate for batches on the device, `put` what becomes of each in its place.

    What was put is in its place when the iteration has ended, not before.
    """

    def __init__(self, buffer: Tensor, batch: int, device: torch.device) -> None:
        """Take the activations, wherever they are.

        Args:
            batch: sequences at a time.
            device: where blocks are computed.
        """
        self.buffer, self.batch, self.device = buffer, batch, device
        overlapped = device.type == "cuda" and not buffer.is_cuda and buffer.is_pinned()
        self._streams = (torch.cuda.Stream(device), torch.cuda.Stream(device)) if overlapped else None

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        starts = range(0, len(self.buffer), self.batch)
        if self._streams is None or not starts:
            for start in starts:
                yield start, self.buffer[start : start + self.batch].to(self.device)
            return
        incoming, outgoing = self._streams
        present = torch.cuda.current_stream(self.device)
        ahead = self._fetch(0, incoming)
        for start in starts:
            present.wait_stream(incoming)
            current = ahead
            current.record_stream(present)
            if start + self.batch < len(self.buffer):
                ahead = self._fetch(start + self.batch, incoming)
            yield start, current
        outgoing.synchronize()

    def _fetch(self, start: int, stream: torch.cuda.Stream) -> Tensor:
        with torch.cuda.stream(stream):
            return self.buffer[start : start + self.batch].to(self.device, non_blocking=True)

    def put(self, start: int, output: Tensor) -> None:
        """Put the output of a batch, [b, L, d], in the place of its input."""
        place = self.buffer[start : start + self.batch]
        if self._streams is None:
            place.copy_(output)
            return
        _, outgoing = self._streams
        outgoing.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(outgoing):
            place.copy_(output, non_blocking=True)
        output.record_stream(outgoing)
