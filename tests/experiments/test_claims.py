"""What is said of the paper's claims is what the tables have."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import claims
from experiments.tables import BEGIN, END


def test_the_readme_has_what_the_tables_say() -> None:
    """Or `python -m experiments.claims` has to be run again."""
    written = claims.README.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert written.strip("\n") == claims.text().strip("\n") and written.count("\n- ") > 10


def test_each_claim_that_does_not_hold_has_a_sentence_of_its_own() -> None:
    listed, _, sentences = claims.README.read_text(encoding="utf-8").partition("## What our small model contradicts")
    assert listed.count("**does not hold**") == sentences.count("\n- ") > 0


@pytest.mark.parametrize(
    ("uniform", "verdict", "mean", "said"),
    [
        ("12", "worse", "30", "uniform ×1.20 to ×1.50 in the paper, ×1.50 here, **holds**"),
        ("12", "tie", "20", "uniform ×1.20 to ×1.50 in the paper, ×1.00 here, **a tie** here"),
        ("12", "better", "18", "uniform ×1.20 to ×1.50 in the paper, ×0.90 here, **does not hold**"),
        ("12", "one seed", "30", "uniform ×1.20 to ×1.50 in the paper, ×1.50 here, one seed"),
        ("8", "tie", "20", "uniform ×0.80 to ×1.50 in the paper, ×1.00 here, no order in the paper, a tie here"),
        ("8", "worse", "22", "uniform ×0.80 to ×1.50 in the paper, ×1.10 here, no order in the paper, worse here"),
    ],
)
def test_verdicts(uniform: str, verdict: str, mean: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "home", lambda name: tmp_path)
    (tmp_path / "paper.csv").write_text(f"model,method,a,b\nM,uniform,{uniform},15\nM,evopress,10,10\nM,dense,5,5\n")
    rows = f"uniform,ppl x,{mean},{verdict}\nevopress,ppl x,20,\ndp,ppl x,25,worse\nuniform,held-out KL,1,worse\n"
    (tmp_path / "results.csv").write_text(f"method,measure,mean,verdict\n{rows}")
    assert list(claims.claims("table3")) == [f"Table 3: 3 bits per weight: perplexity over that of EvoPress: {said}."]


def test_what_three_seeds_do_not_bear_out_has_its_p() -> None:
    """For two degrees of freedom p is 1 - t / √(t² + 2)."""
    row = {"difference": "-3", "standard_error": "1", "seeds": "3", "verdict": "worse", "mean": "30"}
    assert claims.chance(row) == pytest.approx(1 - 3 / 11**0.5)
    assert claims._against("uniform", row, 20.0, [1.2]).endswith("**holds** (p=0.10)")
    assert claims._against("uniform", row | {"difference": "4.4"}, 20.0, [1.2]).endswith("**holds**")
    assert claims._against("uniform", row | {"verdict": "tie"}, 20.0, [1.2]).endswith("**a tie** here")
    assert claims.chance(row | {"standard_error": "0"}) == claims.chance(row | {"seeds": "1"}) == 0


def test_nothing_is_said_without_the_reference_here_or_in_the_paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as a sweep is half-finished."""
    monkeypatch.setattr(claims, "home", lambda name: tmp_path)
    (tmp_path / "paper.csv").write_text("model,method,a\nM,uniform,12\nM,evopress,10\n")
    (tmp_path / "results.csv").write_text("method,measure,mean,verdict\nuniform,ppl x,30,\n")
    assert not list(claims.claims("table3"))
    (tmp_path / "paper.csv").write_text("model,method,a\nM,uniform,12\n")
    (tmp_path / "results.csv").write_text("method,measure,mean,verdict\nuniform,ppl x,30,\nevopress,ppl x,20,\n")
    assert not list(claims.claims("table3"))
