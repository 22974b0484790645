"""What the experiments on depth pruning share: the model with modules that can be dropped, its text, and how results are written.

torch and transformers are imported when a model is loaded: most of these scripts only read run folders.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evopress.errors import EvoPressError
from experiments.scripts import in_one_sentence
from experiments.tables import write_csv, write_table

if TYPE_CHECKING:
    from torch import Tensor

    from evopress.data.sources import Split
    from evopress.fitness.population import PopulationEvaluator
    from evopress.methods.drop import Drop
    from evopress.models.blocks import BlockModel
    from evopress.models.loading import Pretrained
    from evopress.units import Budget, Genome, Space

BATCH_TOKENS = 4096
"""Tokens of each candidate that are evaluated at a time."""
_SEPARATOR = "<|endoftext|>"
"""Of the default model's documents, as in conf/model/smollm2_135m.yaml."""


def sweep_options(parser: argparse.ArgumentParser, *, out: Path) -> None:
    """Add what every script that reads a sweep can be told."""
    parser.add_argument("--root", type=Path, default=Path("multirun"), help="where the sweeps lie (default %(default)s)")
    _out_option(parser, out)


def model_options(parser: argparse.ArgumentParser, *, out: Path) -> None:
    """Add what every script that loads a model can be told."""
    parser.add_argument("--model-path", default=None, help="folder or hub id of a causal language model (default: SmolLM2-135M)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32", "float16"), help="default %(default)s")
    parser.add_argument("--sequence-length", type=int, default=512, help="tokens per sequence (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    _out_option(parser, out)


def _out_option(parser: argparse.ArgumentParser, out: Path) -> None:
    parser.add_argument("--out", type=Path, default=out, help="folder to write to (default: the experiment's own)")


@dataclass(frozen=True)
class DepthModel:
    """A model whose modules can be dropped, and the text it reads."""

    pretrained: Pretrained
    blocks: BlockModel
    sequence_length: int
    separator: str
    cache: Path
    about: str
    """Model, text and machine in a line."""

    @property
    def num_blocks(self) -> int:
        return len(self.blocks.blocks)

    def space(self, granularity: str, *, sparsity: float = 0.5) -> Space:
        """Return the units of a granularity; raise EvoPressError if the sparsity drops no block of them or all."""
        return _method(granularity, sparsity).space(self.blocks.shapes(), dtype_bits=8 * self.blocks.dtype.itemsize)

    def budget(self, granularity: str, sparsity: float) -> Budget:
        """Return what method drop keeps at a sparsity."""
        return _method(granularity, sparsity).budget(self.space(granularity, sparsity=sparsity))

    def num_dropped(self, sparsity: float) -> int:
        """Return how many blocks a sparsity drops; raise EvoPressError if that is none or all."""
        self.space("block", sparsity=sparsity)
        return _method("block", sparsity).num_dropped(self.num_blocks)

    def evaluator(self, granularity: str) -> PopulationEvaluator:
        """Return the evaluator of genomes of a granularity."""
        from evopress.fitness.population import PopulationEvaluator
        from evopress.levels.live import LiveModel
        from evopress.levels.modules import ModuleLevels

        return PopulationEvaluator(LiveModel(self.blocks, ModuleLevels(self.space(granularity))), max_tokens_in_flight=BATCH_TOKENS)

    def tokens(self, split: Split, count: int) -> Tensor:
        """Return the first `count` token ids of a split of python_docs, int64 [N, L]."""
        from evopress.data.python_docs import PythonDocs
        from evopress.data.tokens import token_sequences

        return token_sequences(
            PythonDocs(),
            split,
            self.pretrained.tokenizer,
            sequence_length=self.sequence_length,
            num_tokens=count,
            cache_dir=self.cache / "tokens",
            separator=self.separator,
        )


def load(arguments: argparse.Namespace) -> DepthModel:
    """Load the model that `model_options` asked about.

    Raises: EvoPressError if there is none, or it cannot be run block by block.
    """
    import torch
    import transformers

    from evopress import machine
    from evopress.models.blocks import BlockModel
    from evopress.models.loading import load_pretrained, pick_device
    from evopress.models.opening import find_model
    from evopress.settings import ModelSettings

    if arguments.sequence_length < 2:
        raise EvoPressError(f"--sequence-length {arguments.sequence_length} is out of range: expected at least 2 tokens")
    transformers.utils.logging.disable_progress_bar()
    machine.keep_freed_memory()
    machine.exact_products()
    cache = Path(os.environ.get("EVOPRESS_CACHE") or "~/.cache/evopress").expanduser()
    own = arguments.model_path is None
    folder = find_model(ModelSettings(path=arguments.model_path, builtin="smollm2_135m" if own else None), cache)
    device = pick_device("auto")
    pretrained = load_pretrained(folder, dtype=arguments.dtype, device=device)
    blocks = BlockModel(pretrained.model, pretrained.family, device=device)
    blocks.self_check()
    environment = machine.describe(torch.get_num_threads(), device=device.type)
    return DepthModel(
        pretrained,
        blocks,
        sequence_length=arguments.sequence_length,
        separator=_SEPARATOR if own else "eos",
        cache=cache,
        about=f"Model {pretrained.name}, {arguments.dtype} on {device.type}, text python_docs in sequences of "
        f"{arguments.sequence_length} tokens, seed {arguments.seed}. "
        f"Revision {environment['git_revision']} on {environment['machine']}.",
    )


def _method(granularity: str, sparsity: float) -> Drop:
    from evopress.methods.drop import Drop
    from evopress.settings import DropSettings

    method = Drop(DropSettings(granularity=granularity), sparsity, exchange="name")
    method.check(searching=False)
    return method


def perplexities(evaluator: PopulationEvaluator, genomes: Sequence[Genome | None], tokens: Tensor) -> list[float]:
    """Return the perplexity of every genome on sequences, int64 [N, L]; shared prefixes of genomes are computed once."""
    from evopress.fitness.measures import NegativeLogLikelihood
    from evopress.fitness.population import measure_sums

    total, count = [0.0] * len(genomes), 0
    for part in tokens.split(max(BATCH_TOKENS // tokens.shape[1], 1)):
        sums, num_tokens = measure_sums(evaluator, genomes, part, None, NegativeLogLikelihood())
        total = [before + new for before, new in zip(total, sums[:, 0].tolist(), strict=True)]
        count += num_tokens
    return [math.exp(nll / count) if nll / count < 700 else math.inf for nll in total]


def publish(out: Path, title: str, text: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write results.csv, table.md and the part of README.md between its marks, and print the text."""
    write_csv(out / "results.csv", rows)
    write_table(out, title, text)
    print(text)


def run(main: Callable[[], None]) -> None:
    """Run a script: progress is logged, a user's error is one sentence and exit status 1."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    with in_one_sentence():
        main()
