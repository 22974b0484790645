"""Compress the units of a part, those that share an input together, in the order in which a forward reaches them.

Weights are fitted to the inputs that the compressed model has. Where the dense model's activations walk beside, they also make good
a share of what those inputs have lost (`compress/asymmetric.py`), to blocks before and to the same block's units that came first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

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
from evopress.ranks import launched, map_shards, on_rank_zero

T = TypeVar("T")
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
        owners = on_rank_zero(lambda: _collected(blocks, index, buffer[:batch], batch).owners)
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
    keep: Callable[[str, list[Compressed]], T],
    walking: Walking | None = None,
    *,
    placed: dict[str, Tensor] | None = None,
    settled: Callable[[str, list[Compressed]], Compressed | None] = lambda name, levels: None,
) -> list[T]:
    """Compress units of a part, held dense on the device, to all their levels.

    Args:
        names: the units, of those that the part has.
        hessians: of the part; each is taken out when the units that share it are compressed.
        keep: makes of a unit's levels what is to stay of them; they are given up before the next units are compressed.
        walking: what enters it, where weights are corrected.
        placed: weights of units that are not the dense ones in the compressed model; takes those that `settled` returns, of all.
        settled: what units after this one shall meet; None: the weight that is placed.

    Returns: what `keep` has made of this process's share of the units.
    Raises: EvoPressError with the names of the units.
    """
    slots = blocks.slots(index)
    made: list[T] = []
    placed = {} if placed is None else placed
    dense = None if walking is None else walking.beside(blocks, index)
    sharing = [[name for name in slots if name in names and hessians.owners[name] == owner] for owner in hessians.hessians]
    sharing = [alike for alike in sharing if alike]

    def compress(alike: list[str], stands_on: Tensor | Lost) -> dict[str, Packed]:
        weights, H, found = {name: slots[name].weight for name in alike}, stands_on, {}
        if not isinstance(H, Tensor):
            assert walking is not None
            share = walking.correction
            weights = {name: corrected(W, H, share=share, damping=_DAMPING) for name, W in weights.items()}
            H = H.H
        levels = dict(compressor.compress(weights, H.to(blocks.device)))
        for name in alike:
            of_unit = list(levels.pop(name))
            if (level := settled(name, of_unit)) is not None:
                found[name] = Packed(level.payload)
            made.append(keep(name, of_unit))
        return found

    def settle(groups: Sequence[list[str]], stand_on: Callable[[list[str]], Tensor | Lost]) -> None:
        def compress_all(mine: Sequence[list[str]]) -> dict[str, Packed]:
            found: dict[str, Packed] = {}
            for alike in mine:
                with named(alike):
                    found |= compress(alike, stand_on(alike))
            return found

        for found in map_shards(groups, compress_all):
            for name in list(found):
                placed[name] = found.pop(name).payload.decode()

    if walking is None or dense is None:
        settle(sharing, lambda alike: hessians.hessians.pop(hessians.owners[alike[0]]))
        return made
    start = dense[: walking.batch]
    adding = on_rank_zero(lambda: adding_linears(blocks, index, start))

    def correct(alike: list[str]) -> None:
        with named(alike):
            owner = hessians.owners[alike[0]]
            lost = collect_lost(blocks, index, owner, dense, walking.buffer, walking.batch, placed, adding, mine=walking.mine)
        # Apart where processes share them, so that it does not depend on how many do.
        settle([[name] for name in alike] if launched() else [alike], lambda _: lost)

    for alike in sharing:
        correct(alike)
    return made


@contextmanager
def named(units: Sequence[str]) -> Iterator[None]:
    """Put units' names before an error."""
    try:
        yield
    except EvoPressError as error:
        raise type(error)(f"{', '.join(units)}: {error}") from None
