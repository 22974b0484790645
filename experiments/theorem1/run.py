"""Measure Theorem 1: generations to the optimum of a linear fitness against k(n - k) / lambda.

Source: paper, section 3, Theorem 1. Bit i is unit i: 1 is level 0 (kept, cost 1), 0 is level 1 (dropped, cost 0); the budget of
n - k keeps the number of zeros at k. The search is the project's own, with one switch per offspring and the exact fitness.

    python -m experiments.theorem1.run
"""

from __future__ import annotations

import argparse
import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from evopress.files import write_bytes
from evopress.reporting.drawing import save
from evopress.search.evolution import Evolution, SearchSettings
from evopress.units import Budget, Genome, Level, Space, Unit
from experiments.scripts import check_positive, in_one_sentence

NUM_BITS = (20, 40, 60, 80)
ZERO_SHARES = (8, 4, 2)
"""k = n / share."""
NUM_OFFSPRING = (1, 2, 4, 8)
NUM_SEEDS = 96


@dataclass(frozen=True)
class Cell:
    """Mean over seeds at one n, k and lambda."""

    n: int
    k: int
    num_offspring: int
    seeds: int
    bound: float
    """k(n - k) / lambda."""
    generations: float
    standard_error: float
    ratio: float
    """generations / bound: what the theorem says is bounded."""


def generations_to_optimum(n: int, k: int, num_offspring: int, rng: np.random.Generator) -> int:
    """Run one search on a random linear fitness from a random start and count generations until the parent is the optimum.

    Raises: RuntimeError after 100 k(n - k) generations, far above what Theorem 1 allows.
    """
    levels = (Level("keep", 1, "1", 1), Level("drop", 0, "0", 0))
    space = Space("toy", tuple(Unit(f"bit_{i}", i, "bit", 1, levels) for i in range(n)))
    weights = rng.random(n)
    settings = SearchSettings(
        generations=100 * k * (n - k),
        num_offspring=num_offspring,
        survivors=[1],
        tokens=[1],
        initial_candidates=1,
        initial_tokens=1,
        max_switches=1,
        distribution="constant",
        exchange="size",
    )
    rng_initial, rng_mutation = rng.spawn(2)
    budget = Budget(n - k, n - k, "ones")
    evolution = Evolution(space, budget, settings, rng_initial=rng_initial, rng_mutation=rng_mutation)
    dropped = set(np.argsort(weights)[:k].tolist())  # the least sum of dropped weights
    optimum = tuple(int(i in dropped) for i in range(n))
    while not evolution.finished:
        genomes = evolution.ask().genomes
        evolution.tell(_dropped_weight(weights, genomes))
        if evolution.parent == optimum:
            return evolution.generation - 1  # generation 0 only drew the start
    raise RuntimeError(f"no optimum within {settings.generations} generations at n={n}, k={k}, lambda={num_offspring}")


def measure(n: int, k: int, num_offspring: int, *, num_seeds: int, seed: int = 0) -> Cell:
    """Average `generations_to_optimum` over seeds."""
    runs = [
        generations_to_optimum(n, k, num_offspring, np.random.default_rng([seed, n, k, num_offspring, i])) for i in range(num_seeds)
    ]
    bound, mean = k * (n - k) / num_offspring, float(np.mean(runs))
    error = float(np.std(runs, ddof=1)) / math.sqrt(num_seeds) if num_seeds > 1 else math.nan
    return Cell(n, k, num_offspring, num_seeds, bound, mean, error, mean / bound)


def exact_ratio(n: int, k: int) -> float:
    """Compute what generations / k(n - k) is expected to be at lambda = 1, from a uniformly random start.

    With j ones among the k places that should be zero, j^2 of the k(n - k) switches bring j down and no other accepted switch
    changes it (paper, proof of Theorem 2), so the expectation is the sum of 1 / i^2 over i = 1..j, j hypergeometric at the start.
    """
    sums = np.cumsum([0.0, *(1 / i**2 for i in range(1, k + 1))])
    return float(sum(math.comb(k, k - j) * math.comb(n - k, j) * sums[j] for j in range(min(k, n - k) + 1)) / math.comb(n, k))


def fit_slope(cells: Sequence[Cell]) -> float:
    """Fit the exponent a of generations ~ bound^a by least squares in log-log."""
    return float(np.polyfit(np.log([c.bound for c in cells]), np.log([c.generations for c in cells]), 1)[0])


def _dropped_weight(weights: np.ndarray, genomes: Sequence[Genome]) -> list[float]:
    return (np.array(genomes) @ weights).tolist()


def _write_csv(cells: Sequence[Cell], path: Path) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Cell)])
    writer.writeheader()
    for cell in cells:
        writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in asdict(cell).items()})
    write_bytes(path, text.getvalue().encode())


def _write_table(cells: Sequence[Cell], path: Path) -> None:
    """Write the ratios: a row per n and k, a column per lambda beside the exact value for 1, then what they come to."""
    lambdas = sorted({cell.num_offspring for cell in cells})
    ratios = {(cell.n, cell.k, cell.num_offspring): cell.ratio for cell in cells}
    lines = [
        "Mean generations to the optimum, divided by k(n − k)/λ.",
        "",
        "| n | k | k(n − k) | exact, λ = 1 | " + " | ".join(f"λ = {x}" for x in lambdas) + " |",
        "|---:" * (4 + len(lambdas)) + "|",
    ]
    for n, k in sorted({(cell.n, cell.k) for cell in cells}):
        measured = " | ".join(f"{ratios[n, k, x]:.2f}" for x in lambdas)
        lines.append(f"| {n} | {k} | {k * (n - k)} | {exact_ratio(n, k):.2f} | {measured} |")
    lines += [
        "",
        f"Ratio over all {len(cells)} cells: least {min(ratios.values()):.2f}, greatest {max(ratios.values()):.2f}. "
        f"Exponent fitted in log-log: {fit_slope(cells):.3f}; "
        + ", ".join(f"{fit_slope([c for c in cells if c.num_offspring == x]):.3f} at λ = {x}" for x in lambdas)
        + ".",
    ]
    write_bytes(path, ("\n".join(lines) + "\n").encode())


def _plot(cells: Sequence[Cell], folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    markers = dict(zip(sorted({cell.n for cell in cells}), "osD^vP*", strict=False))
    lambdas = sorted({cell.num_offspring for cell in cells})
    colours = {x: plt.get_cmap("viridis")(i / max(1, len(lambdas) - 1) * 0.85) for i, x in enumerate(lambdas)}
    for cell in cells:
        style = {"marker": markers[cell.n], "color": colours[cell.num_offspring], "linestyle": "none", "markersize": 5}
        left.errorbar(cell.bound, cell.generations, yerr=cell.standard_error, elinewidth=0.8, **style)
        right.errorbar(cell.bound, cell.ratio, yerr=cell.standard_error / cell.bound, elinewidth=0.8, **style)
    ends = np.array([min(cell.bound for cell in cells) * 0.8, max(cell.bound for cell in cells) * 1.25])
    ratios = [cell.ratio for cell in cells]
    mean = float(np.exp(np.mean(np.log(ratios))))
    left.plot(ends, mean * ends, color="0.5", linewidth=1, zorder=0, label=f"{mean:.2f} · k(n − k)/λ")
    right.axhline(mean, color="0.5", linewidth=1, zorder=0)
    left.set(xscale="log", yscale="log", ylabel="generations to the optimum (mean ± s.e.)")
    left.set_title(f"fitted exponent {fit_slope(cells):.2f}")
    right.set(xscale="log", ylabel="generations / (k(n − k)/λ)", ylim=(0, None))
    right.set_title(f"ratio {min(ratios):.2f} to {max(ratios):.2f}")
    for axes in (left, right):
        axes.set_xlabel("k(n − k)/λ")
        axes.grid(alpha=0.25, which="both", linewidth=0.5)
    for x in lambdas:
        right.plot([], [], color=colours[x], marker="o", linestyle="none", label=f"λ = {x}")
    for n, marker in markers.items():
        right.plot([], [], color="0.3", marker=marker, linestyle="none", label=f"n = {n}")
    left.legend(frameon=False)
    right.legend(frameon=False, ncols=2)
    save(figure, folder, "plot")
    plt.close(figure)


@in_one_sentence()
def main() -> None:
    """Measure the grid and write results.csv, table.md, plot.png and plot.svg."""
    parser = argparse.ArgumentParser(description="Measure Theorem 1 of the EvoPress paper.")
    parser.add_argument("--seeds", type=int, default=NUM_SEEDS, help="runs per cell (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the results")
    arguments = parser.parse_args()
    check_positive(arguments, "seeds")
    arguments.out.mkdir(parents=True, exist_ok=True)
    cells = []
    for n in NUM_BITS:
        for share in ZERO_SHARES:
            for num_offspring in NUM_OFFSPRING:
                cells.append(measure(n, n // share, num_offspring, num_seeds=arguments.seeds))
                print("n={0.n} k={0.k} lambda={0.num_offspring}: {0.generations:.1f}, ratio {0.ratio:.2f}".format(cells[-1]))
    _write_csv(cells, arguments.out / "results.csv")
    _write_table(cells, arguments.out / "table.md")
    _plot(cells, arguments.out)


if __name__ == "__main__":
    main()
