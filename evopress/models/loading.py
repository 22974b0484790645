"""Load a causal language model and its tokenizer from a local folder, safetensors only, and say what was loaded."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers.auto import AutoQuantizationConfig

from evopress.errors import EvoPressError, first_line, reason_of
from evopress.json_files import load_json, shown
from evopress.models import attention
from evopress.models.devices import claim_gpu
from evopress.models.families import Family
from evopress.models.fp8 import with_partial_blocks
from evopress.models.outline import find_family, skeleton, wrapper_of
from evopress.models.stored import (
    INDEX,
    READABLE,
    WEIGHTS,
    Stored,
    but_masks,
    check_adapter,
    check_config,
    check_places,
    check_shapes,
    check_tensors,
    loaded_files,
    readable_quantization,
    shards_of,
    silently_left_out,
    stored_tensors,
)
from evopress.ranks import launched, local_rank, processes

logger = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MOST_CONFIG_BYTES = 16 * 2**20
_LONGEST_NAME = 96
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
"""Names that Windows keeps for devices."""
_MOST = {
    "num_hidden_layers": 1024,
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "vocab_size": 2**24,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
}
"""Sizes that a config may ask for: far above any model's, far below what hangs or fills a machine."""
_MOST_OTHERS = 2**20
"""Of other numbers of blocks and experts, and of what belongs to one of them."""
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class Pretrained:
    """A loaded model with what other rooms ask about it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    family: Family
    name: str
    """Safe for file systems: letters, digits, dot, dash and underscore."""
    folder: Path
    digest: str
    """SHA-256 over the weight files and config.json, hexadecimal."""
    left_out: tuple[str, ...] = ()
    """Stored tensors of further heads, such as one that predicts several tokens: neither loaded nor exported."""


def safe_name(name: str) -> str:
    """Turn a model id or path into a name that any file system takes: at most 96 plain characters, never dots or a device."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name.strip("/").replace("/", "--")).strip(".-") or "model"
    if _RESERVED.fullmatch(safe):
        safe = f"model-{safe}"
    if len(safe) > _LONGEST_NAME:
        safe = f"{safe[: _LONGEST_NAME - 17]}-{hashlib.sha256(name.encode(errors='replace')).hexdigest()[:16]}"
    return safe


def pick_device(device: str) -> torch.device:
    """Resolve "auto" to a GPU or the CPU, and check that an explicit device is there; of several GPUs, one that no other run uses.

    Under torchrun each process takes the GPU of its number.

    Raises: EvoPressError if CUDA is asked for and absent, the name is no device, or processes have too few GPUs.
    """
    if launched() and device in ("auto", "cuda") and torch.cuda.is_available():
        number, count = local_rank(), torch.cuda.device_count()
        if count == 1 and "SLURM_GPUS_PER_TASK" in os.environ:  # each task sees its own alone
            return torch.device("cuda", 0)
        if number >= count:
            raise EvoPressError(
                f"torchrun has started more processes on this machine than it has GPUs, {count}: give --nproc-per-node={count} or "
                "model.device=cpu"
            )
        return torch.device("cuda", number)
    if device == "auto":
        if torch.cuda.is_available() and torch.cuda.device_count() > 1:
            return claim_gpu()
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise EvoPressError(f"device {device!r} is not a device name: use auto, cpu, cuda or cuda:N") from None
    if processes() > 1 and chosen.index is not None:
        raise EvoPressError(
            f"model.device={device} would be shared by {processes()} processes: leave it out, each then takes its own GPU"
        )
    if chosen.type not in ("cpu", "cuda"):
        raise EvoPressError(f"device {device!r} is not supported: use auto, cpu, cuda or cuda:N")
    if chosen.type == "cuda" and (not torch.cuda.is_available() or (chosen.index or 0) >= torch.cuda.device_count()):
        raise EvoPressError(
            f"device {device!r} was asked for but torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices: "
            "use model.device=cpu or model.device=auto, or install a CUDA build of torch"
        )
    return chosen


def find_weights(folder: Path) -> list[Path]:
    """List a checkpoint folder's safetensors files, after checking that the folder can be loaded at all.

    Raises: EvoPressError for a missing folder, a folder without weights, pickled weights, an adapter, or already quantized weights.
    """
    check_folder(folder)
    weights = sorted(folder.glob("*.safetensors"))
    if weights:
        _check_shards(folder, {path.name for path in weights})
        if not readable_quantization(read_config(folder)):
            check_tensors(folder, stored_tensors(loaded_files(folder, weights)))
        return weights
    pickled = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickled:
        raise EvoPressError(
            f"the model in {folder} has only pickled weights ({pickled[0]}), which can run code when loaded: convert them "
            "to safetensors first (load them where you trust them, then save_pretrained(..., safe_serialization=True))"
        )
    raise EvoPressError(f"model path {folder} holds config.json but no weights: expected model.safetensors or its shards")


def check_folder(folder: Path) -> None:
    """Check what a checkpoint's folder tells without its weights.

    Raises: EvoPressError for a missing folder, an adapter, an architecture that is not known, or already quantized weights.
    """
    if not folder.is_dir():
        raise EvoPressError(f"model path {str(folder)!r} is not a folder: give the folder that holds config.json")
    check_adapter(folder)
    config = read_config(folder)
    _check_sizes(folder, config)
    find_family(config)
    check_config(folder, config)


def has_weights(folder: Path) -> bool:
    """Tell whether a folder holds weights of any kind, in all their shards."""
    if (folder / WEIGHTS).exists():
        return True
    if shards := shards_of(folder):
        return all((folder / str(shard)).exists() for shard in shards.values())
    return any(any(folder.glob(pattern)) for pattern in ("*.safetensors", *_PICKLES))


def _check_sizes(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise EvoPressError if a config, or one inside it, asks for more than any model has."""
    for key, most in _MOST.items():
        value = config.get(key)
        each = value if isinstance(value, list) and value else [value]  # Gemma 3n has a width for each block
        if value is not None and not all(type(number) is int and 1 <= number <= most for number in each):
            raise EvoPressError(
                f"{folder / 'config.json'} has {key}={shown(value)}, expected a whole number from 1 to {most}: fetch it again"
            )
    for key, value in config.items():
        if isinstance(value, Mapping):
            _check_sizes(folder, value)
        elif type(value) is int and value > _MOST_OTHERS and re.search(r"layer|experts|block", key):
            raise EvoPressError(f"{folder / 'config.json'} has {key}={value}, expected at most {_MOST_OTHERS}: fetch it again")


def _check_shards(folder: Path, files: set[str]) -> None:
    """Raise EvoPressError if there is no index of shards, or it names other files than those in the checkpoint's own folder."""
    if WEIGHTS in files:
        return
    if not (shards := shards_of(folder)):
        raise EvoPressError(
            f"model path {folder} holds {min(files)}{f' and {len(files) - 1} more' if len(files) > 1 else ''}, expected {WEIGHTS}, "
            f"or shards and {INDEX}, which says what is in each: fetch what is missing"
        )
    for name, shard in shards.items():
        if not isinstance(shard, str) or shard not in files:
            raise EvoPressError(
                f"{folder / INDEX} says that {shown(name)} is in {shown(shard)}, which is no safetensors file of {folder}: fetch "
                "the checkpoint again"
            )


def _check_shapes(folder: Path, config: Mapping[str, Any], stored: Mapping[str, Stored]) -> None:
    """Raise EvoPressError if stored weights have other shapes than the model that a config describes."""
    try:
        model = skeleton(config)
    except EvoPressError:
        return  # told when the model is loaded
    check_shapes(folder, stored, model)


def take_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str) -> Pretrained:
    """Take a model that is loaded already; it is put into evaluation mode, and its parameters ask for no gradients any more.

    Its digest is one over its config and its weights as they are in memory.

    Raises: EvoPressError if its family is not known.
    """
    config = model.config.to_dict()
    family = find_family(config)
    model.eval()
    model.requires_grad_(False)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for key, tensor in model.state_dict().items():
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return Pretrained(model, tokenizer, family, safe_name(name), Path(config.get("_name_or_path") or "."), digest.hexdigest())


def read_config(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's config.json.

    Raises: EvoPressError if it is missing or no JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise EvoPressError(f"model path {folder} has no config.json: give the folder of a Hugging Face checkpoint")
    try:
        config = load_json(path, limit=_MOST_CONFIG_BYTES, what="config.json")
    except EvoPressError as error:
        raise EvoPressError(f"the model's config cannot be read as JSON: {error}; fetch the checkpoint again") from None
    if not isinstance(config, dict):
        raise EvoPressError(f"{path} is not a JSON object: fetch the checkpoint again")
    return config


def fetch_from_hub(
    hub_id: str,
    *,
    revision: str | None,
    weights: bool = True,
    trust_remote_code: bool = False,
) -> Path:
    """Download a checkpoint's config, tokenizer and weights and return the local snapshot folder.

    The small files come first and are checked. Of the weights only those that transformers loads are fetched: `model.safetensors`,
    or the shards of the index, not a second copy in another format or folder.

    Args:
        weights: fetch them; False: the small files alone.
        trust_remote_code: the model's own code, too.

    Raises: EvoPressError if the hub cannot be reached or has no such model, or for an adapter, or if it is already quantized.
    """
    small = ["*.json", "*.model", "*.txt", "*.jinja", *(["*.py"] if trust_remote_code else [])]
    folder = _snapshot(hub_id, revision, small)
    check_folder(folder)
    if not weights:
        return folder
    if _COMMIT.fullmatch(folder.name):  # what a branch names may change in between
        revision = folder.name
    folder = _snapshot(hub_id, revision, [WEIGHTS])
    if not (folder / WEIGHTS).exists() and (shards := shards_of(folder)):
        folder = _snapshot(hub_id, revision, sorted({str(shard) for shard in shards.values()}))
    return folder


def _snapshot(hub_id: str, revision: str | None, patterns: list[str]) -> Path:
    """Download the files of a checkpoint's own folder, not of those below it, that match patterns."""
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=["*/*"],
                etag_timeout=20,
            )
        )
    except Exception as error:  # the hub raises many kinds: network, access, missing repository or revision
        raise EvoPressError(
            f"model {hub_id!r} could not be fetched from the hub ({reason_of(error)}): check the name, your "
            "access and the network, or give a local folder with model=local model.path=DIR"
        ) from None


def digest_model(folder: Path, *, trust_remote_code: bool = False) -> str:
    """Return the digest that level databases know a model by: of weights and config, and of the code beside them if it runs them.

    Raises: EvoPressError as `find_weights` and `read_config`.
    """
    digest = digest_files([*find_weights(folder), folder / "config.json"])
    if not (trust_remote_code and read_config(folder).get("auto_map")):  # transformers' own code
        return digest
    return hashlib.sha256(f"{digest} {digest_files(sorted(folder.glob('*.py')))}".encode()).hexdigest()


def digest_files(paths: list[Path]) -> str:
    """SHA-256 over names and contents of files, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        about = path.stat()
        digest.update(path.name.encode())
        digest.update(_digest_of(path, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns))
    return digest.hexdigest()


@lru_cache(maxsize=4096)
def _digest_of(path: Path, *identity: int) -> bytes:
    """SHA-256 of a file, read once as long as the file system calls it the same: every job of a sweep asks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def load_pretrained(
    folder: Path,
    *,
    name: str | None = None,
    dtype: str = "bfloat16",
    attn_implementation: str | None = None,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> Pretrained:
    """Load a checkpoint folder into host memory, ready for inference.

    Args:
        folder: a Hugging Face checkpoint with safetensors weights.
        dtype: float32, bfloat16 or float16, of all weights.
        attn_implementation: as transformers takes it, or `causal_chunks` for plain attention; None: that where it is faster
            (`attention.suits`), else transformers' choice.
        device: where the model will run; it is loaded into host memory all the same.
        trust_remote_code: run code that comes with the checkpoint; off unless asked for by name.

    Raises: EvoPressError as `find_weights`, and for an unknown dtype.
    """
    if dtype not in DTYPES:
        raise EvoPressError(f"model.dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    folder = folder.expanduser()
    weights = find_weights(folder)
    config = read_config(folder)
    family = find_family(config)
    if quantized := readable_quantization(config):
        logger.warning(
            "model: its weights are stored as %s and dequantized to %s: dense means these, and levels near their bits look better "
            "than they would on weights that were never rounded",
            *(READABLE[quantized["quant_method"]], dtype),
        )
    stored = stored_tensors(loaded_files(folder, weights))
    if not quantized and not (trust_remote_code and config.get("auto_map")):
        _check_shapes(folder, config, stored)
    if attn_implementation is None and family.plain_attention and attention.suits(device, DTYPES[dtype]):
        attn_implementation = attention.NAME
    if attn_implementation == attention.NAME and not family.plain_attention:
        raise EvoPressError(
            f"model.attn_implementation={attention.NAME} does not support {config.get('model_type')} models: leave it out"
        )
    if attn_implementation == attention.NAME:
        attention.register()
    try:
        with with_partial_blocks() if quantized else nullcontext():
            model, found = (wrapper_of(config) or AutoModelForCausalLM).from_pretrained(
                folder,
                dtype=DTYPES[dtype],
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                attn_implementation=attn_implementation,
                output_loading_info=True,
                **(
                    {"quantization_config": AutoQuantizationConfig.from_dict(quantized | {"dequantize": True})} if quantized else {}
                ),
            )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, SafetensorError) as error:
        raise EvoPressError(
            f"the model in {folder} could not be loaded ({first_line(error)}): fetch the checkpoint again, or check "
            "model.attn_implementation"
        ) from error
    absent = sorted(found["missing_keys"])
    homeless = but_masks(sorted(found["unexpected_keys"]), stored)
    if absent:  # transformers would go on with random weights
        instead = f" but hold {homeless[0]}, which has no place in it" if homeless else ""
        raise EvoPressError(
            f"the weights in {folder} lack {absent[0]} and {len(absent) - 1} others of the model in config.json{instead}: fetch "
            "them again"
        )
    if quantized:  # what undid the codes would be done again, the wrong way round, when the model is saved
        vars(model).pop("_weight_conversions", None)
    silent = silently_left_out(stored, homeless, model, family.prefix)
    left_out = check_places(folder, homeless, model.config, family.prefix, silent=silent)
    model.eval()
    model.requires_grad_(False)
    return Pretrained(
        model=model,
        tokenizer=tokenizer,
        family=family,
        name=safe_name(name or os.path.basename(os.path.abspath(folder))),
        folder=folder,
        digest=digest_model(folder, trust_remote_code=trust_remote_code),
        left_out=left_out,
    )
