"""What the dashboards show, as plain data: sections of panels over the metrics, figures and tables that the tracker logs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from evopress.reporting.metrics import AXES


@dataclass(frozen=True)
class Lines:
    """Curves over one of the axes; runs of a group are drawn as their mean and range."""

    title: str
    x: str
    y: tuple[str, ...] = ()
    pattern: str | None = None
    """Regular expression of metrics, where their names depend on the model or the text."""
    log_y: bool = False


@dataclass(frozen=True)
class Bars:
    """The last value of metrics, as bars with the standard error of a group."""

    title: str
    metrics: tuple[str, ...]


@dataclass(frozen=True)
class Images:
    """Figures of each run."""

    title: str
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Rows:
    """A table of each run."""

    title: str
    table: str


Panel = Lines | Bars | Images | Rows


@dataclass(frozen=True)
class Section:
    """Panels about some of a project's runs."""

    title: str
    text: str
    panels: tuple[Panel, ...]
    tag: str | None = None
    """The experiment whose runs are shown; None: all runs."""
    by: tuple[str, ...] = ()
    """Settings whose values are compared, "search.num_offspring"; none: sweeps are compared."""


def _against_all(title: str, *y: str, pattern: str | None = None, log_y: bool = False) -> tuple[Lines, ...]:
    """Draw the same curves against each axis."""
    return tuple(Lines(f"{title} against {axis}", axis, y, pattern, log_y) for axis in AXES)


def _ablation(title: str, text: str, tag: str, *by: str) -> Section:
    panels: tuple[Panel, ...] = (
        Bars("Held-out KL of what was found", ("final/evopress/kl",)),
        Bars("Held-out perplexity of what was found", ("final/evopress/perplexity",)),
        *_against_all("Held-out KL", "held_out/kl"),
        Lines("Acceptance rate", "generation", ("acceptance_rate",)),
    )
    return Section(title, text, panels, tag=tag, by=by)


SECTIONS: tuple[Section, ...] = (
    Section(
        "Convergence",
        "Held-out KL divergence (nats per token) and perplexity of each generation's parent, and its fitness on search tokens.",
        (
            *_against_all("Held-out KL, baselines as lines", pattern=r"(held_out|baseline/[^/]+)/kl"),
            *_against_all("Held-out perplexity, baselines as lines", pattern=r"(held_out|baseline/[^/]+)/ppl_.*", log_y=True),
            *_against_all("Fitness on the search's minibatch", "fitness"),
        ),
    ),
    Section(
        "Results",
        "What was found, beside what it is compared with, on held-out text.",
        (
            Bars("Held-out KL of EvoPress", ("final/evopress/kl",)),
            Bars("Held-out perplexity of EvoPress", ("final/evopress/perplexity",)),
            Rows("All rows", "results"),
        ),
    ),
    Section(
        "Bits and sparsity",
        "Where the budget went: the level of each unit, averages by block and kind, and how they moved during the search.",
        (
            Images("Levels", ("level_heatmap",)),
            Images("Profiles by kind and block, or what was dropped", ("level_profile", "dropped_modules")),
            Lines("Average of each kind of unit", "generation", pattern=r"budget/.*"),
            Rows("Level of each unit", "levels"),
        ),
    ),
    Section(
        "Lineage",
        "How the parent came to be: accepted switches, fitness per stage, acceptance, distance from the initial genome.",
        (
            Images("Accepted switches", ("switches",)),
            Images("Each block's budget since the initial genome", ("lineage",)),
            Images("Fitness per stage and acceptance", ("selection",)),
            Lines("Acceptance rate", "generation", ("acceptance_rate",)),
            Lines("Units that differ from the initial genome", "generation", ("distance",)),
            Lines("Gain over the parent, on the same minibatch", "generation", ("gain",)),
            Lines("Best of each stage", "generation", pattern=r"stage/\d+/best"),
            Rows("Accepted switches", "accepted_switches"),
        ),
    ),
    Section(
        "Cost",
        "Candidate tokens and time.",
        (
            Lines("Tokens per second", "generation", ("tokens_per_second",)),
            Lines("Candidate tokens against seconds", "seconds", ("tokens",)),
            Lines("Seconds of a generation", "generation", ("generation_seconds",)),
        ),
    ),
    _ablation(
        "Table 4: level switches per offspring",
        "min_uniform: min(U₁, U₂) switches, each U drawn from 1 up to the number; constant: always the number.",
        "table4",
        "search.distribution",
        "search.max_switches",
    ),
    _ablation(
        "Table 5: tokens in the first stage",
        "The tokens of each stage of selection; the first number is what the table varies.",
        "table5",
        "search.tokens",
    ),
    _ablation(
        "Table 6: offspring per generation",
        "The number of offspring, λ.",
        "table6",
        "search.num_offspring",
    ),
)


def names(section: Section) -> Iterator[tuple[str, str]]:
    """Yield everything that a section's panels need a run to log: its kind (metric, pattern, figure or table) and its name."""
    for panel in section.panels:
        if isinstance(panel, Lines):
            yield "metric", panel.x
            yield from (("metric", metric) for metric in panel.y)
            if panel.pattern is not None:
                yield "pattern", panel.pattern
        elif isinstance(panel, Bars):
            yield from (("metric", metric) for metric in panel.metrics)
        elif isinstance(panel, Images):
            yield from (("figure", key) for key in panel.keys)
        else:
            yield "table", panel.table
