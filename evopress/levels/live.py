"""Put levels into a live model and take them out again: weights here, dropped modules in `modules.py`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from evopress.errors import EvoPressError
from evopress.levels.union import LevelSource
from evopress.models.blocks import BlockModel
from evopress.units import Genome, Space


class Live(Protocol):
    """A model that can be held at any genome of a space, and is the dense one again afterwards."""

    blocks: BlockModel
    space: Space

    def levels_in(self, genome: Genome | None, index: int) -> Genome | None:
        """Return what of a genome concerns block `index`, or a part outside the blocks: equal values, equal parts.

        None stands for the dense model.
        """

    def set_block(self, index: int, levels: Sequence[int] | None) -> None:
        """Give block `index`, or a part outside the blocks, on the device it is on, what `levels_in` returned."""

    def restore_block(self, index: int) -> None:
        """Give block `index` back what it came with."""

    def on_device(self, index: int) -> AbstractContextManager[nn.Module]:
        """Hold block `index` on the compute device; it may be run once it has been set."""

    def skips(self, levels: Sequence[int] | None) -> bool:
        """Tell whether a block with these levels returns what enters it, and so need not be run."""

    def applied(self, genome: Genome | None) -> AbstractContextManager[None]:
        """Hold the whole model at a genome."""

    def written(self, genome: Genome) -> AbstractContextManager[None]:
        """Hold the model in the form in which a checkpoint of the genome is written."""


@contextmanager
def held(live: Live, genome: Genome | None) -> Iterator[None]:
    """Hold all parts of a live model at a genome, and give each back what it came with, whatever happens in between."""
    try:
        if genome is not None:
            live.space.check(genome)
        for index in live.blocks.parts:
            live.set_block(index, live.levels_in(genome, index))
        yield
    finally:
        for index in live.blocks.parts:
            live.restore_block(index)


@contextmanager
def part_held(live: Live, part: int | None, levels: Genome | None) -> Iterator[None]:
    """Hold a part outside the blocks at what `levels_in` returned; no part, nothing to hold."""
    if part is None:
        yield
        return
    try:
        live.set_block(part, levels)
        yield
    finally:
        live.restore_block(part)


def enough_to_keep(space: Space, itemsize: int) -> int:
    """Return the bytes of decoded levels that are worth keeping: 256 MiB, or more where a block is larger.

    A block at one genome differs from the block at the next in few units; the others should not be decoded again.
    """
    sizes: dict[int, int] = {}
    for unit in space.units:
        sizes[unit.block] = sizes.get(unit.block, 0) + unit.size * itemsize
    return max(2**28, 2 * max(sizes.values(), default=0))


class LiveModel:
    """A model whose units can be switched to levels of a database, block by block.

    Switching exchanges references: the dense weights stay where they are, untouched, and come back bit for bit. Levels travel to
    the compute device packed and are decoded there; decoded ones are kept, the least recently used given up first.
    """

    def __init__(self, blocks: BlockModel, database: LevelSource, *, cache_bytes: int | None = None) -> None:
        """Check that the database fits the model.

        Args: cache_bytes: decoded levels to keep at most; None: see `enough_to_keep`.

        Raises: EvoPressError if their units differ.
        """
        self.blocks = blocks
        self.database = database
        self.space = database.space
        self._slots = [list(blocks.slots(index).values()) for index in blocks.parts]
        names = [slot.name for slots in self._slots for slot in slots]
        sizes = [slot.weight.numel() for slots in self._slots for slot in slots]
        if names != [unit.name for unit in self.space.units] or sizes != [unit.size for unit in self.space.units]:
            raise EvoPressError(f"the level database in {database.folder} is of another model: its units have other names or sizes")
        self._dense = [[slot.weight for slot in slots] for slots in self._slots]
        self._first = [0]
        for slots in self._slots:
            self._first.append(self._first[-1] + len(slots))
        self._cache: OrderedDict[tuple[int, int], Tensor] = OrderedDict()
        self._cache_bytes = enough_to_keep(self.space, blocks.dtype.itemsize) if cache_bytes is None else cache_bytes
        self._cached_bytes = 0
        self.num_loads = 0
        """Levels decoded so far."""

    def levels_in(self, genome: Genome | None, index: int) -> Genome | None:
        """Return the levels of block `index`, or of a part outside the blocks; None stands for the dense model."""
        return None if genome is None else genome[self._first[index] : self._first[index + 1]]

    def set_block(self, index: int, levels: Sequence[int] | None) -> None:
        """Give block `index` these levels, one per unit of the block, or its dense weights for None, on the device it is on."""
        first = self._first[index]
        for i, slot in enumerate(self._slots[index]):
            device = slot.weight.device
            weight = self._dense[index][i] if levels is None else self._weight(first + i, levels[i], device)
            slot.put(weight.to(device))

    def restore_block(self, index: int) -> None:
        """Give block `index` back the very weights that it came with, where they lay."""
        for slot, weight in zip(self._slots[index], self._dense[index], strict=True):
            slot.put(weight)

    def on_device(self, index: int) -> AbstractContextManager[nn.Module]:
        """See `Live`; dense weights that levels would replace are not carried there."""
        return self.blocks.on_device(index, dense=False)

    def skips(self, levels: Sequence[int] | None) -> bool:
        """See `Live`; weights at any level have to be multiplied."""
        return False

    def written(self, genome: Genome) -> AbstractContextManager[None]:
        """See `Live`."""
        return self.applied(genome)

    def applied(self, genome: Genome | None) -> AbstractContextManager[None]:
        """Hold the whole model at a genome; on leaving, every weight is the dense one again."""
        return held(self, genome)

    def _weight(self, unit: int, level: int, device: torch.device) -> Tensor:
        key = (unit, level)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        weight = self.database.read(unit, level, device).decode()
        self._check_fits(unit, weight)
        self.num_loads += 1
        size = weight.numel() * weight.element_size()
        if size <= self._cache_bytes:
            self._cache[key] = weight
            self._cached_bytes += size
            while self._cached_bytes > self._cache_bytes:
                _, given_up = self._cache.popitem(last=False)
                self._cached_bytes -= given_up.numel() * given_up.element_size()
        return weight

    def _check_fits(self, unit: int, weight: Tensor) -> None:
        """Raise EvoPressError unless a decoded weight has the shape and dtype of the model's."""
        block = self.space.units[unit].block
        dense = self._dense[block][unit - self._first[block]]
        if weight.shape != dense.shape or weight.dtype != dense.dtype:
            raise EvoPressError(
                f"{self.space.units[unit].name} is {weight.dtype} {list(weight.shape)} in the level database but "
                f"{dense.dtype} {list(dense.shape)} in the model: remove {self.database.folder}, it is then built again"
            )
