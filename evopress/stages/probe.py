"""Measure for a second or two how fast this machine is: one block, one chunk of logits, a few rows of one block's levels.

Nothing of the run is computed here, and none of its generators is touched. Models too small for that to tell anything are left out.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from evopress.compress.compressor import Compressor
from evopress.compress.sparse import SparsityLevels
from evopress.fitness.measures import Measure
from evopress.levels.calibration import collect_hessians
from evopress.models.blocks import BlockModel

LEAST_PARAMETERS = 5_000_000
"""Of a model that is worth a probe."""
_TOKENS = 512
_ROWS = (32, 256)
"""Of the slices that are compressed: the difference tells what a row takes, the rest what a sweep takes whatever its rows."""
_COLUMNS = 2048
_MOST_FORMS = 3
"""Of blocks that are measured."""


@dataclass(frozen=True)
class Speed:
    """What was measured, in seconds; of blocks the mean over all, by one of each form."""

    block: float
    """Per token and block."""
    head: float
    """Per token of a candidate: logits and measure."""
    reference: float
    """Per token of a minibatch: the dense model's logits."""
    hessians: float
    """Per token and block, the forward included."""
    compress: float
    """Per block: all levels of all its units."""
    outside: Mapping[str, float]
    """By unit outside the blocks: all its levels."""
    seconds: float
    """That the probe took."""


@torch.no_grad()
def measure_speed(
    blocks: BlockModel, ids: Tensor, measure: Measure, compressor: Compressor | None, *, chunk_tokens: int
) -> Speed | None:
    """Measure the first block of each form, and the head; None for a model too small to tell.

    Args:
        ids: token ids int64 [N, L]; the first sequence's first 512 are used.
        compressor: what makes the levels that are missing; None: none are.
    """
    if sum(parameter.numel() for parameter in blocks.model.parameters()) < LEAST_PARAMETERS:
        return None
    started = time.perf_counter()
    ids = ids[:1, :_TOKENS]
    hidden = blocks.embed(ids)
    blocks.prepare(ids.shape[1])
    means = [0.0, 0.0, 0.0]
    for index, share in _forms(blocks).items():
        means = [mean + share * each for mean, each in zip(means, _block_seconds(blocks, index, hidden, compressor), strict=True)]
    block, hessians, compress = means
    outside = {}
    if compressor is not None:
        for slot in (slot for part in blocks.parts[len(blocks.blocks) :] for slot in blocks.slots(part).values()):
            fixed, per_row = _fit(slot.name, slot.weight, compressor)
            outside[slot.name] = fixed + per_row * slot.weight.shape[0]
    head = blocks.head()
    # Random states: a token's own embedding leaves all others probabilities so small that a CPU is slow with them.
    drawn = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden)
    chunk = blocks.finish(drawn)[0, :-1][:chunk_tokens]
    labels = ids[0, 1:][:chunk_tokens].to(blocks.device)
    reference = measure.reference(chunk, labels, head)
    per_reference = _timed(lambda: measure.reference(chunk, labels, head), blocks.device, times=2) / len(chunk)
    per_candidate = _timed(lambda: measure(chunk, reference, head), blocks.device, times=3) / len(chunk)
    return Speed(block, per_candidate, per_reference, hessians, compress, outside, time.perf_counter() - started)


@contextmanager
def _unsaid(name: str) -> Iterator[None]:
    """Keep a module's log quiet."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _forms(blocks: BlockModel) -> dict[int, float]:
    """Return the first block of each of the most frequent forms, and its share: a model's first may have no experts, say."""
    found: dict[Any, list[int]] = {}
    for index, block in enumerate(blocks.blocks):
        form = tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())
        found.setdefault(form, []).append(index)
    most = sorted(found.values(), key=len, reverse=True)[:_MOST_FORMS]
    return {indices[0]: len(indices) / sum(map(len, most)) for indices in most}


def _block_seconds(blocks: BlockModel, index: int, hidden: Tensor, compressor: Compressor | None) -> tuple[float, float, float]:
    """Return what a block takes for each token, with Hessians too, and what all levels of its units take."""
    count = hidden.shape[0] * hidden.shape[1]
    with blocks.on_device(index):
        block = _timed(lambda: blocks.run(index, hidden), blocks.device, times=5) / count
        if compressor is None:
            return block, block, 0.0
        before = time.perf_counter()
        with _unsaid(collect_hessians.__module__):  # what it says of experts that few of these tokens reach
            owners = collect_hessians(blocks, index, hidden.cpu(), 1).owners
        _wait(blocks.device)
        hessians = max((time.perf_counter() - before) / count, block)
        return block, hessians, _compress_seconds(blocks, index, compressor, owners)


def _compress_seconds(blocks: BlockModel, index: int, compressor: Compressor, owners: Mapping[str, str]) -> float:
    """Return what all levels of a block's units take, from slices of them; units with one owner are swept together."""
    weights = {name: slot.weight for name, slot in blocks.slots(index).items()}
    rows: Counter[str] = Counter()
    for name, weight in weights.items():
        rows[owners[name]] += len(weight)
    fits: dict[int, tuple[float, float]] = {}
    total = 0.0
    for name, count in rows.items():
        columns = weights[name].shape[1]
        if columns not in fits:
            fits[columns] = _fit(name, weights[name], compressor)
        fixed, per_row = fits[columns]
        total += fixed + per_row * count
    return total


def _fit(name: str, W: Tensor, compressor: Compressor) -> tuple[float, float]:
    """Return the seconds that a sweep of weights as wide as W [R, C] takes, and each of its rows; wide ones are cut and scaled."""
    group = getattr(compressor, "group_size", None) or 1
    columns = min(W.shape[1], max(_COLUMNS // group * group, group))
    H = torch.eye(columns, device=W.device)
    few, many = (min(count, W.shape[0]) for count in _ROWS)
    seconds = []
    for count in (few, few, many):  # the first one warms up
        part = W[:count, :columns].contiguous()
        sliced = compressor
        if isinstance(compressor, SparsityLevels):  # as many levels as the whole weight has
            sliced = replace(compressor, step=max(compressor.step * part.numel() // W.numel(), 1))
        seconds.append(_timed(lambda p=part, c=sliced: c.compress({name: p}, H), W.device, times=1))  # type: ignore[misc]
    wider = (W.shape[1] / columns) ** 2
    if many == few:
        return 0.0, seconds[1] / few * wider
    per_row = max(seconds[2] - seconds[1], 0.0) / (many - few)
    return max(seconds[1] - per_row * few, 0.0) * wider, per_row * wider


def _timed(work: Callable[[], object], device: torch.device, *, times: int) -> float:
    """Return the median of the seconds that a piece of work takes."""
    seconds = []
    for _ in range(times):
        _wait(device)
        before = time.perf_counter()
        work()
        _wait(device)
        seconds.append(time.perf_counter() - before)
    return median(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
