"""The last file that a run writes: the stages that are done, with which settings, and from what model and text."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from evopress.data.tokens import tokens_digest
from evopress.earlier_versions import refine_without_later
from evopress.errors import EvoPressError
from evopress.files import sha256_file
from evopress.levels.store import MANIFEST
from evopress.reporting.records import each_record, read_document, read_json, write_json
from evopress.reporting.tables import number
from evopress.result_settings import HOW_IT_RUNS, result_settings, result_settings_before
from evopress.settings import STAGES, PathsSettings, RunSettings, TrackerSettings
from evopress.stages.exports import EXPORTED_BEFORE, exports_asked
from evopress.stages.given import file_of
from evopress.stages.results import read_result
from evopress.workspace import Workspace

logger = logging.getLogger(__name__)
FINISHED = "finished.json"


def finish(workspace: Workspace, done: Collection[str], earlier: Mapping[str, Any], *, fitness: float | None = None) -> None:
    """Write that the stages of a run are done, beside those that were.

    Args:
        done: of earlier runs, as `stages_done` returns them.
        earlier: what the file said before, as `read_finished` returns it.
        fitness: of what was found, on text that is the same for all searches; None: it was not measured there.
    """
    settings = workspace.settings
    there = earlier.get("contents", {}) if done else {}
    stages = [stage for stage in STAGES if stage in {*done, *settings.stages}]
    finished = {
        "schema": 1,
        "settings": settings_digest(settings),
        "contents": there | contents(workspace, settings.stages),
        "stages": stages,
    }
    if fitness is None and "search" in done and "search" not in settings.stages:
        fitness = number(earlier.get("fitness"))
    if fitness is not None:
        finished["fitness"] = fitness
    if "refine" in stages:
        finished["refine"] = _refine(settings) if "refine" in settings.stages else earlier.get("refine")
    if "export" in stages:
        there = _exported(earlier) if done and "export" in earlier.get("stages", ()) else {}
        exported = {**there, **(exports_asked(settings) if "export" in settings.stages else {})}
        if exported != EXPORTED_BEFORE:
            finished["exports"] = exported
    write_json(workspace.run_dir / FINISHED, finished)


def begin_again(run_dir: Path, stages: Collection[str], done: Collection[str], earlier: Mapping[str, Any]) -> None:
    """Let what is written of a finished run be without the stages that are about to be done: killed in them, it has the others.

    Args:
        done: of earlier runs, as `stages_done` returns them.
        earlier: what the file says, as `read_finished` returns it.
    """
    if kept := [stage for stage in done if stage not in stages]:
        write_json(run_dir / FINISHED, {**earlier, "stages": kept})
    else:
        (run_dir / FINISHED).unlink(missing_ok=True)


def _exported(finished: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a finished run has exported, name to options."""
    exported = finished.get("exports", EXPORTED_BEFORE)
    return exported if isinstance(exported, dict) else {}


def read_finished(run_dir: Path) -> dict[str, Any]:
    """Return what the file says; nothing counts as done where there is none, or it is damaged or of another version."""
    try:
        return read_document(run_dir / FINISHED, what="list of finished stages")
    except EvoPressError:
        return {}


def stages_done(settings: RunSettings, run_dir: Path, kept: Mapping[str, Any] = MappingProxyType({})) -> list[str]:
    """Return the stages that finished runs of the same settings, model and text have done in a folder.

    `stages` and `resume` may differ; what follows the stage refine is done only where that one is, if it is asked for. What changed
    in place, under the same path, is known by its content.

    Args: kept: of `HOW_IT_RUNS`, what the folder's own config has, by which digests of earlier versions are known.
    """
    finished = read_finished(run_dir)
    try:
        result = read_result(run_dir)
    except EvoPressError:
        return []
    stages = finished.get("stages")
    if not isinstance(stages, list) or not _are_of(finished, settings, kept):
        return []
    there = finished["contents"] if "contents" in finished else _of_database(result)
    known = [stage for stage in STAGES if stage in stages]
    if not isinstance(there, dict):
        return []
    if there and (changed := _changed(settings, run_dir, there, known)):
        logger.info("%s was finished with another model or text (%s): its results are not reused", run_dir, changed)
        return []
    if "refine" in settings.stages and finished.get("refine") != _refine(settings):
        known = [stage for stage in known if stage not in STAGES[STAGES.index("refine") :]]
    there, asked = _exported(finished), exports_asked(settings)
    if "export" in settings.stages and any(there.get(name) != options for name, options in asked.items()):
        known = [stage for stage in known if stage != "export"]
    return [stage for stage in known if stage != "evaluate" or result.get("rows")]


def _are_of(finished: Mapping[str, Any], settings: RunSettings, kept: Mapping[str, Any]) -> bool:
    """Tell whether what is written of a finished run was written with these settings, by this version or an earlier one."""
    digest = finished.get("settings")
    return isinstance(digest, str) and (digest == settings_digest(settings) or digest in _digests_before(settings, kept))


def compared_fitness(run_dir: Path) -> float | None:
    """Return the fitness of what a finished run found on text that is the same for all searches; None: it was not measured."""
    return number(read_finished(run_dir).get("fitness"))


def best_fitness(run_dir: Path) -> float:
    """Return the fitness of what a search found, on search text: of the last generation that measured it; else NaN.

    Where it was measured on text that is the same for all searches, by which a sweeper tunes, it is that one. Nothing of the
    text that results are measured on goes into it.
    """
    if (compared := compared_fitness(run_dir)) is not None:
        return compared
    with suppress(EvoPressError):
        fitnesses = [number(record.get("fitness")) for record in each_record(run_dir / "metrics.jsonl")]
        # One that asked nothing left the genome as it was.
        return next((float(fitness) for fitness in reversed(fitnesses) if fitness is not None), float("nan"))
    return float("nan")


def _of_database(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contents that a run of an earlier version came from, which did not say, as far as its level database does."""
    try:
        recipe = read_json(Path(result["database"]["path"]) / MANIFEST)["recipe"]
        text = {"calibration text": recipe["data"]["tokens_sha256"]} if "data" in recipe else {}
        return {"model": recipe["model"]["digest"], **text}
    except (EvoPressError, KeyError, TypeError):
        return {}


def _changed(settings: RunSettings, run_dir: Path, there: dict[str, Any], stages: list[str]) -> str:
    """Say what is another than it was; nothing: all is the same."""
    if not stages:
        return "its stages"
    on_cpu = replace(settings, stages=stages, model=replace(settings.model, device="cpu"))  # no GPU is taken for reading files
    try:
        here = contents(Workspace(on_cpu, run_dir), stages)
    except EvoPressError as error:
        return str(error)
    return ", ".join(name for name, digest in there.items() if here.get(name) != digest)


def contents(workspace: Workspace, stages: Collection[str]) -> dict[str, str]:
    """Return digests of what stages read beside their settings: the model, the text as tokens, the files of the tasks.

    Those of model and calibration text are the ones that level databases are known by.
    """
    evaluation, genome = workspace.settings.evaluation, workspace.settings.genome
    found = {"model": workspace.model_digest} | {name: tokens_digest(tokens) for name, tokens in workspace.texts(stages).items()}
    if evaluation.tasks and evaluation.tasks_path is not None and "evaluate" in stages:
        digest = hashlib.sha256()
        folder = Path(evaluation.tasks_path).expanduser()
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest.update(f"{path.relative_to(folder)}\n{sha256_file(path)}\n".encode())
        found["task files"] = digest.hexdigest()
    if genome is not None and (file := file_of(genome, "genome", workspace.run_dir)) is not None:
        found["genome"] = sha256_file(file)
    return found


def _refine(settings: RunSettings) -> dict[str, Any]:
    return refine_without_later(asdict(settings.refine))


def settings_digest(settings: RunSettings) -> str:
    """Return a digest of all settings that decide a result (`result_settings`)."""
    return _digest(result_settings(asdict(settings)))


def _digests_before(settings: RunSettings, kept: Mapping[str, Any]) -> set[str]:
    """Return the digests that earlier versions made of these settings, had the run been followed and kept as its config says.

    They counted the level database's, the first ones also those of tracker, paths and threads.
    """
    values = asdict(settings)
    values["tracker"]["project"] = values["tracker"]["project"] or "evopress"  # then the default
    now = {key: values[key] for key in HOW_IT_RUNS}
    plain = {"tracker": {**asdict(TrackerSettings()), "project": "evopress"}, "paths": asdict(PathsSettings()), "threads": None}
    return {
        _digest(result_settings_before({**values, **how, **uncounted}))
        for how in (now, {**now, **kept})
        for uncounted in ({}, plain)
    }


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
