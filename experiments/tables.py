"""Make the table of a sweep: mean and spread over seeds, paired differences, and the paper's own numbers beside.

    python -m evopress +experiment=table4
    python -m experiments.tables table4 [--root multirun]

reads <root>/table4 and writes experiments/table4/: results.csv, runs.csv, table.md, and the table into README.md. The folder of any
other sweep can be named too, `python -m experiments.tables multirun/DAY/TIME`: the tables are then written into that folder.
A sweep that is still going on gives the table of what there is. A further table is a YAML in conf/experiment, a folder here with a
README.md and the paper's numbers in paper.csv, and a line in `specs.py`.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evopress.errors import EvoPressError
from evopress.files import make_folder, write_bytes
from evopress.reporting.differences import Difference
from evopress.reporting.jobs import as_markdown as jobs_as_markdown
from evopress.reporting.jobs import read_jobs
from evopress.reporting.tables import LARGER, Column, display_name, number, results_columns, told
from experiments.commands import of_sweep
from experiments.specs import SPECS, Spec, any_spec, home
from experiments.sweeps import Job, Sweep, any_sweep, describe, expected_jobs, read_sweep, setting

SEED = "seed"
BEGIN, END = "<!-- results -->", "<!-- end of results -->"

Group = tuple[str, ...]
Values = dict[Group, dict[str, dict[str, dict[str, float]]]]
"""Group, variant and measure to the value at each seed."""
_COSTS = (
    *((f"search {key}", "search", key) for key in ("tokens", "seconds", "generations")),
    ("database seconds", "database", "seconds"),
)
"""What a run took, which the CSVs have and the table has no column for: name, and where `result.json` has it."""


class Table:
    """The numbers of a sweep, by group, variant, measure and seed."""

    def __init__(self, jobs: Sequence[Job], spec: Spec) -> None:
        """Sort the rows of all jobs."""
        self.spec = spec
        self.values: Values = {}
        self.columns: dict[str, Column] = {}
        self.settings: dict[tuple[Group, str], list[str]] = {}
        """What `spec.settings` are for the search of a group's variant."""
        self.larger: set[tuple[Group, str]] = set()
        """Variants that spend more than a job's budget."""
        self._sequences: dict[tuple[Group, str, str], Sequence[float]] = {}
        """What a measure of a group's variant is the mean of, in the first job that has it."""
        for job in jobs:
            rows = job.result["rows"]
            group = tuple(job.axes[key] for key in spec.group)
            found = spec.variant(job.axes, "evopress")
            if found is not None:
                self.settings.setdefault((group, found), [str(setting(job, key)) for key in spec.settings])
            for column in results_columns(rows):
                self.columns.setdefault(column.header, column)
                for place, (row, value) in enumerate(zip(rows, column.values, strict=True)):
                    variant = spec.variant(job.axes, str(row["name"]))
                    if variant is not None and value is not None:
                        self._keep(job, variant, column.header, value)
                        if kept := column.sequences[place] if column.sequences else None:
                            self._sequences.setdefault((group, variant, column.header), kept)
                        if row.get("within_budget") is False:
                            self.larger.add((group, variant))
            for name, of, key in _COSTS:
                took = job.result.get(of) or {}
                value = None if took.get("reused") else number(took.get(key))
                if found in self.values.get(group, {}) and found is not None and value is not None:
                    self.columns.setdefault(name, Column(name, (), "{:,.0f}".format))
                    self._keep(job, found, name, value)

    def _keep(self, job: Job, variant: str, measure: str, value: float) -> None:
        """Remember a number of a job, unless an earlier one of its seed has it."""
        group = tuple(job.axes[key] for key in self.spec.group)
        self.values.setdefault(group, {}).setdefault(variant, {}).setdefault(measure, {}).setdefault(job.axes.get(SEED, "0"), value)

    @property
    def groups(self) -> list[Group]:
        return sorted(self.values, key=lambda group: [number_of(part) for part in group])

    @property
    def shown(self) -> list[str]:
        """Names of the measures that the table has columns for."""
        costs = [name for name, _, _ in _COSTS]
        return [header for header in self.columns if not header.startswith(self.spec.without) and header not in costs]

    @property
    def qualities(self) -> list[str]:
        """Names of those that are good or bad; the others say what was spent."""
        return [header for header in self.shown if self.columns[header].best is not None]

    def variants(self, group: Group) -> list[str]:
        """Return a group's variants, those apart first, the others in the order of the jobs and of their rows."""
        return sorted(self.values[group], key=lambda name: not self.is_apart(group, name))

    def is_apart(self, group: Group, variant: str) -> bool:
        """Tell whether a variant is shown and not compared: the table says so, or it spends more than the budget."""
        return variant in self.spec.apart or (group, variant) in self.larger

    def difference(self, group: Group, variant: str, other: str, measure: str) -> Difference:
        """Compare two variants seed by seed; those that no seed changes sequence by sequence, where these were kept.

        Returns: the mean difference of seeds; its standard error is as many times smaller as that of sequences is.
        """
        of = self.values[group]
        by_seed = Difference.of(of.get(variant, {}).get(measure, {}), of.get(other, {}).get(measure, {}))
        if by_seed.decided or by_seed.num_pairs < 2:
            return by_seed
        ours, theirs = (self._sequences.get((group, name, measure), ()) for name in (variant, other))
        by_sequence = Difference.of_sequences(ours, theirs)
        if not by_sequence.decided or not by_sequence.mean:
            return by_seed
        share = by_sequence.standard_error / abs(by_sequence.mean)
        return Difference(by_seed.mean, abs(by_seed.mean) * share, by_sequence.num_pairs)

    def summary(self) -> list[dict[str, Any]]:
        """Return one row per group, variant and measure, for `results.csv`."""
        rows = []
        for group in self.groups:
            for variant in self.variants(group):
                for measure, seeds in self.values[group][variant].items():
                    column, numbers = self.columns[measure], list(seeds.values())
                    row: dict[str, Any] = dict(zip(self.spec.group, group, strict=True))
                    row |= {"method": variant, "measure": measure, "seeds": len(numbers), "mean": statistics.fmean(numbers)}
                    row |= {"std": statistics.stdev(numbers) if len(numbers) > 1 else math.nan}
                    row |= {"min": min(numbers), "max": max(numbers)}
                    if column.best is not None and self._compared(group, variant):
                        difference = self.difference(group, variant, self.spec.reference, measure)
                        row |= {"difference": difference.mean, "standard_error": difference.standard_error}
                        row |= {"verdict": difference.verdict(column.best)}
                    rows.append(row)
        return rows

    def runs(self) -> list[dict[str, Any]]:
        """Return one row per group, variant, measure and seed, for `runs.csv`."""
        return [
            {**dict(zip(self.spec.group, group, strict=True)), "method": variant, SEED: seed, "measure": measure, "value": value}
            for group in self.groups
            for variant in self.variants(group)
            for measure, seeds in self.values[group][variant].items()
            for seed, value in seeds.items()
        ]

    def order(self, group: Group, measure: str) -> str:
        """Write the compared variants from best to worst: "EvoPress < OWL ≈ uniform", ≈ for a tie, ? where nothing can be said."""
        best = self.columns[measure].best
        means = {
            variant: statistics.fmean(self.values[group][variant][measure].values())
            for variant in self.variants(group)
            if not self.is_apart(group, variant) and self.values[group][variant].get(measure)
        }
        return in_order(means, lambda one, other: self.difference(group, one, other, measure), best)

    @property
    def has_constants(self) -> bool:
        """Tell whether several compared variants of a group are the same on all seeds, so that seeds say nothing of them."""
        first = self.qualities[0] if self.qualities else ""
        for group in self.groups:
            seeds = [self.values[group][name].get(first, {}) for name in self.variants(group) if not self.is_apart(group, name)]
            if sum(len(of) > 1 and len(set(of.values())) == 1 for of in seeds) > 1:
                return True
        return False

    def _compared(self, group: Group, variant: str) -> bool:
        return variant != self.spec.reference and not self.is_apart(group, variant)

    def markdown(self, group: Group) -> str:
        """Lay out one group: means, spread, and the difference to the reference in the first quality."""
        first = self.qualities[0]
        reference = display_name(self.spec.reference)
        headers = ["method", *self.spec.settings, *self.shown, f"{first}: difference to {reference}", "seeds"]
        body = []
        for variant in self.variants(group):
            of = self.values[group][variant]
            settings = self.settings.get((group, variant), [""] * len(self.spec.settings))
            name = display_name(variant) + (LARGER if (group, variant) in self.larger else "")
            cells = [name, *settings, *(self._cell(of.get(measure, {}), measure) for measure in self.shown)]
            difference = self.difference(group, variant, self.spec.reference, first)
            shown = told(difference, self.columns[first].best) if self._compared(group, variant) else ""
            body.append([*cells, shown, str(max(map(len, of.values())))])
        return markdown(headers, body)

    def _cell(self, seeds: Mapping[str, float], measure: str) -> str:
        """Show a mean, and its range over seeds where there is one."""
        if not seeds:
            return ""
        show, numbers = self.columns[measure].show, list(seeds.values())
        mean, least, most = show(statistics.fmean(numbers)), show(min(numbers)), show(max(numbers))
        return mean if least == most else f"{mean} ({least}..{most})"


def in_order(
    means: Mapping[str, float],
    difference: Callable[[str, str], Difference],
    best: Callable[[Iterable[float]], float] | None,
) -> str:
    """Write variants from best to worst by their means: "EvoPress < OWL ≈ uniform", ≈ for a tie, ? where nothing can be said.

    Args: difference: of one variant against another.
    """
    names = sorted(means, key=means.__getitem__, reverse=best is max)
    text = display_name(names[0]) if names else ""
    for one, next_one in itertools.pairwise(names):
        sign = {"tie": "≈", "worse": ">" if best is max else "<"}.get(difference(next_one, one).verdict(best), "?")
        text += f" {sign} {display_name(next_one)}"
    return text


def beside_paper(table: Table, group: Group, paper: Sequence[Mapping[str, str]]) -> str:
    """Set our perplexities beside the paper's, each also as a ratio to the reference's; then the orders."""
    spec = table.spec
    mine = [
        row for row in paper if all(number_of(row[key]) == number_of(value) for key, value in zip(spec.group, group, strict=True))
    ]
    if not mine:
        return ""
    known = [key for key in mine[0] if key not in (*spec.group, "model", "method")]
    theirs = {
        (model, data): {row["method"]: float(row[data]) for row in mine if row["model"] == model and row[data]}
        for model in dict.fromkeys(row["model"] for row in mine)
        for data in known
    }
    ours = {
        measure: {variant: statistics.fmean(of[measure].values()) for variant, of in table.values[group].items() if of.get(measure)}
        for measure in table.qualities
        if measure.startswith("ppl ")
    }
    headers = ["method", *(f"ours: {measure}" for measure in ours), *(f"{model} {data}" for model, data in theirs)]
    body = [
        [display_name(variant), *(_with_ratio(numbers, variant, spec.reference) for numbers in (*ours.values(), *theirs.values()))]
        for variant in table.variants(group)
    ]
    compared = [variant for variant in table.variants(group) if not table.is_apart(group, variant)]
    orders = Counter(_order({name: numbers[name] for name in compared if name in numbers}) for numbers in theirs.values())
    sentences = [
        *(f"Ours, by {measure}: {table.order(group, measure)}." for measure in table.qualities),
        "The paper: " + "; ".join(f"{order} in {count} of {len(theirs)} columns" for order, count in orders.most_common()) + ".",
    ]
    return markdown(headers, body) + "\n" + "\n".join(f"- {sentence}" for sentence in sentences) + "\n"


def render(sweep: Sweep, spec: Spec, paper: Sequence[Mapping[str, str]]) -> str:
    """Return the whole of `table.md`."""
    table = Table(sweep.jobs, spec)
    parts = [f"{about_sweep(sweep.jobs)}\n"]
    if sweep.missing:
        parts.append(f"**Half-finished.** Missing: {'; '.join(map(describe, sweep.missing))}.\n")
    parts.append(
        "Mean over seeds (least..greatest). Differences are paired: same seed, same text; ± is their standard error, and a "
        "difference within two of them is a tie.\n"
    )
    if table.has_constants:
        parts.append(
            "Rows that no seed changes are paired with each other by sequence of the text; where those were not kept, nothing "
            "can be said of their order (?).\n"
        )
    if paper:
        parts.append(
            f"Beside the paper's numbers, in brackets, is the perplexity over {display_name(spec.reference)}'s. The models and the "
            "text are not the paper's, so compare orders and ratios, not numbers.\n"
        )
    for group in table.groups:
        heading = describe(dict(zip(spec.group, group, strict=True)))
        parts.append(f"**{heading}**\n" if heading else "")
        parts.append(table.markdown(group))
        parts.append(beside_paper(table, group, paper))
    return "\n".join(part for part in parts if part)


def sweep_of(experiment: str, root: Path) -> Sweep:
    """Read the jobs of an experiment; those that its table has no row for need not be there."""
    spec = SPECS[experiment]
    return read_sweep(
        root / experiment, [job for job in expected_jobs(spec.twin_of or experiment) if spec.variant(job, "evopress")]
    )


def command_of(experiment: str) -> str:
    """Return the command that runs a sweep."""
    spec = SPECS[experiment]
    further = f" {' '.join(spec.overrides)} hydra.sweep.dir=multirun/{experiment}" if spec.twin_of else ""
    return f"python -m evopress +experiment={spec.twin_of or experiment}{further}"


def make_table(experiment: str, *, root: Path, out: Path) -> Sweep:
    """Read a sweep and write its table.

    Args:
        root: folder that holds the sweep's folder.
        out: folder of the experiment, with its `paper.csv` and README.

    Raises: EvoPressError if no job has finished, or the jobs do not belong together.
    """
    sweep = sweep_of(experiment, root)
    if not sweep.jobs:
        raise EvoPressError(f"no finished job lies in {root / experiment}: run {command_of(experiment)} first")
    write_tables(experiment, sweep, out)
    return sweep


def check_no_fewer(experiment: str, sweep: Sweep, out: Path) -> None:
    """Raise EvoPressError if the table of an experiment that lies in a folder has results of more runs than a sweep has."""
    there, here = _num_runs(read_csv(out / "runs.csv")), _num_runs(Table(sweep.jobs, SPECS[experiment]).runs())
    if here < there:
        raise EvoPressError(
            f"the one in {out} has {there} rows of single seeds, the jobs that have finished give {here}: it stays as it is until "
            "the others have, too (python -m experiments.tables makes it of what there is)"
        )


def _num_runs(rows: Iterable[Mapping[str, Any]]) -> int:
    """Count the groups, variants and seeds in rows of `runs.csv`."""
    return len({tuple(str(value) for key, value in row.items() if key not in ("measure", "value")) for row in rows})


def write_tables(experiment: str, sweep: Sweep, out: Path) -> None:
    """Write the table of an experiment's jobs: results.csv, runs.csv, table.md, and the README's part."""
    spec = SPECS[experiment]
    table = Table(sweep.jobs, spec)
    write_csv(out / "results.csv", table.summary())
    write_csv(out / "runs.csv", table.runs())
    paper = read_csv((home(spec.twin_of) if spec.twin_of else out) / "paper.csv")
    write_table(out, spec.title, render(sweep, spec, paper))


_MANY_JOBS = 20


def make_table_of(folder: Path, *, out: Path) -> tuple[Sweep, Spec]:
    """Read the folder of any sweep and write its tables: the jobs, then a table for each combination of what was swept.

    Many jobs come last: their means over seeds are what is looked for.

    Raises: EvoPressError if no job has finished.
    """
    sweep, jobs = any_sweep(folder), read_jobs(folder)
    if not sweep.jobs:
        finished = any(job.state == "finished" for job in jobs)
        how = "its stages have no evaluate; jobs.csv has its jobs" if finished else "run the sweep again, it goes on where it was"
        raise EvoPressError(f"no job in {folder} has been evaluated: {how}")
    spec = any_spec(f"The sweep in {folder.resolve().name}", list(sweep.jobs[0].axes))
    table = Table(sweep.jobs, spec)
    write_csv(out / "results.csv", table.summary())
    write_csv(out / "runs.csv", table.runs())
    parts = [jobs_as_markdown(jobs), render(sweep, spec, [])]
    parts = parts[::-1] if len(jobs) > _MANY_JOBS else parts
    write_bytes(out / "table.md", "\n".join([f"# {spec.title}\n", *parts]).encode())
    return sweep, spec


def write_table(folder: Path, title: str, text: str) -> None:
    """Write an experiment's table.md, and the same text into its README."""
    write_bytes(folder / "table.md", f"# {title}\n\n{text}".encode())
    fill_readme(folder / "README.md", text)


def fill_readme(readme: Path, text: str) -> None:
    """Put the table between the marks of a README; without marks it stays as it is."""
    if not readme.is_file():
        return
    before, begin, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        write_bytes(readme, f"{before}{BEGIN}\n{text}{END}{after}".encode())


def about_sweep(jobs: Sequence[Job]) -> str:
    """Say in a line what was run, and where."""
    config, seeds = jobs[0].config, sorted({job.axes.get(SEED, "0") for job in jobs}, key=number_of)
    revisions = sorted({str(job.environment.get("git_revision", "unknown")) for job in jobs})
    machines = sorted({str(job.environment.get("machine", "unknown")) for job in jobs})
    seconds = [float(job.result["search"]["seconds"]) for job in jobs if job.result.get("search")]
    took = f"; a search took {statistics.fmean(seconds):.0f} s on average" if seconds else ""
    model, scale, text = config["model"], config["scale"]["name"], config["data"]["source"]
    if len(seeds) > 3 and seeds[0].isdigit() and seeds == [str(int(seeds[0]) + index) for index in range(len(seeds))]:
        seeds = [f"{seeds[0]} to {seeds[-1]}"]
    parts = [
        f"Model {model['name'] or model['path']}, scale {scale}, text {text}, seeds {', '.join(seeds)}{took}.",
        f"Revision {', '.join(revisions)} on {'; '.join(machines)}.",
    ]
    return " ".join(parts)


def _with_ratio(numbers: Mapping[str, float], variant: str, reference: str) -> str:
    if variant not in numbers:
        return ""
    ratio = f" (×{numbers[variant] / numbers[reference]:.2f})" if numbers.get(reference) and variant != reference else ""
    return f"{numbers[variant]:.2f}{ratio}"


def _order(numbers: Mapping[str, float]) -> str:
    names = sorted(numbers, key=numbers.__getitem__)
    text = display_name(names[0]) if names else ""
    for one, next_one in itertools.pairwise(names):
        text += f" {'=' if numbers[one] == numbers[next_one] else '<'} {display_name(next_one)}"
    return text


def number_of(value: str) -> tuple[int, float, str]:
    """Sort numbers as numbers and before words; equal numbers are equal however they are written."""
    try:
        return 0, float(value), ""
    except ValueError:
        return 1, 0.0, value


def markdown(headers: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---", *("---:" for _ in headers[1:])], *body]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV; none where there is none."""
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines())) if path.is_file() else []


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with eight digits; a column for every key of any row, blank where a row lacks it or has NaN.

    Raises: EvoPressError if the folder cannot be written to, or the disk is full; an earlier file is then as it was.
    """
    names, text = list(dict.fromkeys(key for row in rows for key in row)), io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _plain(value) for key, value in row.items()})
    make_folder(path.parent)
    write_bytes(path, text.getvalue().encode())


def _plain(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.8g}"


def main() -> None:
    """Make the table that is named on the command line."""

    def make(experiment: str, root: Path, out: Path) -> tuple[Sweep, str]:
        sweep = make_table(experiment, root=root, out=out)
        return sweep, f"{(out / 'table.md').read_text(encoding='utf-8')}\n{len(sweep.jobs)} jobs: {out}"

    def make_of_folder(folder: Path, out: Path) -> tuple[Sweep, str]:
        sweep, _ = make_table_of(folder, out=out)
        return sweep, f"{(out / 'table.md').read_text(encoding='utf-8')}\n{len(sweep.jobs)} jobs: {out}"

    of_sweep("Make the table of a sweep, also of a half-finished one.", make, make_of_folder)


if __name__ == "__main__":
    main()
