"""The matrix products that the work needs, at least: every distinct prefix of genomes once, attention's causal half.

Norms, activations, softmax and rounding are left out: the machine's limit is what these products take at the measured rate.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from evopress.levels.live import Live
from evopress.models.blocks import BlockModel
from evopress.units import Genome, is_module

Lengths = Sequence[tuple[int, int]]
"""(sequences, tokens of each)."""


@dataclass(frozen=True)
class Product:
    """`count` products of a [batch, rows, inner] and a [batch, inner, columns] matrix."""

    rows: int
    inner: int
    columns: int
    dtype: torch.dtype
    batch: int = 1
    count: float = 1.0

    @property
    def flops(self) -> float:
        """A multiplication and an addition each."""
        return 2.0 * self.batch * self.rows * self.inner * self.columns * self.count

    def times(self, factor: float) -> Product:
        """Return so many times as many."""
        return replace(self, count=self.count * factor)


@dataclass(frozen=True)
class Question:
    """What a stage of the search asks."""

    genomes: tuple[Genome, ...]
    tokens: int


def total_flops(work: Iterable[Product]) -> float:
    """Add up the operations of products."""
    return sum(product.flops for product in work)


def lengths_of(tokens: int, sequence_length: int) -> Lengths:
    """Return the sequences of a minibatch of so many tokens, as `data.minibatch.draw` cuts them."""
    whole, rest = divmod(tokens, sequence_length)
    return [(count, length) for count, length in ((whole, sequence_length), (1, rest)) if count and length > 1]


def block_work(
    blocks: BlockModel, index: int, lengths: Lengths, *, attention: bool = True, mlp: bool = True, causal: bool = True
) -> list[Product]:
    """Return the products of one block over sequences.

    Args:
        attention, mlp: whether the block has them.
        causal: count half of the scores, those that are not masked.
    """
    tokens = sum(count * length for count, length in lengths)
    work = []
    for name, linear in blocks.linears(index).items():
        if attention if f".{blocks.family.attention}." in name else mlp:
            work.append(Product(tokens, linear.in_features, linear.out_features, blocks.dtype))
    if attention:
        config: Any = blocks.model.config
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        for count, length in lengths:
            share = count * (0.5 if causal else 1.0)
            work.append(Product(length, head_dim, length, blocks.dtype, heads, share))  # Q Kᵀ
            work.append(Product(length, length, head_dim, blocks.dtype, heads, share))  # scores · V
    return work


def head_work(blocks: BlockModel, tokens: int) -> Product:
    """Return the product of last hidden states with the vocabulary."""
    columns, inner = blocks.head().weight.shape
    return Product(tokens, inner, columns, blocks.dtype)


def distinct_states(live: Live, genomes: Sequence[Genome]) -> tuple[list[list[Genome | None]], int]:
    """Return, for each block, the levels of every distinct state that must be computed there, and the number of final states."""
    state_of = [0] * len(genomes)
    runs: list[list[Genome | None]] = []
    for index in range(len(live.blocks.blocks)):
        children: dict[tuple[int, Genome | None], int] = {}
        for i, genome in enumerate(genomes):
            edge = (state_of[i], live.levels_in(genome, index))
            state_of[i] = children.setdefault(edge, len(children))
        runs.append([levels for _, levels in children if not live.skips(levels)])
    return runs, len(set(state_of))


def search_work(live: Live, questions: Sequence[Question], *, sequence_length: int) -> list[Product]:
    """Return the products that answering the questions of a search needs, the base model's logits included."""
    blocks = live.blocks
    work: list[Product] = []
    for question in questions:
        lengths = lengths_of(question.tokens, sequence_length)
        runs, num_final = distinct_states(live, question.genomes)
        for index, states in enumerate(runs):
            for levels in states:
                dropped = levels if is_module(live.space.units[0]) and levels is not None else (0, 0)
                work += block_work(blocks, index, lengths, attention=not dropped[0], mlp=not dropped[1])
        predicted = sum(count * (length - 1) for count, length in lengths)
        work.append(head_work(blocks, predicted).times(num_final + 1))
    return merged(work)


def merged(work: Sequence[Product]) -> list[Product]:
    """Add up products of the same shape."""
    counts: dict[Product, float] = {}
    for product in work:
        shape = replace(product, count=1.0)
        counts[shape] = counts.get(shape, 0.0) + product.count
    return [shape.times(count) for shape, count in counts.items()]


def hessian_work(columns: int, tokens: int, dtype: torch.dtype = torch.float32) -> Product:
    """Return the product of a Hessian's accumulation, Xᵀ X, its symmetric half once.

    Args: dtype: in which inputs are multiplied; sums are float32 in any case.
    """
    return Product(columns, tokens, columns, dtype).times((columns + 1) / (2 * columns))


def sweep_work(rows: int, columns: int, *, block_size: int = 128) -> Product:
    """Return the updates of a sweep over stacked rows: a column's error reaches all later columns, R · C · (C - 1) operations."""
    block = min(block_size, columns)
    shape = Product(max(columns // 2, 1), block, rows, torch.float32)  # an update of half the columns by a finished block
    return shape.times(rows * columns * (columns - 1.0) / shape.flops)


def factor_work(columns: int) -> Product:
    """Return a Cholesky factor and its inverse, 2/3 C³ operations, as products of that size."""
    shape = Product(columns, columns, columns, torch.float32)
    return shape.times(2.0 / 3.0 * columns**3 / shape.flops)


def error_work(rows: int, columns: int) -> Product:
    """Return the product of a level's output error, E H, one triangle of H with its diagonal."""
    return Product(rows, columns, columns, torch.float32).times((columns + 1) / (2 * columns))
