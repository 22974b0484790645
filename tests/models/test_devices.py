"""GPUs shared among processes; the GPUs are made up, the locks and processes are real."""

from __future__ import annotations

import logging
import multiprocessing
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from evopress.models import devices
from evopress.models.loading import pick_device


@pytest.fixture
def two_gpus(monkeypatch: Any, tmp_path: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"GPU-{index}/../x"))
    monkeypatch.setattr(devices.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(devices, "_claimed", {})


def claim(connection: Any) -> None:
    """Claim a GPU in a process of its own, and hold it until told to end."""
    devices._claimed = {}
    connection.send(str(pick_device("auto")))
    connection.recv()


def other_process() -> Any:
    mine, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=claim, args=(theirs,), daemon=True)
    process.start()
    return mine, process


def test_every_process_gets_a_gpu_of_its_own_and_frees_it_by_ending(two_gpus: None, tmp_path: Any) -> None:
    connection, process = other_process()
    assert connection.recv() == "cuda:0"
    assert pick_device("auto") == torch.device("cuda:1")
    assert pick_device("auto") == torch.device("cuda:1")  # the next job of the same process
    process.kill()
    process.join()
    connection, process = other_process()
    assert connection.recv() == "cuda:0"
    process.kill()
    process.join()
    assert {path.parent for path in tmp_path.rglob("*.lock")} == {tmp_path}


def test_where_all_are_taken_the_first_is_shared_with_a_warning(two_gpus: None, caplog: Any) -> None:
    processes = [other_process() for _ in range(2)]
    assert sorted(connection.recv() for connection, _ in processes) == ["cuda:0", "cuda:1"]
    with caplog.at_level(logging.WARNING):
        assert pick_device("auto") == torch.device("cuda:0")
    assert "other runs use all 2 GPUs" in caplog.text
    for _, process in processes:
        process.kill()
        process.join()
