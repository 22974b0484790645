"""The one Hydra entry point: compose, convert, hand over to the pipeline."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from evopress import config as configuration
from evopress import machine
from evopress.errors import EvoPressError
from evopress.reporting.records import write_json

logger = logging.getLogger(__name__)
_failures: list[str] = []
_started_in = 0
"""Process of the command itself; a launcher's jobs run in others."""


def main() -> None:
    """Run the command line: `python -m evopress +method=quant bits=2.5`. Exits with 1 after a user's error."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    configuration.register()
    global _started_in
    _started_in = os.getpid()
    _failures.clear()
    entry = hydra.main(version_base="1.3", config_path=str(configuration.config_folder()), config_name="config")(_task)
    try:
        folder = _resumed_folder(sys.argv[1:])
        if folder is None:
            entry()
        else:
            sys.argv[1:] = _with_resumed(sys.argv[1:], folder)
            with _kept_if_refused(folder):
                entry()
    except EvoPressError as error:
        _say_error(error)
        sys.exit(1)
    sys.exit(1 if _failures else 0)


def _resumed_folder(arguments: list[str]) -> Path | None:
    """Return the run folder that `resume=RUN_FOLDER` names."""
    folder = next((argument.removeprefix("resume=") for argument in arguments if argument.startswith("resume=")), "")
    return None if folder in ("", "null") else Path(folder)


@contextmanager
def _kept_if_refused(folder: Path) -> Iterator[None]:
    """Give a run folder its own settings back if those that it was resumed with are refused."""
    files = [*(folder / ".hydra").glob("*.yaml"), folder / "environment.json"]
    before = {path: path.read_bytes() for path in files if path.is_file()}
    try:
        yield
    except SystemExit as stop:
        if stop.code == 1:
            for path, content in before.items():
                path.write_bytes(content)
        raise


def _with_resumed(arguments: list[str], folder: Path) -> list[str]:
    """Put an earlier run's own overrides before those on the command line, and let the run go on in its folder."""
    overrides = folder / ".hydra" / "overrides.yaml"
    if not overrides.is_file():
        raise EvoPressError(f"resume={folder} is not a run folder: expected {overrides}")
    earlier = [str(override) for override in OmegaConf.load(overrides)]
    later = {argument.split("=", 1)[0] for argument in arguments}
    kept = [override for override in earlier if override.split("=", 1)[0] not in later | {"resume", "stages"}]
    return [*kept, *arguments, f"hydra.run.dir={folder}", "hydra.mode=RUN"]  # also where the experiment is a sweep


def _task(config: DictConfig) -> float:
    """Run one job; a user's error is one sentence, in a multirun too, where the other jobs go on."""
    configuration.register()  # in the process that a launcher starts for the job, nobody has
    try:
        return _run(config)
    except EvoPressError as error:
        _say_error(error)
        _failures.append(str(error))
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            if os.getpid() != _started_in:  # the command learns of it by this alone, when the launcher's jobs have all ended
                raise CompactHydraException(str(error)) from None
            return float("nan")
        sys.exit(1)
    except KeyboardInterrupt:
        folder = HydraConfig.get().runtime.output_dir
        _say_error(f"interrupted; go on with: python -m evopress resume={shlex.quote(_shown(folder))}")
        sys.exit(130)


def _run(config: DictConfig) -> float:
    settings = configuration.to_settings(config)
    # Imported here: `--help`, shell completion and configuration errors need no torch.
    import torch
    import transformers

    from evopress import pipeline

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    machine.keep_freed_memory()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    if HydraConfig.get().mode == RunMode.MULTIRUN and set(settings.stages) <= set(pipeline.stages_done(settings, run_dir)):
        logger.info("finished before, so not run again: %s (to run it again, remove the folder)", _shown(run_dir))
        return pipeline.held_out_kl(run_dir)
    environment = machine.describe(torch.get_num_threads())
    write_json(run_dir / "environment.json", environment)
    logger.info("run folder %s", _shown(run_dir))
    return pipeline.run(
        settings,
        run_dir,
        config=configuration.plain_dict(config),
        command=f"python -m evopress {shlex.join(HydraConfig.get().overrides.task)}".strip(),
        environment=environment,
        paper=configuration.at_paper_scale(config),
    )


def _shown(path: str | Path) -> str:
    """Return a path relative to the working directory where it lies below it."""
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _say_error(error: object) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
