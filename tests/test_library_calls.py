"""The library in any process: models as a trainer leaves them, several threads, and torch's own modes."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from in_process import invoke
from transformers import AutoModelForCausalLM, AutoTokenizer

import evopress
from evopress.compress.gptq import GPTQ
from evopress.data.opening import RunText
from evopress.errors import EvoPressError
from evopress.settings import DataSettings, EvaluationSettings, ModelSettings

FEW = {"generations": 1, "num_offspring": 4, "survivors": [1], "tokens": [64], "initial_candidates": 4, "initial_tokens": 64}
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


def test_what_is_no_model_of_transformers_is_told_what_to_give(
    network: Any, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder())

    class PeftModel(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.merge_and_unload = self.model = network

    given = {
        r"^the model is a PeftModel: give what the PeftModel's merge_and_unload\(\) returns$": PeftModel(),
        r"^the model is a OptimizedModule: give its _orig_mod$": torch.compile(network),
        r"^the model is a DataParallel: give its module$": torch.nn.DataParallel(network),
        r"^the model is a SimpleNamespace: give its model$": SimpleNamespace(model=network),
        r"^the model is a NoneType: give a model of transformers, a folder or a hub id$": None,
        r"^the model is a int: give": 5,
        r"^the model is a LlamaModel, which has no head over tokens: load it with AutoModelForCausalLM$": network.model,
    }
    for words, model in given.items():
        for more in ((), (tokenizer,)):
            with pytest.raises(EvoPressError, match=words):
                evopress.load_model(model, *more)
    (tmp_path / "file").touch()
    with pytest.raises(EvoPressError, match="file"):
        evopress.load_model("tiny", cache=tmp_path / "file")


def test_an_adapter_inside_a_model_is_told(network: Any, tiny_folder: Callable[..., Path]) -> None:
    network.model.layers[1].mlp.up_proj = type("Linear", (torch.nn.Linear,), {"__module__": "peft.tuners.lora.layer"})(4, 4)
    with pytest.raises(
        EvoPressError, match=r"contains a peft adapter, model\.layers\.1\.mlp\.up_proj: give what the PeftModel's merge"
    ):
        evopress.load_model(network, AutoTokenizer.from_pretrained(tiny_folder()))


def test_numbers_and_genomes_of_numpy_and_torch_are_taken(network: Any, tiny_folder: Callable[..., Path], tokens: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder())
    model = evopress.load_model(network, tokenizer, sequence_length=np.int64(32))
    asked = {"bits": np.float64(2.5), "levels": list(np.array([4, 3, 2])), "group_size": np.int64(16)}
    levels = evopress.build_levels(model, tokens(8, 32), **asked)
    assert levels.settings.bits == 2.5 and type(levels.settings.method.group_size) is int
    plain = evopress.build_levels(model, tokens(8, 32), bits=2.5, levels=[4, 3, 2], group_size=16)
    assert plain.workspace.database.fingerprint == levels.workspace.database.fingerprint
    one = evopress.evaluate(levels, tokens(8, 32), (1,) * 14)
    for genome in (torch.ones(14, dtype=torch.int64), np.ones(14, dtype=int), [1] * 14):
        assert evopress.evaluate(levels, tokens(8, 32), genome) == one
    for genome, words in (
        (["0"] * 14, "level '0' of"),
        (torch.zeros(14), "level tensor"),
        ([True] * 14, "level True"),
        ([-1] * 14, "-1"),
    ):
        with pytest.raises(EvoPressError, match=f"{words}.*does not exist: it has levels 0 to 2"):
            evopress.evaluate(levels, tokens(8, 32), genome)
    space = levels.space
    for counted in (space.cost, space.stored_bits, partial(space.cost_in, space.words)):
        with pytest.raises(EvoPressError, match=r"level -1 of .*does not exist: it has levels 0 to 2"):
            counted([-1] * 14)
    with pytest.raises(
        EvoPressError, match=r"^model.layers.0.*proj has no level '3bits': choose .*, it has 4 bits, 3 bits, 2 bits$"
    ):
        levels.space.uniform("3bits")
    with pytest.raises(EvoPressError, match=r"^the folder is \(1, 1, .*: give its path$"):
        evopress.export(levels, "checkpoint", (1,) * 14)  # type: ignore[arg-type]
    with pytest.raises(EvoPressError, match=r"^the folder is '': give its path$"):
        evopress.export(levels, (1,) * 14, "")
    for text in (torch.zeros(4, 32, dtype=torch.int64, device="meta"), torch.ones(4, 32, dtype=torch.int64).to_sparse()):
        with pytest.raises(EvoPressError, match=r"^the token ids are on .*: give a plain tensor in memory, int64"):
            evopress.evaluate(levels, text)
    with pytest.raises(EvoPressError, match=r"baselines \(none; made when asked for: uniform_4, uniform_3, uniform_2, dp\)"):
        evopress.search(levels, tokens(8, 32), starts=["uniform"], **FEW)


def test_a_search_starts_from_a_baseline_that_was_found_in_its_folder(
    network: Any, tiny_folder: Callable[..., Path], tokens: Any, tmp_path: Path
) -> None:
    model = evopress.load_model(network, AutoTokenizer.from_pretrained(tiny_folder()), sequence_length=32)
    levels = evopress.build_levels(model, tokens(8, 32), bits=2.5, levels=[4, 3, 2])
    with pytest.raises(EvoPressError, match=r"'fisher', which is not among .* in Python, find_baselines with the same folder"):
        evopress.search(levels, tokens(8, 32), starts=["fisher"], folder=tmp_path / "kept", **FEW)
    evopress.find_baselines(levels, tokens(8, 32), ["fisher"], options={"fisher": {"tokens": 64}}, folder=tmp_path / "kept")
    found = evopress.search(levels, tokens(8, 32), starts=["fisher"], folder=tmp_path / "kept", **FEW)
    assert found.records[0]["stages"][0]["num_candidates"] == 4 + 1


@pytest.mark.parametrize("asked", [{"size": "0.01MB"}, {"size": "0.05MB"}, {"bits": 1.5}], ids=["rest", "units", "bits"])
def test_a_target_out_of_reach_is_refused_before_a_level_is_built(
    asked: dict[str, Any], network: Any, tiny_folder: Callable[..., Path], tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = evopress.load_model(network, AutoTokenizer.from_pretrained(tiny_folder()), sequence_length=32)
    monkeypatch.setattr(GPTQ, "compress", lambda *args, **kwargs: pytest.fail("a level was built"))
    with pytest.raises(EvoPressError, match=r"is too small|can reach|below"):
        evopress.build_levels(model, tokens(8, 32), levels=[4, 3, 2], **asked)


def test_gguf_finds_what_the_program_finds(tmp_path: Path) -> None:
    command = (
        "+method=gguf",
        "bits=5",
        "+debug=tiny",
        "search/strategy=evolution",
        "stages=[database,search]",
        "evaluation.every=0",
    )
    numbers = (f"search.{key}={value}".replace(" ", "") for key, value in FEW.items())
    cache = tmp_path / "cache"
    done = invoke(*command, *numbers, f"hydra.run.dir={tmp_path / 'run'}", cache=cache, cwd=tmp_path)
    assert done.code == 0, done.text
    model = evopress.load_model("tiny", dtype="float32", device="cpu", sequence_length=64, cache=cache)
    settings = DataSettings(source="python_docs", calibration_tokens=1024, search_tokens=2048), EvaluationSettings()
    opened = {"tokenizer": lambda: model.tokenizer, "embedding_rows": lambda: None, "cache": cache}
    text = RunText(*settings, ModelSettings(sequence_length=64), **opened)
    levels = evopress.build_levels(model, text.calibration, method="gguf", bits=5)
    assert evopress.search(levels, text.search, **FEW).genome == levels.space.check(
        [unit["level"] for unit in json.loads((tmp_path / "run" / "genome.json").read_text())["units"]]
    )


def test_experts_is_a_method_here_too(network: Any, tiny_folder: Callable[..., Path], tokens: Any) -> None:
    model = evopress.load_model(network, AutoTokenizer.from_pretrained(tiny_folder()), sequence_length=32)
    with pytest.raises(EvoPressError, match="expert"):
        evopress.build_levels(model, tokens(8, 32), method="experts", sparsity=0.25)
