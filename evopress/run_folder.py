"""The folder of a run: one run at a time, what a killed one left behind cleared away, and the overrides to go on with."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml
from filelock import FileLock, Timeout

from evopress.errors import EvoPressError
from evopress.files import explained, remove_empty, write_bytes
from evopress.reporting.records import read_document, write_json

LOCK = ".lock"
"""Held while a run is at work; the kernel frees it when the process ends, however it ends, so a file that is left means nothing."""
_INSIDE = ("", "*/", "points/*/", "points/*/*/", "genomes/*/", "genomes/*/*/")
"""Where a run writes, but not where other runs may lie whose folder is inside this one."""
_OVERRIDES = Path(".hydra", "overrides.json")
ANY_JOB = re.compile(r"(hydra|stages|resume|dry_run|tracker|paths|export|export_options|archive|threads|level_db)([./@].*)?")
"""Settings that a job's folder is not named by: what it finds does not depend on them."""
_PLAIN, _LIST = re.compile(r"[\w.-]+"), re.compile(r"\[([\w.-]+(,[\w.-]+)*)?\]")
_LONGEST_NAME = 120


class TakenError(EvoPressError):
    """Another run is at work in a folder."""


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a run folder for one run, and clear away the temporary files of an earlier one that was killed.

    Enter it before any logging. A run that is refused leaves the folder as it was; one that is refused because another is at work
    there has not touched it.

    Raises: TakenError if another run is at work there, EvoPressError if the folder cannot be written to.
    """
    lock, had_one = FileLock(folder / LOCK), (folder / LOCK).exists()
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise TakenError(
            f"another run is at work in {folder}: wait for its end, or give this one a folder of its own (hydra.run.dir=DIR)"
        ) from None
    except OSError as error:
        raise explained(error, folder / LOCK) from error
    try:
        with _refusals_taken_back(folder, made=() if had_one else (LOCK,)):
            for path in [path for inside in _INSIDE for path in folder.glob(f"{inside}.*.tmp") if not _of_another(path, folder)]:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
            yield
    finally:
        lock.release()


def _of_another(path: Path, folder: Path) -> bool:
    """Tell whether a file in a folder is of a run whose own folder is inside it."""
    inside = path.relative_to(folder).parent.parts
    return any((folder.joinpath(*inside[:depth]) / LOCK).exists() for depth in range(1, len(inside) + 1))


def holds_a_run(folder: Path) -> bool:
    """Tell whether a run has left its settings in the folder."""
    return any((folder / _OVERRIDES).with_suffix(suffix).is_file() for suffix in (".json", ".yaml"))


def looks_aside(folder: Path, overrides: Sequence[str]) -> bool:
    """Tell whether a run that is resumed names a genome that is not its own, or one of its budgets: for that command alone."""
    genomes = [override for override in overrides if override.startswith(("genome=", "pick="))]
    return bool(genomes) and genomes[-1] not in (_overrides_in(folder) or [])


def keep_config(folder: Path, composed: Mapping[str, str]) -> None:
    """Keep the composed config of a run, name to YAML.

    Hydra would write the same files (hydra.output_subdir), but before anybody could refuse the run whose folder it is.
    """
    (folder / _OVERRIDES).parent.mkdir(exist_ok=True)
    for name, text in composed.items():
        write_bytes(folder / _OVERRIDES.with_name(name), text.encode())


def keep_overrides(folder: Path, overrides: Sequence[str], *, defaults: Sequence[str] = ()) -> None:
    """Keep the overrides of a run that begins; a run that was refused leaves those of Hydra's form alone.

    Args: defaults: those of them that nobody typed, the defaults of the earlier version that began the run.
    """
    (folder / _OVERRIDES).parent.mkdir(exist_ok=True)
    also = {"defaults": list(defaults)} if defaults else {}
    write_json(folder / _OVERRIDES, {"schema": 1, "overrides": list(overrides), **also})


def kept_defaults(folder: Path) -> list[str]:
    """Return the overrides of the folder's run that nobody typed, as `keep_overrides` was told them."""
    with suppress(EvoPressError):
        defaults = read_document(folder / _OVERRIDES, what="list of overrides").get("defaults")
        return [str(each) for each in defaults] if isinstance(defaults, list) else []
    return []


def typed_in(folder: Path) -> list[str] | None:
    """Return the overrides that were typed for a folder's run, in either form; None if there are none that can be read."""
    there, defaults = _overrides_in(folder), kept_defaults(folder)
    return None if there is None else [override for override in there if override not in defaults]


def is_job_of(folder: Path, overrides: Sequence[str]) -> bool:
    """Tell whether a folder's run is the job with these overrides: of the same settings, whatever the order."""
    return (there := typed_in(folder)) is not None and _name(there) == _name(overrides)


def kept_overrides(folder: Path) -> list[str] | None:
    """Return the overrides that a run in the folder began with; None if none did."""
    if not (folder / _OVERRIDES).is_file():
        return None
    overrides = read_document(folder / _OVERRIDES, what="list of overrides").get("overrides")
    if not isinstance(overrides, list) or not all(isinstance(override, str) for override in overrides):
        raise EvoPressError(
            f"{folder / _OVERRIDES} is not a list of overrides: remove it, {folder / '.hydra' / 'overrides.yaml'} has them"
        )
    return overrides


def own_stages(overrides: Sequence[str]) -> str | None:
    """Return the override that says a run's stages; None: it was given none, and has all."""
    return next((each for each in reversed(overrides) if each.startswith("stages=")), None)


def kept_with_own_stages(folder: Path, overrides: Sequence[str]) -> list[str]:
    """Return overrides with the stages that the folder's run was begun with in the place of a later command's."""
    if (before := _overrides_in(folder)) is None:
        return list(overrides)
    own = own_stages(before)
    return [*(each for each in overrides if not each.startswith("stages=")), *([own] if own is not None else [])]


def without_options_of_others(overrides: Sequence[str], formats: str) -> list[str]:
    """Return overrides without `export_options` of formats that a later command does not name.

    Args: formats: the value of its `export`: "[mlx,gguf]".
    """
    named = set(re.findall(r"[\w-]+", formats))
    options = (re.match(r"\+*export_options\.([\w-]+)", each) for each in overrides)
    return [each for each, option in zip(overrides, options, strict=True) if option is None or option[1] in named]


def command_of(folder: Path, overrides: Sequence[str]) -> str:
    """Return the command that makes the folder's run again; where a later one looks aside (`looks_aside`), that one follows.

    Args: overrides: of the command that is at work.
    """
    resumed = any(each.startswith("resume=") for each in overrides)
    later = [each for each in overrides if each.startswith(("genome=", "pick="))] if looks_aside(folder, overrides) else []
    kept = kept_with_own_stages(folder, overrides) if resumed else overrides
    own = [each for each in kept if not each.startswith("resume=") and not (resumed and each in later)]
    commands = [own, ["resume=RUN_FOLDER", *later]] if resumed and later else [own]
    return " && ".join(f"python -m evopress {shlex.join(each)}".strip() for each in commands)


def second_pass_of(folder: Path, overrides: Sequence[str], *, by_default: bool) -> str:
    """Return what follows `command_of` where weights were refined, beginning with `&&`; nothing where that refines them itself.

    Args:
        overrides: of the command that is at work.
        by_default: a run that names no stages refines.
    """
    resumed = any(each.startswith("resume=") for each in overrides)
    own = own_stages(kept_with_own_stages(folder, overrides) if resumed else overrides)
    if by_default if own is None else "refine" in re.findall(r"\w+", own):
        return ""
    picked = [each for each in overrides if each.startswith("pick=")] if looks_aside(folder, overrides) else []
    again = ["resume=RUN_FOLDER", *picked, "stages=[refine,evaluate,export,report]"]
    return f" && python -m evopress {shlex.join(again)}"


def job_folder(overrides: Sequence[str], sweep: Path) -> str:
    """Return the subfolder of a sweep for the job with these overrides, named by them: "bits=2.25,method=quant,seed=0".

    The same settings have the same folder, others another one, whatever the order in which they are given. Where an earlier version
    numbered its jobs, or named them by more, those of the same settings keep their folders.
    """
    name = _name(overrides)
    for folder in () if (sweep / name).is_dir() else sorted(sweep.glob("*")):
        named = folder.name.isdecimal() or "=" in folder.name
        if named and is_job_of(folder, overrides):
            return folder.name
    return name


def _name(overrides: Sequence[str]) -> str:
    """Name settings so that any file system takes it; where that loses something, digits of a digest stand for it."""
    settings = {key.lstrip("+~"): value for key, _, value in (override.partition("=") for override in overrides)}
    parts, exact = [], True
    for key, value in sorted(settings.items()):
        if ANY_JOB.fullmatch(key):
            continue
        if _LIST.fullmatch(value):
            items = value.strip("[]").split(",")
            value = f"{items[0]}+" if len(items) == 1 and items[0] else "+".join(items)
        elif not _PLAIN.fullmatch(value):
            value, exact = re.sub(r"[^\w.+-]+", "-", value).strip("-"), False
        parts.append(f"{key.replace('/', '.')}={value}")
    name = ",".join(parts) or "job"
    if exact and len(name.encode()) <= _LONGEST_NAME:
        return name
    told = sorted(f"{key}={value}" for key, value in settings.items() if not ANY_JOB.fullmatch(key))
    digits = hashlib.sha256("\n".join(told).encode()).hexdigest()[:8]
    return f"{name.encode()[: _LONGEST_NAME - 9].decode(errors='ignore')}-{digits}"


def _overrides_in(folder: Path) -> list[str] | None:
    """Return the overrides that a folder's run was given, in either form; None if there are none that can be read."""
    with suppress(EvoPressError, OSError, ValueError, yaml.YAMLError):
        if (kept := kept_overrides(folder)) is not None:
            return kept
        listed = yaml.safe_load((folder / _OVERRIDES).with_suffix(".yaml").read_text(encoding="utf-8"))
        return [str(override) for override in listed] if isinstance(listed, list) else None
    return None


@contextmanager
def _refusals_taken_back(folder: Path, made: Collection[str] = ()) -> Iterator[None]:
    """Let a folder be what it was if a run is refused it, with the log that it had, or not there.

    Args: made: names of what this run has put there already.
    """
    sizes = {path: path.stat().st_size for path in folder.glob("*.log")}
    there = {path.name for path in folder.glob("*") if sizes.get(path) != 0} - set(made)  # Hydra has made an empty log
    settings = folder / _OVERRIDES
    before = _changed(settings)
    try:
        yield
    except Exception as error:
        if _changed(settings) == before:  # it never began
            for path, size in sizes.items():
                with suppress(OSError):
                    os.truncate(path, size)
            if isinstance(error, EvoPressError):
                _remove_made(folder, there)
        raise


def _remove_made(folder: Path, there: Collection[str]) -> None:
    """Remove what a refused run has made in a folder beside what was there, and the folder if nothing else is in it."""
    for name in (".hydra", "environment.json", LOCK, *(path.name for path in folder.glob("*.log"))):
        if name not in there:
            shutil.rmtree(folder / name, ignore_errors=True)
            with suppress(OSError):
                (folder / name).unlink()
    remove_empty(folder)


def _changed(path: Path) -> tuple[int, int]:
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else (0, 0)
