"""A searched model as an ordinary checkpoint that transformers loads: `export=[dequantized]`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evopress.export.exporter import Export, Form, write_export
from evopress.levels.live import LiveModel
from evopress.units import Genome


class Dequantized:
    """Ordinary, dequantized weights in the model's dtype. Holds whatever can be searched, and gains no bytes by it."""

    def check(self, config: Mapping[str, Any], forms: Iterable[Form]) -> None:
        """Nothing is refused."""

    def num_bytes(self, export: Export) -> None:
        """It is transformers that lays the file out."""

    def write(self, folder: Path, export: Export) -> None:
        """Write weights, config and tokenizer. Blocks that are dropped whole are left out: the checkpoint is a shorter one."""
        with export.live.written(export.genome):
            export.model.save_pretrained(folder)
        for path in folder.glob("*.safetensors"):  # safetensors writes for the owner alone
            path.chmod((folder / "config.json").stat().st_mode)
        export.tokenizer.save_pretrained(folder)


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
