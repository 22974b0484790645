"""What every compressor looks like from outside: weights that share an input go in, all their levels come out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from evopress.compress.hessian import panels
from evopress.errors import EvoPressError
from evopress.units import Level


class Payload(Protocol):
    """The compact form of one compressed weight, as stored."""

    codec: ClassVar[str]
    """Names the codec in `evopress.levels.codec` that writes and reads it."""

    def decode(self) -> Tensor:
        """Return the weight, [R, C], in the dtype it was compressed for."""


@dataclass(frozen=True)
class Compressed:
    """One unit at one level."""

    payload: Payload
    error: float
    """Relative output error tr(E H Eᵀ) / tr(W H Wᵀ), E = W - decoded; 0 for a weight that never sees input."""
    damping: float
    """Share of H's mean diagonal that was added before the factorisation."""


class Compressor(Protocol):
    """Compress independently to several levels (paper section 3, level database)."""

    def levels(self, shape: tuple[int, int], *, unit: str = "") -> tuple[Level, ...]:
        """Return the levels of a weight of this shape, least compressed first, without touching it.

        Args: unit: its name, for compressors that treat units differently.

        Raises: EvoPressError if the settings do not fit the shape.
        """

    def compress(self, weights: Mapping[str, Tensor], H: Tensor) -> dict[str, Sequence[Compressed]]:
        """Compress all weights that share one input to all their levels.

        Args:
            weights: unit name to weight [R, C]; left as they are. C is the same for all.
            H: Hessian of their input, float32 [C, C], undamped; left as it is.

        Returns: unit name to one result per level, in the order of `levels`.
        Raises: SingularHessianError if no damping makes H positive definite.
        """

    def narrowed(self, levels: Mapping[str, Level]) -> Compressor:
        """Return a compressor that makes of each of these units just the one level, in the same way.

        Args: levels: unit name to one of its levels, as `levels` gives them.
        """

    def settings(self) -> dict[str, Any]:
        """Return everything that decides the result, for the database's fingerprint; JSON values only."""


@dataclass(frozen=True)
class Working:
    """What memory `compress` takes, beside the weights and their Hessian: a compressor's `working`, or this one if it has none.

    The Hessian's factor is made first; then rows are worked on, a slice at a time; then errors are measured.
    """

    factoring: float = 5.5
    """Matrices of the Hessian's size that are there at once while it is factorised."""
    sweeping: float = 2.0
    """And beside a slice."""
    per_weight: int = 33
    """Bytes for each weight of a slice, that of every level counted."""
    block: tuple[int, int] = (0, 0)
    """Columns that are worked on together, and further bytes for each weight of a slice in them."""
    left: int = 0
    """Bytes for each weight of a slice that stay until its results are taken out of it."""
    cut_by: int = 32
    """Bytes for each of them by which slices are cut."""
    whole_units: bool = False
    """No slice is less than one level of a unit."""
    alone: int = 10
    """Bytes for each weight of the largest unit, beside the result: its errors are measured a level at a time."""
    unpacked: Callable[[Level, int], int] = lambda level, size: level.stored_bits // 8
    """Bytes of a weight of so many numbers at a level, as a payload."""
    packed: Callable[[Level, int], int] = lambda level, size: level.stored_bits // 8
    """Bytes that it takes as it is stored, beside its payload where that lies in the host's memory."""

    def bytes(self, shapes: Sequence[tuple[int, int]], levels: Sequence[Sequence[Level]], *, room: int) -> tuple[int, int]:
        """Return the bytes at the peak, the result included, and those of the result.

        Args:
            shapes: of weights that share an input.
            levels: of each of them.
            room: bytes of a slice.
        """
        columns, sizes = shapes[0][1], [math.prod(shape) for shape in shapes]
        result = sum(self.unpacked(level, size) for size, own in zip(sizes, levels, strict=True) for level in own)
        swept = sum(size * len(own) for size, own in zip(sizes, levels, strict=True))
        part = min(swept, max(room // self.cut_by, max(sizes) if self.whole_units else 0))
        before = result * (1 - part / max(swept, 1))  # of earlier slices
        square = 4 * columns * columns
        together, each = self.block
        working = part * self.per_weight + part * min(together, columns) // columns * each
        peak = max(
            self.factoring * square,
            self.sweeping * square + max(working + before, part * self.left + result),
            result + self.alone * max(sizes),
        )
        return round(4 * sum(sizes) + peak), result


_to_come: dict[torch.device, int] = {}


def free_now(device: torch.device) -> int:
    """Return the bytes of a GPU that this process does not use: free ones, and those that torch holds without need."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def free_bytes(device: torch.device) -> int:
    """Return the bytes that this process may still take of a GPU: what is free now, without what is to come."""
    return max(free_now(device) - _to_come.get(device, 0), 0)


@contextmanager
def to_come(device: torch.device, size: int) -> Iterator[None]:
    """Count bytes of a device as taken that will be: of a model that is not loaded, for whom plans what will be done beside it."""
    _to_come[device] = size
    try:
        yield
    finally:
        del _to_come[device]


def sweep_bytes(device: torch.device) -> int:
    """Return the working memory of one sweep where nothing else is asked for, in bytes.

    On a GPU a sweep is as many launches per column whatever its rows, so that it takes a quarter of what is free, up to 4 GiB. On a
    CPU 256 MiB are enough.
    """
    if device.type != "cuda":
        return 256 * 2**20
    return max(min(free_bytes(device) // 4, 4 * 2**30), 256 * 2**20)


def check_numbers(*, damping: float, block_size: int, tolerance: float | None = None) -> None:
    """Raise EvoPressError unless the numbers that sweeps and descent share are in range."""
    if not 0.0 < damping < 1.0:
        raise EvoPressError(f"method.damping {damping:g} must lie between 0 and 1; the paper uses 0.01")
    if tolerance is not None and not 0.0 < tolerance < 1.0:
        raise EvoPressError(f"method.tolerance {tolerance:g} must lie between 0 and 1, such as 0.02")
    if block_size < 1:
        raise EvoPressError(f"method.block_size {block_size} must be positive: the paper uses 128")


def with_errors(payloads: Sequence[Payload], W: Tensor, H: Tensor, *, damping: float = 0.0, name: str = "") -> list[Compressed]:
    """Add each level's relative output error ‖XE‖² / ‖XW‖² = tr(E H Eᵀ) / tr(W H Wᵀ), E = W - decoded; ‖XW‖² is computed once.

    Args: W float32 [R, C], the uncompressed weight; H float32 [C, C]; name of the unit, for errors.

    Raises: EvoPressError if an error is not finite, as it is wherever a decoded weight is not.
    """
    reference = _energy(W, H)
    levels = [
        Compressed(payload, _energy(W - payload.decode().to(torch.float32), H) / reference if reference else 0.0, damping)
        for payload in payloads
    ]
    for index, level in enumerate(levels):
        if not (math.isfinite(level.error) and math.isfinite(reference)):
            raise EvoPressError(
                f"level {index} of {name or 'a weight'} has no finite error: its weights or activations are too large; use "
                "method.scale_dtype=float32 or model.dtype=bfloat16, or check the model's weights"
            )
    return levels


def _energy(E: Tensor, H: Tensor) -> float:
    """Return tr(E H Eᵀ), at least 0, H symmetric; sums run in float64."""
    energy = torch.zeros((), dtype=torch.float64, device=E.device)
    for start, end in panels(len(H)):  # what lies right of a panel of columns counts twice, what lies left is in earlier panels
        here, right = E[:, start:end], E[:, end:]
        energy += (here @ H[start:end, start:end]).mul_(here).sum(dtype=torch.float64)
        energy += 2.0 * (right @ H[end:, start:end]).mul_(here).sum(dtype=torch.float64)
    return max(float(energy), 0.0)
