"""One job of a command: a run in its folder. What a user did wrong is one sentence, and the other jobs of a sweep go on."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from evopress import command_line, launching, machine, ranks, run_folder
from evopress import config as configuration
from evopress.endings import exit_code, is_out_of_memory, of_the_disk
from evopress.errors import EvoPressError, first_line
from evopress.files import shown_path
from evopress.launching import sweep_job
from evopress.launching.command import Command, say_error
from evopress.launching.processes import shared
from evopress.launching.resume import earlier_defaults, to_go_on, to_go_on_with_sweep
from evopress.reporting import jobs
from evopress.reporting.records import write_json
from evopress.result_settings import HOW_IT_RUNS
from evopress.settings import RunSettings

logger = logging.getLogger(__name__)
_MEMORY_SETTINGS = (
    *("fitness.max_tokens_in_flight", "fitness.chunk_tokens", "level_db.batch_tokens", "level_db.cache_bytes"),
    *("data.calibration_tokens", "data.search_tokens"),
)
"""What memory grows with."""


def run_job(command: Command, config: DictConfig) -> float:
    """Run one job, or this process's share of it where a launcher has started several tasks for it."""
    if command.is_here() or ranks.asked_for() or not ranks.is_task_of_several():
        return _job(command, config)
    return shared(partial(_job, command, config))


def _job(command: Command, config: DictConfig) -> float:
    """Run one job; a user's error is one sentence, in a multirun too, where the other jobs go on. A signal stops them all."""
    configuration.register()  # in the process that a launcher starts for the job, nobody has
    folder = Path(HydraConfig.get().runtime.output_dir)
    folder = command.folders.get(folder, folder)
    finished_at = jobs.finished_at(folder)
    try:
        with run_folder.held(folder):
            if ranks.asked_for() and not ranks.launched():  # a launcher's process, which the others do not know
                raise EvoPressError(launching.ONE_AFTER_THE_OTHER)
            return _run(command, config, folder)
    except KeyboardInterrupt as stop:
        again = to_go_on_with_sweep() if sweep_job.is_one() and command.is_here() else to_go_on(folder)
        say_error(f"interrupted; resume with: {again}")
        sys.exit(exit_code(stop))
    except Exception as error:
        taken = isinstance(error, run_folder.TakenError)
        if taken and (fitness := sweep_job.finished_meanwhile(config, folder)) is not None:
            return fitness
        untunable = isinstance(error, sweep_job.UntunableError)
        told = error if isinstance(error, EvoPressError) else _told(error, config, folder)
        if told is None:
            raise
        notes = getattr(error, "__notes__", [])
    say_error(told)
    for note in notes:
        print(note, file=sys.stderr, flush=True)
    command.failures.append(str(told))
    if not sweep_job.is_one() or (untunable and command.is_here()):
        sys.exit(1)
    refused = finished_at is not None and jobs.finished_at(folder) == finished_at
    typed = HydraConfig.get().overrides.task
    jobs.note_failure(Path(HydraConfig.get().sweep.dir), folder, typed, str(told), refused=refused, taken=taken)
    # The command learns of a launcher's job by this alone, when all have ended; a sweeper that tunes takes it for a failed trial.
    if not command.is_here() or sweep_job.is_tuned():
        raise configuration.JobFailedError(str(told))
    return float("nan")


def _told(error: Exception, config: DictConfig, folder: Path) -> EvoPressError | None:
    """Turn an error of the machine into one sentence; None: it is a bug."""
    if not is_out_of_memory(error):
        return of_the_disk(error, folder)
    now = {key: OmegaConf.select(config, key) for key in _MEMORY_SETTINGS}
    reason = first_line(error).rstrip(".")
    return EvoPressError(
        f"out of memory ({reason}): lower one of {', '.join(f'{key}={value}' for key, value in now.items())}, or set "
        "level_db.activations=disk, or model.offload=true on a GPU"
    )


def _run(command: Command, config: DictConfig, run_dir: Path) -> float:
    """Run one job in its folder, or do no more than return its fitness where it is a sweep's and done."""
    given = HydraConfig.get().overrides
    config, defaults = sweep_job.as_begun(config, run_dir)
    overrides = [*(each for each in given.hydra if each.startswith("hydra.searchpath=")), *given.task, *defaults]
    there = run_folder.holds_a_run(run_dir)
    settings = configuration.to_settings(config)
    sweep_job.refuse_untunable(settings)
    composed = _composed(config, overrides)
    if not there:
        run_folder.keep_config(run_dir, composed)
        if sweep_job.is_one():
            sweep_job.tell_other_defaults(command, config)
    settings = _prepared(settings)
    how_it_ran = configuration.kept_settings(run_dir, HOW_IT_RUNS) if there else {}
    if (fitness := sweep_job.finished_before(settings, run_dir, how_it_ran)) is not None:
        return fitness
    from evopress import pipeline

    environment = _environment(settings)
    if not there:
        write_json(run_dir / "environment.json", environment)
    logger.info("run folder %s", shown_path(run_dir))
    if defaults:
        logger.info("an earlier version began this job: it is resumed with that version's defaults, %s", " ".join(defaults))
    for sentence in command_line.unused(overrides, strategy=settings.search.strategy.name):
        logger.warning(sentence)
    paper = configuration.at_paper_scale(config)
    begin = partial(_begin, run_dir, overrides, composed, environment, resumed=settings.resume is not None)
    with _noting_how_to_go_on(run_dir, begin) as begins:
        return pipeline.run(
            settings,
            run_dir,
            begin=begins,
            config=configuration.plain_dict(config),
            command=run_folder.command_of(run_dir, overrides),
            second_pass=run_folder.second_pass_of(run_dir, overrides, by_default=settings.scale.refine),
            environment=environment,
            paper=paper and replace(paper, model=settings.model, method=settings.method),
            kept=how_it_ran,
            compared=sweep_job.is_tuned(),
        )


def _composed(config: DictConfig, overrides: Sequence[str]) -> dict[str, str]:
    """Return the documents of a run's config by the names of their files, as YAML."""
    documents = {"config": configuration.with_numbers(config), "hydra": HydraConfig.instance().cfg, "overrides": overrides}
    return {f"{name}.yaml": OmegaConf.to_yaml(document) for name, document in documents.items()}


def _prepared(settings: RunSettings) -> RunSettings:
    """Import torch and set the switches of the whole process; return the settings with what depends on the model."""
    # Imported here: `--help`, shell completion and configuration errors need no torch.
    with machine.importing():
        import torch
        import transformers

        from evopress.models.opening import fitted

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    machine.keep_freed_memory()
    machine.exact_products()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    return fitted(settings)


def _environment(settings: RunSettings) -> dict[str, Any]:
    import torch

    return machine.describe(torch.get_num_threads(), device=settings.model.device)


def _begin(run_dir: Path, overrides: list[str], composed: Mapping[str, str], environment: dict[str, Any], *, resumed: bool) -> None:
    """Keep in the folder what its run goes on with, unless it is resumed to look at something beside what it found."""
    if resumed and run_folder.looks_aside(run_dir, overrides):
        return
    kept = run_folder.kept_with_own_stages(run_dir, overrides) if resumed else overrides
    defaults = [each for each in earlier_defaults(run_dir, run_folder.typed_in(run_dir) or []) if each in kept]
    typed = [each for each in kept if each not in defaults]
    run_folder.keep_config(run_dir, {**composed, "overrides.yaml": OmegaConf.to_yaml(typed)})
    run_folder.keep_overrides(run_dir, kept, defaults=defaults)
    write_json(run_dir / "environment.json", environment)


@contextmanager
def _noting_how_to_go_on(run_dir: Path, begin: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Yield `begin`; add to an error after it, which refuses nothing, how a run goes on whose search has done something."""
    begun = False

    def begins() -> None:
        nonlocal begun
        begun = True
        begin()

    try:
        yield begins
    except Exception as error:
        if begun and any((*run_dir.glob("state.json"), *run_dir.glob("points/*/state.json"))):
            error.add_note(f"what the search has done is kept; resume with: {to_go_on(run_dir)}")
        raise
