"""What sequences begin with, and ids that an embedding lacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers.processors import TemplateProcessing

from evopress.data.special_tokens import check_embedded, ids_beyond, leading_ids
from evopress.data.tokens import token_sequences
from evopress.errors import EvoPressError
from evopress.models.tiny import END_OF_TEXT, byte_tokenizer

BOS = "Ā"  # the letter of byte 0, which no text has


def tokenizer_with(before: tuple[str, ...] = (BOS,), after: tuple[str, ...] = (), *, bos: str | None = BOS) -> Any:
    """Return the byte tokenizer with tokens that it puts before and after a text."""
    tokenizer = byte_tokenizer()
    if bos:
        tokenizer.add_special_tokens({"bos_token": bos})
    template = " ".join([*before, "$A", *after])
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in {*before, *after}]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=ids)
    return tokenizer


class Source:
    name = "memory"

    def __init__(self, *documents: str) -> None:
        self.texts = documents

    def documents(self, split: str) -> Any:
        yield from self.texts

    def identity(self) -> dict[str, Any]:
        return {"texts": list(self.texts)}


def get(tokenizer: Any, *documents: str, **settings: Any) -> torch.Tensor:
    return token_sequences(
        Source(*documents), "search", tokenizer, **({"sequence_length": 4, "num_tokens": 12, "separator": None} | settings)
    )


@pytest.mark.parametrize(
    ("tokenizer", "rule", "expected"),
    [
        (byte_tokenizer(), "auto", []),
        (tokenizer_with(()), "auto", []),
        (tokenizer_with(()), "true", [BOS]),
        (tokenizer_with(), "auto", [BOS]),
        (tokenizer_with(), "true", [BOS]),
        (tokenizer_with(), "false", []),
        (tokenizer_with(after=(END_OF_TEXT,)), "auto", [BOS]),
        (tokenizer_with((), (END_OF_TEXT,)), "auto", []),
        (tokenizer_with((END_OF_TEXT, BOS)), "auto", [END_OF_TEXT, BOS]),
    ],
)
def test_what_the_tokenizer_puts_before_a_text(tokenizer: Any, rule: str, expected: list[str]) -> None:
    assert list(leading_ids(tokenizer, rule)) == tokenizer.convert_tokens_to_ids(expected)


def test_a_tokenizer_without_bos_cannot_be_asked_for_one() -> None:
    with pytest.raises(EvoPressError, match=r"model\.bos=true but this tokenizer has no"):
        leading_ids(byte_tokenizer(), "true")


@pytest.mark.parametrize("rule", ["auto", "true"])
def test_sequences_begin_with_it_and_stay_as_long_as_asked(rule: str) -> None:
    tokenizer = tokenizer_with()
    text = tokenizer("abcdefghi", add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    sequences = get(tokenizer, "abcdefghijkl", bos=rule)
    assert sequences.dtype == torch.int64
    assert sequences.tolist() == [[bos, *text[i : i + 3]] for i in (0, 3, 6)]
    plain = get(tokenizer, "abcdefghijkl", bos="false")
    assert plain.flatten().tolist() == tokenizer("abcdefghijkl", add_special_tokens=False)["input_ids"]


def test_two_tokens_before_a_text_are_kept_together() -> None:
    tokenizer = tokenizer_with((END_OF_TEXT, BOS))
    assert get(tokenizer, "abcdef")[:, :2].tolist() == [list(leading_ids(tokenizer))] * 3
    with pytest.raises(EvoPressError, match="which the tokenizer's own first tokens fill"):
        get(tokenizer, "abcdef", sequence_length=2)


def test_too_little_text_says_what_can_be_asked_for() -> None:
    with pytest.raises(EvoPressError, match=r"has 8 tokens but 9 are needed .* 1 of each .* at most 8 search tokens"):
        get(tokenizer_with(), "abcdefgh")
    assert get(tokenizer_with(), "abcdefgh", num_tokens=8).shape == (2, 4)


def test_the_cache_knows_it(tmp_path: Path) -> None:
    tokenizer = tokenizer_with()
    first = get(tokenizer, "abcdefghijkl", cache_dir=tmp_path)
    other = get(tokenizer, "abcdefghijkl", cache_dir=tmp_path, bos="false")
    assert len(list(tmp_path.iterdir())) == 2 and not torch.equal(first, other)
    assert torch.equal(get(tokenizer, "abcdefghijkl", cache_dir=tmp_path), first)


def test_the_cache_of_a_tokenizer_that_adds_nothing_is_that_of_earlier_versions(tmp_path: Path) -> None:
    for rule in ("auto", "false"):
        get(byte_tokenizer(), "abcdefghijkl", cache_dir=tmp_path, bos=rule)
    (path,) = tmp_path.iterdir()
    with safe_open(path, framework="pt") as file:
        recipe = json.loads(file.metadata()["evopress"])["recipe"]
    earlier = {"schema", "source", "split", "tokenizer", "separator", "sequence_length", "num_tokens"}
    assert recipe.keys() == earlier


# Ids beyond the embedding


def grown(*tokens: str) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(list(tokens))
    return tokenizer


def test_ids_beyond_the_embedding() -> None:
    assert ids_beyond(byte_tokenizer(), 257) == {}
    assert ids_beyond(grown("<new>"), 257) == {257: "<new>"}


@pytest.mark.parametrize("texts", [("abc <new> def",), ("abcdefghijk", "l<new>")])
def test_a_text_with_a_token_that_the_embedding_lacks_is_refused(texts: tuple[str, ...]) -> None:
    tokenizer = grown("<new>")
    sequences = get(tokenizer, *texts, sequence_length=2, num_tokens=6)
    check = {"num_rows": 257, "what": "the search text", "separator": "eos"}
    if len(texts) == 1:
        with pytest.raises(EvoPressError, match=r"the search text has the token '<new>' \(id 257\).* 257 rows: resize"):
            check_embedded(sequences, tokenizer, **check)
    else:
        check_embedded(sequences, tokenizer, **check)  # only what is read counts
    check_embedded(sequences, tokenizer, **check | {"num_rows": 258})


def test_a_separator_that_the_embedding_lacks_may_be_left_out() -> None:
    tokenizer = grown("<sep>")
    sequences = get(tokenizer, "abc", "defghijklmn", separator="<sep>")
    with pytest.raises(EvoPressError, match=r"'<sep>' .*model\.separator=null"):
        check_embedded(sequences, tokenizer, num_rows=257, what="the search text", separator="<sep>")


def test_an_id_that_the_tokenizer_has_not_is_told() -> None:
    with pytest.raises(
        EvoPressError, match=r"has the token id 1000000000000, which the tokenizer has not, but .* 257 rows: give ids"
    ):
        check_embedded(torch.full((1, 4), 10**12), byte_tokenizer(), num_rows=257, what="the tokens", separator=None)
