"""Tiny models with random weights, one per family, and a byte tokenizer: made on the spot, for tests and first steps."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 257  # 256 bytes and the end of text


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte and an end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {END_OF_TEXT: 0} | {letter: i + 1 for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, model_max_length=512)


def tiny_config(model_type: str = "llama", *, num_blocks: int = 2, tied: bool = False) -> PretrainedConfig:
    """Return the configuration of a model of a family with width 32 and two heads of 16, one of keys and values.

    Args: tied: let embedding and head be one weight; those of OPT and Gemma always are.
    """
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": num_blocks,
        "num_attention_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    if model_type == "opt":
        return CONFIG_MAPPING["opt"](**common, ffn_dim=64, word_embed_proj_dim=32)
    grouped = {"intermediate_size": 64, "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": tied}
    if model_type.startswith("gemma"):
        grouped |= {"sliding_window": 16, "tie_word_embeddings": True}
    return CONFIG_MAPPING[model_type](**common, **grouped)


def make_tiny(folder: Path, model_type: str = "llama", *, num_blocks: int = 2, seed: int = 0, tied: bool = False) -> Path:
    """Write the checkpoint of a tiny random model to `folder`, complete or not at all, and return the folder.

    The weights depend on the arguments alone; torch's global generator is left as it was.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(tiny_config(model_type, num_blocks=num_blocks, tied=tied), dtype=torch.float32)
            for parameter in model.parameters():  # larger than usual, so that levels differ in more than rounding
                if parameter.ndim == 2:
                    parameter.data.normal_(std=0.15)
        made = scratch / folder.name
        made.mkdir()  # in the scratch folder, which is its owner's alone
        model.save_pretrained(made)
        byte_tokenizer().save_pretrained(made)
        for path in made.iterdir():
            path.chmod(made.stat().st_mode & 0o666)  # safetensors writes for the owner alone
        if not folder.exists():
            try:
                made.rename(folder)
            except OSError:  # another process was first
                if not (folder / "config.json").is_file():
                    raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def ensure_tiny(cache: Path) -> Path:
    """Return the folder of the tiny Llama in a cache, making it once."""
    folder = cache / "models" / "tiny-llama"
    return folder if (folder / "config.json").is_file() else make_tiny(folder)
