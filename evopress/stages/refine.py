"""Stage `refine`: the found genome's units compressed anew at their levels, each for what enters it in the compressed model."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from evopress.data.tokens import tokens_digest
from evopress.errors import EvoPressError
from evopress.files import explained
from evopress.fitness.measures import KLDivergence
from evopress.fitness.minibatch import base_states
from evopress.fitness.scales import Learning, ScaleLearner
from evopress.fitness.suffix import SuffixLoss
from evopress.levels.build import opened_whole
from evopress.levels.live import LiveModel
from evopress.levels.plan import WalkSettings
from evopress.levels.refine import (
    ensure_refined,
    finite,
    folder_of,
    inexact_units,
    is_better,
    make_room,
    refined_units,
    steps_of,
)
from evopress.levels.scaled import ScaledLevels
from evopress.levels.store import MANIFEST, DamagedDatabaseError, LevelDatabase
from evopress.progress import counted
from evopress.ranks import collective, on_rank_zero
from evopress.reporting.records import read_genome, write_json
from evopress.stages.given import take_best_so_far
from evopress.stages.results import REFINED_ROW, forget_found, read_result
from evopress.units import Genome
from evopress.workspace import Workspace

logger = logging.getLogger(__name__)
REFINED = "refined"
"""Folder of a run that the refined levels lie in."""
_STATE = "learning.safetensors"
"""In a folder whose scales are being learned: how far that is."""
_AGAIN = "run the stage refine again, with those after it: stages=[refine,evaluate,export,report]"


def refuse_without_genome(workspace: Workspace) -> None:
    """Raise EvoPressError if there is no genome to refine and none will be found: before any model work."""
    stages = workspace.settings.stages
    begun = (workspace.run_dir / "state.json").exists()
    if "refine" in stages and "search" not in stages and not begun and workspace.refines:
        _genome_file(workspace)


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
    settings = [refine_settings(workspace, genome), learned_settings(workspace, genome)]
    keep = [folder_of(each, database) for each in settings] if gains else []
    for folder in _remove_others(workspace.run_dir, keep):
        logger.info("refine: %s was made with other settings or for another genome; it is made again", folder)
    refined = refine_genome(workspace, genome)
    if refined is None:
        return
    _remove_others(workspace.run_dir, [refined.folder])  # the walk, once its scales are learned
    summary = {**summary_of(refined), "tokens": workspace.refine_tokens.numel(), "seconds": time.monotonic() - started}
    logger.info("refine: %s", said(summary))
    result = read_result(workspace.run_dir)
    before = result.get("refine", {})
    if before | {"seconds": None} == summary | {"seconds": None}:  # it was there: what it took stays what it took
        summary["seconds"] = before.get("seconds")
    result["refine"] = summary
    write_json(workspace.run_dir / "result.json", result)


def why_nothing(workspace: Workspace) -> str:
    """Say why a method has nothing to refine, where it has not."""
    why = "stores no weights" if workspace.method.weights is None else "drops modules, which the second pass does not know yet"
    return f"method {workspace.method.name} {why}, so there is nothing to refine"


def refine_genome(workspace: Workspace, genome: Genome) -> LevelDatabase | None:
    """Compress the units of a genome of the stored levels anew; None, which is said, where every unit is its dense weight."""
    database = _database(workspace)
    if not inexact_units(database, genome):
        logger.info("refine: every unit has its dense weight, so there is nothing to refine")
        return None
    return _refined(workspace, genome)


@collective
def _refined(workspace: Workspace, genome: Genome) -> LevelDatabase:
    if not workspace.settings.refine.scale_epochs:
        return _walked(workspace, genome)
    settings = learned_settings(workspace, genome)
    folder = folder_of(settings, _database(workspace))
    return on_rank_zero(lambda: _learned_before(folder)) or _learned(workspace, _walked(workspace, genome), folder, settings)


def _learned_before(folder: Path) -> LevelDatabase | None:
    """Open what was learned if it is whole, and remove what a kill between the last two writes has left beside it."""
    if (found := opened_whole(folder)) is not None:
        with suppress(OSError):
            (folder / _STATE).unlink(missing_ok=True)
    return found


def _walked(workspace: Workspace, genome: Genome) -> LevelDatabase:
    def judge() -> SuffixLoss:
        logger.info(
            "refine: recompressing %d units on %d calibration tokens; %d tokens of held-back search text decide which are kept",
            len(inexact_units(_database(workspace), genome)),
            workspace.calibration_tokens.numel(),
            workspace.refine_tokens.numel(),
        )
        return _judge(workspace, genome)

    return ensure_refined(
        refine_settings(workspace, genome),
        workspace.untied_live,
        _database(workspace),
        genome,
        workspace.calibration_tokens,
        workspace.databases.compressor,
        judge,
    )


def _learned(workspace: Workspace, walked: LevelDatabase, folder: Path, settings: WalkSettings) -> LevelDatabase:
    """Learn the scales of refined levels, and write what comes of it; the scales stay as they are where that is better."""
    fitness, asked, text = workspace.settings.fitness, workspace.settings.refine, workspace.search_tokens
    levels = ScaledLevels(walked)
    on_rank_zero(lambda: make_room(folder, len(workspace.blocks.parts)))
    told: dict[str, Any] = {"kept": False, "before": None, "after": None, "tokens": text.numel() * asked.scale_epochs}
    state = folder / _STATE
    if levels.logarithms:
        epochs = counted(asked.scale_epochs, "time")
        logger.info(
            "refine: learning scales of %d units on %d tokens of search text, %s", len(levels.logarithms), text.numel(), epochs
        )
        learner = ScaleLearner(
            workspace.blocks,
            levels,
            text,
            workspace.search_base,
            Learning(asked.scale_epochs, asked.scale_rate),
            max_tokens_in_flight=fitness.max_tokens_in_flight,
            chunk_tokens=fitness.chunk_tokens,
        )
        judge = _judge_of(workspace, learner.live, (0,) * len(levels.space))
        before = judge.loss(0, {})
        learner.learn(state)
        after = judge.loss(0, {})
        told |= {"kept": is_better(after, before), "before": finite(before), "after": finite(after)}
        if not told["kept"]:
            for logarithms in levels.logarithms.values():
                logarithms.zero_()
    else:
        logger.info("refine: no weight is quantized with a scale that can be learned, so refine.scale_epochs changes nothing")

    def write() -> LevelDatabase:
        steps = [step.to_dict() for step in steps_of(walked)]
        levels.write(folder, settings.recipe, {"steps": steps, "scales": told})
        state.unlink(missing_ok=True)
        return LevelDatabase.open(folder)

    return on_rank_zero(write)


def _database(workspace: Workspace) -> LevelDatabase:
    assert isinstance(workspace.databases.stored, LevelDatabase), "what is refined is of one source"
    return workspace.databases.stored


def summary_of(refined: LevelDatabase) -> dict[str, Any]:
    """Return how many blocks' new weights stayed, and the loss before the first and after the last block."""
    steps = steps_of(refined)
    losses = [(step.before, step.after if step.kept else step.before) for step in steps if step.before is not None or step.kept]
    scales = _what_scales_became(refined)
    if scales is not None and scales["kept"]:
        losses.append((scales["before"], scales["after"]))
    return {
        "blocks": len(steps),
        "of": "blocks, head and embedding" if any(unit.is_outside for unit in refined.space.units) else "blocks",
        "kept": sum(step.kept for step in steps),
        "kl_before": losses[0][0] if losses else None,
        "kl_after": losses[-1][1] if losses else None,
        **({} if scales is None else {"scales": scales}),
    }


def _what_scales_became(refined: LevelDatabase) -> dict[str, Any] | None:
    """Return what the manifest says of learned scales; None where it says nothing, or something else."""
    told = refined.manifest.get("scales")
    if not isinstance(told, dict) or type(told.get("kept")) is not bool or type(told.get("tokens")) is not int:
        return None
    losses = {key: told.get(key) for key in ("before", "after")}
    if not all(loss is None or type(loss) is float for loss in losses.values()):
        return None
    return {"kept": told["kept"], **losses, "tokens": told["tokens"]}


def said(summary: dict[str, Any]) -> str:
    """Say a summary in words."""
    what = f"the new weights of {summary['kept']} of {summary['blocks']} {summary['of']} stay"
    if (scales := summary.get("scales")) is not None and scales["before"] is not None:
        what += f", learned scales {'' if scales['kept'] else 'do not '}stay"
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


def learned_settings(workspace: Workspace, genome: Genome) -> WalkSettings:
    """Return how a genome is refined where its scales are learned as well; where they are not, this is how it is refined."""
    settings, scales = refine_settings(workspace, genome), _scales(workspace)
    return settings if scales is None else replace(settings, recipe={**settings.recipe, "scales": scales})


def _scales(workspace: Workspace) -> dict[str, Any] | None:
    """Return what decides how scales are learned, for the recipe; None where they are not."""
    refine = workspace.settings.refine
    if not refine.scale_epochs:
        return None
    return {"epochs": refine.scale_epochs, "rate": refine.scale_rate, "text": tokens_digest(workspace.search_tokens)}


def made_otherwise(workspace: Workspace, recipe: Mapping[str, Any]) -> str | None:
    """Say with what other settings refined levels were made; None: with these."""
    if (correction := recipe.get("correction", 0.0)) != workspace.settings.refine.correction:
        return f"refine.correction={correction:g}"
    scales, asked = recipe.get("scales"), _scales(workspace)
    if scales == asked:
        return None
    if not isinstance(scales, dict):
        return "refine.scale_epochs=0"
    if asked is not None and all(scales.get(key) == asked[key] for key in ("epochs", "rate")):
        return "scales that were learned on other text"
    return f"refine.scale_epochs={scales.get('epochs')} refine.scale_rate={scales.get('rate')}"


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
        elif (otherwise := made_otherwise(workspace, recipe)) is not None:
            logger.info("%s was made with %s, so it is left out: %s", folder, otherwise, _AGAIN)
        elif refined.space.units != refined_units(_database(workspace), genome):
            raise EvoPressError(f"{folder} has other units or levels than the genome: {_AGAIN}")
        else:
            return refined
    return None


def _judge(workspace: Workspace, genome: Genome) -> SuffixLoss:
    return _judge_of(workspace, workspace.untied_live, genome)


def _judge_of(workspace: Workspace, live: LiveModel, genome: Genome) -> SuffixLoss:
    fitness = workspace.settings.fitness
    sequences = workspace.refine_tokens
    return SuffixLoss(
        live,
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


def _remove_others(run_dir: Path, keep: Collection[Path]) -> list[Path]:
    """Remove refined levels of other settings or genomes, which are those of no row any more, and return their folders."""
    root, removed = run_dir / REFINED, []
    for folder in root.glob("*") if root.is_dir() else []:
        if folder not in keep and folder.is_dir() and not folder.is_symlink():
            forget_found(run_dir, [REFINED_ROW])
            try:
                shutil.rmtree(folder)
            except OSError as error:
                raise explained(error, folder) from error
            removed.append(folder)
    return removed
