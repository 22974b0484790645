"""Count the launches that the sweeps of a Llama-3-8B block take on a GPU, in torch alone and with Triton's kernels. Needs no GPU.

    python -m experiments.benchmark.launches

Operations that compute are counted on stacks of the block's columns, units and levels with a row each: rows do not change how many
there are. An operation counts as one launch, a sort too, which is several. Prints a table of Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from evopress.compress import columns, gptq, sparsegpt
from evopress.compress.gptq import GPTQ
from evopress.compress.sparse import SparsityLevels, derive_step
from experiments.scripts import in_one_sentence

ROOM = 4 * 2**30
"""Bytes of a sweep."""
BLOCK = {
    4096: ({"q": 4096, "k": 1024, "v": 1024}, {"o": 4096}, {"gate": 14336, "up": 14336}),
    14336: ({"down": 4096},),
}
"""Columns to the rows of the units on each input."""


class Launches(TorchDispatchMode):
    """Counts operations that compute or copy, and those for whose result the host waits."""

    def __init__(self) -> None:
        """Begin at nothing."""
        super().__init__()
        self.count = self.waits = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.waits += function is torch.ops.aten._local_scalar_dense.default
        self.count += not (function.is_view or "empty" in function.name() or function.name().startswith("aten::lift"))
        return function(*args, **(kwargs or {}))


@contextmanager
def counting(*, kernels: bool) -> Iterator[Launches]:
    """Count as on a GPU: each kernel is a launch, or there are none."""
    launches = Launches()

    def launch(*args: Any) -> None:
        launches.count += 1

    def marks(scores: Tensor, *args: Any) -> Tensor:
        launch()
        return torch.empty(scores.shape, dtype=torch.bool)

    there = SimpleNamespace(round_run=launch, prune_run=launch, lowest_of_each=marks) if kernels else None
    with mock.patch.object(columns, "_kernels", return_value=there), mock.patch.object(torch.Tensor, "is_cuda", True), launches:
        yield launches


def pruning(units: dict[str, int], width: int) -> Iterator[int]:
    """Prune the units on an input to all their levels; yield the columns of each sweep, of which there are several."""
    sizes = [rows * columns for columns, inputs in BLOCK.items() for each in inputs for rows in each.values()]
    levels = SparsityLevels(sparsity=0.5, step=derive_step(sizes, 0.5, 8))
    jobs = [(name, count) for name, rows in units.items() for count in levels.kept(rows * width)]
    for part in sparsegpt._slices(jobs, units, sparsegpt.rows_within(ROOM, width)):
        kept = [count // units[name] for name, count in part]
        sparsegpt.sweep(torch.ones(width, len(part)).uniform_(), torch.eye(width), [1] * len(part), kept)
        yield width


def rounding(units: dict[str, int], width: int) -> Iterator[int]:
    """Quantize the units on an input to all their levels; yield as `pruning`."""
    method = GPTQ()
    weights = {name: torch.empty(rows, width, device="meta") for name, rows in units.items()}
    for part in method._slices(weights, method.bits, width, ROOM):
        maxq = torch.full((len(part),), 7.0)
        gptq.sweep(torch.ones(width, len(part)).uniform_(), torch.eye(width), maxq, 128, gptq.whole_range(maxq))
        yield width


@in_one_sentence()
def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("| levels | sweeps | columns | launches, torch | a column | waits | launches, kernels | a column | waits |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for name, sweep in {"2 to 6 bits, `recipe=paper`": rounding, "up to 17 sparsities, `recipe=paper`": pruning}.items():
        row = ""
        for kernels in (False, True):
            with counting(kernels=kernels) as launches:
                swept = [each for width, inputs in BLOCK.items() for units in inputs for each in sweep(units, width)]
            row += f"| {launches.count:,} | {launches.count / sum(swept):.2f} | {launches.waits:,} "
        print(f"| {name} | {len(swept)} | {sum(swept):,} {row}|", flush=True)


if __name__ == "__main__":
    main()
