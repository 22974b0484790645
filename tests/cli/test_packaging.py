"""The wheel carries the config tree and nothing else, and works from where it is unpacked."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel with what is installed, without any network."""
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source") / "evopress"
    kept = shutil.ignore_patterns(".*", "multirun", "__pycache__", "experiments", "tests", "site", "build", "dist")
    shutil.copytree(ROOT, source, ignore=kept)
    (source / "conf" / "local").mkdir()
    (source / "conf" / "local" / "default.yaml").write_text("# @package _global_\nseed: 7\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(folder),
        ".",
    ]
    if importlib.util.find_spec("build") is not None:
        command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), "."]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("evopress-*.whl")
    return path


def test_wheel_holds_the_package_and_the_config_tree(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        entry_points = next(name for name in names if name.endswith("entry_points.txt"))
        assert "evopress = evopress.__main__:main" in file.read(entry_points).decode()
        requirements = file.read(next(name for name in names if name.endswith("METADATA"))).decode()
    yamls = {str(path.relative_to(ROOT)) for path in (ROOT / "conf").rglob("*.yaml") if "local" not in path.parts}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "evopress").rglob("*.py")}
    assert {f"evopress/{name}" for name in yamls} | modules <= names
    assert not any("conf/local" in name for name in names), "a machine's own"
    assert {name.split("/")[0].split("-")[0] for name in names} == {"evopress"}  # no tests, experiments, conf beside it
    assert "Requires-Python: >=3.11" in requirements


def run_unpacked(wheel: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the program as unpacked from the wheel, from another working directory."""
    site, cwd = folder / "site", folder / "elsewhere"
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    cwd.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(site), "EVOPRESS_CACHE": str(folder / "cache"), "WANDB_MODE": "disabled"}
    check = "import evopress, sys; print(evopress.__file__)"
    where = subprocess.run([sys.executable, "-c", check], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)
    assert str(site) in where.stdout, "the wheel's code must be what runs"
    command = [sys.executable, "-m", "evopress", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def test_help_shows_the_config_tree(wheel: Path, tmp_path: Path) -> None:
    done = run_unpacked(wheel, tmp_path, "--help")
    assert done.returncode == 0, done.stderr
    for group in ("data", "debug", "evaluation", "fitness", "level_db", "method", "model", "paths", "scale", "search", "tracker"):
        assert any(line.startswith(f"{group}:") for line in done.stdout.splitlines()), f"{group} is missing in\n{done.stdout}"
    assert "smollm2_135m" in done.stdout
    assert "quantization" in done.stdout


@pytest.mark.slow
def test_the_main_job_runs_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    done = run_unpacked(wheel, tmp_path, "+method=quant", "bits=3.5", "+debug=tiny")
    assert done.returncode == 0, done.stderr
    (report,) = (tmp_path / "elsewhere" / "multirun").glob("*/*/report.html")
    assert report.stat().st_size > 1000
