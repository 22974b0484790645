"""A searched model as an ordinary checkpoint that transformers loads: `export=[dequantized]`.

A large one is written in files of a few blocks each, so that no more of it is decoded at a time: a model of 70 billion weights fits
no host twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evopress.export.exporter import Export, Form, write_export
from evopress.levels.live import LiveModel
from evopress.models.blocks import BlockModel
from evopress.progress import track
from evopress.units import Genome

FILE_BYTES = 5 * 10**9
"""A model that is larger is written in several files, each of as many blocks as fit into so many bytes, one at least."""
_INDEX = "model.safetensors.index.json"


class Dequantized:
    """Ordinary, dequantized weights in the model's dtype. Holds whatever can be searched, and gains no bytes by it."""

    def __init__(self, *, file_bytes: int = FILE_BYTES) -> None:
        """Take how large a file may be."""
        self._file_bytes = file_bytes

    def check(self, config: Mapping[str, Any], forms: Iterable[Form]) -> None:
        """Nothing is refused."""

    def num_bytes(self, export: Export) -> None:
        """It is transformers that lays the file out."""

    def write(self, folder: Path, export: Export) -> None:
        """Write weights, config and tokenizer. Blocks that are dropped whole are left out: the checkpoint is a shorter one."""
        groups = parts_together(export.live.blocks, self._file_bytes)
        if len(groups) == 1:
            with export.live.written(export.genome, on_host=True):
                export.model.save_pretrained(folder)
        else:
            _write_files(folder, export, groups)
        for path in folder.glob("*.safetensors"):  # safetensors writes for the owner alone
            path.chmod((folder / "config.json").stat().st_mode)
        export.tokenizer.save_pretrained(folder)


def parts_together(blocks: BlockModel, file_bytes: int) -> list[list[int]]:
    """Return the parts of a model that are written into one file: all of a small one, else a few blocks; last what is outside them.

    Blocks that share a tensor are not written apart.
    """
    sizes = [sum(tensor.nbytes for tensor in _tensors(block).values()) for block in blocks.blocks]
    held = [id(tensor) for block in blocks.blocks for tensor in _tensors(block).values()]
    whole = sum(tensor.nbytes for tensor in _tensors(blocks.model).values())
    if whole <= file_bytes or len(set(held)) < len(held):
        return [list(blocks.parts)]
    groups: list[list[int]] = [[]]
    for index, size in enumerate(sizes):
        if groups[-1] and sum(sizes[i] for i in groups[-1]) + size > file_bytes:
            groups.append([])
        groups[-1].append(index)
    return [*groups, list(blocks.parts)[len(sizes) :]]


def _tensors(module: Any) -> dict[str, Tensor]:
    """Return what of a module is written to a checkpoint, by name: the tensors themselves."""
    found: dict[str, Tensor] = module.state_dict(keep_vars=True)
    return found


def _write_files(folder: Path, export: Export, groups: Sequence[Sequence[int]]) -> None:
    """Write weights in a file for each group of parts, with the index that transformers reads, the configuration and its like."""
    blocks, scratch, files = export.live.blocks, folder / "part", list[Path]()
    inside = {id(tensor) for block in blocks.blocks for tensor in _tensors(block).values()}
    for group in track(groups, "files of the checkpoint"):
        here = {id(tensor) for part in group if part < len(blocks.blocks) for tensor in _tensors(blocks.blocks[part]).values()}
        with export.live.written(export.genome, group, on_host=True):
            everything = _tensors(export.model)
            wanted = {
                name: tensor.data
                for name, tensor in everything.items()
                if (id(tensor) in here if group is not groups[-1] else id(tensor) not in inside)
            }
            if not wanted:  # blocks that are dropped
                continue
            export.model.save_pretrained(scratch, state_dict=wanted)
        files.append((scratch / "model.safetensors").rename(folder / f"{len(files)}.safetensors"))
    for path in scratch.iterdir():
        path.rename(folder / path.name)
    scratch.rmdir()
    weight_map: dict[str, str] = {}
    size = 0
    for number, path in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        with safe_open(path.rename(folder / name), framework="pt") as file:
            weight_map |= dict.fromkeys(file.keys(), name)
        size += (folder / name).stat().st_size - _header_bytes(folder / name)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _header_bytes(path: Path) -> int:
    """Return what a safetensors file has before its tensors."""
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def export_checkpoint(
    folder: Path,
    *,
    live: LiveModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    genome: Genome,
    genome_files: tuple[Path, ...],
    provenance: dict[str, Any],
) -> Path:
    """Write the model at a genome as a Hugging Face folder of ordinary, dequantized weights in their dtype; see `Dequantized`.

    Args:
        genome_files: copied into the folder.
        provenance: what the weights come from, written as `evopress.json`.

    Raises: EvoPressError if the disk is full or the folder cannot be written.
    """
    export = Export(live, model, tokenizer, genome, files=genome_files, provenance=provenance)
    return write_export(Dequantized(), folder, export)
