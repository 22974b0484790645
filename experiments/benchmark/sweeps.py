"""Parts a and b: Hessians and column sweeps of one block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evopress.compress import gptq, sparsegpt
from evopress.compress.hessian import inverse_factor, multiplies_exactly
from evopress.compress.sparse import derive_step
from evopress.levels.calibration import collect_hessians
from evopress.levels.hessians import BlockHessians
from evopress.models.blocks import BlockModel
from experiments.benchmark import plain, work
from experiments.benchmark.levels import BITS, unit_sizes
from experiments.benchmark.rows import Bench, Row, compared

BATCH_TOKENS = 4096
Levels = dict[tuple[str, int], Tensor]
"""Unit and index of the level to its weight, float32 [R, C]."""


def hessians(bench: Bench) -> Iterator[Row]:
    """Part a: one Hessian per distinct input against one per linear, the block's forward included in both."""
    blocks = bench.subject.blocks
    hidden, batch = first_inputs(bench)
    with blocks.on_device(0):
        fast, slow = bench.meter.alternate(
            lambda: collect_hessians(blocks, 0, hidden, batch), lambda: plain.hessians_per_layer(blocks, 0, hidden, batch)
        )
    shared, num_tokens = fast.result, hidden.shape[0] * hidden.shape[1]
    linears = blocks.linears(0)
    needed = [work.hessian_work(linears[owner].in_features, num_tokens, hessian_dtype(blocks)) for owner in shared.hessians]
    needed += work.block_work(blocks, 0, [(hidden.shape[0], hidden.shape[1])])
    differences = [relative(shared.hessians[shared.owners[name]], H) for name, H in slow.result.items()]
    yield compared(
        "a",
        f"Hessians of a block, {num_tokens:,} tokens",
        fast,
        slow,
        difference=max(differences),
        difference_of="H, relative to its greatest entry",
        note=f"{len(shared.hessians)} Hessians against {len(slow.result)}",
    ).needing(needed, bench.rates)


def hessian_dtype(blocks: BlockModel) -> torch.dtype:
    """Return the dtype in which this device multiplies a model's activations for Hessians."""
    exactly = multiplies_exactly(torch.empty(0, dtype=blocks.dtype, device=blocks.device))
    return blocks.dtype if exactly else torch.float32


def sweeps(bench: Bench) -> Iterator[Row]:
    """Part b: one sweep per input for all units and levels against one per unit and level, Hessians factored before."""
    block = Block.of(bench)
    group_size = bench.size.group_size
    pruner = sparse_compressor(bench)
    kept = {name: pruner.kept(W.numel()) for name, W in block.weights.items()}
    bits = dict.fromkeys(block.weights, BITS)
    for what, numbers, stacked, single in (
        ("GPTQ", bits, lambda: stacked_gptq(block, group_size), lambda W, U, b: plain.gptq(W, U, bits=b, group_size=group_size)),
        ("SparseGPT", kept, lambda: stacked_sparsegpt(block, kept), lambda W, U, k: plain.sparsegpt(W, U, kept=k)),
    ):

        def singly(numbers: Mapping[str, Sequence[int]] = numbers, single=single) -> Levels:  # type: ignore[no-untyped-def]
            return {
                (name, i): single(W, block.factor_of(name), number)
                for name, W in block.weights.items()
                for i, number in enumerate(numbers[name])
            }

        fast, slow = bench.meter.alternate(stacked, singly)
        difference = max(abs(block.error(*key, fast.result) - block.error(*key, slow.result)) for key in slow.result)
        unequal = sum(num_different(fast.result[key], level) for key, level in slow.result.items())
        total = sum(level.numel() for level in slow.result.values())
        needed = [
            work.sweep_work(sum(len(block.weights[name]) * len(numbers[name]) for name in block.members(owner)), len(U))
            for owner, U in block.factors.items()
        ]
        yield compared(
            "b",
            f"{what} sweeps of a block, {max(map(len, numbers.values()))} levels",
            fast,
            slow,
            difference=difference,
            difference_of="relative output error of a level",
            note=f"{len(block.factors)} sweeps against {len(slow.result)}; {unequal / total:.2%} of the weights differ",
        ).needing(needed, bench.rates)
        del fast, slow


@dataclass(frozen=True)
class Block:
    """The first block's units with their Hessians and factors."""

    weights: dict[str, Tensor]
    """float32 [R, C]; columns that are never active are zeroed."""
    found: BlockHessians
    factors: dict[str, Tensor]
    """Owner to the upper Cholesky factor of its Hessian's damped inverse."""

    @classmethod
    def of(cls, bench: Bench) -> Block:
        """Collect the first block's Hessians and factor them."""
        blocks = bench.subject.blocks
        hidden, batch = first_inputs(bench)
        with blocks.on_device(0):
            found = collect_hessians(blocks, 0, hidden, batch)
            weights = {name: linear.weight.detach().to(torch.float32, copy=True) for name, linear in blocks.linears(0).items()}
        for name, W in weights.items():
            W[:, found.hessians[found.owners[name]].diagonal() == 0] = 0.0
        return cls(weights, found, {owner: inverse_factor(H, damping=0.01)[0] for owner, H in found.hessians.items()})

    def members(self, owner: str) -> list[str]:
        """List the units that share an input."""
        return [name for name, first in self.found.owners.items() if first == owner]

    def factor_of(self, name: str) -> Tensor:
        return self.factors[self.found.owners[name]]

    def error(self, name: str, level: int, levels: Levels) -> float:
        """Return a level's relative output error tr(E H Eᵀ) / tr(W H Wᵀ)."""
        W, H = self.weights[name], self.found.hessians[self.found.owners[name]]
        E = W - levels[name, level]
        return float(((E @ H) * E).sum(dtype=torch.float64) / ((W @ H) * W).sum(dtype=torch.float64))


def stacked_gptq(block: Block, group_size: int) -> Levels:
    """Quantize all units of a block to all bit widths, a sweep for each distinct input."""
    levels: Levels = {}
    for owner, U in block.factors.items():
        jobs = [(name, i) for name in block.members(owner) for i in range(len(BITS))]
        rows = [len(block.weights[name]) for name, _ in jobs]
        Wt = torch.cat([block.weights[name].T for name, _ in jobs], dim=1)  # [C, stacked rows]
        bits = torch.tensor([BITS[i] for _, i in jobs], dtype=torch.float32)
        maxq = (2.0**bits - 1.0).repeat_interleave(torch.tensor(rows)).to(Wt.device)
        codes, scales, zeros = gptq.sweep(Wt, U, maxq, group_size, gptq.whole_range(maxq))
        grouped = codes.to(torch.float32).reshape(len(scales), -1, codes.shape[1])
        decoded = grouped.sub_(zeros.unsqueeze(1)).mul_(scales.unsqueeze(1)).reshape(codes.shape)
        levels |= {job: part.T for job, part in zip(jobs, decoded.split(rows, dim=1), strict=True)}
    return levels


def stacked_sparsegpt(block: Block, kept: Mapping[str, Sequence[int]]) -> Levels:
    """Prune all units of a block to all numbers of kept weights, a sweep for each distinct input."""
    levels: Levels = {}
    for owner, U in block.factors.items():
        jobs = [(name, i) for name in block.members(owner) for i in range(len(kept[name]))]
        rows = [len(block.weights[name]) for name, _ in jobs]
        Wt = torch.cat([block.weights[name].T for name, _ in jobs], dim=1)  # [C, stacked rows]
        sparsegpt.sweep(Wt, U, rows, [kept[name][i] for name, i in jobs])
        levels |= {job: part.T for job, part in zip(jobs, Wt.split(rows, dim=1), strict=True)}
    return levels


def first_inputs(bench: Bench) -> tuple[Tensor, int]:
    """Return what enters the first block, [N, L, d] in host memory, and the sequences of one forward."""
    blocks, tokens = bench.subject.blocks, bench.subject.tokens("calibration", bench.size.hessian_tokens)
    batch = max(BATCH_TOKENS // tokens.shape[1], 1)
    return torch.cat([blocks.embed(part).cpu() for part in tokens.split(batch)]), batch


def sparse_compressor(bench: Bench) -> sparsegpt.SparseGPT:
    """Return SparseGPT at the size's sparsity and number of levels."""
    size, blocks = bench.size, bench.subject.blocks
    step = derive_step(unit_sizes(blocks), size.sparsity, size.sweep_levels)
    bits = 8 * blocks.dtype.itemsize
    return sparsegpt.SparseGPT(sparsity=size.sparsity, step=step, num_levels=size.sweep_levels, dtype_bits=bits)


def num_different(found: Tensor, expected: Tensor) -> int:
    """Count entries that differ by more than rounding explains: other codes, other masks."""
    return int(((found - expected).abs() > 1e-3 * expected.square().mean().sqrt()).sum())


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the greatest entry."""
    return float((found - expected).abs().max() / expected.abs().max())
