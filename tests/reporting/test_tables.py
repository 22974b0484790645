"""Tables: the right numbers under the right names, blanks for what does not apply."""

from __future__ import annotations

import csv
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from evopress.reporting import tables


def test_frame_has_one_tidy_column_per_measure(run: Any) -> None:
    frame = tables.results_frame(run.result["rows"])
    assert list(frame.columns) == [
        "name",
        "bits per weight",
        "bits per weight with metadata",
        "size MB if packed",
        "held-out KL",
        "top-1 agreement",
        "ppl python_docs",
        "ppl text",
    ]
    assert list(frame["name"]) == ["dense", "uniform_3", "uniform_2", "best_of_32", "dp", "evopress"]
    dense = frame.iloc[0]
    assert math.isnan(dense["held-out KL"])
    assert dense["ppl text"] == 31.4
    assert frame.set_index("name").loc["dp", "held-out KL"] == 1.334
    assert {str(dtype) for dtype in frame.dtypes.iloc[1:]} == {"float64"}


def test_text_is_aligned_and_rounded() -> None:
    rows = [
        {"name": "dense", "bytes": 1_234_567, "perplexity": {"c4": 12.3456}},
        {
            "name": "best_of_32",
            "bits_per_weight": 2.5,
            "kl": 0.0123456,
            "zero_shot": {"piqa": 0.7},
            "modules_dropped": 3,
        },
        {"name": "dp", "kl": math.nan, "perplexity": {"c4": None}, "bytes": "?"},
    ]
    assert tables.format_table(rows).splitlines() == [
        "            bits per  modules  size MB if                       zero-shot",
        "name          weight  dropped      packed  held-out KL  ppl c4       piqa",
        "----------  --------  -------  ----------  -----------  ------  ---------",
        "dense                                 1.2                12.35",
        "best of 32     2.500        3                  0.01235             0.7000",
        "DP",
    ]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.81234, "0.8123"), (12.3456, "12.35"), (12345.6, "12346"), (0.00123456, "0.001235"), (0, "0"), (1e-9, "1e-09")],
)
def test_significant(value: float, shown: str) -> None:
    assert tables.significant(value) == shown


def test_written_tables(run: Any, tmp_path: Path) -> None:
    paths = tables.write_tables([*run.result["rows"], {"name": "odd|name\nx"}], tmp_path / "tables")
    assert sorted(os.listdir(tmp_path / "tables")) == ["results.csv", "results.md"]
    with open(paths[0], newline="") as file:
        lines = list(csv.DictReader(file))
    assert lines[0]["held-out KL"] == ""
    assert float(lines[4]["held-out KL"]) == 1.334
    assert float(lines[5]["top-1 agreement"]) == run.result["rows"][5]["top1_agreement"]  # full precision
    markdown = paths[1].read_text().splitlines()
    assert markdown[1] == "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    assert markdown[2] == "| dense |  |  | 212.3 |  |  | 20.10 | 31.40 |"
    assert markdown[-1].startswith("| odd\\|name x |")


def test_files_and_text_need_no_pandas(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert len(tables.write_tables(run.result["rows"], tmp_path)) == 2
    assert "EvoPress" in tables.format_table(run.result["rows"])


def test_no_rows() -> None:
    assert tables.format_table([]).startswith("name")
    assert tables.results_frame([]).empty


def test_sparsity_rows_say_how_many_weights_they_keep() -> None:
    rows = [{"name": "dense", "sparsity": 0.0}, {"name": "owl", "sparsity": 0.7, "weights_kept": 31_850_496}]
    assert [line.split() for line in tables.format_table(rows).splitlines()[-2:]] == [
        ["dense", "0.000"],
        ["OWL", "0.700", "31,850,496"],
    ]
    assert tables.results_frame(rows)["weights kept"].iloc[1] == 31_850_496


def test_accuracies_have_their_standard_errors_in_markdown_alone(tmp_path: Path) -> None:
    rows = [
        {
            "name": "dense",
            "zero_shot": {"piqa": 0.7, "arc_easy": 0.5},
            "zero_shot_stderr": {"piqa": 0.02, "arc_easy": None},
            "zero_shot_mean": 0.6,
            "zero_shot_mean_stderr": 0.0123,
        },
        {"name": "dp", "zero_shot_mean": 0.55, "flip_rate": 0.125},
    ]
    paths = tables.write_tables(rows, tmp_path)
    assert paths[1].read_text().splitlines()[2:] == [
        "| dense | 0.7000 ± 0.0200 | 0.5000 | 0.6000 ± 0.0123 |  |",
        "| DP |  |  | 0.5500 | 0.1250 |",
    ]
    assert paths[0].read_text().splitlines() == [
        "name,zero-shot piqa,zero-shot arc_easy,zero-shot mean,flip rate",
        "dense,0.7,0.5,0.6,",
        "dp,,,0.55,0.125",
    ]
    assert "±" not in tables.format_table(rows)
    assert [column.best for column in tables.results_columns(rows)] == [max, max, max, min]


def on(**kl: float) -> dict[str, object]:
    """Make a row's measures on data sets."""
    return {
        "kl": sum(kl.values()) / len(kl),
        "kl_by_data_set": kl,
        "top1_agreement": 0.5,
        "top1_agreement_by_data_set": dict.fromkeys(kl, 0.5),
        "perplexity": {name: 10 * value for name, value in kl.items()},
    }


@pytest.mark.parametrize(
    ("measured", "headers"),
    [
        ({"docs": 1.0}, ["held-out KL docs", "top-1 agreement docs", "ppl docs"]),
        (
            {"docs": 1.0, "wiki": 3.0},
            [
                *("held-out KL docs", "held-out KL wiki", "held-out KL, mean of 2 data sets"),
                *("top-1 agreement docs", "top-1 agreement wiki", "top-1 agreement, mean of 2 data sets", "ppl docs", "ppl wiki"),
            ],
        ),
        (
            {"docs": 1.0, "wiki": 3.0, "c4": 5.0},
            [
                *("held-out KL docs", "held-out KL wiki", "held-out KL c4", "held-out KL, mean of 3 data sets"),
                *("top-1 agreement docs", "top-1 agreement wiki", "top-1 agreement c4", "top-1 agreement, mean of 3 data sets"),
                *("ppl docs", "ppl wiki", "ppl c4"),
            ],
        ),
    ],
)
def test_a_data_set_more_changes_no_column_that_was_there(measured: dict[str, float], headers: list[str]) -> None:
    columns = {column.header: column.values for column in tables.results_columns([{"name": "dp", **on(**measured)}])}
    assert list(columns) == headers
    assert columns["held-out KL docs"] == (1.0,)
    if len(measured) > 1:
        assert columns[f"held-out KL, mean of {len(measured)} data sets"] == (sum(measured.values()) / len(measured),)


def test_rows_of_early_versions_have_the_mean_alone() -> None:
    assert [column.header for column in tables.results_columns([{"name": "dp", "kl": 1.0}])] == ["held-out KL"]


def test_the_checkpoints_bytes_stand_beside_the_size_if_packed() -> None:
    rows = [{"name": "dp", "bytes": 2_500_000}, {"name": "evopress", "bytes": 2_500_000, "checkpoint_bytes": 9_000_000}]
    columns = {column.header: column.values for column in tables.results_columns(rows)}
    assert columns == {"size MB if packed": (2.5, 2.5), "checkpoint MB": (None, 9.0)}


def test_names() -> None:
    assert [tables.display_name(name) for name in ("evopress", "evopress+refine", "best_of_32", "uniform_3")] == [
        *("EvoPress", "EvoPress + refine", "best of 32", "uniform 3")
    ]
    names = ["dense", "uniform_3", "dp", "evopress", "evopress+refine", ""]
    assert [name for name in names if tables.is_found(name)] == ["evopress", "evopress+refine"]
    assert [name for name in names if tables.is_baseline(name)] == ["uniform_3", "dp"]


def test_small_sizes_have_digits_and_errors_of_rounding_are_none(tmp_path: Path) -> None:
    kept = {"docs": {"acceptance_rate": [1.0, 0.99999994, 1.0000001], "kl": [0.25, 0.5, 0.75]}}
    means = {"kl_by_data_set": {"docs": 0.5}, "acceptance_rate_by_data_set": {"docs": 1.0}}
    rows = [{"name": "dense", "bytes": 76_800, **means, "by_sequence": kept}, {"name": "dp", "bytes": 2_040_000}]
    text = tables.write_tables(rows, tmp_path)[1].read_text().splitlines()
    assert text[2:4] == ["| dense | 0.0768 | 0.5000 ± 0.1443 | 1.0000 |", "| DP | 2.0 |  |  |"]
