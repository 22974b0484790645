"""Take a model that transformers has loaded, or the folder or hub id of one, for the other functions of the library."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import wraps
from inspect import signature
from os import PathLike
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evopress.data.special_tokens import check_embedded
from evopress.data.tokens import END_OF_TEXT, sequences_of
from evopress.errors import EvoPressError
from evopress.files import given_path, open_folder
from evopress.library.given import checked
from evopress.machine import exactly
from evopress.models.alone import lock_of
from evopress.models.loading import DTYPES, pick_device, take_model
from evopress.models.opening import ModelSource, greatest_group, longest_sequence, pick_dtype
from evopress.resources import check_model
from evopress.settings import AUTO, ModelSettings

BUILTIN = ("smollm2_135m", "tiny")
_SAMPLED = 256
"""Numbers of each tensor that tell whether it has changed."""
SEPARATORS = {"smollm2_135m": "<|endoftext|>"}
"""As the models' configs have them."""
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Text = Sequence[str] | Tensor
"""Documents, or token ids int64 [N, L], which are taken as they are."""


@dataclass(frozen=True)
class Model:
    """A model with its tokenizer, and how it is to be read."""

    source: ModelSource
    settings: ModelSettings
    sample: str | None = field(default=None, repr=False)
    """Digest of some of a loaded model's weights, which tells whether they are what they were; None: it is loaded here."""

    def check(self) -> None:
        """Put it into evaluation mode, which a trainer may have ended.

        Raises: EvoPressError if a model that was given has been changed since, or cast: what is kept of it would not fit.
        """
        if self.source.is_loaded:
            self.source.pretrained.model.eval()
        if self.sample is not None and self.sample != _sample(self.source.pretrained.model):
            raise EvoPressError("the model's weights have changed since load_model: call load_model and build_levels again")

    @property
    def lock(self) -> Any:
        """Held by whoever works with the network, which every `Model` of it shares."""
        return lock_of(self.source if self.sample is None else self.source.pretrained.model)

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model."""
        with self.lock:
            network = self.source.pretrained.model
            lock_of(network, same_as=self.source)
            return network

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        return self.source.tokenizer

    def sequences(self, text: Text) -> Tensor:
        """Return text as token ids int64 [N, L], all sequences that it fills.

        Raises: EvoPressError if it fills none, or has a token that the model lacks.
        """
        settings = self.settings
        if isinstance(text, str):
            raise EvoPressError("the text is one string: give a list of documents, or token ids")
        if isinstance(text, Mapping) or not isinstance(text, Iterable):
            raise EvoPressError(f"the text is a {type(text).__name__}: give a list of documents, or token ids")
        if isinstance(text, Tensor):
            if text.is_meta or text.layout != torch.strided:
                raise EvoPressError(
                    f"the token ids are on {text.device}, {text.layout}: give a plain tensor in memory, int64 [sequences, tokens]"
                )
            if text.dim() != 2 or text.dtype != torch.int64 or not len(text) or text.shape[1] < 2:
                raise EvoPressError(
                    f"the token ids are {text.dtype} {list(text.shape)}: give int64 [sequences, tokens], at least 2 tokens each"
                )
            if (least := int(text.min())) < 0:
                raise EvoPressError(f"the token ids have {least}: give ids of the model's tokenizer, 0 or more")
            sequences = text.cpu()
        else:
            documents = list(text)
            if other := next((type(each).__name__ for each in documents if not isinstance(each, str)), None):
                raise EvoPressError(
                    f"the text has a {other} among its documents: give strings, or token ids, one int64 tensor [sequences, tokens]"
                )
            if any("\ud800" <= letter <= "\udfff" for document in documents for letter in set(document)):
                raise EvoPressError("the text has an unpaired surrogate: fix the document or leave it out")
            sequences = sequences_of(
                documents,
                self.tokenizer,
                sequence_length=settings.sequence_length,
                separator=settings.separator,
                bos=settings.bos,
            )
        self.source.check(length=sequences.shape[1])
        if (rows := self.source.embedding_rows) is not None:
            check_embedded(sequences, self.tokenizer, num_rows=rows, what="the text", separator=settings.separator)
        return sequences


def alone(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let a function that works with a network compute exactly, and wait until no other thread works with that network."""
    (first, *_) = signature(function).parameters

    @wraps(function)
    def alone(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        given: Any = args[0] if args else kwargs.get(first)
        model = given if isinstance(given, Model) else getattr(given, "model", None)  # of levels, theirs
        with model.lock if isinstance(model, Model) else nullcontext(), exactly():
            return function(*args, **kwargs)

    return alone


def load_model(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dtype: str = AUTO,
    device: str = AUTO,
    sequence_length: int | str = AUTO,
    separator: str | None = END_OF_TEXT,
    bos: str = AUTO,
    offload: bool = False,
    cache: str | Path = "~/.cache/evopress",
) -> Model:
    """Take a model: one that transformers has loaded, or the folder or hub id of one.

    A loaded model stays where it is, in its dtype. It is put into evaluation mode, and its parameters ask for no gradients any
    more. What a search or an evaluation changes in it is taken back.

    Args:
        model: the model, a folder, a hub id, or "smollm2_135m".
        tokenizer: of a loaded model.
        dtype: of a model that is loaded here: float32, bfloat16 or float16; auto: bfloat16 where the machine multiplies it.
        device: auto, cpu, cuda or cuda:N, for a model that is loaded here.
        sequence_length: tokens per sequence of text; auto: 4096, or as many as the model has positions for.
        separator: token between documents; "eos": the tokenizer's end of text, for "smollm2_135m" the one that it was trained
            with, as in a run; None: nothing.
        bos: what sequences begin with: auto: what the tokenizer puts before a text; true, false.
        offload: keep blocks in host memory and move one at a time to the device.
        cache: folder for models that are converted.

    Raises: EvoPressError if there is no such model, no blocks of linear layers are found in it, or it brings what is given beside
        it.
    """
    given: dict[str, Any] = {"separator": separator, "offload": offload, "sequence_length": sequence_length}
    given = {**checked(ModelSettings, {**given, "dtype": dtype}, what="load_model"), "bos": bos}
    del given["dtype"]
    _refuse_other_models(model)
    if isinstance(model, PreTrainedModel):
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise EvoPressError("the model has no tokenizer: give load_model(model, tokenizer)")
        if any(parameter.is_meta for parameter in model.parameters()):
            raise EvoPressError("the model has weights without memory (on the device meta): load it whole, or give its folder")
        names = {value: key for key, value in DTYPES.items()}
        if model.dtype not in names:
            raise EvoPressError(f"the model is {model.dtype}: load it as one of {', '.join(DTYPES)}")
        if dtype not in (AUTO, names[model.dtype]) or str(device) not in (AUTO, model.device.type, str(model.device)):
            raise EvoPressError(
                f"dtype={dtype} and device={device} apply to a model that is loaded by name or path, but this one is already "
                f"{names[model.dtype]} on {model.device}: leave them out, or convert it yourself"
            )
        with lock_of(model):
            pretrained = take_model(model, tokenizer, name=str(model.config.name_or_path or model.config.model_type))
        settings = ModelSettings(**given, dtype=names[model.dtype], device=str(model.device), group_size=None)
        source = ModelSource.of(pretrained, settings)
    else:
        if tokenizer is not None:
            raise EvoPressError("a tokenizer is given beside the name of a model, whose own is loaded: leave it out, or load both")
        where: dict[str, Any] = (
            {"builtin": str(model)} if str(model) in BUILTIN and not Path(model).exists() else {"path": str(model)}
        )
        if "builtin" in where and separator == END_OF_TEXT:
            given["separator"] = SEPARATORS.get(str(model), separator)
            open_folder(given_path(cache, "cache"))
        device = str(pick_device(str(device)))
        dtype = pick_dtype(dtype, torch.device(device))
        settings = ModelSettings(**given, **where, dtype=dtype, device=device, group_size=None)
        source = ModelSource(
            settings,
            cache=given_path(cache, "cache"),
            device=torch.device(device),
            dtype=dtype,
            may_load=lambda size: check_model(size, torch.device(device), offload=settings.offload),
        )
    if settings.sequence_length == AUTO:
        settings = replace(settings, sequence_length=longest_sequence(source.config))
    settings.group_size = greatest_group(shape[1] for shape in (source.linear_shapes() or {}).values())
    return Model(source, settings, _sample(model) if isinstance(model, PreTrainedModel) else None)


def _sample(model: PreTrainedModel) -> str:
    """Return a digest of dtypes, shapes and a few numbers of every tensor: much faster than one of all."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(flat.numel() // _SAMPLED, 1)].contiguous().cpu()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(some.view(torch.uint8).numpy().tobytes() if some.numel() else b"")
    return digest.hexdigest()


def _refuse_other_models(model: Any) -> None:
    """Raise EvoPressError unless a model is one of transformers' that computes logits, as it is, or what names one."""
    if isinstance(model, str | PathLike):
        return
    kind = type(model).__name__
    inside = {
        "merge_and_unload": "what the PeftModel's merge_and_unload() returns",
        "_orig_mod": "its _orig_mod",
        "module": "its module",
        "model": "its model",
    }
    if not isinstance(model, PreTrainedModel):
        found = next((inside[name] for name in inside if getattr(model, name, None) is not None), None)
        raise EvoPressError(f"the model is a {kind}: give {found or 'a model of transformers, a folder or a hub id'}")
    if found := next((name for name, each in model.named_modules() if type(each).__module__.startswith("peft.")), None):
        raise EvoPressError(f"the model contains a peft adapter, {found}: give {inside['merge_and_unload']}")
    if model.get_output_embeddings() is None:
        raise EvoPressError(f"the model is a {kind}, which has no head over tokens: load it with AutoModelForCausalLM")
