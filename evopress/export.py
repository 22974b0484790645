"""Write a searched model as an ordinary checkpoint, with its genome and provenance beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evopress.files import explained
from evopress.levels.live import Live
from evopress.levels.store import os_error
from evopress.units import Genome


def export_checkpoint(
    folder: Path,
    *,
    live: Live,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    genome: Genome,
    genome_files: tuple[Path, ...],
    provenance: dict[str, Any],
) -> Path:
    """Write the model at a genome as a Hugging Face folder of ordinary, dequantized weights in their dtype.

    Blocks that are dropped whole are left out, so that the checkpoint is an ordinary, shorter one of the same architecture.

    Written beside its place and renamed, so that a folder is there whole or not at all; an older one is replaced.

    Args:
        genome_files: copied into the folder.
        provenance: what the weights come from, written as `evopress.json`.

    Raises: EvoPressError if the disk is full or the folder cannot be written.
    """
    scratch = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        with live.written(genome):
            model.save_pretrained(scratch)
        for path in scratch.glob("*.safetensors"):  # safetensors writes for the owner alone
            path.chmod((scratch / "config.json").stat().st_mode)
        tokenizer.save_pretrained(scratch)
        for path in genome_files:
            shutil.copy2(path, scratch / path.name)
        (scratch / "evopress.json").write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
    except OSError as error:
        raise explained(error, folder) from error
    except SafetensorError as error:
        raise explained(os_error(error), folder) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder
