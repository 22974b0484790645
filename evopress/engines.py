"""What engines that run a compressed model ask of it.

An engine's rules hold for a whole search when `engine` names it: the space then has no other bits and groups, ties weights that the
engine runs as one, and counts bytes as the engine's file has them. Its exporter refuses by the same rules what was searched without
them. A new engine is one entry here. Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from evopress.errors import EvoPressError

NONE = "none"
_FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "w13": ("w1", "w3"),  # LFM2's
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),  # Qwen3.5's linear attention; Qwen3-Next has it as one
}
"""Linears on one input that vLLM runs as one matrix, by the name that it gives them: its models' `packed_modules_mapping`."""


@dataclass(frozen=True)
class Shape:
    """A weight of integers, as its bytes depend on it."""

    rows: int
    columns: int
    bits: int
    groups: int
    """In all rows together."""
    scale_bits: int
    """Of a scale as it is stored in the level database."""


@dataclass(frozen=True)
class Engine:
    """An engine and its rules."""

    name: str
    """As `engine` takes it."""
    title: str
    """As people call it."""
    bits: tuple[int, ...]
    """Of integers that it computes with."""
    groups: tuple[int, ...]
    """Columns that may share a scale."""
    stored_bits: Callable[[Shape], int]
    """What a weight of integers takes in its file, the file's header aside."""
    formats: tuple[str, ...] = ()
    """What `export` calls the formats that it loads."""
    whole_rows: bool = False
    """A row may be one group, however wide."""
    zeros_are_codes: bool = False
    """Its file has room for zeros from 0 to 2^bits - 1 alone."""
    rows_in_words: bool = False
    """The number of rows is a multiple of 32."""
    tied_in_words: bool = False
    """Of each of the weights that it runs as one, the number of rows times the bits is a multiple of 32."""
    scale_dtypes: tuple[str, ...] = ("float16", "bfloat16", "float32")
    """Of the level database's scales, those that its file keeps or says how it rounds."""
    scales_as_served: bool = False
    """It rounds scales to the dtype that it computes in."""
    outside: bool = True
    """Head and embedding may be integers."""
    gguf_types: bool = False
    """It computes with the types of GGUF (method.grid=gguf), which keep scales their own way, and with no other integers."""
    ties: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Weights of a module that have one level, by the name of all together."""

    @property
    def export(self) -> str:
        """The setting that writes its format."""
        return f"export=[{self.formats[0]}]"


def _words(count: int, bits: int) -> int:
    """Return the bits of so many codes in words of 32 bits."""
    return -(-count * bits // 32) * 32


def _as_mlx(shape: Shape) -> int:
    return shape.rows * _words(shape.columns, shape.bits) + 32 * shape.groups


def _as_compressed_tensors(shape: Shape) -> int:
    per_row = shape.groups // shape.rows
    zeros = _words(shape.rows, shape.bits) * per_row
    return shape.rows * _words(shape.columns, shape.bits) + shape.groups * shape.scale_bits + zeros + 2 * 64


def _as_gptq(shape: Shape) -> int:
    return (shape.columns * shape.rows + shape.groups) * shape.bits + 16 * shape.groups + 32 * shape.columns


def _as_stored(shape: Shape) -> int:
    return shape.rows * shape.columns * shape.bits + shape.groups * (shape.scale_bits + 16)


ENGINES = {
    engine.name: engine
    for engine in (
        Engine("mlx", "MLX", bits=(1, 2, 3, 4, 5, 6, 8), groups=(32, 64, 128), stored_bits=_as_mlx, formats=("mlx",)),
        Engine(
            "vllm",
            "vLLM",
            bits=(2, 3, 4, 5, 6, 7, 8),
            groups=(32, 64, 128),
            stored_bits=_as_compressed_tensors,
            formats=("compressed_tensors",),
            zeros_are_codes=True,
            scales_as_served=True,
            outside=False,
            tied_in_words=True,
            ties=_FUSED,
        ),
        Engine(
            "gptqmodel",
            "GPTQModel",
            bits=(2, 3, 4, 5, 6, 7, 8),
            groups=(32, 64, 128, 256, 512, 1024),
            stored_bits=_as_gptq,
            formats=("gptq",),
            whole_rows=True,
            zeros_are_codes=True,
            scale_dtypes=("float16",),
            rows_in_words=True,
            outside=False,
        ),
        Engine("llama_cpp", "llama.cpp", bits=(), groups=(), stored_bits=_as_stored, formats=("gguf",), gguf_types=True),
    )
}
"""By name."""


def engine_of(name: str) -> Engine | None:
    """Return the engine of this name; None for "none".

    Raises: EvoPressError if there is none of that name.
    """
    if name == NONE:
        return None
    if name not in ENGINES:
        raise EvoPressError(f"engine={name} is unknown: choose one of {', '.join((NONE, *ENGINES))}")
    return ENGINES[name]
