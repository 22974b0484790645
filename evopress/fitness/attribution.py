"""How much of a genome's fitness each unit holds: one forward and one backward pass, block by block.

Let a unit's weight be W + s (Q - W), Q its level's and W the dense model's. Its attribution is the derivative of the measure with
respect to s at 1: a = ⟨∂KL/∂W, Q - W⟩ = Σ_t ∂KL/∂y_t · (Q - W) x_t for a linear y = W x. The KL divergence is close to quadratic in
s, so the unit holds about a/2 of it.

A module that can be dropped has a gate 1 - s on what it adds to the residual stream: s is 0 where it is kept, 1 where it is
dropped. At the dense model the derivative in s is 0, so the curvature is needed too. It is the Gauss-Newton matrix's, whose
diagonal is the mean square, over labels that the model at the genome draws itself, of the derivative of their log likelihood: one
draw, and one more way back, for all modules.

What moving a unit from its level's weight Q to another's, Q', changes is to second order ⟨∂KL/∂W, Q' - Q⟩ and half the curvature
along Q' - Q. The same draw gives that of all units and levels: each keeps the products of its error with what enters it.

Shapes: b sequences, l tokens each, d hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from evopress.fitness.backward import BackwardPass
from evopress.fitness.measures import Measure
from evopress.levels.live import Live
from evopress.units import Genome


class Derivatives(NamedTuple):
    """Of a measure on each sequence, in the scale s of every unit's error: float64 [b, units] on the host, per predicted token."""

    first: Tensor
    second: Tensor
    """The curvature, of modules alone; one draw for each sequence."""


def attribute(
    live: Live,
    genome: Genome,
    ids: Tensor,
    base: Tensor,
    measure: Measure,
    *,
    uniform: Tensor | None = None,
    max_tokens_in_flight: int = 4096,
    chunk_tokens: int = 256,
) -> Tensor:
    """Return what each unit holds of a genome's measure on each sequence, twice; see `Attribution`.

    Args and errors: as `derivatives`.

    Returns: float64 [b, units] on the host, per predicted token; 0 for a unit whose level is the dense weight.
    """
    first, second = derivatives(
        live,
        genome,
        ids,
        base,
        measure,
        uniform=uniform,
        max_tokens_in_flight=max_tokens_in_flight,
        chunk_tokens=chunk_tokens,
    )
    for unit in {unit for index in range(len(live.blocks.blocks)) for unit in live.modules_in(index)}:
        # A dropped module holds first / 2, as a weight does. From s = 0 on, dropping adds first + second / 2. Of SmolLM2 with 8 of
        # 60 modules dropped these rank the single changes by 0.93 and 0.83; first - second / 2 at s = 1 does by 0.24, and first at
        # s = 0 by 0.28.
        if not live.space.units[unit].levels[genome[unit]].drops:
            first[:, unit] = 2 * first[:, unit] + second[:, unit]
    return first


def derivatives(
    live: Live,
    genome: Genome,
    ids: Tensor,
    base: Tensor,
    measure: Measure,
    *,
    uniform: Tensor | None = None,
    max_tokens_in_flight: int = 4096,
    chunk_tokens: int = 256,
) -> Derivatives:
    """Return the derivatives of a genome's measure in the scale of each unit's error; the model is the dense one before and after.

    Args:
        ids: token ids int64 [b, l], l ≥ 2.
        base: the dense model's last hidden states [b, l', d], l' ≥ l, in host memory.
        measure: a measure with one number per token.
        uniform: where modules can be dropped, numbers in [0, 1), [b, l - 1], that draw the labels.
        max_tokens_in_flight: tokens per forward and backward of one block; bounds memory.
        chunk_tokens: tokens whose logits exist at a time.

    Raises: EvoPressError if one is not finite.
    """
    live.space.check(genome)
    assert uniform is not None or not live.modules_in(0), "modules have a curvature, which is drawn"
    back = BackwardPass(
        live,
        genome,
        ids,
        base,
        measure,
        uniform=uniform if live.modules_in(0) else None,
        max_tokens_in_flight=max_tokens_in_flight,
        chunk_tokens=chunk_tokens,
    )
    first, second = back.run()
    return Derivatives(first[0], second)


def expand(
    live: Live,
    genome: Genome,
    ids: Tensor,
    base: Tensor,
    measure: Measure,
    *,
    uniform: Tensor,
    counts: Sequence[int] | None = None,
    max_tokens_in_flight: int = 4096,
    chunk_tokens: int = 256,
) -> Tensor:
    """Return what moving each unit alone to each of its levels changes of a genome's measure, to second order; see `Expansion`.

    Args and errors: as `derivatives`, where no module can be dropped.
        counts: how many of each unit's levels are looked at, the first ones; None: all.

    Returns: float64 [b, units, levels] on the host, per predicted token; 0 at the genome's own level, and NaN for levels that a
        unit has not, and for all others of one outside the blocks, which is not expanded.
    """
    assert not live.modules_in(0), "modules are not expanded"
    units = live.space.units
    counts = [len(unit.levels) for unit in units] if counts is None else counts
    levels = [tuple(min(level, count - 1) for count in counts) for level in range(max(counts))]
    back = BackwardPass(
        live,
        genome,
        ids,
        base,
        measure,
        errors_of=(genome, *levels),
        uniform=uniform,
        max_tokens_in_flight=max_tokens_in_flight,
        chunk_tokens=chunk_tokens,
    )
    first, _ = back.run()
    tokens = ids.shape[1] - 1
    found = (first[1:] - first[0] + (back.drawn[1:] - back.drawn[0]) ** 2 / tokens / 2).permute(1, 2, 0).clone()
    for place, (unit, count, own) in enumerate(zip(units, counts, genome, strict=True)):
        if not 0 <= unit.block < len(live.blocks.blocks):
            found[:, place] = torch.nan
        found[:, place, count:] = torch.nan
        found[:, place, own] = 0.0
    return found
