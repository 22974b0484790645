"""Unstructured sparsity: levels a fixed number of weights apart (paper section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evopress.compress.compressor import Compressor
from evopress.compress.sparse import SparsityLevels, check_step, derive_step, kept_at
from evopress.compress.sparsegpt import SparseGPT
from evopress.errors import EvoPressError
from evopress.methods.method import NO_REST, Rest
from evopress.methods.pruners import PRUNERS
from evopress.methods.targets import check_targets, further_limits
from evopress.settings import RunSettings, SparsitySettings
from evopress.units import Budget, Genome, Level, Space


@dataclass(frozen=True)
class Sparsity:
    """See `Method`."""

    settings: SparsitySettings
    sparsity: float
    limits: tuple[Any, ...] = ()

    @classmethod
    def of(cls, run: RunSettings) -> Sparsity:
        """Take the method out of a run's settings; raise EvoPressError without a target."""
        if run.sparsity is None:
            raise EvoPressError("method sparsity needs a target: give sparsity=0.7, the share of weights to prune")
        return cls(run.method, run.sparsity, tuple(run.limits))

    @property
    def name(self) -> str:
        """See `Method`."""
        return "sparsity"

    @property
    def weights(self) -> Sparsity:
        """Pruned weights."""
        return self

    @property
    def modules(self) -> None:
        """Modules stay."""
        return None

    @property
    def currency(self) -> None:
        """Weights kept."""
        return None

    def check(self, *, searching: bool, typed: str | None = None) -> None:
        """Refuse a sparsity outside (0, 1) and settings out of range."""
        check_targets(None, self.limits)
        self.compressor((), dtype_bits=16)

    @property
    def include(self) -> tuple[str, ...]:
        """See `WeightSource.include`."""
        return tuple(self.settings.include)

    @property
    def experts_together(self) -> bool:
        """See `WeightSource.experts_together`."""
        return self.settings.experts == "layer"

    @property
    def centre(self) -> float:
        """Sparsity in the middle of the levels."""
        return self.sparsity if self.settings.centre is None else self.settings.centre

    @property
    def target_is_level(self) -> bool:
        """Every unit has a level at the centre."""
        return self.sparsity == self.centre

    @property
    def propagate(self) -> None:
        """Activations leave a block dense, as in the authors' code: one set of Hessians serves all sparsities."""
        return None

    @property
    def correction(self) -> float:
        """Dense activations have lost nothing."""
        return 0.0

    def compressor(self, sizes: Sequence[int], *, dtype_bits: int) -> Compressor:
        """Return the pruner that the settings name, its step derived from the units' sizes where none is given."""
        s = self.settings
        step = s.step if s.step is not None else derive_step(sizes, self.centre, s.num_levels) if sizes else 1
        if sizes:
            check_step(sizes, sparsity=self.centre, step=step)
        make = PRUNERS.get(s.compressor, key="method.compressor")
        own = {"recipe": s.recipe, "damping": s.damping, "block_size": s.block_size} if make is SparseGPT else {}
        pruner = make(sparsity=self.centre, step=step, num_levels=s.num_levels, dtype_bits=dtype_bits, **own)
        if not isinstance(pruner, SparsityLevels) or type(pruner).settings is SparsityLevels.settings:
            raise EvoPressError(
                f"method.compressor={s.compressor} is no pruner: expected a subclass of evopress.compress.sparse.SparsityLevels "
                "with prune and settings"
            )
        return pruner

    def budget(self, space: Space, rest: Rest = NO_REST) -> Budget:
        """Return the weights that uniform sparsity keeps."""
        total = sum(kept_at(unit.size, self.sparsity) for unit in space.whole.units)
        limits = further_limits(self.limits, space, rest)
        wider = f"set method.centre ({self.centre:g} here, around which levels lie) nearer to it or a larger method.step,"
        return Budget(total=total, target=self.sparsity, measure="sparsity", limits=limits, wider=wider)

    def generations(self, space: Space) -> None:
        """The settings say."""
        return

    def uniform_name(self, level: Level) -> str:
        """Return "uniform" for the target's level."""
        return "uniform" if level.key == "0" and self.target_is_level else f"uniform_{level.label}"

    def costs(self, space: Space, genome: Genome) -> dict[str, Any]:
        """Return the share of weights pruned, and how many are kept."""
        kept = space.cost(genome)
        return {"sparsity": 1.0 - kept / space.size, "weights_kept": kept}

    def dense_costs(self, bits: int) -> dict[str, Any]:
        """Return sparsity 0."""
        return {"sparsity": 0.0}
