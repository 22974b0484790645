"""Text to token sequences: documents joined, the stream cut into equal parts, and kept in a cache."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evopress.data.sources import Split, TextSource, streams_of
from evopress.data.special_tokens import leading_ids
from evopress.errors import EvoPressError
from evopress.files import canonical_json, is_read_only, write_atomically
from evopress.json_files import clip, parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

END_OF_TEXT = "eos"
"""Separator that stands for the tokenizer's own end-of-text token."""
LONGEST_PART = 2**18
"""Characters that are tokenised at once: a tokenizer takes hundreds of bytes of memory for each."""
_BETWEEN_WORDS = re.compile(r"(.*[^\W\d_])(?= [^\W\d_])", re.DOTALL)
_BEFORE_SPACE = re.compile(r".*\S(?=\s)", re.DOTALL)
_SCHEMA = 1
_ABANDONED = 3600.0
"""Seconds after which nobody is still at work on a file."""


def token_sequences(
    source: TextSource,
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    num_tokens: int,
    cache_dir: Path | str | None = None,
    separator: str | None = END_OF_TEXT,
    bos: str = "auto",
    or_all: bool = False,
) -> Tensor:
    """Return the first tokens of a split as sequences of equal length that do not overlap.

    Documents are tokenised without special tokens and joined by the separator; the stream is cut into sequences, each of which
    begins with what the tokenizer puts before a text, if anything, and is `sequence_length` tokens long with it. The source is
    read no further than needed. Differs from the authors' code in the separator and in documents that run on from one sequence
    to the next.

    Args:
        sequence_length: tokens per sequence L, at least 2.
        num_tokens: tokens asked for; what does not fill a sequence is left out.
        cache_dir: folder that keeps the sequences from run to run; None keeps nothing.
        separator: token between documents; "eos" is the tokenizer's end-of-text token (none if it has none).
        bos: what sequences begin with, as `leading_ids` takes it.
        or_all: take a text that is shorter as a whole, as far as it fills sequences.

    Returns: int64 [num_tokens // L, L], or fewer of a shorter text.
    Raises: EvoPressError if the text is too short, the numbers do not fit or the separator is no single token.
    """
    if sequence_length < 2:
        raise EvoPressError(f"sequence_length is {sequence_length}: give at least 2, one token to read and one to predict")
    if num_tokens < sequence_length:
        raise EvoPressError(
            f"{num_tokens} {split} tokens do not fill one sequence of {sequence_length}: "
            "ask for more tokens or shorten the sequences"
        )
    separator_id, leading = _separator_id(tokenizer, separator), leading_ids(tokenizer, bos)
    if sequence_length <= len(leading):
        raise EvoPressError(f"sequence_length is {sequence_length}, which the tokenizer's own first tokens fill: raise it")
    shape, left_out = (num_tokens // sequence_length, sequence_length), Counter[str]()

    def read() -> Tensor:
        with _told_of(source):
            return _read_sequences(
                source, split, tokenizer, shape, separator_id=separator_id, leading=leading, left_out=left_out, or_all=or_all
            )

    if cache_dir is None:
        return read()

    with _told_of(source):
        identity = source.identity()
        canonical_json(identity)
    recipe = {
        "schema": _SCHEMA,
        "source": identity,
        "split": split,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "separator": separator_id,
        "sequence_length": sequence_length,
        "num_tokens": num_tokens,
    }
    if leading:
        recipe["leading"] = list(leading)
    key = hashlib.sha256(canonical_json(recipe).encode()).hexdigest()
    path = Path(cache_dir).expanduser() / f"{source.name}-{split}-{key[:24]}.safetensors"
    sequences = _load(path, key=key, shape=shape, left_out=left_out, or_all=or_all)
    if sequences is None:
        sequences = read()
        _save(path, sequences, key=key, recipe=recipe, left_out=left_out)
    _tell(left_out, split, source)
    return sequences


def _tell(left_out: Mapping[str, int], split: Split, source: TextSource) -> None:
    """Say what was left out of a text."""
    words = {"repeated": "documents or paragraphs that another split has or that repeat", "null": "rows without text"}
    for key, what in words.items():
        if left_out.get(key):
            log.info("%s text (%s): %d %s were set aside", split, source.name, left_out[key], what)


def tokens_digest(sequences: Tensor) -> str:
    """Return the SHA-256 of sequences, int64 [N, L]: what a level database built from them depends on."""
    shape = "x".join(map(str, sequences.shape))
    return hashlib.sha256(shape.encode() + b":" + sequences.contiguous().numpy().tobytes()).hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of what decides a tokenizer's output, without the state that calls leave on it."""
    if tokenizer.is_fast:
        description = json.loads(tokenizer.backend_tokenizer.to_str())
        for state in ("truncation", "padding"):
            description.pop(state, None)
    else:
        description = {"class": type(tokenizer).__name__, "vocabulary": sorted(tokenizer.get_vocab().items())}
    if getattr(tokenizer, "split_special_tokens", False):
        description["split_special_tokens"] = True
    return hashlib.sha256(canonical_json(description).encode()).hexdigest()


def _separator_id(tokenizer: PreTrainedTokenizerBase, separator: str | None) -> int | None:
    if separator is None:
        return None
    if separator == END_OF_TEXT:
        return tokenizer.eos_token_id
    vocabulary = tokenizer.get_vocab()
    if separator not in vocabulary:
        raise EvoPressError(
            f"the separator {separator!r} is no token of this tokenizer: "
            f"choose one of its tokens, or {END_OF_TEXT!r} for its end-of-text token ({tokenizer.eos_token!r})"
        )
    return vocabulary[separator]


def _read_sequences(
    source: TextSource,
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    shape: tuple[int, int],
    *,
    separator_id: int | None,
    leading: tuple[int, ...],
    left_out: Counter[str],
    or_all: bool,
) -> Tensor:
    num_sequences, length = shape
    taken = length - len(leading)  # of the text, for each sequence
    needed = num_sequences * taken
    stream = array("q")
    for document in _documents_ids(streams_of(source, split, left_out), tokenizer):
        if stream and separator_id is not None:
            stream.append(separator_id)
        for ids in document:
            stream.extend(ids)
            if len(stream) >= needed:
                return _in_sequences(stream, shape, leading)
    if or_all and (count := len(stream) // taken):
        return _in_sequences(stream, (count, length), leading)
    at_most = len(stream) // taken * length if leading else len(stream)
    beside = f", {len(leading)} of each put there by the tokenizer" if leading else ""
    fewer = f"ask for at most {at_most} {split} tokens or " if at_most >= length else ""
    raise EvoPressError(
        f"the {split} split of {source.name} has {len(stream)} tokens but {needed} are needed "
        f"({num_sequences} sequences of {length}{beside}): {fewer}give more text"
    )


def _in_sequences(stream: array[int], shape: tuple[int, int], leading: tuple[int, ...]) -> Tensor:
    """Cut a stream's first ids into sequences, int64 [N, L], each of which begins with the leading ones."""
    num_sequences, length = shape
    taken = length - len(leading)
    text = torch.tensor(stream[: num_sequences * taken], dtype=torch.int64).view(num_sequences, taken)
    if not leading:
        return text
    return torch.cat([torch.tensor(leading, dtype=torch.int64).expand(num_sequences, -1), text], dim=1)


def sequences_of(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    separator: str | None = END_OF_TEXT,
    bos: str = "auto",
) -> Tensor:
    """Return all the sequences that documents fill, int64 [N, L]; otherwise as `token_sequences`.

    Raises: EvoPressError if they fill none.
    """
    separator_id, leading = _separator_id(tokenizer, separator), leading_ids(tokenizer, bos)
    stream = array("q")
    for document in _documents_ids(((text,) for text in texts), tokenizer):
        if stream and separator_id is not None:
            stream.append(separator_id)
        for ids in document:
            stream.extend(ids)
    count = len(stream) // max(sequence_length - len(leading), 1)
    if not count:
        raise EvoPressError(
            f"the text has {len(stream)} tokens, which fill no sequence of {sequence_length}: give more text or shorter sequences"
        )
    return _in_sequences(stream, (count, sequence_length), leading)


@contextmanager
def _told_of(source: TextSource) -> Iterator[None]:
    """Turn what a text source of a package's may raise into one sentence: a file that is not there, what is no text or no JSON."""
    try:
        yield
    except (OSError, TypeError, ValueError) as error:
        if type(source).__module__.startswith("evopress."):
            raise
        reason = clip(str(error) or type(error).__name__).rstrip(". ")
        raise EvoPressError(
            f"the text source {source.name} cannot be read ({type(error).__name__}: {reason}): check data.options, that it yields "
            "text, and that its identity is JSON-able"
        ) from error


def _documents_ids(streams: Iterator[Iterable[str]], tokenizer: PreTrainedTokenizerBase) -> Iterator[Iterator[list[int]]]:
    """Yield the ids of each document that has any text, in pieces."""
    for pieces in streams:
        parts = _cut(pieces, tokenizer)
        first = next(parts, "")
        if first:
            yield (_ids(part, tokenizer) for part in chain((first,), parts))


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # Not verbose: whole documents are longer than the model's context on purpose.
    ids: list[int] = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    return ids


def _cut(pieces: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Cut a document into parts that a tokenizer takes in little memory; one of up to `LONGEST_PART` characters stays whole.

    A cut is between two words of letters that one space separates, where no tokenizer has a token on both sides of it: so the
    ids are those of the whole document. Where there is no such place it is at other white space, or anywhere.
    """
    rest = ""
    for piece in pieces:
        rest += piece
        start = 0
        while len(rest) - start > LONGEST_PART:
            window = rest[start : start + LONGEST_PART]
            if between_words := _BETWEEN_WORDS.match(window):
                end, dropped = between_words.end(1), int(_puts_space_itself(tokenizer))
            else:
                before_space = _BEFORE_SPACE.match(window)
                end, dropped = before_space.end() if before_space else len(window), 0
            yield window[:end]
            start += end + dropped
        rest = rest[start:]
    if rest:
        yield rest


def _puts_space_itself(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether the tokenizer treats the start of a text as if a space stood there (Llama 2, Mistral)."""
    whole, first = _ids("first second", tokenizer), _ids("first", tokenizer)
    return first + _ids(" second", tokenizer) != whole and first + _ids("second", tokenizer) == whole


def _load(path: Path, *, key: str, shape: tuple[int, int], left_out: Counter[str], or_all: bool) -> Tensor | None:
    """Return the sequences in a cache file, and add what was left out; None if there is none, or it is damaged, which is logged."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            about = parse_json((file.metadata() or {}).get("evopress", "{}").encode(), f"the header of {path}")
            sequences = file.get_tensor("sequences")
        if not isinstance(about, dict) or about.get("key") != key:
            fault = "it was made for other settings"
        elif sequences.dtype != torch.int64 or not _has_shape(sequences, shape, or_all=or_all):
            fault = f"it holds {sequences.dtype} {list(sequences.shape)}, not {torch.int64} {list(shape)}"
        elif about.get("sha256") != tokens_digest(sequences):
            fault = "its digest does not fit its tokens"
        else:
            left_out.update(about.get("left_out", {}))
            return sequences
    except (EvoPressError, SafetensorError, OSError, ValueError) as error:
        fault = str(error)
    log.warning("the token cache %s is damaged (%s): it is made again", path, fault)
    return None


def _has_shape(sequences: Tensor, shape: tuple[int, int], *, or_all: bool) -> bool:
    """Tell whether sequences are as many of a length as were asked for, or all that there are."""
    return tuple(sequences.shape) == shape or (or_all and sequences.shape[1:] == shape[1:] and 0 < len(sequences) < shape[0])


def _save(path: Path, sequences: Tensor, *, key: str, recipe: dict[str, Any], left_out: Counter[str]) -> None:
    from safetensors.torch import save

    about = {"key": key, "sha256": tokens_digest(sequences), "recipe": recipe}
    if left_out := +left_out:
        about["left_out"] = dict(left_out)
    # One entry, because safetensors writes several in no fixed order.
    content = save({"sequences": sequences}, metadata={"evopress": canonical_json(about)})

    def write(temporary: Path) -> None:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)

    try:
        write_atomically(path, write)
    except EvoPressError as error:
        if not is_read_only(error):
            raise
        log.info("the tokens are not kept: %s", error)
        return
    for left in path.parent.glob(f".{path.name}.*.tmp"):  # by a run that was killed; another one may be about to rename its own
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED:
                left.unlink()
