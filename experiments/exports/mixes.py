"""llama.cpp's own mixes of a model: what a user would take instead, at what size.

    python -m experiments.exports.mixes                                  # SmolLM2: files and sizes.csv in multirun/exports/
    python -m experiments.exports.mixes --mixes Q2_K Q4_K_M -- model=local model.path=/models/mine

Writes the model dense (dense.gguf), then lets `llama_model_quantize` make every mix of it, with an importance matrix of the
calibration text (mean squares of what a weight's columns meet in the dense model, as llama.cpp's own tool collects them;
the diagonals of the Hessians) and, as
NAME-plain, without. What follows `--` is of the model and the text.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from evopress.export.exporter import write_export
from evopress.export.gguf import FILE, GGUF
from evopress.export.gguf_model import architecture
from evopress.stages.exports import what_is_exported
from evopress.workspace import Workspace
from experiments.composed import settings_of
from experiments.exports.llama_cpp import quantize
from experiments.frames import write_frame
from experiments.scripts import in_one_sentence

RUNS = Path("multirun/exports")
MIXES = ("Q2_K", "Q3_K_M", "Q4_0", "Q4_K_M")
SIZES = "sizes.csv"
DENSE = "dense"


def workspace_of(folder: Path, overrides: Sequence[str]) -> Workspace:
    """Return the workspace of a run that keeps every module: its levels are the model as it is."""
    return Workspace(settings_of(["+method=drop", "sparsity=0.5", "tracker=none", *overrides]), folder)


def dense_file(workspace: Workspace, path: Path) -> None:
    """Write the model as it is."""
    what = what_is_exported(workspace, (0,) * len(workspace.database.space.units), files=(), told={})
    (write_export(GGUF(), path.with_suffix(""), what) / FILE).rename(path)


def importance_of(workspace: Workspace) -> dict[str, NDArray[np.float32]]:
    """Return the mean square of each input of every linear on the calibration text, by the weight's name in a GGUF file."""
    config, hessians = workspace.model_source.config, workspace.databases.complete_hessians()
    names = gguf.get_tensor_name_map(architecture(config), config["num_hidden_layers"])
    found = {}
    for index in range(len(workspace.blocks.blocks)):
        block = hessians.read(index)
        for unit, owner in block.owners.items():
            squares = block.hessians[owner].diagonal() / (2 * workspace.calibration_tokens.shape[1])
            found[names.get_name(f"{unit}.weight", (".weight",))] = squares.numpy()
    return found


def row_of(name: str, path: Path) -> dict[str, object]:
    """Return a file's size, that of its header, and the types of its matrices with how many there are."""
    reader = gguf.GGUFReader(path)
    kinds = Counter(tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1)
    embedding = next(tensor.tensor_type.name for tensor in reader.tensors if tensor.name == "token_embd.weight")
    held = " ".join(f"{kind}:{count}" for kind, count in sorted(kinds.items()))
    return {
        "file": name,
        "bytes": path.stat().st_size,
        "header_bytes": int(reader.data_offset),
        "embedding": embedding,
        "matrices": held,
    }


@in_one_sentence()
def main() -> None:
    """Make what is missing, and write the sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=RUNS)
    parser.add_argument("--mixes", nargs="+", default=list(MIXES), help="by llama.cpp's names")
    parser.add_argument("further", nargs="*", help="overrides of the model and the text, after --")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    workspace = workspace_of(asked.folder, asked.further)
    dense = asked.folder / f"{DENSE}.gguf"
    if not dense.exists():
        dense_file(workspace, dense)
    importance: dict[str, NDArray[np.float32]] | None = None
    for mix in asked.mixes:
        for name in (mix, f"{mix}-plain"):
            path = asked.folder / f"{name}.gguf"
            if path.exists():
                continue
            if name == mix and importance is None:
                importance = importance_of(workspace)
            scratch = path.with_suffix(".tmp")
            quantize(dense, scratch, mix, importance if name == mix else None)
            scratch.rename(path)
    rows = [row_of(path.stem, path) for path in sorted(asked.folder.glob("*.gguf"), key=lambda path: path.stat().st_size)]
    write_frame(asked.folder / SIZES, pd.DataFrame(rows), digits=None)
    print(pd.DataFrame(rows).to_string(index=False))


if __name__ == "__main__":
    main()
