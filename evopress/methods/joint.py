"""One budget for everything: quantized weights, weights as they are and dropped modules in one space, under the size of the file.

Not in the paper, which searches one kind of level at a time. A level's cost is what storing it takes; what lies in a dropped module
is free, so that its bytes can go to what stays.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from evopress.currencies import EXPERT, Currency
from evopress.engines import Engine
from evopress.errors import EvoPressError
from evopress.levels.modules import dropped_modules
from evopress.methods.drop import Modules, experts_dropped, floors
from evopress.methods.method import NO_REST, Rest
from evopress.methods.quant import Quantization, for_engine
from evopress.methods.targets import BYTES
from evopress.settings import JointSettings, RunSettings
from evopress.units import Budget, Genome, Level, Space


@dataclass(frozen=True)
class Joint:
    """See `Method`."""

    settings: JointSettings
    size: str
    exchange: str
    limits: tuple[Any, ...] = ()
    engine: Engine | None = None
    served: str = "bfloat16"

    @classmethod
    def of(cls, run: RunSettings) -> Joint:
        """Take the method out of a run's settings; raise EvoPressError without a target."""
        if run.size is None:
            raise EvoPressError(
                "method joint needs a target: give size=60MB, of the whole model, or size=2.25bpw, bits per weight of all weights"
            )
        return cls(run.method, run.size, run.search.exchange, tuple(run.limits), **for_engine(run))

    @property
    def name(self) -> str:
        """See `Method`."""
        return "joint"

    @property
    def weights(self) -> Quantization:
        """GPTQ levels, from the database that method quant has with the same settings."""
        return Quantization(self.settings, bits=None, size=self.size, limits=self.limits, engine=self.engine, served=self.served)

    @property
    def modules(self) -> Modules:
        """Attention and MLP modules, or whole blocks."""
        return Modules(self.settings, dropped=self.settings.dropped)

    @property
    def currency(self) -> Currency:
        """Bytes as stored."""
        return BYTES

    def check(self, *, searching: bool, typed: str | None = None) -> None:
        """Refuse sizes and limits that are none, and exchanges that cannot keep them."""
        if searching and self.exchange != "fit":
            raise EvoPressError(
                f"search.exchange={self.exchange} cannot trade modules for levels: method joint needs search.exchange=fit"
            )
        self.weights.check(searching=searching, typed=typed)

    @property
    def target_is_level(self) -> bool:
        """The size lies between levels."""
        return False

    def budget(self, space: Space, rest: Rest = NO_REST) -> Budget:
        """Return what the size leaves for the units."""
        budget = self.weights.budget(space, rest)
        return replace(budget, limits=(*budget.limits, *floors(space)))

    def generations(self, space: Space) -> None:
        """The settings say."""
        return

    def uniform_name(self, level: Level) -> str:
        """Return "uniform_3" for 3 bits."""
        return self.weights.uniform_name(level)

    def costs(self, space: Space, genome: Genome) -> dict[str, Any]:
        """Return the bits of codes and as stored, per weight of all units, and how many modules, or experts, are dropped."""
        dropped = {"modules_dropped": len(dropped_modules(space, genome))}
        return {**self.weights.costs(space, genome), **(experts_dropped(space, genome) or dropped)}

    def dense_costs(self, bits: int) -> dict[str, Any]:
        """Return the same columns for the dense model."""
        what = "experts_dropped" if self.settings.granularity == EXPERT else "modules_dropped"
        return {**self.weights.dense_costs(bits), what: 0}
