"""Text of a run, from its command to its tokens: what sequences begin with, ids that a model lacks, kinds of files and rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers.processors import TemplateProcessing

from evopress.models.tiny import byte_tokenizer, make_tiny

BOS = "Ā"  # the letter of byte 0, which no text has


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., Path]:
    """Make a tiny checkpoint whose tokenizer a function has changed."""

    def make(change: Callable[[Any], None], name: str = "model") -> Path:
        folder = make_tiny(tmp_path / name)
        tokenizer = byte_tokenizer()
        change(tokenizer)
        tokenizer.save_pretrained(folder)
        return folder

    return make


def with_bos(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"bos_token": BOS})
    ids = [(BOS, tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=ids)


def bos_without_template(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"bos_token": BOS})


def cached(cache: Path, since: set[Path]) -> dict[str, torch.Tensor]:
    """Return the token sequences that a run made, by split."""
    found = {}
    for path in set((cache / "tokens").glob("*.safetensors")) - since:
        with safe_open(path, framework="pt") as file:
            found[json.loads(file.metadata()["evopress"])["recipe"]["split"]] = file.get_tensor("sequences")
    return found


@pytest.mark.parametrize(
    ("change", "rule", "begins"),
    [
        (with_bos, "auto", True),
        (with_bos, "false", False),
        (bos_without_template, "auto", False),
        (bos_without_template, "true", True),
    ],
)
def test_calibration_search_and_evaluation_begin_alike(
    change: Callable[[Any], None], rule: str, begins: bool, model: Any, tiny: Callable[..., Any], cache: Path
) -> None:
    folder = model(change, f"{change.__name__}-{rule}")
    before = set((cache / "tokens").glob("*.safetensors")) if (cache / "tokens").exists() else set()
    outcome = tiny(f"model.path={folder}", f"model.bos={rule}", "dry_run=true")
    assert outcome.code == 0, outcome.text
    assert (f"every sequence begins with {BOS} (model.bos={rule}" in outcome.text) is begins
    (bos,) = byte_tokenizer().convert_tokens_to_ids([BOS])
    found = cached(cache, before)
    assert found.keys() == {"calibration", "search", "evaluation"}
    for sequences in found.values():
        assert sequences.shape[1] == 64
        assert bool((sequences[:, 0] == bos).all()) is begins and not (sequences[:, 1:] == bos).any()


def test_the_database_knows_what_sequences_begin_with(model: Any, tiny: Callable[..., Any], tmp_path: Path) -> None:
    folder, databases = model(with_bos), []
    for rule in ("auto", "false"):
        outcome = tiny(f"model.path={folder}", f"model.bos={rule}", "stages=[database]", folder=tmp_path / rule)
        assert outcome.code == 0, outcome.text
        path = Path(json.loads((tmp_path / rule / "result.json").read_text(encoding="utf-8"))["database"]["path"])
        databases.append(json.loads((path / "manifest.json").read_text(encoding="utf-8")))
    bos = byte_tokenizer().convert_tokens_to_ids(BOS)
    assert [manifest["recipe"]["data"].get("leading") for manifest in databases] == [[bos], None]


def grown(tokenizer: Any) -> None:
    tokenizer.add_tokens(["<new>"])


@pytest.mark.parametrize("split", ["calibration", "search", "evaluation"])
def test_a_token_beyond_the_embedding_is_refused_wherever_it_is(
    split: str, model: Any, tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "evopress.models.opening.load_pretrained", lambda *a, **k: pytest.fail("a model was loaded before the error")
    )
    for name in ("calibration", "search", "evaluation"):
        words = f"{name} text " * 300
        (tmp_path / f"{name}.txt").write_text(words.replace("text", "<new>") if name == split else words, encoding="utf-8")
    files = [f"data.{name}=[{name}.txt]" for name in ("calibration", "search", "evaluation")]
    outcome = tiny(f"model.path={model(grown)}", "data=text", *files)
    assert outcome.code == 1
    (sentence,) = outcome.errors
    assert f"the {split} text (text) has the token '<new>' (id 257), but the model's embedding has 257 rows: resize" in sentence


def test_an_end_of_text_beyond_the_embedding_is_refused_and_may_be_left_out(
    model: Any, tiny: Callable[..., Any], tmp_path: Path
) -> None:
    def other_end(tokenizer: Any) -> None:
        tokenizer.add_special_tokens({"eos_token": "<end>"})

    folder = model(other_end)
    rows = "".join(json.dumps({"text": f"Document {i} of a good many."}) + "\n" for i in range(999))
    (tmp_path / "a.jsonl").write_text(rows, encoding="utf-8")
    files = [f"data.{split}=[a.jsonl]" for split in ("calibration", "search", "evaluation")]
    outcome = tiny(f"model.path={folder}", "data=text", *files, "dry_run=true")
    assert outcome.code == 1 and "'<end>' (id 257)" in outcome.errors[0] and "model.separator=null" in outcome.errors[0]
    assert tiny(f"model.path={folder}", "data=text", *files, "model.separator=null", "dry_run=true").code == 0


# Files and rows of many kinds


def write_rows(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def documents(first: int, last: int) -> list[Any]:
    return [{"text": f"Document {i} has these words and some others, {i * i} of them in all."} for i in range(first, last)]


@pytest.mark.parametrize("given", ["a.jsonl", "[a.jsonl]", "texts", "'a*.jsonl'"])
def test_one_file_a_folder_and_a_pattern_need_no_brackets(given: str, tiny: Callable[..., Any], tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [*documents(0, 99), {"text": None}])
    (tmp_path / "texts").mkdir()
    write_rows(tmp_path / "texts" / "b.jsonl", documents(0, 99))
    write_rows(tmp_path / "held_out.jsonl", documents(90, 150))
    outcome = tiny("data=text", f"data.calibration={given}", "data.evaluation=held_out.jsonl", "dry_run=true")
    assert outcome.code == 0, outcome.text
    assert "evaluation text (text): " in outcome.text and "that another split has or that repeat were set aside" in outcome.text


def test_chats_are_rendered_by_the_tokenizers_template(model: Any, tiny: Callable[..., Any], cache: Path, tmp_path: Path) -> None:
    def chatting(tokenizer: Any) -> None:
        tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"

    rows = [
        {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": "A number."}]}
        for i in range(300)
    ]
    write_rows(tmp_path / "chats.jsonl", rows)
    files = [f"data.{split}=chats.jsonl" for split in ("calibration", "search", "evaluation")]
    before = set((cache / "tokens").glob("*.safetensors"))
    outcome = tiny(f"model.path={model(chatting)}", "data=text", *files, "dry_run=true")
    assert outcome.code == 0, outcome.text
    (start, *_) = cached(cache, before)["calibration"].tolist()
    assert byte_tokenizer().decode(start).startswith("[user]What is 0?[assistant]A number.<|endoftext|>[user]What is 3?")
    refused = tiny("data=text", *files, "dry_run=true")
    assert refused.code == 1 and "no chat template" in refused.errors[0]


@pytest.mark.parametrize("given", ["3", "[a.jsonl,3]", "null"])
def test_what_is_no_list_of_files_is_refused(given: str, tiny: Callable[..., Any]) -> None:
    outcome = tiny("data=text", f"data.calibration={given}", "dry_run=true")
    assert outcome.code == 1 and "is no list of files" in outcome.errors[0]
