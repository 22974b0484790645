"""The side-by-side of allocations: which runs it makes, and which rows of theirs are one budget's."""

from __future__ import annotations

import sys

import pandas as pd
import pytest

from evopress.errors import EvoPressError
from evopress.run_folder import keep_overrides
from experiments.allocation.run import METHODS, asked_for, asked_runs, draw, ends, main, over_lowest, runs
from experiments.guided.measure import KEYS, merged, read, table


def a_row(name: str, bits: float | None, **more: float) -> dict:
    return {
        "name": name,
        "bits_per_weight": bits,
        "bytes": 10,
        "kl": 0.5,
        "perplexity": {"text": 9.0},
        "top1_agreement": 0.8,
        **more,
    }


def test_one_run_has_the_baselines_of_all_budgets_where_levels_are_the_same_and_each_search_its_own() -> None:
    quant, sparsity = METHODS["quant"], METHODS["sparsity"]
    made = list(runs("quant", quant.recipes, [0, 1, 2], quant.budgets, quant.baselines, ["guided", "evolution"], ["threads=1"]))
    assert len(made) == 2 * 3 * (1 + 2 * 5) == len({run.folder for run in made})
    assert "budgets=[2.25,2.5,3,3.5,4]" in made[0].arguments and made[0].arguments[-1] == "threads=1"
    assert not any(set(",=[] ") & set(str(run.folder)) for run in made)
    assert len(list(runs("sparsity", ["best"], [0], [0.5, 0.7], sparsity.baselines, ["guided"], []))) == 4
    (alone,) = runs("drop", [""], [0], [0.25, 0.5], ["interactions"], [], [])
    assert "budgets=[0.25,0.5]" in alone.arguments and not any("recipe" in each for each in alone.arguments)
    (row,) = ends(alone, [0.25, 0.5], {"rows": [a_row("dense", 16.0), a_row("interactions@0.25", None)]})
    assert (row["method"], row["recipe"], row["target"], row["row"]) == ("drop", "", 0.25, "interactions")


def test_genomes_of_another_tool_are_measured_as_they_are(tmp_path) -> None:
    (run,) = runs("quant", ["best"], [0], [2.5], [], [], [], {"autoscheme": tmp_path})
    assert f"genome={tmp_path}/2.5.txt" in run.arguments and "stages=[database,evaluate]" in run.arguments
    (row,) = ends(run, [2.5], {"rows": [a_row("dense", 16.0), a_row("folder/2.5.txt", 2.5)]})
    assert (row["row"], row["target"], row["bits"]) == ("autoscheme", 2.5, 2.5)


def test_a_genome_that_is_not_there_is_refused_before_the_first_job(tmp_path) -> None:
    (tmp_path / "2.5.txt").write_text("")
    words = ["--baselines", "--searches", "--seeds", "0", "--genomes", f"mine={tmp_path}", "--budgets", "2.5"]
    assert len(asked_runs(asked_for(words))) == 2
    with pytest.raises(EvoPressError, match=f"there is no file or folder {tmp_path}/3.txt: name one that is there"):
        asked_runs(asked_for([*words, "3"]))


def test_seeds_of_other_settings_are_not_mixed(tmp_path, monkeypatch) -> None:
    """Where the results have them, and their runs are there to tell; what a machine needs may be another."""
    monkeypatch.chdir(tmp_path)
    words = ["--recipes", "best", "--budgets", "2.5", "--baselines", "--searches", "guided", "--results", "results.csv"]
    (first,) = asked_runs(asked_for([*words, "--seeds", "0", "--", "threads=1"]))
    merged(tmp_path / "results.csv", [{**dict(zip(KEYS, ("quant", "best", 2.5, "guided", 0), strict=True)), "held_out_kl": 0.5}])
    first.folder.mkdir(parents=True)
    keep_overrides(first.folder, first.arguments)
    (first.folder / "finished.json").write_text("{}")
    (found,) = asked_runs(asked_for([*words, "--seeds", "1", "--", "model.device=cuda"]))
    assert found.labels["seed"] == 1
    other = [*words, "--seeds", "1", "--", "method.group_size=32"]
    with pytest.raises(
        EvoPressError, match=r"guided-2\.5-0 has a finished run of other settings \(method\.group_size=not given there"
    ):
        asked_runs(asked_for(other))
    assert asked_runs(asked_for([*other[:-2], "--results", "others.csv", *other[-2:]]))


def test_a_script_draws_what_there_is_and_ends_with_1_where_a_job_failed(tmp_path, monkeypatch, capsys) -> None:
    row = dict(zip(KEYS, ("quant", "best", 2.5, "guided", 0), strict=True))
    merged(tmp_path / "results.csv", [{**row, "held_out_kl": 0.5, "perplexity": 9.0, "bits": 2.5, "tokens": 1, "seconds": 1.0}])
    given = ["--seeds", "0", "--budgets", "2.5", "--recipes", "best", "--results", str(tmp_path / "results.csv")]
    monkeypatch.setattr(sys, "argv", ["run", *given])
    monkeypatch.setattr("experiments.single_runs.evopress_all", lambda runs, at_once: ((run, False) for run in runs))
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr()
    assert stop.value.code == 1 and "error: 3 of 3 jobs failed; the same command goes on" in said.err
    assert (tmp_path / "allocation.png").is_file() and "guided" in said.out


def test_rows_are_of_one_budget_and_uniform_ones_only_where_they_spend_it(tmp_path) -> None:
    of_all, of_one = list(runs("quant", ["best"], [0], [2.5, 3], ["dp"], ["guided"], []))[:2]
    rows = [a_row("dense", 16.0), a_row("uniform_2", 2.0), a_row("uniform_3", 3.0), a_row("dp@2.5", 2.4, tokens_spent=7)]
    found = list(ends(of_all, [2.5, 3], {"rows": rows}))
    assert [(row["row"], row["target"], row["tokens"]) for row in found] == [("uniform", 3.0, 0), ("dp", 2.5, 7)]
    found += ends(of_one, [2.5, 3], {"rows": [a_row("dense", 16.0), a_row("evopress", 2.5, tokens_spent=9, seconds_spent=1.5)]})
    assert [found[-1][key] for key in (*KEYS, "tokens", "seconds")] == ["quant", "best", 2.5, "guided", 0, 9, 1.5]
    merged(tmp_path / "results.csv", found)
    merged(tmp_path / "results.csv", found[:1])
    results = read(tmp_path / "results.csv")
    assert len(results) == len(table(results)) == 3
    assert any(file.suffix == ".png" for file in draw(results, results.iloc[:0], tmp_path))


def test_the_picture_compares_rows_with_guided_on_their_own_build_of_the_levels() -> None:
    kls = [("guided", 0.5, 0.4), ("guided", 0.5, 0.6), ("evolution from dp", 0.5, 1.0), ("fisher", 0.5, 0.8), ("fisher", 0.7, 0.9)]
    here = pd.DataFrame(kls, columns=["row", "target", "held_out_kl"])
    theirs = pd.DataFrame([("guided", 0.5, 0.64)], columns=["row", "target", "held_out_kl"])
    assert list(over_lowest(here, theirs).ratio.round(6)) == [0.8, 1.2, 2.0, 1.25, 1.0]
    assert list(over_lowest(here, theirs.iloc[:0]).ratio.round(6)) == [0.8, 1.2, 2.0, 1.6, 1.0]
