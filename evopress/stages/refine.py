"""Stage `refine`: the found genome's units compressed anew at their levels, each for what enters it in the compressed model."""

from __future__ import annotations

import logging
import math
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from evopress.data.tokens import tokens_digest
from evopress.errors import EvoPressError
from evopress.files import explained
from evopress.fitness.measures import KLDivergence
from evopress.fitness.minibatch import base_states
from evopress.fitness.suffix import SuffixLoss
from evopress.levels.passage import held_on_host, stay_on_device
from evopress.levels.plan import CORRECTED_FORWARDS, WalkSettings, batch_of, compressing_share, part_bytes
from evopress.levels.refine import ensure_refined, folder_of, inexact_units, refined_units, steps_of
from evopress.levels.store import MANIFEST, DamagedDatabaseError, LevelDatabase
from evopress.progress import counted
from evopress.ranks import collective, largest_shard
from evopress.reporting.records import read_genome, read_json, write_json
from evopress.resources import Needs
from evopress.stages.given import take_best_so_far
from evopress.stages.needs import Planner
from evopress.stages.results import REFINED_ROW, forget_found, read_result
from evopress.units import Genome, Unit
from evopress.workspace import Workspace

logger = logging.getLogger(__name__)
REFINED = "refined"
"""Folder of a run that the refined levels lie in."""
_AGAIN = "run the stage refine again, with those after it: stages=[refine,evaluate,export,report]"


def refuse_without_genome(workspace: Workspace) -> None:
    """Raise EvoPressError if there is no genome to refine and none will be found: before any model work."""
    stages = workspace.settings.stages
    begun = (workspace.run_dir / "state.json").exists()
    if "refine" in stages and "search" not in stages and not begun and workspace.refines:
        _genome_file(workspace)


def refine_needs(planner: Planner) -> Needs:
    """Return what the stage `refine` takes.

    Calibration text goes through each block, more often where weights are corrected, and candidates through what comes after it.
    """
    workspace, level_db, n = planner.workspace, planner.settings.level_db, planner.num_blocks
    if not workspace.refines:
        return planner.needs("refine", "nothing: modules are dropped")
    if (steps := _refined_before(planner)) is not None:
        return planner.needs("refine", f"done: {steps} blocks")
    calibration, judging = workspace.calibration_tokens, workspace.refine_tokens
    tokens, (_, judged) = largest_shard(len(calibration)) * calibration.shape[1], planner.mine(1, judging.numel())
    corrected = planner.settings.refine.correction > 0
    forwards = 2.0 + (CORRECTED_FORWARDS if corrected else 0)  # of the calibration text through each block
    suffixes = n + n * (n + 1) // 2 + n  # the genome as it was found, the candidates, the blocks that are settled
    walking = 2 if corrected else 1  # activations of all the text
    in_memory = level_db.activations == "memory"
    needs = planner.needs(
        "refine",
        f"{counted(n, 'block')} anew",
        disk={workspace.run_dir: _stored_bytes(planner) + (0 if in_memory else walking * planner.states(calibration.numel()))},
        less_memory="use fewer calibration tokens (data.calibration_tokens), level_db.activations=disk, or leave refine out of "
        "stages",
    )
    parts = _of_one_level(planner)
    compressing = compressing_share(workspace.blocks, parts[0], corrects=corrected) / max(
        len(unit.levels) for unit in planner.space.units
    )
    planner.add(
        needs,
        tokens + (n + 2) * judged,
        forwards * n * tokens + (n + suffixes) * judged,
        lambda speed: (
            n * (tokens * (speed.hessians + (forwards - 1) * speed.block) + speed.compress * compressing)
            + judged * ((n + suffixes) * speed.block + (n + 1) * (speed.head + speed.reference))
        ),
    )
    planner.hold(needs, 1, min(planner.settings.fitness.max_tokens_in_flight, judged))
    batch = batch_of(calibration, level_db.batch_tokens)
    held = planner.states(judging.numel() + 2 * judged)  # base, states twice
    activations = planner.states(walking * tokens) if in_memory else 0
    beside = stay_on_device(activations, workspace.blocks.device)
    held += 0 if beside else held_on_host(activations, workspace.blocks.device)
    compressor, length = workspace.databases.compressor, calibration.shape[1]
    text: dict[str, Any] = {"batch": batch, "length": length, "corrects": corrected, "settled": lambda unit: unit.levels[0]}
    working = max(part_bytes(workspace.blocks, units, compressor, **text) for units in parts)
    kept = planner.levels_kept * (1 if planner.space.untied is None else 2)  # the search's, and those of weights that are not tied
    planner.put(needs, kept + working + (activations if beside else 0), host=held)
    return needs


def _of_one_level(planner: Planner) -> list[list[Unit]]:
    """Return the weights that are made anew, with one level each, by the part that they are in; the embedding stays as it is."""
    units = [replace(unit, levels=unit.levels[:1]) for unit in planner.space.whole.units]
    blocks = planner.workspace.blocks
    parts = ([unit for unit in units if unit.block == part] for part in blocks.parts if part != blocks.embedding_part)
    return [those for those in parts if those]


def _refined_before(planner: Planner) -> int | None:
    """Return the blocks of refined levels that are there, whole by their names; None if the stage has to work."""
    folder = planner.workspace.run_dir
    if planner.asks:
        return None
    for path in (folder / REFINED).glob(f"*/{MANIFEST}"):
        try:
            recipe, files = (read_json(path)[key] for key in ("recipe", "files"))
            genome = [unit["level"] for unit in read_json(folder / "genome.json")["units"]]
            same = recipe["genome"] == genome and recipe.get("correction", 0) == planner.settings.refine.correction
            if same and recipe["decided_by"] == tokens_digest(planner.workspace.refine_tokens):
                return sum(file["block"] < planner.num_blocks for file in files)
        except (EvoPressError, KeyError, TypeError):
            continue  # the stage says what is wrong with it
    return None


def _stored_bytes(planner: Planner) -> int:
    """Return the bytes that a genome's levels take at the budget: between those of the least and the most."""
    space, least, most = planner.space, planner.space.least_cost, planner.space.greatest_cost
    share = (planner.budget.total - least) / max(most - least, 1)
    ends = [sum(unit.levels[i].stored_bits for unit in space.units) for i in (-1, 0)]
    return math.ceil((ends[0] + share * (ends[1] - ends[0])) / 8)


def refine(workspace: Workspace) -> None:
    """Stage `refine`: walk along the found genome once more; goes on where an earlier run stopped.

    Skipped, and said, where there is nothing to gain: modules are dropped, or every unit is at a level that is its weight itself.
    """
    if not workspace.refines:
        logger.info("refine: %s", why_nothing(workspace))
        return
    take_best_so_far(workspace)
    path, database = _genome_file(workspace), _database(workspace)
    genome = read_genome(path, database.space, database=database.fingerprint)
    started = time.monotonic()
    gains = bool(inexact_units(database, genome))
    _remove_others(workspace.run_dir, folder_of(refine_settings(workspace, genome), database) if gains else None)
    refined = refine_genome(workspace, genome)
    if refined is None:
        return
    summary = {**summary_of(refined), "tokens": workspace.refine_tokens.numel(), "seconds": time.monotonic() - started}
    logger.info("refine: %s", said(summary))
    result = read_result(workspace.run_dir)
    result["refine"] = summary
    write_json(workspace.run_dir / "result.json", result)


def why_nothing(workspace: Workspace) -> str:
    """Say why a method has nothing to refine, where it has not."""
    why = "stores no weights" if workspace.method.weights is None else "drops modules, which the second pass does not know yet"
    return f"method {workspace.method.name} {why}, so there is nothing to refine"


def refine_genome(workspace: Workspace, genome: Genome) -> LevelDatabase | None:
    """Compress the units of a genome of the stored levels anew; None, which is said, where every unit is its dense weight."""
    database = _database(workspace)
    if not (inexact := inexact_units(database, genome)):
        logger.info("refine: every unit has its dense weight, so there is nothing to refine")
        return None
    logger.info(
        "refine: recompressing %d units on %d calibration tokens; %d tokens of held-back search text decide which are kept",
        len(inexact),
        workspace.calibration_tokens.numel(),
        workspace.refine_tokens.numel(),
    )
    return _refined(workspace, refine_settings(workspace, genome), genome)


@collective
def _refined(workspace: Workspace, settings: WalkSettings, genome: Genome) -> LevelDatabase:
    return ensure_refined(
        settings,
        workspace.untied_live,
        _database(workspace),
        genome,
        workspace.calibration_tokens,
        workspace.databases.compressor,
        lambda: _judge(workspace, genome),
    )


def _database(workspace: Workspace) -> LevelDatabase:
    assert isinstance(workspace.databases.stored, LevelDatabase), "what is refined is of one source"
    return workspace.databases.stored


def summary_of(refined: LevelDatabase) -> dict[str, Any]:
    """Return how many blocks' new weights stayed, and the loss before the first and after the last block."""
    steps = steps_of(refined)
    losses = [(step.before, step.after if step.kept else step.before) for step in steps if step.before is not None or step.kept]
    return {
        "blocks": len(steps),
        "of": "blocks, head and embedding" if any(unit.is_outside for unit in refined.space.units) else "blocks",
        "kept": sum(step.kept for step in steps),
        "kl_before": losses[0][0] if losses else None,
        "kl_after": losses[-1][1] if losses else None,
    }


def said(summary: dict[str, Any]) -> str:
    """Say a summary in words."""
    what = f"the new weights of {summary['kept']} of {summary['blocks']} {summary['of']} stay"
    if summary["kl_before"] is None or summary["kl_after"] is None:
        return what
    return f"{what}, KL {summary['kl_before']:.4f} before and {summary['kl_after']:.4f} after"


def refine_settings(workspace: Workspace, genome: Genome) -> WalkSettings:
    """Return how a genome is refined."""
    level_db, correction = workspace.settings.level_db, workspace.settings.refine.correction
    return WalkSettings(
        root=workspace.run_dir / REFINED,
        recipe={
            "refined": 1,
            "database": workspace.database.fingerprint,  # model, calibration text and compressor with it
            "genome": list(genome),
            "decided_by": tokens_digest(workspace.refine_tokens),
            **({"correction": correction} if correction else {}),
        },
        batch_tokens=level_db.batch_tokens,
        activations=level_db.activations,
        correction=correction,
    )


def refined_levels(workspace: Workspace, genome: Genome) -> LevelDatabase | None:
    """Return what the stage refine made of a genome; None if it has not, or not of this one or so, which is said.

    Raises: EvoPressError if it is damaged.
    """
    root, database = workspace.run_dir / REFINED, workspace.database
    genome = database.space.unfold(genome)
    for folder in sorted(path for path in root.glob("*") if path.is_dir()) if root.is_dir() else []:
        if not (folder / MANIFEST).exists():
            logger.info("%s is not finished, so it is left out: %s", folder, _AGAIN)
            continue
        try:
            refined = LevelDatabase.open(folder)
        except DamagedDatabaseError as error:
            raise EvoPressError(f"{error}: {_AGAIN}") from error
        recipe = refined.manifest["recipe"]
        if (recipe.get("database"), recipe.get("genome")) != (database.fingerprint, list(genome)):
            logger.info("%s is of another genome or level database, so it is left out: %s", folder, _AGAIN)
        elif (correction := recipe.get("correction", 0.0)) != workspace.settings.refine.correction:
            logger.info("%s was made with refine.correction=%g, so it is left out: %s", folder, correction, _AGAIN)
        elif refined.space.units != refined_units(_database(workspace), genome):
            raise EvoPressError(f"{folder} has other units or levels than the genome: {_AGAIN}")
        else:
            return refined
    return None


def _judge(workspace: Workspace, genome: Genome) -> SuffixLoss:
    fitness = workspace.settings.fitness
    sequences = workspace.refine_tokens
    return SuffixLoss(
        workspace.untied_live,
        genome,
        sequences,
        base=base_states(workspace.evaluator, sequences, batch_tokens=fitness.max_tokens_in_flight),
        measure=KLDivergence(fused=workspace.fused),
        max_tokens_in_flight=fitness.max_tokens_in_flight,
        chunk_tokens=fitness.chunk_tokens,
        fused=workspace.fused,
    )


def _genome_file(workspace: Workspace) -> Path:
    path = workspace.run_dir / "genome.json"
    if not path.exists():
        raise EvoPressError(f"there is no genome.json in {workspace.run_dir} to refine: run the stage search first")
    return path


def _remove_others(run_dir: Path, keep: Path | None) -> None:
    """Remove refined levels of other settings or genomes: they are those of no row any more."""
    root = run_dir / REFINED
    for folder in root.glob("*") if root.is_dir() else []:
        if folder != keep and folder.is_dir() and not folder.is_symlink():
            forget_found(run_dir, [REFINED_ROW])
            logger.info("refine: %s was made with other settings or for another genome; it is made again", folder)
            try:
                shutil.rmtree(folder)
            except OSError as error:
                raise explained(error, folder) from error
