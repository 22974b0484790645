"""Boundaries of compression at which one sign off would go unseen elsewhere: found by changing lines one at a time."""

from __future__ import annotations

import pytest
import torch

from evopress.compress.columns import move_scale
from evopress.compress.sparsegpt import _slices


@pytest.mark.parametrize("weight", [-0.9, 0.0])
def test_a_scale_stays_positive(weight):
    """Where the best one is none at all, the grid keeps the one that it has."""
    H, steps, scale = torch.ones(1, 1), torch.ones(1, 1), torch.full((1,), 0.125)
    error, moved = torch.full((1, 1), weight) - steps * scale, torch.zeros(1, 1)
    move_scale(H @ steps, steps, H @ error, scale, moved=moved, dtype=torch.float16)
    assert scale.item() == 0.125 and moved.item() == 0.0


def test_slices_of_levels_fit_the_room():
    parts = list(_slices([("a", 1), ("a", 2), ("a", 3), ("b", 1)], {"a": 4, "b": 9}, 8))
    assert parts == [[("a", 1), ("a", 2)], [("a", 3)], [("b", 1)]]
