"""Take AutoScheme's allocation from the tool itself, AutoRound, as genomes of our levels.

    pip install --no-deps auto-round==0.16.1 py-cpuinfo             # beside evopress, which has what else it needs
    python -m experiments.allocation.autoscheme multirun/autoscheme --bits 2.5 3 3.5
    python -m experiments.allocation.run --recipes best --seeds 0 --budgets 2.5 3 3.5 --baselines --searches \
        --genomes autoscheme=multirun/autoscheme

The tool has the default model and the search text of its runs, chooses among 2 to 6 bits in groups of 64 with zeros, counts codes
alone, and writes `BITS.txt`, a line per weight. `--samples` and `--length` are the tool's own 16 and 256 where nothing is given.
"""

from __future__ import annotations

import argparse
import importlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from evopress.errors import EvoPressError
from evopress.models.opening import find_model
from evopress.workspace import Workspace
from experiments.composed import settings_of
from experiments.scripts import in_one_sentence

OPTIONS = (6, 5, 4, 3, 2)
"""Bit widths of the default levels."""
GROUP = 64
OVERLAP = 64
"""Tokens of the next sequence at the end of a document, since text cut in two need not give the same tokens again."""


def write_text(sequences: Tensor, tokenizer: Any, path: Path) -> None:
    """Write token ids int64 [N, L] as documents, one for each sequence."""
    tokens, length = sequences.flatten().tolist(), sequences.shape[1]
    documents = (tokenizer.decode(tokens[start : start + length + OVERLAP]) for start in range(0, len(tokens), length))
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")


def imported(module: str, packages: str) -> Any:
    """Import a module of another tool; raise EvoPressError if it is not installed.

    Args: packages: what pip is to install for it, the tool's own first.
    """
    package, *_ = packages.partition("==")
    if find_spec(module.partition(".")[0]) is None:
        raise EvoPressError(f"{package} is not installed: pip install --no-deps {packages}")
    return importlib.import_module(module)


def tool() -> Any:
    """Import AutoRound."""
    return imported("auto_round", "auto-round==0.16.1 py-cpuinfo")


def reads(text: Path) -> dict[str, Any]:
    """Return what the tool is told of its text, and what it needs not do for a small model."""
    return {"dataset": str(text.resolve()), "enable_torch_compile": False}


def scheme_of(bits: float) -> Any:
    """Return the tool's scheme of weights of so many bits, as those of `recipe=best`."""
    schemes = importlib.import_module("auto_round.schemes")
    return schemes.QuantizationScheme(bits=int(bits), group_size=GROUP, sym=False, data_type="int", act_bits=16)


def chosen_scheme(bits: float, text: Path, *, samples: int = 16, length: int = 256) -> Any:
    """Return the tool's scheme of weights of so many bits on average, which it allocates."""
    options = [scheme_of(option) for option in OPTIONS]
    return tool().AutoScheme(
        avg_bits=bits, options=options, ignore_scale_zp_bits=True, nsamples=samples, seqlen=length, batch_size=8, **reads(text)
    )


def allocation(model: Path, text: Path, bits: float, *, samples: int, length: int, seed: int) -> dict[str, int]:
    """Return the bits that the tool gives each weight."""
    scheme = chosen_scheme(bits, text, samples=samples, length=length)
    compressor = tool().AutoRound(str(model), scheme=scheme, iters=0, seed=seed, disable_model_free=True, **reads(text))
    compressor.post_init()  # scores and chooses; nothing is quantized
    return {name: int(of["bits"]) for name, of in compressor.layer_config.items() if of.get("bits", 16) < 16}


@in_one_sentence()
def main() -> None:
    """Write the tool's genomes at the bits that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for BITS.txt and the text")
    parser.add_argument("--bits", nargs="+", type=float, default=[2.5, 3, 3.5])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256, help="tokens of a sample")
    parser.add_argument("--seed", type=int, default=42, help="of the order of samples (default: the tool's)")
    asked = parser.parse_args()
    tool()
    asked.folder.mkdir(parents=True, exist_ok=True)
    text = asked.folder / "search.jsonl"
    workspace = Workspace(settings_of(["+method=quant", "bits=3"]), asked.folder)
    write_text(workspace.search_tokens, workspace.tokenizer, text)
    model = find_model(workspace.settings.model, workspace.cache)
    for bits in asked.bits:
        found = allocation(model, text, bits, samples=asked.samples, length=asked.length, seed=asked.seed)
        lines = "".join(f"{name}: {chosen}\n" for name, chosen in found.items())
        (asked.folder / f"{bits:g}.txt").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
