"""Genomes that are not a finished search's: those that the settings name, and the best so far of a search that was cut off."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from evopress.baselines.dynamic_programming import dynamic_programming
from evopress.baselines.named import BASELINES
from evopress.baselines.uniform import uniform_genomes
from evopress.errors import EvoPressError
from evopress.files import given_path
from evopress.json_files import clip, shown
from evopress.reporting.records import read_document, read_genome, write_genome
from evopress.settings import RunSettings
from evopress.stages.baselines import further_levels, rows_left, stored_baselines
from evopress.stages.needs import planned_for
from evopress.stages.results import forget_found
from evopress.units import Budget, Genome, Space
from evopress.workspace import Workspace

logger = logging.getLogger(__name__)
_FORMATS = (
    "a genome.json or genome.txt, or a file of the authors' code (`name: level` lines; one word per block for dropped modules)"
)


@dataclass(frozen=True)
class Given:
    """A genome that the settings name."""

    name: str
    """Of its row: a baseline's, or "folder/file"."""
    genome: Genome
    space: Space
    """Whose levels the genome counts."""

    @property
    def folder(self) -> str:
        """Name of its folder inside a run's."""
        return folder_of(self.name)


def folder_of(name: str) -> str:
    """Return the name of the folder inside a run's that has what was exported of a row's genome."""
    return re.sub(r"[^\w.-]+", "_", name).strip("_.") or "genome"


def file_of(given: str, key: str, run_dir: Path) -> Path | None:
    """Return the file that a genome is named by: itself, or that of a run folder or checkpoint; None: it is a name such as "dp".

    Args:
        key: the setting that names it: "genome".
        run_dir: where a baseline may have left rows of other names than its own.

    Raises: EvoPressError if it is neither.
    """
    if given == "evopress" or given in BASELINES or re.fullmatch(r"(uniform|best_of)(_[\w.%-]+)?", given):
        return None
    path = given_path(given, key)
    if path.is_dir():
        path = path / "genome.json"
    if not path.is_file():
        if given in rows_left(run_dir):
            return None
        raise EvoPressError(
            f"{key} has {given!r}, which is neither a file nor among this run's baselines: give {_FORMATS}, or a name such as "
            "uniform_3 or dp"
        )
    return path


def row_name(path: Path) -> str:
    """Name a file's row: the file and its folder."""
    path = path.resolve()
    return f"{path.parent.name}/{path.name}"


def check_given(settings: RunSettings, run_dir: Path) -> None:
    """Raise EvoPressError if a genome that the settings name by a file is not there; before any model work."""
    for key, name in given_names(settings):
        file_of(name, key, run_dir)


def given_names(settings: RunSettings) -> list[tuple[str, str]]:
    """Return the genomes that the settings name, by names or files, each after its setting."""
    given = [] if settings.genome is None else [("genome", settings.genome)]
    return given + [("search.starts", name) for name in settings.search.starts if "search" in settings.stages]


def check_levels(settings: RunSettings, space: Space, run_dir: Path) -> None:
    """Raise EvoPressError if a file of a genome does not fit the space that the run's level database has, or will have.

    So it is if the run has exported another genome by that name, whose folder and row would be this one's.
    """
    for key, name in given_names(settings):
        if (path := file_of(name, key, run_dir)) is not None:
            genome = read_genome(path, space)
            if key == "genome" and {"evaluate", "export"} & set(settings.stages):
                _refuse_another_of_its_name(path, genome, space, run_dir)


def check_starts(workspace: Workspace, space: Space, budget: Budget) -> None:
    """Raise EvoPressError if a genome of `search.starts` exceeds the budget, as far as it is known before anything is built.

    So are those of files and uniform ones, not what baselines find; or if it will be of levels that are not searched.

    Args: space: of the run's levels, as planned or as built.
    """
    starts = workspace.settings.search.starts if "search" in workspace.settings.stages else ()
    if not starts:
        return
    known, further = _uniform(workspace, space), further_levels(workspace, planned_for(workspace, space, budget))
    for name in starts:
        _refuse_other_levels(name, there=name not in further)
        genome = (
            known.get(name) if (path := file_of(name, "search.starts", workspace.run_dir)) is None else read_genome(path, space)
        )
        if genome is not None:
            _refuse_above(workspace, name, genome, space, budget)


def start_of(workspace: Workspace, name: str) -> Genome:
    """Return the genome that `search.starts` names.

    Raises: EvoPressError as `find_genome`, and if it is of levels that are not searched, or exceeds the budget.
    """
    space, genome = workspace.database.space, find_genome(workspace, name, key="search.starts").genome
    _refuse_other_levels(name, there=space.has(genome))
    _refuse_above(workspace, name, genome, space, workspace.budget)
    return genome


def _refuse_other_levels(name: str, *, there: bool) -> None:
    if not there:
        raise EvoPressError(f"search.starts has {name!r}, which is of levels of its own, which are not searched: leave it out")


def _refuse_above(workspace: Workspace, name: str, genome: Genome, space: Space, budget: Budget) -> None:
    """Raise EvoPressError if a genome that `search.starts` names exceeds the budget."""
    if over := budget.exceeded(space, genome):
        costs = ", ".join(f"{key}={value:.6g}" for key, value in workspace.method.costs(space, genome).items())
        raise EvoPressError(
            f"search.starts has {name!r}, which exceeds the budget of {over} ({costs}): leave it out, or change the target"
        )


def _uniform(workspace: Workspace, space: Space) -> dict[str, Genome]:
    """Return the genomes of one level, by the names that they have without any stage; none where modules are dropped alone."""
    return {} if workspace.method.weights is None else uniform_genomes(space, workspace.method.uniform_name)


def _refuse_another_of_its_name(path: Path, genome: Genome, space: Space, run_dir: Path) -> None:
    own = run_dir / "genomes" / folder_of(row_name(path)) / "genome.json"
    if not own.is_file():
        return
    try:
        same = read_genome(own, space) == genome
    except EvoPressError:  # of other levels
        same = False
    if not same:
        raise EvoPressError(
            f"genome={path} differs from the {row_name(path)} that this run has exported in {own.parent}: rename the "
            "file, or remove that folder"
        )


def find_genome(workspace: Workspace, given: str, *, key: str = "genome") -> Given:
    """Return the genome that a setting names: by a file, as a baseline of the run, as a uniform one, or as dynamic programming's.

    Raises: EvoPressError if there is no such genome, or a file does not fit the level database.
    """
    database = workspace.database
    if (path := file_of(given, key, workspace.run_dir)) is not None:
        return Given(row_name(path), read_genome(path, database.space), database.space)
    baselines, space = stored_baselines(workspace)
    if given in baselines:
        return Given(given, baselines[given], space)
    refuse_missing(workspace, [(key, given)], baselines, database.space)
    if given == "dp":
        return Given(given, dynamic_programming(database.space, workspace.budget, database.errors), database.space)
    return Given(given, _uniform(workspace, database.space)[given], database.space)


def named_genome(workspace: Workspace) -> Given | None:
    """Return the genome that the settings name instead of a search's; None: they name none."""
    name = workspace.settings.genome
    return None if name is None else find_genome(workspace, name)


def refuse_missing(workspace: Workspace, given: Sequence[tuple[str, str]], baselines: Collection[str], space: Space) -> None:
    """Raise EvoPressError if a name is none of the baselines that there are, nor of a genome that is made when it is asked for.

    Args:
        given: settings and the names in them.
        space: units and levels that the level database has, or will have.
    """
    made = [] if workspace.method.weights is None else [*_uniform(workspace, space), "dp"]
    there = f"{', '.join(baselines) or 'none'}{'; made when asked for: ' if made else ''}{', '.join(made)}"
    for key, name in given:
        if name == "evopress":
            raise EvoPressError(
                f"{key} has 'evopress', which is what a run finds: give its file, such as {workspace.run_dir / 'genome.json'}, "
                "whose weights are those without a second pass, or leave it out"
            )
        if file_of(name, key, workspace.run_dir) is None and name not in (*baselines, *made):
            raise EvoPressError(
                f"{key} has {name!r}, which is not among this run's baselines ({there}): use the name of "
                "its row in results, find it first (baselines.names and the stage baselines; in Python, find_baselines with the "
                "same folder), or give a file"
            )


def may_find(names: Collection[str], row: str) -> bool:
    """Tell whether baselines may give a row of a name: as they are called, and what those of packages give is not known before."""
    maker = "best_of_random" if row.startswith("best_of") else row
    return maker in names or (row not in BASELINES and not all(map(BASELINES.is_own, names)))


def take_best_so_far(workspace: Workspace) -> None:
    """Let `genome.json` be the parent that the run's search has reached, also where it was cut off before its end.

    Raises: EvoPressError if there is no other genome and the saved search is damaged or of another level database.
    """
    run_dir, database = workspace.run_dir, workspace.database
    path, found = run_dir / "state.json", run_dir / "genome.json"
    if not path.exists():
        return
    try:
        state = read_document(path, what="saved search")
        evolution = state.get("evolution")
        if state.get("database") != database.fingerprint or not isinstance(evolution, dict):
            raise EvoPressError(
                f"the search in {run_dir} was made with level database {shown(state.get('database'))}, this one is "
                f"{database.fingerprint}: give its settings"
            )
        genome = database.space.check(evolution["parent"])
        done = int(evolution["generation"]) - 1
    except (EvoPressError, KeyError, TypeError, ValueError) as error:
        if found.exists():
            return  # what there is says itself whether it fits
        if isinstance(error, EvoPressError):
            raise
        raise EvoPressError(
            f"{path} is damaged ({type(error).__name__}: {clip(str(error))}): restore it, or remove it to search again"
        ) from error
    if found.exists() and read_genome(found, database.space, database=database.fingerprint) == genome:
        return
    logger.info("search: interrupted after generation %d; its best genome so far is used", done)
    keep_found(workspace, genome)


def keep_found(workspace: Workspace, genome: Genome) -> None:
    """Write `genome.json`; results of another genome that was found before are left out from then on."""
    run_dir, database = workspace.run_dir, workspace.database
    path = run_dir / "genome.json"
    try:
        same = path.exists() and read_genome(path, database.space, database=database.fingerprint) == genome
    except EvoPressError:
        same = False
    if not same:
        forget_found(run_dir)
    write_genome(
        path, run_dir / "genome.txt", space=database.space, genome=genome, database=database.fingerprint, budget=workspace.budget
    )
