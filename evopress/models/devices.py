"""Share a machine's GPUs among the jobs of a sweep: each process takes one that no other has."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from pathlib import Path

import torch
from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)
_claimed: dict[int, FileLock] = {}
"""GPUs of this process, each with its lock, which the system frees when the process ends."""


def claim_gpu() -> torch.device:
    """Return the first GPU that no other process of this user has claimed, and claim it until this process ends.

    A process that asks again gets the same one. Where all are taken it is the first, with a warning.
    """
    for index in _claimed:
        return torch.device("cuda", index)
    count = torch.cuda.device_count()
    for index in range(count):
        lock = FileLock(_lock_path(index))
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError):
            continue
        _claimed[index] = lock
        return torch.device("cuda", index)
    logger.warning("other runs use all %d GPUs: sharing the first (model.device=cuda:N names another)", count)
    return torch.device("cuda", 0)


def begin_on(device: torch.device) -> None:
    """Make a GPU the one that this process works on, and count its peak memory from here; nothing for other devices."""
    if device.type != "cuda":
        return
    torch.cuda.init()
    if device.index is not None:
        torch.cuda.set_device(device)
    torch.cuda.reset_peak_memory_stats(device)


def _lock_path(index: int) -> Path:
    """Return a GPU's lock file, by its own identity where torch tells it: CUDA_VISIBLE_DEVICES may number it differently."""
    identity = str(getattr(torch.cuda.get_device_properties(index), "uuid", index))
    return Path(tempfile.gettempdir()) / f"evopress-{os.getuid()}-gpu-{re.sub(r'[^0-9A-Za-z-]', '', identity)}.lock"
