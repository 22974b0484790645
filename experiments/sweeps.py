"""Read the job folders of a sweep, finished or not."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from evopress.config import config_folder, plain_dict, register
from evopress.earlier_versions import as_written_now, earlier_value, refine_without_later
from evopress.errors import EvoPressError
from evopress.reporting.jobs import NOT_COMPARED, read_jobs
from evopress.reporting.records import read_json
from evopress.result_settings import result_settings

OF_ROUNDING = ("model.device", "fitness.max_tokens_in_flight", "fitness.chunk_tokens")
"""Settings that decide what a job finds by its rounding alone."""
_FREE = ("seed", "evaluation.every", "evaluation.every_tokens", *OF_ROUNDING)
"""Settings that decide a result in which the jobs of one table may differ."""


@dataclass(frozen=True)
class Job:
    """One finished job."""

    folder: Path
    axes: dict[str, str]
    """What was swept, as typed: "sparsity" to "0.7", "search" (a config group) to "super_fast"."""
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
    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    return _product([f"{key}={value}" for key, value in params.items()])


def any_sweep(folder: Path) -> Sweep:
    """Read the jobs in the folder of any sweep; what was swept, or typed otherwise for some of the jobs, are the axes.

    So are settings in which jobs differ though nobody typed them: defaults of another version.

    Raises: EvoPressError if there is no job, or two are the same.
    """
    typed = [job.typed for job in read_jobs(folder)]
    asked = _asked_for(folder)
    jobs = [*asked, *(dict(each) for each in typed)]
    if not jobs:
        raise EvoPressError(f"no job of a sweep lies in {folder}: give the folder that hydra.sweep.dir names")
    keys = list(dict.fromkeys(key for job in jobs for key in job if key.split(".")[0] not in NOT_COMPARED and key != "stages"))
    axes = [key for key in keys if len({job.get(key) for job in jobs}) > 1]
    wanted = [{key: job[key] for key in axes} for job in asked if all(key in job for key in axes)]
    expected = list(map(dict, dict.fromkeys(tuple(job.items()) for job in wanted)))
    if not (untyped := _untyped_axes(folder, axes)):
        return read_sweep(folder, expected, keys=axes, alike=False)
    sweep = read_sweep(folder, (), keys=[*axes, *untyped], alike=False)
    there = [{key: job.axes[key] for key in axes} for job in sweep.jobs]
    return replace(sweep, missing=tuple(each for each in expected if each not in there))


def _untyped_axes(folder: Path, axes: Sequence[str]) -> list[str]:
    """Return the settings in which jobs of the same axes differ, whatever their seeds; of a choice its name if that says all."""
    settings: list[tuple[tuple[str, ...], dict[str, Any]]] = []
    found: list[str] = []
    for path in sorted(folder.glob("**/.hydra/overrides.yaml")):
        with suppress(EvoPressError):
            job = read_job(path.parent.parent, axes)
            place = tuple(value for key, value in job.axes.items() if key != "seed")
            settings.append(
                (place, {key: value for key, value in _flat(result_settings(_resolved(job))) if not _within(key, set(_FREE))})
            )
    while True:
        first: dict[tuple[str, ...], dict[str, Any]] = {}
        for place, mine in settings:
            there = first.setdefault((*place, *(repr(mine.get(key)) for key in found)), mine)
            keys = _in_order((there.keys() | mine.keys()) - set(found))
            if (key := next((key for key in keys if there.get(key) != mine.get(key)), None)) is not None:
                found.append(key)
                break
        else:
            return found


def _in_order(keys: Iterable[str]) -> list[str]:
    """Sort settings by their names, but that of a choice before all that it decides."""
    return sorted(keys, key=lambda key: (not key.endswith(".name"), key))


def command_of_folder(folder: Path) -> str:
    """Return the command that goes on with the sweep of a folder, as Hydra keeps it; nothing where it does not."""
    try:
        overrides = _typed(OmegaConf.load(folder / "multirun.yaml"))
    except (OSError, ValueError, AttributeError, YAMLError, OmegaConfBaseException):
        return ""
    return f"python -m evopress -m {shlex.join([*overrides, f'hydra.sweep.dir={folder}'])}" if overrides else ""


def _typed(config: Any) -> list[str]:
    return [str(each) for each in OmegaConf.select(config, "hydra.overrides.task") or ()]


def _asked_for(folder: Path) -> list[dict[str, str]]:
    """Return what was typed for each job that the sweep of a folder was started with last, as Hydra keeps it."""
    path = folder / "multirun.yaml"
    try:
        config = OmegaConf.load(path)
        overrides = _typed(config)
        params = OmegaConf.to_container(OmegaConf.select(config, "hydra.sweeper.params") or OmegaConf.create({}))
        assert isinstance(params, dict)
        typed = {override.lstrip("+").partition("=")[0] for override in overrides}
        return _product([*(f"{key!s}={value!s}" for key, value in params.items() if key not in typed), *overrides])
    except (OSError, ValueError, AttributeError, YAMLError, OmegaConfBaseException, HydraException):
        return []  # there is none, or it is another's: the jobs that are there say what was swept


def _product(overrides: Sequence[str]) -> list[dict[str, str]]:
    """Return what is typed for each job of a sweep, in the order in which they run."""
    parser = OverridesParser.create()
    choices: list[list[tuple[str, str]]] = []
    for override in map(parser.parse_override, overrides):
        values = override.sweep_string_iterator() if override.is_sweep_override() else [override.get_value_element_as_str()]
        choices.append([(override.key_or_group, each.strip("'\"")) for each in values])
    return [dict(each) for each in itertools.product(*choices)]


def read_sweep(
    folder: Path, expected: Sequence[Mapping[str, str]], *, keys: Sequence[str] | None = None, alike: bool = True
) -> Sweep:
    """Read all jobs under a folder.

    Args:
        expected: axes of the jobs that the experiment asks for; the first one's keys say what is swept.
        keys: what is swept, where nothing need be expected.
        alike: refuse jobs that differ in what was not swept.

    Returns: the jobs in the order in which the experiment runs them, others after them.
    Raises: EvoPressError if two jobs have the same axes, or differ in settings that were not swept.
    """
    keys = list(expected[0]) if keys is None else list(keys)
    jobs: dict[tuple[str, ...], Job] = {}
    unfinished = []
    for path in sorted(folder.glob("**/.hydra/overrides.yaml")):
        try:
            job = read_job(path.parent.parent, keys)
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
    if alike:
        _check_alike(found, keys)
    missing = tuple(dict(axes) for axes in expected if tuple(axes[key] for key in keys) not in jobs)
    return Sweep(found, tuple(unfinished), missing)


def describe(axes: Mapping[str, str]) -> str:
    """Write axes as they are typed: "sparsity=0.7 seed=1"."""
    return " ".join(f"{key}={value}" for key, value in axes.items())


def setting(job: Job, key: str) -> Any:
    """Return a setting of a job with its interpolations resolved: "search.tokens" as the numbers that were used."""
    register()  # of what scales numbers
    value = OmegaConf.select(OmegaConf.create(job.config), key)
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def read_results(folder: Path) -> dict[str, Any]:
    """Read the results of one job; raise EvoPressError if it has none yet or they cannot be read."""
    if not (folder / "result.json").is_file():
        raise EvoPressError("not evaluated yet")
    result = read_json(folder / "result.json")
    if not isinstance(result, dict) or not result.get("rows"):
        raise EvoPressError("not evaluated yet")
    return result


def read_job(folder: Path, keys: Sequence[str]) -> Job:
    """Read one job; raise EvoPressError if it has no results yet, or they or its config cannot be read."""
    result = read_results(folder)
    try:
        config = OmegaConf.load(folder / ".hydra" / "config.yaml")
        assert isinstance(config, DictConfig)
        parser = OverridesParser.create()
        lines = as_written_now([str(line) for line in OmegaConf.load(folder / ".hydra" / "overrides.yaml")])
        overrides = [parser.parse_override(line) for line in lines]
    except (OSError, ValueError, TypeError, AssertionError, YAMLError, OmegaConfBaseException, HydraException) as error:
        raise EvoPressError(f"{folder / '.hydra'} does not say what it is: config.yaml or overrides.yaml is damaged") from error
    typed = {override.key_or_group: override.get_value_element_as_str().strip("'\"") for override in overrides}
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
    path, parent = folder / ".hydra" / "hydra.yaml", key.rpartition(".")[0]
    is_setting = "/" not in key and (not parent or OmegaConf.select(config, parent) is not None)
    chosen = OmegaConf.select(config, key, default=earlier_value(key)) if is_setting else None
    if is_setting and not OmegaConf.is_dict(chosen):  # which is a group
        return f"[{','.join(map(str, chosen or ()))}]" if OmegaConf.is_list(chosen) else str(chosen)
    options = OmegaConf.select(OmegaConf.load(path), "hydra.runtime.choices") if path.is_file() else None
    written = as_written_now([f"{group}={option}" for group, option in (options or {}).items()])
    choices = {group: option for group, _, option in (line.partition("=") for line in written)}
    if key in choices:
        return choices[key]
    name = key if key.endswith(".name") else f"{key.replace('/', '.')}.name"  # of a choice that earlier versions did not have
    if (chosen := OmegaConf.select(config, name, default=earlier_value(name))) is None:
        raise EvoPressError(f"{folder / '.hydra'} does not say which {key} it is")
    return str(chosen)


def _decided(key: str) -> set[str]:
    """Return the settings that an axis decides: itself, and the number that a scale makes of the paper's."""
    return {key, key.replace("search.paper.", "search.")}


def _check_alike(jobs: Sequence[Job], keys: Sequence[str]) -> None:
    """Raise EvoPressError if jobs differ in more than what was swept."""
    free = {name for key in keys for name in _decided(key)}
    settings, folders = [_resolved(job) for job in jobs], [job.folder for job in jobs]
    check_settings_alike(folders, settings, free)
    refined = [place for place, each in enumerate(settings) if "refine" in (each.get("stages") or ())]
    told = [settings[place] for place in refined]
    decisive = [{"refine": refine_without_later(each.get("refine") or {})} for each in told]
    _refuse_others([folders[place] for place in refined], decisive, told, free)


def check_settings_alike(folders: Sequence[Path], settings: Sequence[Mapping[str, Any]], free: Collection[str]) -> None:
    """Raise EvoPressError if runs of one table differ in settings that decide their results.

    Args:
        settings: of each folder's run, interpolations resolved.
        free: names of settings and groups in which they may, beside the seed and how a run is looked at.
    """
    _refuse_others(folders, [result_settings(each) for each in settings], settings, free)


def _refuse_others(
    folders: Sequence[Path], decisive: Sequence[Mapping[str, Any]], told: Sequence[Mapping[str, Any]], free: Collection[str]
) -> None:
    """Raise EvoPressError if a run differs from the first one in a decisive setting that is not free; say it as it was told."""
    values = [{key: value for key, value in _flat(each) if not _within(key, (*_FREE, *free))} for each in decisive]
    for place, mine in enumerate(values):
        for key in (key for key in _in_order(values[0].keys() | mine.keys()) if mine.get(key) != values[0].get(key)):
            here, there = (dict(_flat(told[each])).get(key, earlier_value(key)) for each in (place, 0))
            raise EvoPressError(
                f"the runs are not of one table: {key} is {there} in {folders[0]} and {here} in {folders[place]}; leave "
                "one of them out, or move it away"
            )


def _resolved(job: Job) -> dict[str, Any]:
    """Return the config of a job with its interpolations resolved; as it is where something that they name is not there."""
    register()  # of what scales numbers
    try:
        return plain_dict(OmegaConf.create(job.config))
    except OmegaConfBaseException:
        return job.config


def _within(key: str, names: Iterable[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
