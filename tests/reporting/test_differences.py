"""A difference that chance makes is a tie, wherever it is told."""

from __future__ import annotations

import math
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from evopress.reporting.differences import Difference
from evopress.reporting.findings import headline, results_table
from evopress.reporting.tables import results_columns, told_differences, write_tables
from experiments.markdown import markdown


def row(name: str, kls: list[float], **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "bits_per_weight": 2.5,
        "kl": sum(kls) / len(kls),
        "kl_by_data_set": {"docs": sum(kls) / len(kls)},
        "by_sequence": {"docs": {"kl": kls}},
        **more,
    }


DP = [1.0, 2.0, 3.0, 4.0]
NEAR = [1.1, 1.8, 3.1, 3.8]  # 2.5 against 2.45: lower, by less than the sequences differ among each other
CLEAR = [0.9, 1.85, 2.9, 3.85]  # lower on every sequence


def test_a_standard_error_is_that_of_the_pairs() -> None:
    difference = Difference.of_sequences(NEAR, DP)
    assert (difference.mean, difference.num_pairs) == (pytest.approx(-0.05), 4)
    assert difference.standard_error == pytest.approx(math.sqrt((0.15**2 * 4) / 3) / 2)
    assert difference.is_tie and difference.verdict(min) == "tie"
    assert Difference.of_sequences(CLEAR, DP).verdict(min) == "better"
    assert Difference.of_sequences(CLEAR, DP).verdict(max) == Difference.of_sequences(DP, CLEAR).verdict(min) == "worse"


@pytest.mark.parametrize(("ours", "theirs"), [([], []), ([1.0], [2.0]), ([1.0, 2.0], [1.0])])
def test_too_few_pairs_decide_nothing(ours: list[float], theirs: list[float]) -> None:
    difference = Difference.of_sequences(ours, theirs)
    assert not difference.decided and not difference.is_tie
    assert difference.verdict(min) in ("", "one seed")


def test_what_is_not_finite_decides_nothing() -> None:
    difference = Difference.of_sequences([1.0, math.inf], [1.0, 2.0])
    assert not difference.decided and difference.verdict(min) == "" and math.isnan(difference.standard_error)


def test_equal_numbers_are_a_tie() -> None:
    assert Difference.of_sequences(DP, DP).verdict(min) == "tie"


@pytest.mark.parametrize(
    ("ours", "said", "not_said"),
    [
        (NEAR, "DP, has 2.500: a tie, EvoPress is 2.0% lower but the difference is within two standard errors", "wins"),
        ([-x + 2 * y for x, y in zip(NEAR, DP, strict=True)], "a tie, EvoPress is 2.0% higher but", "wins"),
        (CLEAR, "EvoPress wins, 5.0% lower (0.125 ± 0.014 nats over 4 sequences)", "tie"),
        ([-x + 2 * y for x, y in zip(CLEAR, DP, strict=True)], "DP wins, EvoPress is 5.0% higher (0.125 ± 0.014", "tie"),
        (DP, "DP, has 2.500: a tie.", "wins"),
    ],
)
def test_page_terminal_and_markdown_say_the_same(ours: list[float], said: str, not_said: str, tmp_path: Path) -> None:
    rows = [{"name": "dense", "kl": 0.0}, row("dp", DP), row("evopress", ours)]
    sentence = headline(rows)
    assert said in sentence and not_said not in sentence
    text = write_tables(rows, tmp_path, said=sentence)[1].read_text()
    assert text.endswith(f"|\n\n{sentence}\n")
    assert f"<p>{sentence}</p>" in unescape(markdown(text))


def test_rows_that_tie_are_bold_together() -> None:
    def bold(ours: list[float]) -> list[str]:
        rows = [row("dp", DP), row("uniform_2", [9.0, 9.0, 9.0, 9.5]), row("evopress", ours)]
        return re.findall(r"<b>([\d.]+)</b>", results_table(rows))

    assert bold(NEAR) == ["2.500", "2.450"]
    assert bold(CLEAR) == ["2.375"]
    column = next(column for column in results_columns([row("a", DP), row("b", NEAR), {"name": "c", "kl": 1.0}]) if column.best)
    assert column.ties(0, 1) and not column.ties(0, 2)


def test_what_was_not_kept_is_not_decided() -> None:
    rows = [{"name": "dp", "kl": 1.0, "bits_per_weight": 2.5}, {"name": "evopress", "kl": 0.9, "bits_per_weight": 2.5}]
    assert "EvoPress is 10.0% lower; whether that is more than chance was not measured" in headline(rows)
    broken = [row("dp", DP), row("evopress", CLEAR)]
    for other in (["x"] * 4, [math.nan] * 4, {"kl": 1}, [1.0]):
        broken[0]["by_sequence"]["docs"]["kl"] = other
        assert "was not measured" in headline(broken)


def test_a_found_row_that_is_no_baseline_is_compared_with_the_search() -> None:
    said = headline([row("dp", DP), row("evopress", NEAR), row("evopress+refine", CLEAR)])
    assert "The best baseline within this budget, DP, has 2.500: a tie" in said
    assert "EvoPress + refine has 2.375 at 2.500 bits per weight: " in said
    assert "EvoPress + refine, has" not in said
    assert "The best baseline" not in headline([row("evopress", NEAR), row("evopress+refine", CLEAR)])


def test_the_headline_is_on_the_runs_own_text() -> None:
    rows = [row("dp", DP), row("evopress", NEAR)]
    before = headline(rows)
    assert "held-out KL on docs is 2.450" in before
    for each, kl in zip(rows, (7.0, 1.0), strict=True):  # a second data set is added
        each["kl_by_data_set"]["wiki"], each["kl"] = kl, (each["kl"] + kl) / 2
    assert headline(rows) == before


def test_acceptance_rates_and_flips_are_paired_with_those_of_what_was_found(tmp_path: Path) -> None:
    """In one table of the page and of `results.md`, by the words that the tables of sweeps use; the headline has the first."""

    def measured(name: str, kls: list[float], accepted: list[float], flips: list[float]) -> dict[str, Any]:
        kept = {"kl": kls, "acceptance_rate": accepted, "flips": flips, "nll": kls}
        means = {f"{key}_by_data_set": {"docs": sum(kept[key]) / 4} for key in ("kl", "acceptance_rate", "flips")}
        return {**row(name, kls), **means, "perplexity": {"docs": 9.0}, "by_sequence": {"docs": kept}}

    ours = measured("evopress", CLEAR, [0.7, 0.6, 0.7, 0.6], [0.1, 0.3, 0.1, 0.3])
    theirs = measured("dp", DP, [0.6, 0.5, 0.61, 0.51], [0.1, 0.3, 0.3, 0.1])
    rows = [{"name": "dense", "kl": 0.0}, theirs, ours]
    lines = [line for line in write_tables(rows, tmp_path)[1].read_text().splitlines() if "| d" in line.lower()]
    assert "difference to EvoPress | held-out KL docs | acceptance rate docs | flips docs | log ppl docs |" in "".join(lines)
    assert lines[-1] == "| DP | 0.125 ± 0.014 (worse) | -0.0950 ± 0.0029 (worse) | 0 ± 0.082 (tie) | 0.125 ± 0.014 (worse) |"
    assert lines[-3].startswith("| DP | 2.500 | 2.500 ± 0.6455 | 0.5550 ± 0.0290 | 0.2000 ± 0.0577 | 9.00 |")
    page = results_table(rows)
    assert all(cell in page for cell in ("-0.0950 ± 0.0029 (worse)", "0 ± 0.082 (tie)"))
    assert "EvoPress's acceptance rate is 0.6500, the baseline's 0.5550: 0.0950 ± 0.0029 (better)" in headline(rows)
    assert "difference to EvoPress" not in results_table(rows[:2]) + results_table([row("dp", [1.0]) | {"by_sequence": None}, ours])


def test_a_row_of_a_larger_budget_says_so_beside_its_difference() -> None:
    rows = [
        row("uniform_3", CLEAR, within_budget=False),
        row("dp", DP, within_budget=True),
        row("evopress", NEAR, within_budget=True),
    ]
    _, lines = told_differences(rows)
    assert [line[0] for line in lines] == ["uniform 3 (a larger budget)", "DP"]
