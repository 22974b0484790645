"""Run folder files: whole or absent, readable after a kill, and refused with a sentence when they do not fit."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evopress.errors import EvoPressError
from evopress.reporting import records
from evopress.reporting.generations import read_generations
from evopress.units import Budget, Genome, Space

FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def written(folder: Path, space: Space, genome: Genome, database: str = "abc123") -> tuple[Path, Path]:
    paths = folder / "genome.json", folder / "genome.txt"
    records.write_genome(*paths, space=space, genome=genome, database=database, budget=space.cost(genome) + 7)
    return paths


def mixed(space: Space) -> Genome:
    return tuple(index % 5 for index in range(len(space)))


def test_json_round_trip_without_nan_and_without_leftovers(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    data = {
        "nan": math.nan,
        "inf": [-math.inf, np.float32("nan")],
        "n": np.int64(3),
        "x": np.float32(0.5),
        "p": tmp_path,
    }
    records.write_json(path, data | {"array": np.array([1.0, np.nan]), "flag": np.bool_(True), "text": "µ \ud800"})
    assert records.read_json(path) == {
        "nan": None,
        "inf": [None, None],
        "n": 3,
        "x": 0.5,
        "p": str(tmp_path),
        "array": [1.0, None],
        "flag": True,
        "text": "µ \ud800",
    }
    assert "NaN" not in path.read_text()
    assert os.listdir(tmp_path) == ["result.json"]


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    records.write_json(path, {"old": 1})

    def full(_: int) -> None:
        raise OSError(28, "disk is full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EvoPressError, match="disk is full"):
        records.write_json(path, {"new": 2})
    with pytest.raises(EvoPressError, match="disk is full"):
        records.append_record(tmp_path / "metrics.jsonl", {"generation": 0})
    monkeypatch.undo()
    assert records.read_json(path) == {"old": 1}
    assert not list(tmp_path.glob(".*"))


def test_what_cannot_be_written_is_a_bug_and_says_so(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="object"):
        records.write_json(tmp_path / "x.json", {"a": object()})
    with pytest.raises(EvoPressError, match="cannot be written"):
        records.write_json(tmp_path / "missing" / "x.json", {})
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"1" * 5000])
def test_read_json_refuses_what_is_no_json(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(EvoPressError, match=r"x\.json is not"):
        records.read_json(path)


def test_records_round_trip(tmp_path: Path, run: Any) -> None:
    path = tmp_path / "metrics.jsonl"
    assert records.read_records(path) == []
    for record in run.records:
        records.append_record(path, record)
    assert records.read_records(path) == json.loads(json.dumps(run.records))


def test_a_broken_candidates_perplexity_is_no_damage(tmp_path: Path, run: Any) -> None:
    path, record = tmp_path / "metrics.jsonl", dict(run.records[1])
    stages = [{**stage, "fitnesses": [math.exp(45.0), *stage["fitnesses"][1:]]} for stage in record["stages"]]
    records.append_record(path, {**record, "stages": stages, "fitness": math.exp(600.0)})
    (read,) = read_generations(path, run.space)
    assert read["fitness"] == math.exp(600.0)


@pytest.mark.parametrize("cut", [1, 2, 10, 30])
def test_an_interrupted_write_costs_one_record_and_is_mended(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.jsonl"
    for generation in range(3):
        records.append_record(path, {"generation": generation, "fitness": 1.5})
    path.write_bytes(path.read_bytes()[:-cut])
    expected = [0, 1, 2] if cut == 1 else [0, 1]  # without its newline alone, a record is still whole
    assert [record["generation"] for record in records.read_records(path)] == expected
    records.append_record(path, {"generation": 9})
    assert [record["generation"] for record in records.read_records(path)] == [*expected, 9]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"generation": 0}\n{"genera\n{"generation": 2}\n')
    with pytest.raises(EvoPressError, match="line 2"):
        records.read_records(path)


def test_truncate_keeps_the_generations_up_to_the_given_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records.truncate_records(path, 3)
    assert not path.exists()
    for generation in range(6):
        records.append_record(path, {"generation": generation})
    with open(path, "ab") as file:
        file.write(b'{"generation": 6, "gen')
    records.truncate_records(path, 3)
    assert [record["generation"] for record in records.read_records(path)] == [0, 1, 2, 3]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_genome_files_have_the_fixed_shape_and_come_back(tmp_path: Path, space: Space) -> None:
    genome = mixed(space)
    path_json, path_txt = written(tmp_path, space, genome)
    document = json.loads(path_json.read_text())
    assert list(document) == ["schema", "method", "database", "units", "budget", "cost"]
    assert document["units"][1] == {
        "name": "model.layers.0.self_attn.k_proj",
        "level": 1,
        "label": "5 bits",
        "cost": 5 * 110592,
    }
    assert (document["schema"], document["method"], document["database"]) == (1, "quant", "abc123")
    assert (document["cost"], document["budget"]) == (space.cost(genome), space.cost(genome) + 7)
    assert path_txt.read_text().splitlines()[:2] == [
        "model.layers.0.self_attn.q_proj: 6",
        "model.layers.0.self_attn.k_proj: 5",
    ]
    assert records.read_genome(path_json, space) == genome
    assert records.read_genome(path_json, space, database="abc123") == genome
    assert records.read_genome(path_txt, space, database="abc123") == genome
    assert sorted(os.listdir(tmp_path)) == ["genome.json", "genome.txt"]


def test_a_budget_may_be_given_as_one(tmp_path: Path, space: Space) -> None:
    genome = mixed(space)
    path = tmp_path / "genome.json"
    budget = Budget(space.cost(genome), 4.0, "bits per weight")
    records.write_genome(path, tmp_path / "genome.txt", space=space, genome=genome, database="d", budget=budget)
    assert records.read_json(path)["budget"] == budget.total


def test_text_lines_may_come_in_any_order(tmp_path: Path, space: Space) -> None:
    _, path = written(tmp_path, space, mixed(space))
    path.write_text("\ufeff" + "\r\n\r\n".join(reversed(path.read_text().splitlines())), encoding="utf-8")
    assert records.read_genome(path, space) == mixed(space)


def change(key: str, value: object) -> Any:
    return lambda document: document.update({key: value})


def change_unit(key: str, value: object) -> Any:
    return lambda document: document["units"][2].update({key: value})


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (change("schema", 2), "schema 2 .* update evopress"),
        (change("schema", None), "no schema number"),
        (change("schema", True), "no schema number"),
        (change("method", "drop"), "method 'drop'"),
        (change("database", "other"), "database 'other' but this run uses 'abc123': build that database"),
        (change("units", {}), "not a list"),
        (change("units", [3]), "has no name"),
        (change("cost", 1), "says cost 1"),
        (change("budget", "x"), "budget is 'x'"),
        (change_unit("name", "<nobody>"), "'<nobody>', which is no unit"),
        (lambda document: document["units"].append(document["units"][0]), "q_proj' twice"),
        (change_unit("level", 5), "level 5: expected 0 to 4"),
        (change_unit("level", -1), "level -1: expected 0 to 4"),
        (change_unit("level", 2.0), "level 2.0"),
        (change_unit("level", True), "level True"),
        (change_unit("label", "4.5 bits"), "use the database that it was found with"),
        (change_unit("cost", 12), "at cost 12 but here"),
        (lambda document: document["units"].pop(), "damaged"),
        (lambda document: document.clear(), "no schema number"),
    ],
)
def test_a_genome_that_does_not_fit_is_refused(tmp_path: Path, space: Space, edit: Any, words: str) -> None:
    path, _ = written(tmp_path, space, mixed(space))
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))
    with pytest.raises(EvoPressError, match=words):
        records.read_genome(path, space, database="abc123")


def test_a_genome_of_other_levels_is_read_by_what_its_levels_are(tmp_path: Path, space: Space) -> None:
    """A database with more levels, or without some, counts them otherwise; the run's own genome is held to its database."""
    path, _ = written(tmp_path, space, mixed(space))
    fewer = Space(space.method, tuple(replace(unit, levels=unit.levels[1:]) for unit in space.units))
    with pytest.raises(EvoPressError, match=r"here it is|expected 0 to 3"):
        records.read_genome(path, fewer, database="abc123")
    with pytest.raises(EvoPressError, match=r"'6 bits' at cost .* but here it is '5 bits'"):  # which is not there
        records.read_genome(path, fewer)
    lower = [min(max(level, 1), 4) for level in mixed(space)]
    path, _ = written(tmp_path, space, tuple(lower))
    assert records.read_genome(path, fewer) == tuple(level - 1 for level in lower)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda lines: lines[:-1], "no level for 1 of 14 units .first: model.layers.1.mlp.down_proj"),
        (lambda lines: [*lines, lines[0]], "twice"),
        (lambda lines: [*lines, "model.layers.9.q: 3"], "'model.layers.9.q', which is no unit"),
        (lambda lines: [*lines[:-1], lines[-1][:-1] + "7"], "line 14 of .* level '7': this database has 6, 5, 4, 3, 2"),
        (lambda lines: [*lines[:-1], "hello"], "expected 'unit name: level'"),
        (lambda lines: [], "no level for 14 of 14"),
    ],
)
def test_lines_that_do_not_fit_are_refused(tmp_path: Path, space: Space, edit: Any, words: str) -> None:
    _, path = written(tmp_path, space, mixed(space))
    path.write_text("\n".join(edit(path.read_text().splitlines())))
    with pytest.raises(EvoPressError, match=words):
        records.read_genome(path, space)


def test_missing_huge_and_odd_files_are_refused(tmp_path: Path, space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EvoPressError, match="cannot read"):
        records.read_genome(tmp_path / "none.json", space)
    with pytest.raises(EvoPressError, match="not an ordinary file"):
        records.read_genome(tmp_path, space)
    with pytest.raises(EvoPressError, match="cannot read"):
        records.read_genome("a\0.json", space)
    path, _ = written(tmp_path, space, mixed(space))
    with open(path, "ab") as file:
        file.truncate(64 * 2**20 + 1)  # a sparse file
    with pytest.raises(EvoPressError, match="larger than 64 MB"):
        records.read_genome(path, space)


def check_fuzzed(path: Path, space: Space, data: bytes) -> None:
    path.write_bytes(data)
    genome: Genome | None
    try:
        genome = records.read_genome(path, space)
    except EvoPressError as error:
        sentence, genome = str(error), None
    else:
        sentence = ""
    assert genome is None or genome == space.check(genome)
    assert "\n" not in sentence
    assert len(sentence) < 2000


@FUZZ
@given(data=st.binary(max_size=200))
def test_any_bytes_are_a_genome_or_an_error(tmp_path: Path, space: Space, data: bytes) -> None:
    for name in ("genome.json", "genome.txt"):
        check_fuzzed(tmp_path / name, space, data)


@FUZZ
@given(place=st.integers(0, 10_000), patch=st.binary(max_size=8), cut=st.integers(0, 8))
def test_damaged_genome_files_are_a_genome_or_an_error(tmp_path: Path, space: Space, place: int, patch: bytes, cut: int) -> None:
    for path in written(tmp_path, space, mixed(space)):
        data = path.read_bytes()
        at = place % len(data)
        check_fuzzed(path, space, data[:at] + patch + data[at + cut :])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@FUZZ
@given(
    key=st.sampled_from(["schema", "method", "database", "units", "budget", "cost", "name", "level", "label"]),
    value=JSON,
)
def test_any_value_in_a_genome_file_is_a_genome_or_an_error(tmp_path: Path, space: Space, key: str, value: object) -> None:
    path, _ = written(tmp_path, space, mixed(space))
    document = json.loads(path.read_text())
    document["units"][3][key] = value
    check_fuzzed(path, space, json.dumps(document).encode())
    document[key] = value
    check_fuzzed(path, space, json.dumps(document).encode())
