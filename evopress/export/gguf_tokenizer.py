"""A tokenizer as llama.cpp takes it out of a GGUF file: tokens, their types, merges or scores, special ones, chat template.

llama.cpp knows by a name (`tokenizer.ggml.pre`) how a byte-level tokenizer splits text before it merges. Its converter finds the
name by the digest of an encoded text, which differs with every vocabulary; here it is found by what the tokenizer says it does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from evopress.errors import EvoPressError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of tokens (`gguf.TokenType`)."""
_START, _END = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|", r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_OF_PATTERN = {
    rf"{_START}\p{{N}}{{1,3}}{_END}": "llama-bpe",
    rf"{_START}\p{{N}}{_END}": "qwen2",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}
"""The names of regular expressions that split text, each part to be merged by itself."""


def add_tokenizer(writer: Any, tokenizer: Any, *, vocabulary: int, pre: str | None = None) -> None:
    """Put a tokenizer into a file's metadata.

    Args:
        writer: a `gguf.GGUFWriter`.
        tokenizer: of transformers, a fast one.
        vocabulary: rows of the embedding; tokens that the tokenizer has not are unused ones.
        pre: llama.cpp's name for how text is split; None: by what the tokenizer says.

    Raises: EvoPressError if llama.cpp has no such tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise EvoPressError(
            f"export=[gguf] cannot hold a {type(tokenizer).__name__}, which has no tokenizer.json: convert it to a fast one first"
        )
    data = json.loads(backend.to_str())
    model = data["model"]
    if model["type"] != "BPE":
        raise EvoPressError(f"export=[gguf] cannot hold a {model['type']} tokenizer, only BPE: use another format")
    byte_level = any(step["type"] == "ByteLevel" for step in (*_steps(data["pre_tokenizer"]), *_steps(data["decoder"])))
    writer.add_tokenizer_model("gpt2" if byte_level else "llama")
    writer.add_tokenizer_pre(pre or (split_name(_steps(data["pre_tokenizer"])) if byte_level else "default"))
    tokens, types = _tokens(model, data["added_tokens"], vocabulary)
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ", 1)) for merge in model["merges"]]
    writer.add_token_list(tokens)
    if byte_level:
        writer.add_token_types(types)
        # llama.cpp wants merges, and GGUF no empty list: one of what is never met. A space inside a half would end it.
        merges = merges or [("[none]", "[none]")]
        writer.add_token_merges([" ".join(part.replace(" ", "Ġ") for part in merge) for merge in merges])
    else:
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_token_types(types)
        writer.add_add_space_prefix(_adds_space(data))
    for name in ("bos", "eos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{name}_token_id", None)) is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    encoded = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and encoded[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and encoded[-1] == tokenizer.eos_token_id)
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


def split_name(steps: Sequence[Mapping[str, Any]]) -> str:
    """Return llama.cpp's name for the steps by which a byte-level tokenizer splits text.

    Raises: EvoPressError if it has none.
    """
    kinds = [step["type"] for step in steps]
    last = steps[-1] if steps else {}
    if kinds and kinds[-1] == "ByteLevel" and not last.get("add_prefix_space"):
        if kinds == ["ByteLevel"] and last.get("use_regex", True):
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and last.get("use_regex", True):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True) and steps[0]["behavior"] == "Isolated":
            pattern = steps[0]["pattern"].get("Regex", "")
            if not steps[0].get("invert") and pattern in _OF_PATTERN:
                return _OF_PATTERN[pattern]
    raise EvoPressError(
        f"export=[gguf] does not know llama.cpp's name for this pre-tokenizer ({' and '.join(kinds) or 'no rule'}): give it, such "
        "as '+export_options.gguf.pre_tokenizer=llama-bpe' (all names: llama-vocab.cpp)"
    )


def _steps(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """Return the steps of a part of a tokenizer, which may be one, a sequence or missing."""
    if part is None:
        return []
    inner = next((part[key] for key in ("pretokenizers", "decoders", "normalizers") if key in part), None)
    return [part] if inner is None else [step for each in inner for step in _steps(each)]


def _tokens(model: Mapping[str, Any], added: Sequence[Mapping[str, Any]], vocabulary: int) -> tuple[list[str], list[int]]:
    """Return every token of the embedding's rows, and its type."""
    tokens = [f"[PAD{index}]" for index in range(vocabulary)]
    types = [UNUSED] * vocabulary
    for token, index, kind in _known(model, added):
        if index >= vocabulary:
            raise EvoPressError(
                f"export=[gguf] cannot hold token {index} ({token!r}) of the tokenizer, since the embedding has {vocabulary} rows: "
                "use the tokenizer that the model was trained with"
            )
        tokens[index], types[index] = token, kind
    return tokens, types


def _known(model: Mapping[str, Any], added: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, int, int]]:
    for token, index in model["vocab"].items():
        is_byte = bool(model.get("byte_fallback")) and len(token) == 6 and token.startswith("<0x")
        yield token, index, BYTE if is_byte else UNKNOWN if token == model.get("unk_token") else NORMAL
    for token in added:  # after the vocabulary, which may have them too
        kind = UNKNOWN if token["content"] == model.get("unk_token") else CONTROL if token["special"] else USER_DEFINED
        yield token["content"], token["id"], kind


def _scores(tokens: Sequence[str], merges: Sequence[Sequence[str]]) -> list[float]:
    """Return what llama.cpp merges by where merges are of characters: the greatest first, which the earliest merge has."""
    rank: dict[str, int] = {}
    for index, merge in enumerate(merges):
        rank.setdefault("".join(merge), index)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _adds_space(data: Mapping[str, Any]) -> bool:
    """Tell whether a text is given a space before it."""
    prepends = any(step["type"] == "Prepend" for step in _steps(data["normalizer"]))
    spaces = [step for step in _steps(data["pre_tokenizer"]) if step["type"] == "Metaspace"]
    return prepends or any(step.get("prepend_scheme", "always") != "never" for step in spaces)
