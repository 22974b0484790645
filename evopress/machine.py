"""The machine that a run is on: what it is, and how its memory is handled."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Lock
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


def exact_products() -> None:
    """Let float32 products be float32, and sums of half-precision products be float32: containers switch that by the environment.

    Hessians, the sweeps of GPTQ and SparseGPT and the measures are float32; TF32 has ten bits of it.
    """
    import torch

    torch.set_float32_matmul_precision("highest")
    for where, switch in _switches():
        setattr(where, switch, False)


@contextmanager
def exactly() -> Iterator[None]:
    """Compute by `exact_products`, with torch's own default dtype and outside inference mode; leave this process as it was.

    That is what it was before the first of several threads that are inside at once.
    """
    import torch

    gradients = torch.is_grad_enabled()
    with _SWITCHING:
        if not _INSIDE:
            switches = [(where, switch, getattr(where, switch)) for where, switch in _switches()]
            _INSIDE.append((torch.get_float32_matmul_precision(), torch.get_default_dtype(), switches))
        else:
            _INSIDE.append(_INSIDE[0])
        exact_products()
        torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.set_grad_enabled(gradients):
            yield
    finally:
        with _SWITCHING:
            precision, dtype, switches = _INSIDE.pop()
            if not _INSIDE:
                torch.set_float32_matmul_precision(precision)
                torch.set_default_dtype(dtype)
                for where, switch, value in switches:
                    setattr(where, switch, value)


_SWITCHING = Lock()
_INSIDE: list[tuple[str, Any, list[tuple[Any, str, Any]]]] = []
"""Of each `exactly` that is open what it found, or the first did."""


def _switches() -> list[tuple[Any, str]]:
    """Return where torch keeps what makes products less exact, and what it is called there."""
    import torch

    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    reductions = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    return [(matmul, "allow_tf32"), (cudnn, "allow_tf32"), *((matmul, switch) for switch in reductions)]


def precision() -> str:
    """Say how exact products are, as torch has it now, and what of the environment may still change it."""
    import torch

    matmul = torch.backends.cuda.matmul
    tf32 = matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    reduced = matmul.allow_bf16_reduced_precision_reduction or matmul.allow_fp16_reduced_precision_reduction
    parts = [
        f"float32 products {torch.get_float32_matmul_precision()}",
        f"TF32 {'on' if tf32 else 'off'}",
        f"sums of half-precision products {'reduced' if reduced else 'float32'}",
    ]
    names = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")
    return ", ".join([*parts, *(f"{name}={os.environ[name]}" for name in names if name in os.environ)])


def has_half_products() -> bool:
    """Tell whether this CPU multiplies bfloat16 itself; others take several times as long as for float32."""
    import torch

    if not hasattr(torch.cpu, "get_capabilities"):  # an older torch
        return False
    has = torch.cpu.get_capabilities()
    return bool(has.get("amx_bf16") or has.get("avx512_bf16"))


@contextmanager
def importing() -> Iterator[None]:
    """Import large libraries without collecting garbage, which is a sixth of the time; nor is what they leave collected later."""
    first = "torch" not in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if first:
            gc.freeze()
        gc.enable()


class PeakMemory:
    """The most memory that this process held since a moment: a job's own, where several jobs run in one process."""

    def __init__(self) -> None:
        """Begin, having given back what earlier jobs freed."""
        gc.collect()
        try:
            ctypes.CDLL(None).malloc_trim(0)
        except (OSError, AttributeError):  # another C library
            pass
        self._before = _most_ever()
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: the peak is counted from here
            self._cleared = True
        except OSError:
            self._cleared = False

    def bytes(self) -> int | None:
        """Return the peak so far; None where the system keeps only the process's, and an earlier job had more."""
        if self._cleared:
            status = Path("/proc/self/status").read_text(encoding="ascii")
            lines = (line.split() for line in status.splitlines() if line.startswith("VmHWM:"))
            return next((1024 * int(line[1]) for line in lines), None)
        most = _most_ever()
        return most if most > self._before else None


def _most_ever() -> int:
    """Return the peak resident memory of this process, in bytes."""
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def describe(threads: int, *, device: str = "cpu") -> dict[str, Any]:
    """Describe where a run happens: versions, machine, git revision.

    Args: device: what was asked for as `model.device`; the GPU is named where that may be one.
    """
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    used = f"{threads} torch thread{'' if threads == 1 else 's'}"
    return {
        "schema": 1,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {used}{_gpu(device)}",
        "precision": precision(),
        "git_revision": _git_revision(),
        **packages,
    }


def _gpu(device: str) -> str:
    if device == "cpu":
        return ""
    import torch

    return f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""


@cache
def _git_revision() -> str:
    """Return the revision of the clone that the code runs from, marked if it had changes; "unknown" outside a clone."""
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
