"""The one Hydra entry point: compose, convert, hand over to the pipeline."""

from __future__ import annotations

import errno
import logging
import os
import select
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from evopress import command_line, launching, machine, ranks, run_folder
from evopress import config as configuration
from evopress.counted import HOW_IT_RUNS
from evopress.earlier_versions import as_written_now, defaults_of
from evopress.endings import exit_code, is_out_of_memory, of_the_disk, stopping_at_signals
from evopress.errors import EvoPressError
from evopress.files import explained, given_path
from evopress.reporting import jobs
from evopress.reporting.records import write_json
from evopress.settings import RunSettings

logger = logging.getLogger(__name__)
_failures: list[str] = []
_started_in = 0
"""Process of the command itself; a launcher's jobs run in others."""
_told_defaults: set[Path] = set()
"""Sweeps of which it was said that their jobs have not all the same defaults."""
_linked: dict[Path, Path] = {}
"""Links that Hydra knows folders by, to the folders."""
_NO_FOLDER = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG}
"""Why a job's folder cannot be made."""
_RUNNING = ("-m", "--multirun", "-r", "--run")
"""Flags with which there will be a run."""
_MEMORY_SETTINGS = (
    *("fitness.max_tokens_in_flight", "fitness.chunk_tokens", "level_db.batch_tokens", "level_db.cache_bytes"),
    *("data.calibration_tokens", "data.search_tokens"),
)
"""What memory grows with."""


def main() -> None:
    """Run the command line: `python -m evopress +method=quant bits=2.5`. Exits with 1 after a user's error."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    configuration.register()
    launching.register()
    global _started_in
    _started_in = os.getpid()
    _failures.clear()
    _told_defaults.clear()
    jobs.had_none()  # of an earlier command in this process
    entry = hydra.main(version_base="1.3", config_path=str(configuration.config_folder()), config_name="config")(_task)
    logging.raiseExceptions = False  # a log that cannot be written, on a full disk, is no reason for tracebacks
    if "--version" in sys.argv[1:]:
        if ranks.is_first():
            print(f"evopress {_version()}")
        sys.exit(0)
    try:
        with stopping_at_signals(), _among_others():
            if sentence := command_line.refused(sys.argv[1:], configuration.options(), is_sweep=configuration.is_sweep):
                raise EvoPressError(sentence)
            sys.argv[1:] = command_line.flags_first(command_line.with_numbers_shown(command_line.with_plus(sys.argv[1:])))
            sys.argv[1:] = [
                argument if argument.startswith("resume=") else command_line.prepared([argument])[0] for argument in sys.argv[1:]
            ]
            folder = _resumed_folder(sys.argv[1:])
            if folder is not None:
                sys.argv[1:] = command_line.flags_first(_with_resumed(sys.argv[1:], folder))
            _check_folder(sys.argv[1:])
            with _named_for_hydra(sys.argv[1:]) as sys.argv[1:]:
                _compose_and_run(entry)
    except EvoPressError as error:
        _say_error(error)
        sys.exit(1)
    except KeyboardInterrupt as stop:  # between jobs, or before the first
        _say_error("; ".join(["interrupted; go on with the same command, in the same folder", *getattr(stop, "__notes__", [])]))
        sys.exit(exit_code(stop))
    if jobs.had_none():
        _say_error("this sweep has no job: what it sweeps over, such as a glob(...), matches nothing")
        sys.exit(1)
    sys.exit(1 if _failures else 0)


@contextmanager
def _among_others() -> Iterator[None]:
    """Join the others if this is one of several processes; all but the first do what that one asks, and end with it.

    Raises: SystemExit in those others.
    """
    if not ranks.asked_for():
        yield
        return
    try:
        try:
            ranks.adopt_slurm_task()
            ranks.begin()
        except EvoPressError:
            if ranks.is_first():
                raise
            sys.exit(1)  # the first one says it
        if ranks.leads():
            yield
            return
        _follow()
    finally:
        ranks.end()
    sys.exit(0)


def _follow() -> None:
    """Do this process's share until the first one ends, which says what there is to say."""
    logging.disable(logging.WARNING)
    os.environ["TERM"] = "dumb"
    machine.keep_freed_memory()
    machine.exact_products()
    from evopress.stages.following import follow_run

    try:
        follow_run()
    except KeyboardInterrupt as stop:  # of which the first process speaks
        sys.exit(exit_code(stop))


def _silenced_without_reader() -> bool:
    """Send what this process still says to nowhere if nobody reads it any more; return whether that is so."""
    try:
        said_to, poll = sys.stdout.fileno(), select.poll()
        poll.register(said_to, select.POLLOUT)
        if not any(event & select.POLLERR for _, event in poll.poll(0)):
            return False
        os.dup2(os.open(os.devnull, os.O_WRONLY), said_to)
    except (AttributeError, ValueError, OSError):  # there is none, it is closed, or no file
        return False
    return True


def _is_hydras(error: Exception) -> bool:
    """Tell whether Hydra itself has raised an error."""
    raised = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(raised).is_relative_to(Path(hydra.__file__).parent)


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
        _say_error(f"a job failed: {error}" if failed else command_line.told(error, configuration.options()))
        sys.exit(1)
    except YAMLError as error:  # of the user's own config
        place = getattr(error, "problem_mark", None)
        where = f"{place.name}, line {place.line + 1}," if place else "a config file"
        _say_error(f"{where} is no YAML ({getattr(error, 'problem', None) or 'it cannot be read'}): mend it")
        sys.exit(1)
    except EvoPressError:  # of a launcher
        raise
    except Exception as error:
        if isinstance(error, ValueError) and _is_hydras(error):  # of flags that it does not take together, or as they are
            _say_error(error)
            sys.exit(1)
        if isinstance(error, BrokenPipeError) and _silenced_without_reader():  # who has had enough: `--help | head`
            sys.exit(1)
        if isinstance(error, OSError) and error.errno in _NO_FOLDER and isinstance(error.filename, str):
            _say_error(explained(error, Path(error.filename)))  # of the folder that Hydra makes
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


def _resumed_folder(arguments: list[str]) -> Path | None:
    """Return the run folder that `resume=RUN_FOLDER` names: as it is called, or else as Hydra would quote it."""
    named = next((argument.removeprefix("resume=") for argument in arguments if argument.startswith("resume=")), "")
    if named in ("", "null"):
        return None
    folder = given_path(named, "resume")
    meant = None if folder.exists() else configuration.value_of(f"resume={named}")
    return folder if meant is None else given_path(meant, "resume")


def _check_folder(arguments: list[str]) -> None:
    """Raise EvoPressError if the folder that runs or sweeps go to cannot be made; the last one that is named counts."""
    if any(argument.startswith("-") and argument not in _RUNNING for argument in arguments):
        return  # `--help` and the like make no folder
    named = [argument for argument in arguments if argument.startswith(("hydra.run.dir=", "hydra.sweep.dir="))]
    given = configuration.value_of(named[-1]) if named else "multirun"
    if not given or "${" in given:  # for Hydra to say
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


def _with_resumed(arguments: list[str], folder: Path) -> list[str]:
    """Put an earlier run's own overrides before those on the command line, and let the run go on in its folder."""
    here = configuration.override("hydra.run.dir", os.path.abspath(folder))
    earlier = run_folder.kept_overrides(folder)
    if earlier is None:
        overrides = folder / ".hydra" / "overrides.yaml"
        if not overrides.is_file():
            raise EvoPressError(f"resume={folder} is not a run folder: expected {overrides}")
        earlier = _hydras_own(overrides)
        if not earlier:  # killed while Hydra wrote it
            raise EvoPressError(f"the run in {folder} was stopped before it began: give its whole command with {shlex.quote(here)}")
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
        raise EvoPressError(f"{target} means nothing to the run in {folder}, which has {instead}: {otherwise}leave it out")
    kept = [*command_line.prepared(kept), *_defaults_then(folder, given=[*kept, *given])]
    # hydra.mode: also where the experiment is a sweep
    return [*kept, *given, configuration.override("resume", _typed(folder)), here, "hydra.mode=RUN"]


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


@contextmanager
def _named_for_hydra(arguments: list[str]) -> Iterator[list[str]]:
    """Give the folder of a resumed run another name for Hydra if its own has "${", which Hydra resolves wherever it stands."""
    key = "hydra.run.dir="
    folder = next((configuration.value_of(argument) for argument in reversed(arguments) if argument.startswith(key)), None)
    if folder is None or "${" not in folder:
        yield arguments
        return
    with tempfile.TemporaryDirectory(prefix="evopress-") as links:
        link = Path(links, "run")
        link.symlink_to(Path(folder).absolute())
        _linked[link] = Path(folder)
        yield [*(argument for argument in arguments if not argument.startswith(key)), configuration.override(key[:-1], str(link))]


def _hydras_own(overrides: Path) -> list[str]:
    """Read the list of overrides that Hydra keeps of a run."""
    try:
        listed = OmegaConf.load(overrides)
    except (OSError, ValueError, YAMLError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EvoPressError(f"{overrides} cannot be read ({reason}): give the whole command with hydra.run.dir instead") from error
    if not isinstance(listed, ListConfig):
        raise EvoPressError(f"{overrides} holds no list of overrides: give the whole command with hydra.run.dir instead")
    return [str(override) for override in listed]


def _task(config: DictConfig) -> float:
    """Run one job, or this process's share of it where a launcher has started several tasks for it."""
    if os.getpid() == _started_in or ranks.asked_for() or not ranks.is_task_of_several():
        return _job(config)
    try:
        ranks.adopt_slurm_task()
        ranks.begin()
        if ranks.leads():
            return _job(config)
        _follow()
        return float("nan")
    finally:
        ranks.end()


def _job(config: DictConfig) -> float:
    """Run one job; a user's error is one sentence, in a multirun too, where the other jobs go on. A signal stops them all."""
    configuration.register()  # in the process that a launcher starts for the job, nobody has
    folder = Path(HydraConfig.get().runtime.output_dir)
    folder = _linked.get(folder, folder)
    multirun, finished_at = HydraConfig.get().mode == RunMode.MULTIRUN, jobs.finished_at(folder)
    try:
        with run_folder.held(folder):
            if ranks.asked_for() and not ranks.launched():  # a launcher's process, which the others do not know
                raise EvoPressError(launching.ONE_AFTER_THE_OTHER)
            return _run(config, folder)
    except KeyboardInterrupt as stop:
        _say_error(f"interrupted; go on with: {_to_go_on(folder, multirun=multirun)}")
        sys.exit(exit_code(stop))
    except Exception as error:
        if isinstance(error, run_folder.TakenError) and (fitness := _finished_meanwhile(config, folder)) is not None:
            return fitness
        taken = isinstance(error, run_folder.TakenError)
        told = error if isinstance(error, EvoPressError) else _told(error, config, folder)
        if told is None:
            raise
        notes = getattr(error, "__notes__", [])
    _say_error(told)
    for note in notes:
        print(note, file=sys.stderr, flush=True)
    _failures.append(str(told))
    if not multirun:
        sys.exit(1)
    refused = finished_at is not None and jobs.finished_at(folder) == finished_at
    typed = HydraConfig.get().overrides.task
    jobs.note_failure(Path(HydraConfig.get().sweep.dir), folder, typed, str(told), refused=refused, taken=taken)
    if os.getpid() != _started_in:  # the command learns of it by this alone, when the launcher's jobs have all ended
        raise configuration.JobFailedError(str(told))
    return float("nan")


def _told(error: Exception, config: DictConfig, folder: Path) -> EvoPressError | None:
    """Turn an error of the machine into one sentence; None: it is a bug."""
    if not is_out_of_memory(error):
        return of_the_disk(error, folder)
    now = {key: OmegaConf.select(config, key) for key in _MEMORY_SETTINGS}
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return EvoPressError(
        f"out of memory ({reason}): lower one of {', '.join(f'{key}={value}' for key, value in now.items())}, or set "
        "level_db.activations=disk, or model.offload=true on a GPU"
    )


def _to_go_on(folder: Path, *, multirun: bool = False) -> str:
    """Return the command that goes on with a run, or with the sweep that it is a job of, as a shell takes it."""
    if not multirun or os.getpid() != _started_in:
        return f"python -m evopress resume={shlex.quote(_typed(folder))}"
    sweep = configuration.override("hydra.sweep.dir", _typed(HydraConfig.get().sweep.dir))
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("hydra.sweep.dir=")]
    return f"python -m evopress {shlex.join([*arguments, sweep])} (jobs that are done are not run again)"


def _typed(path: str | Path) -> str:
    """Return a path as it is shown, or whole where that would be read as something else."""
    shown = _shown(path)
    return os.path.abspath(path) if shown.startswith(("~", "'", '"')) or shown.lower() in ("null", "???") else shown


def _finished_meanwhile(config: DictConfig, run_dir: Path) -> float | None:
    """Do as `_finished_before` where another process holds the folder, such as that of the same sweep given twice."""
    from evopress.models.opening import fitted

    try:
        settings = fitted(configuration.to_settings(_as_begun(config, run_dir)[0]))
        return _finished_before(settings, run_dir, configuration.kept_settings(run_dir, HOW_IT_RUNS))
    except EvoPressError:  # the job is refused for being taken
        return None


def _finished_before(settings: RunSettings, run_dir: Path, kept: dict[str, Any]) -> float | None:
    """Return the fitness of a job of a sweep whose stages are done; None: they are not, or it is no job.

    Args: kept: as `stages_done` takes it.
    """
    if HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    with machine.importing():
        from evopress import finished

    if not set(settings.stages) <= set(finished.stages_done(settings, run_dir, kept)):
        return None
    logger.info("finished before, so not run again: %s (to run it again, remove the folder)", _shown(run_dir))
    return finished.best_fitness(run_dir)


def _as_begun(config: DictConfig, run_dir: Path) -> tuple[DictConfig, list[str]]:
    """Return the config of a job of a sweep with the defaults of the earlier version that began it, and overrides for them."""
    typed = list(HydraConfig.get().overrides.task)
    if HydraConfig.get().mode != RunMode.MULTIRUN or not run_folder.is_job_of(run_dir, typed):
        return config, []
    if not (defaults := _defaults_of(run_dir, typed)):
        return config, []
    as_begun = configuration.composed_with([*typed, *defaults])
    return (config, []) if as_begun == config else (as_begun, defaults)


def _defaults_of(folder: Path, typed: list[str]) -> list[str]:
    """Return overrides for the defaults that a folder's run has of an earlier version, but those that are typed."""
    keys = {each.split("=", 1)[0].lstrip("+") for each in typed}
    kept = [each for each in run_folder.kept_defaults(folder) if each.split("=", 1)[0] not in keys]
    return [*kept, *_defaults_then(folder, given=[*typed, *kept])]


def _tell_other_defaults(config: DictConfig, sweep: Path) -> None:
    """Say once what a job that begins has otherwise, for nobody typed it, than one that an earlier version did of its sweep."""
    typed = list(HydraConfig.get().overrides.task)
    done = next((path.parent for path in sorted(sweep.glob("*/finished.json"))), None)
    if sweep in _told_defaults or done is None or not (defaults := _defaults_of(done, typed)):
        return
    with suppress(HydraException, OmegaConfBaseException):  # of another method, which has no such setting
        own = [each for each in run_folder.typed_in(done) or [] if not each.startswith("hydra.")]
        if configuration.composed_with([*own, *defaults]) == configuration.composed_with(own):
            return  # what it typed, an experiment, chose them
        if configuration.composed_with([*typed, *defaults]) != config:
            _told_defaults.add(sweep)
            logger.warning(
                "jobs of this sweep that an earlier version did had other defaults than those that begin now: for all to be "
                "alike run it in a new folder, with %s to have the earlier ones",
                shlex.join(defaults),
            )


def _run(config: DictConfig, run_dir: Path) -> float:
    given = HydraConfig.get().overrides
    config, defaults = _as_begun(config, run_dir)
    overrides = [*(each for each in given.hydra if each.startswith("hydra.searchpath=")), *given.task, *defaults]
    there = run_folder.holds_a_run(run_dir)
    settings = configuration.to_settings(config)
    documents = {"config": configuration.with_numbers(config), "hydra": HydraConfig.instance().cfg, "overrides": overrides}
    composed = {f"{name}.yaml": OmegaConf.to_yaml(document) for name, document in documents.items()}
    if not there:
        run_folder.keep_config(run_dir, composed)
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            _tell_other_defaults(config, Path(HydraConfig.get().sweep.dir))
    # Imported here: `--help`, shell completion and configuration errors need no torch.
    with machine.importing():
        import torch
        import transformers

        from evopress import pipeline
        from evopress.models.opening import fitted

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    machine.keep_freed_memory()
    machine.exact_products()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    settings = fitted(settings)
    how_it_ran = configuration.kept_settings(run_dir, HOW_IT_RUNS) if there else {}
    if (fitness := _finished_before(settings, run_dir, how_it_ran)) is not None:
        return fitness
    environment = machine.describe(torch.get_num_threads(), device=settings.model.device)
    if not there:
        write_json(run_dir / "environment.json", environment)

    def begin() -> None:
        if settings.resume is not None and run_folder.looks_aside(run_dir, list(overrides)):
            return
        kept = run_folder.kept_with_own_stages(run_dir, overrides) if settings.resume is not None else list(overrides)
        defaults = [each for each in _defaults_of(run_dir, run_folder.typed_in(run_dir) or []) if each in kept]
        typed = [each for each in kept if each not in defaults]
        run_folder.keep_config(run_dir, composed | {"overrides.yaml": OmegaConf.to_yaml(typed)})
        run_folder.keep_overrides(run_dir, kept, defaults=defaults)
        write_json(run_dir / "environment.json", environment)

    logger.info("run folder %s", _shown(run_dir))
    if defaults:
        logger.info("an earlier version began this job: it goes on with that version's defaults, %s", " ".join(defaults))
    for sentence in command_line.unused(overrides, strategy=settings.search.strategy.name):
        logger.warning(sentence)
    paper = configuration.at_paper_scale(config)
    try:
        return pipeline.run(
            settings,
            run_dir,
            begin=begin,
            config=configuration.plain_dict(config),
            command=run_folder.command_of(run_dir, overrides),
            environment=environment,
            paper=paper and replace(paper, model=settings.model, method=settings.method),
            kept=how_it_ran,
        )
    except Exception as error:
        if any((*run_dir.glob("state.json"), *run_dir.glob("points/*/state.json"))):
            error.add_note(f"what the search has done is kept; go on with: {_to_go_on(run_dir)}")
        raise


def _shown(path: str | Path) -> str:
    """Return a path relative to the working directory where it lies below it."""
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _say_error(error: object) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
