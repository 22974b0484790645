"""The machine that a run is on: what it is, and how its memory is handled."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = (
    *("evopress", "torch", "transformers", "hydra-core", "omegaconf", "datasets", "numpy", "scipy", "pandas"),
    *("wandb", "lm-eval"),
)


def keep_freed_memory() -> None:
    """Let glibc's malloc keep large freed blocks instead of handing them back to the system.

    A chunk of logits is tens of megabytes; mapping it anew for every candidate takes a third of the KL divergence's time.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):  # another C library
        pass


def describe(threads: int) -> dict[str, Any]:
    """Describe where a run happens: versions, machine, git revision."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "schema": 1,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {threads} torch threads",
        "git_revision": _git_revision(),
        **packages,
    }


def _git_revision() -> str:
    """Return the revision of the clone that the code runs from, marked if it has changes; "unknown" outside a clone."""
    folder = Path(__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return "unknown"
    try:
        described = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return described.stdout.strip()
