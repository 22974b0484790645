"""The pruners on the default model: at equal sparsity SparseGPT's output error is below Wanda's, and Wanda's below magnitude's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evopress.compress.magnitude import Magnitude
from evopress.compress.sparse import PruneTo, kept_at
from evopress.compress.sparsegpt import SparseGPT
from evopress.compress.wanda import Wanda
from evopress.data.python_docs import PythonDocs
from evopress.data.tokens import token_sequences
from evopress.levels.calibration import collect_hessians
from evopress.models.blocks import BlockModel
from evopress.models.loading import load_pretrained
from evopress.models.smollm2 import DEFAULT_CACHE, NAME

FOLDER = Path(DEFAULT_CACHE).expanduser() / "models" / NAME
SPARSITIES = (0.5, 0.6, 0.7)
PRUNERS = {
    "sparsegpt": SparseGPT(sparsity=0.5, step=1, num_levels=1, dtype_bits=16, damping=0.01, block_size=128),
    "wanda": Wanda(sparsity=0.5, step=1, num_levels=1, dtype_bits=16),
    "magnitude": Magnitude(sparsity=0.5, step=1, num_levels=1, dtype_bits=16),
}


@pytest.mark.slow
@pytest.mark.skipif(not (FOLDER / "config.json").is_file(), reason=f"the default model is not in {FOLDER}: run `make demo` first")
def test_errors_are_ordered_sparsegpt_wanda_magnitude(tmp_path: Path) -> None:
    pretrained = load_pretrained(FOLDER, dtype="bfloat16")
    blocks = BlockModel(pretrained.model, pretrained.family)
    tokens = token_sequences(
        PythonDocs(), "calibration", pretrained.tokenizer, sequence_length=512, num_tokens=8192, cache_dir=tmp_path, separator="eos"
    )
    buffer = blocks.embed(tokens)
    errors: dict[str, list[list[float]]] = {name: [] for name in PRUNERS}
    for index in range(len(blocks.blocks)):
        linears = blocks.linears(index)
        stored = collect_hessians(blocks, index, buffer, 8, advance=True)
        for owner, H in stored.hessians.items():
            weights = {name: linears[name].weight.detach() for name in linears if stored.owners[name] == owner}
            kept = {name: [kept_at(W.numel(), sparsity) for sparsity in SPARSITIES] for name, W in weights.items()}
            for name, pruner in PRUNERS.items():
                results = PruneTo(pruner=pruner, kept=kept).compress(weights, H)
                errors[name] += [[level.error for level in levels] for levels in results.values()]
    table = {name: torch.tensor(values) for name, values in errors.items()}  # [units, sparsities]
    for name, values in table.items():
        print(name, "mean relative output error at", SPARSITIES, [f"{value:.4f}" for value in values.mean(0).tolist()])
    assert table["sparsegpt"].shape == (210, 3)
    for better, worse in (("sparsegpt", "wanda"), ("wanda", "magnitude")):
        share = (table[better] < table[worse]).float().mean().item()
        print(f"{better} below {worse} in {share:.1%} of units and sparsities")
        assert share > 0.97
        assert (table[better].mean(0) < table[worse].mean(0)).all()
