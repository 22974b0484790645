"""What is said of the paper's claims is what the tables have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from evopress.reporting.differences import Difference
from experiments import claims
from experiments.tables import BEGIN, END


def test_the_readme_has_what_the_tables_say() -> None:
    """Or `python -m experiments.claims` has to be run again."""
    written = claims.README.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert written.strip("\n") == claims.text().strip("\n") and written.count("\n- ") > 10


def test_each_claim_that_does_not_hold_has_a_sentence_of_its_own() -> None:
    listed, _, sentences = claims.README.read_text(encoding="utf-8").partition("## What our small model contradicts")
    assert listed.count("**does not hold**") == sentences.count("\n- ") > 0


def written(folder: Path, paper: str, runs: dict[str, Sequence[float]]) -> None:
    """Write the paper's numbers and ours, a perplexity per seed."""
    (folder / "paper.csv").write_text(paper)
    rows = (
        f"{method},{seed},{measure},{value}\n"
        for method, of in runs.items()
        for seed, value in enumerate(of)
        for measure in ("held-out KL", "ppl x")
    )
    (folder / "runs.csv").write_text(f"method,seed,measure,value\n{''.join(rows)}")


@pytest.mark.parametrize(
    ("uniform", "ours", "said"),
    [
        ("12,15", (30, 31, 29), "uniform ×1.20 to ×1.50 in the paper, ×1.50 here, **holds**"),
        ("12,15", (19, 21, 20), "uniform ×1.20 to ×1.50 in the paper, ×1.00 here, **a tie** here"),
        ("12,15", (18, 18.1, 17.9), "uniform ×1.20 to ×1.50 in the paper, ×0.90 here, **does not hold**"),
        ("12,15", (30,), "uniform ×1.20 to ×1.50 in the paper, ×1.50 here, one seed"),
        ("8,15", (19, 21, 20), "uniform ×0.80 to ×1.50 in the paper, ×1.00 here, no order in the paper, a tie here"),
        ("8,15", (22, 22.1, 21.9), "uniform ×0.80 to ×1.50 in the paper, ×1.10 here, no order in the paper, worse here"),
        ("10,15", (30, 31, 29), "uniform ×1.00 to ×1.50 in the paper, ×1.50 here, **holds**"),
        ("8,10", (30, 31, 29), "uniform ×0.80 to ×1.00 in the paper, ×1.50 here, **does not hold**"),
        ("10,10", (30, 31, 29), "uniform ×1.00 to ×1.00 in the paper, ×1.50 here, no order in the paper, worse here"),
    ],
)
def test_verdicts(uniform: str, ours: Sequence[float], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "home", lambda name: tmp_path)
    paper = f"model,method,a,b\nM,uniform,{uniform}\nM,evopress,10,10\nM,dense,5,5\n"
    written(tmp_path, paper, {"uniform": ours, "evopress": (20, 20, 20), "dp": (25, 25, 25)})
    assert list(claims.claims("table3")) == [f"Table 3: 3 bits per weight: perplexity over that of EvoPress: {said}."]


def test_ratios_are_what_is_tested() -> None:
    """One seed whose perplexity explodes neither makes the ratio nor hides that all of them are worse."""
    logs = {str(seed): math.log(ratio) for seed, ratio in enumerate((3.0, 4.0, 30.0))}
    difference = Difference.of(logs, dict.fromkeys(logs, 0.0))
    assert claims._against("uniform", difference, [1.2]).endswith("×7.11 here, **holds** (p=0.11)")
    assert Difference.of({seed: math.exp(log) for seed, log in logs.items()}, dict.fromkeys(logs, 1.0)).is_tie


def test_what_three_seeds_do_not_bear_out_has_its_p() -> None:
    """For two degrees of freedom p is 1 - t / √(t² + 2)."""
    assert claims.chance(Difference(-3, 1, 3)) == pytest.approx(1 - 3 / 11**0.5)
    assert claims._against("uniform", Difference(0.3, 0.1, 3), [1.2]).endswith("**holds** (p=0.10)")
    assert claims._against("uniform", Difference(0.44, 0.1, 3), [1.2]).endswith("**holds**")
    assert claims._against("uniform", Difference(0.1, 0.1, 3), [1.2]).endswith("**a tie** here")
    assert claims.chance(Difference(3, 0, 3)) == claims.chance(Difference(3, math.nan, 1)) == 0


def test_nothing_is_said_without_the_reference_here_or_in_the_paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as a sweep is half-finished."""
    monkeypatch.setattr(claims, "home", lambda name: tmp_path)
    written(tmp_path, "model,method,a\nM,uniform,12\nM,evopress,10\n", {"uniform": (30,)})
    assert not list(claims.claims("table3"))
    written(tmp_path, "model,method,a\nM,uniform,12\n", {"uniform": (30,), "evopress": (20,)})
    assert not list(claims.claims("table3"))
