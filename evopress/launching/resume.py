"""To go on with the run in a folder: its own overrides, and the defaults of the version that began it; the command that does so."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from evopress import command_line, run_folder
from evopress import config as configuration
from evopress.earlier_versions import as_written_now, defaults_of
from evopress.errors import EvoPressError, first_line
from evopress.files import given_path
from evopress.launching.folders import typed


def resumed_folder(arguments: list[str]) -> Path | None:
    """Return the run folder that `resume=RUN_FOLDER` names: as it is called, or else as Hydra would quote it."""
    named = next((argument.removeprefix("resume=") for argument in arguments if argument.startswith("resume=")), "")
    if named in ("", "null"):
        return None
    folder = given_path(named, "resume")
    meant = None if folder.exists() else configuration.value_of(f"resume={named}")
    return folder if meant is None else given_path(meant, "resume")


def with_resumed(arguments: list[str], folder: Path) -> list[str]:
    """Put an earlier run's own overrides before those on the command line, and let the run go on in its folder."""
    here = configuration.override("hydra.run.dir", os.path.abspath(folder))
    earlier = run_folder.kept_overrides(folder)
    if earlier is None:
        overrides = folder / ".hydra" / "overrides.yaml"
        if not overrides.is_file():
            raise EvoPressError(f"resume={folder} is not a run folder: expected {overrides}")
        earlier = _hydras_own(overrides)
        if not earlier:  # killed while Hydra wrote it
            raise EvoPressError(
                f"the run in {folder} was stopped before it saved its settings: repeat its whole command with {shlex.quote(here)}"
            )
    later = {argument.split("=", 1)[0] for argument in arguments} | {"resume", "dry_run"}
    if _has_finished(folder, earlier):  # one that was killed goes on with the stages that it was begun with
        later.add("stages")
    kept = [override for override in as_written_now(earlier) if override.split("=", 1)[0] not in later]
    if formats := next((argument.partition("=")[2] for argument in reversed(arguments) if argument.startswith("export=")), None):
        kept = run_folder.without_options_of_others(kept, formats)
    given = [argument for argument in arguments if not argument.startswith("resume=")]
    if both := command_line.two_targets(given, kept):
        target, instead = both
        otherwise = "give further ones of these, or " if instead.startswith("budgets=") else ""
        raise EvoPressError(f"{target} cannot be set for the run in {folder}, which has {instead}: {otherwise}leave it out")
    kept = [*command_line.prepared(kept), *_defaults_then(folder, given=[*kept, *given])]
    # hydra.mode: also where the experiment is a sweep
    return [*kept, *given, configuration.override("resume", typed(folder)), here, "hydra.mode=RUN"]


def earlier_defaults(folder: Path, overrides: Sequence[str]) -> list[str]:
    """Return overrides for the defaults that a folder's run has of an earlier version, but those that `overrides` give."""
    keys = {each.split("=", 1)[0].lstrip("+") for each in overrides}
    kept = [each for each in run_folder.kept_defaults(folder) if each.split("=", 1)[0] not in keys]
    return [*kept, *_defaults_then(folder, given=[*overrides, *kept])]


def _has_finished(folder: Path, overrides: list[str]) -> bool:
    """Tell whether a run has done the stages that it was begun with; those that have none of their own do all anyway."""
    from evopress.finished import read_finished  # seconds, which others need not wait for

    own, done = run_folder.own_stages(overrides), read_finished(folder).get("stages")
    return own is None or (isinstance(done, list) and set(configuration.list_of(own)) <= set(done))


def _defaults_then(folder: Path, *, given: list[str]) -> list[str]:
    """Return overrides for the defaults that a run of an earlier version had, but those that are given anyway."""
    keys = {argument.split("=", 1)[0].lstrip("+") for argument in given}
    try:
        config = OmegaConf.load(folder / ".hydra" / "config.yaml")
        changed = defaults_of(configuration.plain_dict(config), given) if isinstance(config, DictConfig) else {}
    except (OSError, ValueError, YAMLError, OmegaConfBaseException):  # what it then composes is compared with what it did
        return []
    return [f"{key}={'null' if value is None else value}" for key, value in changed.items() if key not in keys]


def _hydras_own(overrides: Path) -> list[str]:
    """Read the list of overrides that Hydra keeps of a run."""
    try:
        listed = OmegaConf.load(overrides)
    except (OSError, ValueError, YAMLError) as error:
        raise EvoPressError(
            f"{overrides} cannot be read ({first_line(error)}): give the whole command with hydra.run.dir instead"
        ) from error
    if not isinstance(listed, ListConfig):
        raise EvoPressError(f"{overrides} is not a list of overrides: repeat the whole command with hydra.run.dir instead")
    return [str(override) for override in listed]


def to_go_on(folder: Path) -> str:
    """Return the command that goes on with a run, as a shell takes it."""
    return f"python -m evopress resume={shlex.quote(typed(folder))}"


def to_go_on_with_sweep() -> str:
    """Return the command that goes on with the sweep that is at work in this process, as a shell takes it."""
    sweep = configuration.override("hydra.sweep.dir", typed(HydraConfig.get().sweep.dir))
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("hydra.sweep.dir=")]
    return f"python -m evopress {shlex.join([*arguments, sweep])} (jobs that are done are not run again)"
