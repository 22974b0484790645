"""Sweeps on launchers that run jobs in other processes, which share one level database: built once, the others wait."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

from evopress import config as configuration

EXTRAS = {"joblib": "joblib", "submitit": "slurm", "ray": "ray"}
"""Of Hydra's launcher plugins, the extra that installs each."""


KILLING = """
import os, signal, sys

def kill(event, arguments):
    if event == "open" and "seed=1" in str(arguments[0]) and "environment" in str(arguments[0]) and not os.path.exists("killed"):
        open("killed", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(kill)
"""
"""Imported by every Python that starts: kills the job with seed 1, once."""


def needs(plugin: str) -> pytest.MarkDecorator:
    here = importlib.util.find_spec("hydra_plugins") is not None
    found = here and importlib.util.find_spec(f"hydra_plugins.hydra_{plugin}_launcher") is not None
    reason = f"hydra-{plugin}-launcher is not installed: pip install -e '.[{EXTRAS[plugin]}]'"
    return pytest.mark.skipif(not found, reason=reason)


def sweep(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Sweep two targets of the tiny model, with a cache of their own, in a process of its own."""
    few = ("baselines.names=[]", "stages=[database,search,evaluate]")
    command = [sys.executable, "-m", "evopress", "-m", "+method=quant", "+debug=tiny", *few, "hydra.sweep.dir=sweep", *arguments]
    environment = os.environ | {
        "EVOPRESS_CACHE": str(cwd / "cache"),
        "PYTHONPATH": os.pathsep.join([str(cwd), *filter(None, sys.path)]),
    }
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=600)


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(("local",), marks=needs("joblib")),
        pytest.param(("submitit_local", "hydra.launcher.timeout_min=5"), marks=needs("submitit")),
        pytest.param(
            ("cluster", "hydra.launcher.ray.init.address=null", "hydra.launcher.ray.remote={num_cpus:1,num_gpus:0}"),
            marks=needs("ray"),
        ),
    ],
    ids=lambda launcher: launcher[0],
)
def test_jobs_side_by_side_share_one_database(launcher: tuple[str, ...], tmp_path: Path) -> None:
    name, *options = launcher
    done = sweep(f"hydra/launcher={name}", *options, "bits=9,3.5,3", cwd=tmp_path)
    assert done.returncode == 1  # of the job that cannot be; the others are done
    assert "bits=9 is above the highest level" in done.stderr
    jobs = [tmp_path / "sweep" / f"baselines.names=,bits={bits},debug=tiny,method=quant" for bits in ("9", "3.5", "3")]
    assert not (jobs[0] / "result.json").exists()
    results = [json.loads((job / "result.json").read_text(encoding="utf-8")) for job in jobs[1:]]
    assert [[row["name"] for row in result["rows"]] for result in results] == [["dense", "evopress"]] * 2
    assert len({result["database"]["path"] for result in results}) == 1
    assert sorted(result["database"]["reused"] for result in results) == [False, True]
    costs = [json.loads((job / "genome.json").read_text(encoding="utf-8"))["cost"] for job in jobs[1:]]
    assert costs[0] > costs[1]


@needs("joblib")
def test_a_job_that_is_killed_takes_no_other_with_it(tmp_path: Path) -> None:
    """The others end, also the one that had not begun, and the sweep says which to run again, which then goes on."""
    (tmp_path / "sitecustomize.py").write_text(KILLING, encoding="utf-8")
    arguments = ("bits=3.5", "seed=0,1,2", "stages=[database]", "hydra/launcher=local", "hydra.launcher.n_jobs=2")
    done = sweep(*arguments, cwd=tmp_path)
    assert (tmp_path / "killed").exists(), done.stdout + done.stderr
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "1 of 3 jobs were killed, the others have ended" in error and "hydra.sweep.dir=sweep" in error
    assert "bits=3.5 seed=1 (SIGKILL)" in error and "seed=0" not in error and "seed=2" not in error, error
    jobs = [tmp_path / "sweep" / f"baselines.names=,bits=3.5,debug=tiny,method=quant,seed={seed}" for seed in range(3)]
    assert [(job / "finished.json").exists() for job in jobs] == [True, False, True]
    again = sweep(*arguments, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert all((job / "finished.json").exists() for job in jobs)
    assert (again.stdout + again.stderr).count("finished before, so not run again") == 2


@needs("joblib")
@pytest.mark.parametrize("preset", ["local", "joblib"])
def test_jobs_have_processes_of_their_own_by_either_name(preset: str) -> None:
    from evopress import launching
    from evopress.launching.local import JobLauncher

    configuration.register()
    launching.register()
    with initialize_config_dir(version_base="1.3", config_dir=str(configuration.config_folder())):
        launcher = compose("config", overrides=[f"hydra/launcher={preset}"], return_hydra_config=True).hydra.launcher
    assert isinstance(Plugins.instance()._instantiate(launcher), JobLauncher)


@needs("joblib")
def test_processes_share_the_cores_that_nobody_has_set(monkeypatch: pytest.MonkeyPatch) -> None:
    from evopress.launching import local

    monkeypatch.setattr("joblib.cpu_count", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    with local._threads_shared_by(3):
        assert (os.environ["OMP_NUM_THREADS"], os.environ["MKL_NUM_THREADS"]) == ("5", "2")
    assert os.environ["OMP_NUM_THREADS"] == "5" and "MKL_NUM_THREADS" not in os.environ


@pytest.mark.parametrize(
    ("preset", "target", "values"),
    [
        pytest.param("local", "JoblibLauncher", {"n_jobs": 2}, marks=needs("joblib")),
        pytest.param("slurm", "SlurmLauncher", {"gpus_per_node": 1, "max_num_timeout": 10}, marks=needs("submitit")),
        pytest.param(
            "slurm_gpus",
            "SlurmLauncher",
            {"gpus_per_node": 4, "tasks_per_node": 4, "cpus_per_task": 8, "max_num_timeout": 10},
            marks=needs("submitit"),
        ),
        pytest.param("cluster", "RayLauncher", {"ray.remote.num_gpus": 1}, marks=needs("ray")),
    ],
)
def test_presets_are_those_of_the_plugins(preset: str, target: str, values: dict[str, Any]) -> None:
    configuration.register()
    with initialize_config_dir(version_base="1.3", config_dir=str(configuration.config_folder())):
        overrides = ["+experiment=table5", f"hydra/launcher={preset}"]
        launcher = compose("config", overrides=overrides, return_hydra_config=True).hydra.launcher
    assert launcher._target_.endswith(f".{target}")
    for key, value in values.items():
        node = launcher
        for part in key.split("."):
            node = node[part]
        assert node == value


@pytest.mark.parametrize(("given", "tasks"), [("null", 1), ("0", 1), ("8", 8)])
def test_a_job_without_gpus_has_one_task(given: str, tasks: int) -> None:
    configuration.register()
    launcher = OmegaConf.load(configuration.config_folder() / "hydra" / "launcher" / "slurm_gpus.yaml")
    launcher = OmegaConf.merge(launcher, OmegaConf.from_dotlist([f"gpus_per_node={given}"]))
    assert launcher.tasks_per_node == tasks


def test_a_plugin_that_is_not_there_is_told_by_name(evopress: Callable[..., Any]) -> None:
    outcome = evopress("-m", "+method=quant", "+debug=tiny", "hydra/launcher=elsewhere")
    assert outcome.code == 1
    assert "hydra/launcher=elsewhere is not there" in outcome.text
    assert "local" in outcome.text and "slurm" in outcome.text
