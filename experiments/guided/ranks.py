"""How well the guided search ranks genomes: predicted against measured KL of random genomes around one that it found.

    python -m experiments.guided.ranks                                       # quant, 2, 2.5 and 3 bits, 100 genomes each
    python -m experiments.guided.ranks --method drop --targets 0.25
    python -m experiments.guided.ranks --targets 2.5 --genomes 12 --results tiny.csv -- +debug=tiny

Runs lie in `multirun/guided/` and are gone on with. Around each run's genome random ones are drawn within its budget, a few
switches away, and measured on held-out text, all on the same. `ranks.csv` has Spearman's correlation of that with what each
predictor says:

- `search`: the integer program's values at the end of the search: mean sensitivities of its last rounds, times the levels' errors
- `fresh`: the same from one attribution at the genome, on text drawn anew
- `errors`: the errors alone, as dynamic programming has them; modules have none that tell

`ceiling` is the most that a perfect predictor could be expected to have, since measured KL has noise: from the correlation of
the two halves of the text. What follows `--` is given to every run.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from evopress.errors import EvoPressError
from evopress.fitness.measures import KLDivergence
from evopress.fitness.population import measure_sequences
from evopress.reporting.records import read_genome
from evopress.search.mutation import LevelSwitch, offspring
from evopress.search.sensitivity import Expected, errors_at, errors_of, latest_sensitivities
from evopress.stages.baselines import make_fitness
from evopress.units import Budget, Genome, Space
from evopress.workspace import Workspace
from experiments.composed import settings_of
from experiments.frames import write_frame
from experiments.scripts import file_to_write, in_one_sentence
from experiments.single_runs import evopress, folder_name, why_it_failed

FOLDER = Path(__file__).parent
RUNS = Path("multirun/guided")
TARGETS: dict[str, tuple[float, ...]] = {"quant": (2, 2.5, 3), "sparsity": (0.5, 0.7), "drop": (0.125, 0.25)}
_TARGET = {"quant": "bits", "sparsity": "sparsity", "drop": "sparsity"}


def around(space: Space, budget: Budget, genome: Genome, *, count: int, switches: int, seed: int) -> list[Genome]:
    """Draw different genomes within a budget, each 1 to so many switches away; fewer where there are not so many."""
    rng = np.random.default_rng(seed)
    each = [LevelSwitch(space, budget, exchange="fit", max_switches=n, distribution="constant") for n in range(1, switches + 1)]
    return offspring(lambda parent, rng: each[int(rng.integers(switches))](parent, rng), genome, count, rng)


def measured(workspace: Workspace, genomes: Sequence[Genome], sequences: Tensor) -> np.ndarray:
    """Return the KL divergence of every genome on every sequence, nats per token, [genomes, N]."""
    fitness = workspace.settings.fitness
    base = workspace.held_out_base(len(sequences))
    batch = max(fitness.max_tokens_in_flight // sequences.shape[1], 1)
    parts = [
        measure_sequences(
            workspace.evaluator,
            genomes,
            sequences[start : start + batch],
            workspace.evaluator.final_states([None], sequences[start : start + batch])[1][0].cpu()
            if base is None
            else base[start : start + batch],
            KLDivergence(),
            chunk_tokens=fitness.chunk_tokens,
        )[:, 0].numpy()
        for start in range(0, len(sequences), batch)
    ]
    return np.concatenate(parts, axis=1) / (sequences.shape[1] - 1)


def predictors(workspace: Workspace, genome: Genome, state: Mapping[str, Any], *, seed: int) -> dict[str, Expected]:
    """Return what is expected of genomes by each way to tell, by name."""
    space, database = workspace.database.space, workspace.database
    errors = errors_of(space, () if workspace.method.weights is None else database.errors)

    def of(weights: np.ndarray) -> Expected:
        return Expected(space, [(weight * of_unit).tolist() for weight, of_unit in zip(weights, errors, strict=True)])

    strategy = workspace.settings.search.strategy
    fresh = make_fitness(workspace, np.random.default_rng([seed, 1]))
    held = np.asarray(fresh.attribute(genome, tokens=strategy.attribution_tokens, sequences=strategy.attribution_sequences))
    here = errors_at(space, errors, genome)
    found = {"fresh": of(latest_sensitivities(space, genome, held, here))}
    if state.get("sensitivities"):
        found = {"search": of(np.exp(np.log(state["sensitivities"]).mean(axis=0))), **found}
    return found if workspace.method.weights is None else {**found, "errors": of(np.ones(len(space)))}


def ranks(kl: np.ndarray, expected: Mapping[str, Sequence[float]]) -> Iterator[dict[str, Any]]:
    """Yield Spearman's rank correlation of each predictor with the mean KL, and the ceiling that the noise of the KL sets.

    Args:
        kl: [genomes, sequences], at least 2 sequences.
        expected: by predictor, of every genome.
    """
    from scipy.stats import spearmanr

    halves = spearmanr(kl[:, ::2].mean(axis=1), kl[:, 1::2].mean(axis=1)).statistic
    reliability = 2 * halves / (1 + halves) if halves > 0 else 0.0  # of both halves together, by Spearman and Brown
    for name, values in expected.items():
        yield {
            "predictor": name,
            "spearman": float(spearmanr(kl.mean(axis=1), values).statistic),
            "ceiling": math.sqrt(reliability),
        }


def rows(arguments: argparse.Namespace, target: float) -> Iterator[dict[str, Any]]:
    """Yield a row per predictor at one target; one with a sentence instead of numbers where the run failed."""
    about = {"method": arguments.method, "target": target, "seed": arguments.seed}
    common = [f"+method={arguments.method}", f"{_TARGET[arguments.method]}={target:g}", f"seed={arguments.seed}"]
    overrides = [*common, "search/strategy=guided", "tracker=none", "baselines.names=[]", *arguments.further]
    folder = RUNS / folder_name(f"ranks-{arguments.method}-{target:g}-{arguments.seed}")
    if not evopress(folder, *overrides, "stages=[database,search]"):
        yield {**about, "failed": why_it_failed(folder)}
        return
    workspace = Workspace(settings_of(overrides), folder)
    space, budget = workspace.database.space, workspace.budget
    genome = read_genome(folder / "genome.json", space, database=workspace.database.fingerprint)
    genomes = around(space, budget, genome, count=arguments.genomes, switches=arguments.switches, seed=arguments.seed)
    sequences = next(iter(workspace.evaluation_data.values()))
    sequences = sequences[: max(arguments.tokens // sequences.shape[1], 2)]
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))["evolution"]
    expected = predictors(workspace, genome, state, seed=arguments.seed)
    kl = measured(workspace, [genome, *genomes], sequences)
    changed = [sum(a != b for a, b in zip(genome, other, strict=True)) for other in genomes]
    more = kl.mean(axis=1)[1:] - kl[0].mean()
    for row in ranks(kl[1:], {name: [each.of(other) for other in genomes] for name, each in expected.items()}):
        told = np.array([expected[row["predictor"]].of(other) - expected[row["predictor"]].of(genome) for other in genomes])
        yield {
            **about,
            **row,
            "genomes": len(genomes),
            "tokens": sequences.numel(),
            "changes": float(np.mean(changed)),
            "kl": float(kl[0].mean()),
            "kl_more": float(more.mean()),
            "better": float((more < 0).mean()),
            "told_more": float(told.mean()),
        }


@in_one_sentence()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="quant", choices=list(TARGETS))
    parser.add_argument("--targets", nargs="+", type=float, help="bits, or sparsities")
    parser.add_argument("--genomes", type=int, default=100)
    parser.add_argument("--switches", type=int, default=4, help="of a genome, at most")
    parser.add_argument("--tokens", type=int, default=16384, help="held-out tokens that all are measured on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=file_to_write, default=FOLDER / "ranks.csv")
    parser.add_argument("further", nargs="*", help="overrides for every run, after --")
    arguments = parser.parse_args()
    found: dict[tuple[str, float, int], list[dict[Any, Any]]] = {}
    for row in pd.read_csv(arguments.results).to_dict("records") if arguments.results.exists() else ():
        found.setdefault((row["method"], row["target"], row["seed"]), []).append(row)
    failed: list[float] = []
    for target in arguments.targets or TARGETS[arguments.method]:
        measured_now = list(rows(arguments, target))
        print(*measured_now, sep="\n", flush=True)
        if "failed" in measured_now[0]:  # what was measured before stays
            failed.append(target)
            continue
        found[arguments.method, target, arguments.seed] = measured_now
        write_frame(arguments.results, pd.DataFrame([row for those in found.values() for row in those]), digits=None)
    if failed:
        raise EvoPressError(f"runs of {', '.join(f'{target:g}' for target in failed)} failed, see above")


if __name__ == "__main__":
    main()
