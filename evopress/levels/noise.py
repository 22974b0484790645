"""Weights with noise in the place of levels: W + t ‖W‖ Z / √n, Z normal, n the weight's numbers, so that ‖Q - W‖² ≈ t² ‖W‖²."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from evopress.models.blocks import BlockModel
from evopress.units import Level, Space, is_module


@dataclass(frozen=True)
class _Weight:
    weight: Tensor
    codec: ClassVar[str] = "none"

    def decode(self) -> Tensor:
        return self.weight


class NoisyLevels:
    """The weights of a dense model with noise of some relative sizes, as a source of levels; modules stay as they are."""

    def __init__(self, space: Space, blocks: BlockModel, sizes: Sequence[float], *, seed: int) -> None:
        """Take the weights as they are.

        Args:
            space: whose units get a level for each size.
            sizes: t² of every level.
            seed: decides the noise, with the unit and level.
        """
        self.folder = Path("noise")
        self.sizes, self.seed = tuple(sizes), seed
        levels = tuple(Level(f"noise {size:g}", 0, f"{size:g}", 0) for size in sizes)
        self.space = _with_levels(space, levels)
        self._weights = {slot.name: slot.weight for part in blocks.parts for slot in blocks.slots(part).values()}

    def read(self, unit: int, level: int, device: torch.device | str = "cpu") -> _Weight:
        """See `LevelSource`; the noise is the same on every device, but for rounding."""
        W = self._weights[self.space.whole.units[unit].name]
        generator = torch.Generator().manual_seed((self.seed * len(self.space.whole) + unit) * len(self.sizes) + level)
        Z = torch.randn(W.shape, generator=generator).to(device)
        scale = (self.sizes[level] / W.numel()) ** 0.5 * W.float().norm()
        return _Weight((W.to(device).float() + scale.to(device) * Z).to(W.dtype))


def _with_levels(space: Space, levels: tuple[Level, ...]) -> Space:
    units = tuple(unit if is_module(unit) else replace(unit, levels=levels) for unit in space.units)
    return replace(space, units=units, untied=None if space.untied is None else _with_levels(space.untied, levels))
