"""Fuse elementwise work with torch.compile, where a compiler is there (`fitness.compile=true`).

Matrix products stay the library's; what lies between them (norms, rotary embeddings, softmax) is read and written once instead of
once per operation. Results change by rounding: fused bfloat16 operations keep float32 in between.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def can_compile(device: torch.device | str) -> bool:
    """Compile a small function for a device; where that fails, say so in one sentence and return False."""
    try:
        torch.compile(_probe)(torch.ones(8, device=device))
    except Exception as error:  # whatever a backend, its compiler or the system raises
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        logger.warning("fitness.compile=true is left off: torch.compile does not work on %s here (%s)", device, reason[:200])
        return False
    return True


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function compiled once for any sizes."""
    return torch.compile(function, dynamic=True)


def _probe(x: Tensor) -> Tensor:
    return (x * 2).exp().sum()
