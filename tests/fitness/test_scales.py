"""Scales learned end to end: their gradient is autograd's, the way goes on where it was, and codes and bytes stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evopress.compress.gptq import GPTQ, Quantized
from evopress.errors import EvoPressError
from evopress.fitness import scales
from evopress.fitness.measures import KLDivergence
from evopress.fitness.scales import Learning, ScaleLearner
from evopress.fitness.suffix import SuffixLoss
from evopress.levels.build import ensure_database
from evopress.levels.scaled import ScaledLevels
from evopress.levels.store import LevelDatabase
from evopress.models.blocks import BlockModel


@pytest.fixture(scope="module")
def blocks(request: pytest.FixtureRequest, tiny_blocks: Callable[..., BlockModel]) -> BlockModel:
    return tiny_blocks(getattr(request, "param", "llama"))


@pytest.fixture(scope="module")
def database(
    blocks: BlockModel, build_settings: Callable[..., Any], tokens: Callable[..., Tensor], tmp_path_factory: pytest.TempPathFactory
) -> LevelDatabase:
    """Every unit at 2 bits alone."""
    settings = build_settings(tmp_path_factory.mktemp("db"), propagate="2")
    return ensure_database(settings, blocks, tokens(8, 16), GPTQ(bits=(2,), group_size=16))[0]


@pytest.fixture(scope="module")
def ids(tokens: Callable[..., Tensor]) -> Tensor:
    return tokens(6, 24, seed=1)


@pytest.fixture(scope="module")
def base(blocks: BlockModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        states: Tensor = blocks.model.model(input_ids=ids).last_hidden_state
    return states


@pytest.fixture
def learner(blocks: BlockModel, database: LevelDatabase, ids: Tensor, base: Tensor) -> Callable[..., ScaleLearner]:
    def make(epochs: int = 2, rate: float = 0.02) -> ScaleLearner:
        return ScaleLearner(
            blocks, ScaledLevels(database), ids, base, Learning(epochs, rate), max_tokens_in_flight=48, chunk_tokens=7
        )

    return make


@pytest.fixture(autouse=True)
def short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scales, "STEP_TOKENS", 48)  # two sequences


def loss_of(learner: ScaleLearner) -> float:
    genome = (0,) * len(learner.levels.space)
    return SuffixLoss(learner.live, genome, learner.ids, base=learner.base, measure=KLDivergence()).loss(0, {})


@pytest.mark.parametrize("blocks", ["llama", "qwen3_moe"], indirect=True)
def test_the_gradient_is_that_of_autograd_through_the_whole_model(learner: Any, blocks: BlockModel, weights_digest: Any) -> None:
    """The twin has every scale in one graph, from the codes to the KL divergence, by transformers alone."""
    made, model, before = learner(), blocks.model, weights_digest(blocks.model)
    for logarithms in made.levels.logarithms.values():  # somewhere else than where they begin
        logarithms.normal_(std=0.1, generator=torch.Generator().manual_seed(len(logarithms)))
    rows = torch.tensor([4, 1, 2])
    found = dict(zip(made.levels.logarithms, made.gradients(rows), strict=True))
    assert weights_digest(model) == before, "the model is given back as it was"
    assert set(found) == {unit.name for unit in made.levels.space.units}

    text, slots, dense = made.ids[rows], made.slots, {}
    with torch.no_grad():
        logp = torch.log_softmax(model(input_ids=text).logits[:, :-1], -1)
    leaves: dict[str, Tensor] = {}
    for place, unit in enumerate(made.levels.space.units):
        payload = made.levels.read(place, 0)
        assert isinstance(payload, Quantized)
        dense[unit.name] = slots[unit.name].weight
        slots[unit.name].put(payload.decode())
        leaves[unit.name] = slots[unit.name].module.weight.requires_grad_(True)
    try:
        logq = torch.log_softmax(model(input_ids=text).logits[:, :-1], -1)
        of_weights = torch.autograd.grad((logp.exp() * (logp - logq)).sum(-1).mean(), list(leaves.values()), allow_unused=True)
    finally:
        for name, weight in dense.items():
            slots[name].module.weight.requires_grad_(False)
            slots[name].put(weight)
    for place, (unit, of_weight) in enumerate(zip(made.levels.space.units, of_weights, strict=True)):
        payload = made.levels.read(place, 0)
        codes = payload.codes.float() - payload.zeros.float().repeat_interleave(16, 1)
        of_scale = torch.zeros(payload.scales.shape) if of_weight is None else (of_weight * codes).unflatten(1, (-1, 16)).sum(-1)
        torch.testing.assert_close(found[unit.name], of_scale * payload.scales.float(), rtol=1e-3, atol=1e-6)


def test_learning_lowers_the_divergence_and_leaves_codes_and_bytes(learner: Any, tmp_path: Path) -> None:
    made = learner()
    assert [len(step) for step in made.steps] == [2] * 6
    assert sorted(torch.cat(made.steps[:3]).tolist()) == list(range(6)) and not torch.equal(made.steps[0], made.steps[3])
    before = loss_of(made)
    made.learn(tmp_path / "learning.safetensors")
    after = loss_of(made)
    assert after < 0.97 * before
    assert not (tmp_path / "learning.safetensors").exists(), "it took less than a minute"

    made.levels.write(tmp_path / "written", {"a": 1}, {"scales": {"kept": True}})
    written, database = LevelDatabase.open(tmp_path / "written"), made.levels.database
    assert written.space.units == database.space.units and written.errors == database.errors
    changed = 0
    for place in range(len(database.space)):
        old, new, read = (source.read(place, 0) for source in (database, written, made.levels))
        assert torch.equal(old.codes, new.codes) and torch.equal(old.zeros, new.zeros) and old.scales.dtype == new.scales.dtype
        assert torch.equal(new.scales, read.scales)
        changed += int((old.scales != new.scales).sum())
    assert changed > 0


def test_the_way_goes_on_where_it_was(learner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    state, whole = tmp_path / "learning.safetensors", learner()
    whole.learn(state)
    monkeypatch.setattr(scales, "_SECONDS", 0.0)
    cut, steps = learner(), []

    def step(number: int) -> None:
        if number == 4:
            raise KeyboardInterrupt
        ScaleLearner.step(cut, number)

    cut.step = step
    with pytest.raises(KeyboardInterrupt):
        cut.learn(state)
    again = learner()
    again.step = lambda number: (steps.append(number), ScaleLearner.step(again, number))
    again.learn(state)
    assert steps == [4, 5]
    assert all(torch.equal(again.levels.logarithms[name], logarithms) for name, logarithms in whole.levels.logarithms.items())

    other = learner(epochs=1)  # another way's file is not gone on with
    assert other._gone_on_with(state) == 0
    whole_file = state.read_bytes()
    for damaged in (whole_file[:100], whole_file[:-40] + bytes([whole_file[-40] ^ 1]) + whole_file[-39:]):
        caplog.clear()
        state.write_bytes(damaged)
        assert learner()._gone_on_with(state) == 0 and "is damaged: scales are learned from the beginning" in caplog.text


def test_what_is_not_finite_is_one_sentence(learner: Any) -> None:
    made = learner()
    next(iter(made.levels.logarithms.values())).fill_(float("nan"))
    with pytest.raises(EvoPressError, match=r"not finite"):
        made.gradients(torch.tensor([0]))
