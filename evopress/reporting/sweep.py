"""Tell from a run folder which sweep it is a job of, and which experiment that is. Standard library only."""

from __future__ import annotations

import re
from pathlib import Path

_DEPTH = 3
"""A job's folder lies at most this deep below its sweep's."""
_EXPERIMENT = re.compile(r"""^\s*-\s*['"]?\+?experiment=([\w.-]+)""", re.MULTILINE)
_SEED = re.compile(r"seed[-=_]?\d+")
_DAY = re.compile(r"\d{4}-\d{2}-\d{2}")


def sweep_folder(run_dir: Path) -> Path | None:
    """Return the folder of the sweep that a run is a job of (Hydra leaves `multirun.yaml` there), or None; resumed jobs count."""
    above = list(Path(run_dir).resolve().parents)[:_DEPTH]
    return next((folder for folder in above if (folder / "multirun.yaml").is_file()), None)


def sweep_name(run_dir: Path) -> str | None:
    """Return the name of a run's sweep: its folder's, with the day before it where the folder is named by the time."""
    folder = sweep_folder(run_dir)
    if folder is None:
        return None
    return f"{folder.parent.name}_{folder.name}" if _DAY.fullmatch(folder.parent.name) else folder.name


def job_name(run_dir: Path) -> str | None:
    """Return what tells a job from the others of its sweep: its folder below the sweep's, "seed-0"; None for a run of its own."""
    folder = sweep_folder(run_dir)
    return None if folder is None else Path(run_dir).resolve().relative_to(folder).as_posix()


def experiment_name(run_dir: Path) -> str | None:
    """Return the experiment that a run's command named (`+experiment=table4`), or None."""
    try:
        text = (Path(run_dir) / ".hydra" / "overrides.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    found = _EXPERIMENT.search(text)
    return found[1] if found else None


def tracked_as(run_dir: Path, *, method: str, key: str, target: float | str, seed: int) -> tuple[str, str, list[str]]:
    """Return what a run is called by trackers: its name ("quant-2.5-seed0"), its group, and its tags but for the experiment.

    Jobs of a sweep are of one group and have their folder's name beside, where that says more than the seed; other runs of one
    method and target are of one group.

    Args: key: what the target is of, "bits", "sparsity" or "size"; others, such as "max_kl", are in the name.
    """
    said = target if isinstance(target, str) else f"{target:g}"
    of, job = f"{method}-{said if key in ('bits', 'sparsity', 'size', 'budgets') else f'{key}-{said}'}", job_name(run_dir)
    name = f"{of}-seed{seed}"
    if job is not None and not _SEED.fullmatch(job):
        name += f" {job}"
    return name, sweep_name(run_dir) or of, [method, f"{key}={said}"]
