"""Any genome is evaluated, exported and reported: the best so far of a search that was cut off, files, baselines."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from evopress.finished import FINISHED
from evopress.fitness.minibatch import MinibatchFitness
from evopress.run_folder import kept_overrides

FEW = "baselines.names=[]"


def row(folder: Path, name: str) -> dict[str, Any]:
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    found: list[dict[str, Any]] = [row for row in result["rows"] if row["name"] == name]
    assert len(found) == 1, [row["name"] for row in result["rows"]]
    return found[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def copied(finished: Any, tmp_path: Path) -> Path:
    """A whole run, which a test may change; its settings come back with resume."""
    return Path(shutil.copytree(finished.folder, tmp_path / "run"))


@pytest.fixture
def cut_off(tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[int], Path]:
    """Interrupt a run's search in its so-manieth evaluation, and return its folder."""

    def run(at: int) -> Path:
        original, calls = MinibatchFitness.__call__, itertools.count()

        def stop(*arguments: Any, **options: Any) -> Any:
            if next(calls) == at:
                raise KeyboardInterrupt
            return original(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(MinibatchFitness, "__call__", stop)
            assert tiny(FEW, "evaluation.every=0").code == 130
        return tmp_path / "run"

    return run


@pytest.mark.parametrize(("at", "generations"), [(1, 0), (5, 2)])
def test_the_best_so_far_of_an_interrupted_search_is_exported(
    at: int, generations: int, cut_off: Callable[[int], Path], evopress: Callable[..., Any]
) -> None:
    folder = cut_off(at)
    assert not (folder / "genome.json").exists()
    outcome = evopress(f"resume={folder}", "stages=[export]")
    assert outcome.code == 0, outcome.text
    assert f"interrupted after generation {generations}; its best genome so far" in outcome.text
    parent = json.loads((folder / "state.json").read_text(encoding="utf-8"))["evolution"]["parent"]
    exported = json.loads((folder / "checkpoint" / "genome.json").read_text(encoding="utf-8"))
    assert [unit["level"] for unit in exported["units"]] == parent
    assert (folder / "checkpoint" / "model.safetensors").is_file()
    assert evopress(f"resume={folder}", "stages=[evaluate]").code == 0
    assert row(folder, "evopress")["kl"] > 0


def test_the_search_goes_on_as_if_nothing_had_been_exported(
    cut_off: Callable[[int], Path], evopress: Callable[..., Any], finished: Any
) -> None:
    folder = cut_off(3)
    assert evopress(f"resume={folder}", "stages=[export]").code == 0
    outcome = evopress(f"resume={folder}", "stages=[search,export]")
    assert outcome.code == 0 and "resuming at generation 2" in outcome.text, outcome.text
    assert (folder / "genome.json").read_bytes() == (finished.folder / "genome.json").read_bytes()
    assert (folder / "checkpoint" / "genome.json").read_bytes() == (finished.folder / "genome.json").read_bytes()


def test_a_search_without_a_generation_has_nothing_to_export(cut_off: Callable[[int], Path], evopress: Callable[..., Any]) -> None:
    outcome = evopress(f"resume={cut_off(0)}", "stages=[export]")
    assert outcome.code == 1
    assert "no genome.json" in outcome.errors[0] and "genome=FILE" in outcome.errors[0]


def test_longer_searches_that_are_cut_off_export_the_newer_genome(copied: Path, evopress: Callable[..., Any]) -> None:
    state = json.loads((copied / "state.json").read_text(encoding="utf-8"))
    parent = state["evolution"]["parent"]
    give, take = next((i, j) for i, j in itertools.permutations(range(len(parent)), 2) if parent[i] == 3 and parent[j] == 2)
    parent[give], parent[take] = 2, 3  # as a later generation may leave it
    del state["digest"]
    (copied / "state.json").write_text(json.dumps(state), encoding="utf-8")
    before = {each["name"] for each in json.loads((copied / "result.json").read_text(encoding="utf-8"))["rows"]}
    outcome = evopress(f"resume={copied}", "stages=[export,report]")
    assert outcome.code == 0 and "the stage evaluate measures the new one" in outcome.text, outcome.text
    assert "checkpoint still holds the previous weights: the stage export writes the new ones" in outcome.text
    exported = json.loads((copied / "checkpoint" / "genome.json").read_text(encoding="utf-8"))
    assert [unit["level"] for unit in exported["units"]] == parent
    after = {each["name"] for each in json.loads((copied / "result.json").read_text(encoding="utf-8"))["rows"]}
    assert before - after == {"evopress"} and "EvoPress" not in (copied / "results.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["uniform_2", "dp"])
def test_a_named_genome_beside_a_finished_run(name: str, copied: Path, evopress: Callable[..., Any]) -> None:
    before = contents(copied)
    outcome = evopress(f"resume={copied}", f"genome={name}", "stages=[evaluate,export,report]")
    assert outcome.code == 0, outcome.text
    stay = ("genome.json", "checkpoint", "finished.json", ".hydra")
    own = {path: content for path, content in before.items() if path.split("/")[0] in stay}
    after = contents(copied)
    assert {path: after[path] for path in own} == own  # what the search found stays
    assert row(copied, name)["kl"] > 0 and row(copied, "evopress")["kl"] > 0
    assert name.replace("dp", "DP").replace("_", " ") in outcome.text
    exported = json.loads((copied / "genomes" / name / "checkpoint" / "evopress.json").read_text(encoding="utf-8"))
    assert exported["genome"] == name
    again = evopress(f"resume={copied}", "stages=[evaluate]")  # the genome was for that command alone
    assert again.code == 0, again.text
    assert [row["name"] for row in json.loads((copied / "result.json").read_text(encoding="utf-8"))["rows"]][-1] == "evopress"


def test_the_name_of_what_a_run_finds_is_told_its_file(copied: Path, evopress: Callable[..., Any]) -> None:
    before = contents(copied)
    outcome = evopress(f"resume={copied}", "stages=[export]", "genome=evopress")
    assert outcome.code == 1 and "genome has 'evopress', which is what a run finds" in outcome.errors[0]
    assert f"give its file, such as {copied / 'genome.json'}" in outcome.errors[0], outcome.errors
    assert {name: data for name, data in contents(copied).items() if name in before and not name.endswith(".log")} == {
        name: data for name, data in before.items() if not name.endswith(".log")
    }
    assert evopress(f"resume={copied}", "stages=[export]", f"genome={copied / 'genome.json'}").code == 0


def test_a_file_gives_the_model_that_was_searched(copied: Path, tiny: Callable[..., Any], tmp_path: Path) -> None:
    """The found genome, given again to a fresh run: the same weights, the same numbers, by its file's name."""
    earlier, fresh = copied.rename(tmp_path / "earlier_run"), tmp_path / "fresh"
    outcome = tiny(f"genome={earlier}", FEW, folder=fresh)
    assert outcome.code == 0, outcome.text
    name = "earlier_run/genome.json"
    ours, theirs = row(fresh, name), row(earlier, "evopress")
    assert ours["kl"] == pytest.approx(theirs["kl"], rel=1e-6) and ours["bits_per_weight"] == theirs["bits_per_weight"]
    assert json.loads((fresh / "result.json").read_text(encoding="utf-8"))["genome"] == name
    assert not (fresh / "genome.json").exists() and not (fresh / "metrics.jsonl").exists()  # nothing was searched
    mine, other = (
        load_file(each / "checkpoint" / "model.safetensors") for each in (fresh / "genomes" / "earlier_run_genome.json", earlier)
    )
    assert all(torch.equal(mine[key], other[key]) for key in other)
    assert name in outcome.text and name in (fresh / "report.html").read_text(encoding="utf-8")


def test_another_genome_does_not_take_the_place_of_one_whose_file_has_the_same_name(
    copied: Path, evopress: Callable[..., Any], tmp_path: Path
) -> None:
    lines = (copied / "genome.txt").read_text(encoding="utf-8").splitlines()
    for folder, text in (("a", lines), ("b", [*lines[1:], lines[0]]), ("c", [line.split(":")[0] + ": 3" for line in lines])):
        (tmp_path / folder / "checkpoint").mkdir(parents=True)
        (tmp_path / folder / "checkpoint" / "genome.txt").write_text("\n".join(text), encoding="utf-8")
    export = (f"resume={copied}", "stages=[export]")
    for same in ("a", "b"):  # the same one, whatever its lines' order
        assert evopress(*export, f"genome={tmp_path / same}/checkpoint/genome.txt").code == 0
    before = contents(copied / "genomes")
    for stage in ("export", "evaluate"):
        outcome = evopress(f"resume={copied}", f"stages=[{stage}]", f"genome={tmp_path / 'c'}/checkpoint/genome.txt")
        assert outcome.code == 1 and "differs from the checkpoint/genome.txt that this run" in outcome.errors[0], outcome.text
    assert contents(copied / "genomes") == before


def test_a_run_of_a_given_genome_goes_on_as_one(
    copied: Path, evopress: Callable[..., Any], tiny: Callable[..., Any], tmp_path: Path
) -> None:
    fresh = tmp_path / "fresh"
    assert tiny(f"genome={copied / 'genome.txt'}", FEW, "stages=[database]", folder=fresh).code == 0
    outcome = evopress(f"resume={fresh}", "stages=[evaluate]")
    assert outcome.code == 0, outcome.text
    assert row(fresh, "run/genome.txt")["kl"] > 0
    assert "search: " not in outcome.text


@pytest.mark.parametrize("given", ["by_hand", "checkpoint", "sparse"])
def test_files_of_every_kind_are_evaluated(
    given: str, finished: Any, finished_sparse: Any, evopress: Callable[..., Any], tmp_path: Path
) -> None:
    """Lines as the authors write them, without a suffix; a checkpoint's folder, on a database of fewer levels; sparsity levels."""
    lines = (finished.folder / "genome.txt").read_text(encoding="utf-8").splitlines()
    (tmp_path / "by_hand").write_text("\n".join(lines[::-1]), encoding="utf-8")
    path = {"by_hand": "by_hand", "checkpoint": finished.folder / "checkpoint", "sparse": finished_sparse.folder / "genome.txt"}[
        given
    ]
    method = ("+method=sparsity", "sparsity=0.5") if given == "sparse" else ("+method=quant", "bits=3.5")
    fewer = ["method.levels=[5,4,3,2]"] if given == "checkpoint" else []
    outcome = evopress(
        *method,
        "+debug=tiny",
        "search/strategy=evolution",
        "hydra.run.dir=run",
        f"genome={path}",
        FEW,
        *fewer,
        "stages=[database,evaluate]",
    )
    assert outcome.code == 0, outcome.text
    (found,) = (
        each for each in json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))["rows"] if "/" in each["name"]
    )
    assert found["kl"] == pytest.approx(
        row((finished_sparse if given == "sparse" else finished).folder, "evopress")["kl"], rel=1e-5
    )


def test_words_per_block_drop_modules(evopress: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "drop.txt").write_text("attn\nmlp\n", encoding="utf-8")
    few = (FEW, "stages=[database,evaluate,export]")
    outcome = evopress(
        "+method=drop", "sparsity=0.5", "+debug=tiny", "search/strategy=evolution", "hydra.run.dir=run", "genome=drop.txt", *few
    )
    assert outcome.code == 0, outcome.text
    assert row(tmp_path / "run", f"{tmp_path.name}/drop.txt")["modules_dropped"] == 2
    (folder,) = (tmp_path / "run" / "genomes").iterdir()
    units = json.loads((folder / "genome.json").read_text(encoding="utf-8"))["units"]
    assert [unit["name"] for unit in units if unit["level"]] == ["model.layers.0.attention", "model.layers.1.mlp"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            ["search.starts=[owl]"],
            "search.starts has 'owl', which is not among this run's baselines (uniform, best_of_random, dp; ",
        ),
        (["search.starts=[dp,best_of_4]", "baselines.names=[]"], "search.starts has 'best_of_4', which is not among"),
        (["search.starts=[uniform_9]"], "search.starts has 'uniform_9', which is not among"),
        (["search.starts=[fisher]", "stages=[search]"], "baselines (none; made when asked for: uniform_6, uniform_5, "),
        (["genome=fisher", "stages=[baselines,export]"], "genome has 'fisher', which is not among"),
        (["bits=null", "budgets=[2.5,3]", "search.starts=[fisher]"], "search.starts has 'fisher', which is not among"),
        (
            ["bits=null", "max_kl=0.1", "baselines.names=[fisher]", "search.starts=[fisher]"],
            "with max_kl baselines follow the search",
        ),
    ],
)
def test_a_baseline_that_no_stage_will_find_is_refused_before_any_work(
    given: list[str], words: str, tiny: Callable[..., Any], tmp_path: Path
) -> None:
    outcome = tiny(f"level_db.root={tmp_path / 'levels'}", *given)
    assert outcome.code == 1 and len(outcome.errors) == 1 and words in outcome.errors[0], outcome.text
    assert not list(tmp_path.rglob("manifest.json")) and not (tmp_path / "run" / "baselines.json").exists()


def test_baselines_that_are_there_or_will_be_are_no_refusal(finished: Any, copied: Path, tiny: Callable[..., Any]) -> None:
    """Those of an earlier run too, where they are not found again."""
    for given in (["fisher", "baselines.names=[fisher]"], ["best_of_4"], ["uniform_3,dp", "baselines.names=[]"]):
        outcome = tiny("dry_run=true", f"search.starts=[{given[0]}]", *given[1:], folder=copied.with_name("fresh"))
        assert outcome.code == 0, outcome.text
    outcome = tiny("dry_run=true", "search.starts=[best_of_4]", "baselines.names=[]", "stages=[search]", folder=copied)
    assert outcome.code == 0, outcome.text
    outcome = tiny("dry_run=true", "search.starts=[best_of_4]", "baselines.names=[]", folder=copied)
    assert outcome.code == 1 and "'best_of_4', which is not among this run's baselines (none; made" in outcome.errors[0]


def test_a_search_starts_from_files_and_names(finished: Any, tiny: Callable[..., Any], tmp_path: Path) -> None:
    starts = f"search.starts=[{finished.folder}/genome.json,{finished.folder}/genome.txt,uniform_3,dp]"
    outcome = tiny(starts, FEW, "stages=[search]", "search.generations=1", folder=tmp_path / "fresh")
    assert outcome.code == 0, outcome.text
    first = json.loads((tmp_path / "fresh" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first["stages"][0]["num_candidates"] == 4 + 4


@pytest.mark.parametrize("start", ["uniform_4", "FILE"])
@pytest.mark.parametrize(
    ("target", "where"),
    [
        (["bits=3"], ""),
        (["budgets=[2.5,3.25,4.5]"], "budget 3.25: "),
        (["budgets=[2.5,3.25,4.5]", "max_kl=0.1"], "budget 3.25: "),
    ],
)
def test_a_start_that_exceeds_a_budget_is_refused_before_any_work(
    target: list[str], where: str, start: str, finished: Any, evopress: Callable[..., Any], tmp_path: Path
) -> None:
    given = str(finished.folder / "genome.txt") if start == "FILE" else start
    own = ("+method=quant", "+debug=tiny", f"level_db.root={tmp_path / 'levels'}", f"hydra.run.dir={tmp_path / 'run'}")
    for strategy in ("evolution", "guided"):
        outcome = evopress(*own, *target, f"search/strategy={strategy}", f"search.starts=[{given}]")
        (sentence,) = outcome.errors
        said = f"error: {where}search.starts has {given!r}, which exceeds the budget of {target[0][5:] if not where else 3.25} bits"
        assert outcome.code == 1 and sentence.startswith(said) and "leave it out, or change the target" in sentence, sentence
    assert not list(tmp_path.rglob("manifest.json")) and not list(tmp_path.rglob("metrics.jsonl"))


def test_a_start_stays_where_a_smaller_budget_need_not_be_searched(evopress: Callable[..., Any]) -> None:
    """Steps between the levels are no budgets that somebody has asked for; nothing starts where there is no search."""
    own = ("+method=quant", "+debug=tiny", "dry_run=true", "search.starts=[uniform_4]")
    for given in (["max_kl=0.1"], ["bits=3", "stages=[database,evaluate]"], ["bits=4"]):
        outcome = evopress(*own, *given)
        assert outcome.code == 0, outcome.text


def test_a_look_at_a_search_that_was_killed_is_no_end_of_it(
    cut_off: Callable[[int], Path], evopress: Callable[..., Any], tmp_path: Path
) -> None:
    folder = cut_off(5)
    outcome = evopress(f"resume={folder}", "stages=[export]")
    assert outcome.code == 0 and (folder / "checkpoint" / "model.safetensors").exists(), outcome.text
    assert not (folder / FINISHED).exists()
    assert not any(each.startswith("stages=[export") for each in kept_overrides(folder))
