"""Levels to search among, made in seconds: rounded to nearest or pruned by magnitude, stored and read as any level database.

What a search costs does not depend on how its levels were found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evopress.compress.compressor import Compressed, Compressor, Payload
from evopress.compress.gptq import GPTQ, Quantized
from evopress.compress.grid import fit_grid
from evopress.compress.one_level import OneLevel
from evopress.compress.sparse import Sparse, SparsityLevels, derive_step, lowest, to_float32
from evopress.levels.build import ensure_database
from evopress.levels.live import Live, LiveModel
from evopress.levels.modules import ModuleLevels
from evopress.levels.plan import BuildSettings, plan_space
from evopress.levels.store import LevelDatabase
from evopress.levels.union import LevelSource
from evopress.methods.drop import Drop
from evopress.methods.quant import Quantization
from evopress.methods.sparsity import Sparsity
from evopress.models.blocks import BlockModel
from evopress.settings import DropSettings, QuantSettings, SparsitySettings
from evopress.units import Budget, Level, Space
from experiments.benchmark.sizes import Size
from experiments.benchmark.subject import Subject

BITS = (6, 5, 4, 3, 2)


@dataclass(frozen=True)
class RoundToNearest:
    """Round to the grids of GPTQ without error feedback; see `Compressor`. Errors are not computed: 0."""

    group_size: int
    bits: tuple[int, ...] = BITS

    def levels(self, shape: tuple[int, int], *, unit: str = "") -> tuple[Level, ...]:
        return GPTQ(bits=self.bits, group_size=self.group_size).levels(shape, unit=unit)

    def settings(self) -> dict[str, Any]:
        return {"compressor": "round_to_nearest", "bits": list(self.bits), "group_size": self.group_size}

    def narrowed(self, levels: Mapping[str, Level]) -> Compressor:
        return OneLevel({name: replace(self, bits=(int(level.key),)) for name, level in levels.items()})

    def compress(self, weights: Mapping[str, Tensor], H: Tensor) -> dict[str, Sequence[Compressed]]:
        return {name: [Compressed(self._rounded(W, bits), 0.0, 0.0) for bits in self.bits] for name, W in weights.items()}

    def _rounded(self, W: Tensor, bits: int) -> Quantized:
        rows = len(W)
        groups = W.detach().to(torch.float32).reshape(-1, self.group_size)  # a row per group
        maxq = torch.full((len(groups),), 2.0**bits - 1.0, device=W.device)
        grid = fit_grid(groups.amin(1), groups.amax(1), maxq)
        codes = torch.round(groups / grid.scale.unsqueeze(1) + grid.zero.unsqueeze(1)).clamp_(0.0, 2.0**bits - 1.0)
        return Quantized(
            codes=codes.to(torch.uint8).reshape(W.shape),
            scales=grid.scale.reshape(rows, -1).to(torch.float16),
            zeros=grid.zero.reshape(rows, -1).to(torch.int16),
            bits=bits,
            dtype=W.dtype,
        )


@dataclass(frozen=True, kw_only=True)
class PruneSmallest(SparsityLevels):
    """Keep the weights of greatest magnitude; see `Compressor`. Errors are not computed: 0."""

    def settings(self) -> dict[str, Any]:
        return {"compressor": "prune_smallest", "sparsity": self.sparsity, "step": self.step, "num_levels": self.num_levels}

    def prune(self, weights: Mapping[str, Tensor], H: Tensor, kept: Mapping[str, Sequence[int]]) -> dict[str, Sequence[Compressed]]:
        results: dict[str, Sequence[Compressed]] = {}
        for name, W in to_float32(weights, H.device).items():
            scores = W.abs().reshape(-1)
            masks = [~lowest(scores, W.numel() - count).reshape(W.shape) for count in kept[name]]
            results[name] = [Compressed(Sparse.of(weights[name], mask, weights[name].dtype), 0.0, 0.0) for mask in masks]
        return results


class RepeatedLevels:
    """The levels of the first block for every block, for random models whose blocks are all alike; see `LevelSource`."""

    def __init__(self, database: LevelDatabase, space: Space) -> None:
        """Args: space: the whole model's."""
        self.folder = database.folder
        self.space = space
        self._database = database

    def read(self, unit: int, level: int, device: torch.device | str = "cpu") -> Payload:
        return self._database.read(unit % len(self._database.space), level, device)


@dataclass(frozen=True)
class Searched:
    """What a search needs beside its evaluator."""

    live: Live
    budget: Budget
    folder: Path | None = None
    """Of the database on disk; None: nothing is stored."""


def searched(method: str, subject: Subject, size: Size, scratch: Path, *, cache_bytes: int = 2**28) -> Searched:
    """Make the space of a method and the levels that a search moves among.

    Args:
        method: quant, sparsity or drop.
        scratch: where the levels are stored; those made before are used again.
    """
    blocks = subject.blocks
    dtype_bits = 8 * blocks.dtype.itemsize
    if method == "drop":
        drop = Drop(DropSettings(), size.depth, exchange="name")
        space = drop.space(blocks.shapes(), dtype_bits=dtype_bits)
        return Searched(LiveModel(blocks, ModuleLevels(space)), drop.budget(space))
    compressor: Compressor
    if method == "quant":
        compressor = RoundToNearest(size.group_size)
        space = plan_space(blocks, compressor, method=method)
        budget = Quantization(QuantSettings(), size.bits).budget(space)
    else:
        compressor = PruneSmallest(
            sparsity=size.sparsity,
            step=derive_step(unit_sizes(blocks), size.sparsity, size.sparsity_levels),
            num_levels=size.sparsity_levels,
            dtype_bits=dtype_bits,
        )
        space = plan_space(blocks, compressor, method=method)
        budget = Sparsity(SparsitySettings(), size.sparsity).budget(space)
    source = stored_levels(method, subject, compressor, scratch, whole=size.whole_levels)
    levels: LevelSource = source if size.whole_levels else RepeatedLevels(source, space)
    return Searched(LiveModel(blocks, levels, cache_bytes=cache_bytes), budget, source.folder)


def unit_sizes(blocks: BlockModel) -> list[int]:
    """Return the number of weights of every unit."""
    return [linear.weight.numel() for index in range(len(blocks.blocks)) for linear in blocks.linears(index).values()]


def stored_levels(method: str, subject: Subject, compressor: Compressor, scratch: Path, *, whole: bool = True) -> LevelDatabase:
    """Store levels that need no Hessian, of all blocks or of the first."""
    count = len(subject.blocks.blocks) if whole else 1
    settings = BuildSettings(
        root=scratch,
        method=method,
        model_name="benchmark",
        recipe={"compressor": compressor.settings(), "blocks": count},
        propagate=None,
    )
    tokens = subject.tokens("calibration", subject.sequence_length)[:1, :16]
    with subject.first_blocks(count) as blocks:
        return ensure_database(settings, blocks, tokens, compressor)[0]
