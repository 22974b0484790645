"""The jobs of a sweep as a table: what was typed, the held-out KL, and why a job failed; printed when a sweep ends.

What a job says when it fails is kept beside the jobs' folders, not in them: a refused job leaves its folder as it was.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from evopress.errors import EvoPressError
from evopress.files import remove_empty, sha256_file, write_bytes
from evopress.json_files import load_json
from evopress.reporting.records import read_document, write_json
from evopress.reporting.tables import held_out_kl, number, significant
from evopress.result_settings import ASKED, HOW_IT_RUNS

FAILED = ".failed"
"""Folder inside a sweep's: a note for each job that failed when the sweep was run last."""
NOT_COMPARED = ("resume", "dry_run", *HOW_IT_RUNS, "hydra")
"""Settings that say nothing about what a job found."""
_DEPTH = 3
"""A job's folder lies at most this deep below its sweep's."""


@dataclass(frozen=True)
class SweepJob:
    """One job of a sweep, finished or not."""

    name: str
    """Its folder below the sweep's."""
    typed: Mapping[str, str]
    """Setting or config group to what was typed for it."""
    kl: float | None = None
    """Held-out KL of what was found, or given, on the run's own text: nats per token."""
    fitness: float | None = None
    """Of what was found, on the search text by which a sweeper tunes; None: no such sweeper ran the job."""
    state: str = "not finished"
    """ "finished", "not finished", "at work elsewhere" or "failed: " and the sentence."""


class JobsTable:
    """Hydra's callback: forget what failed before when a sweep starts, show its jobs when it ends."""

    def on_multirun_start(self, config: Any, **_: Any) -> None:
        """Begin a sweep in the folder that the config names."""
        global _begun, _fresh
        _begun = Path(str(config.hydra.sweep.dir))
        _fresh = not _begun.exists()
        shutil.rmtree(_begun / FAILED, ignore_errors=True)

    def on_multirun_end(self, config: Any, **_: Any) -> None:
        """Show the jobs."""
        show_jobs()

    def _nothing(self, **_: Any) -> None:
        """A run of its own has no jobs, and a job shows itself."""

    on_run_start = on_run_end = on_job_start = on_job_end = on_compose_config = _nothing


_begun: Path | None = None
"""The sweep of this process whose jobs have not been shown."""
_fresh = False
"""Whether its folder was not there before."""


_none = False
"""Whether the sweep that this process began had no job."""


def had_none() -> bool:
    """Tell, once, whether a sweep of this process has ended without any job."""
    global _none
    none, _none = _none, False
    return none


def show_jobs() -> None:
    """Print the jobs of the sweep that this process began, once, and write them into its folder; without a sweep nothing."""
    global _begun, _none
    folder, _begun = _begun, None
    if folder is None:
        return
    if not (jobs := read_jobs(folder)):
        _none = True
        if _fresh:  # no job of it began: what Hydra wrote of the sweep goes, and its folder if nothing else is in it
            with suppress(OSError):
                (folder / "multirun.yaml").unlink()
            remove_empty(folder)
        return
    with suppress(EvoPressError):  # a full disk was told by the jobs
        write_bytes(folder / "jobs.csv", as_csv(jobs).encode())
    print(f"\nthe jobs in {folder}:\n{as_text(jobs)}", flush=True)


def note_failure(
    sweep: Path, job: Path, typed: Sequence[str], sentence: str, *, refused: bool = False, taken: bool = False
) -> None:
    """Keep what a job said when it failed, for the table of its sweep.

    Args:
        sweep: folder of the sweep.
        job: folder of the job, made or not.
        typed: its overrides.
        refused: what has finished in the job's folder is as it was.
        taken: another run is at work in the job's folder, so that the job itself has not failed.
    """
    name = _below(sweep, job)
    path = sweep / FAILED / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"
    with suppress(EvoPressError, OSError):  # the sentence has been printed as well
        path.parent.mkdir(parents=True, exist_ok=True)
        told = {"job": name, "typed": list(typed), "sentence": sentence, "refused": refused, "taken": taken}
        write_json(path, {"schema": 1, **told, "finished": _finished(job)})


def finished_at(job: Path) -> int | None:
    """Return when what has finished in a job's folder was written down, in nanoseconds; None: nothing has."""
    path = job / "finished.json"
    return path.stat().st_mtime_ns if path.is_file() else None


def _finished(job: Path) -> str | None:
    """Return the digest of what is written down of what has finished in a job's folder; None: nothing is."""
    path = job / "finished.json"
    return sha256_file(path) if path.is_file() else None


def _gone_on_with(job: Path, note: Mapping[str, Any], path: Path) -> bool:
    """Tell whether a job has finished something since a note was made of its failure, whatever clocks say."""
    finished = _finished(job)
    if finished is None or "finished" in note:
        return finished not in (None, note.get("finished"))
    return (job / "finished.json").stat().st_mtime > path.stat().st_mtime  # a note of an earlier version


def read_jobs(sweep: Path) -> list[SweepJob]:
    """Return all jobs in a sweep's folder, in the order of their names, numbers as numbers; a damaged one is not finished."""
    jobs = {}
    for depth in range(1, _DEPTH + 1):
        for path in sweep.glob("/".join(["*"] * depth) + "/.hydra/overrides.yaml"):
            jobs[_below(sweep, path.parent.parent)] = _read_job(sweep, path.parent.parent)
    for path in (sweep / FAILED).glob("*.json"):
        with suppress(EvoPressError, OSError):
            note = read_document(path, what="note of a failed job")
            name, typed = str(note.get("job")), [str(each) for each in note.get("typed") or ()]
            if _gone_on_with(sweep / name, note, path):
                continue
            if note.get("refused") and name in jobs and _decisive(typed_settings(typed)) <= _decisive(jobs[name].typed):
                continue  # what it had found is there
            jobs[name] = SweepJob(
                name, typed_settings(typed), state="at work elsewhere" if note.get("taken") else f"failed: {note.get('sentence')}"
            )
    return [jobs[name] for name in sorted(jobs, key=_natural)]


def _decisive(typed: Mapping[str, str]) -> set[tuple[str, str]]:
    """Return what was typed of a job without what says nothing about what it finds."""
    return {(key, value) for key, value in typed.items() if key.split(".")[0] not in (*NOT_COMPARED, *ASKED)}


def own_row(result: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the row of `result.json` that a run is about: the found genome, else the one that was given; None: neither."""
    rows = {row.get("name"): row for row in result.get("rows") or () if isinstance(row, Mapping)}
    return rows.get("evopress", rows.get(result.get("genome")))


def typed_settings(overrides: Sequence[str]) -> dict[str, str]:
    """Return overrides as setting, or config group, to value, without plus and quotes."""
    pairs = (override.lstrip("+").partition("=") for override in overrides if "=" in override)
    return {key: value.strip("'\"") for key, _, value in pairs}


def columns(jobs: Sequence[SweepJob]) -> list[str]:
    """Return the settings in which jobs differ, in the order in which they are typed."""
    keys = dict.fromkeys(key for job in jobs for key in job.typed if key.split(".")[0] not in NOT_COMPARED)
    return [key for key in keys if len({job.typed.get(key) for job in jobs}) > 1]


def as_text(jobs: Sequence[SweepJob]) -> str:
    """Lay jobs out for a terminal."""
    head, *body = _cells(jobs, last="")
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head) - 1)]

    def aligned(row: Sequence[str]) -> str:
        return "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()

    return "\n".join([aligned(head), "-" * (sum(widths) + 2 * len(widths)), *map(aligned, body)])


def as_csv(jobs: Sequence[SweepJob]) -> str:
    """Lay jobs out for programs."""
    settings, numbers, text = columns(jobs), _measured(jobs), io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["job", *settings, *(header for header, _ in numbers), "state"])
    for job in jobs:
        values = ("" if (value := of(job)) is None else value for _, of in numbers)
        writer.writerow([job.name, *(job.typed.get(key, "") for key in settings), *values, job.state])
    return text.getvalue()


def as_markdown(jobs: Sequence[SweepJob]) -> str:
    """Lay jobs out for people."""
    head, *body = _cells(jobs, last="state")
    rows = [head, ["---", *["---:"] * (len(head) - 2), "---"], *body]
    return "".join("| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in row) + " |\n" for row in rows)


def _read_job(sweep: Path, folder: Path) -> SweepJob:
    try:
        listed = yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        listed = None
    typed = typed_settings([str(each) for each in listed]) if isinstance(listed, list) else {}
    kl = None
    with suppress(EvoPressError):
        result = load_json(folder / "result.json")
        kl = held_out_kl(own_row(result) or {})[1] if isinstance(result, Mapping) else None
    fitness = None
    with suppress(EvoPressError):
        fitness = number(read_document(folder / "finished.json", what="list of finished stages").get("fitness"))
    state = "not finished" if finished_at(folder) is None else "finished"
    return SweepJob(_below(sweep, folder), typed, None if kl is None else float(kl), fitness, state)


def _cells(jobs: Sequence[SweepJob], *, last: str) -> list[list[str]]:
    """Return the head and a row for each job; jobs whose folders are named by their settings are not named again."""
    settings, numbers = columns(jobs), _measured(jobs)
    named = not settings or not all("=" in job.name for job in jobs)
    rows = [["job", *settings, *(header for header, _ in numbers), last]]
    for job in jobs:
        values = ("" if (value := of(job)) is None else significant(value) for _, of in numbers)
        rows.append([job.name, *(job.typed.get(key, "") for key in settings), *values, job.state])
    return rows if named else [row[1:] for row in rows]


def _measured(jobs: Sequence[SweepJob]) -> list[tuple[str, Callable[[SweepJob], float | None]]]:
    """Return the columns of numbers, header and where a job has it; that of the fitness where a sweeper has tuned by it."""
    tuned = any(job.fitness is not None for job in jobs)
    return [*([("fitness", lambda job: job.fitness)] if tuned else []), ("held-out KL", lambda job: job.kl)]


def _below(sweep: Path, job: Path) -> str:
    sweep, job = sweep.resolve(), job.resolve()
    return job.relative_to(sweep).as_posix() if job.is_relative_to(sweep) else str(job)


def _natural(name: str) -> list[tuple[float, str]]:
    """Sort "2" before "10", "seed-2" before "seed-10", and "bits=2.25" before "bits=2.5"."""
    return [(float(part), "") if part[:1].isdigit() else (-1.0, part) for part in re.split(r"(\d+(?:\.\d+)?)", name)]
