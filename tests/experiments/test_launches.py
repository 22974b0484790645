"""What launches are counted of a sweep: with kernels they are as many for a block of columns, whatever its columns and levels."""

from __future__ import annotations

import torch

from evopress.compress import sparsegpt
from experiments.benchmark import launches


def counted(*, kernels: bool, levels: int, block_size: int = 128) -> launches.Launches:
    """Prune 256 columns to some levels."""
    with launches.counting(kernels=kernels) as found:
        sparsegpt.sweep(torch.ones(256, levels).uniform_(), torch.eye(256), [1] * levels, [100] * levels, block_size=block_size)
    return found


def test_launches_with_kernels_go_by_blocks_of_columns_alone() -> None:
    once, often, narrow = (counted(kernels=True, levels=n, block_size=size) for n, size in ((2, 128), (9, 128), (2, 64)))
    assert once.count == often.count < 30 and once.waits == often.waits == 0
    assert narrow.count > once.count
    plain = counted(kernels=False, levels=9)
    assert plain.count > 2 * 256 and plain.waits == 9 * 2


def test_rounding_takes_fewer_with_kernels_too() -> None:
    units, found = {"a": 100, "b": 7}, []
    for kernels in (True, False):
        with launches.counting(kernels=kernels) as counter:
            assert list(launches.rounding(units, 256)) == [256]
        found.append(counter.count / 256)
    assert found[0] < 1 < 5 < found[1]
