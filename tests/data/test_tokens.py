import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from evopress.data.tokens import token_sequences, tokenizer_fingerprint, tokens_digest
from evopress.errors import EvoPressError


class Source:
    """Documents in memory that count how many were read."""

    name = "memory"

    def __init__(self, documents):
        self.texts, self.num_read = documents, 0

    def documents(self, split):
        for text in self.texts:
            self.num_read += 1
            yield text

    def identity(self):
        return {"kind": self.name, "texts": self.texts}


WORDS = ("<end>", "<start>", "<unk>", *map(str, range(100)))


def _tokenizer(words=WORDS, **settings):
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<end>", "bos_token": "<start>", "unk_token": "<unk>"} | settings
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=4, **special)


def _text(start, stop):
    return " ".join(map(str, range(start, stop)))


def _get(source, tokenizer=None, **settings):
    settings = {"sequence_length": 4, "num_tokens": 12} | settings
    return token_sequences(source, "search", tokenizer or _tokenizer(), **settings)


def test_documents_are_joined_and_cut():
    tokens = [*range(3, 8), 0, *range(8, 10), 0, *range(10, 14)]  # ids of the numbers are shifted by 3
    sequences = _get(Source([_text(0, 5), "", _text(5, 7), _text(7, 50)]))
    assert sequences.dtype == torch.int64
    assert sequences.tolist() == [tokens[0:4], tokens[4:8], tokens[8:12]]


@pytest.mark.parametrize(("separator", "joint"), [("eos", [0]), (None, []), ("<start>", [1])])
def test_separator(separator, joint):
    sequences = _get(Source([_text(0, 3), _text(3, 20)]), separator=separator, num_tokens=4)
    assert sequences.tolist() == [[3, 4, 5, *(joint or [6])]]


def test_tokenizer_without_end_of_text_joins_by_nothing():
    sequences = _get(Source([_text(0, 3), _text(3, 20)]), _tokenizer(eos_token=None), num_tokens=4)
    assert sequences.tolist() == [[3, 4, 5, 6]]


def test_what_does_not_fill_a_sequence_is_left_out():
    assert _get(Source([_text(0, 50)]), num_tokens=15).shape == (3, 4)


def test_source_is_read_no_further_than_needed():
    source = Source([_text(0, 10)] * 100)
    _get(source, num_tokens=16)
    assert source.num_read == 2


def test_long_documents_cause_no_warning(caplog, recwarn):
    with caplog.at_level(logging.DEBUG):
        _get(Source([_text(0, 50)]))
    assert not recwarn.list
    assert "longer than" not in caplog.text


def test_too_little_text_is_refused_with_both_numbers():
    with pytest.raises(EvoPressError, match="has 11 tokens but 12 are needed"):
        _get(Source([_text(0, 5), _text(5, 10)]))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_tokens": 3}, "3 search tokens do not fill one sequence of 4"),
        ({"sequence_length": 1}, "sequence_length is 1"),
        ({"separator": "<sep>"}, "'<sep>' is no token"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, sentence):
    with pytest.raises(EvoPressError, match=sentence):
        _get(Source([_text(0, 50)]), **settings)


def test_cache_gives_the_same_tokens_without_reading(tmp_path):
    first = _get(Source([_text(0, 50)]), cache_dir=tmp_path / "tokens")
    source = Source([_text(0, 50)])
    assert torch.equal(_get(source, cache_dir=tmp_path / "tokens"), first)
    assert source.num_read == 0
    assert [path.suffix for path in (tmp_path / "tokens").iterdir()] == [".safetensors"]


@pytest.mark.parametrize(
    "other",
    [
        {"source": Source([_text(1, 50)])},
        {"tokenizer": _tokenizer(words=("<end>", "<start>", "<unk>", *map(str, range(99, -1, -1))))},
        {"sequence_length": 3},
        {"num_tokens": 16},
        {"separator": None},
    ],
)
def test_cache_is_keyed_by_all_that_decides_the_tokens(tmp_path, other):
    _get(Source([_text(0, 50)]), cache_dir=tmp_path)
    settings = dict(other)
    source = settings.pop("source", Source([_text(0, 50)]))
    _get(source, cache_dir=tmp_path, **settings)
    assert source.num_read > 0
    assert len(list(tmp_path.iterdir())) == 2


def _cut_short(path):
    path.write_bytes(path.read_bytes()[:-8])


def _flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)


def _other_shape(path):
    save_file({"sequences": load_file(path)["sequences"][:1].contiguous()}, path)


@pytest.mark.parametrize("damage", [_cut_short, _flip_a_bit, _other_shape])
def test_damaged_cache_is_made_again_with_a_warning(tmp_path, caplog, damage):
    first = _get(Source([_text(0, 50)]), cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    damage(path)
    assert torch.equal(_get(Source([_text(0, 50)]), cache_dir=tmp_path), first)
    assert "damaged" in caplog.text and str(path) in caplog.text
    assert path.read_bytes() == whole


def test_fingerprint_ignores_what_calls_leave_on_the_tokenizer():
    tokenizer = _tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer("1 2 3", truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == before
    assert tokenizer_fingerprint(_tokenizer(words=("<end>", "<start>", "<unk>", "a"))) != before


def test_tokens_digest_sees_values_and_shape():
    sequences = torch.arange(12).view(3, 4)
    assert tokens_digest(sequences) == tokens_digest(sequences.clone())
    assert len({tokens_digest(sequences), tokens_digest(sequences.view(4, 3)), tokens_digest(sequences + 1)}) == 3
