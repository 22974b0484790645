"""What a job of a sweep has beside a run of its own: it may be done already, or have been begun by an earlier version."""

from __future__ import annotations

import logging
import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from evopress import config as configuration
from evopress import machine, run_folder
from evopress.errors import EvoPressError
from evopress.files import shown_path
from evopress.launching.command import Command
from evopress.launching.resume import earlier_defaults
from evopress.result_settings import HOW_IT_RUNS
from evopress.settings import RunSettings

logger = logging.getLogger(__name__)
_LISTS = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
"""Hydra's own sweeper, which makes no use of what jobs return."""


class UntunableError(EvoPressError):
    """No job of a sweep would return the number that its sweeper needs."""


def is_one() -> bool:
    """Tell whether this run is a job of a sweep."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def is_tuned() -> bool:
    """Tell whether this run is a job of a sweep whose sweeper goes by what its jobs return; Hydra's own goes by a list."""
    return is_one() and OmegaConf.select(HydraConfig.get(), "sweeper._target_") != _LISTS


def refuse_untunable(settings: RunSettings) -> None:
    """Raise UntunableError if a job of a sweeper that tunes would return no number, whatever it finds."""
    if not is_tuned():
        return
    with machine.importing():
        from evopress.methods.points import has_limit
    why = (
        *(["budgets=[...] has a genome for each budget"] if settings.budgets else []),
        *(["a run with a limit, such as max_kl=, returns no fitness of one budget"] if has_limit(settings) else []),
        *(["dry_run=true searches nothing"] if settings.dry_run else []),
        *(["the stages have no search"] if "search" not in settings.stages else []),
    )
    if why:
        raise UntunableError(
            f"this sweeper tunes by the fitness that a job returns, and {why[0]}: give a single target (bits=, sparsity= or size=) "
            "and stages=[database,search], or leave +hparams_search= and hydra/sweeper= out"
        )


def as_begun(config: DictConfig, run_dir: Path) -> tuple[DictConfig, list[str]]:
    """Return the config of a job of a sweep with the defaults of the earlier version that began it, and overrides for them."""
    typed = list(HydraConfig.get().overrides.task)
    if not is_one() or not run_folder.is_job_of(run_dir, typed):
        return config, []
    if not (defaults := earlier_defaults(run_dir, typed)):
        return config, []
    as_begun = configuration.composed_with([*typed, *defaults])
    return (config, []) if as_begun == config else (as_begun, defaults)


def finished_before(settings: RunSettings, run_dir: Path, kept: dict[str, Any]) -> float | None:
    """Return the fitness of a job of a sweep whose stages are done; None: they are not, or it is no job.

    Args: kept: as `stages_done` takes it.
    """
    if not is_one():
        return None
    with machine.importing():
        from evopress import finished

    if not set(settings.stages) <= set(finished.stages_done(settings, run_dir, kept)):
        return None
    if is_tuned() and finished.compared_fitness(run_dir) is None:  # by a command that had no use for it: what is done is kept
        return None
    logger.info("finished before, so not run again: %s (to run it again, remove the folder)", shown_path(run_dir))
    return finished.best_fitness(run_dir)


def finished_meanwhile(config: DictConfig, run_dir: Path) -> float | None:
    """Do as `finished_before` where another process holds the folder, such as that of the same sweep given twice."""
    from evopress.models.opening import fitted

    try:
        settings = fitted(configuration.to_settings(as_begun(config, run_dir)[0]))
        return finished_before(settings, run_dir, configuration.kept_settings(run_dir, HOW_IT_RUNS))
    except EvoPressError:  # the job is refused for being taken
        return None


def tell_other_defaults(command: Command, config: DictConfig) -> None:
    """Say once what a job that begins has otherwise, for nobody typed it, than one that an earlier version did of its sweep."""
    typed, sweep = list(HydraConfig.get().overrides.task), Path(HydraConfig.get().sweep.dir)
    done = next((path.parent for path in sorted(sweep.glob("*/finished.json"))), None)
    if sweep in command.told_defaults or done is None or not (defaults := earlier_defaults(done, typed)):
        return
    with suppress(HydraException, OmegaConfBaseException):  # of another method, which has no such setting
        own = [each for each in run_folder.typed_in(done) or [] if not each.startswith("hydra.")]
        if configuration.composed_with([*own, *defaults]) == configuration.composed_with(own):
            return  # what it typed, an experiment, chose them
        if configuration.composed_with([*typed, *defaults]) != config:
            command.told_defaults.add(sweep)
            logger.warning(
                "jobs of this sweep that an earlier version did had other defaults than those that begin now: for all to be "
                "alike run it in a new folder, with %s to have the earlier ones",
                shlex.join(defaults),
            )
