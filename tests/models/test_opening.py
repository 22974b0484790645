"""What a model's files tell before it is loaded, and that they are read when asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from evopress.errors import EvoPressError
from evopress.models.opening import ModelSource, find_model, pick_dtype
from evopress.settings import ModelSettings


@pytest.fixture
def source(tiny_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., ModelSource]:
    def make(**settings: object) -> ModelSource:
        model = ModelSettings(**({"path": str(tiny_folder()), "sequence_length": 32} | settings))  # type: ignore[arg-type]
        return ModelSource(model, cache=tmp_path, device=torch.device("cpu"), dtype="float32")

    return make


def test_nothing_is_loaded_to_know_shapes_digest_and_tokenizer(
    source: Callable[..., ModelSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("evopress.models.opening.load_pretrained", lambda *a, **k: pytest.fail("the model was loaded"))
        found = source()
        shapes, digest, rows, vocabulary = found.linear_shapes(), found.digest, found.embedding_rows, len(found.tokenizer)
    model = found.pretrained.model
    assert shapes == {name: tuple(p.shape) for name, p in model.named_parameters() if "_proj." in name}
    assert rows == model.get_input_embeddings().num_embeddings >= vocabulary
    assert found.digest == digest == found.pretrained.digest


def test_shapes_of_a_damaged_file_are_not_known(source: Callable[..., ModelSource], monkeypatch: pytest.MonkeyPatch) -> None:
    found = source()

    def damaged(*args: object, **kwargs: object) -> None:
        raise OSError("truncated")

    monkeypatch.setattr("evopress.models.opening.safe_open", damaged)
    assert found.linear_shapes() is None


def test_what_exceeds_the_model_is_refused(source: Callable[..., ModelSource]) -> None:
    positions, rows = source().config["max_position_embeddings"], source().config["vocab_size"]
    source().check(length=positions, kept_logits=rows)
    with pytest.raises(EvoPressError, match=f"model.sequence_length={positions + 1} is more than the {positions} positions"):
        source().check(length=positions + 1)
    with pytest.raises(EvoPressError, match=rf"fitness\.k={rows + 1} is more than the {rows} tokens"):
        source().check(length=positions, kept_logits=rows + 1)


def test_a_model_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(EvoPressError, match=r"no model was named: give model\.path=DIR"):
        find_model(ModelSettings(), tmp_path)
    with pytest.raises(EvoPressError, match=r"model\.builtin=huge is unknown: choose one of smollm2_135m, tiny"):
        find_model(ModelSettings(builtin="huge"), tmp_path)


@pytest.mark.parametrize(("has", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_a_cpu_without_half_products_computes_in_float32(has: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evopress.models.opening.has_half_products", lambda: has)
    assert pick_dtype("auto", torch.device("cpu")) == expected
    assert pick_dtype("auto", torch.device("cuda")) == "bfloat16"
    assert pick_dtype("float16", torch.device("cpu")) == "float16"
