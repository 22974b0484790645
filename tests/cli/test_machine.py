"""Peak memory is a job's own, and float32 products are exact and recorded so, whatever the environment says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from evopress import machine
from evopress.models.devices import begin_on

MB = 2**20


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system keeps only the process's peak")
@pytest.mark.parametrize("size", [100 * MB, 200 * MB, 400 * MB])
def test_the_peak_of_a_job_is_its_own(size: int) -> None:
    first = machine.PeakMemory()
    before = first.bytes()
    del [bytearray(b"x") * size][0]
    assert before is not None and first.bytes() - before > 0.9 * size  # type: ignore[operator]
    second = machine.PeakMemory()
    assert second.bytes() < before + 0.5 * size  # type: ignore[operator]


@pytest.mark.parametrize(("before", "after", "told"), [(5, 7, 7 * 1024), (5, 5, None)])
def test_where_a_peak_cannot_begin_anew_only_a_higher_one_is_told(
    before: int, after: int, told: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = iter((before, after))
    monkeypatch.setattr(machine, "_most_ever", lambda: 1024 * next(peaks))

    def refuse(*args: Any, **kwargs: Any) -> int:
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refuse)
    assert machine.PeakMemory().bytes() == told


def test_a_gpu_s_peak_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    for name in ("init", "set_device", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *args, name=name: called.append((name, *args)))
    for device in ("cpu", "cuda", "cuda:1"):
        begin_on(torch.device(device))
    one, two = torch.device("cuda"), torch.device("cuda:1")
    reset = "reset_peak_memory_stats"
    assert called == [("init",), (reset, one), ("init",), ("set_device", two), (reset, two)]


SHOW = "from evopress import machine; machine.exact_products(); print(machine.precision())"


@pytest.mark.parametrize(
    ("environment", "code"),
    [
        ({}, SHOW),
        ({"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}, SHOW),
        ({}, f"import torch; torch.set_float32_matmul_precision('medium'); {SHOW}"),
        ({}, f"import torch; torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True; {SHOW}"),
    ],
)
def test_products_are_exact_whatever_the_environment_says(environment: dict[str, str], code: str) -> None:
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True).stdout.strip()
    further = "".join(f", {name}={value}" for name, value in environment.items())
    assert said == f"float32 products highest, TF32 off, sums of half-precision products float32{further}"


def test_what_is_not_exact_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert "TF32 on" in machine.precision()


@pytest.mark.parametrize(
    ("device", "available", "told"),
    [("auto", True, ", NVIDIA H200"), ("cuda:1", True, ", NVIDIA H200"), ("cpu", True, ""), ("auto", False, "")],
)
def test_the_gpu_is_named_where_it_may_be_used(monkeypatch: pytest.MonkeyPatch, device: str, available: bool, told: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert machine.describe(2, device=device)["machine"].endswith(f" cores, 2 torch threads{told}")
    assert machine.describe(1, device=device)["machine"].endswith(f" cores, 1 torch thread{told}")


def test_a_run_records_its_precision(tiny: Callable[..., Any], tmp_path: Path) -> None:
    assert tiny("dry_run=true").code == 0
    recorded = json.loads((tmp_path / "run" / "environment.json").read_text(encoding="utf-8"))
    assert recorded["precision"].startswith("float32 products highest, TF32 off")
