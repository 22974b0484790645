"""Stage `search`: the evolutionary search, a record and a checkpoint per generation."""

from __future__ import annotations

import logging
import time
from typing import Any

from evopress.errors import EvoPressError
from evopress.evaluation.heldout import measure_held_out
from evopress.reporting.live import LiveSearch
from evopress.reporting.metrics import SearchMetrics
from evopress.reporting.records import append_record, read_json, read_records, truncate_records, write_genome, write_json
from evopress.reporting.tracker import Tracker
from evopress.search.evolution import Evolution, SearchSettings, run_search
from evopress.search.record import GenerationRecord
from evopress.stages.baselines import make_fitness, stored_baselines
from evopress.stages.checks import search_cost
from evopress.units import Genome
from evopress.workspace import Workspace

logger = logging.getLogger(__name__)


def search(workspace: Workspace, settings: SearchSettings, tracker: Tracker) -> None:
    """Stage `search`: the evolutionary search, a record and a checkpoint per generation; goes on where an earlier run stopped."""
    run_dir, database = workspace.run_dir, workspace.database
    evolution = Evolution(
        database.space,
        workspace.budget,
        settings,
        rng_initial=workspace.rng["initial"],
        rng_mutation=workspace.rng["mutation"],
        starts=_starts(workspace),
    )
    metrics, state_path = run_dir / "metrics.jsonl", run_dir / "state.json"
    seconds_before = 0.0
    if state_path.exists():
        state = read_json(state_path)
        if state.get("database") != database.fingerprint:
            raise EvoPressError(
                f"the search in {run_dir} was made with level database {state.get('database')}, this one is "
                f"{database.fingerprint}: start a new run, or give the settings that it had"
            )
        evolution.restore(state["evolution"])
        workspace.rng["minibatch"].bit_generator.state = state["rng_minibatch"]
        seconds_before = float(state["seconds"])
        truncate_records(metrics, evolution.generation - 1)
        logger.info("search: going on at generation %d of %d", evolution.generation, settings.generations)
    else:
        metrics.unlink(missing_ok=True)
    if not evolution.finished:
        logger.info(
            "search: %d generations, λ = %d, %.3g million candidate tokens in all",
            settings.generations,
            settings.num_offspring,
            search_cost(settings) / 1e6,
        )
        fitness = make_fitness(workspace, workspace.rng["minibatch"])
        numbers = SearchMetrics(database.space, read_records(metrics))
        started = time.monotonic()

        def finish_generation(record: GenerationRecord) -> None:
            seconds = seconds_before + time.monotonic() - started
            entry = {"schema": 1, **record.to_dict(), "seconds": seconds}
            every = workspace.settings.evaluation.every
            if every and (record.generation % every == 0 or evolution.finished):
                entry["held_out"] = _held_out(workspace, record.genome)
            append_record(metrics, entry)
            write_json(
                state_path,
                {
                    "schema": 1,
                    "database": database.fingerprint,
                    "evolution": evolution.state(),
                    "rng_minibatch": workspace.rng["minibatch"].bit_generator.state,
                    "seconds": seconds,
                },
            )
            shown = numbers.add(entry)
            tracker.log(shown, generation=record.generation)
            live.show(entry, shown)

        with LiveSearch(settings.generations, len(settings.stages), run_dir=run_dir) as live:
            run_search(evolution, live.watching(fitness), on_generation=finish_generation)
    write_genome(
        run_dir / "genome.json",
        run_dir / "genome.txt",
        space=database.space,
        genome=evolution.parent,
        database=database.fingerprint,
        budget=workspace.budget,
    )


def _starts(workspace: Workspace) -> list[Genome]:
    """Return the baselines' genomes that `search.starts` names."""
    names = workspace.settings.search.starts
    if not names:
        return []
    baselines, _ = stored_baselines(workspace)
    missing = [name for name in names if name not in baselines]
    if missing:
        raise EvoPressError(
            f"search.starts has {missing[0]!r}, which is not among this run's baselines ({', '.join(baselines) or 'none'}): name "
            "it as its row is called, and let baselines.names and the stage baselines make it"
        )
    return [workspace.database.space.check(baselines[name]) for name in names]


def _held_out(workspace: Workspace, genome: Genome) -> dict[str, Any]:
    """Measure a genome on the first held-out tokens of the run's own text."""
    name, sequences = next(iter(workspace.evaluation_data.items()))
    fitness = workspace.settings.fitness
    rows = max(workspace.settings.evaluation.every_tokens // sequences.shape[1], 1)
    score = measure_held_out(
        workspace.evaluator,
        [genome],
        sequences[:rows],
        batch_tokens=fitness.max_tokens_in_flight,
        chunk_tokens=fitness.chunk_tokens,
    )[0]
    return {"kl": score.kl, "perplexity": {name: score.perplexity}, "top1_agreement": score.top1_agreement}
