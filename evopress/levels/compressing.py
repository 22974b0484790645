"""Compress the units of a part, those that share an input together, in the order in which a forward reaches them.

Weights are fitted to the inputs that the compressed model has. Where the dense model's activations walk beside, they also make good
a share of what those inputs have lost (`compress/asymmetric.py`), to blocks before and to the same block's units that came first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from torch import Tensor

from evopress.compress.asymmetric import corrected
from evopress.compress.compressor import Compressed, Compressor
from evopress.errors import EvoPressError
from evopress.levels.calibration import adding_linears, collect_hessians, collect_lost, head_hessian
from evopress.levels.hessians import BlockHessians
from evopress.models.blocks import BlockModel
from evopress.models.experts import ExpertLinear

_DAMPING = 0.01
"""Share of a Hessian's mean diagonal added to it where a weight is corrected."""


@dataclass
class Walking:
    """Activations [N, L, d] that enter a part, or left the last block for the head."""

    buffer: Tensor
    """The compressed model's."""
    batch: int
    """Sequences at a time."""
    dense: Tensor | None = None
    """The dense model's, where weights are corrected."""
    correction: float = 0.0
    """Share of what the inputs have lost that weights make good, in [0, 1]."""
    mine: Sequence[range] | None = None
    """See `shares`: which sequences the activations are of; None: all, which are one share."""

    def beside(self, blocks: BlockModel, index: int) -> Tensor | None:
        """Return the dense activations that a part's weights are corrected by; experts see different tokens in the two models."""
        if any(isinstance(slot.module, ExpertLinear) for slot in blocks.slots(index).values()):
            return None
        return self.dense


def hessians_of(blocks: BlockModel, index: int, walking: Walking, *, advance: bool = False) -> BlockHessians:
    """Return a part's Hessians as it is; one batch's where weights are corrected, which need only who shares an input."""
    buffer, mine = walking.buffer, walking.mine
    if walking.beside(blocks, index) is not None:
        buffer, mine = buffer[: walking.batch], None
    if index == blocks.head_part:
        return head_hessian(blocks, buffer, walking.batch, mine=mine)
    return collect_hessians(blocks, index, buffer, walking.batch, advance=advance, mine=mine)


def compress_units(
    blocks: BlockModel,
    index: int,
    names: Collection[str],
    hessians: BlockHessians,
    compressor: Compressor,
    walking: Walking | None = None,
    *,
    placed: dict[str, Tensor] | None = None,
    settled: Callable[[str, list[Compressed]], Tensor | None] = lambda name, levels: None,
) -> dict[str, list[Compressed]]:
    """Compress units of a part, held dense on the device, to all their levels.

    Args:
        names: the units, of those that the part has.
        walking: what enters it, where weights are corrected.
        placed: weights of units that are not the dense ones in the compressed model; takes what `settled` returns.
        settled: the weight that units after this one shall meet; None: the one that is placed.

    Raises: EvoPressError with the names of the units.
    """
    slots = blocks.slots(index)
    made: dict[str, list[Compressed]] = {}
    dense = None if walking is None else walking.beside(blocks, index)
    adding = None if walking is None or dense is None else adding_linears(blocks, index, dense[: walking.batch])
    placed = {} if placed is None else placed
    for owner, H in hessians.hessians.items():
        weights = {name: slots[name].weight for name in slots if name in names and hessians.owners[name] == owner}
        if not weights:
            continue
        try:
            if walking is not None and dense is not None:
                lost = collect_lost(blocks, index, owner, dense, walking.buffer, walking.batch, placed, adding)
                H, share = lost.H, walking.correction
                weights = {name: corrected(W, lost, share=share, damping=_DAMPING) for name, W in weights.items()}
            results = compressor.compress(weights, H.to(blocks.device))
        except EvoPressError as error:
            raise type(error)(f"{', '.join(weights)}: {error}") from None
        made |= {name: list(levels) for name, levels in results.items()}
        if dense is not None:
            placed |= {name: weight for name in weights if (weight := settled(name, made[name])) is not None}
    return {name: made[name] for name in slots if name in made}
