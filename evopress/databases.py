"""The level databases of a run: what decides each, where it lies, and what is built where it is missing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from evopress.compress.compressor import Compressor
from evopress.data.opening import GivenText, RunText
from evopress.data.tokens import tokens_digest
from evopress.engines import Engine
from evopress.errors import EvoPressError
from evopress.levels.build import ensure_database
from evopress.levels.calibration import complete_hessians
from evopress.levels.hessians import HessianStore
from evopress.levels.modules import ensure_modules
from evopress.levels.plan import BuildNeeds, BuildSettings, planned
from evopress.levels.store import LevelDatabase, fingerprint
from evopress.levels.tied import TiedLevels, as_engine_has, tied
from evopress.levels.union import Levels, LevelUnion, join, joint_fingerprint
from evopress.methods import Method
from evopress.models.blocks import BlockModel
from evopress.models.loading import DTYPES
from evopress.models.opening import ModelSource
from evopress.progress import in_bytes
from evopress.settings import LevelDatabaseSettings
from evopress.units import Space, is_of_expert

logger = logging.getLogger(__name__)


class Databases:
    """Builds and opens the levels of a method's sources for one model and text; nothing is read before it is asked for."""

    def __init__(
        self,
        settings: LevelDatabaseSettings,
        method: Method,
        engine: Engine | None,
        *,
        root: Path,
        dtype: str,
        model: ModelSource,
        text: RunText | GivenText,
        blocks: Callable[[], BlockModel],
    ) -> None:
        """Take what decides the levels.

        Args:
            engine: what the found genome is for; its prices are the searched levels'.
            root: folder of all models' databases.
            dtype: of the model's weights, by name.
            blocks: opens the model block by block.
        """
        self.root = root
        self.reused = False
        """Whether all of `stored` was there."""
        self._settings, self._method, self._engine = settings, method, engine
        self._dtype, self._model, self._text, self._open_blocks = dtype, model, text, blocks

    @property
    def _blocks(self) -> BlockModel:
        return self._open_blocks()

    @property
    def folder(self) -> Path:
        """Where the model's databases lie."""
        return self.root / self._model.pretrained.name

    def ensure(self, name: str, compressor: Compressor) -> tuple[LevelDatabase, bool]:
        """Return the level database that a compressor makes from the run's model and text, and whether it was there.

        Args: name: what the database is of; begins its folder's name.
        """
        build = self._build_settings(name, compressor)
        database, reused = ensure_database(build, self._blocks, self._text.calibration, compressor)
        logger.info("level database: %s %s (%s)", "reused" if reused else "built", database.folder, in_bytes(database.num_bytes))
        return database, reused

    def _build_settings(self, name: str, compressor: Compressor) -> BuildSettings:
        """Return how `ensure` builds, without building."""
        settings, source = self._settings, self._method.weights
        assert source is not None
        recipe = {
            **self._source_recipe,
            "method": name,
            "compressor": compressor.settings(),
            "propagate": source.propagate,
        }
        if source.correction:
            recipe["correction"] = source.correction
        if outside := [name for part in self._blocks.parts[len(self._blocks.blocks) :] for name in self._blocks.slots(part)]:
            recipe["outside"] = outside
        return BuildSettings(
            root=self.root,
            method=name,
            model_name=self._model.pretrained.name,
            recipe=recipe,
            propagate=source.propagate,
            correction=source.correction,
            batch_tokens=settings.batch_tokens,
            activations=settings.activations,
            hessians=self._hessians if settings.keep_hessians else None,
        )

    @cached_property
    def _source_recipe(self) -> dict[str, Any]:
        """What decides the Hessians of dense activations."""
        tokens = self._text.calibration
        return {
            **self.model_recipe,
            "data": {
                "tokens_sha256": tokens_digest(tokens),
                "num_sequences": tokens.shape[0],
                "sequence_length": tokens.shape[1],
                "source": self._text.name,
                **({"leading": list(self._text.leading_ids)} if self._text.leading_ids else {}),
            },
        }

    @property
    def model_recipe(self) -> dict[str, Any]:
        """What of a model decides its levels."""
        pretrained = self._model.pretrained
        return {"model": {"digest": pretrained.digest, "dtype": self._dtype, "family": pretrained.family.name}}

    def complete_hessians(self) -> HessianStore:
        """Return the Hessians of dense activations, computed first where they are missing: a reused database may have left none."""
        settings = self._settings
        complete_hessians(
            self._hessians,
            self._blocks,
            self._text.calibration,
            batch_tokens=settings.batch_tokens,
            activations=settings.activations,
        )
        return self._hessians

    @cached_property
    def _hessians(self) -> HessianStore:
        """Where Hessians of dense activations are kept."""
        return HessianStore(self.folder / f"hessians-{fingerprint(self._source_recipe)}")

    @property
    def _modules_recipe(self) -> dict[str, Any]:
        assert self._method.modules is not None
        return {**self.model_recipe, "method": self._method.modules.name, **self._method.modules.recipe()}

    @property
    def fingerprint(self) -> str:
        """The fingerprint that the run's levels have or will have, without building them."""
        found = []
        if self._method.weights is not None:
            found.append(self._build_settings(self._method.weights.name, self.compressor).fingerprint)
        if self._method.modules is not None:
            found.append(fingerprint(self._modules_recipe))
        return joint_fingerprint(found)

    @cached_property
    def searched(self) -> Levels:
        """The run's levels, of all its method's sources, as they are searched; built first where they are missing."""
        space = self.as_searched(self.stored.space)
        return self.stored if space is self.stored.space else TiedLevels(self.stored, space)

    @property
    def ties(self) -> dict[str, str]:
        """What beside its fingerprint makes genomes of the level database other ones."""
        return {"experts": "layer"} if self._method.weights is not None and self._method.weights.experts_together else {}

    def as_searched(self, space: Space) -> Space:
        """Return a space of the run's levels with what a token reads of them, its engine's prices, and what is tied."""
        experts, reads = bool(self.ties), self._blocks.reads()
        if any(unit.name in reads for unit in space.units):
            space = replace(space, units=tuple(replace(unit, read=reads.get(unit.name, 1.0)) for unit in space.units))
        if self._method.weights is None:
            return space
        if self._engine is not None:
            dtype = str(self.compressor.settings().get("scale_dtype", "float16"))
            space = as_engine_has(
                space,
                self._engine,
                columns={
                    name: slot.weight.shape[1] for part in self._blocks.parts for name, slot in self._blocks.slots(part).items()
                },
                stored=torch.finfo(DTYPES[dtype]).bits + 16,
                written=8 * self._blocks.dtype.itemsize,
            )
        if experts and not any(is_of_expert(unit) for unit in space.units):
            raise EvoPressError(
                "method.experts=layer gives the experts of a layer one level, but this model has no experts: leave it out"
            )
        return tied(space, self._engine, experts=experts) if self._engine is not None or experts else space

    @cached_property
    def stored(self) -> LevelUnion | LevelDatabase:
        """The run's levels with a unit for each weight; built first where they are missing."""
        parts: list[LevelDatabase] = []
        if self._method.weights is not None:
            database, self.reused = self.ensure(self._method.weights.name, self.compressor)
            parts.append(database)
        if self._method.modules is not None:
            database, reused = ensure_modules(
                self.root,
                model_name=self._model.pretrained.name,
                method=self._method.modules.name,
                recipe=self._modules_recipe,
                space=self._module_space(),
            )
            self.reused = reused and (self.reused or not parts)
            parts.append(database)
        if len(parts) == 1:
            return replace(parts[0], currency=self._method.currency)
        return LevelUnion(
            parts, method=self._method.name, currency=self._method.currency, is_of_attention=self._blocks.is_of_attention
        )

    def _module_space(self) -> Space:
        assert self._method.modules is not None
        return self._method.modules.space(self._blocks.shapes(), dtype_bits=8 * self._blocks.dtype.itemsize)

    @cached_property
    def compressor(self) -> Compressor:
        """What makes the levels of compressed weights."""
        assert self._method.weights is not None
        sizes = [slot.weight.numel() for part in self._blocks.parts for slot in self._blocks.slots(part).values()]
        return self._method.weights.compressor(sizes, dtype_bits=8 * self._blocks.dtype.itemsize)

    def plan(self) -> tuple[Space, BuildNeeds | None]:
        """Return the space of the run's levels and what is needed to build what is missing of them, without building.

        Modules that can be dropped need nothing.
        """
        spaces, needs = [], None
        if self._method.weights is not None:
            settings = self._build_settings(self._method.weights.name, self.compressor)
            space, needs = planned(settings, self._blocks, self._text.calibration, self.compressor)
            spaces.append(space)
        if self._method.modules is not None:
            spaces.append(self._module_space())
        if len(spaces) == 1:
            return self.as_searched(spaces[0].priced(self._method.currency)), needs
        joined, _ = join(
            spaces, method=self._method.name, currency=self._method.currency, is_of_attention=self._blocks.is_of_attention
        )
        return self.as_searched(joined), needs

    def plan_further(self, name: str, compressor: Compressor, *, seen: bool) -> tuple[Space, BuildNeeds]:
        """Return the space of levels that `ensure` would make, and what that needs, without building.

        Args: seen: by then the Hessians of dense activations will be there.
        """
        return planned(self._build_settings(name, compressor), self._blocks, self._text.calibration, compressor, seen=seen)

    def any_compressor(self) -> Compressor:
        """Return what makes the levels of compressed weights, whatever the units' sizes."""
        assert self._method.weights is not None
        return self._method.weights.compressor((), dtype_bits=8 * self._blocks.dtype.itemsize)
