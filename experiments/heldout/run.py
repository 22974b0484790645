"""Measure what finished runs found on text of other kinds than the calibration's: does the order of the methods survive?

    python -m experiments.guided.measure --recipes best --targets 2.5 3 --rows baselines evolution "evolution from dp" guided
    python -m experiments.heldout.run multirun/guided/quant-best-2.5-* multirun/guided/quant-best-3-*

Runs of one level database are measured together, each with its genome and its baselines: `results.csv` has every mean, with its
difference to the reference, `runs.csv` every seed, `table.md` what transfers. Runs of one row that differ in more than the seed are
refused. The texts are those of `texts.py`, written to `multirun/heldout/texts` unless they lie there; `--also NAME=FILE` adds one.
`--rebuilt` measures genomes on the levels that the same settings have on this machine, where they were found on another build of
them. What follows `--` is given to every run.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from evopress import machine
from evopress.earlier_versions import as_written_now
from evopress.errors import EvoPressError
from evopress.reporting.differences import Difference
from evopress.reporting.records import read_document, read_genome
from evopress.reporting.tables import display_name, significant
from evopress.settings import RunSettings
from evopress.stages.baselines import read_baselines, stored_baselines
from evopress.stages.evaluate import measured_rows
from evopress.units import Genome
from evopress.workspace import Workspace
from experiments.composed import settings_of, take_threads
from experiments.heldout.texts import write_texts
from experiments.scripts import file_to_read, in_one_sentence
from experiments.specs import Spec
from experiments.sweeps import Job, check_settings_alike
from experiments.tables import Group, Table, about_sweep, in_order, markdown, write_csv, write_table

FOLDER = Path(__file__).parent
TEXTS = Path("multirun/heldout/texts")
RUNS, DEFAULT = Path("multirun/guided"), "quant-best-*"
KL = "held-out KL "
"""How the names of the columns begin that have the KL divergence on a text."""
_NEAR = (0.97, 1.002)
"""Shares of the found genomes' bytes between which a row counts as of the same."""
_VERDICTS = {"better": "the same", "tie": "a tie", "worse": "turned round"}


@dataclass(frozen=True)
class Run:
    """A finished run whose genomes are measured."""

    folder: Path
    settings: RunSettings
    database: str

    @property
    def axes(self) -> dict[str, str]:
        """What tells its table from others', and its seed."""
        settings = self.settings
        target = settings.bits or settings.sparsity or settings.size
        levels = getattr(settings.method, "recipe", None) or settings.method.name
        return {"levels": str(levels), "target": f"{target}", "seed": str(settings.seed)}

    @property
    def group(self) -> Group:
        """What its table is of."""
        return self.axes["levels"], self.axes["target"]

    @property
    def strategy(self) -> str:
        """What found its genome: "evolution, from dp"."""
        search = self.settings.search
        after = ", then second order" if getattr(search.strategy, "second_order_rounds", 0) else ""
        after += f" on {tokens} tokens" if after and (tokens := getattr(search.strategy, "second_order_tokens", None)) else ""
        after += ", then evolution" if getattr(search.strategy, "generations_after", 0) else ""
        return f"{search.strategy.name}{''.join(f', from {start}' for start in search.starts)}{after}"

    @property
    def has_found(self) -> bool:
        """Whether its search has ended with a genome."""
        return (self.folder / "genome.json").is_file()

    @property
    def names(self) -> list[str]:
        """What its rows are called, the dense model's aside."""
        path = self.folder / "baselines.json"
        baselines = list(read_baselines(path)["genomes"]) if path.is_file() else []
        return [*baselines, self.strategy] if self.has_found else baselines


def finished_runs(folders: Sequence[Path], files: Mapping[str, Path], further: Sequence[str] = ()) -> Iterator[Run]:
    """Open finished runs, with further held-out texts.

    Args: further: overrides of their settings.

    Raises: EvoPressError if there is neither a genome nor a baseline in one.
    """
    for folder in folders:
        told = next((folder / name for name in ("genome.json", "baselines.json") if (folder / name).is_file()), None)
        overrides = folder / ".hydra" / "overrides.yaml"
        if told is None or not overrides.is_file():
            raise EvoPressError(f"{folder} is no run with a genome.json or a baselines.json: name folders of finished runs")
        lines = as_written_now([str(line) for line in OmegaConf.load(overrides)])
        more = [f"++evaluation.files.{name}={path.resolve()}" for name, path in files.items()]
        database = str(read_document(told, what="file of genomes").get("database"))
        yield Run(folder, settings_of([*lines, *more, *further]), database)


def check_pooled(runs: Sequence[Run]) -> None:
    """Raise EvoPressError if runs of one table have other levels or texts, or those of one row differ in more than the seed.

    Those on several builds of the same levels may be seeds of one row.
    """
    of_group: dict[Group, list[Run]] = {}
    of_row: dict[Group, list[Run]] = {}
    for run in runs:
        of_group.setdefault(run.group, []).append(run)
        if run.has_found:
            of_row.setdefault((*run.group, run.strategy), []).append(run)
    for alike, free in ((of_group, ["search", "baselines.names"]), (of_row, ["baselines.names"])):
        for among in alike.values():
            check_settings_alike([run.folder for run in among], [asdict(run.settings) for run in among], free)
    for row, among in of_row.items():
        seeds: dict[str, Run] = {}
        for run in among:
            if (other := seeds.setdefault(run.axes["seed"], run)) is not run:
                job = f"{', '.join(row)}, seed {run.axes['seed']}"
                raise EvoPressError(f"{other.folder} and {run.folder} are the same job ({job}): name one of them")


def genomes_of(run: Run, here: Workspace, *, rebuilt: bool) -> dict[str, Genome]:
    """Return the genomes of a run's baselines and of its search, by name.

    Args: rebuilt: take them too if they were found on another build of the levels.

    Raises: EvoPressError if they do not fit the level database.
    """
    space, own = here.database.space, None if rebuilt else here.database.fingerprint
    found: dict[str, Genome] = {}
    if (path := run.folder / "baselines.json").is_file():
        if rebuilt:
            found = {name: space.check(genome) for name, genome in read_baselines(path)["genomes"].items()}
        else:
            found, _ = stored_baselines(here)
    if run.has_found:
        found[run.strategy] = read_genome(run.folder / "genome.json", space, database=own)
    return found


def measured(runs: Sequence[Run], *, rebuilt: bool = False) -> Iterator[Job]:
    """Measure the genomes of runs of one level database, all of them on the same tokens; yield a job for each run.

    Arguments as of `genomes_of`.
    """
    take_threads(runs[0].settings)
    first = Workspace(runs[0].settings, runs[0].folder)
    genomes: dict[str, Genome | None] = {"dense": None}
    names: list[dict[str, str]] = []
    for run in runs:
        here = first if run is runs[0] else Workspace(run.settings, run.folder, beside=first)
        found = genomes_of(run, here, rebuilt=rebuilt)
        known = {genome: name for name, genome in genomes.items()}
        names.append({"dense": "dense"})
        for name, genome in found.items():
            names[-1][name] = known.setdefault(genome, f"{run.folder}: {name}")
            genomes.setdefault(names[-1][name], genome)
    rows = {row["name"]: row for row in measured_rows(first, genomes, first.levels.space)}
    sizes: dict[Group, int] = {}
    for run, shown in zip(runs, names, strict=True):
        if run.strategy in shown:
            sizes[run.group] = max(rows[shown[run.strategy]]["bytes"], sizes.get(run.group, 0))
    jobs = [_job(run, shown, rows, sizes.get(run.group)) for run, shown in zip(runs, names, strict=True)]
    yield from jobs
    for run, job in zip(runs, jobs, strict=True):  # baselines that one seed has are the same at the others
        for seed in {other.axes["seed"] for other in runs if other.group == run.group} - {run.axes["seed"]}:
            told = [row for row in job.result["rows"] if row["name"] != run.strategy]
            yield replace(job, axes={**job.axes, "seed": seed}, result={"rows": told})


def _job(run: Run, shown: Mapping[str, str], rows: Mapping[str, Mapping[str, Any]], size: int | None) -> Job:
    """Return a run with the rows of what it has; of other sizes than what was found they are left out."""
    told = [
        {**row, "name": name}
        for name, row in ((name, rows[key]) for name, key in shown.items())
        if name in ("dense", run.strategy) or size is None or _NEAR[0] * size <= row["bytes"] <= _NEAR[1] * size
    ]
    config = OmegaConf.to_container(OmegaConf.load(run.folder / ".hydra" / "config.yaml"))
    assert isinstance(config, dict)
    about = {str(key): value for key, value in config.items()}
    return Job(run.folder, run.axes, about, {"rows": told}, machine.describe(torch.get_num_threads()))  # of what measures


def spec_of(names: Iterable[str], reference: str) -> Spec:
    """Describe the tables: one for each kind of levels and target.

    Args: names: of the rows that the runs have.

    Raises: EvoPressError if the reference is none of them.
    """
    if reference not in (told := dict.fromkeys(names)):
        raise EvoPressError(f"--reference {reference!r} is in none of the runs: choose among {', '.join(told)}")
    return Spec("Other kinds of text", group=("levels", "target"), reference=reference)


def by_sequence(jobs: Sequence[Job], group: Group, text: str) -> dict[str, list[float]]:
    """Return the KL divergence of what is compared on each sequence of a text, mean over seeds."""
    seeds: dict[str, dict[str, Sequence[float]]] = {}
    for job in jobs:
        if group == (job.axes["levels"], job.axes["target"]):
            for row in job.result["rows"]:
                if row["name"] != "dense":
                    seeds.setdefault(row["name"], {}).setdefault(job.axes["seed"], row["by_sequence"][text]["kl"])
    return {name: [statistics.fmean(each) for each in zip(*of.values(), strict=True)] for name, of in seeds.items()}


def transfer(jobs: Sequence[Job], table: Table, group: Group) -> str:
    """Lay out the KL divergence by text and method, how far the reference is below dynamic programming, and the order."""
    texts = [measure.removeprefix(KL) for measure in table.columns if measure.startswith(KL)]
    of = {text: by_sequence(jobs, group, text) for text in texts}
    reference, names = table.spec.reference, list(of[texts[0]])
    body = []
    for text, kept in of.items():
        means = {name: statistics.fmean(values) for name, values in kept.items()}
        below = f"{(1 - means[reference] / means['dp']) * 100:.0f}%" if means.get("dp") and reference in means else ""
        order = in_order(means, lambda one, other, kept=kept: Difference.of_sequences(kept[one], kept[other]), min)  # type: ignore[misc]
        dense = next(iter(table.values[group]["dense"][f"ppl {text}"].values()))
        body.append([text, significant(dense), *(significant(means[name]) for name in names), below, order])
    headers = ["text", "dense perplexity", *map(display_name, names), f"{display_name(reference)} below DP", "order"]
    return markdown(headers, body) + f"\n{survives(of)}\n"


def survives(of: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Say what becomes on other texts of the differences that are decided on the first.

    Args: of: text to method to the KL divergence on each sequence.
    """
    (own, here), *others = of.items()
    decided = [
        (a, b) for a, b in itertools.permutations(here, 2) if Difference.of_sequences(here[a], here[b]).verdict(min) == "better"
    ]
    found: dict[str, list[str]] = {}
    for text, there in others:
        for a, b in decided:
            verdict = Difference.of_sequences(there[a], there[b]).verdict(min)
            found.setdefault(verdict, []).append(f"{display_name(b)} below {display_name(a)} on {text}")
    counts = ", ".join(f"{len(found.get(verdict, []))} {words}" for verdict, words in _VERDICTS.items())
    turned = f": {'; '.join(found['worse'])}" if "worse" in found else ""
    return f"{len(decided)} pairs of methods differ on {own}; on {len(others)} other texts that is {counts}{turned}."


def render(jobs: Sequence[Job], table: Table) -> str:
    """Return what transfers, in Markdown."""
    parts = [
        f"{about_sweep(jobs)}\n",
        "KL divergence in nats per token, mean over seeds; the first text is the run's own. In the order < is more than two "
        "standard errors of the difference, paired by sequence, and ≈ a tie. Baselines are there that take the same bytes.\n",
    ]
    for group in table.groups:
        parts += [f"**{group[0]} levels, {group[1]}**\n", transfer(jobs, table, group)]
    return "\n".join(parts)


@in_one_sentence()
def main() -> None:
    """Measure the runs that are named and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=file_to_read, metavar="RUN_FOLDER", help=f"default: {RUNS}/{DEFAULT}")
    parser.add_argument("--texts", type=Path, default=TEXTS, help="folder of NAME.txt (default %(default)s)")
    parser.add_argument("--also", action="append", default=[], metavar="NAME=FILE", help="a further text: .txt, .jsonl, …")
    parser.add_argument("--reference", default="guided, from dp", help="what others are compared with (default %(default)r)")
    parser.add_argument("--rebuilt", action="store_true", help="of another build of the levels: measure on those that are here")
    parser.add_argument("--out", type=Path, default=FOLDER)
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    asked, further = parser.parse_args(sys.argv[1:cut]), sys.argv[cut + 1 :]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    folders = [folder for folder in dict.fromkeys(asked.runs or sorted(RUNS.glob(DEFAULT))) if folder.is_dir()]
    if not folders:
        raise EvoPressError(
            f"no run lies in {RUNS}/{DEFAULT}: run python -m experiments.guided.measure first, or name folders of finished runs"
        )
    files, reasons = write_texts(asked.texts)
    for kind, reason in reasons.items():
        print(f"{kind}: left out, {reason}", flush=True)
    files |= {name: Path(path) for name, _, path in (each.partition("=") for each in asked.also)}
    opened = list(finished_runs(folders, files, further))
    check_pooled(opened)
    spec = spec_of((name for run in opened for name in run.names), asked.reference)
    by_database: dict[str, list[Run]] = {}
    for run in opened:
        by_database.setdefault(run.database, []).append(run)
    jobs = [job for runs in by_database.values() for job in measured(runs, rebuilt=asked.rebuilt)]
    table = Table(jobs, spec)
    write_csv(asked.out / "results.csv", table.summary())
    write_csv(asked.out / "runs.csv", table.runs())
    text = render(jobs, table)
    write_table(asked.out, table.spec.title, text)
    print(text)


if __name__ == "__main__":
    main()
