"""The one Hydra entry point: let Hydra compose the config and run the jobs, and say what is wrong in one sentence."""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from evopress import command_line, launching, ranks
from evopress import config as configuration
from evopress.endings import exit_code, silenced_without_reader, stopping_at_signals
from evopress.errors import EvoPressError
from evopress.files import explained
from evopress.launching.command import Command, say_error
from evopress.launching.folders import check_folder, named_for_hydra
from evopress.launching.job import run_job
from evopress.launching.processes import joined
from evopress.launching.resume import resumed_folder, with_resumed
from evopress.reporting import jobs

_NO_FOLDER = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG}
"""Why a job's folder cannot be made."""


def main() -> None:
    """Run the command line: `python -m evopress +method=quant bits=2.5`. Exits with 1 after a user's error."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    configuration.register()
    launching.register()
    command = Command(os.getpid())

    def job(config: DictConfig) -> float:
        return run_job(command, config)

    jobs.had_none()  # of an earlier command in this process
    entry = hydra.main(version_base="1.3", config_path=str(configuration.config_folder()), config_name="config")(job)
    logging.raiseExceptions = False  # a log that cannot be written, on a full disk, is no reason for tracebacks
    if "--version" in sys.argv[1:]:
        if ranks.is_first():
            print(f"evopress {_version()}")
        sys.exit(0)
    try:
        with stopping_at_signals(), joined():
            if sentence := command_line.refused(sys.argv[1:], configuration.options(), is_sweep=configuration.is_sweep):
                raise EvoPressError(sentence)
            sys.argv[1:] = command_line.flags_first(command_line.with_numbers_shown(command_line.with_plus(sys.argv[1:])))
            sys.argv[1:] = [
                argument if argument.startswith("resume=") else command_line.prepared([argument])[0] for argument in sys.argv[1:]
            ]
            folder = resumed_folder(sys.argv[1:])
            if folder is not None:
                sys.argv[1:] = command_line.flags_first(with_resumed(sys.argv[1:], folder))
            check_folder(sys.argv[1:])
            with named_for_hydra(command, sys.argv[1:]) as sys.argv[1:]:
                _compose_and_run(entry)
    except EvoPressError as error:
        say_error(error)
        sys.exit(1)
    except KeyboardInterrupt as stop:  # between jobs, or before the first
        say_error("; ".join(["interrupted; resume with the same command, in the same folder", *getattr(stop, "__notes__", [])]))
        sys.exit(exit_code(stop))
    if jobs.had_none():
        say_error("this sweep has no job: what it sweeps over, such as a glob(...), matches nothing")
        sys.exit(1)
    sys.exit(1 if command.failures else 0)


def _is_of(package: str, error: Exception) -> bool:
    """Tell whether a package itself, such as Hydra, has raised an error; its `__file__` names it."""
    raised = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(raised).is_relative_to(Path(package).parent)


def _compose_and_run(entry: Callable[[], None]) -> None:
    """Let Hydra compose the config and run the jobs; what it refuses is one sentence, and a bug shows its whole traceback."""
    asked = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # then Hydra raises its errors, instead of printing them in its own words
    try:
        entry()
    except (HydraException, OmegaConfBaseException) as error:
        if asked == "1":
            raise
        failed = isinstance(error, configuration.JobFailedError)
        say_error(f"a job failed: {error}" if failed else command_line.told(error, configuration.options()))
        sys.exit(1)
    except YAMLError as error:  # of the user's own config
        place = getattr(error, "problem_mark", None)
        where = f"{place.name}, line {place.line + 1}," if place else "a config file"
        say_error(f"{where} is no YAML ({getattr(error, 'problem', None) or 'it cannot be read'}): mend it")
        sys.exit(1)
    except EvoPressError:  # of a launcher
        raise
    except Exception as error:
        if isinstance(error, ValueError) and _is_of(
            hydra.__file__, error
        ):  # of flags that it does not take together, or as they are
            say_error(error)
            sys.exit(1)
        if isinstance(error, ValueError) and (optuna := sys.modules.get("optuna")) and _is_of(str(optuna.__file__), error):
            say_error(f"the sweeper has no result ({error}): mend what its jobs say, and give the same command again")
            sys.exit(1)
        if isinstance(error, BrokenPipeError) and silenced_without_reader():  # who has had enough: `--help | head`
            sys.exit(1)
        if isinstance(error, OSError) and error.errno in _NO_FOLDER and isinstance(error.filename, str):
            say_error(explained(error, Path(error.filename)))  # of the folder that Hydra makes
        else:
            traceback.print_exc()
        sys.exit(1)
    finally:
        jobs.show_jobs()  # of a sweep that Hydra did not bring to its end
        del os.environ["HYDRA_FULL_ERROR"]
        if asked is not None:
            os.environ["HYDRA_FULL_ERROR"] = asked


def _version() -> str:
    try:
        return version("evopress")
    except PackageNotFoundError:  # run from a clone that is not installed
        return "of a clone, not installed"


if __name__ == "__main__":
    main()
