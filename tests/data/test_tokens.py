import errno
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import evopress.data.tokens as tokens_module
from evopress.data.tokens import token_sequences, tokenizer_fingerprint, tokens_digest
from evopress.errors import EvoPressError
from evopress.models.tiny import byte_tokenizer


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


def test_tokens_are_not_kept_where_files_may_only_be_read(tmp_path, monkeypatch, caplog):
    number = errno.EACCES

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", refuse)
    caplog.set_level("INFO")
    assert torch.equal(_get(Source([_text(0, 50)]), cache_dir=tmp_path), _get(Source([_text(0, 50)])))
    assert "the tokens are not kept" in caplog.text and not list(tmp_path.iterdir())
    number = errno.ENOSPC
    with pytest.raises(EvoPressError, match="the disk is full"):
        _get(Source([_text(0, 50)]), cache_dir=tmp_path)


def test_what_a_killed_run_left_half_written_goes_when_the_file_is_written(tmp_path):
    _get(Source([_text(0, 50)]), cache_dir=tmp_path)
    (file,) = tmp_path.iterdir()
    old, new = (tmp_path / f".{file.name}.{name}.tmp" for name in ("1-a", "2-b"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    file.unlink()
    _get(Source([_text(0, 50)]), cache_dir=tmp_path)
    assert not old.exists() and new.exists(), "another run may be at work on the new one"


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


# Long documents


def _trained(pre_tokenizer):
    """Return a BPE tokenizer of 400 tokens, trained on the words of prose, that splits text as a family's does."""
    from tokenizers import trainers

    from evopress.data.python_docs import PythonDocs

    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    spaces_are_marked = isinstance(
        pre_tokenizer, pre_tokenizers.Metaspace
    )  # then no token has one inside, though nothing splits there
    backend.pre_tokenizer = pre_tokenizers.Metaspace() if spaces_are_marked else pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([text[:5000] for text in PythonDocs().documents("search")][:8], trainer)
    backend.pre_tokenizer = pre_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
LLAMA2 = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
LLAMA3 = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(
            Regex(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            "isolated",
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
WHOLE = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)  # Gemma's way


@pytest.mark.parametrize("pre_tokenizer", [GPT2, LLAMA2, LLAMA3, WHOLE], ids=["gpt2", "llama2", "llama3", "gemma"])
def test_a_long_document_has_the_same_tokens_in_parts(pre_tokenizer, monkeypatch):
    from evopress.data.python_docs import PythonDocs

    tokenizer = _trained(pre_tokenizer)
    text = next(PythonDocs().documents("evaluation"))[:12_000]
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(tokens_module, "LONGEST_PART", 500)
    asked = []
    monkeypatch.setattr(tokens_module, "_ids", lambda part, of, ids=tokens_module._ids: asked.append(part) or ids(part, of))
    parts = _get(Source([text]), tokenizer, sequence_length=2, num_tokens=len(whole) // 2 * 2, separator=None)
    assert parts.flatten().tolist() == whole[: len(whole) // 2 * 2]
    assert len(asked) > 24 and max(map(len, asked)) <= 500


def test_a_long_document_without_words_is_cut_at_white_space_or_anywhere(monkeypatch):
    monkeypatch.setattr(tokens_module, "LONGEST_PART", 10)
    asked = []
    monkeypatch.setattr(tokens_module, "_ids", lambda part, of, ids=tokens_module._ids: asked.append(part) or ids(part, of))
    _get(Source(["12 34 56 78 90 " + "1" * 25]), num_tokens=4)
    assert asked == ["12 34 56", " 78 90"]
    asked.clear()
    with pytest.raises(EvoPressError, match="tokens but"):
        _get(Source(["12 34 56 78 90 " + "1" * 25]), num_tokens=40)
    assert "".join(asked) == "12 34 56 78 90 " + "1" * 25 and max(map(len, asked)) <= 10


def test_a_large_file_is_read_no_further_than_needed(tmp_path, monkeypatch):
    """Tokens are made of a few parts, and bytes are read for them alone, whatever the size of the file."""
    from evopress.data import formats
    from evopress.data.text_files import TextFiles

    path, taken = tmp_path / "a.txt", {"characters": 0, "bytes": 0, "longest": 0}
    path.write_text("so many words in a single line " * 400_000, encoding="utf-8")  # 12 MB

    def ids(part, tokenizer):
        taken["characters"] += len(part)
        taken["longest"] = max(taken["longest"], len(part))
        return [1] * (len(part) // 4)

    def chunks(given, read=formats._byte_chunks):
        for chunk in read(given):
            taken["bytes"] += len(chunk)
            yield chunk

    monkeypatch.setattr(tokens_module, "_ids", ids)
    monkeypatch.setattr(formats, "_byte_chunks", chunks)
    assert _get(TextFiles(search=(path,)), num_tokens=1024).shape == (256, 4)
    assert taken["bytes"] <= 2**20 and taken["characters"] <= 2**18 + 100
    assert _get(TextFiles(search=(path,)), num_tokens=2_000_000).shape == (500_000, 4)
    assert taken["longest"] <= 2**18


MEASURE = """
import sys
from evopress.data.text_files import TextFiles
from evopress.data.tokens import token_sequences
from evopress.models.tiny import byte_tokenizer

path, splits = sys.argv[1], sys.argv[2].split(",")
source = TextFiles(**{split: (path,) for split in splits})
token_sequences(source, splits[0], byte_tokenizer(), sequence_length=64, num_tokens=100_000)
# Not ru_maxrss, which a child takes over from the process that started it.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not tell a process's own peak memory")
@pytest.mark.parametrize("splits", ["calibration", pytest.param("calibration,evaluation", marks=pytest.mark.slow)])
def test_memory_stays_flat_on_200_mb_of_text(splits, tmp_path):
    path, block = tmp_path / "a.txt", ("Words that go on. " * 55 + "\n\n") * 1000
    with path.open("w", encoding="utf-8") as file:
        for i in range(200_000_000 // len(block) + 1):
            file.write(f"{i} {block}")
    assert path.stat().st_size >= 200_000_000
    done = subprocess.run([sys.executable, "-c", MEASURE, str(path), splits], capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 1_000_000_000


def test_what_was_left_out_is_said_whether_read_or_kept(tmp_path, caplog):
    class Incomplete(Source):
        def streams(self, split, left_out):
            left_out["repeated"] += 3
            left_out["null"] += 2
            yield (text for text in self.texts)

    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            _get(Incomplete([_text(0, 20), " ", _text(20, 50)]), cache_dir=tmp_path)
        assert "search text (memory): 3 documents" in caplog.text and "2 rows without text" in caplog.text


def test_special_tokens_that_are_split_are_another_tokenizer() -> None:
    one, other = byte_tokenizer(), byte_tokenizer()
    before = tokenizer_fingerprint(other)
    other.split_special_tokens = True
    assert tokenizer_fingerprint(one) == before != tokenizer_fingerprint(other)


def test_a_text_that_is_shorter_may_be_taken_whole(tmp_path):
    """As WikiText-2's test split is, where half a million tokens are asked for; from the cache too."""
    source, kept = Source([_text(0, 10)]), {"cache_dir": tmp_path}
    asked = [_get(source, num_tokens=40, or_all=True, **kept) for _ in range(2)]
    assert asked[0].shape == (2, 4) and torch.equal(*asked)
    assert torch.equal(_get(source, num_tokens=8), asked[0])
    with pytest.raises(EvoPressError, match="has 10 tokens but 40 are needed"):
        _get(source, num_tokens=40)
    with pytest.raises(EvoPressError, match="has 3 tokens but 40 are needed"):
        _get(Source([_text(0, 3)]), num_tokens=40, or_all=True)
