"""What the stages of a run share, each part made when it is first needed: model, text, level database, evaluator."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from evopress.compress.compressor import Compressor
from evopress.compress.hessian import has_half_products
from evopress.data.chat import ChatTemplate
from evopress.data.hub import c4, fineweb_edu, wikitext2
from evopress.data.python_docs import PythonDocs
from evopress.data.sources import TextSource
from evopress.data.special_tokens import check_embedded, leading_ids
from evopress.data.text_files import TextFiles
from evopress.data.tokens import token_sequences, tokens_digest
from evopress.endings import is_out_of_memory
from evopress.errors import EvoPressError
from evopress.files import given_path, make_folder
from evopress.fitness.fusion import can_compile
from evopress.fitness.minibatch import base_states
from evopress.fitness.plain import PlainEvaluator
from evopress.fitness.population import Evaluator, PopulationEvaluator
from evopress.levels.build import ensure_database
from evopress.levels.calibration import complete_hessians
from evopress.levels.hessians import HessianStore
from evopress.levels.live import Live, LiveModel
from evopress.levels.modules import LiveModules, ensure_modules
from evopress.levels.plan import BuildNeeds, BuildSettings, planned
from evopress.levels.store import DamagedDatabaseError, LevelDatabase, fingerprint
from evopress.levels.union import LevelUnion
from evopress.machine import PeakMemory
from evopress.methods import ModuleMethod, WeightMethod, make_method
from evopress.models.blocks import BlockModel, BlockShape
from evopress.models.devices import begin_on
from evopress.models.dropping import check_fields
from evopress.models.families import family_of
from evopress.models.loading import (
    Pretrained,
    digest_files,
    fetch_from_hub,
    find_weights,
    load_pretrained,
    pick_device,
    read_config,
)
from evopress.models.smollm2 import ensure_smollm2
from evopress.models.stored import loaded_files, stored_tensors
from evopress.models.tiny import ensure_tiny
from evopress.settings import AUTO, ModelSettings, QuantSettings, RunSettings
from evopress.units import BLOCKS, Budget, Genome, Space

logger = logging.getLogger(__name__)

_HUB_TEXT = {"wikitext2": wikitext2, "c4": c4, "fineweb_edu": fineweb_edu}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SEQUENCE_LENGTH, _GROUP_SIZE, _LEAST_GROUP_SIZE = 4096, 128, 16
"""Of what a model allows, the most that is taken; smaller groups cost more than a bit per weight in scales."""
MOST_KEPT_BYTES = 2**29
"""Of the dense model's hidden states on held-out text that are kept between measurements of a search."""
_STREAMS = ("data", "initial", "mutation", "minibatch", "random", "random_minibatch")


def find_model(settings: ModelSettings, cache: Path) -> Path:
    """Return the local folder of the model that the settings name, fetching it if need be.

    Raises: EvoPressError if there is no such model or it cannot be fetched.
    """
    if settings.path is not None:
        path = given_path(settings.path, "model.path")
        if path.exists() or not _HUB_ID.fullmatch(settings.path):
            find_weights(path)
            return path
        path = fetch_from_hub(settings.path, revision=settings.revision)
        find_weights(path)
        return path
    if settings.builtin == "smollm2_135m":
        return ensure_smollm2(cache)
    if settings.builtin == "tiny":
        return ensure_tiny(cache)
    if settings.builtin is not None:
        raise EvoPressError(f"model.builtin={settings.builtin} is unknown: choose one of smollm2_135m, tiny, or give model.path")
    raise EvoPressError("no model was named: give model.path=DIR, or model.path=ORG/NAME for one of the hub")


def pick_dtype(dtype: str, device: torch.device) -> str:
    """Resolve "auto" to bfloat16, or to float32 on a CPU without bfloat16 products; other names are left as they are."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if device.type == "cuda" or has_half_products() else "float32"


def fitted(settings: RunSettings) -> RunSettings:
    """Put numbers where settings leave the sequence length or the group size to the model; reads its config and files' heads alone.

    Raises: EvoPressError as `find_model`.
    """
    model, method = settings.model, settings.method
    grouped = isinstance(method, QuantSettings) and method.group_size == AUTO
    if AUTO not in (model.sequence_length, model.group_size) and not grouped:
        return settings
    folder = find_model(model, make_folder(given_path(settings.paths.cache, "paths.cache")))
    config = read_config(folder)
    changes: dict[str, Any] = {}
    if model.sequence_length == AUTO:
        positions = config.get("max_position_embeddings")
        changes["sequence_length"] = min(_SEQUENCE_LENGTH, positions) if isinstance(positions, int) else _SEQUENCE_LENGTH
    linears = tuple(f".{name}.weight" for name in family_of(config["model_type"]).linears)
    tensors = stored_tensors(loaded_files(folder, find_weights(folder)))
    common = math.gcd(*(tensor.shape[1] for name, tensor in tensors.items() if name.endswith(linears) and len(tensor.shape) == 2))
    size = next((size for size in range(_GROUP_SIZE, _LEAST_GROUP_SIZE - 1, -1) if common % size == 0), None)
    if model.group_size == AUTO:
        changes["group_size"] = size
    if grouped:
        method = replace(method, group_size=size)
    said = {f"model.{key}": value for key, value in changes.items()} | ({"method.group_size": size} if grouped else {})
    logger.info("from the model: %s", ", ".join(f"{key}={'null' if value is None else value}" for key, value in said.items()))
    return replace(settings, model=replace(model, **changes), method=method)


@contextmanager
def _by_blocks(family: str) -> Iterator[None]:
    """Turn whatever a model raises when its blocks are first called alone into one sentence; too little memory stays what it is."""
    try:
        yield
    except EvoPressError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EvoPressError(
            f"running {family} block by block failed ({type(error).__name__}: {reason}): this model or this version of "
            "transformers calls its blocks in a way that the adapter does not know; use fitness.evaluator=plain, or another of them"
        ) from error


class Workspace:
    """Opens what a run's stages ask for, once."""

    def __init__(self, settings: RunSettings, run_dir: Path) -> None:
        """Check what can be checked before any model work.

        Raises: EvoPressError if the target, a setting, the device or a folder does not fit.
        """
        self.settings = settings
        self.run_dir = run_dir
        self._peak = PeakMemory()
        self.method = make_method(settings)
        self.device = pick_device(settings.model.device)
        begin_on(self.device)
        self.dtype = pick_dtype(settings.model.dtype, self.device)
        if self.dtype != settings.model.dtype:
            logger.info("model.dtype=%s: %s on this %s", settings.model.dtype, self.dtype, self.device.type.upper())
        if settings.model.offload and settings.fitness.evaluator == "plain" and self.device.type != "cpu":
            raise EvoPressError(
                "fitness.evaluator=plain runs the whole model on the device, where model.offload=true does not put it: leave one "
                "of them out"
            )
        self.cache = make_folder(given_path(settings.paths.cache, "paths.cache"))
        self.database_root = make_folder(given_path(settings.level_db.root, "level_db.root"))
        self.database_reused = False
        self._further: list[str] = []
        self._held_out_base: Tensor | None = None
        self._refined: LevelDatabase | None = None
        self._check_files()
        self.model_folder = find_model(settings.model, self.cache)
        self._check_model()
        seeds = np.random.SeedSequence(settings.seed).spawn(len(_STREAMS))
        self.rng = {name: np.random.default_rng(seed) for name, seed in zip(_STREAMS, seeds, strict=True)}
        """One generator for each purpose, so that what one draws never changes another."""

    def _check_files(self) -> None:
        """Raise EvoPressError if a text file is missing or empty, or one that is held out is trained on."""
        used: dict[str, str] = {}
        for name, source in self._evaluation_sources.items():
            if not isinstance(source, TextFiles):
                continue
            for split in ("calibration", "search"):
                used |= dict.fromkeys(source.digests(split), split)
            held_out = source.digests("evaluation") if source is not self._own_source else []
            if same := next((used[digest] for digest in held_out if digest in used), None):
                raise EvoPressError(f"evaluation.files has {name!r}, which is also a {same} file: hold out another one")

    def _check_model(self) -> None:
        """Raise EvoPressError if the settings do not fit the model; reads its config and the heads of its weight files alone."""
        config, length = read_config(self.model_folder), self.settings.model.sequence_length
        positions = config.get("max_position_embeddings")
        if isinstance(positions, int) and length > positions:
            raise EvoPressError(f"model.sequence_length={length} is more than the {positions} positions of this model: lower it")
        fitness, vocabulary = self.settings.fitness, config.get("vocab_size")
        if fitness.name == "topk_kl" and isinstance(vocabulary, int) and fitness.k > vocabulary:
            raise EvoPressError(f"fitness.k={fitness.k} is more than the {vocabulary} tokens of this model's vocabulary: lower it")
        if isinstance(self.method, ModuleMethod):
            self._plan(self.method)
            if "export" in self.settings.stages:
                check_fields(config, int(config["num_hidden_layers"]), family_of(config["model_type"]))
            return
        assert isinstance(self.method, WeightMethod)
        shapes: dict[str, tuple[int, ...]] = {}
        linears = tuple(f".{name}.weight" for name in family_of(config["model_type"]).linears)
        for path in find_weights(self.model_folder):
            try:
                with safe_open(path, framework="pt") as file:
                    shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys() if key.endswith(linears)}  # noqa: SIM118
            except (OSError, SafetensorError):
                return  # told when the model is loaded
        compressor = self.method.compressor([math.prod(shape) for shape in shapes.values()], dtype_bits=16)
        for key, (rows, columns) in shapes.items():
            try:
                compressor.levels((rows, columns))
            except EvoPressError as error:
                raise EvoPressError(f"{key.removesuffix('.weight')}: {error}") from None

    def _plan(self, method: ModuleMethod) -> Space:
        """Return the units of a method that drops modules, their sizes missing, from the model's config alone."""
        config = read_config(self.model_folder)
        family = family_of(config["model_type"])
        prefix = f"{family.decoder}.{family.blocks}"
        return method.space([BlockShape(f"{prefix}.{i}") for i in range(int(config["num_hidden_layers"]))], dtype_bits=16)

    def generations(self, settings: RunSettings) -> int | None:
        """Return the generations that theory gives for a target on this model; None where the settings must say."""
        method = make_method(settings)
        return method.generations(self._plan(method)) if isinstance(method, ModuleMethod) else None

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
        if stages & {"baselines", "search"}:
            texts["search text"] = self.search_tokens
        if "refine" in stages and isinstance(self.method, WeightMethod):
            texts["refine text"] = self.refine_tokens
        if "evaluate" in stages or ("search" in stages and self.settings.evaluation.every):
            texts |= {f"held-out text {name}": tokens for name, tokens in self.evaluation_data.items()}
        return texts

    @cached_property
    def model_digest(self) -> str:
        """The digest of the model's files, which level databases are known by; of what was loaded, once it is."""
        if "pretrained" in self.__dict__:
            return self.pretrained.digest
        return digest_files([*find_weights(self.model_folder), self.model_folder / "config.json"])

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        try:
            return AutoTokenizer.from_pretrained(
                self.model_folder, local_files_only=True, trust_remote_code=self.settings.model.trust_remote_code
            )
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError) as error:
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise EvoPressError(
                f"the tokenizer in {self.model_folder} could not be loaded ({reason}): fetch the checkpoint again"
            ) from error

    @cached_property
    def pretrained(self) -> Pretrained:
        settings = self.settings.model
        pretrained = load_pretrained(
            self.model_folder,
            name=settings.name or (settings.path if settings.path and not Path(settings.path).exists() else None),
            dtype=self.dtype,
            attn_implementation=settings.attn_implementation,
            device=self.device,
            trust_remote_code=settings.trust_remote_code,
        )
        count = sum(parameter.numel() for parameter in pretrained.model.parameters())
        logger.info("model: %s, %.1f M parameters, %s on %s", pretrained.name, count / 1e6, self.dtype, self.device)
        return pretrained

    @cached_property
    def blocks(self) -> BlockModel:
        pretrained = self.pretrained
        include = self.method.include if isinstance(self.method, WeightMethod) else (BLOCKS,)
        with _by_blocks(pretrained.family.name):
            blocks = BlockModel(
                pretrained.model, pretrained.family, device=self.device, offload=self.settings.model.offload, include=include
            )
            if self.settings.fitness.evaluator == "population":
                blocks.self_check()
        return blocks

    def source(self, name: str) -> TextSource:
        """Return a text source by its name in `data.source` or `evaluation.data`."""
        data = self.settings.data
        if name == "python_docs":
            return PythonDocs()
        if name in _HUB_TEXT:
            pinned = {"revision": data.revision} if data.revision and name == data.source else {}
            return _HUB_TEXT[name](**pinned)
        if name == "text":
            return TextFiles(
                calibration=tuple(data.calibration),
                search=tuple(data.search),
                evaluation=tuple(data.evaluation),
                field=data.field,
                wikitext=data.wikitext,
                chat=self._chat,
            )
        raise EvoPressError(f"evaluation.data {name!r} is unknown: choose among python_docs, {', '.join(_HUB_TEXT)}")

    def tokens(self, split: Any, num_tokens: int, source: TextSource | None = None) -> Tensor:
        """Return token ids int64 [N, L] of a split of the run's own text, or of another source.

        Raises: EvoPressError as `token_sequences`, and for a token that the model's embedding lacks.
        """
        source, model = source or self._own_source, self.settings.model
        sequences = token_sequences(
            source,
            split,
            self.tokenizer,
            sequence_length=model.sequence_length,
            num_tokens=num_tokens,
            cache_dir=self.cache / "tokens",
            separator=model.separator,
            bos="true" if self.leading_ids else "false",
        )
        if self.embedding_rows is not None:
            what = f"the {split} text ({source.name})"
            check_embedded(sequences, self.tokenizer, num_rows=self.embedding_rows, what=what, separator=model.separator)
        return sequences

    @cached_property
    def leading_ids(self) -> tuple[int, ...]:
        """What every sequence begins with, by `model.bos`."""
        rule = self.settings.model.bos
        leading = leading_ids(self.tokenizer, rule)
        if leading:
            tokens = " ".join(self.tokenizer.convert_ids_to_tokens(list(leading)))
            logger.info("every sequence begins with %s (model.bos=%s; false leaves it out)", tokens, rule)
        return leading

    @cached_property
    def embedding_rows(self) -> int | None:
        """Tokens that the model's embedding has, by its config; None: it does not say."""
        config = read_config(self.model_folder)
        text = config.get("text_config")
        rows = config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
        return rows if isinstance(rows, int) else None

    @cached_property
    def _own_source(self) -> TextSource:
        return self.source(self.settings.data.source)

    @property
    def _chat(self) -> ChatTemplate:
        return ChatTemplate(lambda: self.tokenizer, self.settings.data.chat_template)

    @cached_property
    def _evaluation_sources(self) -> dict[str, TextSource]:
        evaluation = self.settings.evaluation
        sources = {self._own_source.name: self._own_source}
        sources |= {name: self.source(name) for name in evaluation.data if name not in sources}
        for name, path in evaluation.files.items():
            if name in sources:
                raise EvoPressError(f"evaluation.files has {name!r}, which another data set is called: give the file another name")
            own = self._own_source if isinstance(self._own_source, TextFiles) else None
            sources[name] = TextFiles(
                evaluation=(path,),
                wikitext=name in evaluation.wikitext,
                chat=self._chat,
                apart_from=own,
            )
        return sources

    @cached_property
    def calibration_tokens(self) -> Tensor:
        return self.tokens("calibration", self.settings.data.calibration_tokens)

    @cached_property
    def evaluation_data(self) -> dict[str, Tensor]:
        """Held-out text by data set, the run's own first."""
        count = self.settings.data.evaluation_tokens
        return {name: self.tokens("evaluation", count, source) for name, source in self._evaluation_sources.items()}

    def database_of(self, name: str, compressor: Compressor) -> tuple[LevelDatabase, bool]:
        """Return the level database that a compressor makes from the run's model and text, and whether it was there.

        Args: name: what the database is of; begins its folder's name.
        """
        build = self.build_settings(name, compressor)
        database, reused = ensure_database(build, self.blocks, self.calibration_tokens, compressor)
        logger.info("level database: %s %s (%.1f MB)", "reused" if reused else "built", database.folder, database.num_bytes / 1e6)
        return database, reused

    def build_settings(self, name: str, compressor: Compressor) -> BuildSettings:
        """Return how `database_of` builds, without building."""
        settings = self.settings
        assert isinstance(self.method, WeightMethod)
        recipe = {
            **self._source_recipe,
            "method": name,
            "compressor": compressor.settings(),
            "propagate": self.method.propagate,
        }
        if outside := [name for part in self.blocks.parts[len(self.blocks.blocks) :] for name in self.blocks.slots(part)]:
            recipe["outside"] = outside
        return BuildSettings(
            root=self.database_root,
            method=name,
            model_name=self.pretrained.name,
            recipe=recipe,
            propagate=self.method.propagate,
            batch_tokens=settings.level_db.batch_tokens,
            activations=settings.level_db.activations,
            hessians=self.hessians if settings.level_db.keep_hessians else None,
        )

    @cached_property
    def _source_recipe(self) -> dict[str, Any]:
        """What decides the Hessians of dense activations."""
        tokens = self.calibration_tokens
        return {
            **self._model_recipe,
            "data": {
                "tokens_sha256": tokens_digest(tokens),
                "num_sequences": tokens.shape[0],
                "sequence_length": tokens.shape[1],
                "source": self._own_source.name,
                **({"leading": list(self.leading_ids)} if self.leading_ids else {}),
            },
        }

    @property
    def _model_recipe(self) -> dict[str, Any]:
        pretrained = self.pretrained
        return {"model": {"digest": pretrained.digest, "dtype": self.dtype, "family": pretrained.family.name}}

    def complete_hessians(self) -> HessianStore:
        """Return the Hessians of dense activations, computed first where they are missing: a reused database may have left none."""
        settings = self.settings.level_db
        complete_hessians(
            self.hessians,
            self.blocks,
            self.calibration_tokens,
            batch_tokens=settings.batch_tokens,
            activations=settings.activations,
        )
        return self.hessians

    @cached_property
    def hessians(self) -> HessianStore:
        """Where Hessians of dense activations are kept."""
        return HessianStore(self.database_root / self.pretrained.name / f"hessians-{fingerprint(self._source_recipe)}")

    def _module_recipe(self, method: ModuleMethod) -> dict[str, Any]:
        return {**self._model_recipe, "method": self.settings.method.name, **method.recipe()}

    @property
    def database_fingerprint(self) -> str:
        """The fingerprint that the run's level database has or will have, without building it."""
        if isinstance(self.method, ModuleMethod):
            return fingerprint(self._module_recipe(self.method))
        return self.build_settings(self.settings.method.name, self.compressor).fingerprint

    @cached_property
    def database(self) -> LevelDatabase:
        """The run's level database, built first where it is missing."""
        if isinstance(self.method, ModuleMethod):
            database, self.database_reused = ensure_modules(
                self.database_root,
                model_name=self.pretrained.name,
                method=self.settings.method.name,
                recipe=self._module_recipe(self.method),
                space=self.method.space(self.blocks.shapes(), dtype_bits=8 * self.blocks.dtype.itemsize),
            )
            return database
        database, self.database_reused = self.database_of(self.settings.method.name, self.compressor)
        return database

    @cached_property
    def compressor(self) -> Compressor:
        """What makes the levels of a method that compresses weights."""
        assert isinstance(self.method, WeightMethod)
        sizes = [slot.weight.numel() for part in self.blocks.parts for slot in self.blocks.slots(part).values()]
        return self.method.compressor(sizes, dtype_bits=8 * self.blocks.dtype.itemsize)

    def plan_database(self) -> tuple[Space, BuildNeeds | None]:
        """Return the space of the run's level database and what is needed to build what is missing of it, without building.

        A method that drops modules needs nothing.
        """
        if isinstance(self.method, ModuleMethod):
            return self.method.space(self.blocks.shapes(), dtype_bits=8 * self.blocks.dtype.itemsize), None
        settings = self.build_settings(self.settings.method.name, self.compressor)
        return planned(settings, self.blocks, self.calibration_tokens, self.compressor)

    @cached_property
    def budget(self) -> Budget:
        budget = self.method.budget(self.database.space)
        budget.check(self.database.space)
        return budget

    @cached_property
    def levels(self) -> LevelUnion:
        """The run's levels, followed by those of the databases that `add_levels` named, and the ones that `add_refined` gave."""
        refined = [] if self._refined is None else [self._refined]
        return LevelUnion([self.database, *self.open_databases(self._further), *refined])

    def open_databases(self, names: Sequence[str]) -> list[LevelDatabase]:
        """Open the databases that lie beside the run's own, which baselines need.

        Raises: EvoPressError if one is damaged or missing.
        """
        try:
            return [LevelDatabase.open(self.database_root / self.pretrained.name / name) for name in names]
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

    def _levels_changed(self) -> None:
        for made in ("levels", "live", "evaluator"):
            self.__dict__.pop(made, None)

    @cached_property
    def live(self) -> Live:
        if isinstance(self.method, ModuleMethod):
            blocks, space = self.blocks, self.database.space
            with _by_blocks(blocks.family.name):
                return LiveModules(blocks, space)
        return LiveModel(self.blocks, self.levels, cache_bytes=self.settings.level_db.cache_bytes)

    @cached_property
    def evaluator(self) -> Evaluator:
        fitness = self.settings.fitness
        if fitness.evaluator == "plain":
            return PlainEvaluator(self.live, max_tokens_in_flight=fitness.max_tokens_in_flight)
        return PopulationEvaluator(self.live, max_tokens_in_flight=fitness.max_tokens_in_flight, fused=self.fused)

    @cached_property
    def fused(self) -> bool:
        """Whether elementwise work is fused: asked for, and possible here."""
        if not self.settings.fitness.compile:
            return False
        if isinstance(self.method, ModuleMethod):
            logger.warning("fitness.compile=true is left off: where modules are dropped, every block would be compiled many times")
            return False
        return can_compile(self.device)

    @cached_property
    def search_tokens(self) -> Tensor:
        return self.tokens("search", self.settings.data.search_tokens)

    @cached_property
    def refine_tokens(self) -> Tensor:
        """Text of the search split that no search draws from, right after what it does: what the stage refine decides by."""
        length, searched = self.settings.model.sequence_length, len(self.search_tokens)
        count = self.settings.refine.tokens // length
        try:
            return self.tokens("search", (searched + count) * length)[searched:]
        except EvoPressError as error:
            raise EvoPressError(
                f"{error}; the search draws from {searched * length} of them (data.search_tokens), and the {count * length} after "
                "these are what the stage refine decides by (refine.tokens)"
            ) from error

    @cached_property
    def search_base(self) -> Tensor:
        """The dense model's last hidden states on the search text, [N, L, d]."""
        return base_states(self.evaluator, self.search_tokens, batch_tokens=self.settings.fitness.max_tokens_in_flight)

    def held_out_base(self, count: int) -> Tensor | None:
        """Return the dense model's last hidden states on the first sequences of the run's own held-out text, [count, L, d].

        None where they are more than is kept: they are then computed with every measurement.
        """
        sequences = next(iter(self.evaluation_data.values()))[:count]
        if sequences.numel() * self.blocks.hidden_size * self.blocks.dtype.itemsize > MOST_KEPT_BYTES:
            return None
        if self._held_out_base is None or len(self._held_out_base) != count:
            self._held_out_base = base_states(self.evaluator, sequences, batch_tokens=self.settings.fitness.max_tokens_in_flight)
        return self._held_out_base

    @property
    def other_bytes(self) -> int:
        """Bytes of everything that is no unit: norms, embedding and head unless these are included, each tied weight once."""
        total = sum(parameter.numel() * parameter.element_size() for parameter in self.pretrained.model.parameters())
        return total - self.database.space.size * self.blocks.dtype.itemsize

    def memory(self) -> dict[str, int]:
        """Return the run's peak of resident memory, where the system tells it, and of the device's where there is one, in bytes."""
        resident = self._peak.bytes()
        peak = {} if resident is None else {"peak_rss_bytes": resident}
        if self.device.type == "cuda":
            peak["peak_device_bytes"] = torch.cuda.max_memory_allocated(self.device)
        return peak
