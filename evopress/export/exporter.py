"""What an exporter is: it says what its format cannot hold, how large its file will be, and writes it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evopress.compress.gguf_types import GGUF_TYPES
from evopress.currencies import num_experts
from evopress.endings import os_error
from evopress.files import explained
from evopress.levels.live import LiveModel
from evopress.levels.union import LevelSource
from evopress.units import Genome, Level, Unit

INTEGERS, GGUF_TYPE, SPARSE, DENSE, DROPPED, KEPT = "integers", "gguf", "sparse", "dense", "dropped", "kept"
OF_EXPERT = "expert"


@dataclass(frozen=True)
class Form:
    """How a unit is stored at one of its levels, which is known before the level is built."""

    unit: str
    """Its name."""
    label: str
    """Its level's, for people: "3 bits"."""
    kind: str
    """INTEGERS with scales and zeros, GGUF_TYPE (its label names it), SPARSE, DENSE (the weight as it is), of modules DROPPED or
    KEPT, of an expert that is either OF_EXPERT."""
    bits: int = 0
    """Of an integer."""
    group_size: int = 0
    """Columns that share a scale and a zero."""
    symmetric: bool = False
    """Every zero is the middle code."""
    scale_dtype: str = "float16"
    """Of the stored scales."""
    rows: int = 0
    columns: int = 0
    outside: bool = False
    """It is the embedding or the head."""
    tied: str = ""
    """Name of the unit that gives this weight and others one level."""
    of_expert: bool = False
    """It is a weight of an expert, which lies in one tensor with those of the others."""

    def __str__(self) -> str:
        groups = f" in groups of {self.group_size}" if self.group_size else ""
        return f"{self.unit} at {self.label}{groups}"


def form_of(unit: Unit, level: Level, columns: int, compressor: Mapping[str, Any]) -> Form:
    """Return how a unit is stored at a level.

    Args:
        columns: of its weight; nothing for modules.
        compressor: the settings of what makes the levels, as a level database's recipe has them.
    """
    if level.source == "drop":
        return Form(unit.name, level.label, OF_EXPERT if num_experts(unit) else DROPPED if level.drops else KEPT)
    if level.source == "quant" and level.key == DENSE:
        return Form(unit.name, level.label, DENSE)
    if level.source == "quant" and level.key.isdecimal():
        own = compressor.get("group_sizes") or {}
        group_size = int(own.get(level.key) or compressor.get("group_size") or columns)
        symmetric, scale_dtype = bool(compressor.get("symmetric")), str(compressor.get("scale_dtype", "float16"))
        return Form(
            unit.name,
            level.label,
            INTEGERS,
            int(level.key),
            group_size,
            symmetric,
            scale_dtype,
            rows=unit.size // columns,
            columns=columns,
            outside=unit.is_outside,
        )
    return Form(unit.name, level.label, GGUF_TYPE if level.key in GGUF_TYPES else SPARSE)


@dataclass(frozen=True)
class Export:
    """What is exported: a model at a genome, and what goes into the folder beside its weights."""

    live: LiveModel
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    genome: Genome
    forms: tuple[Form, ...] = ()
    """Of every unit of the genome's space, at its level."""
    base: str = "the base model"
    """Name of the model that was compressed."""
    licence: str | None = None
    """Of the base model, where it says so."""
    command: str = ""
    """That made it."""
    table: str = ""
    """What it was measured at, in Markdown."""
    files: tuple[Path, ...] = ()
    """Copied into the folder: the genome."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """What the weights come from, written as `evopress.json`."""

    @property
    def levels(self) -> LevelSource:
        """Where the genome's levels are read as stored, packed."""
        return self.live.levels


@runtime_checkable
class Exporter(Protocol):
    """Writes one format. Made by its factory with the format's options as keywords."""

    def check(self, config: Mapping[str, Any], forms: Iterable[Form]) -> None:
        """Raise EvoPressError, in one sentence, if the format cannot hold a model of this kind or one of these forms.

        Called without forms before the model is loaded, before any work with all that a search may choose, and again with what it
        chose.

        Args: config: the model's own config.json.
        """

    def num_bytes(self, export: Export) -> int | None:
        """Return the bytes that `write` will put into its weight file, to the byte, without writing it; None: not known."""

    def write(self, folder: Path, export: Export) -> None:
        """Fill an empty folder: weights, configuration, tokenizer. Genome and provenance are added to it."""


@runtime_checkable
class Bounded(Protocol):
    """An exporter that holds integers in other bits than the level database does."""

    def most_bits(self, form: Form) -> int:
        """Return the bits that a weight of integers takes at most, scales and all, which is known before its level is built."""


@runtime_checkable
class Resized(Protocol):
    """An exporter with an option that gives its file other bits than its engine's rules count."""

    def resized_by(self, dtype: torch.dtype) -> str | None:
        """Return that option as it was given, "scales=float32"; None: the file is as counted.

        Args: dtype: the model's.
        """


@runtime_checkable
class Serves(Protocol):
    """An exporter whose folder one command serves."""

    def serve(self, folder: str, dtype: torch.dtype) -> str:
        """Return the command, as a shell takes it.

        Args:
            folder: quoted for a shell, where it has to be.
            dtype: of the model.
        """


def write_export(exporter: Exporter, folder: Path, export: Export) -> Path:
    """Let an exporter write a folder beside its place and rename it, so that it is there whole or not at all; an older one goes.

    Raises: EvoPressError if the disk is full or the folder cannot be written.
    """

    def fill(scratch: Path) -> None:
        exporter.write(scratch, export)
        for path in export.files:
            shutil.copy2(path, scratch / path.name)
        (scratch / "evopress.json").write_text(json.dumps(export.provenance, indent=2) + "\n", encoding="utf-8")

    return write_whole(folder, fill)


def write_whole(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Let `fill` fill an empty folder that then takes the place of `folder`; until then an older one is there, whole."""
    asked, folder = folder, folder.resolve()  # what a link names is replaced, not the link
    scratch, older = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old.tmp")
    for left in (scratch, older):  # by a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        fill(scratch)
        if folder.exists():
            folder.rename(older)  # to remove it in its place would leave half of it if this is killed
        scratch.rename(folder)
    except (OSError, SafetensorError) as error:
        raise explained(os_error(error), folder) from error
    finally:
        if older.exists() and not folder.exists():
            older.rename(folder)
        for left in (scratch, older):
            shutil.rmtree(left, ignore_errors=True)
    return asked
