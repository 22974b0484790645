"""Scores of spans of blocks the direct way: whole forwards of the model, one sequence and one token at a time, in float64."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from evopress.models.blocks import BlockModel


def boundary_states(blocks: BlockModel, sequence: Tensor) -> np.ndarray:
    """Return what enters each block, and what leaves the last one, float64 [blocks + 1, L, d], for token ids int64 [L].

    The model's own last hidden state is taken after the final norm, so that of the last block is caught as it leaves the block.
    """
    caught: list[Tensor] = []

    def keep(module: torch.nn.Module, args: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        caught.append(output[0] if isinstance(output, tuple) else output)

    handle = blocks.blocks[-1].register_forward_hook(keep)
    try:
        with torch.no_grad():
            states = blocks.model(input_ids=sequence[None], use_cache=False, output_hidden_states=True).hidden_states
    finally:
        handle.remove()
    assert len(states) == len(blocks.blocks) + 1
    return np.stack([state[0].double().numpy() for state in (*states[:-1], caught[0])])


def span_scores(states: np.ndarray, start: int, stop: int) -> dict[str, list[float]]:
    """Return the scores of a span for every token of one sequence, from its boundary states."""
    scores: dict[str, list[float]] = {"cosine_similarity": [], "norm_ratio": [], "l2": [], "l2_normalized": []}
    for x, y in zip(states[start], states[stop], strict=True):
        length_x, length_y = np.sqrt((x * x).sum()), np.sqrt((y * y).sum())
        change = np.sqrt(((y - x) ** 2).sum())
        scores["cosine_similarity"].append((x * y).sum() / (length_x * length_y))
        scores["norm_ratio"].append(change / length_y)
        scores["l2"].append(change)
        scores["l2_normalized"].append(np.sqrt(((y / length_y - x / length_x) ** 2).sum()))
    return scores


def literal_scores(blocks: BlockModel, tokens: Tensor, spans: list[tuple[int, int]]) -> dict[str, list[float]]:
    """Return each score's mean over all tokens int64 [N, L], per span."""
    states = [boundary_states(blocks, sequence) for sequence in tokens]
    means: dict[str, list[float]] = {"cosine_similarity": [], "norm_ratio": [], "l2": [], "l2_normalized": []}
    for start, stop in spans:
        parts = [span_scores(state, start, stop) for state in states]
        for name, values in means.items():
            values.append(float(np.mean([value for part in parts for value in part[name]])))
    return means
