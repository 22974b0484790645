"""Mixed-bit quantization with GPTQ levels (paper section 4.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from evopress.compress.compressor import Compressor
from evopress.compress.gguf_levels import GGUFLevels
from evopress.compress.gguf_types import GGUF_TYPES
from evopress.compress.gptq import DENSE, GPTQ
from evopress.currencies import CURRENCIES, Currency
from evopress.engines import Engine, engine_of
from evopress.errors import EvoPressError
from evopress.methods.method import NO_REST, Rest
from evopress.methods.targets import BYTES, as_typed, check_targets, further_limits, size_budget
from evopress.settings import AUTO, QuantSettings, RunSettings
from evopress.units import Budget, Genome, Level, Space

_WIDEST = 32
"""Bits of a weight as it is, at most; how many a model's have is checked against its database."""


def for_engine(run: RunSettings) -> dict[str, Any]:
    """Return what a run's settings say of the engine, as `Quantization` takes it.

    Raises: EvoPressError if there is no such engine.
    """
    return {"engine": engine_of(run.engine), "served": "bfloat16" if run.model.dtype == AUTO else run.model.dtype}


@dataclass(frozen=True)
class Quantization:
    """See `Method`."""

    settings: QuantSettings
    bits: float | None
    """Average bits per weight; None: the size is the target."""
    size: str | None = None
    limits: tuple[Any, ...] = ()
    engine: Engine | None = None
    """What the levels have to suit."""
    served: str = "bfloat16"
    """Dtype that the model computes in."""

    @classmethod
    def of(cls, run: RunSettings) -> Quantization:
        """Take the method out of a run's settings; raise EvoPressError without a target."""
        if run.bits is None and run.size is None:
            raise EvoPressError(
                "method quant needs a target: give bits=2.5, the average number of bits per weight, or size=60MB of the whole model"
            )
        return cls(run.method, run.bits, run.size, tuple(run.limits), **for_engine(run))

    @property
    def name(self) -> str:
        """See `Method`."""
        return "quant"

    @property
    def weights(self) -> Quantization:
        """GPTQ levels."""
        return self

    @property
    def modules(self) -> None:
        """Modules stay."""
        return None

    @property
    def currency(self) -> Currency | None:
        """Bits, as the paper counts them; bytes where the target is a size."""
        return None if self.size is None else BYTES

    def compressor(self, sizes: Sequence[int], *, dtype_bits: int) -> Compressor:
        """Return GPTQ, on integers or on GGUF's types, as the settings say; sizes do not matter to it."""
        s = self.settings
        if s.grid == "gguf":
            return GGUFLevels(
                types=tuple(str(level) for level in s.levels if level != DENSE),
                damping=s.damping,
                block_size=s.block_size,
                tolerance=s.tolerance,
                dense_bits=dtype_bits if DENSE in s.levels else None,
            )
        codes = self.engine is not None and self.engine.zeros_are_codes
        return GPTQ(
            bits=tuple(bits for bits in s.levels if bits != DENSE),
            dense_bits=dtype_bits if DENSE in s.levels else None,
            recipe=s.recipe,
            symmetric=s.symmetric,
            group_sizes=s.group_sizes,
            tolerance=s.tolerance,
            group_size=s.group_size,
            damping=s.damping,
            block_size=s.block_size,
            zeros="codes" if codes else s.zeros,
            scale_dtype=self._scale_dtype if s.scale_dtype == AUTO else s.scale_dtype,
        )

    @property
    def _scale_dtype(self) -> str:
        """Return the dtype that scales are stored in where the settings leave it open: one that the engine does not round."""
        return "bfloat16" if self.engine is not None and self.engine.scales_as_served and self.served == "bfloat16" else "float16"

    @property
    def include(self) -> tuple[str, ...]:
        """See `WeightSource.include`."""
        return tuple(self.settings.include)

    @property
    def experts_together(self) -> bool:
        """See `WeightSource.experts_together`."""
        return self.settings.experts == "layer"

    @property
    def target_is_level(self) -> bool:
        """Tell whether the target is one of the levels."""
        return self.bits in [bits_of(level) for level in self.settings.levels if level != DENSE]

    @property
    def propagate(self) -> str | None:
        """Key of the level through which activations leave a block."""
        return None if self.settings.propagate_bits is None else str(self.settings.propagate_bits)

    @property
    def correction(self) -> float:
        """Share of what activations have lost there that levels make good."""
        return self.settings.correction

    def check(self, *, searching: bool, typed: str | None = None) -> None:
        """Refuse bits outside the levels, and at their ends too if there is to be a search."""
        check_targets(self.size, self.limits)
        self.compressor((), dtype_bits=16)
        if self.bits is None:
            return
        target = typed or f"bits={self.bits:g}"
        widths = [bits_of(level) for level in self.settings.levels]
        least, most = min(widths), max(widths)
        if not least <= self.bits <= most:
            if math.isnan(self.bits):
                raise EvoPressError(f"bits=nan is no number: give one from {least} to {most}, such as bits=2.5")
            where = f"below the lowest level ({least} bits)" if self.bits < least else f"above the highest level ({most} bits)"
            raise EvoPressError(f"{target} is {where} of method.levels {self.settings.levels}: change it or add such a level")
        if searching and self.bits in (least, most):
            which = "lowest" if self.bits == least else "highest"
            raise EvoPressError(
                f"{target} is the {which} of method.levels {self.settings.levels}, "
                f"which leaves nothing to search: give bits between {least} and {most}, or leave search and export out of stages"
            )

    def budget(self, space: Space, rest: Rest = NO_REST) -> Budget:
        """Return floor(bits · Σ weights), or what the size leaves for the units."""
        if self.size is not None:
            budget = size_budget(self.size, space, rest)
        else:
            assert self.bits is not None
            total = math.floor(as_typed(self.bits) * space.size)
            budget = Budget(total=total, target=self.bits, measure="bits per weight")
        return replace(budget, limits=further_limits(self.limits, space, rest))

    def generations(self, space: Space) -> None:
        """The settings say."""
        return

    def uniform_name(self, level: Level) -> str:
        """Return "uniform_3" for 3 bits."""
        return f"uniform_{level.key}"

    def costs(self, space: Space, genome: Genome) -> dict[str, Any]:
        """Return the columns of the result table that say what a genome spends."""
        return {
            "bits_per_weight": space.cost_in(CURRENCIES["bits"], genome) / space.size,
            "bits_per_weight_with_metadata": space.stored_bits(genome) / space.size,
        }

    def dense_costs(self, bits: int) -> dict[str, Any]:
        """Return the same columns for the dense model."""
        return {"bits_per_weight": float(bits), "bits_per_weight_with_metadata": float(bits)}


def bits_of(level: Any) -> float:
    """Return the bits a weight that a level of the settings takes; of one as it is, at most."""
    if level == DENSE:
        return _WIDEST
    return float(GGUF_TYPES[level].bits_per_weight) if level in GGUF_TYPES else level
