"""Levels of one genome whose scales can be changed: the codes and zeros of quantized weights stay as they are.

A weight s · (q - z) is its own derivative with respect to the logarithm of its scale s, which is all that learning needs to know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evopress.compress.compressor import Compressed, Payload
from evopress.compress.gptq import Quantized
from evopress.files import make_folder
from evopress.levels.refine import compressed_at
from evopress.levels.store import LevelDatabase, encoded, fingerprint, write_block, write_manifest
from evopress.units import Space


class ScaledLevels:
    """A database with one level per unit, the scales of its blocks' quantized weights times factors; see `LevelSource`."""

    def __init__(self, database: LevelDatabase) -> None:
        """Begin with factors of 1."""
        self.database = database
        self.logarithms: dict[str, Tensor] = {}
        """Unit name to the natural logarithms of the factors, float32 [R, G] in host memory; only of what has scales."""
        for place, unit in enumerate(database.space.units):
            payload = None if unit.is_outside else database.read(place, 0)
            if isinstance(payload, Quantized):
                self.logarithms[unit.name] = torch.zeros(payload.scales.shape)

    @property
    def folder(self) -> Path:
        """See `LevelSource`."""
        return self.database.folder

    @property
    def space(self) -> Space:
        """See `LevelSource`."""
        return self.database.space

    def read(self, unit: int, level: int, device: torch.device | str = "cpu") -> Payload:
        """See `LevelSource`; scales are rounded to the dtype that they are stored in."""
        return self._scaled(self.space.units[unit].name, self.database.read(unit, level, device))

    def _scaled(self, name: str, payload: Payload) -> Payload:
        if not isinstance(payload, Quantized) or name not in self.logarithms:
            return payload
        factors = self.logarithms[name].exp().to(payload.scales.device)
        return replace(payload, scales=(payload.scales.float() * factors).to(payload.scales.dtype))

    def gradient(self, name: str, weight: Tensor, of_weight: Tensor) -> Tensor:
        """Return the gradient with respect to a unit's logarithms, float32 [R, G].

        Args:
            weight: as it is, [R, C].
            of_weight: the gradient with respect to it, float32 [R, C].
        """
        rows, groups = self.logarithms[name].shape
        return (of_weight * weight.float()).reshape(rows, groups, -1).sum(-1)

    def write(self, folder: Path, recipe: Mapping[str, Any], further: Mapping[str, Any]) -> None:
        """Write a database of the weights as they are; their errors are those that they had with the scales they came with.

        Args:
            recipe: all that decides them.
            further: what else its manifest says.
        """
        make_folder(folder)
        units, entries = self.space.units, []
        for block in dict.fromkeys(unit.block for unit in units):
            here = [place for place, unit in enumerate(units) if unit.block == block]
            weights: dict[str, list[Compressed]] = {}
            for place in here:
                stored = compressed_at(self.database, place, 0)
                weights[units[place].name] = [replace(stored, payload=self._scaled(units[place].name, stored.payload))]
            part = encoded(weights, {units[place].name: units[place] for place in here})
            entries.append(write_block(folder, block, [part], list(weights)))
        write_manifest(
            folder,
            method=self.space.method,
            fingerprint=fingerprint(recipe),
            recipe=recipe,
            entries=entries,
            further=further,
        )
