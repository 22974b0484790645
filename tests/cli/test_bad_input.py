"""Bad input ends with one clear sentence and an exit code, before any model is loaded where it can be seen by then.

What is in a table here is listed with its sentence in `tests/reliability/bad_inputs.md`.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

PROSE = "".join(f"The quick brown fox jumps over lazy dog {i} near the old river bank.\n\n" for i in range(10, 70))


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if a model is loaded."""
    monkeypatch.setattr(
        "evopress.models.opening.load_pretrained", lambda *a, **k: pytest.fail("a model was loaded before the error")
    )


def refused(outcome: Any, *parts: str) -> str:
    """Check that the program ended with one sentence that has these parts in it; return the sentence."""
    assert outcome.code == 1, outcome.text
    assert "Traceback" not in outcome.text
    assert len(outcome.errors) == 1, outcome.text
    (sentence,) = outcome.errors
    for part in parts:
        assert part in sentence, sentence
    assert re.search(r": |; | must ", sentence.removeprefix("error: ")), f"says what is wrong, not what to do: {sentence}"
    return sentence


@pytest.fixture
def listed(cache: Path, tmp_path: Path) -> Callable[..., None]:
    """Keep a case's input and sentence for the list, if the list is being written; folders of this machine become words."""

    def keep(name: str, given: str, sentence: str) -> None:
        if (path := os.environ.get("EVOPRESS_BAD_INPUTS")) is None:
            return
        for folder, word in ((str(tmp_path), "FOLDER"), (str(cache), "CACHE")):
            given, sentence = given.replace(folder, word), sentence.replace(folder, word)
        sentence = re.sub(r"torch \d\S*", "torch VERSION", sentence.removeprefix("error: "))
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, "given": given, "sentence": sentence}) + "\n")

    return keep


LONG = "x" * 300
SETTINGS = {
    "bits below the lowest level": (["bits=1.5"], ["bits=1.5", "lowest level (2 bits)", "[6, 5, 4, 3, 2]"]),
    "bits above the highest level": (["bits=7"], ["bits=7", "highest level (6 bits)"]),
    "bits are nan": (["bits=nan"], ["bits=nan"]),
    "nothing to search at the lowest level": (["bits=2"], ["bits=2", "nothing to search"]),
    "nothing to search at the highest level": (["bits=6"], ["bits=6", "nothing to search"]),
    "no bits": (["bits=null"], ["bits=2.5"]),
    "group size divides no width": (
        ["model.group_size=24"],
        ["model.layers.0.", "group size 24", "input columns", "method.group_size="],
    ),
    "group size of the method": (["method.group_size=48"], ["group size 48", "input columns"]),
    "levels that do not descend": (["method.levels=[2,3,4]", "bits=3.5"], ["[2, 3, 4]", "descending"]),
    "propagated level is missing": (["method.levels=[3,2]", "bits=2.5"], ["propagate_bits=4", "[3, 2]"]),
    "correction of dense activations": (
        ["method.correction=0.5", "method.propagate_bits=null"],
        ["method.correction=0.5", "propagate_bits=null", "has no effect"],
    ),
    "second pass corrected by more than all": (["refine.correction=1.5"], ["refine.correction=1.5", "a share, 0 to 1"]),
    "a level that is no bit width": (["method.levels=[4,x]", "bits=3"], ["method.levels", "'x'", "dense"]),
    "dense is not the first level": (["method.levels=[4,dense]", "bits=4"], ["dense comes first"]),
    "recipe": (["method.recipe=worst"], ["method.recipe=worst", "paper or best"]),
    "damping": (["method.damping=2"], ["damping"]),
    "CUDA asked for and absent": (["model.device=cuda"], ["'cuda'", "device=cpu"]),
    "no such device": (["model.device=toaster"], ["'toaster'", "cpu"]),
    "dtype": (["model.dtype=int8"], ["model.dtype=int8", "bfloat16"]),
    "sequences longer than the model's positions": (
        ["model.sequence_length=1024", "data.evaluation_tokens=4096"],
        ["model.sequence_length=1024", "512 positions"],
    ),
    "λ smaller than survivors": (["search.num_offspring=3", "search.survivors=[4,1]"], ["4 survivors", "3 offspring"]),
    "survivors ascend": (["search.survivors=[1,2]"], ["[1, 2]", "descend to 1"]),
    "survivors do not end in 1": (["search.survivors=[3,2]"], ["[3, 2]", "descend to 1"]),
    "survivors and tokens differ in length": (["search.survivors=[1]"], ["[1]", "[64, 128]", "length"]),
    "no stages of selection": (["search.survivors=[]", "search.tokens=[]"], ["stage"]),
    "stage tokens larger than the search text": (["search.tokens=[64,4096]"], ["search.tokens", "4096", "2 to 2048"]),
    "a stage of one token": (["search.tokens=[1,128]"], ["search.tokens", "minibatch of 1"]),
    "initial tokens larger than the search text": (["search.initial_tokens=9999"], ["search.initial_tokens", "9999"]),
    "baseline's tokens larger than the search text": (["baselines.random_tokens=9999"], ["baselines.random_tokens", "9999"]),
    "a split shorter than a sequence": (["data.evaluation_tokens=63"], ["data.evaluation_tokens=63", "sequence_length=64"]),
    "generations without a number": (
        ["search/strategy=evolution", "search.generations=null"],
        ["search.generations is null", "search.generations=50"],
    ),
    "negative generations": (["search.generations=-1"], ["generations", "-1"]),
    "no offspring": (["search.num_offspring=0"], ["num_offspring", "0"]),
    "no initial candidates": (["search.initial_candidates=0"], ["initial_candidates", "0"]),
    "no switches": (["search.max_switches=0"], ["search.max_switches=0"]),
    "unknown exchange": (["search.exchange=colour"], ["search.exchange=colour", "size, name, any, none"]),
    "unknown distribution": (["search.distribution=normal"], ["search.distribution=normal", "min_uniform"]),
    "unknown stage": (["stages=[databse]"], ["databse", "database, baselines"]),
    "OWL is of another method": (["baselines.names=[owl]"], ["owl", "method sparsity only, not quant"]),
    "a bound where the target is no level": (["search.max_level=1"], ["search.max_level=1", "between two levels"]),
    "a total where the target is no level": (["search.max_total_deviation=4"], ["search.max_total_deviation=4", "between two"]),
    "unknown baseline": (["baselines.names=[spdy]"], ["'spdy'", "choose among uniform", "dp"]),
    "no random candidates": (["baselines.num_random=0"], ["baselines.num_random=0"]),
    "unknown fitness": (["fitness.name=loss"], ["fitness.name=loss", "perplexity"]),
    "unknown evaluator": (["fitness.evaluator=fast"], ["fitness.evaluator=fast", "plain"]),
    "fitness.k too small": (["fitness=topk_kl", "fitness.k=1"], ["fitness.k=1", "at least 2"]),
    "no tokens per chunk": (["fitness.chunk_tokens=0"], ["fitness.chunk_tokens=0"]),
    "no tokens in flight": (["fitness.max_tokens_in_flight=0"], ["fitness.max_tokens_in_flight=0"]),
    "negative evaluation.every": (["evaluation.every=-1"], ["evaluation.every=-1"]),
    "unknown evaluation data": (["evaluation.data=[wikitext3]"], ["'wikitext3'", "wikitext2"]),
    "held-out file is missing": (["+evaluation.files.wiki=none.txt"], ["none.txt", "does not exist"]),
    "WikiText's layout of no file": (["evaluation.wikitext=[wiki]"], ["'wiki'", "evaluation.files"]),
    "held-out file is named like another set": (
        ["+evaluation.files.python_docs=a.txt"],
        ["'python_docs'", "already the name of another data set"],
    ),
    "activations": (["level_db.activations=tape"], ["level_db.activations=tape", "disk"]),
    "tracker's mode": (["tracker=wandb", "tracker.mode=remote"], ["tracker.mode=remote", "offline"]),
    "negative seed": (["seed=-1"], ["seed=-1"]),
    "no threads": (["threads=0"], ["threads=0"]),
    "unknown data source": (["data.source=books"], ["data.source=books", "python_docs"]),
    "no files of text": (["data=text"], ["calibration", ".jsonl"]),
    "no model": (["model=local", "model.sequence_length=64"], ["model.path=DIR"]),
    "unknown builtin model": (["model.builtin=gpt5"], ["model.builtin=gpt5", "smollm2_135m"]),
    "a hub id with too many parts": (["model.path=a/b/c"], ["'a/b/c'", "not a folder"]),
    "a path that is too long": ([f"model.path={LONG}"], ["model.path=xxx", "File name too long", "give another"]),
    "a text file's name that is too long": (["data=text", f"data.calibration=[{LONG}.txt]"], ["data.calibration=xxx", "too long"]),
    "a database folder's name that is too long": ([f"level_db.root={LONG}"], ["level_db.root=xxx", "too long"]),
    "a user who is not there": (["model.path='~nosuchuser/model'"], ["~nosuchuser", "home directory"]),
    "a device that nothing runs on": (["model.device=meta"], ["'meta'", "auto, cpu, cuda"]),
    "sequences of one token": (["model.sequence_length=1"], ["model.sequence_length=1", "at least 2"]),
    "a separator that is no token": (["model.separator=nope"], ["'nope'", "no token", "eos"]),
    "groups of no columns": (["method.group_size=0"], ["group_size 0", "null"]),
    "no bit widths": (["method.levels=[]", "method.propagate_bits=null"], ["method.levels is empty", "[4, 3, 2]"]),
    "more bits than a byte": (["method.levels=[9,4,3]"], ["[9, 4, 3]", "1 to 8"]),
    "a bit width twice": (["method.levels=[4,4,3]"], ["[4, 4, 3]", "distinct"]),
    "no columns per block": (["method.block_size=0"], ["block_size 0", "positive"]),
    "scales of integers": (["method.scale_dtype=int8"], ["'int8'", "float16 or float32"]),
    "damping that is no number": (["method.damping=nan"], ["damping nan", "0.01"]),
    "a head without blocks": (["method.include=[head]"], ["method.include=['head']", "must name blocks"]),
    "a part that no model has": (["method.include=[blocks,tail]"], ["method.include=tail", "blocks, head, embedding"]),
    "infinite bits": (["bits=inf"], ["bits=inf", "6 bits"]),
    "another method's target": (["sparsity=0.5"], ["sparsity=0.5", "method quant", "leave it out"]),
    "no tokens per batch": (["level_db.batch_tokens=0"], ["level_db.batch_tokens=0", "at least 1"]),
    "a negative cache": (["level_db.cache_bytes=-1"], ["level_db.cache_bytes=-1", "0 bytes or more"]),
    "held out on no tokens": (["evaluation.every_tokens=0"], ["evaluation.every_tokens=0", "at least 2"]),
    "no search text": (["data.search_tokens=0"], ["data.search_tokens=0", "more tokens"]),
    "negative calibration text": (["data.calibration_tokens=-5"], ["data.calibration_tokens=-5"]),
    "no survivors": (["search.survivors=[0]", "search.tokens=[64]"], ["[0]", "descend to 1"]),
    "a billion offspring": (["search.num_offspring=1000000000"], ["search.num_offspring=1000000000", "at most 100000"]),
    "random baseline of one token": (["baselines.random_tokens=1"], ["baselines.random_tokens", "2 to 2048"]),
    "second pass decided by less than a sequence": (["scale.refine=true", "refine.tokens=63"], ["refine.tokens=63", "=64"]),
    "second pass decided by one token": (["scale.refine=true", "refine.tokens=1"], ["refine.tokens=1", "at least 2 tokens"]),
    "more tokens than the vocabulary": (["fitness=topk_kl", "fitness.k=1000"], ["fitness.k=1000", "257"]),
    "no questions of a task": (["evaluation.task_limit=0"], ["evaluation.task_limit=0", "null"]),
    "no sequences per batch of a task": (["evaluation.task_batch_size=0"], ["evaluation.task_batch_size=0", "at least 1"]),
    "a folder of tasks without tasks": (["evaluation.tasks_path=x"], ["evaluation.tasks_path=x", "name tasks"]),
    "no stages": (["stages=[]"], ["stages is empty", "database, baselines"]),
    "more threads than a machine has": (["threads=100000"], ["threads=100000", "1 to 1024", "null"]),
    "a run folder that is a file": (["hydra.run.dir=/dev/null/run"], ["hydra.run.dir=/dev/null/run", "/dev/null is no folder"]),
    "an unknown rule for BOS": (["model.bos=maybe"], ["model.bos=maybe", "auto, true, false"]),
    "a BOS that the tokenizer lacks": (["model.bos=true"], ["model.bos=true", "model.bos=auto"]),
    "a genome that is no file": (["genome=none.txt"], ["'none.txt'", "neither a file", "uniform_3 or dp"]),
    "a genome of an empty folder": (["genome=/dev"], ["'/dev'", "genome.json", "one word per block"]),
    "no genome": (["genome=''"], ["genome is empty", "leave it out"]),
    "a genome, and only a search": (["genome=dp", "stages=[search]"], ["genome=dp", "replaces the search", "[evaluate]"]),
    "a start that is no file": (["search.starts=[dp,none.json]"], ["search.starts has 'none.json'", "neither a file"]),
    "a key that no schema has": (["+search.offspring=4"], ["search.offspring", "search.num_offspring"]),
}


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("case", SETTINGS)
def test_settings_are_refused_before_any_model_is_loaded(
    case: str, tiny: Callable[..., Any], listed: Callable[..., None], tmp_path: Path
) -> None:
    arguments, parts = SETTINGS[case]
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("genome.json", "metrics.jsonl", "result.json"):
        (folder / name).write_text("of an earlier run", encoding="utf-8")
    listed(f"quant: {case}", " ".join(arguments), refused(tiny(*arguments), *parts))
    for name in ("genome.json", "metrics.jsonl", "result.json"):
        assert (folder / name).read_text(encoding="utf-8") == "of an earlier run"


SPARSITY = {
    "sparsity of 0": (["sparsity=0"], ["sparsity=0 ", "between 0 and 1"]),
    "sparsity of 1": (["sparsity=1"], ["sparsity=1 ", "between 0 and 1"]),
    "sparsity above 1": (["sparsity=1.5"], ["sparsity=1.5"]),
    "negative sparsity": (["sparsity=-0.1"], ["sparsity=-0.1"]),
    "sparsity is nan": (["sparsity=nan"], ["sparsity=nan"]),
    "no sparsity": (["sparsity=null"], ["give sparsity=0.7"]),
    "a sparsity that keeps nothing": (["sparsity=0.9999"], ["sparsity=0.9999", "2048 weights"]),
    "a step larger than any unit": (["method.step=5000"], ["method.step=5000", "at most 1024", "null"]),
    "no step": (["method.step=0"], ["method.step=0", "at least 1"]),
    "no levels": (["method.num_levels=0"], ["method.num_levels=0", "at least 1"]),
    "damping": (["method.damping=1"], ["damping", "0.01"]),
    "no columns per block": (["method.block_size=0"], ["block_size"]),
    "unknown compressor": (["method.compressor=random"], ["method.compressor=random", "sparsegpt, wanda, magnitude"]),
    "unknown recipe": (["method.recipe=worst"], ["method.recipe=worst", "paper, best"]),
    "OWL without Hessians": (["level_db.keep_hessians=false"], ["owl", "level_db.keep_hessians=true"]),
    "OWL outside the blocks": (
        ["method.include=[blocks,head]"],
        ["owl", "method.include=[blocks] only, not ['blocks', 'head']", "leave it out"],
    ),
    "OWL's tokens": (["baselines.owl_tokens=4096"], ["baselines.owl_tokens=4096", "calibration_tokens=1024"]),
    "a bound that allows no switch": (["search.max_level=0"], ["search.max_level=0", "at least 1"]),
    "a total that allows no switch": (["search.max_total_deviation=1"], ["search.max_total_deviation=1", "at least 2"]),
}


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("case", SPARSITY)
def test_sparsity_is_refused_before_any_model_is_loaded(case: str, sparse: Callable[..., Any], listed: Callable[..., None]) -> None:
    arguments, parts = SPARSITY[case]
    listed(f"sparsity: {case}", " ".join(arguments), refused(sparse(*arguments), *parts))


DROP = {
    "a granularity that is none": (["method.granularity=head"], ["method.granularity=head", "module, block, pair"]),
    "a block that is not there": (["method.exclude=[99]"], ["method.exclude has 99", "0 to 1"]),
    "a name that is no unit": (["method.exclude=[nothing.*]"], ["'nothing.*'", "model.layers.0.attention"]),
    "half a block": (["method.exclude=[1.5]"], ["1.5", "no unit"]),
    "trades that the exchange forbids": (["method.balanced=false"], ["method.balanced=false", "search.exchange=any"]),
    "nothing dropped": (["sparsity=0.01"], ["drops 0 of 2 blocks", "at least 0.5"]),
    "everything dropped": (["sparsity=1"], ["sparsity=1 ", "0.25"]),
    "a baseline of weights": (["baselines.names=[owl]"], ["'owl'", "method drop", "shortgpt"]),
    "no exhaustive search": (["baselines.exhaustive_limit=0"], ["baselines.exhaustive_limit=0", "at least 1"]),
    "scores on one token": (
        ["baselines.importance_tokens=1", "baselines.names=[shortgpt]"],
        ["baselines.importance_tokens=1", "one sequence (64)"],
    ),
    "another method's target": (["bits=3"], ["bits=3", "method drop", "leave it out"]),
}


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("case", DROP)
def test_depth_pruning_is_refused_before_any_model_is_loaded(
    case: str, evopress: Callable[..., Any], listed: Callable[..., None]
) -> None:
    arguments, parts = DROP[case]
    outcome = evopress("+method=drop", "sparsity=0.5", "+debug=tiny", "hydra.run.dir=run", *arguments)
    listed(f"drop: {case}", " ".join(arguments), refused(outcome, *parts))


@pytest.mark.usefixtures("no_model")
def test_no_method(evopress: Callable[..., Any]) -> None:
    refused(evopress("bits=2.5", "+debug=tiny", "hydra.run.dir=run"), "no method was chosen", "+method=quant")


COMMANDS = {
    # what Hydra would refuse in words of its own
    "a method that is none": (["+method=spqr"], ["method=spqr", "drop, experts, gguf, joint, quant, sparsity"]),
    "a method without a name": (["method=", "bits=2.5"], ["method= names no option", "+method=sparsity"]),
    "two methods": (["+method=quant", "+method=drop"], ["method is chosen twice"]),
    "two methods in one": (["+method=quant,drop"], ["several values", "-m"]),
    "a misspelt key": (["+method=quant", "bit=2.5"], ["bit is no setting", "did you mean bits?"]),
    "a misspelt key of a group": (["+method=quant", "search.generation=5"], ["search.generation is", "search.generations"]),
    "a key without its group": (["+method=quant", "calibration_tokens=5"], ["data.calibration_tokens"]),
    "a key of another method": (
        ["+method=quant", "bits=3.5", "method.granularity=block"],
        ["method.granularity is a setting, but not of the method that was chosen", "leave it out"],
    ),
    "a key that is like no other": (["+method=quant", "zebra=5"], ["zebra is no setting", "--help"]),
    "bits that are a word": (["+method=quant", "bits=some"], ["bits=some", "a number"]),
    "no number of bits": (["+method=quant", "bits="], ["bits= is out of range", "a number"]),
    "bits with a comma": (["+method=quant", "bits=2,5"], ["bits=2,5", "-m", "bits=2.5"]),
    "a seed that is half": (["+method=quant", "seed=1.5"], ["seed=1.5", "a whole number"]),
    "a switch that is neither": (["+method=quant", "dry_run=maybe"], ["dry_run=maybe", "true or false"]),
    "nothing where something must be": (["+method=quant", "seed=null"], ["seed=null", "must have a value"]),
    "one value for a list": (["+method=quant", "stages=export"], ["stages=export is not a list", "'stages=[export]'"]),
    "a list that a shell took apart": (["+method=quant", "stages=[search,", "export]"], ["not closed", "without spaces"]),
    "a model by its folder": (["+method=quant", "model=/models/a"], ["model=/models/a", "model.path=/models/a"]),
    "a model that is none": (["+method=quant", "model=llama9"], ["model=llama9 is not there", "smollm2_135m, smollm3_3b, tiny"]),
    "a path with brackets": (["+method=quant", "model.path=/a(1)"], ["model.path=/a(1)", "write 'model.path=\"/a(1)\"'"]),
    "a word": (["quant"], ["'quant' is no setting", "key=value"]),
    "a flag": (["--bits", "2.5"], ["--bits is no flag", "bits=..."]),
    "a flag with its value": (["--method=quant"], ["--method=quant is no flag", "+method=quant"]),
    "a setting taken away": (["+method=quant", "~search.tokens"], ["~search.tokens", "--help"]),
}


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("case", COMMANDS)
def test_commands_are_refused_in_our_words(
    case: str, evopress: Callable[..., Any], listed: Callable[..., None], tmp_path: Path
) -> None:
    arguments, parts = COMMANDS[case]
    outcome = evopress(*arguments, "+debug=tiny", "hydra.run.dir=run")
    listed(f"command: {case}", " ".join(arguments), refused(outcome, *parts))
    assert "base_" not in outcome.text and "HYDRA_FULL_ERROR" not in outcome.text
    assert not (tmp_path / "run").exists()


@pytest.fixture
def checkpoint(tiny_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Return a checkpoint that a test may spoil: its config changed, its weights left out."""

    def copy(*, weights: bool = True, **config: object) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(tiny_folder(), folder)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | config), encoding="utf-8")
        if not weights:
            (folder / "model.safetensors").unlink()
        return folder

    return copy


def config_of(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")

    return change


def content_of(name: str, content: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return change


def without_weights(name: str, content: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(content)

    return change


def index_of_elsewhere(folder: Path) -> None:
    without_weights("a.safetensors", b"")(folder)
    (folder / "model.safetensors.index.json").write_bytes(b'{"weight_map": {"lm_head.weight": "../other.safetensors"}}')


def stored_as_float8(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    save_file(weights | {name: weights[name].to(torch.float8_e4m3fn)}, folder / "model.safetensors", metadata={"format": "pt"})


CHECKPOINTS: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "pickled weights": (without_weights("pytorch_model.bin", b"\x80\x04."), ["pytorch_model.bin", "run code", "safetensors"]),
    "an index that leads elsewhere": (index_of_elsewhere, ["'../other.safetensors'", "fetch"]),
    "a config that is no JSON": (content_of("config.json", b"{"), ["config.json", "not valid JSON"]),
    "a config that is deep": (content_of("config.json", b"[" * 9999), ["config.json", "levels deep"]),
    "a config that is a list": (content_of("config.json", b"[]"), ["config.json", "not a JSON object"]),
    "a config with a key twice": (content_of("config.json", b'{"a": 1, "a": 2}'), ["'a' is there twice"]),
    "a trillion layers": (config_of(num_hidden_layers=10**12), ["num_hidden_layers=1000000000000", "1 to 1024"]),
    "a width that is no number": (config_of(hidden_size="32"), ["hidden_size='32'", "whole number"]),
    "an architecture that is none": (config_of(model_type="t5"), ["'t5' is no causal language model", "transformers"]),
    "weights that are quantized": (config_of(quantization_config="gguf"), ["already quantized ('gguf')"]),
    "weights that are quantized, by another key": (
        config_of(compression_config={"bits": 4}),
        ["already quantized", "compression_config"],
    ),
    "weights that are quantized, by a file": (
        content_of("hf_quant_config.json", b"{}"),
        ["already quantized (hf_quant_config.json)"],
    ),
    "weights that are quantized, by their tensors": (stored_as_float8, ["already quantized", "down_proj.weight", "F8_E4M3"]),
    "an adapter beside the weights": (content_of("adapter_config.json", b"{}"), ["LoRA adapter (adapter_config.json)", "merge it"]),
    "a tokenizer that is no JSON": (content_of("tokenizer.json", b"{"), ["tokenizer", "fetch the checkpoint again"]),
}


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoints_are_refused_before_they_are_loaded(
    case: str, tiny: Callable[..., Any], checkpoint: Callable[..., Path], listed: Callable[..., None]
) -> None:
    spoil, parts = CHECKPOINTS[case]
    folder = checkpoint()
    spoil(folder)
    listed(f"checkpoint: {case}", f"model.path={folder}", refused(tiny(f"model.path={folder}"), *parts))


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("model_type", ["unheard-of", ""])
def test_an_architecture_that_is_unknown(model_type: str, tiny: Callable[..., Any], checkpoint: Callable[..., Path]) -> None:
    refused(tiny(f"model.path={checkpoint(model_type=model_type)}"), f"{model_type!r} is unknown to transformers")


@pytest.mark.usefixtures("no_model")
def test_a_model_path_without_weights(tiny: Callable[..., Any], checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint(weights=False)
    refused(tiny(f"model.path={folder}"), str(folder), "no weights", "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused(tiny(f"model.path={folder}"), "pickled", "pytorch_model.bin", "safetensors")
    (folder / "config.json").unlink()
    refused(tiny(f"model.path={folder}"), "no config.json")


@pytest.mark.usefixtures("no_model")
def test_a_model_path_that_does_not_exist(tiny: Callable[..., Any], tmp_path: Path) -> None:
    refused(tiny(f"model.path={tmp_path / 'nowhere'}"), "nowhere", "not a folder")
    (tmp_path / "file").write_text("x")
    refused(tiny(f"model.path={tmp_path / 'file'}"), "not a folder")


@pytest.mark.usefixtures("no_model")
def test_a_model_that_is_already_quantized(tiny: Callable[..., Any], checkpoint: Callable[..., Path]) -> None:
    refused(tiny(f"model.path={checkpoint(quantization_config={'quant_method': 'awq'})}"), "already quantized (awq)")


@pytest.mark.usefixtures("no_model")
def test_a_model_without_a_tokenizer(tiny: Callable[..., Any], checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    for path in folder.glob("tokenizer*"):
        path.unlink()
    refused(tiny(f"model.path={folder}"), "tokenizer", str(folder))


def test_weights_that_are_cut_off(tiny: Callable[..., Any], checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(tiny(f"model.path={folder}"), str(folder), "could not be loaded")


@pytest.mark.usefixtures("no_model")
def test_a_config_that_may_have_to_be_cut_with_the_blocks(evopress: Callable[..., Any], checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint(kv_heads_per_layer=[1, 1])
    outcome = evopress("+method=drop", "sparsity=0.5", "+debug=tiny", f"model.path={folder}", "hydra.run.dir=run")
    refused(outcome, "kv_heads_per_layer=[1, 1]", "one entry per block, of 2 blocks", "leave export out")


TEXTS: dict[str, tuple[str, bytes, list[str], list[str]]] = {
    # file, content, further arguments, parts of the sentence
    "too little text": (
        "a.txt",
        PROSE.encode(),
        ["data.calibration_tokens=100000"],
        ["calibration split of text has", "1562 sequences of 64"],
    ),
    "too little for the search": ("a.txt", PROSE.encode(), ["data.search_tokens=100000"], ["search split of text has"]),
    "too little to evaluate": (
        "a.txt",
        PROSE.encode(),
        ["data.search_tokens=1024", "data.evaluation_tokens=100000"],
        ["evaluation split of text has"],
    ),
    "an empty file": ("a.txt", b"", [], ["a.txt", "empty"]),
    "a file of white space": ("a.txt", b" \n\n ", [], ["a.txt", "no text"]),
    "not UTF-8": ("a.txt", "Grüße ".encode("latin-1") * 500, [], ["a.txt", "UTF-8", "byte 2"]),
    "a suffix we do not read": ("a.pdf", b"%PDF", [], ["a.pdf", ".jsonl"]),
    "no such field": ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', [], ["line 2", "'text'", "body"]),
    "the field named wrongly": ("a.jsonl", b'{"text": "x"}\n', ["data.field=content"], ["'content'", "text"]),
    "no JSON": ("a.jsonl", b'{"text": "x"}\n{"text": \n', [], ["line 2", "JSON"]),
    "a JSON list": ("a.jsonl", b'["text"]\n', [], ["line 1", "no JSON object"]),
    "half a surrogate pair": ("a.jsonl", b'{"text": "\\ud800"}\n', [], ["line 1", "surrogate", "leave it out"]),
    "brackets without end": ("a.jsonl", b'{"text": ' + b"[" * 9999, [], ["line 1", "no JSON object"]),
    "a chat without a template": (
        "a.jsonl",
        b'{"messages": [{"role": "user", "content": "x"}]}\n' * 9,
        [],
        ["is a chat", "no chat template", "data.chat_template=FILE"],
    ),
    "an entry that is no text": ("a.json", b"[1]", [], ["entry 1", "no JSON object"]),
    "no gzip": ("a.jsonl.gz", b"not packed", [], ["a.jsonl.gz", "cannot be unpacked"]),
    "no Parquet": ("a.parquet", b"PAR1 and so on", [], ["a.parquet", "Parquet"]),
}


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("case", TEXTS)
def test_text_is_refused_before_any_model_is_loaded(
    case: str, tiny: Callable[..., Any], listed: Callable[..., None], tmp_path: Path
) -> None:
    name, content, arguments, parts = TEXTS[case]
    (tmp_path / name).write_bytes(content)
    files = [f"data.{split}=[{name}]" for split in ("calibration", "search", "evaluation")]
    sentence = refused(tiny("data=text", *files, *arguments), *parts)
    listed(f"text: {case}", " ".join(["data=text", *files, *arguments]), sentence)
    assert (tmp_path / name).read_bytes() == content


@pytest.mark.usefixtures("no_model")
def test_a_text_file_that_is_missing(tiny: Callable[..., Any]) -> None:
    refused(tiny("data=text", "data.calibration=[none.jsonl]", "data.evaluation=[b.txt]"), "none.jsonl", "does not exist")


@pytest.mark.usefixtures("no_model")
def test_what_is_held_out_is_not_trained_on(tiny: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(PROSE, encoding="utf-8")
    (tmp_path / "b.txt").write_text(PROSE.upper(), encoding="utf-8")
    (tmp_path / "copy.txt").write_text(PROSE, encoding="utf-8")
    outcome = tiny("data=text", "data.calibration=[a.txt]", "data.evaluation=[b.txt]", "+evaluation.files.other=copy.txt")
    refused(outcome, "'other'", "which is also a", "give another one")


@pytest.mark.usefixtures("no_model")
def test_a_database_folder_that_is_read_only(tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    refused(tiny(f"level_db.root={tmp_path / 'file' / 'levels'}"), "levels", "cannot be written")
    assert (tmp_path / "file").read_text() == "mine"

    def read_only(dir: Path, **options: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("evopress.files.tempfile.TemporaryFile", read_only)
    refused(tiny(f"level_db.root={tmp_path / 'levels'}"), "cannot be written", "Read-only file system", "choose a folder")


DiskUsage = namedtuple("DiskUsage", "total used free")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="takes /proc for a folder that nobody may write to")
@pytest.mark.parametrize(
    ("cwd", "arguments", "parts"),
    [
        ("/proc", [], ["no run folder can be made, /proc may not be written to", "hydra.run.dir=DIR"]),
        ("/proc", ["-m", "seed=0,1"], ["no run folder can be made, /proc may not be written to", "hydra.sweep.dir=DIR"]),
        (".", ["hydra.run.dir=/proc/run"], ["hydra.run.dir=/proc/run cannot be made, /proc may not be written to"]),
        (".", ["-m", "seed=0,1", "hydra.sweep.dir=/proc/s"], ["hydra.sweep.dir=/proc/s cannot be made", "choose another"]),
        (".", ["-m", "seed=0,1", "hydra.sweep.dir=s", "hydra.sweep.subdir=taken"], ["s/taken cannot be written (File exists)"]),
    ],
)
def test_where_no_folder_can_be_made(
    cwd: str, arguments: list[str], parts: list[str], evopress_in: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "taken").write_text("a file, where the job's folder should be")
    refused(evopress_in(tmp_path / cwd, *arguments, "+method=quant", "bits=3.5", "+debug=tiny"), *parts)


@pytest.mark.parametrize("key", ["hydra.run.dir", "hydra.sweep.dir", "paths.cache", "level_db.root", "model.path"])
def test_an_empty_path_is_not_the_working_directory(key: str, tiny: Callable[..., Any], tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    refused(tiny(f"{key}="), f"{key}= names no path", "give one")
    assert [path for path in sorted(tmp_path.iterdir()) if path not in before and path.name in (".hydra", "levels", ".lock")] == []


def test_what_runs_nothing_needs_no_folder(evopress_in: Callable[..., Any]) -> None:
    assert evopress_in(Path("/proc" if Path("/proc/self").exists() else "/"), "--cfg", "job", "+method=quant").code == 0


def test_a_disk_without_room_for_the_database(tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: DiskUsage(10**9, 10**9 - 1000, 1000))
    refused(tiny(f"level_db.root={tmp_path / 'levels'}"), "of disk (database ", "has 1 kB free", "level_db.root")
    assert not list((tmp_path / "levels").rglob("*.safetensors"))


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device (os error 28)")],
    ids=["OSError", "SafetensorError"],
)
def test_a_disk_that_fills_up_while_the_database_is_built(
    error: Exception, tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evopress.levels import store

    calls = 0
    save_file = store.save_file

    def fill(tensors: Any, path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise error
        save_file(tensors, path)

    root = tmp_path / "levels"
    with monkeypatch.context() as patch:
        patch.setattr(store, "save_file", fill)
        sentence = refused(tiny(f"level_db.root={root}", "stages=[database]"), "disk is full", "block-001")
    assert "start the same command again" in sentence
    assert not list(root.rglob("manifest.json"))
    assert len(list(root.rglob("block-*.safetensors"))) == 1
    again = tiny(f"level_db.root={root}", "stages=[database]")
    assert again.code == 0, again.text
    assert "1 of 2 blocks to build" in again.text
    assert re.search(r"levels, \d+\.?\d* kB on disk, about \d+\.?\d* [kM]B of memory", again.text), again.text


@pytest.mark.parametrize("damage", ["a flipped bit", "cut off", "missing", "manifest"])
def test_a_damaged_database_is_named_and_rebuilt(damage: str, tiny: Callable[..., Any], tmp_path: Path) -> None:
    root = tmp_path / "levels"
    arguments = (f"level_db.root={root}", "stages=[database]")
    assert tiny(*arguments).code == 0
    whole = {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and path.suffix != ".lock"}
    (path,) = root.rglob("manifest.json" if damage == "manifest" else "block-001.safetensors")
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "cut off":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    outcome = tiny(*arguments)
    assert outcome.code == 0, outcome.text
    assert outcome.errors == []
    warning = next(line for line in outcome.text.splitlines() if path.name in line)
    assert "built again" in warning
    result = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert result["database"]["reused"] is False
    assert {path: path.read_bytes() for path in whole} == whole
    assert " reused " in tiny(*arguments).text


@pytest.mark.usefixtures("no_model")
def test_resuming_a_folder_that_is_no_run(evopress: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "nowhere"):
        refused(evopress(f"resume={folder}"), f"resume={folder} is not a run folder", "overrides.yaml")
    assert list((tmp_path / "empty").iterdir()) == []
    assert not (tmp_path / "nowhere").exists()


def test_a_run_that_is_resumed_with_bad_settings_keeps_its_own(
    tiny: Callable[..., Any], evopress: Callable[..., Any], tmp_path: Path
) -> None:
    assert tiny("stages=[database,search]").code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file() and path.suffix != ".log"}
    refused(evopress("resume=run", "bits=99"), "bits=99")
    assert {path: path.read_bytes() for path in before} == before
    assert evopress("resume=run", "stages=[search]").code == 0


def test_a_run_goes_on_with_its_own_search_only(tiny: Callable[..., Any], evopress: Callable[..., Any], tmp_path: Path) -> None:
    assert tiny("stages=[database,search]").code == 0
    genome = (tmp_path / "run" / "genome.json").read_bytes()
    refused(evopress("resume=run", "search.num_offspring=5"), "other settings", "num_offspring 4 there, 5 here")
    refused(evopress("resume=run", "model.group_size=32", "stages=[search]"), "level database")
    assert (tmp_path / "run" / "genome.json").read_bytes() == genome


def test_exporting_what_was_never_found(tiny: Callable[..., Any]) -> None:
    refused(tiny("stages=[database,export]"), "no genome.json", "search")


def edited(name: str, **values: object) -> Callable[[Path], None]:
    """Change values of a JSON file of a run folder as a version wrote it that sealed none."""

    def change(folder: Path) -> None:
        path = folder / name
        document = json.loads(path.read_text(encoding="utf-8")) | values
        document.pop("digest", None)
        path.write_text(json.dumps(document), encoding="utf-8")

    return change


def of_another_digit(name: str) -> Callable[[Path], None]:
    """Change a level of the first genome in a JSON file."""

    def change(folder: Path) -> None:
        text = (folder / name).read_text(encoding="utf-8")
        changed = (
            re.sub(r"(?<=\[)2(?=, )", "1", text, count=1) if "[2, " in text else re.sub(r"(?<=\[)\d(?=, )", "2", text, count=1)
        )
        assert changed != text
        (folder / name).write_text(changed, encoding="utf-8")

    return change


RUN_FILES: dict[str, tuple[Callable[[Path], None], str, list[str]]] = {
    # what is done to the folder of a whole run, the stage that is run again, parts of the sentence
    "a newer search": (edited("state.json", schema=2), "search", ["state.json has schema 2", "update evopress"]),
    "an older search": (edited("state.json", schema=0), "search", ["state.json has schema 0", "older", "remove it"]),
    "a search cut off": (content_of("state.json", b'{"schema": 1'), "search", ["state.json", "not valid JSON", "remove it"]),
    "a search changed by hand": (of_another_digit("state.json"), "search", ["state.json is damaged, or was changed by hand"]),
    "baselines changed by hand": (of_another_digit("baselines.json"), "evaluate", ["baselines.json is damaged, or was changed by"]),
    "a search without its numbers": (edited("state.json", evolution={}), "search", ["state.json", "no schema number", "remove it"]),
    "records that are damaged": (
        content_of("metrics.jsonl", b'{"a": 1}\n'),
        "report",
        ["record 1", "metrics.jsonl", "search again"],
    ),
    "records that are no JSON": (content_of("metrics.jsonl", b"x\ny\n"), "report", ["line 1", "metrics.jsonl", "remove it"]),
    "a newer genome": (edited("genome.json", schema=7), "export", ["genome.json has schema 7", "update evopress"]),
    "another database's genome": (edited("genome.json", database="x"), "export", ["genome.json", "'x'", "build that database"]),
    "a genome of no units": (edited("genome.json", units=3), "export", ["genome.json is damaged", "write it again"]),
    "a genome that is a list": (content_of("genome.json", b"[]"), "export", ["genome.json", "no schema number"]),
    "baselines from elsewhere": (edited("baselines.json", further=["../../x"]), "evaluate", ["'../../x'", "remove it"]),
    "newer baselines": (edited("baselines.json", schema=2), "evaluate", ["baselines.json has schema 2", "update evopress"]),
    "baselines that are text": (edited("baselines.json", genomes={"dp": "low"}), "evaluate", ["'dp' is 'low'", "remove it"]),
    "a newer result": (edited("result.json", schema=2), "evaluate", ["result.json has schema 2", "update evopress"]),
    "a result of no rows": (edited("result.json", rows=[3]), "report", ["result.json is damaged", "remove it"]),
}


@pytest.mark.parametrize("case", RUN_FILES)
def test_files_of_a_run_folder_are_refused(
    case: str, finished: Any, evopress: Callable[..., Any], listed: Callable[..., None], tmp_path: Path
) -> None:
    change, stage, parts = RUN_FILES[case]
    shutil.copytree(finished.folder, tmp_path / "run")
    change(tmp_path / "run")
    arguments = ["resume=run", f"stages=[{stage}]"]
    listed(f"run folder: {case}", " ".join(arguments), refused(evopress(*arguments), *parts))


def names_of_cases() -> list[str]:
    tables: dict[str, Any] = {
        "quant": SETTINGS,
        "sparsity": SPARSITY,
        "drop": DROP,
        "command": COMMANDS,
        "checkpoint": CHECKPOINTS,
        "text": TEXTS,
        "run folder": RUN_FILES,
    }
    return [f"{kind}: {case}" for kind, table in tables.items() for case in table]


def test_the_list_has_every_case() -> None:
    """`python tests/reliability/list_bad_inputs.py` writes it."""
    text = (Path(__file__).parent.parent / "reliability" / "bad_inputs.md").read_text(encoding="utf-8")
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("| ")][2:]
    assert [row[0].strip() for row in rows] == names_of_cases()
    assert len(rows) >= 60
    assert len({row[1] for row in rows}) > 60
    assert all(len(row) == 3 and row[2].strip() for row in rows)
