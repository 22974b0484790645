"""What is measured: a model, run block by block, and the text it reads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from evopress.errors import EvoPressError
from evopress.models import attention
from evopress.models.blocks import BlockModel
from evopress.models.families import family_of
from evopress.models.loading import DTYPES, load_pretrained, pick_device
from experiments.benchmark.sizes import Shape, Size

_SEPARATOR = "<|endoftext|>"
"""Of the default model's documents, as in conf/model/smollm2_135m.yaml."""


class Subject:
    """A model and its text."""

    def __init__(self, blocks: BlockModel, *, sequence_length: int, seed: int, tokenizer: Any = None, cache: Path | None = None):
        """Args: tokenizer, cache: of a model that reads real text; None: tokens are made up."""
        self.blocks = blocks
        self.sequence_length = sequence_length
        self._seed = seed
        self._tokenizer, self._cache = tokenizer, cache

    def tokens(self, split: Any, count: int) -> Tensor:
        """Return whole sequences, int64 [N, L], of at least one and about `count` tokens.

        Args: split: calibration or search.
        """
        length = self.sequence_length
        count = max(count, length)
        if self._tokenizer is None:
            vocabulary = self.blocks.head().weight.shape[0]
            generator = torch.Generator().manual_seed(self._seed + len(split))
            return torch.randint(vocabulary, (count // length, length), generator=generator)
        from evopress.data.python_docs import PythonDocs
        from evopress.data.tokens import token_sequences

        return token_sequences(
            PythonDocs(),
            split,
            self._tokenizer,
            sequence_length=length,
            num_tokens=count,
            cache_dir=None if self._cache is None else self._cache / "tokens",
            separator=_SEPARATOR,
        )

    @contextmanager
    def first_blocks(self, count: int) -> Iterator[BlockModel]:
        """Hold a model of the first `count` blocks alone; weights are the whole model's."""
        blocks = self.blocks
        layers: Any = blocks.decoder.get_submodule(blocks.family.blocks)
        setattr(blocks.decoder, blocks.family.blocks, nn.ModuleList(list(layers)[:count]))
        try:
            yield BlockModel(blocks.model, blocks.family, device=blocks.device, offload=blocks.offload)
        finally:
            setattr(blocks.decoder, blocks.family.blocks, layers)


def load_subject(size: Size, *, seed: int = 0) -> Subject:
    """Load or make the model of a size.

    Raises: EvoPressError if its device is not there, or the model cannot be had.
    """
    device = pick_device(size.device)
    if size.model == "synthetic":
        assert size.shape is not None, f"size {size.name} has no shape"
        blocks = make_blocks(size.shape, dtype=size.dtype, device=device, seed=seed)
        return Subject(blocks, sequence_length=size.sequence_length, seed=seed)
    if size.model != "smollm2_135m":
        raise EvoPressError(f"size {size.name} names model {size.model!r}: expected smollm2_135m or synthetic")
    from evopress.models.smollm2 import ensure_smollm2

    cache = Path(os.environ.get("EVOPRESS_CACHE") or "~/.cache/evopress").expanduser()
    pretrained = load_pretrained(ensure_smollm2(cache), dtype=size.dtype, device=device)
    blocks = BlockModel(pretrained.model, pretrained.family, device=device)
    return Subject(blocks, sequence_length=size.sequence_length, seed=seed, tokenizer=pretrained.tokenizer, cache=cache)


def make_blocks(shape: Shape, *, dtype: str, device: torch.device, seed: int = 0) -> BlockModel:
    """Make a random Llama on a device; torch's global generators are left as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        with device:
            model = _random_llama(shape, shape.num_blocks, dtype, device)
    return BlockModel(model, family_of("llama"), device=device)


def make_streamed_blocks(shape: Shape, *, dtype: str, device: torch.device, seed: int = 0) -> BlockModel:
    """Make a random Llama in host memory whose blocks all have the first one's weights, to be streamed to a device block by block.

    Host memory holds one block; as many bytes go to the device as for different ones.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _random_llama(shape, 1, dtype, device)
    family = family_of("llama")
    decoder, config = model.get_submodule(family.decoder), model.config
    layers: Any = decoder.get_submodule(family.blocks)
    first = layers[0]
    config.num_hidden_layers = shape.num_blocks
    for index in range(1, shape.num_blocks):
        with torch.device("meta"):
            block = type(first)(config, index)
        for name, parameter in first.named_parameters():
            module, _, own = name.rpartition(".")
            # A parameter of its own, so that moving one block moves no other; the memory behind it is the first one's.
            setattr(block.get_submodule(module), own, nn.Parameter(parameter.data, requires_grad=False))
        layers.append(block.eval())
    return BlockModel(model, family, device=device, offload=True)


def _random_llama(shape: Shape, num_blocks: int, dtype: str, device: torch.device) -> Any:
    config = CONFIG_MAPPING["llama"](
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=num_blocks,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim or shape.hidden_size // shape.num_heads,
        max_position_embeddings=131072,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    own = {"attn_implementation": attention.register()} if device.type == "cpu" else {}
    model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype], **own)
    for parameter in model.parameters():
        if parameter.ndim == 2:  # so that activations keep their size, and levels differ in more than rounding
            parameter.data.normal_(std=parameter.shape[1] ** -0.5)
    model.eval()
    model.requires_grad_(False)
    return model
