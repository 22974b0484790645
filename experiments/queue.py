"""Run what is missing of the tables and figures, several jobs at once, and make them: killed and started again, it goes on.

    python -m experiments.queue --list                        # what is missing
    python -m experiments.queue                               # the paper's: a job for each core, of one thread each
    python -m experiments.queue all                           # what the paper does not have, too
    python -m experiments.queue table3 table3_best --jobs 1 -- search.generations=12
    python -m experiments.queue table3 --root multirun/tiny --out multirun/tiny -- +debug=tiny

A sweep is a job for each combination of what `conf/experiment/NAME.yaml` sweeps, in the folder that Hydra would give it; jobs that
`python -m evopress +experiment=NAME` has finished are not run again. NAME_best is the same sweep on the best levels. When the last
job of a sweep has ended its table is made. What scripts run are jobs like these; scripts themselves come last, one after the other,
and make their tables of what there is. `paper` stands for the tables and figures that the paper has, on both forms of levels, `all`
for all names. What follows `--` is given to every job, and to scripts that take it; a sweep with a finished job of other settings
is left out, before any job of it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra import compose, initialize_config_dir

from evopress import config as configuration
from evopress.errors import EvoPressError
from evopress.files import explained, write_bytes
from experiments import claims
from experiments.clock import Clock
from experiments.scripts import with_its_jobs
from experiments.single_runs import SingleRun, evopress_all, has_finished, logged, refuse_others, why_it_failed
from experiments.specs import SPECS, home
from experiments.sweeps import Sweep, describe, expected_jobs, read_job, read_sweep
from experiments.tables import check_no_fewer, make_table, sweep_of

FIGURE1 = "figure1"
"""A sweep whose table is made by its script."""
SWEEPS = (*SPECS, FIGURE1)
SCRIPTS: dict[str, tuple[str, ...]] = {
    FIGURE1: ("experiments.figure1.run --root {root}",),
    "figure5": ("experiments.figure5.run --root {root}",),
    "figure6": ("experiments.figure6.run --root {root}",),
    "table13": (
        "evopress +method=drop sparsity=0.5 stages=[database,baselines] tracker=none hydra.run.dir={root}/table13 {further}",
        "experiments.table13.run --run {root}/table13",
    ),
    "table1": ("experiments.table1.run",),
    "figure7": ("experiments.figure7.run",),
    "theorem1": ("experiments.theorem1.run",),
    "drop_speed": ("experiments.drop_speed.run",),
    "levels": ("experiments.levels.measure -- {further}", "experiments.levels.found --jobs {jobs} -- {further}"),
    "guided": tuple(
        f"experiments.guided.measure --method {method} --jobs {{jobs}} -- {{further}}" for method in ("quant", "sparsity", "drop")
    ),
    "heldout": ("experiments.heldout.run",),
    "calibration": ("experiments.calibration.measure --jobs {jobs} -- {further}",),
    "allocation": tuple(
        f"experiments.allocation.run --method {method} --jobs {{jobs}} -- {{further}}" for method in ("quant", "sparsity")
    ),
    "joint": ("experiments.joint.run --jobs {jobs} -- {further}",),
}
"""What is run after the sweeps, by name: modules with their arguments."""
WITH_JOBS = frozenset(
    f"experiments.{module}" for module in ("levels.found", "guided.measure", "calibration.measure", "allocation.run")
)
"""Scripts whose jobs are known beforehand: `asked_runs` lists them, `prepare`, where there is one, makes what they need."""
NAMES = tuple(dict.fromkeys([*SWEEPS, *SCRIPTS]))
GROUPS: dict[str, tuple[str, ...]] = {
    "paper": tuple(name for name in NAMES if name == "demo_paper" or name.startswith(("table", "figure", "theorem"))),
    "all": NAMES,
}
"""What names stand for: the paper's tables and figures, also on the best levels; everything."""


@dataclass(frozen=True)
class Missing:
    """What is left of a sweep, or of what a script runs."""

    name: str
    jobs: tuple[dict[str, str], ...]
    total: int
    seconds: float | None
    """What a search of those that have finished took, on average."""
    runs: tuple[SingleRun, ...] = ()
    """Of a script: its jobs."""


def sweep(name: str, root: Path) -> Sweep:
    """Read what there is of a sweep."""
    return sweep_of(name, root) if name in SPECS else read_sweep(root / name, expected_jobs(name))


def missing(name: str, root: Path, further: Sequence[str] = ()) -> Missing:
    """Return what is missing of a sweep.

    Raises: EvoPressError if jobs are there that do not belong together, or one has finished with other settings than are asked for.
    """
    there = sweep(name, root)
    for job in there.jobs:
        refuse_others(job.folder, arguments_of(name, {}, further), besides=job.axes)
    left = [*there.missing, *(dict(job.axes) for job in there.jobs if not has_finished(job.folder))]  # killed after its evaluation
    took = [float(job.result["search"]["seconds"]) for job in there.jobs if job.result.get("search")]
    return Missing(name, tuple(left), len(there.jobs) + len(there.missing), statistics.fmean(took) if took else None)


def missing_of_script(name: str, root: Path, jobs: int, further: Sequence[str]) -> Missing | None:
    """Return what is missing of what a script runs; None if it runs nothing that is known beforehand, or has been run."""
    if is_done(name, root, further):
        return None
    asked = [run for module, given in with_jobs(name, root, jobs, further) for run in module.asked_runs(given)]
    left = tuple(replace(run, labels={"sweep": name, "job": run.folder.name}) for run in asked if not has_finished(run.folder))
    return Missing(name, tuple({"run": run.folder.name} for run in left), len(asked), None, left) if asked else None


def with_jobs(name: str, root: Path, jobs: int, further: Sequence[str]) -> Iterator[tuple[Any, argparse.Namespace]]:
    """Yield the modules of a script's commands whose jobs are known beforehand, and what they are asked for."""
    for _, module, *words in commands(name, root, jobs, further):
        if module in WITH_JOBS:
            script = import_module(module)
            yield script, script.asked_for(words)


def arguments_of(name: str, axes: Mapping[str, str], further: Sequence[str]) -> tuple[str, ...]:
    """Return what is typed for a job of a sweep."""
    spec = SPECS.get(name)
    own = (f"+experiment={spec.twin_of if spec and spec.twin_of else name}", *(spec.overrides if spec else ()))
    return (*own, *(f"{key}={value}" for key, value in axes.items()), *further)


def runs(name: str, jobs: Sequence[dict[str, str]], root: Path, further: Sequence[str]) -> Iterator[SingleRun]:
    """Yield the jobs of a sweep as runs, in the folders that Hydra would give them."""
    configuration.register()
    with initialize_config_dir(version_base="1.3", config_dir=str(configuration.config_folder())):
        for axes in jobs:
            given = arguments_of(name, axes, further)
            folder = root / name / compose("config", list(given), return_hydra_config=True).hydra.sweep.subdir
            yield SingleRun(folder, ("hydra.mode=RUN", *given), {"sweep": name, "job": describe(axes)})


def folder_of(name: str, out: Path | None) -> Path:
    """Return where the table of a sweep goes."""
    return home(name) if out is None else out / home(name).relative_to(Path(__file__).parent)


def make(name: str, root: Path, out: Path | None, *, failed: bool = False) -> bool:
    """Make the table of a sweep, as far as its jobs have finished; say what forbids it, and tell whether nothing does.

    Args: failed: some of its jobs have: a table of more jobs, of an earlier time, is then left as it is.
    """
    if name not in SPECS:
        return True
    to = folder_of(name, out)
    try:
        if failed:
            check_no_fewer(name, sweep_of(name, root), to)
        found = make_table(name, root=root, out=to)
    except (EvoPressError, OSError) as error:
        print(f"{name}: no table: {explained(error, to) if isinstance(error, OSError) else error}", flush=True)
        return False
    print(f"{name}: the table of {len(found.jobs)} jobs is in {to}", flush=True)
    return True


def not_left(run: SingleRun) -> str:
    """Say what a sweep's job that ended well has not left for the table; nothing: it is all there."""
    try:
        read_job(run.folder, ())
    except EvoPressError as error:
        return f"it ended without results that can be read ({error}): remove {run.folder}, then it is run anew"
    return ""


def commands(name: str, root: Path, jobs: int, further: Sequence[str]) -> Iterator[list[str]]:
    """Yield the commands of a script, without the interpreter."""
    for command in SCRIPTS[name]:
        words = command.replace("{root}", str(root)).replace("{jobs}", str(jobs)).split()
        yield ["-m", *(part for word in words for part in (further if word == "{further}" else (word,)))]


def run_script(name: str, root: Path, jobs: int, further: Sequence[str]) -> bool:
    """Run the commands of a script unless an earlier call has, on the sweeps as they are; tell whether all ended well."""
    if is_done(name, root, further):
        return True
    failed = False
    for line in commands(name, root, jobs, further):
        if not logged([sys.executable, *line], root / name):
            failed = True
            if line[1] not in WITH_JOBS:  # which make their tables of what there is, and need no other's
                return False
    left = missing_of_script(name, root, jobs, further)
    if failed or (left and left.jobs):
        return False
    write_bytes(root / f"{name}.done", as_run(name, root, further).encode())
    return True


def is_done(name: str, root: Path, further: Sequence[str]) -> bool:
    """Tell whether an earlier call has run a script, on the sweeps as they are."""
    done = root / f"{name}.done"
    return done.is_file() and done.read_text(encoding="utf-8") == as_run(name, root, further)


def as_run(name: str, root: Path, further: Sequence[str]) -> str:
    """Return what is written down of a script that has been run: its commands, and what it read."""
    told = "".join(" ".join(line) + "\n" for line in commands(name, root, 0, further))  # however many at once
    return told + (f"results until {newest(root)}\n" if any("--root {root}" in command for command in SCRIPTS[name]) else "")


def newest(folder: Path) -> float:
    """Return when the last result in a folder of sweeps, or of jobs, was written, in seconds; 0: there is none."""
    return max((path.stat().st_mtime for path in (*folder.glob("*/result.json"), *folder.glob("*/*/result.json"))), default=0.0)


def is_stale(name: str, root: Path, out: Path | None) -> bool:
    """Tell whether a sweep has results that are newer than its table, such as those of a job that outlived a killed queue."""
    table = folder_of(name, out) / "table.md"
    return not table.is_file() or newest(root / name) > table.stat().st_mtime


def go(names: Sequence[str], *, root: Path, out: Path | None, at_once: int, further: Sequence[str]) -> int:
    """Run what is missing of sweeps and scripts, and make their tables; return how many things failed."""
    left, failed = [], 0
    for name in names:
        if name not in SWEEPS:
            continue
        try:
            left.append(missing(name, root, further))
        except EvoPressError as error:
            failed += 1
            print(f"{name}: left out: {error}", flush=True)
    scripts, of_scripts = [], []
    for name in names:
        if name not in SCRIPTS or out is not None:
            continue
        try:
            found = missing_of_script(name, root, at_once, further)
            for module, given in with_jobs(name, root, at_once, further) if found and found.runs else ():
                getattr(module, "prepare", lambda _: None)(given)
        except EvoPressError as error:
            failed += 1
            print(f"{name}: left out: {error}", flush=True)
            continue
        scripts.append(name)
        of_scripts += [found] if found else []
    clock = clock_of([*left, *of_scripts], at_once)
    print(clock, flush=True)
    for each in left:
        if not each.jobs and each.name in SPECS and is_stale(each.name, root, out):
            failed += not make(each.name, root, out)
    failing = set()
    swept = (run for each in left for run in runs(each.name, each.jobs, root, further))
    for run, well in evopress_all(chain(swept, *(each.runs for each in of_scripts)), at_once=at_once):
        name = run.labels["sweep"]
        reason = "" if well else why_it_failed(run.folder)
        if name in SWEEPS and (reason := reason or not_left(run)):  # a script tries again
            failed += 1
            failing.add(name)
        last = clock.ended(name)
        print(f"{name} {run.labels['job']}: {f'failed, {reason}' if reason else 'done'}; {clock}", flush=True)
        if last and name in SWEEPS:
            failed += not make(name, root, out, failed=name in failing)
    for name in scripts:
        well = run_script(name, root, at_once, further)
        failed += not well
        print(f"{name}: {'done' if well else f'failed, {why_it_failed(root / name)}'}", flush=True)
    if out is None:
        claims.write()
    return failed


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """Hold a folder of sweeps for one queue; raise EvoPressError if another is at work there."""
    try:
        with FileLock(root / ".queue.lock", timeout=0):
            yield
    except Timeout:
        raise EvoPressError(f"another queue is at work in {root}: wait for its end, or give this one a --root of its own") from None


def show(names: Sequence[str], root: Path, jobs: int, further: Sequence[str]) -> int:
    """List what is missing; run nothing. Return how many names are refused."""
    left, refused = [], 0
    for name in names:
        try:
            if name in SWEEPS:
                left.append(missing(name, root, further))
                print(f"{name}: {len(left[-1].jobs)} of {left[-1].total} jobs missing")
                for axes in left[-1].jobs:
                    print(f"    {describe(axes)}")
            if name in SCRIPTS:
                if found := missing_of_script(name, root, jobs, further):
                    left.append(found)
                    print(f"{name}: {len(found.jobs)} of {found.total} jobs missing")
                for command in commands(name, root, jobs, further):
                    print(f"{name}: python {' '.join(command)}")
        except EvoPressError as error:
            refused += 1
            print(f"{name}: left out: {error}")
    print(clock_of(left, jobs))
    return refused


def clock_of(left: Sequence[Missing], at_once: int) -> Clock:
    """Return what tells how long what is missing will take."""
    took = {each.name: each.seconds for each in left if each.seconds is not None}
    return Clock({each.name: len(each.jobs) for each in left}, at_once, took)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    help_names = f"paper (default), all, or of {', '.join(NAMES)}"
    parser.add_argument("names", nargs="*", metavar="NAME", help=help_names)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="at once (default: a job for each core)")
    parser.add_argument("--root", type=Path, default=Path("multirun"), help="where the sweeps lie (default %(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        help="tables go into folders in this one, without scripts (default: the experiments' own)",
    )
    parser.add_argument("--list", action="store_true", help="say what is missing, run nothing")
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    asked, further = parser.parse_args(sys.argv[1:cut]), sys.argv[cut + 1 :]
    if unknown := [name for name in asked.names if name not in (*GROUPS, *NAMES)]:
        parser.error(f"{unknown[0]!r} is no experiment: choose among {', '.join((*GROUPS, *NAMES))}")
    if asked.jobs < 1:
        parser.error(f"--jobs {asked.jobs} is out of range: expected at least 1")
    if not any(each.startswith("threads=") for each in further):
        further.append("threads=1")
    names = list(dict.fromkeys(each for name in asked.names or ("paper",) for each in GROUPS.get(name, (name,))))
    if asked.out is not None and (own := [name for name in asked.names if name in SCRIPTS and name not in SWEEPS]):
        parser.error(f"--out {asked.out} is for tables of sweeps, and {own[0]} writes into its own folder: leave one of them out")
    asked.root.mkdir(parents=True, exist_ok=True)
    with with_its_jobs():
        if asked.list:
            if refused := show(names, asked.root, asked.jobs, further):
                raise EvoPressError(f"{refused} of it would be left out")
            return
        with alone(asked.root):
            failed = go(names, root=asked.root, out=asked.out, at_once=asked.jobs, further=further)
        if failed:
            raise EvoPressError(f"{failed} of it failed; the same command goes on with what is missing")


if __name__ == "__main__":
    main()
