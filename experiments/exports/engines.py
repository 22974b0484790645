"""What runs an exported model on this machine: llama.cpp, MLX, or transformers.

As a program it is a process of its own, whose speed and peak of memory are the engine's:

    python -m experiments.exports.engines PATH ENGINE THREADS
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from evopress.errors import EvoPressError
from experiments.scripts import existing, in_one_sentence

PROMPT_TOKENS, GENERATED_TOKENS = 256, 32


class Engine(Protocol):
    """A model that is loaded."""

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Return the logits of every token of a sequence, float32 [L, V]."""

    def read(self, tokens: Sequence[int], *, start: int) -> int:
        """Read tokens that begin at a place, 0 a new text; return the likeliest one after them."""


class Transformers:
    """A checkpoint; one of compressed-tensors is decompressed by its own code."""

    def __init__(self, folder: Path, *, dtype: str | None = None, threads: int = 1) -> None:
        """Load it, in its own dtype unless another is named."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        config = AutoConfig.from_pretrained(folder)
        kind = dtype or str(config.dtype or "float32").removeprefix("torch.")
        if hasattr(config, "quantization_config"):
            weights = decompressed(folder, config.quantization_config)
            del config.quantization_config
            self._model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, kind))
            missing, unexpected = self._model.load_state_dict(weights, strict=False)
            assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
            self._model.tie_weights()
        else:
            self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, kind))
        self._model.eval()
        self._torch, self._past = torch, None

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """See `Engine`."""
        ids = self._torch.tensor([list(tokens)])
        found: NDArray[np.float32] = self._model(input_ids=ids, use_cache=False).logits[0].float().numpy()
        return found

    def read(self, tokens: Sequence[int], *, start: int) -> int:
        """See `Engine`."""
        ids = self._torch.tensor([list(tokens)])
        past = self._past if start else None
        found = self._model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
        self._past = found.past_key_values
        return int(found.logits[0, -1].argmax())


class Mlx:
    """A folder of mlx-lm's."""

    def __init__(self, folder: Path) -> None:
        """Load it, on the CPU where there is no GPU that MLX knows."""
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache
        from mlx_lm.utils import load_model

        if not mx.metal.is_available():
            mx.set_default_device(mx.cpu)
        self._model, _ = load_model(folder)
        self._mx, self._new_cache = mx, lambda: make_prompt_cache(self._model)
        self._cache = self._new_cache()

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """See `Engine`."""
        return np.array(self._model(self._mx.array([list(tokens)]))[0].astype(self._mx.float32))

    def read(self, tokens: Sequence[int], *, start: int) -> int:
        """See `Engine`."""
        if start == 0:
            self._cache = self._new_cache()
        return int(self._model(self._mx.array([list(tokens)]), cache=self._cache)[0, -1].argmax().item())


def decompressed(folder: Path, config: Any) -> dict[str, Any]:
    """Return a folder's weights in the model's names, those that are packed by compressed-tensors' own decompressor."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    own = QuantizationConfig.model_validate(config if isinstance(config, dict) else config.to_dict())
    compressor = BaseCompressor.load_from_registry(own.format)
    tensors = {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}
    for scheme in own.config_groups.values():
        for module in scheme.targets:
            parts = {
                part: tensors.pop(f"{module}.{part}")
                for part in ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
            }
            tensors[f"{module}.weight"] = compressor.decompress(parts, scheme)["weight"]
    return tensors


def engine_of(path: Path) -> str:
    """Return which engine a file or folder is for.

    Raises: EvoPressError if it is neither a GGUF file nor the folder of a model.
    """
    if path.suffix == ".gguf":
        return "llama.cpp"
    if not (path / "config.json").is_file():
        raise EvoPressError(f"{path} is no .gguf file and no folder with a config.json: name an exported model, or a checkpoint")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    how = config.get("quantization_config", {}).get("quant_method")
    return "MLX" if "quantization" in config else "compressed-tensors" if how == "compressed-tensors" else "transformers"


def bytes_of(path: Path) -> int:
    """Return the bytes of a file, or of a folder's weight files."""
    return path.stat().st_size if path.is_file() else sum(each.stat().st_size for each in path.glob("*.safetensors"))


@contextmanager
def opened(path: Path, engine: str, *, length: int, threads: int = 1, exact: bool = True) -> Iterator[Engine]:
    """Load a file or folder.

    Args:
        engine: as `engine_of` names it; "transformers bfloat16" and the like load a checkpoint in that dtype.
        length: tokens of a text, at most.
        exact: as in `llama_cpp.opened`.
    """
    if engine == "llama.cpp":
        from experiments.exports import llama_cpp

        with llama_cpp.opened(path, length=length, threads=threads, exact=exact) as loaded:
            yield loaded
    elif engine == "MLX":
        yield Mlx(path)
    else:
        yield Transformers(path, dtype=engine.partition(" ")[2] or None, threads=threads)


def speed(path: Path, engine: str, *, threads: int = 1) -> dict[str, float]:
    """Return tokens a second of a prompt and of what follows it, and this process's peak of resident memory in MB."""
    with opened(path, engine, length=PROMPT_TOKENS + GENERATED_TOKENS, threads=threads, exact=False) as loaded:
        prompt = [1 + place % 1000 for place in range(PROMPT_TOKENS)]
        loaded.read(prompt[:8], start=0)  # the file is paged in, kernels are chosen
        begun = time.perf_counter()
        token = loaded.read(prompt, start=0)
        read = time.perf_counter()
        for place in range(GENERATED_TOKENS):
            token = loaded.read([token], start=PROMPT_TOKENS + place)
        ended = time.perf_counter()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return {
        "prompt_tokens_per_second": PROMPT_TOKENS / (read - begun),
        "generated_tokens_per_second": GENERATED_TOKENS / (ended - read),
        "peak_memory_mb": int(peak.split()[1]) * 1024 / 1e6,
    }


if __name__ == "__main__":
    if len(sys.argv) != 4 or not sys.argv[3].isdecimal():
        sys.exit("usage: python -m experiments.exports.engines PATH ENGINE THREADS")
    with in_one_sentence():
        print(json.dumps(speed(existing(sys.argv[1]), sys.argv[2], threads=int(sys.argv[3]))))
