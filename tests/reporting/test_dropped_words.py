"""Files of dropped modules as the authors' code writes them: one word per block."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from evopress.errors import EvoPressError
from evopress.reporting.records import read_genome
from evopress.units import Level, Space, Unit

KEEP, DROP = Level("keep", 1, "keep", 16), Level("drop", 0, "drop", 0)


def space_of(granularity: str, *, blocks: int = 4, kept: tuple[str, ...] = ()) -> Space:
    names = {
        "module": [(f"model.layers.{i}.{kind}", i, kind) for i in range(blocks) for kind in ("attention", "mlp")],
        "block": [(f"model.layers.{i}", i, "block") for i in range(blocks)],
        "pair": [(f"model.layers.{i}-{i + 1}", i, "pair") for i in range(0, blocks, 2)],
    }[granularity]
    return Space("drop", tuple(Unit(n, i, kind, 9, (KEEP,) if n in kept else (KEEP, DROP)) for n, i, kind in names))


def read(tmp_path: Path, text: str, space: Space) -> tuple[int, ...]:
    path = tmp_path / "layer_drop_config.txt"
    path.write_text(text, encoding="utf-8")
    return read_genome(path, space)


@pytest.mark.parametrize(
    ("granularity", "text", "genome"),
    [
        ("module", "none\nattn\nmlp\nattn+mlp\n", (0, 0, 1, 0, 0, 1, 1, 1)),
        ("module", "none attn mlp attn+mlp", (0, 0, 1, 0, 0, 1, 1, 1)),
        ("module", "none\r\nnone\r\nnone\r\nnone", (0,) * 8),
        ("block", "attn+mlp\nnone\nnone\nattn+mlp", (1, 0, 0, 1)),
        ("pair", "attn+mlp\nattn+mlp\nnone\nnone\n", (1, 0)),
    ],
)
def test_a_word_says_what_a_block_loses(granularity: str, text: str, genome: tuple[int, ...], tmp_path: Path) -> None:
    assert read(tmp_path, text, space_of(granularity)) == genome


@pytest.mark.parametrize(
    ("space", "text", "sentence"),
    [
        (space_of("module"), "none\nattn\nffn\nnone", "word 3 of .* is 'ffn': expected one of none, attn, mlp, attn+mlp"),
        (space_of("module"), "none\nattn", "2 words, one per block, but the model has 4: use a file of this model"),
        (space_of("module"), "none\n" * 5, "5 words, one per block, but the model has 4"),
        (
            space_of("block"),
            "attn\nnone\nnone\nnone",
            "'attn' of model.layers.0, which can only be dropped whole .*granularity=module",
        ),
        (space_of("pair"), "attn+mlp none none none", "'attn+mlp none' of model.layers.0-1, .*granularity=module"),
        (space_of("module", kept=("model.layers.0.mlp",)), "mlp none none none", "layers.0.mlp, which method.exclude keeps"),
        (Space("quant", (Unit("a", 0, "q", 9, (KEEP, DROP)),)), "attn", "method is quant: use it with +method=drop"),
    ],
)
def test_words_that_do_not_fit_are_refused(space: Space, text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(EvoPressError, match=sentence.replace("+", re.escape("+"))):
        read(tmp_path, text, space)
