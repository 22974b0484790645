"""The library in any process: models as a trainer leaves them, several threads, and torch's own modes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import evopress

GUIDED = {"name": "guided", "rounds": 1, "attribution_tokens": 128, "attribution_sequences": 4, "screen_tokens": 64}


@pytest.fixture
def network(tiny_folder: Callable[..., Path]) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_folder())


def built(network: Any, folder: Path, ids: Any) -> evopress.library.Levels:
    model = evopress.load_model(network, AutoTokenizer.from_pretrained(folder), sequence_length=32)
    return evopress.build_levels(model, ids, bits=3, levels=[4, 3, 2])


def test_a_model_in_training_is_measured_without_dropout(tiny_folder: Callable[..., Path], tokens: Any) -> None:
    folder = tiny_folder("opt")
    network = AutoModelForCausalLM.from_pretrained(folder, dropout=0.5)
    levels = built(network, folder, tokens(8, 32))
    genome = (1,) * len(levels.space)
    scores = evopress.evaluate(levels, tokens(8, 32), genome)
    network.train()
    assert evopress.evaluate(levels, tokens(8, 32), genome) == scores
    assert not any(module.training for module in network.modules())
    network.train()
    evopress.build_levels(levels.model, tokens(8, 32), bits=3, levels=[4, 3, 2])


def test_a_model_whose_embedding_asks_for_gradients_is_searched_as_any_other(
    network: Any, tiny_folder: Callable[..., Path], tokens: Any
) -> None:
    ids, other = tokens(8, 32), copy.deepcopy(network)
    other.enable_input_require_grads()  # as gradient checkpointing does
    found = []
    for each in (network, other):
        levels = built(each, tiny_folder(), ids)
        genome = evopress.search(levels, ids, strategy=GUIDED).genome
        found.append((genome, evopress.evaluate(levels, ids, genome)))
    assert found[0] == found[1]


@pytest.mark.parametrize("mode", ["inference", "no_grad", "bfloat16"])
def test_modes_of_torch_change_nothing_and_stay(mode: str, network: Any, tiny_folder: Callable[..., Path], tokens: Any) -> None:
    ids, folder = tokens(8, 32), tiny_folder()
    there = evopress.search(built(network, folder, ids), ids, strategy=GUIDED).genome
    try:
        torch.set_default_dtype(torch.bfloat16 if mode == "bfloat16" else torch.float32)
        with torch.inference_mode() if mode == "inference" else torch.no_grad() if mode == "no_grad" else nullcontext():
            before = torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.get_default_dtype()
            assert evopress.search(built(network, folder, ids), ids, strategy=GUIDED).genome == there
            assert (torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.get_default_dtype()) == before
    finally:
        torch.set_default_dtype(torch.float32)


def test_threads_take_turns_on_one_network(network: Any, tiny_folder: Callable[..., Path], tokens: Any) -> None:
    ids, folder = tokens(8, 32), tiny_folder()
    levels = [built(network, folder, ids) for _ in range(2)]
    wanted = [evopress.evaluate(levels[0], ids, (level,) * 14) for level in range(3)]
    torch.set_float32_matmul_precision("high")
    seen: list[bool] = []

    def work(number: int) -> None:
        for level in range(3):
            seen.append(evopress.evaluate(levels[number % 2], ids, (level,) * 14) == wanted[level])

    try:
        threads = [Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen == [True] * 12 and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert not any("forward" in vars(module) for module in network.modules())
    assert network(ids).logits.shape[:2] == ids.shape
    assert pickle.loads(pickle.dumps(copy.deepcopy(network.model.norm))).weight.equal(network.model.norm.weight)


def test_a_network_that_was_loaded_here_and_is_given_again_has_one_lock(tiny_folder: Callable[..., Path]) -> None:
    model = evopress.load_model(tiny_folder(), dtype="float32", device="cpu", sequence_length=32)
    again = evopress.load_model(model.model, model.tokenizer)
    other = evopress.load_model(tiny_folder(), dtype="float32", device="cpu", sequence_length=32)
    assert again.lock is model.lock is not other.lock
