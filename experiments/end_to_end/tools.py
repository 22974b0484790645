"""Compress the default model with tools of others, which make weights of their own, and write dequantized checkpoints.

    pip install --no-deps auto-round==0.16.1 py-cpuinfo hqq==0.2.8.post1 termcolor einops accelerate    # beside evopress
    python -m experiments.end_to_end.tools auto_round multirun/end_to_end/auto_round-3 --bits 3 --iterations 50
    python -m experiments.end_to_end.tools hqq multirun/end_to_end/hqq-3 --bits 3

Groups of 64 with zeros, embeddings as they are; a tool that takes text has the calibration text of a run's levels, in sequences of
256 tokens. Bits that are no whole number are AutoScheme's to allocate among 2 to 6. `checkpoint` in the folder is what is written.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evopress.errors import EvoPressError
from evopress.models.opening import find_model
from evopress.workspace import Workspace
from experiments.allocation.autoscheme import GROUP, chosen_scheme, imported, reads, scheme_of, tool, write_text
from experiments.composed import settings_of
from experiments.scripts import check_positive, in_one_sentence

CHECKPOINT = "checkpoint"
_LENGTH = 256
_AT_ONCE = 8
"""Sequences in one step of AutoRound, which is its own default."""


def auto_round(workspace: Workspace, model: Path, folder: Path, asked: argparse.Namespace) -> None:
    """Round by signed gradients (AutoRound, arXiv:2309.05516), a block at a time; with 0 iterations to nearest, ranges fitted."""
    rounds = tool().AutoRound
    tokens, text = workspace.calibration_tokens.reshape(-1, _LENGTH), folder / "calibration.jsonl"
    write_text(tokens, workspace.tokenizer, text)
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    rounding = rounds(
        dense,
        AutoTokenizer.from_pretrained(model),
        scheme=chosen_scheme(asked.bits, text) if asked.bits % 1 else scheme_of(asked.bits),
        iters=asked.iterations,
        nsamples=len(tokens),
        seqlen=_LENGTH,
        batch_size=_AT_ONCE,
        seed=asked.seed,
        amp=torch.cuda.is_available(),  # many CPUs are slower in bfloat16
        disable_model_free=True,
        **reads(text),
    )
    written = folder / "auto_round"
    rounding.quantize_and_save(str(written), format="fake")
    (checkpoint,) = written.iterdir()  # named after model and scheme
    checkpoint.rename(folder / CHECKPOINT)


def hqq(workspace: Workspace, model: Path, folder: Path, asked: argparse.Namespace) -> None:
    """Fit zeros by half-quadratic splitting (HQQ), which looks at no text."""
    quantizer = imported("hqq.core.quantize", "hqq==0.2.8.post1 termcolor einops accelerate").Quantizer
    if asked.bits not in quantizer.SUPPORTED_BITS:
        raise EvoPressError(
            f"--bits {asked.bits:g} is none of hqq's: choose one of {', '.join(map(str, quantizer.SUPPORTED_BITS))}"
        )
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for module in dense.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            packed, meta = quantizer.quantize(
                module.weight.data, nbits=asked.bits, group_size=GROUP, axis=1, device="cpu", compute_dtype=torch.float32
            )
            module.weight.data = quantizer.dequantize(packed, meta)
    dense.save_pretrained(folder / CHECKPOINT)


TOOLS: dict[str, Callable[[Workspace, Path, Path, argparse.Namespace], None]] = {"auto_round": auto_round, "hqq": hqq}


@in_one_sentence()
def main() -> None:
    """Compress with one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=list(TOOLS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bits", type=float, default=3.0)
    parser.add_argument("--iterations", type=int, default=200, help="of AutoRound per block (default: its own)")
    parser.add_argument("--seed", type=int, default=42, help="of AutoRound (default: its own)")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    check_positive(asked, "threads")
    torch.set_num_threads(asked.threads)
    asked.folder.mkdir(parents=True, exist_ok=True)
    workspace = Workspace(settings_of(["+method=quant", "bits=3"]), asked.folder)
    began = time.monotonic()
    TOOLS[asked.tool](workspace, find_model(workspace.settings.model, workspace.cache), asked.folder, asked)
    print(f"{asked.folder / CHECKPOINT}: {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
