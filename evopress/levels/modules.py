"""Drop modules of a live model and take them back: the levels of depth pruning, which store no weights.

A level database of dropped modules is a manifest alone. A unit is an attention module, an MLP, a whole block, or a pair of
consecutive blocks; its last level drops it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evopress.errors import EvoPressError
from evopress.files import make_folder
from evopress.levels.live import held
from evopress.levels.locking import alone_in, clear
from evopress.levels.store import MANIFEST, DamagedDatabaseError, LevelDatabase, fingerprint, write_manifest
from evopress.models.blocks import BlockModel
from evopress.models.dropping import drop, restore, shortened
from evopress.units import Genome, Space, Unit

ATTENTION, MLP, BLOCK, PAIR = "attention", "mlp", "block", "pair"
"""Kinds of units."""
KEEP, DROP = "keep", "drop"
"""Keys and labels of levels."""


def modules_of(unit: Unit) -> tuple[tuple[int, str], ...]:
    """Return what a unit stands for: (block, ATTENTION or MLP) of each of its modules."""
    if unit.kind in (ATTENTION, MLP):
        return ((unit.block, unit.kind),)
    blocks = (unit.block, unit.block + 1) if unit.kind == PAIR else (unit.block,)
    return tuple((block, kind) for block in blocks for kind in (ATTENTION, MLP))


def dropped_modules(space: Space, genome: Sequence[int]) -> set[tuple[int, str]]:
    """Return the modules that a genome drops."""
    return {
        module
        for unit, level in zip(space.units, genome, strict=True)
        if unit.levels[level].key == DROP
        for module in modules_of(unit)
    }


def ensure_modules(
    root: Path, *, model_name: str, method: str, recipe: Mapping[str, Any], space: Space
) -> tuple[LevelDatabase, bool]:
    """Open the manifest of a space of modules, writing it first if there is none; also tell whether it was there.

    Raises: EvoPressError if the folder cannot be written to.
    """
    digits = fingerprint(recipe)
    folder = root / model_name / f"{method}-{digits}"
    try:
        if (folder / MANIFEST).is_file():
            database = LevelDatabase.open(folder)
            clear(folder)
            return database, True
    except DamagedDatabaseError:
        pass  # written again below
    units = [
        {
            "name": unit.name,
            "block": unit.block,
            "kind": unit.kind,
            "size": unit.size,
            "levels": [
                {"label": level.label, "key": level.key, "cost": level.cost, "stored_bits": level.stored_bits}
                for level in unit.levels
            ],
        }
        for unit in space.units
    ]
    make_folder(folder)
    with alone_in(folder):
        write_manifest(folder, method=method, fingerprint=digits, recipe=recipe, entries=[{"units": units}])
    return LevelDatabase.open(folder), False


class LiveModules:
    """A model whose modules can be dropped and taken back, block by block; see `Live`."""

    def __init__(self, blocks: BlockModel, space: Space) -> None:
        """Check that the space fits the model, and that a block without its modules is the identity.

        Raises: EvoPressError if it does not, or is not.
        """
        self.blocks = blocks
        self.space = space
        places = {module: i for i, unit in enumerate(space.units) for module in modules_of(unit)}
        expected = {(block, kind) for block in range(len(blocks.blocks)) for kind in (ATTENTION, MLP)}
        if set(places) != expected:
            raise EvoPressError(
                f"the level database is of another model: its {len(space)} units are not the modules of {len(blocks.blocks)} blocks"
            )
        self._units = [(places[index, ATTENTION], places[index, MLP]) for index in range(len(blocks.blocks))]
        self._keys = [[level.key for level in unit.levels] for unit in space.units]
        self._check_identity()

    def levels_in(self, genome: Genome | None, index: int) -> Genome | None:
        """Return whether block `index` drops its attention and its MLP, as 0 or 1 each; None stands for the dense model."""
        if genome is None:
            return None
        attention, mlp = (int(self._keys[unit][genome[unit]] == DROP) for unit in self._units[index])
        return (attention, mlp) if attention or mlp else None

    def set_block(self, index: int, levels: Sequence[int] | None) -> None:
        """Drop what `levels_in` says of block `index`."""
        attention, mlp = levels or (0, 0)
        drop(self.blocks.blocks[index], self.blocks.family, attention=bool(attention), mlp=bool(mlp))

    def restore_block(self, index: int) -> None:
        """Give block `index` its modules back."""
        restore(self.blocks.blocks[index], self.blocks.family)

    def on_device(self, index: int) -> AbstractContextManager[nn.Module]:
        """See `Live`."""
        return self.blocks.on_device(index)

    def skips(self, levels: Sequence[int] | None) -> bool:
        """Tell whether a block with these levels returns what enters it, and so need not be run."""
        return levels is not None and all(levels)

    def applied(self, genome: Genome | None) -> AbstractContextManager[None]:
        """Hold the whole model at a genome; on leaving, every module is back."""
        return held(self, genome)

    @contextmanager
    def written(self, genome: Genome) -> Iterator[None]:
        """Hold the model as it is written to a checkpoint: blocks that are dropped whole left out, singly dropped modules zeroed.

        A dropped attention or MLP of a block that stays has an output projection of zeros, so that any engine computes what the
        search measured, though not any faster. The blocks that stay are numbered anew, and fields of the configuration with one
        entry per block are cut.
        """
        blocks, family = self.blocks, self.blocks.family
        self.space.check(genome)
        levels = [self.levels_in(genome, index) or (0, 0) for index in range(len(blocks.blocks))]
        kept = [index for index, both in enumerate(levels) if not all(both)]
        zeroed = [
            blocks.blocks[index].get_submodule(name)
            for index in kept
            for dropped, name in zip(levels[index], (family.attention_output, family.mlp_output), strict=True)
            if dropped
        ]
        parameters = [parameter for module in zeroed for parameter in module.parameters()]
        data = [parameter.data for parameter in parameters]
        model: Any = blocks.model
        config, held = model.config, blocks.decoder.get_submodule(family.blocks)
        try:
            for parameter in parameters:
                parameter.data = torch.zeros_like(parameter.data)
            model.config = shortened(config, kept, len(levels), family)
            setattr(blocks.decoder, family.blocks, nn.ModuleList(blocks.blocks[index] for index in kept))
            yield
        finally:
            setattr(blocks.decoder, family.blocks, held)
            model.config = config
            for parameter, before in zip(parameters, data, strict=True):
                parameter.data = before

    def _check_identity(self) -> None:
        blocks = self.blocks
        hidden = torch.linspace(-1.0, 1.0, 4 * blocks.hidden_size, device=blocks.device).reshape(1, 4, -1).to(blocks.dtype)
        blocks.prepare(4)
        block, family = blocks.blocks[0], blocks.family
        handles = [block.get_submodule(name).register_forward_hook(_zeroed) for name in (family.attention, family.mlp)]
        try:
            with blocks.on_device(0):
                same = torch.equal(blocks.run(0, hidden), hidden)
        finally:
            for handle in handles:
                handle.remove()
        if not same:
            raise EvoPressError(
                "a block of this model changes its input even without attention and MLP (it normalises the residual stream): "
                "method drop needs blocks that add to it, choose another model"
            )


def _zeroed(module: nn.Module, args: Any, output: Any) -> Any:
    return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)
