"""Stage `search`: let a strategy search, with a record and a checkpoint per generation."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from evopress.endings import stop_if_asked
from evopress.errors import EvoPressError
from evopress.evaluation.heldout import Scores, measure_held_out
from evopress.json_files import check_schema, clip, shown
from evopress.progress import count_of_tokens, counted
from evopress.ranks import collective
from evopress.reporting.generations import each_generation
from evopress.reporting.live import LiveSearch
from evopress.reporting.metrics import SearchMetrics, best_metrics
from evopress.reporting.records import append_record, read_document, read_genome, truncate_records, write_json
from evopress.reporting.tracker import Tracker
from evopress.resources import Needs
from evopress.search.evolution import SearchSettings
from evopress.search.initial import uniform_genome
from evopress.search.record import GenerationRecord
from evopress.search.strategy import (
    NEIGHBOURS_TOGETHER,
    Attribution,
    Expansion,
    Neighbour,
    Problem,
    Searching,
    Strategy,
    run_search,
)
from evopress.stages.baselines import make_fitness, what_decides_fitness
from evopress.stages.checks import search_cost
from evopress.stages.given import keep_found, start_of
from evopress.stages.needs import Planner
from evopress.units import Genome, Space
from evopress.workspace import MOST_KEPT_BYTES, Workspace

logger = logging.getLogger(__name__)
_RECORD_BYTES = 400
_COMPARED_TOKENS = 2**16
"""Of the search text, on which what several searches found is measured."""
_METRICS, STATE = "metrics.jsonl", "state.json"


def search_needs(planner: Planner) -> Needs:
    """Return what the stage `search` takes."""
    searching, asks, space = planner.searching, planner.asks or (), planner.space
    if not asks:
        return planner.needs("search", f"done: {counted(searching.num_generations, 'generation')}")
    later = [ask for ask in asks if not ask.initial]
    milestones = max((ask.times for ask in later if ask.milestone), default=0)
    generations = milestones + max((ask.times for ask in later if not ask.milestone), default=0)
    at_most = "at most " if milestones else ""
    needs = planner.needs("search", f"{at_most}{generations} of {counted(searching.num_generations, 'generation')}")
    planner.base(needs)
    if every := planner.settings.evaluation.every:
        _held_out_needs(planner, needs, milestones + (generations - milestones) // every + 1)
    starts = len(planner.settings.search.starts)
    from_level = uniform_genome(space, planner.budget) is not None
    for ask in asks:
        candidates = ask.candidates_of(len(space))
        if ask.initial:
            candidates = starts + (1 if from_level else max(candidates, 1))
            if (from_level and not starts) or (candidates == 1 and not ask.attribution and not ask.neighbours):
                continue  # there is nothing to choose
        most = min(candidates, NEIGHBOURS_TOGETHER + 1) if ask.neighbours else candidates
        if ask.attribution:
            levels = max(len(unit.levels) for unit in space.units)
            planner.attribute(needs, ask, errors=levels + 1 if ask.expansion else 1)
        else:
            together = NEIGHBOURS_TOGETHER + 1 if ask.neighbours else None
            planner.score(needs, *planner.mine(candidates, ask.tokens), times=ask.times, together=together)
        planner.hold(needs, *planner.mine(most, ask.tokens))
    per_record = _RECORD_BYTES + 4 * len(space) + 24 * sum(ask.candidates_of(len(space)) for ask in later)
    per_record += 24 * len(space) if milestones else 0
    needs.disk = {planner.workspace.run_dir: generations * per_record}
    return needs


def _held_out_needs(planner: Planner, needs: Needs, times: int) -> None:
    """Add the measurements on held-out text, and the dense model's states there, which are kept where they are few."""
    tokens = next(iter(planner.workspace.evaluation_data.values())).numel()
    tokens = min(tokens, planner.settings.evaluation.every_tokens or tokens)
    stay = planner.states(tokens) <= MOST_KEPT_BYTES
    planner.score(needs, *planner.mine(1 if stay else 2, tokens, split=False), times=times + stay)
    planner.kept = planner.states(tokens) if stay else 0


def search(workspace: Workspace, searching: Searching, tracker: Tracker, *, neighbour: Neighbour | None = None) -> None:
    """Stage `search`: a strategy searches, with a record and a checkpoint per generation; goes on where an earlier run stopped.

    Args: neighbour: what was found at another budget, to begin from.
    """
    run_dir, database = workspace.run_dir, workspace.database
    strategy = searching.make(
        Problem(
            database.space,
            workspace.budget,
            () if workspace.method.weights is None else database.errors,
            rng_initial=workspace.rng["initial"],
            rng_mutation=workspace.rng["mutation"],
            starts=tuple(start_of(workspace, name) for name in workspace.settings.search.starts),
            neighbour=neighbour,
        )
    )
    earlier = _go_on_or_begin(workspace, searching, strategy)
    if not strategy.finished:
        _search(workspace, searching, strategy, tracker, earlier)
    keep_found(workspace, strategy.parent)  # first: it depends on no record
    tracker.summarize(best_metrics(each_generation(run_dir / _METRICS, database.space)))


class _Earlier(NamedTuple):
    """What earlier runs searched."""

    seconds: float
    numbers: SearchMetrics
    """Of their records."""


def _go_on_or_begin(workspace: Workspace, searching: Searching, strategy: Strategy) -> _Earlier:
    """Take up what an earlier run has searched, or forget its record."""
    metrics, state = workspace.run_dir / _METRICS, workspace.run_dir / STATE
    if not state.exists():
        metrics.unlink(missing_ok=True)
        return _Earlier(0.0, SearchMetrics(workspace.database.space))
    database, rng = workspace.database, workspace.rng["minibatch"]
    seconds = go_on(state, strategy, rng, database=database.fingerprint, strategy=searching.strategy)
    truncate_records(metrics, strategy.generation - 1)
    numbers = check_records(metrics, strategy, database.space)
    if not strategy.finished:
        logger.info("search: resuming at generation %d of %d", strategy.generation, searching.num_generations)
    return _Earlier(seconds, numbers)


def _search(workspace: Workspace, searching: Searching, strategy: Strategy, tracker: Tracker, earlier: _Earlier) -> None:
    """Let a strategy search until it is finished."""
    space = workspace.database.space
    modules, starts = workspace.method.modules is not None, len(workspace.settings.search.starts)
    tokens = search_cost(searching, modules=modules, units=len(space), starts=starts)
    logger.info("search: %s, at most %s candidate tokens", searching.summary, count_of_tokens(tokens))
    fitness = make_fitness(workspace, workspace.rng["minibatch"])

    def answer(question: Attribution) -> Any:
        drawn = {"tokens": question.tokens, "sequences": question.sequences}
        if isinstance(question, Expansion):
            return fitness.expand(question.genome, **drawn, counts=[len(unit.levels) for unit in space.units])
        return fitness.attribute(question.genome, **drawn)

    journal = _Journal(workspace, searching, strategy, tracker, earlier)
    num_stages = len(searching.tokens) if isinstance(searching, SearchSettings) else None
    every, run_dir = workspace.settings.evaluation.every, workspace.run_dir
    with LiveSearch(searching.num_generations, num_stages, every=every, run_dir=run_dir) as live:
        run_search(
            strategy,
            live.watching(fitness),
            attribute=live.attributing(answer),
            on_generation=lambda record: journal.finish_generation(record, live),
        )
    workspace.archive.tell("search")


class _Journal:
    """Keeps and shows what a search does: a record, a checkpoint, a tracker's step and a line for every generation.

    What showing and measuring on held-out text take is no part of the search's seconds.
    """

    def __init__(self, workspace: Workspace, searching: Searching, strategy: Strategy, tracker: Tracker, earlier: _Earlier) -> None:
        self._workspace, self._searching, self._strategy, self._tracker = workspace, searching, strategy, tracker
        self._numbers = earlier.numbers
        self._held_out = _HeldOut(workspace)
        self._asked = what_decides_fitness(workspace)
        self._seconds_before, self._started, self._showing = earlier.seconds, time.monotonic(), 0.0
        self._reused = workspace.archive.reused  # a generation whose numbers were is not timed

    def finish_generation(self, record: GenerationRecord, live: LiveSearch) -> None:
        """Keep a generation's record, then the state after it, then show it; stop if that is asked for."""
        ended = time.monotonic()
        seconds = self._seconds_before + ended - self._started - self._showing
        entry = {"schema": 1, **record.to_dict(), "seconds": seconds}
        if self._is_measured(record):
            entry["held_out"] = self._held_out(record.genome)
        measured = time.monotonic() - ended
        append_record(self._workspace.run_dir / _METRICS, entry)
        self._keep_state(seconds)
        reused = self._workspace.archive.reused
        shown = self._numbers.add(entry, timed=reused == self._reused)
        self._reused = reused
        self._tracker.log(shown, generation=record.generation)
        live.show(entry, shown, measured)
        self._showing += time.monotonic() - ended
        stop_if_asked()

    def _is_measured(self, record: GenerationRecord) -> bool:
        """Tell whether a generation's genome is measured on held-out text."""
        every = self._workspace.settings.evaluation.every
        return bool(every) and (record.generation % every == 0 or record.milestone or self._strategy.finished)

    def _keep_state(self, seconds: float) -> None:
        workspace, strategy = self._workspace, self._searching.strategy
        write_json(
            workspace.run_dir / STATE,
            {
                "schema": 1,
                "database": workspace.database.fingerprint,
                "asked": self._asked,
                **({} if strategy == "evolution" else {"strategy": strategy}),
                "evolution": {"schema": 1, **self._strategy.state()},  # of any strategy; the key is as old as the first
                "rng_minibatch": workspace.rng["minibatch"].bit_generator.state,
                "seconds": seconds,
            },
            sealed=True,
        )


def strategy_in(state: Mapping[str, Any]) -> Any:
    """Return the name of the strategy whose state was saved."""
    return state.get("strategy", "evolution")  # which is not written down


def go_on(path: Path, search: Strategy, rng: np.random.Generator, *, database: str, strategy: str = "evolution") -> float:
    """Give a search and the generator of its minibatches the state that an earlier run saved; return the seconds that it took.

    Args:
        database: fingerprint of the level database.
        strategy: name of the search's strategy.

    Raises: EvoPressError if the state is damaged, of a newer version, or of another search.
    """
    state = read_document(path, what="saved search")
    if state.get("database") != database:
        raise EvoPressError(
            f"the search in {path.parent} was made with level database {shown(state.get('database'))}, this one is {database}: "
            "start a new run, or give its settings"
        )
    if strategy_in(state) != strategy:
        raise EvoPressError(
            f"the search in {path.parent} used search/strategy={shown(strategy_in(state))}, this one {strategy}: start a new "
            "run, or give its settings"
        )
    try:
        search.restore(check_schema(state.get("evolution"), path, what="saved search", newest=1))
        rng.bit_generator.state = state["rng_minibatch"]
        return float(state["seconds"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise EvoPressError(
            f"{path} is damaged ({type(error).__name__}: {clip(str(error))}): restore it, or remove it to search again"
        ) from error


def check_records(metrics: Path, search: Strategy, space: Space) -> SearchMetrics:
    """Return the numbers of the records before a search's next generation; later ones do not count.

    Raises: EvoPressError if they are not all there, or one is damaged.
    """
    earlier = (record for record in each_generation(metrics, space) if record["generation"] < search.generation)
    numbers = SearchMetrics(space, earlier)
    if (count := numbers.num_records) != search.generation:
        state = metrics.with_name(STATE)
        raise EvoPressError(
            f"{metrics} has {count} records of the {search.generation} generations that {state} says are done: "
            f"restore it, or remove {state} to search again"
        )
    return numbers


def measure_found(workspace: Workspace) -> float:
    """Return the fitness of the found genome on the first `_COMPARED_TOKENS` of the search text, whatever the search drew of it.

    So searches with other generations or tokens can be compared; fitnesses of generations are each on text of its own.
    """
    database, sequences = workspace.database, workspace.search_tokens
    genome = read_genome(workspace.run_dir / "genome.json", database.space, database=database.fingerprint)
    count = min(max(_COMPARED_TOKENS // sequences.shape[1], 1), len(sequences))
    fitness = make_fitness(workspace, np.random.default_rng(0), count)
    return fitness([genome], tokens=count * sequences.shape[1])[0]


def held_out_in_search(workspace: Workspace) -> tuple[str, Tensor]:
    """Return the text that the search is measured on, the first of the run's own held-out text, and its name: int64 [N, L]."""
    name, sequences = next(iter(workspace.evaluation_data.items()))
    tokens = workspace.settings.evaluation.every_tokens
    return name, sequences if tokens is None else sequences[: max(tokens // sequences.shape[1], 1)]


def as_held_out(name: str, score: Scores) -> dict[str, Any]:
    """Lay out scores on the data set of that name as records have them."""
    return {
        **score.means(),
        "perplexity": {name: score.perplexity},
        "num_tokens": score.num_tokens,
    }


class _HeldOut:
    """Measures the search's parents on held-out text; a parent that has not changed is not measured again."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._last: tuple[Genome, dict[str, Any]] | None = None

    def __call__(self, genome: Genome) -> dict[str, Any]:
        if self._last is None or self._last[0] != genome:
            name, _ = held_out_in_search(self._workspace)
            self._last = genome, as_held_out(name, _measured(self._workspace, genome))
        return self._last[1]


@collective
def _measured(workspace: Workspace, genome: Genome) -> Scores:
    _, sequences = held_out_in_search(workspace)
    fitness = workspace.settings.fitness
    return measure_held_out(
        workspace.evaluator,
        [genome],
        sequences,
        base=workspace.held_out_base(len(sequences)),
        batch_tokens=fitness.max_tokens_in_flight,
        chunk_tokens=fitness.chunk_tokens,
    )[0]
