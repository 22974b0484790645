"""What a method is to the pipeline: its compressor, its budget, its fingerprint. A new method is one entry here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from evopress.compress.compressor import Compressor
from evopress.compress.gptq import GPTQ
from evopress.errors import EvoPressError
from evopress.settings import QuantSettings, RunSettings
from evopress.units import Budget, Genome, Space


@dataclass(frozen=True)
class Quantization:
    """Mixed-bit GPTQ (paper section 4.3)."""

    settings: QuantSettings
    bits: float

    def compressor(self) -> Compressor:
        """Return the compressor that makes the levels; raise EvoPressError if a setting is out of range."""
        s = self.settings
        return GPTQ(
            bits=tuple(s.levels),
            group_size=s.group_size,
            damping=s.damping,
            block_size=s.block_size,
            scale_dtype=s.scale_dtype,
        )

    @property
    def propagate(self) -> str | None:
        """Key of the level through which activations leave a block."""
        return None if self.settings.propagate_bits is None else str(self.settings.propagate_bits)

    def check(self, *, searching: bool) -> None:
        """Raise EvoPressError if no genome can meet the target, from settings alone, before any model work.

        Args: searching: refuse also a target that a single genome meets.
        """
        least, most = min(self.settings.levels), max(self.settings.levels)
        if not least <= self.bits <= most:
            where = f"below the lowest level ({least} bits)" if self.bits < least else f"above the highest level ({most} bits)"
            raise EvoPressError(
                f"bits={self.bits:g} is {where} of method.levels {self.settings.levels}: change bits or add such a level"
            )
        if searching and self.bits in (least, most):
            which = "lowest" if self.bits == least else "highest"
            raise EvoPressError(
                f"bits={self.bits:g} is the {which} of method.levels {self.settings.levels}, "
                f"which leaves nothing to search: give bits between {least} and {most}, or leave search and export out of stages"
            )
        self.compressor()

    def budget(self, space: Space) -> Budget:
        """Return floor(bits · Σ weights)."""
        return Budget(total=math.floor(self.bits * space.size), target=self.bits, measure="bits per weight")

    def costs(self, space: Space, genome: Genome) -> dict[str, Any]:
        """Return the columns of the result table that say what a genome spends."""
        return {
            "bits_per_weight": space.cost(genome) / space.size,
            "bits_per_weight_with_metadata": space.stored_bits(genome) / space.size,
        }

    def dense_costs(self, bits: int) -> dict[str, Any]:
        """Return the same columns for the dense model."""
        return {"bits_per_weight": float(bits), "bits_per_weight_with_metadata": float(bits)}


def make_method(settings: RunSettings) -> Quantization:
    """Return the run's method, checked against its target."""
    if isinstance(settings.method, QuantSettings):
        if settings.bits is None:
            raise EvoPressError("method quant needs a target: give bits=2.5, the average number of bits per weight")
        method = Quantization(settings.method, settings.bits)
        method.check(searching="search" in settings.stages)
        return method
    raise EvoPressError(f"method {settings.method!r} is unknown")
