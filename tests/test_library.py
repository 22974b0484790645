"""EvoPress as a library: the guide's example, the same genome as the program's, and a model that is given back as it was."""

from __future__ import annotations

import importlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from in_process import invoke
from transformers import AutoModelForCausalLM, AutoTokenizer

import evopress
from evopress import library, machine
from evopress.errors import EvoPressError
from evopress.models.tiny import ensure_tiny

GUIDE = Path(__file__).parents[1] / "docs" / "library.md"
SMALL = {
    "generations": 3,
    "num_offspring": 4,
    "survivors": [2, 1],
    "tokens": [64, 128],
    "initial_candidates": 4,
    "initial_tokens": 128,
}


def example() -> str:
    (block,) = re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return block


def test_the_guides_example_runs(
    tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights_digest: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"PATH": str(tiny_folder())}
    exec(compile(example(), str(GUIDE), "exec"), names)
    levels, found = names["levels"], names["found"]
    assert levels.space.cost(found.genome) <= 2.5 * levels.space.size
    untouched = AutoModelForCausalLM.from_pretrained(tiny_folder())
    assert weights_digest(names["network"]) == weights_digest(untouched)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    assert json.loads((tmp_path / "checkpoint" / "genome.json").read_text())["cost"] == levels.space.cost(found.genome)
    ids = torch.arange(32)[None] % 50
    assert not torch.allclose(exported(ids).logits, untouched(ids).logits, atol=1e-3)
    dense, at_genome = evopress.evaluate(levels, names["text"][40:60]), evopress.evaluate(levels, names["text"][40:60], found)
    assert dense.kl == 0.0 < at_genome.kl and dense.top1_agreement == 1.0
    assert len(example().splitlines()) <= 12


@pytest.mark.parametrize(
    ("method", "target", "settings"),
    [("quant", "bits=3.5", {"bits": 3.5, "group_size": 16}), ("sparsity", "sparsity=0.5", {"sparsity": 0.5})],
    ids=["quant", "sparsity"],
)
def test_the_program_finds_the_same_genome(
    method: str, target: str, settings: dict[str, Any], tmp_path: Path, text_of_tiny: Callable[..., Any]
) -> None:
    command = [
        f"+method={method}",
        target,
        "+debug=tiny",
        "search/strategy=evolution",
        "stages=[database,search,refine]",
        "refine.tokens=256",
        "evaluation.every=0",
        "seed=3",
        *(f"search.{key}={json.dumps(value).replace(' ', '')}" for key, value in SMALL.items()),
    ]
    done = invoke(*command, f"hydra.run.dir={tmp_path / 'run'}", cache=tmp_path / "cache", cwd=tmp_path)
    assert done.code == 0, done.text
    there = json.loads((tmp_path / "run" / "genome.json").read_text())

    cache = tmp_path / "cache"
    model = evopress.load_model("tiny", dtype="float32", device="cpu", sequence_length=64, cache=cache)
    text = text_of_tiny(model, cache)
    levels = evopress.build_levels(model, text.calibration, method=method, **settings)
    found = evopress.search(levels, text.search, seed=3, **SMALL)
    assert list(found.genome) == [unit["level"] for unit in there["units"]]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["fitness"] for record in found.records] == [record["fitness"] for record in records]
    at_file = evopress.evaluate(levels, text.search, tmp_path / "run" / "genome.json")
    assert at_file == evopress.evaluate(levels, text.search, found)
    refined = evopress.refine(levels, found, text.after_search(256))
    said = json.loads((tmp_path / "run" / "result.json").read_text())["refine"]
    assert (refined.blocks_kept, refined.kl_before, refined.kl_after) == (said["kept"], said["kl_before"], said["kl_after"])
    assert refined.kl_after < refined.kl_before


def test_the_rooms_that_share_a_name_with_the_library_are_both() -> None:
    code = (
        "import sys, evopress; from evopress.search.evolution import Evolution; import evopress.search.evolution as module; "
        "assert callable(evopress.search) and evopress.search.evolution is module and module.Evolution is Evolution; "
        "assert 'torch' not in sys.modules and set(evopress.__all__) <= {*dir(evopress), *evopress.__all__}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert all(
        callable(getattr(evopress, name))
        for name in ("Space", "build_levels", "evaluate", "export", "load_model", "refine", "search")
    )
    assert evopress.load_model is importlib.import_module("evopress.library").load_model
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        evopress.nothing  # noqa: B018


@pytest.fixture
def model(tiny_folder: Callable[..., Path]) -> Any:
    return evopress.load_model(tiny_folder(), dtype="float32", device="cpu", sequence_length=32)


def test_what_cannot_be_is_one_sentence(model: Any, tiny_folder: Callable[..., Path]) -> None:
    text = ["Some words to calibrate on. " * 40]
    with pytest.raises(
        EvoPressError, match=r"^method=quantum is unknown: choose one of quant, gguf, sparsity, drop, experts, joint$"
    ):
        evopress.build_levels(model, text, method="quantum", bits=3)
    with pytest.raises(EvoPressError, match=r"^method quant has no setting bit: choose among recipe, damping, "):
        evopress.build_levels(model, text, bits=3, bit=3)
    with pytest.raises(EvoPressError, match=r"method quant needs a target"):
        evopress.build_levels(model, text)
    with pytest.raises(EvoPressError, match=r"^the target takes no bits='3': expected float \| None$"):
        evopress.build_levels(model, text, bits="3")
    with pytest.raises(EvoPressError, match=r"^method quant takes no damping='much': expected float$"):
        evopress.build_levels(model, text, bits=3, damping="much")
    with pytest.raises(EvoPressError, match=r"^method quant takes no levels=4: expected "):
        evopress.build_levels(model, text, bits=3, levels=4)
    with pytest.raises(EvoPressError, match=r"^method quant takes no group_sizes=\{2: '16'\}: expected dict\[int, int\]$"):
        evopress.build_levels(model, text, bits=3, group_sizes={2: "16"})
    with pytest.raises(EvoPressError, match=r"^bits=3 and size=60MB are both given: leave one of them out$"):
        evopress.build_levels(model, text, bits=3, size="60MB")
    with pytest.raises(EvoPressError, match=r"^the text is a dict: give a list"):
        evopress.build_levels(model, {"text": text}, bits=3)
    with pytest.raises(EvoPressError, match=r"^the text has a list among its documents: give strings, or token ids, one int64"):
        evopress.build_levels(model, [[1, 2, 3]], bits=3)
    with pytest.raises(EvoPressError, match=r"^the text is one string: give a list"):
        evopress.build_levels(model, text[0], bits=3)
    with pytest.raises(EvoPressError, match=r"^the text has 5 tokens, which fill no sequence of 32: give more text"):
        evopress.build_levels(model, ["short"], bits=3)
    with pytest.raises(EvoPressError, match=r"^the token ids are torch\.float32 \[2, 2\]: give int64"):
        evopress.build_levels(model, torch.ones(2, 2), bits=3)
    with pytest.raises(EvoPressError, match=r"int64 \[4, 1\]: give .*, at least 2 tokens each"):
        model.sequences(torch.ones(4, 1, dtype=torch.int64))
    with pytest.raises(EvoPressError, match=r"^the token ids have -100: give ids of the model's tokenizer"):
        model.sequences(torch.full((2, 4), -100))
    with pytest.raises(EvoPressError, match=r"^the model has no tokenizer: give load_model\(model, tokenizer\)$"):
        evopress.load_model(AutoModelForCausalLM.from_pretrained(tiny_folder()))
    with pytest.raises(EvoPressError, match=r"is not a folder|not a folder: give"):
        evopress.load_model("/no/such/model")
    with pytest.raises(EvoPressError, match=r"^a tokenizer is given beside the name of a model"):
        evopress.load_model(tiny_folder(), model.tokenizer)
    with pytest.raises(
        EvoPressError,
        match=r"^dtype=bfloat16 and device=auto apply to a model that is loaded by name or path, but this one is already float32",
    ):
        evopress.load_model(model.model, model.tokenizer, dtype="bfloat16")
    with pytest.raises(EvoPressError, match=r"^load_model takes no offload='no': expected bool$"):
        evopress.load_model(tiny_folder(), offload="no")


def test_sequences_are_as_long_as_the_model_takes_them(tiny_folder: Callable[..., Path]) -> None:
    model = evopress.load_model(tiny_folder(), dtype="float32", device="cpu")
    positions = model.model.config.max_position_embeddings
    assert model.settings.sequence_length == positions
    levels = evopress.build_levels(model, torch.zeros(1, positions, dtype=torch.int64), method="drop", sparsity=0.5)
    with pytest.raises(EvoPressError, match=f"^model.sequence_length={positions + 1} is more than the {positions} positions"):
        evopress.evaluate(levels, torch.zeros(1, positions + 1, dtype=torch.int64))


def test_a_search_refuses_unknown_settings_and_too_little_text(model: Any) -> None:
    text = ["Some words to calibrate on. " * 40]
    levels = evopress.build_levels(model, text, bits=3, levels=(4, 3, 2))
    with pytest.raises(EvoPressError, match=r"^search has no setting offspring: choose among generations, num_offspring"):
        evopress.search(levels, text, offspring=3)
    with pytest.raises(EvoPressError, match=r"asks for a minibatch of 2048 tokens: expected 2 to "):
        evopress.search(levels, text, generations=2)
    with pytest.raises(EvoPressError, match=r"^search strategy guide is unknown|^strategy=guide is "):
        evopress.search(levels, text, strategy="guide")
    with pytest.raises(EvoPressError, match=r"^strategy guided has no setting round: choose among .*rounds"):
        evopress.search(levels, text, strategy={"name": "guided", "round": 1})
    with pytest.raises(EvoPressError, match=r"^search takes no tokens=\['64', 128\]: expected list\[int\]$"):
        evopress.search(levels, text, tokens=["64", 128])
    with pytest.raises(EvoPressError, match=r"^search takes no seed='0': expected int$"):
        evopress.search(levels, text, **SMALL, seed="0")
    with pytest.raises(EvoPressError, match=r"^the genome has 1 levels but the level database has 14 units"):
        evopress.evaluate(levels, text, (0,))
    with pytest.raises(EvoPressError, match=r"^the genome is a int: give a level for each unit"):
        evopress.evaluate(levels, text, 3)
    with pytest.raises(EvoPressError, match=r"^format=\['mlx'\] is no name: give one, such as format='mlx'$"):
        evopress.export(levels, (0,) * 14, "nowhere", format=["mlx"])


def test_what_no_generation_measured_has_no_fitness(model: Any) -> None:
    text = ["Some words to calibrate on. " * 40]
    levels = evopress.build_levels(model, text, bits=3, levels=(4, 3, 2), group_size="auto")
    found = evopress.search(levels, text, **(SMALL | {"generations": 0}))
    assert found.genome == levels.space.uniform("3 bits") and math.isnan(found.fitness)
    guided = {"name": "guided", "rounds": 5, "attribution_tokens": 128, "attribution_sequences": 4, "screen_tokens": 64}
    found = evopress.search(levels, text, strategy=guided)
    assert found.fitness == next(each["fitness"] for each in reversed(found.records) if each["fitness"] is not None)


def test_guided_searches_by_its_name(model: Any) -> None:
    text = ["Some words to calibrate on, and a few more of them. " * 40]
    levels = evopress.build_levels(model, text, bits=3, levels=(4, 3, 2))
    guided = {"name": "guided", "rounds": 1, "attribution_tokens": 128, "attribution_sequences": 4, "screen_tokens": 64}
    found = evopress.search(levels, text, strategy=guided, starts=["dp"])
    assert levels.space.cost(found.genome) <= 3 * levels.space.size and len(found.records) == 2


def test_modules_are_dropped_by_the_same_calls(model: Any, tmp_path: Path) -> None:
    text = ["Some words to calibrate on, and a few more of them. " * 40]
    levels = evopress.build_levels(model, text, method="drop", sparsity=0.5)
    found = evopress.search(levels, text, folder=tmp_path / "run", **(SMALL | {"generations": 2}))
    assert levels.space.cost(found.genome) == 2 and (tmp_path / "run" / "genome.json").exists()
    tokenizer: Any = AutoTokenizer.from_pretrained(model.source.folder)
    assert evopress.evaluate(levels, text, found).num_tokens == len(tokenizer(text[0])["input_ids"]) // 32 * 31
    few, before = SMALL | {"generations": 2}, (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(EvoPressError, match=r"^the search in .*run had other settings \(seed 0 there, 1 here\)"):
        evopress.search(levels, text, seed=1, folder=tmp_path / "run", **few)
    with pytest.raises(EvoPressError, match=r"had other settings \(search text "):
        evopress.search(levels, ["Other words than those that it had. " * 60], folder=tmp_path / "run", **few)
    assert evopress.search(levels, text, folder=tmp_path / "run", **few).genome == found.genome
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["folder", "file"])
def test_what_is_no_export_stays(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder" / "thesis.txt", tmp_path / "file"):
        path.write_text("years of work")
    with pytest.raises(
        EvoPressError, match=r"exists and is not an export of evopress, so it is not overwritten: give another folder"
    ):
        evopress.export(SimpleNamespace(), (), tmp_path / name)  # type: ignore[arg-type]
    assert (tmp_path / "folder" / "thesis.txt").read_text() == (tmp_path / "file").read_text() == "years of work"


def test_a_model_that_was_changed_since_is_refused(tiny_folder: Callable[..., Path], tokens: Any, tmp_path: Path) -> None:
    network, ids = AutoModelForCausalLM.from_pretrained(tiny_folder()), tokens(8, 32)
    model = evopress.load_model(network, AutoTokenizer.from_pretrained(tiny_folder()))
    levels = evopress.build_levels(model, ids, bits=3.0, levels=[4, 3, 2], folder=tmp_path)
    with torch.no_grad():
        network.get_input_embeddings().weight.mul_(3.0)
    for call in (
        lambda: evopress.build_levels(model, ids, bits=3.0, levels=[4, 3, 2], folder=tmp_path),
        lambda: evopress.search(levels, ids),
        lambda: evopress.evaluate(levels, ids),
        lambda: evopress.export(levels, (0,) * len(levels.space), tmp_path / "out"),
    ):
        with pytest.raises(EvoPressError, match="changed since load_model: call load_model"):
            call()


def test_what_was_found_on_other_levels_is_refused(tiny_folder: Callable[..., Path], tokens: Any, tmp_path: Path) -> None:
    ids = tokens(8, 32)
    model = evopress.load_model(str(tiny_folder()), dtype="float32", device="cpu", sequence_length=32)
    one, other = (evopress.build_levels(model, ids, bits=3.0, levels=levels) for levels in ([4, 3, 2], [5, 4, 2]))
    numbers = {**SMALL, "generations": 1, "tokens": [32, 64], "initial_tokens": 64}
    found = evopress.search(one, ids, **numbers)
    assert evopress.evaluate(one, ids, found).kl > 0
    for call in (lambda: evopress.evaluate(other, ids, found), lambda: evopress.export(other, found, tmp_path / "out")):
        with pytest.raises(EvoPressError, match="the search was on other levels than these"):
            call()
    with pytest.raises(EvoPressError, match=r"Levels given where Model is expected: give what load_model returns"):
        evopress.build_levels(one, ids, bits=3.0)  # type: ignore[arg-type]


def test_half_of_a_surrogate_pair_is_one_sentence_and_the_separator_is_a_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = evopress.load_model("tiny", dtype="float32", device="cpu", sequence_length=32, cache=tmp_path)
    with pytest.raises(EvoPressError, match="an unpaired surrogate"):
        model.sequences(["a text", "\ud800 another"])
    monkeypatch.setattr("evopress.models.opening.ensure_smollm2", ensure_tiny)  # the default model is neither fetched nor converted
    assert evopress.load_model("smollm2_135m", cache=tmp_path).settings.separator == "<|endoftext|>"
    assert evopress.load_model("smollm2_135m", cache=tmp_path, separator=None).settings.separator is None


def test_products_are_exact_here_and_left_as_they_were() -> None:
    """Levels of another precision would be taken for these."""
    torch.set_float32_matmul_precision("high")
    seen: list[str] = []
    before = machine.precision()
    try:
        with machine.exactly():
            seen.append(machine.precision())
        assert machine.precision() == before
    finally:
        torch.set_float32_matmul_precision("highest")
    assert "float32 products highest, TF32 off, sums of half-precision products float32" in seen[0] and "high," in before
    assert all(hasattr(getattr(library, name), "__wrapped__") for name in ("build_levels", "search", "evaluate", "export"))
