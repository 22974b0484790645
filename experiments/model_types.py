"""What works on every causal architecture of transformers: `docs/models.md`, or rows of those that are named.

    python -m experiments.model_types                  # writes the page
    python -m experiments.model_types llama gpt_oss    # prints two rows

Of each a tiny model with random weights is made and taken through what a run does: its blocks found and compared with the whole
model, a level database of each method, the population against the plain way, the export against what it exports, generation with
and without a cache. What is refused is so by the sentence that a user would read.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from evopress.compress.compressor import Compressor
from evopress.compress.gptq import GPTQ
from evopress.compress.sparsegpt import SparseGPT
from evopress.currencies import EXPERT
from evopress.errors import EvoPressError
from evopress.fitness.plain import PlainEvaluator
from evopress.fitness.population import PopulationEvaluator
from evopress.levels.build import ensure_database
from evopress.levels.live import LiveModel
from evopress.levels.modules import ModuleLevels
from evopress.levels.plan import BuildSettings
from evopress.methods.drop import Modules
from evopress.models.blocks import BlockModel, by_blocks
from evopress.models.experts import linears_of
from evopress.models.families import named_family
from evopress.models.outline import outlined
from evopress.settings import ModuleSettings
from evopress.units import Genome, Space
from experiments.scripts import in_one_sentence
from experiments.tiny_any import any_model, causal_types

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
LENGTH, FULL_LENGTH = 24, 40
"""Tokens of sequences; windows are of 16."""
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Row:
    """What came of an architecture."""

    model_type: str
    built: str = ""
    """Why no tiny model was made, or could be run on token ids alone; empty: it was."""
    refused: str = ""
    """Sentence; empty: it is not."""
    units: float = 0.0
    """Share of the blocks' weights that have levels."""
    dense: tuple[str, ...] = ()
    """Why others have none."""
    no_drop: str = ""
    """Why no module of it can be dropped."""
    experts: str | None = None
    """Why no expert of it can be dropped; empty: they can; None: it has none."""
    differences: tuple[tuple[str, float], ...] = ()
    """Largest differences, of logits or last hidden states."""
    only: str = ""
    """Of which models of this type all that is told; empty: of all."""
    cache: bool | None = None
    """Generation from the export with a cache is generation without; None: the dense model's differ already."""

    @property
    def works(self) -> bool:
        """Whether it is quantized and pruned."""
        return not self.built and not self.refused


def examine(model_type: str, folder: Path) -> Row:
    """Take a tiny model of an architecture through what a run does; files go to a folder."""
    ids = torch.arange(2 * LENGTH).reshape(2, LENGTH) * 7919 % 257
    try:
        model = any_model(model_type)
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    except Exception as error:  # whatever an architecture makes of a tiny configuration
        return Row(model_type, built=" ".join((str(error) or type(error).__name__).split())[:160])
    try:
        family = named_family(model_type) or outlined(model)
        with by_blocks(family):
            blocks = BlockModel(model, family)
            check = blocks.self_check(length=LENGTH, full_length=FULL_LENGTH)
    except EvoPressError as error:
        return Row(model_type, refused=str(error))
    try:
        return _methods(model_type, blocks, check, ids, folder)
    except Exception as error:  # what no user should meet
        where = traceback.extract_tb(error.__traceback__)[-1]
        return Row(model_type, refused=f"BROKEN: {type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})")


def _methods(model_type: str, blocks: BlockModel, check: float, ids: Tensor, folder: Path) -> Row:
    """Take a model that runs block by block through the methods."""
    config: Any = blocks.model.config
    slots = [slot for index in range(len(blocks.blocks)) for slot in blocks.slots(index).values()]
    assert blocks.forward_bytes(ids.numel(), LENGTH) > 0, "a run asks for it before it begins"
    whole = sum(parameter.numel() for block in blocks.blocks for parameter in block.parameters())
    found = [("self-check", check)]
    quant, cache = _weights(blocks, "quant", GPTQ(bits=(4, 2), group_size=None), ids, folder)
    sizes = [slot.weight.numel() for slot in slots]
    pruner = SparseGPT(sparsity=0.5, step=max(min(sizes) // 8, 1), num_levels=1, dtype_bits=32)
    sparse, _ = _weights(blocks, "sparsity", pruner, ids, folder)
    wrong = [f"{name} differs by {value:.2g}" for name, value in (*found, *quant, *sparse) if not value < TOLERANCE]
    dropped, no_drop = _modules(blocks, ids, folder)
    far = [f"{name} differs by {value:.2g}" for name, value in dropped if not value < TOLERANCE]
    sent, experts = _experts(blocks, ids, folder) if any(map(linears_of, blocks.model.modules())) else ([], None)
    off = [f"{name} differs by {value:.2g}" for name, value in sent if not value < TOLERANCE]
    return Row(
        model_type,
        refused=f"WRONG: {'; '.join(wrong)}" if wrong else "",
        units=sum(sizes) / whole,
        dense=tuple(dict.fromkeys(blocks.family.dense.values())),
        no_drop=f"WRONG: {'; '.join(far)}" if far else no_drop,
        experts=f"WRONG: {'; '.join(off)}" if off else experts,
        differences=(*found, *quant, *sparse, *dropped, *sent),
        only="" if getattr(config.get_text_config(), "num_kv_shared_layers", None) is None else ", without shared layers",
        cache=cache,
    )


def _weights(
    blocks: BlockModel, method: str, compressor: Compressor, ids: Tensor, folder: Path
) -> tuple[list[tuple[str, float]], bool | None]:
    """Build a database, hold the model at a genome of it, and compare: population and plain way, and the export of quant."""
    settings = BuildSettings(
        root=folder / "levels", method=method, model_name=blocks.family.name, recipe={"of": method}, propagate=None
    )
    database, _ = ensure_database(settings, blocks, ids, compressor)
    live = LiveModel(blocks, database)
    genomes = [tuple((unit + shift) % len(each.levels) for unit, each in enumerate(live.space.units)) for shift in (0, 1)]
    found = [(f"{method}: population", _evaluators(live, genomes, ids))]
    if method != "quant":
        return found, None
    difference, cache = _export(live, genomes[0], ids, folder / "checkpoint")
    return [*found, (f"{method}: export", difference)], cache


def _modules(blocks: BlockModel, ids: Tensor, folder: Path) -> tuple[list[tuple[str, float]], str]:
    """Drop one module, and a whole block, and compare; or say why that cannot be."""
    space: Space = Modules().space(blocks.shapes(), dtype_bits=32)
    try:
        live = LiveModel(blocks, ModuleLevels(space))
    except EvoPressError as error:
        return [], str(error)
    last = len(blocks.blocks) - 1
    genome = tuple(int(index == 0 or unit.block == last) for index, unit in enumerate(space.units))
    found = [("drop: population", _evaluators(live, [genome], ids))]
    difference, _ = _export(live, genome, ids, folder / "shorter")
    return [*found, ("drop: export", difference)], ""


def _experts(blocks: BlockModel, ids: Tensor, folder: Path) -> tuple[list[tuple[str, float]], str]:
    """Drop one expert of every layer, each time another, and compare; or say why that cannot be."""
    try:
        space: Space = Modules(ModuleSettings(granularity=EXPERT)).space(blocks.shapes(), dtype_bits=32)
        live = LiveModel(blocks, ModuleLevels(space))
        layers = list(dict.fromkeys(unit.group for unit in space.units))
        counts = Counter(unit.group for unit in space.units)
        gone = {f"{layer}.{index % counts[layer]}" for index, layer in enumerate(layers)}
        genome = tuple(int(unit.name in gone) for unit in space.units)
        found = [("experts: population", _evaluators(live, [genome], ids))]
        difference, _ = _export(live, genome, ids, folder / "fewer")
    except EvoPressError as error:
        return [], str(error)
    return [*found, ("experts: export", difference)], ""


def _evaluators(live: LiveModel, genomes: Sequence[Genome], ids: Tensor) -> float:
    """Return how far the population's last hidden states are from the plain way's."""
    of, states = PopulationEvaluator(live).final_states([None, *genomes], ids)
    _, plain = PlainEvaluator(live).final_states([None, *genomes], ids)
    return max(float((states[place] - other).abs().max()) for place, other in zip(of, plain, strict=True))


@torch.no_grad()
def _export(live: LiveModel, genome: Genome, ids: Tensor, folder: Path) -> tuple[float, bool | None]:
    """Write a genome's checkpoint, load it as anybody would, and compare its logits; tell what becomes of generation."""
    model: Any = live.blocks.model
    with live.applied(genome):
        wanted = model(input_ids=ids, use_cache=False).logits
    with live.written(genome):
        model.save_pretrained(folder)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    difference = float((loaded(input_ids=ids, use_cache=False).logits - wanted).abs().max())
    return difference, _same_with_cache(loaded, ids) or (None if not _same_with_cache(model, ids) else False)


def _same_with_cache(model: Any, ids: Tensor) -> bool:
    """Tell whether six tokens come out the same with and without a cache."""
    try:
        texts = [model.generate(ids[:1], max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)]
    except Exception:  # what a model cannot generate at all
        return False
    return bool(torch.equal(*texts))


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what transformers says about tiny models."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def survey(model_types: Sequence[str], *, said: bool = False) -> list[Row]:
    """Examine architectures, each in a folder of its own.

    Args: said: print each row as it comes.
    """
    rows = []
    with _quiet():
        for model_type in model_types:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(examine(model_type, Path(folder)))
                if said:
                    print(rows[-1], file=sys.stderr, flush=True)
    return rows


HEAD = """# Which models work

Written by `python -m experiments.model_types`, from transformers {version}: of every causal architecture that it has a tiny model
with random weights was taken through what a run does, in float32 on a CPU. A test does the same.

{works} of {built} architectures work for quantization and sparsity, {drop} of them for depth pruning; of {unbuilt} no tiny model
was made. Of {mixtures} mixtures of experts, {experts} work for dropping experts, as many of each block. *Works* means: block by
block is the whole model, the population is the plain way, and a checkpoint that is exported computes in plain transformers what was
measured, all to {tolerance:g}. The largest difference that was seen is {largest:.1e}. Routers here have one group of
experts; those that choose among several groups first, as DeepSeek V3's does, are refused for dropping experts.

A model type is `model_type` in the checkpoint's config.json. *Weights with levels* is the share of the blocks' weights that
compression reaches, in these tiny models; of real ones it is larger, since norms and gates are smaller beside the rest. What stays
as it is:

- routers, which choose among experts;
- linears with fewer than 16 inputs or outputs, or fewer than a 24th of the hidden size (gates and decays of linear attention);
- linears inside norms, those that several blocks share, and those that text alone never reaches (attention to an encoder);
- what is no linear layer: convolutions, and parameters that are used otherwise.

*Without shared layers*: where the last blocks use the keys and values of earlier ones (`num_kv_shared_layers` above 0, as in
Gemma 3n and in Gemma 4 E2B and E4B), a model is refused by its config.

## What a checkpoint is stored as
Weights in FP8 (DeepSeek, Ministral 3), MXFP8 or MXFP4 (gpt-oss) are dequantized as transformers loads them, and the run says so:
they are what *dense* means then, and what is exported has none of these codes. Any other quantized checkpoint is refused by name.

## Memory and speed at 300 million weights
Random float32 weights, groups of 128, 4, 3 and 2 bits by the paper's recipe, 4,096 calibration tokens, one thread of a shared CPU,
2026-11-26: `python -m evopress +method=quant bits=3 model=local model.path=DIR model.dtype=float32 model.sequence_length=512
data.calibration_tokens=4096 method.levels=[4,3,2] method.recipe=paper stages=[database] threads=1`. Builds were stopped after the
blocks that are given; the peak is resident memory of the whole process, the model's 1.25 GB included.
The single measurements were not kept.

| shape | weights | blocks | CPU seconds a block | of blocks | peak |
|---|---:|---:|---:|---|---:|
| Qwen3: 1024 wide, 3072 inside, 151,936 tokens | 313 M | 10 | 18.5 | second and third | 2.4 GB |
| Gemma 3: 1152 wide, 6912 inside, 131,072 tokens | 312 M | 6 | 32 | first | 3.2 GB |
"""


def page(rows: Sequence[Row]) -> str:
    """Lay the survey out as a page."""
    working = [row for row in rows if row.works]
    built = [row for row in rows if not row.built]
    refused = [row for row in built if row.refused]
    largest = max((value for row in working for _, value in row.differences), default=0.0)
    of_experts = [row for row in working if row.experts is not None]
    lines = [
        HEAD.format(
            version=transformers.__version__,
            works=len(working),
            built=len(built),
            unbuilt=len(rows) - len(built),
            drop=sum(not row.no_drop for row in working),
            mixtures=len(of_experts),
            experts=sum(not row.experts for row in of_experts),
            tolerance=TOLERANCE,
            largest=largest,
        ),
        "## These work",
        "| model type | weights with levels | also dense | depth pruning | dropping experts |",
        "|---|---:|---|---|---|",
        *(
            f"| {row.model_type}{row.only} | {row.units:.0%} | {', '.join(row.dense)} | {row.no_drop or 'works'} "
            f"| {'' if row.experts is None else row.experts or 'works'} |"
            for row in working
        ),
        "",
        "## These are refused",
        "| model type | sentence |",
        "|---|---|",
        *(f"| {row.model_type} | {row.refused} |" for row in refused),
        "",
        "## No tiny model of these",
        "Their configurations ask for more than sizes, or they need more than token ids.",
        "",
        ", ".join(row.model_type for row in rows if row.built),
        "",
    ]
    return "\n".join(lines)


def _known(model_type: str) -> str:
    """Read a model type; raise argparse.ArgumentTypeError if transformers has no causal language model of it."""
    if model_type not in (known := causal_types()):
        near = get_close_matches(model_type, known) or sorted(known)
        raise argparse.ArgumentTypeError(
            f"{model_type} is no model type that transformers has a causal language model for: choose among {', '.join(near)}"
        )
    return model_type


@in_one_sentence()
def main() -> None:
    """Write the page, or print rows of the architectures that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*", type=_known, metavar="MODEL_TYPE", help="default: all of them")
    named = parser.parse_args().model_types
    rows = survey(named or causal_types(), said=True)
    if not named:
        PAGE.write_text(page(rows), encoding="utf-8")
        print(f"{sum(row.works for row in rows)} of {sum(not row.built for row in rows)} work: {PAGE}")


if __name__ == "__main__":
    main()
