"""What prunes weights, by the names of `method.compressor`: ours, and those of installed packages."""

from __future__ import annotations

from collections.abc import Callable

from evopress.compress.magnitude import Magnitude
from evopress.compress.sparse import SparsityLevels
from evopress.compress.sparsegpt import SparseGPT
from evopress.compress.wanda import Wanda
from evopress.registry import Registry

PRUNERS: Registry[Callable[..., SparsityLevels]] = Registry(
    "pruner", {"sparsegpt": SparseGPT, "wanda": Wanda, "magnitude": Magnitude}, group="evopress.pruners"
)
"""What makes a pruner, called with the fields of `SparsityLevels` as keywords."""
