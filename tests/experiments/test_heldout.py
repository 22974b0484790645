"""Other kinds of text: where it comes from, and what is said of an order that survives there or does not."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from evopress.errors import EvoPressError
from experiments.composed import settings_of
from experiments.guided.measure import NO_SEARCH, ROWS
from experiments.heldout import run, texts
from experiments.sweeps import Job
from experiments.tables import Table

KL = {  # two seeds of guided, one of the others, on four sequences of each text
    "dp": {"docs": [1.0, 2.0, 3.0, 4.0], "code": [2.0, 2.0, 2.0, 2.0], "chat": [1.0, 1.0, 1.0, 1.0]},
    "uniform_3": {"docs": [2.0, 3.1, 4.0, 5.0], "code": [2.1, 1.9, 2.2, 1.8], "chat": [0.5, 0.6, 0.5, 0.6]},
    "guided": {"docs": [0.5, 1.6, 2.5, 3.4], "code": [1.0, 1.1, 1.0, 1.1], "chat": [0.9, 0.8, 0.9, 0.8]},
}


def row(name: str, shift: float = 0.0) -> dict[str, Any]:
    kept = {text: {"kl": [value + shift for value in values]} for text, values in KL.get(name, {}).items()}
    means = {text: sum(of["kl"]) / 4 for text, of in kept.items()} or dict.fromkeys(KL["dp"], 0.0)
    return {"name": name, "bytes": 10, "kl_by_data_set": means, "perplexity": dict.fromkeys(means, 9.0), "by_sequence": kept}


@pytest.fixture
def jobs() -> list[Job]:
    config = {"model": {"name": "toy"}, "scale": {"name": "mini"}, "data": {"source": "docs"}}
    return [
        Job(Path(seed), {"levels": "best", "target": "3.0", "seed": seed}, config, {"rows": rows}, {})
        for seed, rows in {
            "0": [row("dense"), row("uniform_3"), row("dp"), row("guided", 0.1)],
            "1": [row("dense"), row("guided", -0.1)],
        }.items()
    ]


def test_what_transfers(jobs: list[Job]) -> None:
    names = [row["name"] for job in jobs for row in job.result["rows"]]
    table = Table(jobs, run.spec_of(names, "guided"))
    text = run.render(jobs, table)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    assert lines[0] == ["text", "dense perplexity", "uniform 3", "DP", "guided", "guided below DP", "order"]
    assert lines[2:] == [
        ["docs", "9.000", "3.525", "2.500", "2.000", "20%", "guided < DP < uniform 3"],
        ["code", "9.000", "2.000", "2.000", "1.050", "48%", "guided < uniform 3 ≈ DP"],
        ["chat", "9.000", "0.5500", "1.000", "0.8500", "15%", "uniform 3 < guided < DP"],
    ]
    told = "3 pairs of methods differ on docs; on 2 other texts that is 3 the same, 1 a tie, 2 turned round: "
    assert told in text and "uniform 3 below DP on chat" in text and "uniform 3 below guided on chat" in text
    with pytest.raises(EvoPressError, match="--reference 'owl' is in none of the runs: choose among dense, uniform_3, dp, guided"):
        run.spec_of(names, "owl")


def test_texts_are_written_once_and_what_is_not_there_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, reasons = texts.write_texts(tmp_path)
    assert list(files) == list(texts.KINDS) and not reasons
    sizes = {kind: len(path.read_text(encoding="utf-8")) for kind, path in files.items()}
    assert min(sizes.values()) > 100_000 and max(sizes.values()) <= texts.CHARACTERS
    assert "def " in files["code"].read_text(encoding="utf-8") and "\nAssistant: " in files["chat"].read_text(encoding="utf-8")
    assert len({path.read_bytes() for path in files.values()}) == len(files)

    def lost() -> str:
        raise FileNotFoundError("mmlu_de")

    monkeypatch.setattr(texts, "KINDS", dict.fromkeys(texts.KINDS, lost))
    (tmp_path / "german.txt").unlink()
    files, reasons = texts.write_texts(tmp_path)
    assert "german" not in files and len(files) == len(texts.KINDS) - 1
    assert list(reasons) == ["german"] and "FileNotFoundError: mmlu_de" in reasons["german"]


def test_folders_that_are_no_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvoPressError, match=r"is no run with a genome\.json or a baselines\.json"):
        next(run.finished_runs([tmp_path], {}))


def test_runs_are_told_apart_and_measured_on_their_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guided = ["+method=quant", "bits=3", "search/strategy=guided", "search.starts=[dp]", "threads=3"]
    more = "search.strategy.second_order_rounds=1"
    runs = [run.Run(tmp_path, settings_of(overrides), "db") for overrides in (guided, [*guided, more])]
    assert [each.strategy for each in runs] == ["guided, from dp", "guided, from dp, then second order"]

    asked: list[int] = []
    monkeypatch.setattr(run.torch, "set_num_threads", asked.append)
    monkeypatch.setattr(run, "Workspace", lambda *_: pytest.fail(f"opened with threads {asked}"))
    with pytest.raises(pytest.fail.Exception, match=r"opened with threads \[3\]"):
        next(run.measured(runs))


def opened(folder: Path, *overrides: str, row: tuple[str, ...] = ("search/strategy=guided", "search.starts=[dp]")) -> run.Run:
    folder.mkdir()
    (folder / "genome.json").write_text("{}")
    return run.Run(folder, settings_of(["+method=quant", "bits=3", *row, *overrides]), folder.name)


def test_rows_are_of_runs_that_differ_in_the_seed_alone(tmp_path: Path) -> None:
    first = opened(tmp_path / "0", "seed=0")
    apart = [opened(tmp_path / "1", "seed=1", "threads=2", "model.device=cpu"), opened(tmp_path / "evolution", row=())]
    baselines = opened(tmp_path / "baselines", "baselines.names=[dp]", row=())
    (baselines.folder / "genome.json").unlink()
    run.check_pooled([first, *apart, baselines])
    for name, override, sentence in (
        ("levels", "method.group_size=32", r"method\.group_size is 64 in .*/0 and 32 in .*/levels; leave one of them out"),
        ("search", "search.strategy.rounds=9", r"search\.strategy\.rounds is 5 in .*/0 and 9 in .*/search; leave one"),
        ("same", "seed=0", r"/0 and .*/same are the same job \(best, 3\.0, guided, from dp, seed 0\): name one of them"),
    ):
        other = opened(tmp_path / name, "seed=0" if name == "same" else "seed=2", override)
        with pytest.raises(EvoPressError, match=sentence):
            run.check_pooled([first, *apart, other])


def test_rows_of_the_guided_experiment_are_told_apart(tmp_path: Path) -> None:
    rows = [row for row in ROWS["quant"].values() if NO_SEARCH[0] not in row]
    runs = [opened(tmp_path / str(place), row=tuple(row)) for place, row in enumerate(rows)]
    assert len({each.strategy for each in runs}) == len(rows) > 3
    run.check_pooled(runs)


def test_a_reference_that_no_run_has_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = opened(tmp_path / "found")
    (found.folder / "baselines.json").write_text('{"schema": 1, "database": "db", "genomes": {"dp": [1]}}')
    monkeypatch.setattr(run, "write_texts", lambda _: ({}, {}))
    monkeypatch.setattr(run, "finished_runs", lambda *_: iter([found]))
    monkeypatch.setattr(run, "measured", lambda *_, **__: pytest.fail("measured"))
    monkeypatch.setattr(sys, "argv", ["run", str(found.folder), "--reference", "owl", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        run.main()
    assert "--reference 'owl' is in none of the runs: choose among dp, guided, from dp" in capsys.readouterr().err


@pytest.mark.parametrize(("folder", "said"), [("", (28, 2)), ("bits_3", (48, 6)), ("second_order", (13, 5))])
def test_the_page_counts_by_seed_what_its_runs_have(folder: str, said: tuple[int, int]) -> None:
    """By two standard errors of three seeds, of the differences that are decided so on the run's own text."""
    rows = pd.read_csv(run.FOLDER / folder / "runs.csv")
    rows = rows[rows.measure.str.startswith(run.KL) & ~rows.measure.str.contains("all data sets") & (rows.method != "dense")]

    def below(text: str, one: str, other: str) -> bool | None:
        of = rows[rows.measure == text].pivot(index="seed", columns="method", values="value")
        difference = of[one] - of[other]
        error = difference.sem()
        return None if error == 0 or abs(difference.mean()) <= 2 * error else bool(difference.mean() < 0)

    home, *others = rows.measure.unique()
    decided = [pair for pair in itertools.permutations(rows.method.unique(), 2) if below(home, *pair)]
    found = Counter(below(text, *pair) for text in others for pair in decided)
    assert (found[True], found[None], found[False]) == (*said, 0)
    page = " ".join((run.FOLDER / "README.md").read_text(encoding="utf-8").split())
    assert {"": "it is 28 of 30", "bits_3": "48 are, and six ties", "second_order": "decided on code alone"}[folder] in page
