"""Read the job folders of a sweep, finished or not."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from evopress.config import config_folder, register
from evopress.errors import EvoPressError
from evopress.reporting.records import read_json

_FREE = ("resume", "stages", "tracker", "paths", "level_db", "threads", "seed")
"""Settings in which the jobs of one table may differ."""


@dataclass(frozen=True)
class Job:
    """One finished job."""

    folder: Path
    axes: dict[str, str]
    """What was swept, as typed: "sparsity" to "0.7", "search/mutation" (a config group) to "constant_3"."""
    config: dict[str, Any]
    result: dict[str, Any]
    environment: dict[str, Any]


@dataclass(frozen=True)
class Sweep:
    """What there is of a sweep."""

    jobs: tuple[Job, ...]
    unfinished: tuple[tuple[Path, str], ...]
    """Folders without a table of results, and why."""
    missing: tuple[dict[str, str], ...]
    """Axes of the jobs that the experiment asks for and that are not finished."""


def expected_jobs(experiment: str) -> list[dict[str, str]]:
    """Return the axes of all jobs of `conf/experiment/<experiment>.yaml`, in the order in which they run."""
    config = OmegaConf.load(config_folder() / "experiment" / f"{experiment}.yaml")
    parser = OverridesParser.create()
    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    choices: list[list[tuple[str, str]]] = []
    for key, value in params.items():
        override = parser.parse_override(f"{key}={value}")
        values = override.sweep_string_iterator() if override.is_sweep_override() else [override.get_value_element_as_str()]
        choices.append([(str(key), each) for each in values])
    return [dict(each) for each in itertools.product(*choices)]


def read_sweep(folder: Path, expected: Sequence[Mapping[str, str]]) -> Sweep:
    """Read all jobs under a folder.

    Args: expected: axes of the jobs that the experiment asks for; the first one's keys say what is swept.

    Returns: the jobs in the order in which the experiment runs them, others after them.
    Raises: EvoPressError if two jobs have the same axes, or differ in settings that were not swept.
    """
    keys = list(expected[0])
    jobs: dict[tuple[str, ...], Job] = {}
    unfinished = []
    for path in sorted(folder.glob("**/.hydra/overrides.yaml")):
        try:
            job = _read_job(path.parent.parent, keys)
        except EvoPressError as error:
            unfinished.append((path.parent.parent, str(error)))
            continue
        place = tuple(job.axes[key] for key in keys)
        if place in jobs:
            raise EvoPressError(
                f"{jobs[place].folder} and {job.folder} are the same job ({describe(job.axes)}): move one of them out of {folder}"
            )
        jobs[place] = job
    order = [tuple(axes[key] for key in keys) for axes in expected]
    places = sorted(jobs, key=lambda place: order.index(place) if place in order else len(order))
    found = tuple(jobs[place] for place in places)
    _check_alike(found, keys)
    missing = tuple(dict(axes) for axes in expected if tuple(axes[key] for key in keys) not in jobs)
    return Sweep(found, tuple(unfinished), missing)


def describe(axes: Mapping[str, str]) -> str:
    """Write axes as they are typed: "sparsity=0.7 seed=1"."""
    return " ".join(f"{key}={value}" for key, value in axes.items())


def setting(job: Job, key: str) -> Any:
    """Return a setting of a job with its interpolations resolved: "search.tokens" as the numbers that were used."""
    register()  # of `scaled`
    value = OmegaConf.select(OmegaConf.create(job.config), key)
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _read_job(folder: Path, keys: Sequence[str]) -> Job:
    """Read one job; raise EvoPressError if it has no results yet or they cannot be read."""
    if not (folder / "result.json").is_file():
        raise EvoPressError("not evaluated yet")
    result = read_json(folder / "result.json")
    if not isinstance(result, dict) or not result.get("rows"):
        raise EvoPressError("not evaluated yet")
    config = OmegaConf.load(folder / ".hydra" / "config.yaml")
    assert isinstance(config, DictConfig)
    parser = OverridesParser.create()
    overrides = [parser.parse_override(str(line)) for line in OmegaConf.load(folder / ".hydra" / "overrides.yaml")]
    typed = {override.key_or_group: override.get_value_element_as_str() for override in overrides}
    axes = {key: typed[key] if key in typed else _chosen(folder, config, key) for key in keys}
    environment = folder / "environment.json"
    plain = OmegaConf.to_container(config)
    assert isinstance(plain, dict)
    return Job(
        folder,
        axes,
        {str(key): value for key, value in plain.items()},
        result,
        read_json(environment) if environment.is_file() else {},
    )


def _chosen(folder: Path, config: DictConfig, key: str) -> str:
    """Return what a job that was not told has for an axis: its setting, or the option of a config group."""
    if "/" not in key:
        return str(OmegaConf.select(config, key))
    path = folder / ".hydra" / "hydra.yaml"
    choices = OmegaConf.select(OmegaConf.load(path), "hydra.runtime.choices") if path.is_file() else None
    if not choices or key not in choices:
        raise EvoPressError(f"{folder / '.hydra'} does not say which {key} it is")
    return str(choices[key])


def _decided(key: str) -> set[str]:
    """Return the settings that an axis decides: itself, or what the options of a config group set."""
    if "/" not in key:
        return {key}
    package = key.rpartition("/")[0].replace("/", ".")  # where such options go: search/mutation to search
    options = [OmegaConf.load(path) for path in (config_folder() / key).glob("*.yaml")]
    return {f"{package}.{name!s}" for option in options if isinstance(option, DictConfig) for name in option}


def _check_alike(jobs: Sequence[Job], keys: Sequence[str]) -> None:
    """Raise EvoPressError if jobs differ in more than what was swept."""
    free = {*_FREE, *(name for key in keys for name in _decided(key))}
    settings = [{key: value for key, value in _flat(job.config) if not _within(key, free)} for job in jobs]
    for job, mine in zip(jobs, settings, strict=True):
        for key in settings[0].keys() | mine.keys():
            here, there = mine.get(key), settings[0].get(key)
            if here != there:
                raise EvoPressError(
                    f"the jobs are not of one sweep: {key} is {there} in {jobs[0].folder} and {here} in {job.folder}; move one of "
                    "them away"
                )


def _within(key: str, names: set[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
