"""Measure what each idea of `recipe=best` does for the error of a layer: relative output errors on Hessians of real layers.

    python -m experiments.levels.errors VECTORS.safetensors      # `<layer>.H`, `<layer>.W`; half a minute on one core

Each row adds one idea to the row before it; the last two rows are grids with their zeros in the middle.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor

from evopress.compress.descent import descend
from evopress.compress.gptq import sweep, whole_range
from evopress.compress.grid import Grid
from evopress.compress.hessian import inverse_factor
from evopress.compress.order import group_order
from evopress.compress.ranges import fit_range
from experiments.frames import write_frame
from experiments.scripts import file_to_read, in_one_sentence

BITS = (6, 4, 3, 2)
GROUP_SIZE = 64
IDEAS: dict[str, dict[str, bool]] = {
    "paper": {},
    "range by the error in the output": {"fitted": True},
    "groups and columns by falling energy": {"fitted": True, "ordered": True},
    "descent over codes and scales (best)": {"fitted": True, "ordered": True, "descent": True},
    "paper, symmetric": {"symmetric": True},
    "best, symmetric": {"fitted": True, "ordered": True, "descent": True, "symmetric": True},
}


def error_of(
    W: Tensor, H: Tensor, bits: int, *, fitted: bool = False, ordered: bool = False, descent: bool = False, symmetric: bool = False
) -> float:
    """Return tr(E H Eᵀ) / tr(W H Wᵀ) of a weight float32 [R, C] at a bit width."""
    order = group_order(H.diagonal(), GROUP_SIZE) if ordered else torch.arange(len(H))
    Wt, H = W.T[order].contiguous(), H[order][:, order].contiguous()
    U, _ = inverse_factor(H, damping=0.01)
    maxq = torch.full((len(W),), 2.0**bits - 1.0)
    weights = U.diagonal() ** -2.0

    def fit(group: Tensor, first: int) -> Grid:
        return fit_range(group, weights[first : first + len(group)], maxq, symmetric=symmetric)

    codes, scales, zeros = sweep(Wt.clone(), U, maxq, GROUP_SIZE, fit if fitted else whole_range(maxq, symmetric=symmetric))
    codes = codes.float()
    if descent:
        descend(Wt, H, codes, scales, zeros, maxq)
    E = (Wt - (codes - zeros.repeat_interleave(GROUP_SIZE, 0)) * scales.repeat_interleave(GROUP_SIZE, 0)).double()
    return float(((H.double() @ E) * E).sum() / ((H.double() @ Wt.double()) * Wt).sum())


@in_one_sentence()
def main() -> None:
    """Write `errors.csv`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("vectors", type=file_to_read)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    tensors = load_file(arguments.vectors)
    layers = sorted({name.rsplit(".", 1)[0] for name in tensors})
    records = []
    for idea, flags in IDEAS.items():
        started = time.perf_counter()
        errors = {
            f"{layer.removeprefix('model.layers.')} {bits} bits": error_of(
                tensors[f"{layer}.W"], tensors[f"{layer}.H"], bits, **flags
            )
            for layer in layers
            for bits in BITS
        }
        records.append({"idea": idea, **errors, "seconds": time.perf_counter() - started})
    frame = pd.DataFrame(records)
    write_frame(arguments.out / "errors.csv", frame, digits="%.4g")
    print(frame.to_string(index=False))


if __name__ == "__main__":
    main()
