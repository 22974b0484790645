"""Build level databases by different recipes and measure uniform models and dynamic programming's choice on held-out text.

A row is a recipe, as overrides of the command line; seeds are orders of the calibration sequences, whose sums alone move a level.

    python -m experiments.levels.measure                 # all rows, three seeds: about an hour on 2 cores
    python -m experiments.levels.measure --rows paper best --seeds 0
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from evopress.baselines.dynamic_programming import dynamic_programming
from evopress.baselines.uniform import uniform_genomes
from evopress.evaluation.heldout import measure_held_out
from evopress.methods import make_method
from evopress.progress import duration
from evopress.units import Genome
from evopress.workspace import Workspace
from experiments.composed import settings_of
from experiments.frames import write_frame
from experiments.scripts import file_to_write, in_one_sentence

ROWS: dict[str, list[str]] = {
    "paper": ["method.recipe=paper"],
    "best": [],
    "best, through 3 bits": ["method.propagate_bits=3"],
    "best, corrected through 4 bits": ["method.correction=0.5"],
    "best, corrected through 3 bits": ["method.correction=0.5", "method.propagate_bits=3"],
    "best, corrected through 2 bits": ["method.correction=0.5", "method.propagate_bits=2"],
    "best, tolerance 0.01": ["method.tolerance=0.01"],
    "best, no descent": ["method.tolerance=0.999999"],
    "best, symmetric": ["method.symmetric=true"],
    "best, group 32": ["method.group_size=32"],
    "best, 2 and 3 bits in groups of 32": ["+method.group_sizes={2: 32, 3: 32}"],
    "best, 16,384 tokens": ["data.calibration_tokens=16384"],
    "paper, 16,384 tokens": ["method.recipe=paper", "data.calibration_tokens=16384"],
}
"""Recipe to the overrides that make it."""
BUDGETS = (2.5,)
"""Bits a weight at which dynamic programming chooses."""
UNIFORM = ("uniform_4", "uniform_3", "uniform_2")
FOLDER = Path(__file__).parent


def measure(row: str, overrides: list[str], *, seed: int) -> list[dict[str, Any]]:
    """Build one database anew, in a folder of its own, and measure what it is worth.

    Args: seed: of the order of the calibration sequences; 0 leaves it as it is.

    Returns: a record per model.
    """
    with tempfile.TemporaryDirectory() as root:
        settings = settings_of(["+method=quant", "bits=2.5", "tracker=none", f"level_db.root={root}", *overrides])
        workspace = Workspace(settings, Path(root))
        tokens = workspace.calibration_tokens
        if seed:
            order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
            vars(workspace.text)["calibration"] = tokens[order]
            assert torch.equal(workspace.calibration_tokens, tokens[order])
        _ = workspace.blocks
        started = time.monotonic()
        database = workspace.database
        seconds = time.monotonic() - started
        space = database.space
        genomes: dict[str, Genome] = {name: g for name, g in uniform_genomes(space).items() if name in UNIFORM}
        for bits in BUDGETS:
            settings.bits = bits
            genomes[f"dp_{bits:g}"] = dynamic_programming(space, make_method(settings).budget(space), database.errors)
        fitness = settings.fitness
        device = torch.cuda.get_device_name(workspace.device) if workspace.device.type == "cuda" else "CPU"
        sequences = next(iter(workspace.evaluation_data.values()))
        scores = measure_held_out(
            workspace.evaluator,
            list(genomes.values()),
            sequences,
            batch_tokens=fitness.max_tokens_in_flight,
            chunk_tokens=fitness.chunk_tokens,
        )
        return [
            {
                "recipe": row,
                "seed": seed,
                "model": name,
                "bits_per_weight": space.cost(genome) / space.size,
                "with_metadata": space.stored_bits(genome) / space.size,
                "kl": score.kl,
                "perplexity": score.perplexity,
                "top1_agreement": score.top1_agreement,
                "database_seconds": seconds,
                "device": f"{device}, {str(workspace.blocks.dtype).removeprefix('torch.')}",
            }
            for (name, genome), score in zip(genomes.items(), scores, strict=True)
        ]


@in_one_sentence()
def main() -> None:
    """Measure what is asked for and not yet in the table; write `results.csv` after each database."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=file_to_write, default=FOLDER / "results.csv")
    parser.add_argument("further", nargs="*", help="overrides for every row, after --")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    done: list[dict[Any, Any]] = pd.read_csv(arguments.out).to_dict("records") if arguments.out.exists() else []
    for seed in arguments.seeds:
        for row in arguments.rows:
            if any(record["recipe"] == row and record["seed"] == seed for record in done):
                continue
            started = time.monotonic()
            done += measure(row, [*ROWS[row], *arguments.further], seed=seed)
            write_frame(arguments.out, pd.DataFrame(done))
            shown = {record["model"]: round(record["kl"], 4) for record in done[-8:]}
            print(f"{row}, seed {seed}: {shown}, database {done[-1]['database_seconds']:.0f} s", flush=True)
            print(f"  {duration(time.monotonic() - started)}", flush=True)


if __name__ == "__main__":
    main()
