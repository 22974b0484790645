"""The population evaluator on the default model in bfloat16, against the plain one."""

from pathlib import Path

import numpy as np
import pytest
import torch

from evopress.compress.gptq import Quantized
from evopress.compress.grid import fit_grid, to_codes
from evopress.data.python_docs import PythonDocs
from evopress.data.tokens import token_sequences
from evopress.fitness.measures import KLDivergence
from evopress.fitness.plain import PlainEvaluator
from evopress.fitness.population import PopulationEvaluator, measure_sums
from evopress.levels.live import LiveModel
from evopress.models.blocks import BlockModel
from evopress.models.loading import load_pretrained
from evopress.models.smollm2 import DEFAULT_CACHE, NAME
from evopress.units import Level, Space, Unit

BITS = (4, 3)
GROUP = 64
FOLDER = Path(DEFAULT_CACHE).expanduser() / "models" / NAME


class Rounded:
    """Levels rounded to nearest on demand: a level source that takes no time to build."""

    folder = Path("rounded")

    def __init__(self, blocks):
        self._linears = [item for index in range(len(blocks.blocks)) for item in blocks.linears(index).items()]
        levels = tuple(Level(f"{bits} bits", bits, str(bits), bits) for bits in BITS)
        units = (
            Unit(name, int(name.split(".")[2]), name.rsplit(".", 1)[-1], m.weight.numel(), levels) for name, m in self._linears
        )
        self.space = Space("quant", tuple(units))
        self._weights = [module.weight.data for _, module in self._linears]

    def read(self, unit, level, device="cpu"):
        W, bits = self._weights[unit], BITS[level]
        groups = W.float().reshape(-1, GROUP)
        maxq = torch.full((len(groups),), 2.0**bits - 1)
        grid = fit_grid(groups.amin(1), groups.amax(1), maxq)
        codes = torch.stack([to_codes(column, grid, maxq) for column in groups.T], dim=1)
        shape = (W.shape[0], -1)
        return Quantized(
            codes.reshape(W.shape).to(torch.uint8),
            grid.scale.reshape(shape),
            grid.zero.to(torch.int16).reshape(shape),
            bits,
            W.dtype,
        )


@pytest.mark.slow
@pytest.mark.skipif(not (FOLDER / "config.json").is_file(), reason=f"the default model is not in {FOLDER}: run `make demo` first")
def test_population_equals_plain_in_bfloat16_within_the_noise_of_micro_batching():
    pretrained = load_pretrained(FOLDER, dtype="bfloat16")
    blocks = BlockModel(pretrained.model, pretrained.family)
    live = LiveModel(blocks, Rounded(blocks), cache_bytes=2**30)
    ids = token_sequences(
        PythonDocs(), "search", pretrained.tokenizer, sequence_length=256, num_tokens=512, separator="<|endoftext|>"
    )
    rng = np.random.default_rng(0)
    parent = rng.integers(0, 2, len(live.space))
    genomes = []
    for _ in range(4):
        child = parent.copy()
        child[rng.integers(0, len(child), 3)] ^= 1
        genomes.append(tuple(child.tolist()))

    def fitness(evaluator):
        sums, count = measure_sums(evaluator, [None, *genomes], ids, None, KLDivergence())
        return (sums[1:, 0] / count).tolist()

    plain = fitness(PlainEvaluator(live))
    together, apart = (fitness(PopulationEvaluator(live, max_tokens_in_flight=tokens)) for tokens in (2048, 256))
    noise = max(abs(a - b) for a, b in zip(together, apart, strict=True))
    difference = max(abs(a - b) for a, b in zip(plain, together, strict=True))
    print(f"plain {plain}, population {together}, in smaller batches {apart}")
    assert difference <= max(3 * noise, 0.01 * min(plain))
    assert int(np.argmin(plain)) == int(np.argmin(together))
