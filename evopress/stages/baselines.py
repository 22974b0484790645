"""Stages `database` and `baselines`: make the levels, and find the genomes that the search is compared with."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from evopress.baselines.baseline import Planned
from evopress.baselines.named import BASELINES, make_baselines
from evopress.compress.compressor import Compressor
from evopress.data.minibatch import Minibatch
from evopress.data.tokens import tokens_digest
from evopress.errors import EvoPressError
from evopress.evaluation.heldout import Scores, measure_held_out
from evopress.fitness.gradients import Score, gradient_scores
from evopress.fitness.minibatch import MinibatchFitness
from evopress.json_files import shown
from evopress.levels.hessians import HessianStore
from evopress.levels.locking import alone_in
from evopress.levels.store import fingerprint
from evopress.levels.tied import TiedLevels
from evopress.levels.union import LevelSource, LevelUnion
from evopress.models.blocks import BlockModel
from evopress.progress import counted
from evopress.reporting.records import append_record, read_document, read_records, write_json
from evopress.reporting.tables import display_name
from evopress.resources import Needs
from evopress.search.strategy import BACKWARD_TOKENS, Asks, Fitness
from evopress.stages.needs import Planner
from evopress.stages.results import read_result
from evopress.units import Budget, Genome, Level, Space
from evopress.workspace import Workspace

logger = logging.getLogger(__name__)
_DATABASE = re.compile("[a-z]+-[0-9a-f]{16}")
"""A level database's folder, beside the run's own."""
_RESERVED = {"dense": "the dense model", "evopress": "what is found", "evopress_refined": "what is found, refined"}
"""Names of rows that are no baseline's."""
_ROW = re.compile(r"\w[\w.%-]*")
"""A row's name: others are of files, or of rows at several budgets and after a second pass."""


def database_needs(planner: Planner) -> Needs:
    """Return what the stage `database` takes."""
    build, workspace = planner.build, planner.workspace
    if build is None:
        return planner.needs("database", "no weights to store")
    if not build.units:
        return planner.needs("database", f"reused, {counted(planner.num_blocks, 'block')}")
    needs = build.in_folder(workspace.databases.root)
    needs.what += "" if "database" in planner.settings.stages else ", first"
    planner.build_levels(needs, build)
    return needs


def build_database(workspace: Workspace, *, check_budget: bool = True) -> None:
    """Stage `database`: build what is missing of the level database, or reuse it.

    Args: check_budget: whether there is one that its levels must be able to meet.
    """
    started = time.monotonic()
    database = workspace.database
    if check_budget:
        workspace.budget.check(database.space)
    result = read_result(workspace.run_dir)
    result["database"] = {
        "path": str(database.folder),
        "bytes": database.num_bytes,
        "seconds": time.monotonic() - started,
        "reused": workspace.databases.reused,
    }
    write_json(workspace.run_dir / "result.json", result)


def make_fitness(workspace: Workspace, rng: np.random.Generator, num_sequences: int | None = None) -> MinibatchFitness:
    """Return the fitness on the search text, or its first sequences, minibatches drawn by `rng`."""
    settings = workspace.settings.fitness
    return MinibatchFitness(
        workspace.evaluator,
        workspace.search_tokens[:num_sequences],
        rng=rng,
        base=workspace.search_base[:num_sequences],
        measure=workspace.measure,
        chunk_tokens=settings.chunk_tokens,
        max_tokens_in_flight=settings.max_tokens_in_flight,
        archive=workspace.archive,
        known_as=("fitness", *workspace.known_as[1:], num_sequences),
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
        "fitness.options": settings.fitness.options,
        **({"search text": tokens_digest(workspace.search_tokens)[:16]} if text else {}),
        "bits": settings.bits,
        "sparsity": settings.sparsity,
        "size": settings.size,
        "limits": settings.limits,
        "engine": settings.engine,
        "method.experts": workspace.databases.ties.get("experts", "each"),
    }


UNWRITTEN: Mapping[str, Any] = {"fitness.options": {}, "options": {}}
"""What earlier versions wrote down only where there was something in it, of a search's settings and the baselines'."""


def changes(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Say which settings an earlier run had otherwise; what its version did not write down is not compared."""
    found = []
    for key in here:
        if key not in there or there[key] == here[key]:
            continue
        if isinstance(there[key], Mapping) and isinstance(here[key], Mapping):
            inside = changes(there[key], here[key])
            found += [f"{key}.{change}" for change in inside] or [f"{key} {shown(there[key])} there, {shown(here[key])} here"]
        else:
            found.append(f"{key} {shown(there[key])} there, {shown(here[key])} here")
    return found


def baselines_as_asked(workspace: Workspace) -> dict[str, Any] | None:
    """Return what an earlier run of the same settings found; None if there is none, whatever its level database.

    Raises: EvoPressError as `read_baselines` does.
    """
    path = workspace.run_dir / "baselines.json"
    stored = read_baselines(path) if path.exists() else None
    if stored is None:
        return None
    asked = stored.get("asked", {})  # our first versions did not say
    return stored if isinstance(asked, dict) and not changes({**UNWRITTEN, **asked}, _asked(workspace)) else None


def _asked(workspace: Workspace) -> dict[str, Any]:
    return {**what_decides_fitness(workspace), **asdict(workspace.settings.baselines)}


def baselines_needs(planner: Planner) -> Needs:
    """Return what the stage `baselines` takes; of passes that are made once, it is the one with the most genomes."""
    settings, in_flight = planner.settings.baselines, planner.settings.fitness.max_tokens_in_flight
    baselines = make_baselines(settings).values()
    passes = [each for baseline in baselines for each in baseline.passes(planner.planned) if each.shared not in planner.measured]
    planner.measured.update(each.shared for each in passes if each.shared is not None)
    if baselines_as_asked(planner.workspace) is not None:
        return planner.needs("baselines", "found before")
    needs = planner.needs("baselines", ", ".join(settings.names) or "none")
    most = {each.shared: each for each in sorted(passes, key=lambda each: each.genomes)}
    for each in (each for each in passes if each.shared is None or each is most[each.shared]):
        if each.on_search_text:
            planner.base(needs)
        if each.backward:
            planner.attribute(needs, Asks("", each.tokens, times=each.genomes), shared_by=lambda rows: rows, errors=each.errors)
        else:
            mine = planner.mine(each.genomes, each.tokens, split=each.on_search_text, alone=each.alone)
            planner.score(needs, *mine, together=each.together)
        if each.together is not None:
            planner.hold(needs, min(each.genomes, each.together), min(in_flight, each.tokens))
    further = further_levels(planner.workspace, planner.planned)
    if further:
        count = sum(planner.build_further(needs, name, compressor) for name, compressor in further.items())
        needs.what += f" (at most {count} further levels of each weight)"
        needs.less_disk = (
            f"leave {', '.join(further)} out of baselines.names, whose levels are stored, or use another level_db.root"
        )
    planner.hold(needs, *planner.mine(settings.num_random, settings.random_tokens))
    return needs


def further_levels(workspace: Workspace, planned: Planned) -> dict[str, Compressor]:
    """Return what makes the levels that the stage `baselines` adds to the run's, by baselines; see `Baseline.further`."""
    settings = workspace.settings
    if "baselines" not in settings.stages or workspace.method.weights is None or baselines_as_asked(workspace) is not None:
        return {}
    compressor = workspace.databases.any_compressor()
    found = {name: baseline.further(planned, compressor) for name, baseline in make_baselines(settings.baselines).items()}
    return {name: each for name, each in found.items() if each is not None}


def with_further_levels(workspace: Workspace) -> list[str]:
    """Return the names of those asked for that have levels beside the run's."""
    planned = Planned(workspace.database.space, workspace.budget, workspace.search_tokens.numel())
    return list(further_levels(workspace, planned))


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
    found: dict[str, Genome] = {}
    further: list[str] = []
    orders: dict[str, list[int]] = {}
    spent: dict[str, dict[str, float]] = {}
    for name, baseline in make_baselines(settings).items():
        problem, started = RunProblem(workspace, name), time.monotonic()
        genomes = baseline.find(problem)
        took = {"tokens": problem.tokens, "seconds": round(time.monotonic() - started + problem.seconds, 3)}
        further += problem.further
        orders |= problem.orders
        space = workspace.levels.space if further else workspace.database.space
        if not isinstance(genomes, Mapping):
            raise EvoPressError(f"the baseline {name} finds {shown(genomes)}, expected a genome by the name of its row")
        for row, genome in genomes.items():
            _check_row(name, row, found)
            try:
                found[row] = space.check(genome)
            except EvoPressError as error:
                raise EvoPressError(
                    f"the baseline {name} gives a row {row!r} that is no genome of these levels ({error})"
                ) from error
            if not baseline.beside_budget and (over := workspace.budget_of(workspace.database.space).exceeded(space, found[row])):
                logger.warning(
                    "the baseline %s gives a row %r over the budget of %s: it is marked in results, and not compared with "
                    "genomes within the budget",
                    name,
                    row,
                    over,
                )
            spent[row] = took
    workspace.archive.tell("baselines")
    stored = {"schema": 1, "database": workspace.database.fingerprint, "asked": _asked(workspace), "further": further}
    genomes_found = {name: list(genome) for name, genome in found.items()}
    write_json(path, {**stored, "genomes": genomes_found, "orders": orders, "spent": spent}, sealed=True)


def _check_row(baseline: str, row: Any, found: Collection[str]) -> None:
    """Raise EvoPressError if a row has no name that settings can give, or results show it as they show another.

    Args: found: names of the rows that there are.
    """
    gives = f"the baseline {baseline} gives a row {shown(row)}"
    if not isinstance(row, str) or not _ROW.fullmatch(row):
        raise EvoPressError(f"{gives}, which genome=NAME cannot give: name it by letters, digits and any of _ . % -")
    others = {each: f"the baseline {each}" for each in BASELINES if each != baseline} | {each: f"the row {each}" for each in found}
    for other, what in {**_RESERVED, **others}.items():
        if display_name(other) == display_name(row):
            raise EvoPressError(f"{gives}, the name of {what} in results: rename it, or leave {baseline} out of baselines.names")


class RunProblem:
    """A run as one of its baselines sees it; see `Problem`."""

    def __init__(self, workspace: Workspace, baseline: str) -> None:
        """Show a run to a baseline, by its name."""
        self._workspace = workspace
        self.further: list[str] = []
        """Folders of the level databases that it added."""
        self.orders: dict[str, list[int]] = {}
        """What it noted, by row."""
        self.tokens = 0
        self.seconds = 0.0
        """That measuring took of what was taken over."""
        if baseline == "best_of_random":
            self.rng, self._minibatch_rng = workspace.rng["random"], workspace.rng["random_minibatch"]
        else:  # its own, whatever other baselines draw
            seeds = np.random.SeedSequence([workspace.settings.seed, *baseline.encode()]).spawn(2)
            self.rng, self._minibatch_rng = (np.random.default_rng(seed) for seed in seeds)

    @property
    def space(self) -> Space:
        return self._workspace.database.space

    @property
    def budget(self) -> Budget:
        return self._workspace.budget

    @property
    def errors(self) -> Sequence[Sequence[float]]:
        return self._workspace.database.errors

    @property
    def levels(self) -> LevelSource:
        return self._workspace.database

    @property
    def calibration_tokens(self) -> Tensor:
        return self._workspace.calibration_tokens

    @property
    def search_tokens(self) -> Tensor:
        return self._workspace.search_tokens

    @property
    def blocks(self) -> BlockModel:
        return self._workspace.blocks

    @property
    def batch_tokens(self) -> int:
        return self._workspace.settings.fitness.max_tokens_in_flight

    @property
    def what_fitness_is(self) -> list[Any]:
        fitness = self._workspace.settings.fitness
        return [fitness.name, fitness.k, *([fitness.options] if fitness.options else [])]

    def fitness(self, rng: np.random.Generator | None = None, *, num_sequences: int | None = None) -> Fitness:
        fitness = make_fitness(self._workspace, rng or self._minibatch_rng, num_sequences)

        def counted(genomes: Sequence[Genome], *, tokens: int) -> list[float]:
            self.spend(tokens=len(genomes) * tokens)
            return fitness(genomes, tokens=tokens)

        return counted

    def measure(self, genomes: Sequence[Genome], tokens: Tensor, *, what: str, levels: LevelSource | None = None) -> list[Scores]:
        self.spend(tokens=len(genomes) * tokens.numel())
        fitness = self._workspace.settings.fitness
        return measure_held_out(
            self._workspace.evaluator if levels is None else self._workspace.evaluator_of(levels),
            genomes,
            tokens,
            batch_tokens=fitness.max_tokens_in_flight,
            chunk_tokens=fitness.chunk_tokens,
            what=what,
        )

    def gradient_scores(self, genome: Genome | None, errors_of: Sequence[Genome], minibatch: Minibatch, score: Score) -> Tensor:
        self.spend(tokens=BACKWARD_TOKENS * minibatch.num_tokens)
        ((rows, length),) = minibatch.groups()
        return gradient_scores(
            self._workspace.live,
            genome,
            errors_of,
            self.search_tokens[list(rows), :length],
            self._workspace.search_base[list(rows)],
            score,
            chunk_tokens=self._workspace.settings.fitness.chunk_tokens,
        )

    def spend(self, *, tokens: int, seconds: float = 0.0) -> None:
        self.tokens += tokens
        self.seconds += seconds

    def uniform_name(self, level: Level) -> str:
        return self._workspace.method.uniform_name(level)

    def compressor(self) -> Compressor:
        return self._workspace.databases.any_compressor()

    def hessians(self) -> HessianStore:
        return self._workspace.databases.complete_hessians()

    def add_levels(self, name: str, compressor: Compressor) -> LevelUnion | TiedLevels:
        database, _ = self._workspace.databases.ensure(name, compressor)
        self._workspace.add_levels([database.folder.name])
        self.further.append(database.folder.name)
        return self._workspace.levels

    def note_order(self, name: str, order: Sequence[int]) -> None:
        self.orders[name] = list(order)

    def kept(self, name: str, about: Mapping[str, Any]) -> KeptNumbers:
        return KeptNumbers(self._beside(name, about, "json"))

    def records(self, name: str, about: Mapping[str, Any]) -> KeptRecords:
        return KeptRecords(self._beside(name, about, "jsonl"))

    def _beside(self, name: str, about: Mapping[str, Any], suffix: str) -> Path:
        return self._workspace.database.folder / f"{name}-{fingerprint({**about, **self._workspace.databases.ties})}.{suffix}"


class KeptNumbers(MutableMapping[str, Any]):
    """Numbers in a JSON file, which is written whenever one is set; a damaged file is one without numbers."""

    def __init__(self, path: Path) -> None:
        """Read what there is."""
        self._path, self._known = path, {"schema": 1}
        try:
            if path.exists():
                self._known = read_document(path, what="file of scores")
        except EvoPressError as error:
            logger.warning("%s (here the scores are measured again)", error)

    def __getitem__(self, key: str) -> Any:
        return self._known[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._known[key] = value
        self._write()

    def __delitem__(self, key: str) -> None:
        del self._known[key]
        self._write()

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def _write(self) -> None:
        with alone_in(self._path.parent):  # another run may be at work with the same database
            write_json(self._path, self._known)


class KeptRecords:
    """Records in a file, a line each; see `Records`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(read_records(self._path))

    def add(self, record: Mapping[str, Any]) -> None:
        append_record(self._path, {"schema": 1, **record})


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


def rows_left(run_dir: Path) -> Collection[str]:
    """Return the names of the rows that the stage `baselines` left behind, of whatever level database.

    Raises: EvoPressError as `read_baselines` does.
    """
    path = run_dir / "baselines.json"
    return read_baselines(path)["genomes"] if path.exists() else ()


def spent_on_baselines(run_dir: Path) -> dict[str, Any]:
    """Return what each row's baseline took, `tokens` and `seconds`, by name; earlier versions did not write it down."""
    path = run_dir / "baselines.json"
    spent = read_baselines(path).get("spent", {}) if path.exists() else {}
    return {name: took for name, took in spent.items() if isinstance(took, dict)} if isinstance(spent, dict) else {}


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
