"""Compress the units of a part, those that share an input together, in the order in which a forward reaches them.

Weights are fitted to the inputs that the compressed model has. Where the dense model's activations walk beside, they also make good
a share of what those inputs have lost (`compress/asymmetric.py`), to blocks before and to the same block's units that came first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evopress.compress.asymmetric import Lost, corrected
from evopress.compress.compressor import Compressed, Compressor
from evopress.errors import EvoPressError
from evopress.levels.calibration import adding_linears, collect_hessians, collect_lost, head_hessian
from evopress.levels.codec import Packed
from evopress.levels.hessians import BlockHessians
from evopress.models.blocks import BlockModel
from evopress.models.experts import ExpertLinear
from evopress.ranks import divided, first, launched

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
    """Return a part's Hessians as it is; where weights are corrected, which have others, only who shares an input."""
    buffer, batch, mine = walking.buffer, walking.batch, walking.mine
    if index != blocks.embedding_part and walking.beside(blocks, index) is not None:  # the embedding goes by all the text
        owners = first(lambda: _collected(blocks, index, buffer[:batch], batch).owners)
        return BlockHessians(owners, {owner: torch.empty(0) for owner in owners.values()})
    return _collected(blocks, index, buffer, batch, advance=advance, mine=mine)


def _collected(blocks: BlockModel, index: int, buffer: Tensor, batch: int, **settings: Any) -> BlockHessians:
    if index == blocks.head_part:
        settings.pop("advance", None)
        return head_hessian(blocks, buffer, batch, **settings)
    return collect_hessians(blocks, index, buffer, batch, **settings)


def compress_units(
    blocks: BlockModel,
    index: int,
    names: Collection[str],
    hessians: BlockHessians,
    compressor: Compressor,
    walking: Walking | None = None,
    *,
    placed: dict[str, Tensor] | None = None,
    settled: Callable[[str, list[Compressed]], Compressed | None] = lambda name, levels: None,
) -> dict[str, list[Compressed]]:
    """Compress units of a part, held dense on the device, to all their levels; each process returns those of its share.

    Args:
        names: the units, of those that the part has.
        walking: what enters it, where weights are corrected.
        placed: weights of units that are not the dense ones in the compressed model; takes those that `settled` returns, of all.
        settled: what units after this one shall meet; None: the weight that is placed.

    Raises: EvoPressError with the names of the units.
    """
    slots = blocks.slots(index)
    made: dict[str, list[Compressed]] = {}
    placed = {} if placed is None else placed
    dense = None if walking is None else walking.beside(blocks, index)
    sharing = [(owner, [name for name in slots if name in names and hessians.owners[name] == owner]) for owner in hessians.hessians]
    sharing = [(owner, alike) for owner, alike in sharing if alike]

    def compress(groups: Sequence[tuple[list[str], Tensor | Lost]]) -> dict[str, Packed]:
        found: dict[str, Packed] = {}
        for alike, stands_on in groups:
            with named(alike):
                weights, H = {name: slots[name].weight for name in alike}, stands_on
                if not isinstance(H, Tensor):
                    assert walking is not None
                    share = walking.correction
                    weights = {name: corrected(W, H, share=share, damping=_DAMPING) for name, W in weights.items()}
                    H = H.H
                made.update({name: list(levels) for name, levels in compressor.compress(weights, H.to(blocks.device)).items()})
            found |= {name: Packed(level.payload) for name in alike if (level := settled(name, made[name])) is not None}
        return found

    def settle(groups: Sequence[tuple[list[str], Tensor | Lost]]) -> None:
        for found in divided(groups, compress):
            placed.update({name: packed.payload.decode() for name, packed in found.items()})

    if walking is None or dense is None:
        settle([(alike, hessians.hessians[owner]) for owner, alike in sharing])
    else:
        start = dense[: walking.batch]
        adding = first(lambda: adding_linears(blocks, index, start))
        for owner, alike in sharing:
            with named(alike):
                lost = collect_lost(blocks, index, owner, dense, walking.buffer, walking.batch, placed, adding, mine=walking.mine)
            # Apart where processes share them, so that it does not depend on how many do.
            settle([([name], lost) for name in alike] if launched() else [(alike, lost)])
    return {name: made[name] for name in slots if name in made}


@contextmanager
def named(units: Sequence[str]) -> Iterator[None]:
    """Put units' names before an error."""
    try:
        yield
    except EvoPressError as error:
        raise type(error)(f"{', '.join(units)}: {error}") from None
