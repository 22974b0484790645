"""The exporters by the names of the setting `export`: ours, and those of installed packages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

from evopress.errors import EvoPressError
from evopress.export.exporter import Exporter, Serves
from evopress.registry import Registry

DEQUANTIZED = "dequantized"
EXPORTERS: Registry[Callable[..., Exporter]] = Registry(
    "exporter",
    {
        DEQUANTIZED: "evopress.export.checkpoint:Dequantized",
        "mlx": "evopress.export.mlx:MLX",
        "gguf": "evopress.export.gguf:GGUF",
        "compressed_tensors": "evopress.export.compressed_tensors:CompressedTensors",
        "gptq": "evopress.export.gptq:GPTQFiles",
    },
    group="evopress.exporters",
)
"""What makes an exporter, called with its options as keywords."""


def make_exporters(names: Sequence[str], options: Mapping[str, Mapping[str, Any]]) -> dict[str, Exporter]:
    """Make the exporters of these names.

    Args: options: what `export_options` tells them, by name and keyword.

    Raises: EvoPressError if there is none of a name, or it does not take its options.
    """
    if unused := [name for name in options if name not in names]:
        raise EvoPressError(f"export_options has {unused[0]}, which is not in export={list(names)}: add it there, or leave it out")
    return {name: _make(name, options.get(name, {})) for name in names}


def _make(name: str, options: Mapping[str, Any]) -> Exporter:
    exporter = EXPORTERS.make(name, options, key="export", told_by="export_options")
    if not isinstance(exporter, Exporter):
        raise EvoPressError(
            f"export has {name!r}, which is a {type(exporter).__name__} without check, num_bytes and write: leave it out"
        )
    if isinstance(exporter, Serves):
        try:
            signature(exporter.serve).bind("folder", None)
        except TypeError:
            raise EvoPressError(
                f"export has {name!r}, whose serve does not take (folder, dtype): repair it, or leave it out"
            ) from None
    return exporter
