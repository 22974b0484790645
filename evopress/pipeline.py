"""The stages of a run, each a function of the workspace: database, baselines, search, evaluate, export, report.

A stage reads what earlier ones left in the run folder, so any can be run alone on an earlier run, and a killed run goes on.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np

from evopress.baselines.best_of_random import best_of_random
from evopress.baselines.dynamic_programming import dynamic_programming
from evopress.baselines.owl import GRID, MULTIPLES, outlier_ratios, owl_kept
from evopress.baselines.uniform import uniform_genomes
from evopress.compress.sparse import PruneTo, SparsityLevels
from evopress.errors import EvoPressError
from evopress.evaluation.heldout import measure_held_out, scores_by_data_set
from evopress.export import export_checkpoint
from evopress.fitness.measures import KLDivergence, Measure, NegativeLogLikelihood, TopkKL
from evopress.fitness.minibatch import MinibatchFitness
from evopress.levels.store import LevelDatabase
from evopress.progress import duration
from evopress.reporting import figures, tables
from evopress.reporting.records import (
    append_record,
    read_genome,
    read_json,
    read_records,
    truncate_records,
    write_genome,
    write_json,
)
from evopress.reporting.report import headline, write_report
from evopress.reporting.tracker import NullTracker, Tracker, WandbTracker
from evopress.search.constraint import EXCHANGES
from evopress.search.evolution import Evolution, SearchSettings, run_search
from evopress.search.mutation import DISTRIBUTIONS
from evopress.search.record import GenerationRecord
from evopress.search.selection import Stage
from evopress.settings import FitnessSettings, RunSettings, SearchConfig, TrackerSettings
from evopress.units import Genome, Space
from evopress.workspace import Workspace

logger = logging.getLogger(__name__)

BASELINES = ("uniform", "best_of_random", "dp", "owl")


def run(settings: RunSettings, run_dir: Path, *, config: dict[str, Any], command: str, environment: dict[str, Any]) -> float:
    """Run the stages that the settings name and return the found genome's held-out KL (NaN if it was not measured).

    Args:
        config: the composed config, for the report and the tracker.
        command: what was typed, for the report.
        environment: versions and machine, for the report.
    """
    check_names(settings)
    searching = search_settings(settings.search)
    check_tokens(settings)
    started = time.monotonic()
    workspace = Workspace(settings, run_dir)
    workspace.read_text()
    tracker = make_tracker(settings.tracker)
    tracker.start(
        config=config,
        run_dir=run_dir,
        name=settings.tracker.run_name,
        group=settings.tracker.group,
        tags=[settings.method.name, *settings.tracker.tags],
    )
    try:
        if "database" in settings.stages:
            build_database(workspace)
        if "baselines" in settings.stages:
            find_baselines(workspace)
        if "search" in settings.stages:
            search(workspace, searching, tracker)
        if "evaluate" in settings.stages:
            evaluate(workspace, tracker)
        if "export" in settings.stages:
            export(workspace, command=command)
        if "report" in settings.stages:
            report(workspace, tracker, config=config, command=command, environment=environment)
    finally:
        tracker.finish()
    logger.info("done in %s: %s", duration(time.monotonic() - started), run_dir)
    result = _result(run_dir)
    return next((row["kl"] for row in result.get("rows", []) if row["name"] == "evopress"), float("nan"))


def check_names(settings: RunSettings) -> None:
    """Raise EvoPressError for baselines that do not exist."""
    for name in settings.baselines.names:
        if name not in BASELINES:
            raise EvoPressError(f"baselines.names has {name!r}: choose among {', '.join(BASELINES)}")
    if "owl" in settings.baselines.names:
        if settings.method.name != "sparsity":
            raise EvoPressError(f"baseline owl is of method sparsity, not {settings.method.name}: leave it out of baselines.names")
        if not settings.level_db.keep_hessians:
            raise EvoPressError(
                "baseline owl needs the Hessians kept: set level_db.keep_hessians=true, or leave it out of baselines.names"
            )


def check_tokens(settings: RunSettings) -> None:
    """Raise EvoPressError if a split is shorter than one sequence, or a minibatch larger than the search text."""
    length, data, search = settings.model.sequence_length, settings.data, settings.search
    for split in ("calibration", "search", "evaluation"):
        count = getattr(data, f"{split}_tokens")
        if count < length:
            raise EvoPressError(
                f"data.{split}_tokens={count} does not fill one sequence of model.sequence_length={length}: ask for more tokens or "
                "shorten the sequences"
            )
    available = data.search_tokens // length * length
    minibatches = [("search.initial_tokens", search.initial_tokens), *(("search.tokens", count) for count in search.tokens)]
    if "best_of_random" in settings.baselines.names:
        minibatches.append(("baselines.random_tokens", settings.baselines.random_tokens))
    if "owl" in settings.baselines.names and not 2 <= settings.baselines.owl_tokens <= data.calibration_tokens:
        raise EvoPressError(
            f"baselines.owl_tokens={settings.baselines.owl_tokens} is out of range: expected 2 to data.calibration_tokens="
            f"{data.calibration_tokens}; change one of them"
        )
    for key, count in minibatches:
        if not 2 <= count <= available:
            raise EvoPressError(
                f"{key} asks for a minibatch of {count} tokens: expected 2 to {available}, the search text (data.search_tokens) in "
                f"sequences of {length}; change one of them"
            )


def search_settings(config: SearchConfig) -> SearchSettings:
    """Convert and check the search's numbers.

    Raises: EvoPressError if the survivors do not descend to 1, or a number or a rule is missing or unknown.
    """
    if config.generations is None:
        raise EvoPressError(
            "search.generations is null, which only depth pruning derives: give a number, such as search.generations=50"
        )
    for key, value, known in (("exchange", config.exchange, EXCHANGES), ("distribution", config.distribution, DISTRIBUTIONS)):
        if value not in known:
            raise EvoPressError(f"search.{key}={value} is unknown: choose one of {', '.join(known)}")
    if config.max_switches < 1:
        raise EvoPressError(f"search.max_switches={config.max_switches} is out of range: expected at least 1")
    for key, bound, least in (("max_level", config.max_level, 1), ("max_total_deviation", config.max_total_deviation, 2)):
        if bound is not None and bound < least:
            raise EvoPressError(
                f"search.{key}={bound} allows no switch, which moves two units a level: expected at least {least}, or null for any"
            )
    return SearchSettings(
        generations=config.generations,
        num_offspring=config.num_offspring,
        stages=tuple(Stage(tokens, survivors) for tokens, survivors in zip(config.tokens, config.survivors, strict=True)),
        initial_candidates=config.initial_candidates,
        initial_tokens=config.initial_tokens,
        max_switches=config.max_switches,
        distribution=config.distribution,
        exchange=config.exchange,
        max_level=config.max_level,
        max_total_deviation=config.max_total_deviation,
    )


def search_cost(config: SearchConfig) -> int:
    """Return the candidate tokens that a search evaluates: the one honest currency."""
    per_generation = 0
    candidates = config.num_offspring
    for stage, (tokens, survivors) in enumerate(zip(config.tokens, config.survivors, strict=True)):
        per_generation += tokens * (candidates + (stage == len(config.tokens) - 1))
        candidates = survivors
    return (config.generations or 0) * per_generation + config.initial_candidates * config.initial_tokens


def make_tracker(settings: TrackerSettings) -> Tracker:
    """Return the tracker that the settings name."""
    if settings.name == "none":
        return NullTracker()
    return WandbTracker(mode=settings.mode, project=settings.project, entity=settings.entity)  # type: ignore[arg-type]


def make_measure(settings: FitnessSettings) -> Measure:
    """Return what the search minimises."""
    if settings.name == "topk_kl":
        return TopkKL(settings.k)
    return NegativeLogLikelihood() if settings.name == "perplexity" else KLDivergence()


def make_fitness(workspace: Workspace, rng: np.random.Generator) -> MinibatchFitness:
    """Return the fitness on the search text, minibatches drawn by `rng`."""
    settings = workspace.settings.fitness
    return MinibatchFitness(
        workspace.evaluator,
        workspace.search_tokens,
        rng=rng,
        base=workspace.search_base,
        measure=make_measure(settings),
        chunk_tokens=settings.chunk_tokens,
    )


def build_database(workspace: Workspace) -> None:
    """Stage `database`: build what is missing of the level database, or reuse it."""
    started = time.monotonic()
    database, _ = workspace.database, workspace.budget
    result = _result(workspace.run_dir)
    result["database"] = {
        "path": str(database.folder),
        "bytes": database.num_bytes,
        "seconds": time.monotonic() - started,
        "reused": workspace.database_reused,
    }
    write_json(workspace.run_dir / "result.json", result)


def find_baselines(workspace: Workspace) -> None:
    """Stage `baselines`: find the genomes that the search is compared with."""
    path = workspace.run_dir / "baselines.json"
    if path.exists():
        logger.info("baselines: already found in %s", path)
        return
    settings = workspace.settings.baselines
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
        found["dp"] = dynamic_programming(space, budget, workspace.database.errors)
    further: list[str] = []
    if "owl" in settings.names:
        found["owl"], database = find_owl(workspace)
        further.append(database.folder.name)
    genomes = {name: list(genome) for name, genome in found.items()}
    write_json(path, {"schema": 1, "database": workspace.database.fingerprint, "further": further, "genomes": genomes})


def find_owl(workspace: Workspace) -> tuple[Genome, LevelDatabase]:
    """Return OWL's best genome over the paper's grid, in levels of the run's database followed by those of a second one.

    Source: OWL (arXiv:2310.05175) as in paper section 4.2. The outlier ratios and the second database, pruned as the first is, come
    from the Hessians that the first left behind; the grid's best is that with the least perplexity on calibration text.
    """
    settings, blocks = workspace.settings, workspace.blocks
    pruner = workspace.method.compressor((), dtype_bits=8 * blocks.dtype.itemsize)
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
            search_cost(workspace.settings.search) / 1e6,
        )
        fitness = make_fitness(workspace, workspace.rng["minibatch"])
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
            tracker.log(_metrics(entry), generation=record.generation)
            _say(entry, settings.generations, seconds - seconds_before, first=first)

        first = evolution.generation
        run_search(evolution, fitness, on_generation=finish_generation)
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
    baselines, _ = _stored_baselines(workspace)
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


def _metrics(entry: dict[str, Any]) -> dict[str, float]:
    """Pick what a tracker draws out of a record."""
    numbers = {
        "fitness": entry["fitness"],
        "parent_fitness": entry["parent_fitness"],
        "accepted": float(entry["accepted"]),
        "tokens": entry["tokens"],
        "evaluations": entry["evaluations"],
        "seconds": entry["seconds"],
        "cost": entry["cost"],
    }
    held_out = entry.get("held_out", {})
    numbers |= {f"held_out/{key}": held_out.get(key) for key in ("kl", "top1_agreement")}
    numbers |= {f"held_out/ppl_{name}": value for name, value in held_out.get("perplexity", {}).items()}
    return {key: value for key, value in numbers.items() if value is not None}


def _say(entry: dict[str, Any], generations: int, seconds: float, *, first: int) -> None:
    """Log one line about a generation, with the time that is left."""
    generation = entry["generation"]
    done = generation - first + 1
    parts = [f"generation {generation:>3} of {generations}"]
    if entry["fitness"] is not None:
        parts.append(f"fitness {entry['fitness']:.4f}" + (" (new)" if entry["accepted"] else ""))
    if "held_out" in entry:
        parts.append(f"held-out KL {entry['held_out']['kl']:.4f}")
    if done and generation < generations:
        parts.append(f"{duration(seconds / done * (generations - generation))} left")
    logger.info("%s", ", ".join(parts))


def evaluate(workspace: Workspace, tracker: Tracker) -> None:
    """Stage `evaluate`: measure the dense model, the baselines and the found genome, read back from its file, on held-out text."""
    run_dir, database = workspace.run_dir, workspace.database
    baselines, space = _stored_baselines(workspace)
    genomes: dict[str, Genome | None] = {"dense": None, **baselines}
    if (run_dir / "genome.json").exists():
        genomes["evopress"] = read_genome(run_dir / "genome.json", database.space, database=database.fingerprint)
    data_sets = workspace.evaluation_data
    count = sum(sequences.numel() for sequences in data_sets.values())
    logger.info("evaluation: %d models on %d tokens of %s", len(genomes), count, ", ".join(data_sets))
    fitness = workspace.settings.fitness
    scores = scores_by_data_set(
        workspace.evaluator, genomes, data_sets, batch_tokens=fitness.max_tokens_in_flight, chunk_tokens=fitness.chunk_tokens
    )
    itemsize = workspace.blocks.dtype.itemsize
    rows = []
    for name, genome in genomes.items():
        measured = scores[name]
        tokens = {data_set: score.num_tokens for data_set, score in measured.items()}
        weights = {data_set: count / sum(tokens.values()) for data_set, count in tokens.items()}
        if genome is None:
            costs, stored_bits = workspace.method.dense_costs(8 * itemsize), 8 * itemsize * space.size
        else:
            costs, stored_bits = workspace.method.costs(space, genome), space.stored_bits(genome)
        rows.append(
            {
                "name": name,
                **costs,
                "bytes": workspace.other_bytes + (stored_bits + 7) // 8,
                "kl": sum(weights[data_set] * score.kl for data_set, score in measured.items()),
                "top1_agreement": sum(weights[data_set] * score.top1_agreement for data_set, score in measured.items()),
                "perplexity": {data_set: score.perplexity for data_set, score in measured.items()},
                "kl_by_data_set": {data_set: score.kl for data_set, score in measured.items()},
            }
        )
    result: dict[str, Any] = {"schema": 1, "rows": rows}
    records = read_records(run_dir / "metrics.jsonl")
    if records:
        result["search"] = {key: records[-1][key] for key in ("tokens", "seconds", "evaluations")}
        result["search"]["generations"] = records[-1]["generation"]
    result |= {key: value for key, value in _result(run_dir).items() if key not in result}
    result["memory"] = workspace.memory()
    write_json(run_dir / "result.json", result)
    frame = tables.results_frame(rows)
    tracker.table("results", list(frame.columns), frame.to_numpy().tolist())


def _stored_baselines(workspace: Workspace) -> tuple[dict[str, Genome], Space]:
    """Return the genomes that the stage `baselines` left behind, and the space of their levels.

    Raises: EvoPressError if they were found with another level database.
    """
    path, database = workspace.run_dir / "baselines.json", workspace.database
    if not path.exists():
        return {}, database.space
    stored = read_json(path)
    if stored.get("database") != database.fingerprint:
        raise EvoPressError(f"{path} is of another level database: remove it and start again")
    space = workspace.add_levels(stored.get("further", []))
    return {name: space.check(genome) for name, genome in stored["genomes"].items()}, space


def export(workspace: Workspace, *, command: str) -> None:
    """Stage `export`: write the found genome as a checkpoint that transformers loads."""
    run_dir, database = workspace.run_dir, workspace.database
    if not (run_dir / "genome.json").exists():
        raise EvoPressError(f"there is no genome.json in {run_dir} to export: run the stage search first")
    genome = read_genome(run_dir / "genome.json", database.space, database=database.fingerprint)
    folder = export_checkpoint(
        run_dir / "checkpoint",
        live=workspace.live,
        model=workspace.pretrained.model,
        tokenizer=workspace.pretrained.tokenizer,
        genome=genome,
        genome_files=(run_dir / "genome.json", run_dir / "genome.txt"),
        provenance={
            "schema": 1,
            "made_by": "evopress",
            "command": command,
            "base_model": workspace.pretrained.name,
            "base_model_digest": workspace.pretrained.digest,
            "level_database": database.fingerprint,
            "recipe": database.manifest["recipe"],
            **workspace.method.costs(database.space, genome),
        },
    )
    logger.info("checkpoint: %s", folder)


def report(workspace: Workspace, tracker: Tracker, *, config: dict[str, Any], command: str, environment: dict[str, Any]) -> None:
    """Stage `report`: tables, figures and one HTML page; prints the table."""
    settings, run_dir, database = workspace.settings, workspace.run_dir, workspace.database
    result, records = _result(run_dir), read_records(run_dir / "metrics.jsonl")
    rows = result.get("rows", [])
    genome = None
    pictures: list[Path] = []
    if records:
        fitness = settings.fitness.name
        baselines = {
            row["name"]: row["kl"] for row in rows if row["name"] not in ("dense", "evopress") and row.get("kl") is not None
        }
        pictures += figures.convergence(records, run_dir / "figures", baselines, fitness=fitness)
    if (run_dir / "genome.json").exists():
        genome = read_genome(run_dir / "genome.json", database.space, database=database.fingerprint)
        pictures += figures.level_heatmap(database.space, genome, run_dir / "figures")
        others, space = _stored_baselines(workspace)
        others = {name: other for name, other in others.items() if not name.startswith("uniform_")}
        pictures += figures.level_profile(space, {**others, "evopress": genome}, run_dir / "figures")
    if rows:
        tables.write_tables(rows, run_dir)
    checkpoint = run_dir / "checkpoint"
    write_report(
        run_dir / "report.html",
        title=f"{workspace.pretrained.name}, {settings.method.name} {workspace.budget.target:g} {workspace.budget.measure}",
        config=config,
        result={**result, "checkpoint": str(checkpoint)} if checkpoint.is_dir() else result,
        records=records,
        space=database.space,
        genome=genome,
        figures=pictures,
        command=command,
        environment=environment,
    )
    for path in pictures:
        if path.suffix == ".png":
            tracker.figure(path.stem, path)
    files = [run_dir / name for name in ("genome.json", "genome.txt", "result.json") if (run_dir / name).exists()]
    tracker.artifact(f"genome-{database.fingerprint}", "genome", files)
    if rows:
        print(f"\n{tables.format_table(rows)}\n\n{headline(rows)}", flush=True)
    print(f"report: {run_dir / 'report.html'}", flush=True)


def _result(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "result.json"
    return read_json(path) if path.exists() else {"schema": 1}
