"""The model card of an exported folder: what it is, how it is run, what it was measured at."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from evopress.export.exporter import Export


def exactness(off: float, *, rounded: str, dtype: torch.dtype) -> str:
    """Return how far a file's weights are from those that were measured, in one sentence.

    Args:
        off: by how many steps of its grid a weight is from scale · (q - zero) at most.
        rounded: what makes it so: "Minima are float16".
        dtype: the model's, to which what was measured is rounded.
    """
    name = str(dtype).removeprefix("torch.")
    if not off:
        return f"The weights are those that were measured, bit for bit once they are rounded to {name}, the model's dtype."
    return (
        f"{rounded}: no weight held as integers differs by more than {off:.2g} of a step of its grid from scale · (q - zero), "
        f"which was measured rounded to {name}, the model's dtype."
    )


def model_card(export: Export, *, library: str, how: str, commands: Sequence[str], remarks: str) -> str:
    """Return README.md.

    Args:
        library: as the model hub names the engine.
        how: what to do before the commands, which run or serve the model.
        remarks: what is exact, and what is not.
    """
    licence = export.licence or "other"
    stated = export.licence or "not stated where it was found: see its own model card before you pass this on"
    blocks = [
        f"---\nlibrary_name: {library}\nlicense: {licence.lower()}\nbase_model: {export.base}\ntags: [evopress]\n---",
        f"# {export.base}, compressed by EvoPress",
        f"{how}\n\n```sh\n" + "\n".join(commands) + "\n```",
        export.table.strip(),
        remarks,
        f"Made by `{export.command}`; every unit's level is in `genome.txt`, what it comes from in `evopress.json`."
        if export.command
        else "",
        f"Licence of the base model: {stated}.",
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"
