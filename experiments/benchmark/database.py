"""Part c: a whole level database, packed, against dequantized levels one sweep at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from evopress.compress.compressor import Compressor
from evopress.compress.gptq import GPTQ
from evopress.levels.build import ensure_database
from evopress.levels.plan import BuildSettings
from evopress.levels.store import LevelDatabase
from evopress.models.blocks import BlockModel
from experiments.benchmark import plain, work
from experiments.benchmark.levels import BITS
from experiments.benchmark.rows import Bench, Row, compared
from experiments.benchmark.sweeps import BATCH_TOKENS, hessian_dtype, sparse_compressor


@dataclass(frozen=True)
class Kind:
    """A database to build both ways."""

    method: str
    what: str
    compressor: Compressor
    propagate: str | None
    keys: Callable[[int], Sequence[str]]
    """Names of the levels of a weight with so many elements."""
    single: Callable[[Tensor, Tensor, str], Tensor]
    """Takes W, U and the name of a level; returns the level."""


def database(bench: Bench) -> Iterator[Row]:
    """Part c: `ensure_database` against a sweep per unit and level whose results are stored dequantized."""
    subject, size = bench.subject, bench.size
    count = min(size.database_blocks, len(subject.blocks.blocks))
    factor = len(subject.blocks.blocks) / count
    tokens = subject.tokens("calibration", size.database_tokens)
    for kind in kinds(bench):
        folders: dict[str, Path] = {}

        def fast(kind: Kind = kind, folders: dict[str, Path] = folders) -> LevelDatabase:
            folders["fast"] = _replaced(folders.get("fast"), bench.fresh_folder(f"{kind.method}-fast"))
            settings = BuildSettings(
                root=folders["fast"],
                method=kind.method,
                model_name="benchmark",
                recipe={"compressor": kind.compressor.settings()},
                propagate=kind.propagate,
                batch_tokens=BATCH_TOKENS,
            )
            return ensure_database(settings, blocks, tokens, kind.compressor)[0]

        def slow(kind: Kind = kind, folders: dict[str, Path] = folders) -> int:
            folders["plain"] = _replaced(folders.get("plain"), bench.fresh_folder(f"{kind.method}-plain"))
            return plain.build_database(
                blocks,
                tokens,
                folders["plain"],
                keys=kind.keys,
                compress=kind.single,
                propagate=kind.propagate,
                batch_tokens=BATCH_TOKENS,
            )

        with subject.first_blocks(count) as blocks:
            built, written = bench.meter.alternate(fast, slow)
            difference = error_difference(blocks, built.result, folders["plain"])
            needed = build_work(blocks, built.result, tokens, propagated=kind.propagate is not None)
        row = compared(
            "c",
            f"{kind.what} database of {count} blocks, {tokens.numel():,} tokens",
            built,
            written,
            difference=difference,
            difference_of="a level's distance to its weight, relative",
            fast_bytes=built.result.num_bytes,
            plain_bytes=written.result,
            bytes_of="disk",
            note=f"whole model by blocks: {built.seconds * factor:.0f} s against {written.seconds * factor:.0f} s",
        ).needing(needed, bench.rates)
        yield replace(row, whole_seconds=built.seconds * factor, whole_plain_seconds=written.seconds * factor)
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)


def kinds(bench: Bench) -> list[Kind]:
    """Return the databases of the paper's two methods."""
    group_size, pruner = bench.size.group_size, sparse_compressor(bench)

    def pruned(W: Tensor, U: Tensor, key: str) -> Tensor:
        levels = pruner.signed_levels(W.numel())
        return plain.sparsegpt(W, U, kept=pruner.kept(W.numel())[levels.index(int(key))])

    return [
        Kind(
            "quant",
            f"GPTQ {len(BITS)} levels,",
            GPTQ(bits=BITS, group_size=group_size),
            propagate="4",
            keys=lambda size: [str(bits) for bits in BITS],
            single=lambda W, U, key: plain.gptq(W, U, bits=int(key), group_size=group_size),
        ),
        Kind(
            "sparsity",
            f"SparseGPT {2 * bench.size.sweep_levels + 1} levels,",
            pruner,
            propagate=None,
            keys=lambda size: [str(level) for level in pruner.signed_levels(size)],
            single=pruned,
        ),
    ]


def error_difference(blocks: BlockModel, built: LevelDatabase, folder: Path) -> float:
    """Return the largest difference, over units and levels, of ‖level - W‖ / ‖W‖ between a database and stored levels."""
    linears = {name: linear for index in range(len(blocks.blocks)) for name, linear in blocks.linears(index).items()}
    worst = 0.0
    for i, unit in enumerate(built.space.units):
        W = linears[unit.name].weight.detach().float().cpu()
        for j, level in enumerate(unit.levels):
            mine = built.read(i, j).decode().float().cpu()
            other = plain.read_level(folder, unit.name, level.key).float()
            distances = [torch.linalg.vector_norm(found - W) / torch.linalg.vector_norm(W) for found in (mine, other)]
            worst = max(worst, abs(float(distances[0] - distances[1])))
    return worst


def build_work(blocks: BlockModel, built: LevelDatabase, tokens: Tensor, *, propagated: bool) -> list[work.Product]:
    """Return the products of a build: forwards, one Hessian, factor and sweep per distinct input, and every level's error.

    Args: propagated: activations leave through a level, in a second forward; else with the Hessians.
    """
    needed: list[work.Product] = []
    lengths = [(tokens.shape[0], tokens.shape[1])]
    units = {unit.name: unit for unit in built.space.units}
    last = len(blocks.blocks) - 1
    for index in range(last + 1):
        needed += [part.times(2.0 if propagated and index < last else 1.0) for part in work.block_work(blocks, index, lengths)]
        inputs: dict[tuple[str, int], int] = {}  # distinct inputs, in Llama's blocks: by module and width
        for name, linear in blocks.linears(index).items():
            rows = linear.out_features * len(units[name].levels)
            key = (_input_of(name), linear.in_features)
            inputs[key] = inputs.get(key, 0) + rows
            needed.append(work.error_work(rows, linear.in_features))
        for (_, columns), rows in inputs.items():
            needed.append(work.hessian_work(columns, tokens.numel(), hessian_dtype(blocks)))
            needed += [work.factor_work(columns), work.sweep_work(rows, columns)]
    return work.merged(needed)


def _input_of(name: str) -> str:
    """Name what a linear of a Llama-like block reads: q, k and v share it, gate and up too."""
    part = name.rsplit(".", 1)[-1]
    return {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}.get(part, part)


def _replaced(old: Path | None, new: Path) -> Path:
    """Remove the folder of the pass before."""
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
    return new
