"""Compare the sparse levels of recipe=paper and recipe=best, by layer and as uniform models on held-out text.

    python -m experiments.levels.sparse                  # whole models: a database of all levels per recipe and sparsity
    python -m experiments.levels.sparse --target-only    # the target's level alone, each from the dense weight
    python -m experiments.levels.sparse --inputs FILE    # layers: safetensors with <layer>.W [R, C] and <layer>.H [C, C]

Writes `sparse.csv` beside this file after each measurement.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor

from evopress.compress.compressor import with_errors
from evopress.compress.hessian import damp
from evopress.compress.sparse import PruneTo, Sparse, SparsityLevels, derive_step, kept_at
from evopress.compress.sparsegpt import RECIPES, SparseGPT
from evopress.evaluation.heldout import measure_held_out
from evopress.levels.union import LevelUnion
from evopress.workspace import Workspace
from experiments.composed import settings_of, take_threads
from experiments.frames import write_frame
from experiments.scripts import file_to_read, file_to_write, in_one_sentence

SPARSITIES = (0.7, 0.6, 0.5)
TABLE = Path(__file__).with_suffix(".csv")
KEYS = ["measured", "recipe", "sparsity"]


def least_squares(W: Tensor, H: Tensor, mask: Tensor) -> Tensor:
    """Return the best values on a mask bool [R, C] under H float32 [C, C], row by row; W float32 [R, C]."""
    V, G = torch.zeros_like(W), W @ H
    for row, kept in enumerate(mask):
        if bool(kept.any()):
            V[row, kept] = torch.linalg.solve(H[kept][:, kept], G[row, kept])
    return V


def layers(inputs: Path) -> Iterator[dict[str, Any]]:
    """Yield the relative output errors of each layer at each sparsity, with the best values on either recipe's mask beside them.

    Seconds are of the processor, for all levels around that sparsity, errors included.
    """
    tensors = load_file(inputs)
    for layer in sorted(key.removesuffix(".W") for key in tensors if key.endswith(".W")):
        W, H = tensors[f"{layer}.W"].float(), tensors[f"{layer}.H"].float()
        damped, _ = damp(H, damping=0.01)
        for sparsity in SPARSITIES:
            for recipe in RECIPES:
                step = derive_step([W.numel()], sparsity, SparseGPT.num_levels)
                pruner = SparseGPT(sparsity=sparsity, step=step, dtype_bits=32, recipe=recipe)
                started = time.process_time()
                levels = pruner.compress({layer: W}, H)[layer]
                seconds = time.process_time() - started
                level = levels[list(pruner.signed_levels(W.numel())).index(0)]
                assert isinstance(level.payload, Sparse)
                yield {"measured": layer, "recipe": recipe, "sparsity": sparsity, "error": level.error, "seconds": seconds}
                refit = Sparse.of(least_squares(W, damped, level.payload.mask), level.payload.mask, W.dtype)
                error = with_errors([refit], W, H)[0].error
                yield {"measured": layer, "recipe": f"{recipe}, least squares", "sparsity": sparsity, "error": error}


def models(
    root: Path, recipes: Sequence[str], sparsity: float, *, target_only: bool, overrides: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Build a database per recipe, and measure the uniform models at their target on the same text.

    Args: root: of databases; Hessians that an earlier one left there are used. Seconds are of the processor, summed over threads.
    """
    databases, seconds = [], []
    for recipe in recipes:
        workspace = workspace_of(root, sparsity, [f"method.recipe={recipe}", *overrides])
        compressor = workspace.databases.compressor
        if target_only:
            assert isinstance(compressor, SparsityLevels)
            units = [slot for part in workspace.blocks.parts for slot in workspace.blocks.slots(part).values()]
            compressor = PruneTo(pruner=compressor, kept={unit.name: (kept_at(unit.weight.numel(), sparsity),) for unit in units})
        times = [time.process_time()]
        workspace.databases.complete_hessians()
        times.append(time.process_time())
        databases.append(workspace.databases.ensure("sparsity", compressor)[0])
        times.append(time.process_time())
        seconds.append((times[1] - times[0], times[2] - times[1]))
    vars(workspace)["levels"] = LevelUnion(databases)
    targets = [[0 if target_only else [level.key for level in u.levels].index("0") for u in db.space.units] for db in databases]
    genomes = [LevelUnion(databases[: i + 1]).genome_of_last(tuple(target)) for i, target in enumerate(targets)]
    sequences = next(iter(workspace.evaluation_data.values()))
    fitness = workspace.settings.fitness
    scores = measure_held_out(
        workspace.evaluator,
        genomes,
        sequences,
        batch_tokens=fitness.max_tokens_in_flight,
        chunk_tokens=fitness.chunk_tokens,
    )
    for recipe, database, target, score, (hessians, levels) in zip(recipes, databases, targets, scores, seconds, strict=True):
        yield {
            "measured": "model, target alone" if target_only else f"model, {len(database.space.units[0].levels)} levels",
            "recipe": recipe,
            "sparsity": sparsity,
            "error": sum(database.errors[i][level] for i, level in enumerate(target)) / len(target),
            "kl": score.kl,
            "perplexity": score.perplexity,
            "top1_agreement": score.top1_agreement,
            "hessian_seconds": hessians,
            "seconds": levels,
        }


def workspace_of(root: Path, sparsity: float, overrides: Sequence[str]) -> Workspace:
    """Compose the settings of a run of method sparsity."""
    settings = settings_of(["+method=sparsity", f"sparsity={sparsity}", f"level_db.root={root}", "tracker=none", *overrides])
    take_threads(settings)
    return Workspace(settings, root)


@in_one_sentence()
def main() -> None:
    """Measure what is asked for and not in the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=file_to_read, help="layers to measure, instead of models")
    parser.add_argument("--target-only", action="store_true", help="build no other levels")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES))
    parser.add_argument("--root", type=Path, help="of databases, kept; default: a temporary folder")
    parser.add_argument("--out", type=file_to_write, default=TABLE)
    parser.add_argument("overrides", nargs="*", help="of every run, such as threads=1 model.dtype=float32")
    arguments = parser.parse_args()
    rows: list[dict[Any, Any]] = pd.read_csv(arguments.out).to_dict("records") if arguments.out.exists() else []

    def keep(row: dict[str, Any]) -> None:
        rows[:] = [other for other in rows if any(other[key] != row[key] for key in KEYS)] + [row]
        write_frame(arguments.out, pd.DataFrame(rows))
        print(row, flush=True)

    if arguments.inputs:
        for row in layers(arguments.inputs):
            keep(row)
        return
    with TemporaryDirectory() as temporary:
        for sparsity in arguments.sparsities:
            folder = arguments.root or Path(temporary)
            for row in models(
                folder, arguments.recipes, sparsity, target_only=arguments.target_only, overrides=arguments.overrides
            ):
                keep(row)


if __name__ == "__main__":
    main()
