"""Part limit: where the time of a search goes, operator by operator."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from evopress.fitness.population import PopulationEvaluator
from evopress.models.blocks import BlockModel
from experiments.benchmark.rows import Bench, Row
from experiments.benchmark.search import searcher
from experiments.benchmark.work import search_work

MATRIX, ATTENTION, OTHER = "matrix products", "attention", "other"
_SPAN = "benchmark.attention"
_PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addbmm", "aten::dot", "aten::mv", "aten::addmv"}
_PRODUCTS |= {"mkldnn::_linear_pointwise", "aten::mkldnn_linear", "aten::linear", "aten::matmul", "aten::einsum"}
_LARGEST = 10
"""Other operators that are named; the rest is added up."""


def limit(bench: Bench) -> Iterator[Row]:
    """Part limit: the share of matrix products and attention in the search's time."""
    for name in bench.size.profiled:
        run = searcher(bench, name)
        most, cuda = bench.size.max_tokens_in_flight, bench.meter.device.type == "cuda"
        taken = bench.meter.alone(partial(run.run, PopulationEvaluator(run.found.live, max_tokens_in_flight=most)))
        outcome = taken.result
        with one_thread(), attention_spans(run.subject.blocks):
            evaluator = PopulationEvaluator(run.found.live, max_tokens_in_flight=most)
            with _profiler(cuda=cuda) as profiled:
                watched, _ = bench.meter.timed(partial(run.run, evaluator))
        found = divided(profiled.events(), on_device=cuda)
        found[OTHER, "between operators (Python, and the device's idle time)"] = max(watched - sum(found.values()), 0.0)
        total = sum(found.values())
        bench.where += [
            {"row": name, "group": group, "operator": operator, "seconds": spent, "share": spent / total}
            for (group, operator), spent in shortened(found)
        ]
        products = sum(spent for (group, _), spent in found.items() if group != OTHER) / total
        needed = search_work(run.found.live, outcome.questions, sequence_length=run.sequences.shape[1])
        names = ", ".join(f"{operator} {spent / total:.0%}" for (group, operator), spent in shortened(found) if group == OTHER)
        yield Row(
            part="limit",
            case=name,
            fast_seconds=taken.seconds,
            passes=len(taken.samples),
            note=f"divided with one thread, under the profiler; others: {names}",
            products_share=products,
        ).needing(needed, bench.rates)


def divided(events: Any, *, on_device: bool) -> dict[tuple[str, str], float]:
    """Divide the time of profiled events: (group, operator) to seconds of its own.

    What runs inside an attention module, its projections aside, counts as attention.
    """
    found: dict[tuple[str, str], float] = defaultdict(float)
    for event in events:
        own = event.self_device_time_total if on_device else event.self_cpu_time_total
        if own <= 0 or (event.name == _SPAN and on_device):
            continue
        if event.name in _PRODUCTS and not (event.name in ("aten::bmm", "aten::baddbmm") and _inside(event)):
            group = MATRIX
        else:
            group = ATTENTION if _inside(event) else OTHER
        found[group, event.name] += own * 1e-6
    return found


def shortened(found: dict[tuple[str, str], float]) -> list[tuple[tuple[str, str], float]]:
    """Keep the groups of interest whole and the largest other operators by name."""
    rows = []
    for group in (MATRIX, ATTENTION):
        rows.append(((group, group), sum(spent for (of, _), spent in found.items() if of == group)))
    others = sorted(((key, spent) for key, spent in found.items() if key[0] == OTHER), key=lambda item: -item[1])
    rows += others[:_LARGEST]
    if len(others) > _LARGEST:
        rows.append(((OTHER, "the rest"), sum(spent for _, spent in others[_LARGEST:])))
    return rows


def _inside(event: Any) -> bool:
    """Tell whether an event ran inside an attention module."""
    while event is not None:
        if event.name == _SPAN:
            return True
        event = event.cpu_parent
    return False


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread: what several do at a time cannot be divided among operators."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


@contextmanager
def attention_spans(blocks: BlockModel) -> Iterator[None]:
    """Mark the attention of every block for the profiler."""
    handles, open_spans = [], []

    def enter(module: nn.Module, args: Any) -> None:
        span = record_function(_SPAN)
        span.__enter__()
        open_spans.append(span)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        open_spans.pop().__exit__(None, None, None)

    blocks.prepare(2)  # captured anew under the hooks otherwise
    for block in blocks.blocks:
        module = block.get_submodule(blocks.family.attention)
        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _profiler(*, cuda: bool) -> Any:
    return profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])], acc_events=True)
