"""Part stream: a model larger than the device, its blocks streamed from host memory, searched one generation."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from evopress.errors import EvoPressError
from evopress.fitness.population import PopulationEvaluator
from experiments.benchmark.levels import searched
from experiments.benchmark.rows import NAN, Bench, Row
from experiments.benchmark.search import describe, prepare
from experiments.benchmark.sizes import ROWS, table8
from experiments.benchmark.subject import Subject, make_streamed_blocks
from experiments.benchmark.work import search_work

ROW = "depth_pruning"
"""The row that is searched: its levels are modules, so that what is measured is the streaming of blocks."""


def stream(bench: Bench) -> Iterator[Row]:
    """Part stream."""
    size, device = bench.size, bench.meter.device
    if size.stream is None:
        raise EvoPressError(f"size {size.name} has no model to stream: use --size llama_8b_gpu, or leave the part out")
    if device.type != "cuda":
        raise EvoPressError(f"blocks are streamed to a CUDA device and this is {device.type}: leave the part out")
    bench.forget_subject()  # room on the device
    blocks = make_streamed_blocks(size.stream, dtype=size.dtype, device=device, seed=bench.seed)
    subject = Subject(blocks, sequence_length=size.sequence_length, seed=bench.seed)
    run = prepare(searched(ROWS[ROW], subject, size, bench.scratch), subject, size, table8(ROW, size), seed=bench.seed)
    evaluator = PopulationEvaluator(run.found.live, max_tokens_in_flight=size.max_tokens_in_flight)
    torch.cuda.reset_peak_memory_stats(device)
    seconds, outcome = bench.meter.timed(lambda: run.run(evaluator))
    needed = search_work(run.found.live, outcome.questions, sequence_length=run.sequences.shape[1])
    weights = sum(parameter.numel() * parameter.element_size() for block in blocks.blocks for parameter in block.parameters())
    stages = len(outcome.questions)
    yield Row(
        part="stream",
        case=f"{ROW}, {len(blocks.blocks)} blocks of width {blocks.hidden_size} streamed",
        fast_seconds=seconds,
        plain_seconds=NAN,
        passes=1,
        fast_device_bytes=torch.cuda.max_memory_allocated(device),
        fast_bytes=float(weights * stages),
        bytes_of="streamed, at most",
        fast_tokens_per_second=outcome.tokens / seconds,
        note=f"{describe(run.settings)}; one pass; in host memory all blocks have the first one's weights",
    ).needing(needed, bench.rates)
