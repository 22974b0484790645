"""What is measured at which size: one YAML per size beside this file, and the rows of the paper's Table 8 from conf/search.

Nothing here needs Hydra, so that a machine without it (one with a GPU, lent for an hour) can run the benchmark.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from evopress.errors import EvoPressError
from evopress.search.evolution import SearchSettings
from evopress.settings import all_at_scale, at_scale

FOLDER = Path(__file__).parent / "sizes"
CONF = Path(__file__).resolve().parents[2] / "conf"
ROWS = {"depth_pruning": "drop", "unstructured_sparsity": "sparsity", "quantization": "quant", "super_fast": "quant"}
"""Table 8's rows to the method that each is measured with."""


@dataclass(frozen=True)
class Shape:
    """A Llama-shaped model with random weights."""

    hidden_size: int
    intermediate_size: int
    num_blocks: int
    num_heads: int
    num_kv_heads: int
    vocabulary: int
    head_dim: int | None = None
    """None: hidden_size / num_heads."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """One size of the benchmark: a model, amounts of text, and which parts are measured."""

    name: str
    about: str
    """For the report's head."""
    parts: tuple[str, ...]
    model: str
    """smollm2_135m or synthetic."""
    shape: Shape | None = None
    """Of a synthetic model."""
    dtype: str = "bfloat16"
    device: str = "auto"
    """auto, cpu or cuda."""
    sequence_length: int = 512
    group_size: int = 64
    repeats: int = 5
    """Timed passes of each path; two where one plain pass takes longer than `long_seconds`."""
    long_seconds: float = 60.0
    scale: str = "mini"
    """A file of conf/scale: what Table 8's rows are multiplied with."""
    shrink: int = 1
    """Divides the rows' tokens once more (smoke)."""
    generations: int = 1
    """Of each row."""
    rows: tuple[str, ...] = tuple(ROWS)
    rows_shared: tuple[str, ...] = ()
    """Those that are also compared with one candidate at a time and nothing else changed."""
    profiled: tuple[str, ...] = ("quantization",)
    """Rows whose time is divided among operators."""
    bits: float = 3.5
    """Target of the quantization rows; their levels are rounded to nearest, which 2.5 bits would ruin."""
    sparsity: float = 0.7
    depth: float = 0.25
    """Share of modules that depth pruning drops."""
    sparsity_levels: int = 4
    """Levels on each side of the target in the search's space."""
    search_tokens: int = 8192
    """Text that minibatches are drawn from."""
    whole_levels: bool = True
    """The search reads levels of all blocks; false: those of the first block, in every block (random weights only)."""
    max_tokens_in_flight: int = 4096
    chunk_tokens: int = 256
    hessian_tokens: int = 16384
    database_tokens: int = 16384
    database_blocks: int = 2
    """Blocks that are built, the times then multiplied up to all."""
    sweep_levels: int = 5
    """Levels of SparseGPT on each side of the target, in parts b and c."""
    kl_tokens: int = 2048
    kl_candidates: int = 4
    switch_blocks: int = 4
    forward_tokens: int = 2048
    compiled: bool = False
    """Also compile a block."""
    growth: Mapping[str, tuple[int, ...]] | None = None
    """Axis (blocks, width, offspring, tokens, vocabulary) to its values; the first is where the others are held."""
    stream: Shape | None = None
    """A model larger than the device, whose blocks are streamed from host memory; they share their weights there."""
    most_product_rows: int = 1024
    """Rows of the matrix products whose rate is measured, at most."""


def size_names() -> list[str]:
    """List the sizes that there are."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_size(name: str) -> Size:
    """Read a size by its name.

    Raises: EvoPressError for an unknown name or key.
    """
    path = FOLDER / f"{name}.yaml"
    if name not in size_names():
        raise EvoPressError(f"--size {name} is unknown: choose one of {', '.join(size_names())}")
    values = _read(path)
    unknown = set(values) - {field.name for field in fields(Size)}
    if unknown:
        raise EvoPressError(f"{path} has {sorted(unknown)[0]!r}, which is no setting of a size: remove it")
    for key in ("shape", "stream"):
        if values.get(key):
            values[key] = Shape(**values[key])
    for key in ("parts", "rows", "rows_shared", "profiled"):
        if key in values:
            values[key] = tuple(values[key])
    if values.get("growth"):
        values["growth"] = {axis: tuple(numbers) for axis, numbers in values["growth"].items()}
    return Size(**{"name": name, **values})


def table8(row: str, size: Size) -> SearchSettings:
    """Return a row of Table 8 at a size's scale, to be started from one random mix.

    Source: conf/search/<row>.yaml with conf/scale/<scale>.yaml, as `python -m evopress search=<row> scale=<scale>` composes them.
    """
    scale = _read(CONF / "scale" / f"{size.scale}.yaml")
    values = _read(CONF / "search" / f"{row}.yaml")
    paper, least = values["paper"], values["least"]
    survivors = all_at_scale(paper["survivors"], scale["offspring"], least.get("survivors", []))
    tokens = all_at_scale(paper["tokens"], scale["tokens"], least["tokens"])
    return SearchSettings(
        generations=size.generations,
        num_offspring=at_scale(paper["num_offspring"], scale["offspring"], least["num_offspring"]),
        survivors=survivors,
        tokens=[max(count // size.shrink, 8) for count in tokens],
        initial_candidates=1,
        initial_tokens=1,
        **{key: values[key] for key in ("max_switches", "distribution", "exchange") if key in values},
    )


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EvoPressError(f"{path} cannot be read ({error.strerror}): run the benchmark from a clone") from None
    assert isinstance(values, dict)
    return values
