"""Folders that a command's runs go to: as people see them, as they type them, as Hydra takes them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evopress import config as configuration
from evopress.errors import EvoPressError
from evopress.files import given_path, shown_path
from evopress.launching.command import Command

_RUNNING = ("-m", "--multirun", "-r", "--run")
"""Flags with which there will be a run."""


def typed(path: str | Path) -> str:
    """Return a path as it is shown, or whole where that would be read as something else."""
    as_shown = shown_path(path)
    return os.path.abspath(path) if as_shown.startswith(("~", "'", '"')) or as_shown.lower() in ("null", "???") else as_shown


def check_folder(arguments: list[str]) -> None:
    """Raise EvoPressError if the folder that runs or sweeps go to cannot be made; the last one that is named counts."""
    if any(argument.startswith("-") and argument not in _RUNNING for argument in arguments):
        return  # `--help` and the like make no folder
    named = [argument for argument in arguments if argument.startswith(("hydra.run.dir=", "hydra.sweep.dir="))]
    given = configuration.value_of(named[-1]) if named else "multirun"
    if given is None or "${" in given:  # for Hydra to say
        return
    key = named[-1].partition("=")[0] if named else ""
    folder = given_path(given, key)
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    what = "is no folder"
    if nearest.is_dir():
        try:
            with tempfile.TemporaryDirectory(dir=nearest):
                return
        except OSError as error:
            what = f"may not be written to ({error.strerror})"
    if named:
        raise EvoPressError(f"{key}={folder} cannot be made, {nearest} {what}: choose another folder")
    raise EvoPressError(
        f"no run folder can be made, {nearest} {what}: start in another folder, or name one with hydra.run.dir=DIR, or "
        "hydra.sweep.dir=DIR for a sweep"
    )


@contextmanager
def named_for_hydra(command: Command, arguments: list[str]) -> Iterator[list[str]]:
    """Give the folder of a resumed run another name for Hydra if its own has "${", which Hydra resolves wherever it stands."""
    key = "hydra.run.dir="
    folder = next((configuration.value_of(argument) for argument in reversed(arguments) if argument.startswith(key)), None)
    if folder is None or "${" not in folder:
        yield arguments
        return
    with tempfile.TemporaryDirectory(prefix="evopress-") as links:
        link = Path(links, "run")
        link.symlink_to(Path(folder).absolute())
        command.folders[link] = Path(folder)
        yield [*(argument for argument in arguments if not argument.startswith(key)), configuration.override(key[:-1], str(link))]
