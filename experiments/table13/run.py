"""Set the order in which the scores remove blocks beside the paper's.

Source: paper, appendix D.3 and Table 13.

    python -m evopress +method=drop sparsity=0.5 'stages=[database,baselines]' hydra.run.dir=multirun/table13
    python -m experiments.table13.run [--run multirun/table13]

reads `baselines.json` of a run of method drop, whatever its sparsity, and writes results.csv and table.md.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evopress.errors import EvoPressError
from evopress.reporting.records import read_json
from evopress.reporting.tables import display_name
from experiments.depth import publish, run
from experiments.tables import markdown

TITLE = "Table 13: removal orders"
REFERENCE = "shortgpt"
PAPER_BLOCKS = 32
"""Of each of the paper's four models."""
COMMAND = "python -m evopress +method=drop sparsity=0.5 'stages=[database,baselines]' hydra.run.dir="


@dataclass(frozen=True)
class Order:
    """The blocks of a model in the order in which a score removes them."""

    model: str
    num_blocks: int
    method: str
    blocks: tuple[int, ...]

    def depth(self, count: int) -> float:
        """Return how deep the first `count` blocks lie on average: 0 is the first block of the model, 1 the last."""
        return statistics.fmean(self.blocks[:count]) / (self.num_blocks - 1)


def read_run(folder: Path) -> list[Order]:
    """Return the orders that a run found.

    Raises: EvoPressError if it found none.
    """
    path = folder / "baselines.json"
    if not path.is_file():
        raise EvoPressError(f"{folder} has no baselines.json: run {COMMAND}{folder} first, or name another run by --run")
    orders = read_json(path).get("orders") or {}
    if not orders:
        raise EvoPressError(f"{path} has no removal orders: name a run of method drop whose baselines rank blocks")
    # An order lists all blocks but those that are excluded; pairs go by their first block.
    num_blocks = 1 + max(block for blocks in orders.values() for block in blocks)
    return [Order(_model(folder), num_blocks, name, tuple(blocks)) for name, blocks in orders.items()]


def _model(folder: Path) -> str:
    """Return the name of a run's model; "this run" where the run does not say."""
    from omegaconf import OmegaConf

    path = folder / ".hydra" / "config.yaml"
    config = OmegaConf.load(path) if path.is_file() else OmegaConf.create()
    return str(OmegaConf.select(config, "model.name") or OmegaConf.select(config, "model.path") or "this run")


def read_paper(path: Path) -> list[Order]:
    """Return the paper's orders, of 16 blocks each."""
    with path.open(encoding="utf-8", newline="") as file:
        return [
            Order(row["model"], PAPER_BLOCKS, row["method"], tuple(map(int, row["order"].split()))) for row in csv.DictReader(file)
        ]


def shared(one: Order, other: Order, count: int) -> int:
    """Count the blocks that are among the first `count` of both orders."""
    return len(set(one.blocks[:count]) & set(other.blocks[:count]))


def render(orders: Sequence[Order], *, count: int) -> str:
    """Return the text of table.md."""
    half = max(count // 2, 1)
    of: Mapping[tuple[str, str], Order] = {(order.model, order.method): order for order in orders}
    headers = ["model", "method", f"first {count}, left to right"]
    headers += [f"depth of the first {half}", f"shared with ShortGPT's first {half}"]
    body = []
    for order in orders:
        reference = of.get((order.model, REFERENCE))
        body.append(
            [
                order.model,
                display_name(order.method),
                ", ".join(f"{block:02d}" for block in order.blocks[:count]),
                f"{order.depth(half):.2f}",
                "" if reference is None or reference is order else f"{shared(order, reference, half)} of {half}",
            ]
        )
    return f"Depth is the mean position of blocks: 0 is the model's first block, 1 its last.\n\n{markdown(headers, body)}"


def main(argv: Sequence[str] | None = None) -> None:
    """Read the run and write the table."""
    parser = argparse.ArgumentParser(description="Set the order in which scores remove blocks beside the paper's.")
    parser.add_argument("--run", type=Path, default=Path("multirun/table13"), help="run folder (default %(default)s)")
    parser.add_argument("--count", type=int, default=16, help="blocks of each order that are shown (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="default: the experiment's folder")
    arguments = parser.parse_args(argv)
    if arguments.count < 1:
        raise EvoPressError(f"--count {arguments.count} is out of range: expected at least 1")
    orders = [*read_run(arguments.run), *read_paper(Path(__file__).parent / "paper.csv")]
    rows = [
        {"model": order.model, "method": order.method, "order": " ".join(map(str, order.blocks)), "num_blocks": order.num_blocks}
        for order in orders
    ]
    publish(arguments.out, TITLE, render(orders, count=arguments.count), rows)


if __name__ == "__main__":
    run(main)
