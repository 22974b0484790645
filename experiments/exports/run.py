"""Files of one model in the engines that run them: held-out KL divergence and perplexity, tokens a second, peak memory.

    python -m experiments.exports.mixes                                             # llama.cpp's own, and the dense file
    python -m experiments.exports.run multirun/exports/*.gguf ours=RUN/exports/gguf/model.gguf
    python -m experiments.exports.run mlx=RUN/exports/mlx ours=RUN/checkpoint --sequences 1 --mlx-sequences 1

A path is a GGUF file (llama.cpp), a folder that export=[mlx] wrote (mlx-lm), a compressed_tensors folder (decompressed by its own
code, then transformers), or a checkpoint (transformers); NAME= before it names its row, NAME@ENGINE= its engine too, such as
"transformers bfloat16". The reference is the dense file in llama.cpp on the same tokens: the first sequences of the held-out text
that a run's table is measured on. Rows are written one by one; a file that has its row is not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from evopress.errors import EvoPressError
from evopress.reporting.drawing import COLOURS, MARKERS, log_scale, new_figure, open_frame, save
from experiments.exports.engines import bytes_of, engine_of, opened
from experiments.exports.mixes import DENSE, MIXES, RUNS, workspace_of
from experiments.frames import write_frame
from experiments.scripts import existing, file_to_write, in_one_sentence

FOLDER = Path(__file__).parent
_NAMED = "llama.cpp's mixes, importance matrix"


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return log probabilities [L, V]."""
    shifted = logits - logits.max(1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True, dtype=np.float64)), np.float32)


def reference(path: Path, tokens: NDArray[np.int64], scratch: Path) -> NDArray[np.float32]:
    """Return the log probabilities of the dense file after every token but the last of each sequence, a file of [N, L - 1, V]."""
    count, length = tokens.shape
    with opened(path, engine_of(path), length=length) as engine:
        kept: Any = None
        for index, sequence in enumerate(tokens):
            found = log_softmax(engine.logits(sequence.tolist())[:-1])
            if kept is None:
                kept = np.memmap(scratch, np.float32, "w+", shape=(count, *found.shape))
            kept[index] = found
    assert kept is not None
    return np.asarray(kept)


def measured(path: Path, engine: str, tokens: NDArray[np.int64], base: NDArray[np.float32]) -> dict[str, float]:
    """Return what a file is worth on sequences, against the dense model's log probabilities of them."""
    divergence = surprise = agreed = 0.0
    with opened(path, engine, length=tokens.shape[1]) as loaded:
        for sequence, dense in zip(tokens, base, strict=False):
            own = log_softmax(loaded.logits(sequence.tolist())[:-1])
            divergence += float((np.exp(dense) * (dense - own)).sum(dtype=np.float64))
            surprise -= float(own[np.arange(len(own)), sequence[1:]].sum(dtype=np.float64))
            agreed += float((own.argmax(1) == dense.argmax(1)).sum())
    count = len(tokens) * (tokens.shape[1] - 1)
    return {"kl": divergence / count, "perplexity": math.exp(surprise / count), "top1_agreement": agreed / count, "tokens": count}


def speed_of(path: Path, engine: str, threads: int) -> dict[str, float]:
    """Return a file's speed and memory in a process of its own."""
    command = [sys.executable, "-m", "experiments.exports.engines", str(path), engine, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def best_speeds(files: Sequence[tuple[str, Path, str]], *, rounds: int, threads: int) -> Iterator[dict[str, float]]:
    """Yield each file's best speeds and greatest memory of so many rounds over all of them: other work then slows no one alone."""
    found = [[speed_of(path, engine, threads) for _, path, engine in files] for _ in range(rounds)]
    for each in zip(*found, strict=True):
        yield {key: max(one[key] for one in each) for key in each[0]}


def named(asked: Sequence[str]) -> Iterator[tuple[str, Path, str]]:
    """Yield name, path and engine of what is asked for, as NAME=PATH or PATH; NAME@ENGINE=PATH names the engine too.

    Raises: EvoPressError if nothing is at a path, or no model.
    """
    for each in asked:
        name, _, given = each.rpartition("=")
        name, _, engine = name.partition("@")
        path = existing(given)
        yield name or path.stem, path, engine or engine_of(path)


def draw(rows: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw KL divergence against file size in llama.cpp: its own mixes, and what was fitted and chosen here."""
    rows = rows[(rows["engine"] == "llama.cpp") & (rows["kl"] > 0)]
    plain = rows["file"].str.endswith("-plain")
    mixes = rows["file"].str.removesuffix("-plain").isin(MIXES)
    figure = new_figure(7, 4.2)
    axis = figure.add_subplot()
    kinds = (
        ("llama.cpp's mixes, no importance matrix", plain & mixes),
        (_NAMED, ~plain & mixes),
        ("+method=gguf, dynamic programming", rows["file"].str.startswith("ours by dp")),
        ("+method=gguf, guided", rows["file"].str.startswith("ours by guided")),
    )
    for number, (label, which) in enumerate(kinds):
        part = rows[which]
        axis.scatter(part["bytes"] / 1e6, part["kl"], color=COLOURS[number], marker=MARKERS[number], label=label, zorder=3)
        for row in part.to_dict("records") if label == _NAMED else ():
            axis.annotate(row["file"], (row["bytes"] / 1e6, row["kl"]), xytext=(4, 4), textcoords="offset points", fontsize=8)
    log_scale(axis)
    open_frame(axis)
    axis.margins(x=0.1)
    axis.set(xlabel="file, MB", ylabel="held-out KL in llama.cpp, nats per token")
    axis.legend(frameon=False, fontsize=9)
    return save(figure, folder, "kl_by_size")


@in_one_sentence()
def main() -> None:
    """Measure what is asked for and not yet in the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="PATH, NAME=PATH or NAME@ENGINE=PATH")
    parser.add_argument("--dense", type=Path, default=RUNS / f"{DENSE}.gguf", help="the reference")
    parser.add_argument("--sequences", type=int, default=None, help="of held-out text; all that there are by default")
    parser.add_argument("--mlx-sequences", type=int, default=1, help="of these for MLX, whose kernels for a CPU are slow")
    parser.add_argument(
        "--rounds", type=int, default=3, help="in which speed and memory are measured, all files in turn; 0: they are not"
    )
    parser.add_argument("--threads", type=int, default=1, help="of engines whose speed is measured")
    parser.add_argument("--results", type=file_to_write, default=FOLDER / "results.csv")
    parser.add_argument("--further", nargs="*", default=[], help="overrides of the model and the text, as for mixes")
    asked = parser.parse_args()
    done: list[dict[Any, Any]] = pd.read_csv(asked.results).to_dict("records") if asked.results.exists() else []
    if not done and not asked.files:
        raise EvoPressError(f"no file is named, and {asked.results} has none: name what is to be measured")
    known = {(row["file"], row["engine"]) for row in done}
    missing = [each for each in named(asked.files) if (each[0], each[2]) not in known]
    if missing:
        existing(asked.dense)
        workspace = workspace_of(asked.results.parent, asked.further)
        tokens = next(iter(workspace.evaluation_data.values())).numpy()[: asked.sequences]
        scratch = asked.results.with_suffix(".reference.tmp")
        try:
            base = reference(asked.dense, tokens, scratch)
            for name, path, engine in missing:
                begun = time.perf_counter()
                of = tokens[: asked.mlx_sequences] if engine == "MLX" else tokens
                found = measured(path, engine, of, base)
                done.append({"file": name, "engine": engine, "bytes": bytes_of(path), **found})
                write_frame(asked.results, pd.DataFrame(done))
                print(f"{name}, {engine}: KL {found['kl']:.4g}, {time.perf_counter() - begun:.0f} s", flush=True)
        finally:
            scratch.unlink(missing_ok=True)
    files = list(named(asked.files))
    for (name, _, engine), speeds in zip(
        files, best_speeds(files, rounds=asked.rounds, threads=asked.threads), strict=bool(asked.rounds)
    ):
        next(row for row in done if (row["file"], row["engine"]) == (name, engine)).update(speeds)
    table = pd.DataFrame(done)
    write_frame(asked.results, table)
    draw(table, asked.results.parent)
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
