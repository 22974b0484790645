"""What each table compares: an entry per experiment that is swept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

_FITNESS = {"kl": "KL", "perplexity": "PPL"}


@dataclass(frozen=True)
class Spec:
    """What a table compares."""

    title: str
    group: tuple[str, ...] = ()
    """Swept keys that each make a table of their own."""
    variant: Callable[[Mapping[str, str], str], str | None] = lambda axes, row: row
    """What is compared, from a job's axes and the name of a row of its `result.json`; None leaves the row out."""
    reference: str = "evopress"
    """The variant that the others are compared with, on the same text and seed."""
    apart: tuple[str, ...] = ("dense",)
    """Variants that are shown and not compared."""
    twin_of: str = ""
    """The experiment whose jobs these are, run again with further overrides; none: the one that has its name."""
    overrides: tuple[str, ...] = ()
    """What those are."""
    settings: tuple[str, ...] = ()
    """Settings of the search that are shown beside each variant, such as those that were swept."""
    shares: str = ""
    """An experiment that has some of these searches too; the second of them takes their fitnesses from the archive, in no time."""
    without: tuple[str, ...] = ("acceptance rate", "flips")
    """Measures, by how their names begin, that the CSVs have and the table has no column for: the paper does not report them."""


def by_axis(key: str, name: str = "{}") -> Callable[[Mapping[str, str], str], str | None]:
    """Compare the searches of an ablation: found genomes are named by what was swept, and of the other rows the dense one stays."""

    def variant(axes: Mapping[str, str], row: str) -> str | None:
        return name.format(axes[key]) if row == "evopress" else row if row == "dense" else None

    return variant


def by_mutation(axes: Mapping[str, str], row: str) -> str | None:
    """Compare searches by how many level switches an offspring has, as the paper's Table 4 does: the constant 1 is there once."""
    name = f"{axes['search.distribution']}_{axes['search.max_switches']}"
    return None if name == "min_uniform_1" else name if row == "evopress" else row if row == "dense" else None


def by_first_stage(axes: Mapping[str, str], row: str) -> str | None:
    """Compare searches by the tokens of their first stage at the paper's scale: "[512,8192]" becomes "512_tokens"."""
    first = axes["search.paper.tokens"].strip("[]").partition(",")[0]
    return f"{first}_tokens" if row == "evopress" else row if row == "dense" else None


def by_fitness(axes: Mapping[str, str], row: str) -> str | None:
    """Compare searches by what they minimised, and with the uniform genome."""
    name = axes["fitness.name"]
    return f"EvoPress ({_FITNESS.get(name, name)})" if row == "evopress" else without_level(axes, row)


def without_level(axes: Mapping[str, str], row: str) -> str | None:
    """Call the uniform genome so, whatever its level: "uniform_3" becomes "uniform"."""
    return "uniform" if row.startswith("uniform") else row


def by_granularity(axes: Mapping[str, str], row: str) -> str | None:
    """Tell searches over blocks from those over modules; the other rows are the same for both and are read once."""
    if axes["method.granularity"] == "module":
        return row
    return "evopress_blocks" if row == "evopress" else None


def any_spec(title: str, axes: Sequence[str]) -> Spec:
    """Describe the table of any sweep: one for each combination of what was swept, seeds together."""
    return Spec(title, group=tuple(key for key in axes if key != "seed"), without=())


SPECS = {
    "demo": Spec("The demo: 2.5 bits per weight", apart=("dense", "uniform_3")),  # uniform_3 spends more
    "demo_evolution": Spec("The demo with the paper's search: 2.5 bits per weight", apart=("dense", "uniform_3")),
    "demo_paper": Spec("The demo on the paper's levels: 2.5 bits per weight", apart=("dense", "uniform_3")),
    "demo_dp_start": Spec("The demo, started from dynamic programming"),
    "table2_sparsity": Spec("Table 2: 70% unstructured sparsity", group=("sparsity",)),
    "table3": Spec("Table 3: 3 bits per weight", variant=without_level),
    "table4": Spec(
        "Table 4: how many level switches an offspring has",
        variant=by_mutation,
        reference="min_uniform_3",
    ),
    "table5": Spec(
        "Table 5: tokens in the first stage of selection",
        variant=by_first_stage,
        reference="512_tokens",
        settings=("search.num_offspring", "search.tokens"),
        shares="table6",
    ),
    "table6": Spec(
        "Table 6: offspring per generation",
        variant=by_axis("search.num_offspring", "{} offspring"),
        reference="16 offspring",
        settings=("search.tokens",),
        shares="table5",
    ),
    "table7": Spec(
        "Table 7: KL divergence against perplexity as fitness",
        group=("bits",),
        variant=by_fitness,
        reference="EvoPress (KL)",
        shares="table3",
    ),
    "table9_12": Spec(
        "Tables 9 to 12: depth pruning at 12.5, 25, 37.5 and 50%",
        group=("sparsity",),
        variant=by_granularity,
    ),
    "table14_15_sparsity": Spec("Tables 14 and 15: 50% and 60% unstructured sparsity", group=("sparsity",)),
    "table16": Spec("Table 16: 2.25 and 2.5 bits per weight", group=("bits",)),
    "figure3": Spec(
        "Figures 3 and 4: the super-fast search at 70% sparsity",
        variant=by_fitness,
        reference="EvoPress (KL)",
    ),
}

BEST_LEVELS = ("table2_sparsity", "table3", "table7", "table14_15_sparsity", "table16")
"""Experiments that are made of the best levels too, since what levels are worth decides there."""
SPECS |= {
    f"{name}_best": replace(
        SPECS[name], title=f"{SPECS[name].title}, on the best levels", twin_of=name, overrides=("method.recipe=best",)
    )
    for name in BEST_LEVELS
}


def home(name: str) -> Path:
    """Return the folder of an experiment's results; a twin's is `best/` in the one of what it is a twin of."""
    folder = Path(__file__).parent
    return folder / SPECS[name].twin_of / "best" if SPECS[name].twin_of else folder / name
