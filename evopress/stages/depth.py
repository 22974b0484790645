"""The baselines of depth pruning: blocks ranked by their scores, and exhaustive search.

Scores and measured genomes are kept beside the run's manifest, so that another sparsity or seed finds them there.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evopress.baselines.block_importance import RANKINGS, Span, measure_spans, removal_order, windows
from evopress.baselines.exhaustive import exhaustive
from evopress.data.tokens import tokens_digest
from evopress.errors import EvoPressError
from evopress.evaluation.heldout import measure_held_out
from evopress.fitness.minibatch import MinibatchFitness
from evopress.levels.locking import alone_in
from evopress.levels.modules import PAIR, modules_of
from evopress.levels.store import fingerprint
from evopress.reporting.records import append_record, read_document, read_records, write_json
from evopress.units import Genome, Space
from evopress.workspace import Workspace

logger = logging.getLogger(__name__)
_BATCH = 64
"""Genomes of an exhaustive search that are evaluated together."""


def spans_of(space: Space) -> list[Span]:
    """Return the runs of blocks that are ranked: single blocks, or pairs where units are pairs."""
    width = 2 if space.units[0].kind == PAIR else 1
    blocks = {block for unit in space.units for block, _ in modules_of(unit)}
    return [(start, start + width) for start in range(0, len(blocks), width)]


def without(space: Space, spans: Sequence[Span]) -> Genome:
    """Return the genome that drops these runs of blocks and nothing else."""
    gone = {block for start, stop in spans for block in range(start, stop)}
    return tuple(len(unit.levels) - 1 if unit.block in gone else 0 for unit in space.units)


def rank_blocks(workspace: Workspace, names: Sequence[str]) -> tuple[dict[str, Genome], dict[str, list[int]]]:
    """Return the genomes of baselines that rank blocks, and their removal orders (paper, Table 13).

    Each drops as many blocks as the target says, attention and MLP together, the first ones of its order; the sliding window has no
    order.
    """
    space, budget = workspace.database.space, workspace.budget
    spans = spans_of(space)
    count = (len(space) - budget.total) * len(spans) // len(space)
    stuck = {unit.block for unit in space.units if len(unit.levels) == 1}
    excluded = {i for i, (start, stop) in enumerate(spans) if stuck & set(range(start, stop))}
    if len(spans) - len(excluded) < count:
        raise EvoPressError(
            f"method.exclude leaves {len(spans) - len(excluded)} whole blocks for baselines that drop {count}: exclude fewer, or "
            f"leave {', '.join(names)} out of baselines.names"
        )
    scores = _Scores(workspace, spans)
    genomes: dict[str, Genome] = {}
    orders: dict[str, list[int]] = {}
    for name in names:
        if name == "sliding_window":
            joined = windows(spans, count, excluded=excluded)
            values = scores.of_windows(list(joined))
            best = removal_order(name, values)[0]
            genomes[name] = without(space, [spans[i] for i in list(joined.values())[best]])
            continue
        ranking = RANKINGS[name].score
        values = scores.of_removal(ranking) if ranking in ("perplexity", "kl") else scores.of_activations(ranking)
        order = removal_order(name, values, excluded=excluded)
        genomes[name] = without(space, [spans[i] for i in order[:count]])
        orders[name] = [spans[i][0] for i in order]
    return genomes, orders


class _Scores:
    """The scores of a model's blocks on calibration text, measured when they are first asked for and kept in a file."""

    def __init__(self, workspace: Workspace, spans: Sequence[Span]) -> None:
        tokens = workspace.calibration_tokens
        self._tokens = tokens[: max(workspace.settings.baselines.importance_tokens // tokens.shape[1], 1)]
        self._workspace, self._spans = workspace, list(spans)
        digits = fingerprint({"tokens": tokens_digest(self._tokens), "spans": self._spans})
        self._path: Path = workspace.database.folder / f"scores-{digits}.json"
        self._known: dict[str, Any] = self._read()

    def _read(self) -> dict[str, Any]:
        try:
            if self._path.exists():
                return read_document(self._path, what="file of scores")
        except EvoPressError as error:
            logger.warning("%s (here the scores are measured again)", error)
        return {"schema": 1}

    def _get(self, key: str, measure: Callable[[], dict[str, list[float]]]) -> dict[str, list[float]]:
        if key not in self._known:
            self._known[key] = measure()
            with alone_in(self._path.parent):  # another run may be at work with the same database
                write_json(self._path, self._known)
        # What is not finite is null in the file.
        return {name: [math.inf if x is None else x for x in values] for name, values in self._known[key].items()}

    def of_activations(self, score: str) -> list[float]:
        """Return what one pass of the dense model says of every span."""
        return self._get("activations", lambda: self._measured(self._spans))[score]

    def of_windows(self, joined: Sequence[Span]) -> list[float]:
        """Return the cosine similarity over every window."""
        key = "windows " + " ".join(f"{start}-{stop - 1}" for start, stop in joined)
        return self._get(key, lambda: self._measured(joined))["cosine_similarity"]

    def of_removal(self, score: str) -> list[float]:
        """Return the perplexity, or the KL divergence, of the model without each span."""
        return self._get("removal", self._removed)[score]

    def _measured(self, spans: Sequence[Span]) -> dict[str, list[float]]:
        batch_tokens = self._workspace.settings.fitness.max_tokens_in_flight
        return measure_spans(self._workspace.blocks, self._tokens, spans, batch_tokens=batch_tokens)

    def _removed(self) -> dict[str, list[float]]:
        workspace, fitness = self._workspace, self._workspace.settings.fitness
        scores = measure_held_out(
            workspace.evaluator,
            [without(workspace.database.space, [span]) for span in self._spans],
            self._tokens,
            batch_tokens=fitness.max_tokens_in_flight,
            chunk_tokens=fitness.chunk_tokens,
            what="scoring blocks by their removal",
        )
        return {"perplexity": [score.perplexity for score in scores], "kl": [score.kl for score in scores]}


def search_all(workspace: Workspace, make_fitness: Callable[[Workspace, np.random.Generator, int], MinibatchFitness]) -> Genome:
    """Return the fittest of all genomes on the first search tokens; goes on where an earlier exhaustive search stopped.

    Raises: EvoPressError if there are more genomes than `baselines.exhaustive_limit`.
    """
    settings, budget = workspace.settings, workspace.budget
    length = workspace.search_tokens.shape[1]
    count = settings.baselines.exhaustive_tokens
    rows = len(workspace.search_tokens) if count is None else max(count // length, 1)
    digits = fingerprint(
        {
            "tokens": tokens_digest(workspace.search_tokens[:rows]),
            "fitness": [settings.fitness.name, settings.fitness.k],
            "budget": [budget.total, *map(list, budget.by_kind.items())],
        }
    )
    path = workspace.database.folder / f"exhaustive-{digits}.jsonl"
    known = {
        tuple(map(int, genome)): float(fitness)
        for record in read_records(path)
        for genome, fitness in zip(record["genomes"], record["fitnesses"], strict=True)
        if fitness is not None
    }

    def keep(measured: dict[Genome, float]) -> None:
        genomes = ["".join(map(str, genome)) for genome in measured]
        append_record(path, {"schema": 1, "genomes": genomes, "fitnesses": list(measured.values())})

    fitness: MinibatchFitness | None = None

    def fitness_of(genomes: Sequence[Genome]) -> list[float]:
        nonlocal fitness
        fitness = fitness or make_fitness(workspace, np.random.default_rng(0), rows)
        return fitness(genomes, tokens=rows * length)

    best, _ = exhaustive(
        workspace.database.space,
        budget,
        fitness_of,
        limit=settings.baselines.exhaustive_limit,
        batch=_BATCH,
        known=known,
        on_batch=keep,
    )
    return best
