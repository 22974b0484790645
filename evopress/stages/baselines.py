"""Stages `database` and `baselines`: make the levels, and find the genomes that the search is compared with."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from evopress.baselines.best_of_random import best_of_random
from evopress.baselines.block_importance import RANKINGS
from evopress.baselines.dynamic_programming import dynamic_programming, least_with_modules
from evopress.baselines.owl import GRID, MULTIPLES, outlier_ratios, owl_kept
from evopress.baselines.uniform import uniform_genomes
from evopress.compress.sparse import PruneTo, SparsityLevels
from evopress.data.tokens import tokens_digest
from evopress.errors import EvoPressError
from evopress.evaluation.heldout import measure_held_out
from evopress.fitness.measures import KLDivergence, Measure, NegativeLogLikelihood, TopkKL
from evopress.fitness.minibatch import MinibatchFitness
from evopress.json_files import shown
from evopress.levels.store import LevelDatabase
from evopress.reporting.records import read_document, write_json
from evopress.settings import FitnessSettings
from evopress.stages.depth import rank_blocks, search_all
from evopress.stages.results import read_result
from evopress.units import Genome, Space
from evopress.workspace import Workspace

logger = logging.getLogger(__name__)
_DATABASE = re.compile("[a-z]+-[0-9a-f]{16}")
"""A level database's folder, beside the run's own."""


def build_database(workspace: Workspace) -> None:
    """Stage `database`: build what is missing of the level database, or reuse it."""
    started = time.monotonic()
    database, _ = workspace.database, workspace.budget
    result = read_result(workspace.run_dir)
    result["database"] = {
        "path": str(database.folder),
        "bytes": database.num_bytes,
        "seconds": time.monotonic() - started,
        "reused": workspace.database_reused,
    }
    write_json(workspace.run_dir / "result.json", result)


def make_measure(settings: FitnessSettings, *, fused: bool = False) -> Measure:
    """Return what the search minimises."""
    if settings.name == "topk_kl":
        return TopkKL(settings.k)
    return NegativeLogLikelihood() if settings.name == "perplexity" else KLDivergence(fused=fused)


def make_fitness(workspace: Workspace, rng: np.random.Generator, num_sequences: int | None = None) -> MinibatchFitness:
    """Return the fitness on the search text, or its first sequences, minibatches drawn by `rng`."""
    settings = workspace.settings.fitness
    return MinibatchFitness(
        workspace.evaluator,
        workspace.search_tokens[:num_sequences],
        rng=rng,
        base=workspace.search_base[:num_sequences],
        measure=make_measure(settings, fused=workspace.fused),
        chunk_tokens=settings.chunk_tokens,
        max_tokens_in_flight=settings.max_tokens_in_flight,
    )


def what_decides_fitness(workspace: Workspace, *, text: bool = True) -> dict[str, Any]:
    """Return the settings that a fitness and its minibatches come from, and the target: what had others is not gone on with.

    Args: text: with the digest of the search text, which is read for it.
    """
    settings = workspace.settings
    return {
        "seed": settings.seed,
        "fitness": settings.fitness.name,
        "fitness.k": settings.fitness.k if settings.fitness.name == "topk_kl" else None,
        **({"search text": tokens_digest(workspace.search_tokens)[:16]} if text else {}),
        "bits": settings.bits,
        "sparsity": settings.sparsity,
        "size": settings.size,
        "limits": settings.limits,
    }


def changes(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Say which settings an earlier run had otherwise; what its version did not write down is not compared."""
    return [f"{key} {shown(there[key])} there, {shown(here[key])} here" for key in here if key in there and there[key] != here[key]]


def baselines_as_asked(workspace: Workspace) -> dict[str, Any] | None:
    """Return what an earlier run of the same settings found; None if there is none, whatever its level database.

    Raises: EvoPressError as `read_baselines` does.
    """
    path = workspace.run_dir / "baselines.json"
    stored = read_baselines(path) if path.exists() else None
    if stored is None:
        return None
    asked = stored.get("asked", {})  # our first versions did not say
    return stored if isinstance(asked, dict) and not changes(asked, _asked(workspace)) else None


def _asked(workspace: Workspace) -> dict[str, Any]:
    return {**what_decides_fitness(workspace), **asdict(workspace.settings.baselines)}


def find_baselines(workspace: Workspace) -> None:
    """Stage `baselines`: find the genomes that the search is compared with, unless an earlier run of the same settings did."""
    path = workspace.run_dir / "baselines.json"
    settings = workspace.settings.baselines
    if path.exists():
        before = baselines_as_asked(workspace)
        if before is not None and before.get("database") == workspace.database.fingerprint:
            logger.info("baselines: already found in %s", path)
            return
        logger.info("baselines: those in %s were found with other settings; they are found again", path)
    space, budget = workspace.database.space, workspace.budget
    found: dict[str, Genome] = {}
    if "uniform" in settings.names:
        found |= _nearest_uniform(workspace)
    if "best_of_random" in settings.names:
        logger.info("best of %d random: %d tokens each", settings.num_random, settings.random_tokens)
        genome, _ = best_of_random(
            space,
            budget,
            make_fitness(workspace, workspace.rng["random_minibatch"]),
            num_candidates=settings.num_random,
            tokens=settings.random_tokens,
            rng=workspace.rng["random"],
        )
        found[f"best_of_{settings.num_random}"] = genome
    if "dp" in settings.names:
        if least_with_modules(space) > budget.total:
            logger.info("baseline dp is left out: it keeps all modules, whose weights take more than the target allows")
        else:
            found["dp"] = dynamic_programming(space, budget, workspace.database.errors)
    further: list[str] = []
    orders: dict[str, list[int]] = {}
    if ranked := [name for name in settings.names if name in RANKINGS]:
        genomes, orders = rank_blocks(workspace, ranked)
        found |= genomes
    if "exhaustive" in settings.names:
        found["exhaustive"] = search_all(workspace, make_fitness)
    if "owl" in settings.names:
        found["owl"], database = find_owl(workspace)
        further.append(database.folder.name)
    stored = {"schema": 1, "database": workspace.database.fingerprint, "asked": _asked(workspace), "further": further}
    write_json(path, {**stored, "genomes": {name: list(genome) for name, genome in found.items()}, "orders": orders})


def find_owl(workspace: Workspace) -> tuple[Genome, LevelDatabase]:
    """Return OWL's best genome over the paper's grid, in levels of the run's database followed by those of a second one.

    Source: OWL (arXiv:2310.05175) as in paper section 4.2. The outlier ratios and the second database, pruned as the first is, come
    from the Hessians that the first left behind; the grid's best is that with the least perplexity on calibration text.
    """
    settings, blocks = workspace.settings, workspace.blocks
    assert workspace.method.weights is not None
    pruner = workspace.method.weights.compressor((), dtype_bits=8 * blocks.dtype.itemsize)
    assert settings.sparsity is not None and isinstance(pruner, SparsityLevels)
    hessians = workspace.complete_hessians()
    num_blocks = len(blocks.blocks)
    logger.info("OWL: a grid of %d", len(GRID))
    linears = [blocks.linears(index) for index in range(num_blocks)]
    ratios = []
    for index in range(num_blocks):
        stored = hessians.read(index)
        H = [stored.hessians[stored.owners[name]] for name in linears[index]]
        ratios.append(outlier_ratios([linear.weight.detach() for linear in linears[index].values()], H))
    sizes = [[linear.weight.numel() for linear in block.values()] for block in linears]
    names = [name for block in linears for name in block]
    kept_by_pair = []
    for lambda_, multiple in GRID:
        column = MULTIPLES.index(multiple)
        kept = owl_kept([ratio[column] for ratio in ratios], sizes, sparsity=settings.sparsity, lambda_=lambda_)
        kept_by_pair.append([count for block in kept for count in block])
    choices = {name: sorted({kept[i] for kept in kept_by_pair}, reverse=True) for i, name in enumerate(names)}
    database, _ = workspace.database_of("owl", PruneTo(pruner=pruner, kept=choices))
    workspace.add_levels([database.folder.name])
    union = workspace.levels
    genomes = [
        union.genome_of_last(tuple(choices[name].index(count) for name, count in zip(names, kept, strict=True)))
        for kept in kept_by_pair
    ]
    length = workspace.calibration_tokens.shape[1]
    sequences = workspace.calibration_tokens[: max(settings.baselines.owl_tokens // length, 1)]
    fitness = settings.fitness
    scores = measure_held_out(
        workspace.evaluator,
        genomes,
        sequences,
        batch_tokens=fitness.max_tokens_in_flight,
        chunk_tokens=fitness.chunk_tokens,
        what="OWL's grid",
    )
    best = min(range(len(GRID)), key=lambda i: scores[i].perplexity)
    lambda_, multiple = GRID[best]
    logger.info("OWL: λ = %g, M = %g is best on calibration text (perplexity %.2f)", lambda_, multiple, scores[best].perplexity)
    return genomes[best], database


def _nearest_uniform(workspace: Workspace) -> dict[str, Genome]:
    """Return the uniform genomes on either side of the budget, or the one that costs exactly as much."""
    space, total = workspace.database.space, workspace.budget.total
    uniform = uniform_genomes(space, workspace.method.uniform_name)
    costs = {name: space.cost(genome) for name, genome in uniform.items()}
    within = max((name for name in costs if costs[name] <= total), key=costs.__getitem__, default=None)
    above = min((name for name in costs if costs[name] > total), key=costs.__getitem__, default=None)
    exact = within is not None and costs[within] == total
    return {name: uniform[name] for name in ((within,) if exact else (above, within)) if name is not None}


def stored_baselines(workspace: Workspace) -> tuple[dict[str, Genome], Space]:
    """Return the genomes that the stage `baselines` left behind, and the space of their levels.

    Raises: EvoPressError if they were found with another level database, or their file is damaged or of a newer version.
    """
    path, database = workspace.run_dir / "baselines.json", workspace.database
    if not path.exists():
        return {}, database.space
    stored = read_baselines(path, database=database.fingerprint)
    space = workspace.add_levels(stored["further"]) if stored["further"] else database.space
    return {name: space.check(genome) for name, genome in stored["genomes"].items()}, space


def read_baselines(path: Path, *, database: str | None = None) -> dict[str, Any]:
    """Read `baselines.json`: `genomes` has levels by name, `further` the folders of level databases beside the run's own.

    Args: database: fingerprint of the level database that they must be of; None: any.

    Raises: EvoPressError if it is damaged or of a newer version, or they are of another database.
    """
    stored = read_document(path, what="file of baselines")
    again = "remove it and run the stage baselines again"
    genomes, further = stored.get("genomes"), stored.get("further", [])
    if not isinstance(genomes, dict):
        raise EvoPressError(f"{path} is damaged: its genomes are {shown(genomes)}; {again}")
    for name, genome in genomes.items():
        if not isinstance(genome, list) or not all(type(level) is int for level in genome):
            raise EvoPressError(f"{path} is damaged: the genome of {shown(name)} is {shown(genome)}; {again}")
    if not isinstance(further, list) or not all(isinstance(name, str) and _DATABASE.fullmatch(name) for name in further):
        raise EvoPressError(
            f"{path} is damaged: it names the level databases {shown(further)}, expected such as owl-0123456789abcdef; {again}"
        )
    if database is not None and stored.get("database") != database:
        raise EvoPressError(f"{path} is of another level database: remove it and start again")
    return {**stored, "genomes": genomes, "further": further}
