"""The plain ways that the fast ones are measured against: what the authors of GPTQ, SparseGPT and EvoPress do.

One Hessian per linear, one sweep per linear and level over [R, C] weights, every level stored dequantized. Grids, masks and damping
are our own, so that both ways find the same levels.

Shapes: R rows, C columns; N sequences of L tokens, d hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from evopress.compress.grid import fit_grid, from_codes, to_codes
from evopress.compress.hessian import inverse_factor
from evopress.compress.sparse import distribute
from evopress.data.minibatch import draw
from evopress.levels.live import Live
from evopress.models.blocks import BlockModel
from evopress.search.strategy import Fitness
from evopress.units import Genome

_WEIGHT = "weight"


def hessians_per_layer(blocks: BlockModel, index: int, hidden: Tensor, batch: int) -> dict[str, Tensor]:
    """Run block `index` over activations [N, L, d] and sum a Hessian for every linear, whatever shares its input.

    Source: `add_batch` of the GPTQ repository: a whole product in float32 and a rescaling of the mean so far per batch.
    """
    found: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def caught(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            X = args[0].reshape(-1, args[0].shape[-1]).float()
            H = found.setdefault(name, torch.zeros(X.shape[1], X.shape[1], device=X.device))
            counts[name] = counts.get(name, 0) + len(current)
            H *= 1.0 - len(current) / counts[name]
            X = X * math.sqrt(2.0 / counts[name])
            H += X.T.matmul(X)

        return hook

    blocks.prepare(hidden.shape[1])
    handles = [linear.register_forward_pre_hook(caught(name)) for name, linear in blocks.linears(index).items()]
    try:
        for start in range(0, len(hidden), batch):
            current = hidden[start : start + batch].to(blocks.device)
            blocks.run(index, current)
    finally:
        for handle in handles:
            handle.remove()
    return found


def factor(H: Tensor, *, damping: float = 0.01) -> Tensor:
    """Return the upper Cholesky factor of the damped inverse."""
    return inverse_factor(H, damping=damping)[0]


def gptq(
    W: Tensor, U: Tensor, *, bits: int, group_size: int, block_size: int = 128, scale_dtype: torch.dtype = torch.float16
) -> Tensor:
    """Quantize one weight to one bit width, a column at a time, and return it dequantized, float32 [R, C].

    Source: `fasterquant` of the GPTQ repository. Differs from it: a group's grid is fitted to weights that carry all earlier
    updates, and scales are rounded to their storage dtype, as in `evopress.compress.gptq`.

    Args:
        W: float32 [R, C]; left as it is.
        U: float32 [C, C], upper Cholesky factor of the damped inverse Hessian.
    """
    W, columns = W.clone(), W.shape[1]
    if group_size < block_size:
        block_size -= block_size % group_size
    elif group_size % block_size:
        block_size = group_size
    Q = torch.zeros_like(W)
    maxq = torch.full((len(W),), 2.0**bits - 1.0, device=W.device)
    grid = None
    for first in range(0, columns, block_size):
        end = min(first + block_size, columns)
        W1, U1 = W[:, first:end].clone(), U[first:end, first:end]
        errors = torch.zeros_like(W1)
        for i in range(end - first):
            if (first + i) % group_size == 0:
                group = W1[:, i : i + group_size] if group_size <= block_size else W[:, first : first + group_size]
                grid = fit_grid(group.amin(1), group.amax(1), maxq, scale_dtype=scale_dtype)
            assert grid is not None
            w = W1[:, i]
            q = from_codes(to_codes(w, grid, maxq), grid)
            Q[:, first + i] = q
            error = (w - q) / U1[i, i]
            W1[:, i:] -= error.unsqueeze(1).matmul(U1[i, i:].unsqueeze(0))
            errors[:, i] = error
        W[:, end:] -= errors.matmul(U[first:end, end:])
    return Q


def sparsegpt(W: Tensor, U: Tensor, *, kept: int, block_size: int = 128) -> Tensor:
    """Prune one weight to `kept` weights, a column at a time, and return it, float32 [R, C].

    Source: `fasterprune` of the SparseGPT repository. Differs from it: counts are exact.

    Args:
        W: float32 [R, C]; left as it is.
        U: float32 [C, C], upper Cholesky factor of the damped inverse Hessian.
    """
    W, (rows, columns) = W.clone(), W.shape
    starts = range(0, columns, block_size)
    widths = [min(block_size, columns - first) for first in starts]
    for first, width, count in zip(starts, widths, distribute(rows * columns - kept, widths), strict=True):
        end = first + width
        W1, U1 = W[:, first:end].clone(), U[first:end, first:end]
        scores = (W1.square() / U1.diagonal().square()).T.reshape(-1)  # column by column: the earlier one first among equals
        pruned = torch.zeros(scores.shape, dtype=torch.bool, device=W.device)
        pruned[torch.sort(scores, stable=True).indices[:count]] = True
        pruned = pruned.reshape(width, rows).T
        Q, errors = torch.zeros_like(W1), torch.zeros_like(W1)
        for i in range(width):
            w = W1[:, i]
            q = w.masked_fill(pruned[:, i], 0.0)
            Q[:, i] = q
            error = (w - q) / U1[i, i]
            W1[:, i:] -= error.unsqueeze(1).matmul(U1[i, i:].unsqueeze(0))
            errors[:, i] = error
        W[:, first:end] = Q
        W[:, end:] -= errors.matmul(U[first:end, end:])
    return W


@torch.no_grad()
def build_database(
    blocks: BlockModel,
    tokens: Tensor,
    folder: Path,
    *,
    keys: Callable[[int], Sequence[str]],
    compress: Callable[[Tensor, Tensor, str], Tensor],
    propagate: str | None,
    batch_tokens: int = 4096,
) -> int:
    """Build a database as the authors' code does and return its bytes: a file of the dequantized weight per linear and level.

    Args:
        tokens: calibration token ids int64 [N, L].
        keys: names of the levels of a weight with so many elements.
        compress: takes W float32 [R, C], the factor U [C, C] and a key; returns the level [R, C].
        propagate: key of the level through which activations leave a block; None: dense.
    """
    batch = max(batch_tokens // tokens.shape[1], 1)
    hidden = torch.cat([blocks.embed(part) for part in tokens.split(batch)])
    for index in range(len(blocks.blocks)):
        linears = blocks.linears(index)
        with blocks.on_device(index):
            hessians = hessians_per_layer(blocks, index, hidden, batch)
            leaving: dict[str, Tensor] = {}
            for name, linear in linears.items():
                H = hessians.pop(name)
                U = factor(H)
                W = linear.weight.detach().to(torch.float32, copy=True)
                W[:, H.diagonal() == 0] = 0.0
                for key in keys(W.numel()):
                    level = compress(W, U, key).to(linear.weight.dtype)
                    write_level(folder, name, key, level)
                    if key == propagate:
                        leaving[name] = level
            if index + 1 == len(blocks.blocks):
                break
            dense = {name: linears[name].weight.data for name in leaving}
            try:
                for name, level in leaving.items():
                    linears[name].weight.data = level
                hidden = torch.cat([blocks.run(index, part) for part in hidden.split(batch)])
            finally:
                for name, weight in dense.items():
                    linears[name].weight.data = weight
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def write_level(folder: Path, unit: str, key: str, weight: Tensor) -> None:
    """Store a level dequantized."""
    path = folder / unit / f"{key}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({_WEIGHT: weight.contiguous().cpu()}, path)


def read_level(folder: Path, unit: str, key: str) -> Tensor:
    """Read a level that `write_level` stored."""
    return load_file(folder / unit / f"{key}.safetensors")[_WEIGHT]


def set_block(blocks: BlockModel, index: int, folder: Path, keys: Mapping[str, str]) -> None:
    """Read block `index`'s levels, by unit, and put them into the model."""
    for name, linear in blocks.linears(index).items():
        # A copy: tensors of a mapped file are read when they are first used.
        linear.weight.data = read_level(folder, name, keys[name]).to(linear.weight.device, copy=True)


class StoredLogits:
    """Scores genomes as the authors' code does, against the base model's logits, which are stored.

    One candidate and one sequence at a time, the model's own forward with its usual attention, the logits of all tokens at once.
    """

    def __init__(self, live: Live) -> None:
        self.live = live
        self._base: dict[int, Tensor] = {}
        """Row of the text to the base model's logits, float32 [L, V]."""

    def store(self, sequences: Tensor, rows: Iterable[int]) -> None:
        """Store the base model's logits on some rows of the text, int64 [N, L]."""
        with usual_attention(self.live.blocks):
            for row in rows:
                if row not in self._base:
                    self._base[row] = self._logits(sequences[row])

    def fitness(self, sequences: Tensor, rng: np.random.Generator) -> Fitness:
        """Return the fitness on a text, int64 [N, L], whose rows that `rng` will draw are stored."""

        def score(genomes: Sequence[Genome], *, tokens: int) -> list[float]:
            minibatch = draw(len(sequences), sequences.shape[1], tokens=tokens, rng=rng)
            drawn = list(zip(minibatch.indices, minibatch.lengths, strict=True))
            count = sum(length - 1 for _, length in drawn)
            with usual_attention(self.live.blocks):
                return [sum(self._kl(genome, sequences[row], row, length) for row, length in drawn) / count for genome in genomes]

        return score

    def _kl(self, genome: Genome, sequence: Tensor, row: int, length: int) -> float:
        with self.live.applied(genome):
            return stored_kl(self._base[row][:length], self._logits(sequence[:length]))

    @torch.no_grad()
    def _logits(self, ids: Tensor) -> Tensor:
        blocks = self.live.blocks
        return blocks.model(input_ids=ids.unsqueeze(0).to(blocks.device), use_cache=False).logits[0].float()


@contextmanager
def usual_attention(blocks: BlockModel) -> Iterator[None]:
    """Let a model attend by transformers' usual implementation for a moment, not by ours."""
    config: Any = blocks.model.config
    mine = config._attn_implementation
    config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        config._attn_implementation = mine


def stored_kl(base_logits: Tensor, logits: Tensor, *, chunk_tokens: int = 1024) -> float:
    """Sum KL(base ‖ compressed) over the predicted tokens of a sequence, from logits [L, V] in float32.

    Source: the authors' code: both log-softmaxed whole, chunks of 1,024 tokens, the last position left out.
    """
    total = 0.0
    for start in range(0, len(logits) - 1, chunk_tokens):
        end = min(start + chunk_tokens, len(logits) - 1)
        target, found = base_logits[start:end].log_softmax(-1), logits[start:end].log_softmax(-1)
        total += float(nn.functional.kl_div(found, target, reduction="sum", log_target=True))
    return total
