"""Launchers of ours for the jobs of a sweep, where the plugin of Hydra's that each stands on is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import filter_overrides

from evopress import ranks
from evopress.config import JobFailedError

ONE_AFTER_THE_OTHER = "under torchrun or srun the jobs of a sweep run one after the other: leave hydra/launcher out"


def register() -> None:
    """Let Hydra launch by ours where a config names the launcher of joblib or of submitit."""
    launchers: list[type[Any]] = []
    if find_spec("hydra_plugins") and find_spec("hydra_plugins.hydra_joblib_launcher"):  # an extra
        from evopress.launching.local import JobLauncher

        launchers.append(JobLauncher)
    if find_spec("hydra_plugins") and find_spec("hydra_plugins.hydra_submitit_launcher"):  # another
        from evopress.launching.slurm import SlurmJobLauncher

        launchers.append(SlurmJobLauncher)
    for launcher in launchers:
        (theirs,) = launcher.__bases__
        Plugins.instance().class_name_to_class[f"{theirs.__module__}.{theirs.__name__}"] = launcher


def refuse_among_processes() -> None:
    """Raise JobFailedError where the command itself is run by several processes."""
    if ranks.asked_for():
        raise JobFailedError(ONE_AFTER_THE_OTHER)


def of_killed(killed: Mapping[int, str], jobs: Sequence[Sequence[str]], sweep: str) -> JobFailedError:
    """Return what to raise when all jobs of a sweep have ended, but some before their time.

    Args:
        killed: index of a job to how it ended.
        jobs: the overrides of all.
        sweep: folder of the sweep.
    """
    told = "; ".join(f"{' '.join(filter_overrides(jobs[index]))} ({how})" for index, how in sorted(killed.items()))
    return JobFailedError(
        f"{len(killed)} of {len(jobs)} jobs were killed, the others have ended. To be run again: {told}. Give the same "
        f"command in the same folder (hydra.sweep.dir={sweep}): what is done is not run again"
    )
