"""What the stages of a run share, each part made when it is first needed: model, text, level database, evaluator."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from evopress.currencies import num_experts
from evopress.data.opening import GivenText, RunText
from evopress.data.tokens import tokens_digest
from evopress.databases import Databases
from evopress.engines import engine_of
from evopress.errors import EvoPressError
from evopress.files import given_path, open_folder
from evopress.fitness.archive import ARCHIVE, Archive, Archiving, NoArchive, code_digest
from evopress.fitness.fusion import can_compile
from evopress.fitness.measures import MEASURES, Measure, make_measure
from evopress.fitness.minibatch import base_states
from evopress.fitness.plain import PlainEvaluator
from evopress.fitness.population import Evaluator, PopulationEvaluator
from evopress.levels.live import LiveModel
from evopress.levels.modules import bits_read, modules_of
from evopress.levels.store import DamagedDatabaseError, LevelDatabase
from evopress.levels.tied import TiedLevels
from evopress.levels.union import Levels, LevelSource, LevelUnion
from evopress.machine import PeakMemory, precision
from evopress.methods import Rest, make_method
from evopress.models.blocks import BlockModel, BlockShape, by_blocks, bytes_of
from evopress.models.devices import begin_on
from evopress.models.dropping import check_contributions, check_fields
from evopress.models.loading import Pretrained, pick_device
from evopress.models.opening import ModelSource, pick_dtype
from evopress.models.outline import find_family, num_blocks_of, skeleton, text_config
from evopress.models.routing import check_fillers, fewer_experts
from evopress.ranks import SHARES, collective, launched, leads
from evopress.resources import check_model
from evopress.settings import RunSettings
from evopress.units import BLOCKS, Budget, Genome, Space, is_of_expert

logger = logging.getLogger(__name__)

MOST_KEPT_BYTES = 2**29
"""Of the dense model's hidden states on held-out text that are kept between measurements of a search."""
Made = TypeVar("Made")
_STREAMS = ("data", "initial", "mutation", "minibatch", "random", "random_minibatch")


def _shared(make: Callable[[Workspace], Made]) -> cached_property[Made]:
    """Open a thing once, or take it from the run that this one is beside."""

    @wraps(make)
    def opened(workspace: Workspace) -> Made:
        return make(workspace) if workspace._beside is None else getattr(workspace._beside, make.__name__)

    return cached_property(opened)


class Workspace:
    """Opens what a run's stages ask for, once."""

    def __init__(
        self,
        settings: RunSettings,
        run_dir: Path,
        *,
        model: ModelSource | None = None,
        text: RunText | GivenText | None = None,
        blocks: BlockModel | None = None,
        beside: Workspace | None = None,
    ) -> None:
        """Check what can be checked before any model work.

        Args:
            model: a model that is there already; None: the one that the settings name.
            text: text that is there already; None: what the settings name.
            blocks: that model block by block, where it has been opened already.
            beside: of a run with the same model, text and levels at another target, with which everything opened is shared.

        Raises: EvoPressError if the target, a setting, the device or a folder does not fit.
        """
        self.settings = settings
        self.run_dir = run_dir
        self._peak: PeakMemory = PeakMemory() if beside is None else beside._peak
        self._beside = beside
        if beside is not None:
            model, text = beside.model_source, beside.text
        self.engine = engine_of(settings.engine)
        self.method = make_method(settings)
        make_measure(settings.fitness.name, settings.fitness.options)
        self.device = pick_device(settings.model.device)
        begin_on(self.device)
        self.dtype = pick_dtype(settings.model.dtype, self.device)
        if settings.model.offload and settings.fitness.evaluator == "plain" and self.device.type != "cpu":
            raise EvoPressError(
                "fitness.evaluator=plain needs the whole model on the device, but model.offload=true keeps its blocks on the host: "
                "leave one of them out"
            )
        self.cache = open_folder(given_path(settings.paths.cache, "paths.cache"))
        root = open_folder(given_path(settings.level_db.root, "level_db.root"))
        self._further: list[str] = []
        self._held_out_base: Tensor | None = None
        self._refined: LevelDatabase | None = None
        self.text: RunText | GivenText = text or RunText(
            settings.data,
            settings.evaluation,
            settings.model,
            tokenizer=lambda: None if self.model_source.is_outline else self.tokenizer,
            embedding_rows=lambda: self.embedding_rows,
            cache=self.cache,
        )
        self.text.check_files()
        self.model_source: ModelSource = model or ModelSource(
            settings.model,
            cache=self.cache,
            device=self.device,
            dtype=self.dtype,
            dry_run=settings.dry_run,
            may_load=lambda size: check_model(size, self.device, offload=settings.model.offload),
        )
        self._given_blocks = blocks
        self.databases: Databases = (
            beside.databases
            if beside is not None
            else Databases(
                settings.level_db,
                self.method,
                self.engine,
                root=root,
                dtype=self.dtype,
                model=self.model_source,
                text=self.text,
                blocks=lambda: self.blocks,
            )
        )
        self._check_model()
        seeds = np.random.SeedSequence(settings.seed).spawn(len(_STREAMS))
        self.rng = {name: np.random.default_rng(seed) for name, seed in zip(_STREAMS, seeds, strict=True)}
        """One generator for each purpose, so that what one draws never changes another."""

    def _check_model(self) -> None:
        """Raise EvoPressError if the settings do not fit the model; reads its config and the heads of its weight files alone."""
        config, fitness = self.model_source.config, self.settings.fitness
        self.model_source.check(
            length=self.settings.model.sequence_length, kept_logits=fitness.k if fitness.name == "topk_kl" else None
        )
        if self.method.modules is not None:
            space, even = self._planned_modules(), self.method.modules.even
            if "export" in self.settings.stages and any(map(num_experts, space.units)):
                most = max(Counter(unit.group for unit in space.units).values())
                fewer_experts(skeleton(config), most, most - 1, even=even)
            elif "export" in self.settings.stages and not find_family(config).is_found:  # of those, blocks can stay, as zeros
                check_fields(text_config(config), num_blocks_of(config), find_family(config))
        if self.method.weights is None:
            return
        if (shapes := self.model_source.linear_shapes()) is None:
            return
        compressor = self.method.weights.compressor([math.prod(shape) for shape in shapes.values()], dtype_bits=16)
        for key, (rows, columns) in shapes.items():
            try:
                compressor.levels((rows, columns))
            except EvoPressError as error:
                raise EvoPressError(f"{key.removesuffix('.weight')}: {error}") from None

    def _planned_modules(self) -> Space:
        """Return the modules that the method can drop, their sizes missing, from the model's config alone."""
        assert self.method.modules is not None
        config = self.model_source.config
        family = find_family(config)
        blocks = [BlockShape(f"{family.prefix}.{i}", kinds=family.parts(i).kinds) for i in range(num_blocks_of(config))]
        if family.is_found:
            blocks = BlockModel(skeleton(config), family).shapes()
        space = self.method.modules.space(blocks, dtype_bits=16)
        if family.undroppable and any(map(modules_of, space.units)):
            raise EvoPressError(
                f"modules of {family.name} cannot be dropped: of its blocks {family.undroppable}; choose another model or method"
            )
        return space

    def check_uneven(self) -> None:
        """Raise EvoPressError if blocks may keep different numbers of experts, and what fills them up would change an export."""
        modules = self.method.modules
        if modules is None or modules.even or "export" not in self.settings.stages or self.model_source.is_outline:
            return
        if any(map(num_experts, self._planned_modules().units)):
            with by_blocks(self.blocks.family):
                check_fillers(self.blocks)

    def check_gates(self) -> None:
        """Raise EvoPressError if modules can be dropped, and what they hold of the fitness cannot be told in a block."""
        config = self.model_source.config
        for index in range(num_blocks_of(config)) if self.method.modules is not None else ():
            check_contributions(find_family(config), index)

    def generations(self, settings: RunSettings) -> int | None:
        """Return the generations that theory gives for a target on this model; None where the settings must say."""
        if self.method.weights is not None:
            return None
        return make_method(settings).generations(self._planned_modules())

    def read_text(self) -> None:
        """Read the text that the run's stages need, so that a lack of it shows before the model is loaded.

        Raises: EvoPressError if there is too little, or it cannot be read.
        """
        self.texts(self.settings.stages)

    def texts(self, stages: Collection[str]) -> dict[str, Tensor]:
        """Return the text that stages need, token ids int64 [N, L], by what it is for.

        Raises: EvoPressError if there is too little, or it cannot be read.
        """
        stages = set(stages)
        texts = {"calibration text": self.calibration_tokens}  # what the level database's fingerprint stands on
        learns = "refine" in stages and self.refines and self.settings.refine.scale_epochs > 0
        if stages & {"baselines", "search"} or learns:
            texts["search text"] = self.search_tokens
        if "refine" in stages and self.refines:
            texts["refine text"] = self.refine_tokens
        if "evaluate" in stages or ("search" in stages and self.settings.evaluation.every):
            texts |= {f"held-out text {name}": tokens for name, tokens in self.evaluation_data.items()}
        return texts

    @property
    def model_digest(self) -> str:
        """The digest of the model's files, which level databases are known by; of what was loaded, once it is."""
        return self.model_source.digest

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.model_source.tokenizer

    @property
    def pretrained(self) -> Pretrained:
        return self.model_source.pretrained

    @property
    def embedding_rows(self) -> int | None:
        """Tokens that the model's embedding has, by its config; None: it does not say."""
        return self.model_source.embedding_rows

    @_shared
    def blocks(self) -> BlockModel:
        if self._given_blocks is not None:
            return self._given_blocks
        pretrained = self.pretrained
        include = (BLOCKS,) if self.method.weights is None else self.method.weights.include
        with by_blocks(pretrained.family):
            blocks = BlockModel(
                pretrained.model, pretrained.family, device=self.device, offload=self.settings.model.offload, include=include
            )
            if self.settings.fitness.evaluator == "population" and not self.model_source.is_outline:
                blocks.self_check(full_length=self.settings.model.sequence_length)
        blocks.known_as = ("blocks",)
        return blocks

    @property
    def calibration_tokens(self) -> Tensor:
        return self.text.calibration

    @property
    def search_tokens(self) -> Tensor:
        return self.text.search

    @cached_property
    def refine_tokens(self) -> Tensor:
        """Text of the search split that no search draws from, right after what it does: what the stage refine decides by."""
        return self.text.after_search(self.settings.refine.tokens)

    @property
    def evaluation_data(self) -> dict[str, Tensor]:
        """Held-out text by data set, the run's own first."""
        return self.text.evaluation

    @property
    def database(self) -> Levels:
        """The run's levels, of all its method's sources, as they are searched; built first where they are missing."""
        return self.databases.searched

    @property
    def refines(self) -> bool:
        """Whether a found genome can be refined: all levels are of compressed weights."""
        return self.method.weights is not None and self.method.modules is None

    def budget_of(self, space: Space) -> Budget:
        """Return what the target and the limits allow in a space of the run's units."""
        return self.method.budget(space, self.rest_of(space))

    def rest_of(self, space: Space) -> Rest:
        """Return what of the model is no unit of a space."""
        model = self.pretrained.model
        weights = sum(parameter.numel() for parameter in model.parameters())
        return Rest(8 * bytes_of(model) - 8 * space.size * self.blocks.dtype.itemsize, weights - space.size)

    @cached_property
    def budget(self) -> Budget:
        budget = self.budget_of(self.database.space)
        budget.check(self.database.space)
        return budget

    @cached_property
    def levels(self) -> LevelUnion | TiedLevels:
        """The run's levels, followed by those of the databases that `add_levels` named, and the ones that `add_refined` gave."""
        if (other := self._with_its_levels) is not None:
            return other.levels
        refined = [] if self._refined is None else [self._refined]
        levels = LevelUnion([self.databases.stored, *self.open_databases(self._further), *refined])
        space = self.databases.as_searched(levels.space)
        return levels if space is levels.space else TiedLevels(levels, space)

    def open_databases(self, names: Sequence[str]) -> list[LevelDatabase]:
        """Open the databases that lie beside the run's own, which baselines need.

        Raises: EvoPressError if one is damaged or missing.
        """
        try:
            return [LevelDatabase.open(self.databases.folder / name) for name in names]
        except DamagedDatabaseError as error:
            path = self.run_dir / "baselines.json"
            raise EvoPressError(f"{error}: remove {path} and run the stage baselines again, which builds it") from error

    def add_levels(self, names: Sequence[str]) -> Space:
        """Put further databases' levels after the run's own, for baselines that need them, and return the space of all.

        Args: names: folders beside the run's database.
        """
        new = [name for name in names if name not in self._further]
        if new:
            self._further += new
            self._levels_changed()
        return self.levels.space

    def add_refined(self, refined: LevelDatabase) -> tuple[Genome, Space]:
        """Put refined levels after all others; return their genome, and the space of all.

        Further levels that are added later move it: ask again then.
        """
        if self._refined is None or self._refined.folder != refined.folder:
            self._refined = refined
            self._levels_changed()
        return self.levels.genome_of_last((0,) * len(refined.space)), self.levels.space

    @property
    def _with_its_levels(self) -> Workspace | None:
        """The run that this one is beside, as long as it has all its levels."""
        return None if self._further or self._refined is not None else self._beside

    def _levels_changed(self) -> None:
        for made in ("levels", "live", "untied_live", "evaluator"):
            self.__dict__.pop(made, None)

    @property
    def known_as(self) -> tuple[Any, ...]:
        """See `ranks.Known`: by the levels that were added; all else is the same in the workspaces of a run."""
        if (other := self._with_its_levels) is not None:
            return other.known_as
        return "workspace", tuple(self._further), None if self._refined is None else self._refined.folder

    @cached_property
    def live(self) -> LiveModel:
        if (other := self._with_its_levels) is not None:
            return other.live
        with by_blocks(self.blocks.family):
            return LiveModel(self.blocks, self.levels, cache_bytes=self.settings.level_db.cache_bytes)

    @cached_property
    def untied_live(self) -> LiveModel:
        """The model at genomes with a level for every weight, whatever the engine ties."""
        if self.levels.space.untied is None or not isinstance(self.levels, TiedLevels):
            return self.live
        return LiveModel(self.blocks, self.levels.untied, cache_bytes=self.settings.level_db.cache_bytes)

    @cached_property
    def evaluator(self) -> Evaluator:
        if (other := self._with_its_levels) is not None:
            return other.evaluator
        return self._evaluator_on(self.live, self.known_as)

    def evaluator_of(self, levels: LevelSource) -> Evaluator:
        """Return what measures genomes that count other levels of the same weights."""
        return self._evaluator_on(LiveModel(self.blocks, levels, cache_bytes=self.settings.level_db.cache_bytes))

    def _evaluator_on(self, live: LiveModel, known_as: tuple[Any, ...] | None = None) -> Evaluator:
        fitness = self.settings.fitness
        evaluator: Evaluator = (
            PlainEvaluator(live, max_tokens_in_flight=fitness.max_tokens_in_flight)
            if fitness.evaluator == "plain"
            else PopulationEvaluator(live, max_tokens_in_flight=fitness.max_tokens_in_flight, fused=self.fused)
        )
        evaluator.known_as = None if known_as is None else ("evaluator", *known_as[1:])
        return evaluator

    @_shared
    def archive(self) -> Archiving:
        """What was measured on the search text before, and by other runs; not where code is compiled, which rounds as it likes."""
        ours = MEASURES.is_own(self.settings.fitness.name)  # of another's the archive would not know when it changes
        if not self.settings.archive or self.fused or not ours or not leads():
            return NoArchive()
        about = {**self.what_decides, "text": tokens_digest(self.search_tokens), "code": code_digest()}
        return Archive(self.database.folder / ARCHIVE, about, [len(unit.levels) for unit in self.database.space.units])

    @property
    def what_decides(self) -> dict[str, Any]:
        """All that decides what is measured of a genome on some tokens, to the bit, but for the text and the code."""
        fitness, model, cuda = self.settings.fitness, self.settings.model, self.device.type == "cuda"
        return {
            **self.databases.model_recipe,
            "levels": self.database.fingerprint,
            **self.databases.ties,
            "fitness": [fitness.name, fitness.k, fitness.evaluator, fitness.max_tokens_in_flight, fitness.chunk_tokens],
            "attention": model.attn_implementation,
            "offload": model.offload,
            "device": torch.cuda.get_device_name(self.device) if cuda else torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            **({"shares": SHARES} if launched() else {}),
            "precision": precision(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    @cached_property
    def measure(self) -> Measure:
        """What the search minimises."""
        fitness = self.settings.fitness
        own: dict[str, dict[str, Any]] = {"kl": {"fused": self.fused}, "topk_kl": {"k": fitness.k}}
        return make_measure(fitness.name, {**fitness.options, **own.get(fitness.name, {})})

    @cached_property
    def fused(self) -> bool:
        """Whether elementwise work is fused: asked for, and possible here."""
        if not self.settings.fitness.compile:
            return False
        if self.method.modules is not None:
            logger.warning("fitness.compile=true is left off: where modules are dropped, every block would be compiled many times")
            return False
        return can_compile(self.device)

    @property
    def search_base(self) -> Tensor:
        """The dense model's last hidden states on the search text, [N, L, d]."""
        return self._open_search_base()

    @collective
    def _open_search_base(self) -> Tensor:
        return self._search_base

    @_shared
    def _search_base(self) -> Tensor:
        return base_states(self.evaluator, self.search_tokens, batch_tokens=self.settings.fitness.max_tokens_in_flight)

    @collective
    def held_out_base(self, count: int) -> Tensor | None:
        """Return the dense model's last hidden states on the first sequences of the run's own held-out text, [count, L, d].

        None where they are more than is kept: they are then computed with every measurement.
        """
        if self._beside is not None:
            return self._beside.held_out_base(count)
        sequences = next(iter(self.evaluation_data.values()))[:count]
        if sequences.numel() * self.blocks.hidden_size * self.blocks.dtype.itemsize > MOST_KEPT_BYTES:
            return None
        if self._held_out_base is None or len(self._held_out_base) != count:
            self._held_out_base = base_states(self.evaluator, sequences, batch_tokens=self.settings.fitness.max_tokens_in_flight)
        return self._held_out_base

    @property
    def other_bytes(self) -> int:
        """Bytes of everything that is no unit: norms, embedding and head unless these are included, each tied weight once."""
        return self.rest_of(self.database.space).bits // 8

    def bytes_read(self, space: Space, genome: Genome | None) -> dict[str, int]:
        """Return how many bytes of the model a token reads, as a row of the results says it; nothing where it reads all.

        Args: genome: of the space; None: the dense model.
        """
        if not any(is_of_expert(unit) or num_experts(unit) for unit in space.units):
            return {}
        itemsize = self.blocks.dtype.itemsize
        if genome is None:
            units = round(sum(unit.size * unit.read for unit in space.units)) * itemsize
        else:
            units = -(-bits_read(space, genome) // 8)
        rest, embedding = self.other_bytes, self.blocks.model.get_input_embeddings().weight  # type: ignore[operator]
        if self.blocks.embedding_part is None and self.blocks.model.get_output_embeddings().weight is not embedding:  # type: ignore[operator]
            rest -= embedding[1:].numel() * itemsize
        return {"bytes_read_per_token": units + rest}

    def memory(self) -> dict[str, int]:
        """Return the run's peak of resident memory, where the system tells it, and of the device's where there is one, in bytes."""
        resident = self._peak.bytes()
        peak = {} if resident is None else {"peak_rss_bytes": resident}
        if self.device.type == "cuda":
            peak["peak_device_bytes"] = torch.cuda.max_memory_allocated(self.device)
        return peak
