"""The second pass as a function: measured, exported and refused as a genome is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import evopress
from evopress.errors import EvoPressError
from evopress.stages import refine as stage


@pytest.fixture
def built(tiny_folder: Callable[..., Path], tokens: Any) -> Any:
    model = evopress.load_model(tiny_folder(), dtype="float32", device="cpu", sequence_length=32)
    return evopress.build_levels(model, tokens(8, 32), bits=3.0, group_size=16, levels=[4, 3, 2])


def logits_of(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()(input_ids=ids).logits


def test_refined_weights_are_measured_and_exported(built: Any, tokens: Any, tmp_path: Path, weights_digest: Any) -> None:
    before, genome = weights_digest(built.model.model), built.space.uniform("3 bits")
    deciding = tokens(8, 32, seed=1)
    refined = evopress.refine(built, genome, deciding)
    assert refined.genome == genome and refined.blocks_kept > 0 and refined.kl_after < refined.kl_before
    assert evopress.evaluate(built, deciding, genome).kl == pytest.approx(refined.kl_before, rel=1e-4)
    assert evopress.evaluate(built, deciding, refined).kl == pytest.approx(refined.kl_after, rel=1e-4)
    assert weights_digest(built.model.model) == before

    for name, given in (("found", genome), ("refined", refined)):
        evopress.export(built, given, tmp_path / name)
    told, plain = (json.loads((tmp_path / name / "evopress.json").read_text()) for name in ("refined", "found"))
    assert told.pop("refined")["kept"] == refined.blocks_kept and told == plain, "what it spends is the genome's"
    found, anew = (logits_of(tmp_path / name, deciding).double() for name in ("found", "refined"))
    original = built.model.model(input_ids=deciding).logits.double().detach()
    assert not torch.equal(found, anew)

    def kl(logits: torch.Tensor) -> float:
        p, q = original[:, :-1].log_softmax(-1), logits[:, :-1].log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1).mean())

    assert kl(found) == pytest.approx(refined.kl_before, rel=1e-3) and kl(anew) == pytest.approx(refined.kl_after, rel=1e-3)


def test_scales_are_learned_on_text_of_their_own(built: Any, tokens: Any) -> None:
    genome, deciding = built.space.uniform("2 bits"), tokens(4, 32, seed=1)
    fitted = evopress.refine(built, genome, deciding)
    learned = evopress.refine(built, genome, deciding, scale_text=deciding, scale_epochs=4)
    assert fitted.refined is not None and learned.refined is not None and learned.refined.folder != fitted.refined.folder
    assert learned.kl_after < fitted.kl_after, "it has seen the text that decides, here"
    assert evopress.evaluate(built, deciding, learned).kl == pytest.approx(learned.kl_after, rel=1e-4)
    with pytest.raises(EvoPressError, match=r"refine\.scale_epochs=-1"):
        evopress.refine(built, genome, deciding, scale_text=deciding, scale_epochs=-1)


def test_a_folder_keeps_them(built: Any, tokens: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genome, deciding = built.space.uniform("2 bits"), tokens(4, 32, seed=1)
    first = evopress.refine(built, genome, deciding, folder=tmp_path / "kept")

    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("all blocks are there")

    monkeypatch.setattr("evopress.levels.refine.compress_units", never)
    again = evopress.refine(built, genome, deciding, folder=tmp_path / "kept")
    assert (again.blocks_kept, again.kl_after) == (first.blocks_kept, first.kl_after)
    with pytest.raises(AssertionError, match="all blocks are there"):
        evopress.refine(built, genome, deciding, folder=tmp_path / "kept", correction=0.0)


def test_what_cannot_be_refined_is_one_sentence(built: Any, tiny_folder: Callable[..., Path], tokens: Any) -> None:
    with pytest.raises(EvoPressError, match=r"^refine takes no correction='much': expected float$"):
        evopress.refine(built, built.space.uniform("3 bits"), tokens(4, 32, seed=1), correction="much")  # type: ignore[arg-type]
    with pytest.raises(EvoPressError, match=r"refine\.correction=2"):
        evopress.refine(built, built.space.uniform("3 bits"), tokens(4, 32, seed=1), correction=2.0)
    refined = evopress.refine(built, built.space.uniform("3 bits"), tokens(4, 32, seed=1))
    model = evopress.load_model(tiny_folder(seed=1), dtype="float32", device="cpu", sequence_length=32)
    others = evopress.build_levels(model, tokens(8, 32), bits=3.0, group_size=16, levels=[4, 3, 2])
    with pytest.raises(EvoPressError, match="what was refined are other levels than these"):
        evopress.evaluate(others, tokens(4, 32, seed=1), refined)
    dropping = evopress.build_levels(model, tokens(8, 32), method="drop", sparsity=0.5)
    with pytest.raises(EvoPressError, match=r"^method drop stores no weights, so there is nothing to refine"):
        evopress.refine(dropping, [0] * len(dropping.space), tokens(4, 32, seed=1))  # type: ignore[arg-type]


def test_a_genome_of_dense_weights_stays_as_it_is(built: Any, tokens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "inexact_units", lambda database, genome: set())
    genome, text = built.space.uniform("3 bits"), tokens(4, 32, seed=1)
    refined = evopress.refine(built, genome, text)
    assert refined.refined is None and refined.kl_before is None
    assert evopress.evaluate(built, text, refined) == evopress.evaluate(built, text, genome)
