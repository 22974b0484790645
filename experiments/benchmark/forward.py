"""Parts e, f and g: the KL divergence, switching levels, and one dense forward."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evopress.errors import reason_of
from evopress.fitness.measures import KLDivergence
from evopress.fitness.population import measure_sums
from evopress.levels.live import LiveModel
from evopress.models.blocks import BlockModel
from evopress.units import Genome
from experiments.benchmark import plain, work
from experiments.benchmark.levels import searched
from experiments.benchmark.rows import Bench, Row, compared

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Held:
    """A live model's place in an evaluator that only has its blocks."""

    blocks: BlockModel


class GivenStates:
    """An evaluator whose last hidden states are there already."""

    def __init__(self, blocks: BlockModel, states: list[Tensor]) -> None:
        self.live: object = _Held(blocks)
        self.known_as = None
        self._states = states

    def final_states(self, genomes: object, ids: Tensor, *, apart: int | None = None) -> tuple[list[int], list[Tensor]]:
        """Return the states that were given, in a list that may be emptied."""
        return list(range(len(self._states))), list(self._states)


@torch.no_grad()
def kl(bench: Bench) -> Iterator[Row]:
    """Part e: KL divergences in chunks, both logits from hidden states, against whole sequences with the base's logits stored."""
    subject, size, blocks = bench.subject, bench.size, bench.subject.blocks
    ids = subject.tokens("search", size.kl_tokens)
    generator = torch.Generator().manual_seed(bench.seed)
    base = dense_states(blocks, ids)
    noise = [torch.randn(base.shape, generator=generator).to(base) for _ in range(size.kl_candidates)]
    states = [base + 0.1 * base.float().std().to(base.dtype) * part for part in noise]
    evaluator = GivenStates(blocks, states)
    head = blocks.head()
    stored = torch.stack([head.logits(sequence).cpu() for sequence in base])  # float32 [N, L, V], in host memory
    genomes: list[Genome | None] = [None] * len(states)

    def chunked() -> list[float]:
        sums, count = measure_sums(
            evaluator,  # type: ignore[arg-type]
            genomes,
            ids,
            base,
            KLDivergence(),
            chunk_tokens=size.chunk_tokens,
        )
        return (sums[:, 0] / count).tolist()

    def whole() -> list[float]:
        count = ids.shape[0] * (ids.shape[1] - 1)
        return [
            sum(plain.stored_kl(row.to(base.device), head.logits(part)) for row, part in zip(stored, state, strict=True)) / count
            for state in states
        ]

    fast, slow = bench.meter.alternate(chunked, whole)
    predicted = ids.shape[0] * (ids.shape[1] - 1)
    tokens = ids.numel() * len(states)
    yield compared(
        "e",
        f"KL of {len(states)} candidates, {ids.numel():,} tokens, vocabulary {len(head.weight):,}",
        fast,
        slow,
        difference=max(abs(a - b) / abs(b) for a, b in zip(fast.result, slow.result, strict=True)),
        difference_of="KL divergence, relative",
        fast_bytes=base.numel() * base.element_size(),
        plain_bytes=stored.numel() * stored.element_size(),
        bytes_of="targets",
        fast_tokens_per_second=tokens / fast.seconds,
        plain_tokens_per_second=tokens / slow.seconds,
        note="the stored logits are resident in both peaks",
    ).needing([work.head_work(blocks, predicted).times(len(states) + 1)], bench.rates)


def switching(bench: Bench) -> Iterator[Row]:
    """Part f: a block's levels from packed codes, cold and warm, against tensors from files that the system has at hand."""
    found = searched("quant", bench.subject, bench.size, bench.scratch)
    assert isinstance(found.live, LiveModel)
    source, space, blocks = found.live.levels, found.live.space, bench.subject.blocks
    indices = range(min(bench.size.switch_blocks, len(blocks.blocks)))
    genome: Genome = tuple(i % len(unit.levels) for i, unit in enumerate(space.units))
    keys = {unit.name: unit.levels[level].key for unit, level in zip(space.units, genome, strict=True)}
    folder = bench.fresh_folder("dequantized")
    packed = dequantized = 0
    for i, unit in enumerate(space.units):
        if unit.block in indices:
            weight = source.read(i, genome[i]).decode()
            plain.write_level(folder, unit.name, keys[unit.name], weight)
            packed += unit.levels[genome[i]].stored_bits // 8
            dequantized += weight.numel() * weight.element_size()
    # A pass leaves the last switched weights in place, for the comparison; `restored` gives the dense ones back.
    for case, live in (
        ("cold", LiveModel(blocks, source, cache_bytes=0)),
        ("warm", LiveModel(blocks, source, cache_bytes=2 * dequantized)),
    ):

        def switched(live: LiveModel = live) -> list[Tensor]:
            for index in indices:
                live.set_block(index, live.levels_in(genome, index))
            return weights()

        def read() -> list[Tensor]:
            for index in indices:
                plain.set_block(blocks, index, folder, keys)
            return weights()

        def weights() -> list[Tensor]:
            return [linear.weight.data for index in indices for linear in blocks.linears(index).values()]

        try:
            fast, slow = bench.meter.alternate(switched, read)
        finally:
            for index in indices:
                live.restore_block(index)
        differences = [float((a.float() - b.float()).abs().max()) for a, b in zip(fast.result, slow.result, strict=True)]
        yield compared(
            "f",
            f"levels of a block, {case}",
            fast,
            slow,
            per=len(indices),
            difference=max(differences),
            difference_of="weight",
            fast_bytes=packed / len(indices) if case == "cold" else 0,
            plain_bytes=dequantized / len(indices),
            bytes_of="read",
            note="packed codes read and decoded" if case == "cold" else "decoded before",
        )
    shutil.rmtree(folder, ignore_errors=True)


@torch.no_grad()
def dense_forward(bench: Bench) -> Iterator[Row]:
    """Part g: a dense forward block by block against the model's own, and a block compiled against the same block as it is."""
    blocks, size = bench.subject.blocks, bench.size
    ids = bench.subject.tokens("search", size.forward_tokens)
    lengths = [(ids.shape[0], ids.shape[1])]
    needed = [part for index in range(len(blocks.blocks)) for part in work.block_work(blocks, index, lengths)]

    def by_blocks() -> Tensor:
        return dense_states(blocks, ids)

    def own() -> Tensor:
        return blocks.decoder(input_ids=ids.to(blocks.device), use_cache=False).last_hidden_state

    config: Any = blocks.model.config
    mine: str = config._attn_implementation
    for attention in dict.fromkeys((mine, "sdpa")):

        def of_transformers(attention: str = attention) -> Tensor:
            try:
                config._attn_implementation = attention
                return own()
            finally:
                config._attn_implementation = mine

        fast, slow = bench.meter.alternate(by_blocks, of_transformers)
        row = compared(
            "g",
            f"dense forward of {ids.numel():,} tokens, plain with attention {attention}",
            fast,
            slow,
            difference=float((fast.result.float() - slow.result.float()).abs().max() / slow.result.float().abs().max()),
            difference_of="last hidden state, relative to its greatest entry",
            note=f"block by block, attention {mine}",
            fast_tokens_per_second=ids.numel() / fast.seconds,
            plain_tokens_per_second=ids.numel() / slow.seconds,
        )
        yield row.needing(work.merged(needed), bench.rates)
    if size.compiled:
        yield _compiled(bench, ids)


def _compiled(bench: Bench, ids: Tensor) -> Row:
    """Compare a block compiled by torch with the block as it is; a row that says so where there is no compiler."""
    blocks = bench.subject.blocks
    hidden = blocks.embed(ids)
    blocks.prepare(ids.shape[1])
    block = blocks.blocks[0]
    eager = block._compiled_call_impl

    def run(implementation: object) -> Tensor:
        block._compiled_call_impl = implementation  # type: ignore[assignment]
        try:
            return blocks.run(0, hidden)
        finally:
            block._compiled_call_impl = eager

    with blocks.on_device(0):
        implementation = torch.compile(block._call_impl)
        try:
            run(implementation)
        except Exception as error:  # whatever dynamo, inductor or the compiler behind them raises
            return Row(part="g", case="a block compiled", note=f"not compiled: {reason_of(error)}")
        fast, slow = bench.meter.alternate(lambda: run(implementation), lambda: run(None))
    difference = float((fast.result.float() - slow.result.float()).abs().max() / slow.result.float().abs().max())
    row = compared(
        "g",
        f"a block compiled, plain as it is, {ids.numel():,} tokens",
        fast,
        slow,
        difference=difference,
        difference_of="hidden state, relative to its greatest entry",
        note="torch.compile, compilation not counted",
    )
    return row.needing(work.block_work(blocks, 0, [(ids.shape[0], ids.shape[1])]), bench.rates)


@torch.no_grad()
def dense_states(blocks: BlockModel, ids: Tensor) -> Tensor:
    """Return the dense model's last hidden states [N, L, d], block by block."""
    hidden = blocks.embed(ids)
    for index in range(len(blocks.blocks)):
        with blocks.on_device(index):
            hidden = blocks.run(index, hidden)
    return blocks.finish(hidden)
