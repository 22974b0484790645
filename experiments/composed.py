"""Settings of runs that a script makes in its own process, composed as the command line composes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from evopress import command_line
from evopress import config as configuration
from evopress.errors import EvoPressError
from evopress.settings import RunSettings


def settings_of(overrides: Sequence[str]) -> RunSettings:
    """Compose the settings of a run.

    Raises: EvoPressError if an override is no setting, or has no value that it may have.
    """
    configuration.register()
    try:
        with initialize_config_dir(str(configuration.config_folder().resolve()), version_base="1.3"):
            return configuration.to_settings(compose("config", list(overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        raise EvoPressError(command_line.told(error, configuration.options())) from error


def take_threads(settings: RunSettings) -> None:
    """Let this process compute on as many threads as a run asks for, as its command would."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
