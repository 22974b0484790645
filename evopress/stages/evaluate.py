"""Stage `evaluate`: measure the dense model, the baselines and what was found on held-out text, and in tasks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from evopress.baselines.named import make_baselines
from evopress.data.tokens import tokens_digest
from evopress.evaluation.heldout import MEANS, Scores, scores_by_data_set
from evopress.evaluation.tasks import count_asked, load_tasks, questions_digest
from evopress.evaluation.zero_shot import ZeroShot, measure_zero_shot
from evopress.fitness.archive import code_digest
from evopress.fitness.population import walked_together
from evopress.progress import counted
from evopress.ranks import processes
from evopress.reporting.generations import read_generations
from evopress.reporting.records import read_genome, write_json
from evopress.reporting.tracker import Tracker
from evopress.resources import Needs
from evopress.stages.baselines import read_baselines, spent_on_baselines, stored_baselines
from evopress.stages.exports import add_sizes
from evopress.stages.given import named_genome, take_best_so_far
from evopress.stages.measured import (
    MEASURED,
    Measured,
    answers_as_json,
    answers_of_json,
    scores_as_json,
    scores_of_json,
)
from evopress.stages.needs import Planner
from evopress.stages.refine import refined_levels
from evopress.stages.report import track_results
from evopress.stages.results import read_result
from evopress.stages.search import as_held_out, held_out_in_search
from evopress.units import Genome, Space
from evopress.workspace import Workspace

logger = logging.getLogger(__name__)


def evaluate_needs(planner: Planner) -> Needs:
    """Return what the stage `evaluate` takes."""
    models, data = 1 + _num_genomes(planner), planner.workspace.evaluation_data
    tokens = sum(sequences.numel() for sequences in data.values())
    needs = planner.needs("evaluate", f"{counted(models, 'model')} on {', '.join(data)}")
    if planner.settings.evaluation.tasks:
        _answer_needs(planner, needs, models)
    _, mine = planner.mine(models, tokens, split=False)
    planner.score(needs, models, mine)
    length = max(sequences.shape[1] for sequences in data.values())
    batch = max(planner.settings.fitness.max_tokens_in_flight // length, 1)
    together = walked_together(planner.workspace.blocks, models, length, batch) * length
    planner.hold(needs, models, min(together, mine), apart=True, given=False)  # models that differ in every block
    return needs


def _answer_needs(planner: Planner, needs: Needs, models: int) -> None:
    """Add what zero-shot tasks take of each model, which processes share by their batches."""
    workspace, evaluation = planner.workspace, planner.settings.evaluation
    if workspace.model_source.is_outline:
        needs.what += " (zero-shot tasks not counted)"
        planner.hold_decoded(needs)
        return
    tasks, blocks = _tasks(workspace), workspace.blocks
    rules: dict[str, Any] = {"bos": planner.settings.model.bos, "limit": evaluation.task_limit}
    asked = count_asked(tasks, workspace.tokenizer, config=blocks.model.config, **rules)
    tokens = models * asked.tokens // processes()
    planner.add(
        needs,
        tokens,
        tokens * planner.num_blocks,
        lambda speed: tokens * (planner.num_blocks * speed.block + speed.reference),
    )
    # lm-eval has all logits of a batch, and their log-probabilities.
    logits = 2 * evaluation.task_batch_size * asked.longest * blocks.head().weight.shape[0] * blocks.dtype.itemsize
    planner.hold_decoded(needs, beside=logits)


def _num_genomes(planner: Planner) -> int:
    """Return how many genomes will be there to evaluate."""
    settings, folder, count = planner.settings, planner.workspace.run_dir, 0
    if "baselines" in settings.stages:
        count = sum(baseline.num_genomes(planner.planned) for baseline in make_baselines(settings.baselines).values())
    elif (folder / "baselines.json").exists():
        count = len(read_baselines(folder / "baselines.json")["genomes"])
    refined = "refine" in settings.stages and planner.workspace.refines
    found = "search" in settings.stages or (folder / "genome.json").exists()
    return count + (settings.genome is not None) + refined + found


def evaluate(workspace: Workspace, tracker: Tracker) -> None:
    """Stage `evaluate`: measure the dense model, the baselines and the found genome, read back from its file, on held-out text.

    Where the genome has been refined, it is measured as it was found and as refined.
    """
    run_dir, database = workspace.run_dir, workspace.database
    take_best_so_far(workspace)
    given = named_genome(workspace)
    baselines, space = stored_baselines(workspace)
    genomes: dict[str, Genome | None] = {"dense": None, **baselines}
    if (run_dir / "genome.json").exists():
        found = read_genome(run_dir / "genome.json", database.space, database=database.fingerprint)
        genomes["evopress"] = found
        if (refined := refined_levels(workspace, found)) is not None:
            genomes["evopress_refined"], space = workspace.add_refined(refined)
    if given is not None:
        genomes.setdefault(given.name, given.genome)
    rows = measured_rows(workspace, genomes, space)
    for row in rows:
        if (genome := genomes[row["name"]]) is not None:
            row["within_budget"] = workspace.budget.met_by(space, genome)
    add_sizes(rows, workspace)
    result: dict[str, Any] = {"schema": 1, "rows": rows}
    records = read_generations(run_dir / "metrics.jsonl", database.space)
    if records:
        result["search"] = {key: records[-1][key] for key in ("tokens", "seconds", "evaluations")}
        result["search"]["generations"] = records[-1]["generation"]
    add_spent(rows, {**spent_on_baselines(run_dir), "evopress": result.get("search", {})})
    told = read_result(run_dir)
    told.pop("genome", None)
    if "evopress_refined" not in genomes:
        told.pop("refine", None)  # of another genome
    result |= {key: value for key, value in told.items() if key not in result}
    if given is not None:
        result["genome"] = given.name
    result["memory"] = workspace.memory()
    write_json(run_dir / "result.json", result)
    (run_dir / MEASURED).unlink(missing_ok=True)
    if "report" not in workspace.settings.stages:
        track_results(tracker, rows, records)


def add_spent(rows: list[dict[str, Any]], spent: Mapping[str, Mapping[str, Any]]) -> None:
    """Add to rows what finding them took, as far as that is known, by name."""
    for row in rows:
        row |= {f"{key}_spent": value for key, value in spent.get(row["name"], {}).items() if key in ("tokens", "seconds")}


def measured_rows(workspace: Workspace, genomes: Mapping[str, Genome | None], space: Space) -> list[dict[str, Any]]:
    """Measure genomes on held-out text, and return a row for each: what it spends and how good it is.

    Args:
        genomes: by name; None is the dense model, there where tasks are answered.
        space: whose levels they count.
    """
    data_sets = workspace.evaluation_data
    count = sum(sequences.numel() for sequences in data_sets.values())
    logger.info("evaluation: %s on %d tokens of %s", counted(len(genomes), "model"), count, ", ".join(data_sets))
    kept = Measured(workspace.run_dir, _decided_by(workspace))
    scores = _scores(workspace, genomes, kept)
    answers = _zero_shot(workspace, genomes, kept)
    itemsize = workspace.blocks.dtype.itemsize
    own, sequences = held_out_in_search(workspace)
    num_sequences = len(sequences)
    rows: list[dict[str, Any]] = []
    for name, genome in genomes.items():
        if genome is None:
            costs, stored_bits = workspace.method.dense_costs(8 * itemsize), 8 * itemsize * space.size
        else:
            costs, stored_bits = workspace.method.costs(space, genome), space.stored_bits(genome)
        rows.append(
            {
                "name": name,
                **costs,
                "bytes": workspace.other_bytes + (stored_bits + 7) // 8,
                **workspace.bytes_read(space, genome),
                **_measured(scores[name]),
                "held_out_in_search": as_held_out(own, scores[name][own].first(num_sequences)),
                **(answers[name].as_row(answers["dense"]) if answers else {}),
            }
        )
    return rows


def _measured(scores: Mapping[str, Scores]) -> dict[str, Any]:
    """Lay out a row's measures by data set, and `kl` and the like as the means over all their tokens."""
    total = sum(score.num_tokens for score in scores.values())

    def by_data_set(value: Callable[[Scores], Any]) -> dict[str, Any]:
        return {data_set: value(score) for data_set, score in scores.items()}

    means = by_data_set(Scores.means)
    return {
        **{name: sum(scores[text].num_tokens / total * means[text][name] for text in scores) for name in MEANS},
        "perplexity": by_data_set(lambda score: score.perplexity),
        **{f"{name}_by_data_set": {text: means[text][name] for text in scores} for name in MEANS},
        "tokens_by_data_set": by_data_set(lambda score: score.num_tokens),
        "by_sequence": by_data_set(lambda score: score.by_sequence),
    }


def _decided_by(workspace: Workspace) -> dict[str, Any]:
    """Return what decides all that is measured of a run's genomes, their text and tasks aside."""
    _, further, refined = workspace.known_as
    levels = {"further": list(further), "refined": None if refined is None else refined.name}
    return {**workspace.what_decides, **levels, "compiled": workspace.fused, "code": code_digest("evaluation")}


def _scores(workspace: Workspace, genomes: Mapping[str, Genome | None], kept: Measured) -> dict[str, dict[str, Scores]]:
    """Measure genomes on each data set, or take what was kept of it: name to data set to scores."""
    fitness, scores = workspace.settings.fitness, {name: dict[str, Scores]() for name in genomes}
    sizes: dict[str, int] = {"batch_tokens": fitness.max_tokens_in_flight, "chunk_tokens": fitness.chunk_tokens}
    for data_set, sequences in workspace.evaluation_data.items():

        def measure(data_set: str = data_set, sequences: Tensor = sequences) -> list[Any]:
            found = scores_by_data_set(workspace.evaluator, genomes, {data_set: sequences}, **sizes)
            return [scores_as_json(found[name][data_set]) for name in genomes]

        told = kept.of({"text": tokens_digest(sequences), "genomes": list(genomes.values())}, measure)
        for name, each in zip(genomes, told, strict=True):
            scores[name][data_set] = scores_of_json(each)
    return scores


def _zero_shot(workspace: Workspace, genomes: Mapping[str, Genome | None], kept: Measured) -> dict[str, ZeroShot]:
    """Let the model at named genomes answer the tasks that the settings name, or take what was kept; no tasks: nothing."""
    evaluation, bos = workspace.settings.evaluation, workspace.settings.model.bos
    if not evaluation.tasks:
        return {}
    tasks = _tasks(workspace)
    asked = {"tasks": questions_digest(tasks, limit=evaluation.task_limit), "batch": evaluation.task_batch_size, "bos": bos}
    found = {name: kept.find({**asked, "genome": genome}) for name, genome in genomes.items()}
    answers = {name: answers_of_json(told) for name, told in found.items() if told is not None}
    if missing := {name: genome for name, genome in genomes.items() if name not in answers}:
        answers |= measure_zero_shot(
            workspace.live,
            workspace.pretrained.tokenizer,
            missing,
            tasks,
            limit=evaluation.task_limit,
            batch_size=evaluation.task_batch_size,
            bos=bos,
            known_as=("tasks", *workspace.known_as[1:], evaluation.task_batch_size, bos),
            keep=lambda name, those: kept.keep({**asked, "genome": missing[name]}, answers_as_json(those)),
        )
    return {name: answers[name] for name in genomes}


def _tasks(workspace: Workspace) -> dict[str, Any]:
    evaluation = workspace.settings.evaluation
    return load_tasks(evaluation.tasks, tasks_path=evaluation.tasks_path)
