"""Put levels of any source into a live model, whole or block by block, and take them out again."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor, nn

from evopress.compress.compressor import free_bytes
from evopress.currencies import num_experts
from evopress.errors import EvoPressError
from evopress.levels.decoded import DecodedLevels
from evopress.levels.modules import ATTENTION, BLOCK, MLP, PAIR, modules_of
from evopress.levels.union import LevelSource
from evopress.models.blocks import BlockModel
from evopress.models.dropping import check_identity, drop, restore, without_dropped
from evopress.models.experts import gathered
from evopress.models.routing import check_fillers, check_routers, drop_experts, expert_layer, restore_experts, without_experts
from evopress.units import Genome, Space, is_module


class Live(Protocol):
    """A model that can be held at any genome of a space, and is the dense one again afterwards."""

    blocks: BlockModel
    space: Space

    def levels_in(self, genome: Genome | None, index: int) -> Genome | None:
        """Return what of a genome concerns block `index`, or a part outside the blocks: equal values, equal parts.

        None stands for the dense model.
        """

    def modules_in(self, index: int) -> tuple[int, ...]:
        """Return the units that the attention and the MLP of block `index` belong to; nothing where none can be dropped."""

    def dropped_in(self, genome: Genome, index: int) -> tuple[int, int]:
        """Return whether a genome drops the attention and the MLP of a block, as 0 or 1 each."""

    def with_modules(self, index: int, levels: Genome | None) -> Genome | None:
        """Return what `levels_in` returned with no module dropped; weights in one that was are the dense ones."""

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

    def written(
        self, genome: Genome, parts: Collection[int] | None = None, *, on_host: bool = False
    ) -> AbstractContextManager[None]:
        """Hold the model in the form in which a checkpoint of the genome is written.

        Args:
            parts: whose weights are to be right, blocks and what is outside of them; None: all.
            on_host: the levels are decoded one by one where the block is, and lie in host memory.
        """


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


@contextmanager
def block_at(live: Live, index: int, genome: Genome | None, weights: Mapping[str, Tensor] = MappingProxyType({})) -> Iterator[None]:
    """Hold block `index`, or another part, on the device at a genome's levels, but with the weights that are given by name.

    Args: genome: None: the dense model.
    """
    with live.on_device(index):
        try:
            live.set_block(index, live.levels_in(genome, index))
            for name, slot in live.blocks.slots(index).items():
                if name in weights:
                    slot.put(weights[name].to(slot.weight.device))
            yield
        finally:
            live.restore_block(index)


def enough_to_keep(space: Space, itemsize: int, device: torch.device | None = None) -> int:
    """Return the bytes of decoded levels that are worth keeping: 256 MiB, or more where a block is larger; modules have none.

    A block at one genome differs from the block at the next in few units; the others should not be decoded again. A GPU keeps an
    eighth of what it has free: what is not decoded again is not read from the disk again either. Beyond 256 MiB no more than a
    third of that is kept, however large a block is.
    """
    worth = max(2**28, 2 * block_bytes(space, itemsize))
    if device is None or device.type != "cuda":
        return worth
    free = free_bytes(device)
    return min(max(worth, free // 8), max(2**28, free // 3))


def block_bytes(space: Space, itemsize: int) -> int:
    """Return the bytes of the decoded levels of a space's largest block, which are there while it runs, kept or not."""
    sizes: dict[int, int] = {}
    for unit in space.units:
        sizes[unit.block] = sizes.get(unit.block, 0) + unit.size * itemsize
    return max(sizes.values(), default=0)


def decoding_bytes(size: int, dtype: torch.dtype) -> int:
    """Return the bytes that decoding a weight of so many numbers takes: codes of a byte, float32, and the model's dtype."""
    return size * (5 + (0 if dtype.itemsize == 4 else dtype.itemsize))


class LiveModel:
    """A model whose units can be switched to levels, block by block: weights exchanged, modules dropped.

    Switching exchanges references: the dense weights stay where they are, untouched, and come back bit for bit. Levels travel to
    the compute device packed and are decoded there; see `DecodedLevels` for those that are kept.
    """

    def __init__(self, blocks: BlockModel, levels: LevelSource, *, cache_bytes: int | None = None) -> None:
        """Check that the levels fit the model, and where modules can be dropped, that a block without them is the identity.

        Args: cache_bytes: decoded levels to keep at most; None: see `enough_to_keep`.

        Raises: EvoPressError if the units differ, or it is not.
        """
        self.blocks = blocks
        self.levels = levels
        self.space = levels.space
        units = self.space.whole.units
        self._weights = [[i for i, unit in enumerate(units) if unit.block == part and not is_module(unit)] for part in blocks.parts]
        self._units = [[self.space.places[units[i].name] for i in weights] for weights in self._weights]
        self._modules, self._layers = self._places_of_modules(), [expert_layer(block) for block in blocks.blocks]
        self._droppable: Sequence[tuple[int, ...]] = self._modules or self._places_of_experts()
        has_weights = any(self._weights)
        self._slots = [list(blocks.slots(part).values()) if has_weights else [] for part in blocks.parts]
        self._check_weights()
        self._dense = [[slot.weight for slot in slots] for slots in self._slots]
        self._inside = self._places_inside() if has_weights and self._droppable else []
        kept = enough_to_keep(self.space, blocks.dtype.itemsize, blocks.device) if cache_bytes is None else cache_bytes
        self._decoded = DecodedLevels(kept, len(blocks.parts))
        self._fills_exactly = False  # not looked at yet
        self.num_loads = 0
        """Levels decoded so far."""
        if self._modules:
            check_identity(blocks)
        elif self._droppable:
            check_routers(blocks)

    def _check_weights(self) -> None:
        found = [(slot.name, slot.weight.numel()) for slots in self._slots for slot in slots]
        if found != [(unit.name, unit.size) for unit in self.space.whole.units if not is_module(unit)]:
            raise EvoPressError(
                f"the level database in {self.levels.folder} is of another model: its units have other names or sizes"
            )

    def _places_of_modules(self) -> list[tuple[int, int]]:
        """Return for every block the units that its attention and its MLP belong to; nothing where no module can be dropped."""
        places = {module: i for i, unit in enumerate(self.space.units) for module in modules_of(unit)}
        if not places:
            return []
        blocks = range(len(self.blocks.blocks))
        whole = any(unit.kind in (BLOCK, PAIR) for unit in self.space.units)
        kinds = [(ATTENTION, MLP) if whole else self.blocks.family.parts(block).kinds for block in blocks]
        if set(places) != {(block, kind) for block in blocks for kind in kinds[block]}:
            raise EvoPressError(
                f"the level database is of another model: its {sum(map(is_module, self.space.units))} units are not the modules of "
                f"{len(blocks)} blocks"
            )
        # A block that has one of them alone has it in both places.
        return [(places[block, kinds[block][0]], places[block, kinds[block][-1]]) for block in blocks]

    def _places_of_experts(self) -> list[tuple[int, ...]]:
        """Return for every block the units of its experts; nothing where none can be dropped."""
        places = {unit.name: i for i, unit in enumerate(self.space.units) if num_experts(unit)}
        names = [
            [f"{self.blocks.block_name(block)}.{layer.name}.{expert}" for expert in range(layer.count)] if layer else []
            for block, layer in enumerate(self._layers)
        ]
        if places and set(places) != {name for of_block in names for name in of_block}:
            raise EvoPressError(f"the level database is of another model: its {len(places)} experts are not those of this one")
        return [tuple(places[name] for name in of_block) for of_block in names] if places else []

    def _places_inside(self) -> list[list[int | None]]:
        """Return of every block, for each weight, which of what can be dropped there it lies in."""
        if self._modules:
            return [[0 if self.blocks.is_of_attention(slot.name) else 1 for slot in slots] for slots in self._slots]
        units = self.space.units
        places = [{units[unit].name: i for i, unit in enumerate(of_block)} for of_block in self._droppable]
        return [
            [of_block.get(slot.name.rpartition(".")[0]) for slot in slots]
            for slots, of_block in zip(self._slots, places, strict=False)
        ]

    def modules_in(self, index: int) -> tuple[int, ...]:
        """See `Live`."""
        return self._modules[index] if index < len(self._modules) else ()

    def with_modules(self, index: int, levels: Genome | None) -> Genome | None:
        """See `Live`."""
        if levels is None or index >= len(self._modules):  # experts that are dropped stay so: nothing would be sent to them
            return levels
        return (*levels[: len(self._slots[index])], 0, 0)

    def dropped_in(self, genome: Genome, part: int) -> tuple[int, int]:
        """Return whether a genome drops the attention and the MLP of a block, as 0 or 1 each; other parts have none."""
        if part >= len(self._modules):
            return 0, 0
        attention, mlp = self._gone_in(genome, part)
        return attention, mlp

    def _gone_in(self, genome: Genome, part: int) -> tuple[int, ...]:
        """Return whether a genome drops each of what can be dropped in a block, as 0 or 1."""
        units = self.space.units
        return tuple(int(units[i].levels[genome[i]].drops) for i in self._droppable[part])

    def levels_in(self, genome: Genome | None, index: int) -> Genome | None:
        """Return the levels of the weights of a part, and whether its attention and MLP, or its experts, are dropped, 0 or 1 each.

        Level -1 of a weight is the dense one: a weight in a dropped module has it, whatever the genome says, and others where the
        genome says so. None stands for the dense model.
        """
        if genome is None:
            return None
        weights = tuple(genome[i] for i in self._units[index])
        if index >= len(self._droppable):
            return weights
        dropped = self._gone_in(genome, index)
        if not weights:
            return dropped if any(dropped) else None
        if any(dropped):
            places = self._inside[index]
            weights = tuple(-1 if i is not None and dropped[i] else level for level, i in zip(weights, places, strict=True))
        return weights + dropped

    def set_block(self, index: int, levels: Sequence[int] | None, *, on_host: bool = False) -> None:
        """Give a part what `levels_in` returned, or its dense weights and all its modules for None, on the device it is on.

        Args: on_host: weights lie in host memory, where the part cannot be run if it is elsewhere.
        """
        for i, slot in enumerate(self._slots[index]):
            device = slot.weight.device
            dense = levels is None or levels[i] < 0
            weight = self._dense[index][i] if dense else self._weight(self._weights[index][i], levels[i], device)  # type: ignore[index]
            slot.put(weight.cpu() if on_host else weight.to(device))
        if index >= len(self._droppable):
            return
        block, gone = self.blocks.blocks[index], () if levels is None else levels[len(self._slots[index]) :]
        if self._modules:
            attention, mlp = gone or (0, 0)
            drop(block, self.blocks.family.parts(index), attention=bool(attention), mlp=bool(mlp))
        elif (layer := self._layers[index]) is not None:
            drop_experts(block, layer, gone)

    def restore_block(self, index: int) -> None:
        """Give a part back the very weights and modules that it came with, where they lay."""
        for slot, weight in zip(self._slots[index], self._dense[index], strict=True):
            slot.put(weight)
        if index < len(self._modules):
            restore(self.blocks.blocks[index], self.blocks.family.parts(index))
        elif index < len(self._droppable) and (layer := self._layers[index]) is not None:
            restore_experts(self.blocks.blocks[index], layer)

    def on_device(self, index: int) -> AbstractContextManager[nn.Module]:
        """See `Live`; dense weights that levels would replace are not carried there."""
        return self.blocks.on_device(index, dense=not self._slots[index])

    def skips(self, levels: Sequence[int] | None) -> bool:
        """See `Live`; weights at any level have to be multiplied, a block without attention and MLP has nothing to do."""
        return bool(self._modules) and levels is not None and all(levels[-2:])

    def applied(self, genome: Genome | None) -> AbstractContextManager[None]:
        """Hold the whole model at a genome; on leaving, every weight is the dense one again, and every module is back."""
        return held(self, genome)

    @contextmanager
    def written(self, genome: Genome, parts: Collection[int] | None = None, *, on_host: bool = False) -> Iterator[None]:
        """See `Live`. Where modules are dropped, see `without_dropped`; where experts are, `without_experts`."""
        self.space.check(genome)
        self._check_uneven(genome)
        parts = self.blocks.parts if parts is None else parts
        blocks = [part for part in parts if part < len(self.blocks.blocks)]
        try:
            for part in parts:
                levels = self.levels_in(genome, part)
                if self._slots[part] and levels is not None:
                    there = (0,) * len(self._droppable[part]) if part < len(self._droppable) else ()
                    self.set_block(part, (*levels[: len(self._slots[part])], *there), on_host=on_host)
            with gathered(*(self.blocks.blocks[index] for index in blocks)), self._without_dropped(genome, blocks):
                yield
        finally:
            for part in parts:
                self.restore_block(part)

    def _check_uneven(self, genome: Genome) -> None:
        """Raise EvoPressError if blocks keep fewer experts than others, and what fills them up would change the model."""
        if self._modules or not self._droppable or self._fills_exactly:
            return
        if len({sum(self._gone_in(genome, index)) for index, units in enumerate(self._droppable) if units}) > 1:
            check_fillers(self.blocks)
            self._fills_exactly = True

    def _without_dropped(self, genome: Genome, blocks: Collection[int]) -> AbstractContextManager[None]:
        """Hold the model without what a genome drops, as far as these blocks are concerned."""
        if not self._droppable:
            return nullcontext()
        dropped = [self._gone_in(genome, index) for index in range(len(self.blocks.blocks))]
        if self._modules:
            return without_dropped(self.blocks, [(attention, mlp) for attention, mlp in dropped])
        return without_experts(self.blocks, dropped, blocks)

    def _weight(self, unit: int, level: int, device: torch.device) -> Tensor:
        weight = self._decoded.find(self.space.whole.units[unit].block, (unit, level))
        if weight is None:
            weight = self.levels.read(unit, level, device).decode()
            self._check_fits(unit, weight)
            self.num_loads += 1
            self._decoded.keep((unit, level), weight)
        return weight

    def _check_fits(self, unit: int, weight: Tensor) -> None:
        """Raise EvoPressError unless a decoded weight has the shape and dtype of the model's."""
        whole = self.space.whole.units[unit]
        part = whole.block
        dense = self._dense[part][self._weights[part].index(unit)]
        if weight.shape != dense.shape or weight.dtype != dense.dtype:
            raise EvoPressError(
                f"{whole.name} is {weight.dtype} {list(weight.shape)} in the level database but "
                f"{dense.dtype} {list(dense.shape)} in the model: remove {self.levels.folder}, it is then built again"
            )
