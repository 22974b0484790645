"""What every unstructured pruner shares: levels a fixed number of weights apart, exact counts, and the sparse payload.

Counts are of weights kept or pruned; "kept" is a level's cost. Every level step is the same number of weights in every unit, so one
unit's step up pays for any other's step down.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from evopress.compress.compressor import Compressed, Compressor, Working
from evopress.errors import EvoPressError
from evopress.units import Level

_RUN = 2**22
"""Weights that are gathered, scattered or sorted together: what tells where they are takes some 16 bytes each."""


@dataclass(frozen=True)
class Sparse:
    """A weight as a mask and the values that it keeps. A kept value may be 0, so the mask says what is kept."""

    codec: ClassVar[str] = "bit_mask"

    mask: Tensor
    """bool [R, C], true where the weight is kept."""
    values: Tensor
    """[kept], row by row, in the dtype of the weight."""

    def decode(self) -> Tensor:
        """Return the weight, [R, C]: kept values bit for bit, 0 elsewhere."""
        weight = torch.zeros(self.mask.shape, dtype=self.values.dtype, device=self.values.device)
        if self.mask.device.type != "cpu":
            return _scattered(weight, self.mask, self.values)
        start = 0
        for rows in runs(self.mask):
            where = _positions(self.mask[rows])
            _bits(weight[rows]).view(-1).scatter_(0, where, _bits(self.values[start : start + len(where)]))
            start += len(where)
        return weight

    @classmethod
    def of(cls, W: Tensor, mask: Tensor, dtype: torch.dtype) -> Sparse:
        """Keep what a mask bool [R, C] names of W [R, C], rounded to `dtype`."""
        if mask.device.type != "cpu":
            return cls(mask=mask, values=_gathered(W, mask, dtype))
        kept = [_bits(W[rows]).reshape(-1).index_select(0, _positions(mask[rows])).view(W.dtype).to(dtype) for rows in runs(mask)]
        return cls(mask=mask, values=torch.cat(kept))


def runs(weight: Tensor) -> Iterator[slice]:
    """Split the rows of a weight, or of its mask, [R, C], into runs whose positions take little memory."""
    count = max(_RUN // weight.shape[1], 1)
    return (slice(start, start + count) for start in range(0, weight.shape[0], count))


def _scattered(weight: Tensor, mask: Tensor, values: Tensor) -> Tensor:
    """Put values [kept] where a mask bool [R, C] is true of a weight [R, C], which is changed, and return it: on a GPU."""
    if mask.numel() <= _RUN:
        return weight.masked_scatter_(mask, values)
    counts = torch.stack([mask[rows].sum() for rows in runs(mask)]).tolist()  # the device is waited for once
    for rows, part in zip(runs(mask), values.split(counts), strict=True):
        weight[rows].masked_scatter_(mask[rows], part)
    return weight


def _gathered(W: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values of W [R, C] where a mask bool [R, C] is true, rounded to `dtype`, row by row: on a GPU."""
    if mask.numel() <= _RUN:
        return W[mask].to(dtype)
    return torch.cat([W[rows][mask[rows]].to(dtype) for rows in runs(mask)])


def _bits(values: Tensor) -> Tensor:
    """Return the same memory as integers, which come through any operation as they are; not every NaN does."""
    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])


def _positions(mask: Tensor) -> Tensor:
    """Return where a mask on the CPU is true, int64 [kept], row by row.

    numpy finds them, and torch uses them, several times as fast as torch's own masked_scatter and indexing by a mask do both.
    """
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def kept_at(size: int, sparsity: float) -> int:
    """Return how many of `size` weights a sparsity in [0, 1] keeps: size - round(sparsity · size)."""
    return size - round(sparsity * size)


def derive_step(sizes: Sequence[int], sparsity: float, num_levels: int) -> int:
    """Choose a step for a model: step = max(1, floor(min(s, 1 - s) · m / (2 · num_levels))), m the (low) median unit size.

    The middle unit then has all its 2 · num_levels + 1 levels, reaching from s - d to s + d with d = min(s, 1 - s) / 2. Larger
    units have as many in a narrower range, smaller ones as many as fit. The authors' default is this with hidden_size² for m,
    which in Llama-like models is the median unit.

    Args:
        sizes: weights of every unit.
        sparsity: target s in (0, 1).
        num_levels: levels on each side of the target.
    """
    return max(1, math.floor(min(sparsity, 1.0 - sparsity) * statistics.median_low(sizes) / (2 * num_levels)))


def check_step(sizes: Collection[int], *, sparsity: float, step: int) -> None:
    """Raise EvoPressError unless some unit can be a step sparser than its target and some unit a step denser."""
    kept = [(size, kept_at(size, sparsity)) for size in sizes]
    most_kept, most_pruned = max(k for _, k in kept), max(size - k for size, k in kept)
    if not min(most_kept, most_pruned):
        raise EvoPressError(
            f"sparsity={sparsity:g} must leave the largest unit ({max(sizes)} weights) a weight to keep and one to prune: "
            "choose one further from 0 and 1"
        )
    if step > min(most_kept, most_pruned):
        raise EvoPressError(
            f"method.step={step} weights leaves nothing to exchange: at sparsity {sparsity:g} a unit keeps at most {most_kept} "
            f"weights and prunes at most {most_pruned}; choose at most {min(most_kept, most_pruned)}, or null to derive it"
        )


@dataclass(frozen=True, kw_only=True)
class SparsityLevels:
    """Levels around a target sparsity, neighbours `step` weights apart (paper section 4.2, search space)."""

    sparsity: float
    """Target share of weights pruned, in (0, 1)."""
    step: int
    """Weights between neighbouring levels; the paper's 7B models: 1,000,000. See `derive_step` and `check_step`."""
    num_levels: int = 8
    """Most levels on each side of the target."""
    dtype_bits: int = 16
    """Bits of a stored weight: those of the model's dtype."""

    def __post_init__(self) -> None:
        if not 0.0 < self.sparsity < 1.0:
            raise EvoPressError(f"sparsity={self.sparsity:g} must lie between 0 and 1: the share of weights to prune, such as 0.7")
        if self.step < 1:
            raise EvoPressError(f"method.step={self.step} must be at least 1 weight, or null to derive it from the model")
        if self.num_levels < 1:
            raise EvoPressError(f"method.num_levels={self.num_levels} must be at least 1 on each side of the target")

    def signed_levels(self, size: int) -> range:
        """Return a unit's levels as the authors number them: 0 is the target, above 0 is sparser; those that fit 0..size kept."""
        target = kept_at(size, self.sparsity)
        return range(-min(self.num_levels, (size - target) // self.step), min(self.num_levels, target // self.step) + 1)

    def kept(self, size: int) -> tuple[int, ...]:
        """Return the weights that a unit of `size` keeps at each level, least compressed first."""
        return tuple(kept_at(size, self.sparsity) - level * self.step for level in self.signed_levels(size))

    def levels(self, shape: tuple[int, int], *, unit: str = "") -> tuple[Level, ...]:
        """Return the levels of a weight of this shape; one too small for a step has only the target."""
        size = math.prod(shape)
        return tuple(
            _level(size, kept, str(level), self.dtype_bits)
            for level, kept in zip(self.signed_levels(size), self.kept(size), strict=True)
        )

    def settings(self) -> dict[str, Any]:
        """Return what decides the result."""
        raise NotImplementedError

    def narrowed(self, levels: Mapping[str, Level]) -> Compressor:
        """Return a compressor that makes one level of each of these units, whose cost is what it keeps."""
        return PruneTo(pruner=self, kept={name: (level.cost,) for name, level in levels.items()})

    @property
    def working(self) -> Working:
        """See `Working`: scores and their ranks, a unit at a time; a mask is held a byte a weight."""
        return Working(factoring=0.0, sweeping=0.0, per_weight=0, alone=24, unpacked=unpacked, packed=packed)

    def prune(self, weights: Mapping[str, Tensor], H: Tensor, kept: Mapping[str, Sequence[int]]) -> dict[str, Sequence[Compressed]]:
        """Prune weights that share one input to any numbers of kept weights; see `sparsegpt`."""
        raise NotImplementedError

    def compress(self, weights: Mapping[str, Tensor], H: Tensor) -> dict[str, Sequence[Compressed]]:
        """Prune every weight to every level; see `Compressor.compress`."""
        assert all(W.element_size() * 8 == self.dtype_bits for W in weights.values()), "stored_bits counts values of another dtype"
        return pruned(self, weights, H, {name: self.kept(W.numel()) for name, W in weights.items()})


def pruned(
    pruner: SparsityLevels, weights: Mapping[str, Tensor], H: Tensor, kept: Mapping[str, Sequence[int]]
) -> dict[str, Sequence[Compressed]]:
    """Prune weights to numbers of kept ones, and see that they are these: what a budget counts.

    Raises: EvoPressError if a pruner keeps others.
    """
    made = pruner.prune(weights, H, kept)
    for name, counts in kept.items():
        found = [len(level.payload.values) for level in made[name] if isinstance(level.payload, Sparse)]
        if found and found != list(counts):
            raise EvoPressError(
                f"the pruner {type(pruner).__name__} keeps {found} of the {weights[name].numel()} weights of {name}, asked for "
                f"{list(counts)}: fix it, or choose another method.compressor"
            )
    return made


@dataclass(frozen=True, kw_only=True)
class PruneTo:
    """Prune every unit to given numbers of kept weights, such as OWL's: a level per number, densest first."""

    pruner: SparsityLevels
    """How; its own levels do not matter."""
    kept: Mapping[str, Sequence[int]]
    """Unit name to the weights to keep, descending, without repeats."""

    def settings(self) -> dict[str, Any]:
        """Return what decides the result."""
        ladder = ("sparsity", "step", "num_levels")
        own = {key: value for key, value in self.pruner.settings().items() if key not in ladder}
        return own | {"kept": {name: list(counts) for name, counts in self.kept.items()}}

    def levels(self, shape: tuple[int, int], *, unit: str = "") -> tuple[Level, ...]:
        """Return a unit's levels; their keys are the weights kept."""
        size = math.prod(shape)
        return tuple(_level(size, kept, str(kept), self.pruner.dtype_bits) for kept in self.kept[unit])

    def narrowed(self, levels: Mapping[str, Level]) -> Compressor:
        """Return a compressor that makes one level of each of these units."""
        return self.pruner.narrowed(levels)

    @property
    def working(self) -> Working:
        """See `Working`."""
        return self.pruner.working

    def compress(self, weights: Mapping[str, Tensor], H: Tensor) -> dict[str, Sequence[Compressed]]:
        """Prune every weight to every level; see `Compressor.compress`."""
        return pruned(self.pruner, weights, H, {name: self.kept[name] for name in weights})


def unpacked(level: Level, size: int) -> int:
    """Return the bytes of a `Sparse` weight in memory, a byte for each number of its mask."""
    return (level.stored_bits + 7 * size) // 8


def packed(level: Level, size: int) -> int:
    """Return the bytes of a `Sparse` weight as stored, beside itself: the mask's, for the values are the same."""
    return -(-size // 8)


def _level(size: int, kept: int, key: str, dtype_bits: int) -> Level:
    return Level(label=f"{(size - kept) / size:.1%}", cost=kept, key=key, stored_bits=size + kept * dtype_bits, source="sparsity")


def distribute(total: int, sizes: Sequence[int]) -> list[int]:
    """Divide `total` over parts in proportion to their sizes, so that the shares add up to it and none exceeds its part.

    Cumulative rounding: what the first j parts get together is floor(total · (their sizes) / (all sizes)).
    """
    whole = sum(sizes)
    shares, so_far, given = [], 0, 0
    for size in sizes:
        so_far += size
        shares.append(total * so_far // whole - given)
        given += shares[-1]
    return shares


def lowest(scores: Tensor, count: int) -> Tensor:
    """Mark exactly the `count` lowest scores, the earlier index first among equal ones.

    Args: scores float32 [n], finite and at least 0. Returns: bool [n].
    """
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if scores.is_cuda:
        threshold = _bisected(scores, count) if scores.numel() > _RUN else scores.sort().values[count - 1]
    else:  # torch's selection on a CPU takes a hundred times as long
        threshold = torch.from_numpy(np.partition(scores.numpy(), count - 1))[count - 1]
    marked = scores <= threshold
    surplus = int(marked.sum()) - count
    if surplus:
        ties = (scores == threshold).nonzero().squeeze(1)
        marked[ties[len(ties) - surplus :]] = False
    return marked


def _bisected(scores: Tensor, count: int) -> Tensor:
    """Return the lowest of some scores that so many are no higher than, float32 []; nothing is sorted or waited for.

    The bits of floats at least 0, read as integers, are in the order of the floats: each step halves a range of 2^31 of them.

    Args: scores float32 [n], at least 0.
    """
    bits = scores.view(torch.int32)
    low, high = torch.zeros((), dtype=torch.int32, device=scores.device), bits.max()
    for _ in range(31):
        middle = low + (high - low) // 2
        are_enough = (bits <= middle).sum() >= count
        low, high = torch.where(are_enough, low, middle + 1), torch.where(are_enough, middle, high)
    return high.view(torch.float32)


def to_float32(weights: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Copy weights to float32 on a device; raise EvoPressError if one is not finite."""
    copies = {name: W.to(device, torch.float32, copy=True) for name, W in weights.items()}
    for name, W in copies.items():
        if not bool(torch.isfinite(W).all()):
            raise EvoPressError(f"the weight of {name} is not finite: fetch the checkpoint again")
    return copies
