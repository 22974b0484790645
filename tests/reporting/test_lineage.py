"""Figures of a search's lineage: marks where units changed, for any method and any part of a search."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from evopress.reporting import drawing
from evopress.reporting.figures import convergence
from evopress.reporting.lineage import lineage, lineage_figures, selection, switches, words
from evopress.units import Level, Space, Unit

BLUE, ORANGE = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)


@pytest.fixture(autouse=True)
def warnings_are_errors() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def pixels(path: Path, colour: tuple[int, int, int]) -> int:
    """Count the pixels of exactly one colour."""
    image = (imread(path)[..., :3] * 255).round().astype(int)
    return int((image == np.array(colour)).all(axis=-1).sum())


def drop_space(kinds: tuple[str, ...], blocks: int = 6, width: int = 1) -> Space:
    """Units that are kept or dropped, some of which must stay."""
    keep, drop = Level("keep", 1, "keep", 800), Level("drop", 0, "drop", 0)
    return Space(
        "drop",
        tuple(
            Unit(f"layers.{block}.{kind}", block, kind, 50, (keep,) if block == 0 else (keep, drop))
            for block in range(0, blocks * width, width)
            for kind in kinds
        ),
    )


def drop_records(space: Space, *, seed: int = 0) -> list[dict[str, Any]]:
    """Make up a search that drops a third and exchanges two units now and then."""
    rng = np.random.default_rng(seed)
    free = [index for index, unit in enumerate(space.units) if len(unit.levels) > 1]
    genome = [0] * len(space)
    for index in free[: max(1, len(free) // 3)]:
        genome[index] = 1
    records: list[dict[str, Any]] = []
    for generation in range(12):
        changed: list[list[int]] = []
        if generation % 3 == 1:
            up = int(rng.choice([index for index in free if genome[index] == 1]))
            down = int(rng.choice([index for index in free if genome[index] == 0]))
            genome[up], genome[down] = 0, 1
            changed = [[up, 1, 0], [down, 0, 1]]
        records.append(
            {
                "generation": generation,
                "genome": list(genome),
                "accepted": bool(changed),
                "switches": changed,
                "fitness": 2.0 - 0.1 * generation,
                "parent_fitness": 2.05 - 0.1 * generation if generation else None,
                "stages": [{"tokens": 64, "num_candidates": 4, "fitnesses": [2.0, 2.5], "survivors": [0]}] if generation else [],
            }
        )
    return records


def test_a_whole_search(run: Any, tmp_path: Path) -> None:
    paths = lineage_figures(run.records, run.space, tmp_path)
    assert [path.name for path in paths] == [
        f"{name}.{suffix}" for name in ("switches", "selection", "lineage") for suffix in ("png", "svg")
    ]
    ups = sum(after < before for record in run.records for _, before, after in record["switches"])
    assert ups > 20
    for colour in (BLUE, ORANGE):
        assert pixels(tmp_path / "switches.png", colour) > 20 * ups
    svg = (tmp_path / "selection.svg").read_text()
    assert "stage 1: best, 512 tokens" in svg
    assert "more bits" in (tmp_path / "switches.svg").read_text()


def test_marks_are_where_units_changed(run: Any, tmp_path: Path) -> None:
    """One unit that goes up leaves blue marks alone, in the upper half of the figure where its block is."""
    record = {**run.records[5], "accepted": True, "switches": [[3, 4, 3]]}
    switches([run.records[0], record], run.space, tmp_path)
    image = (imread(tmp_path / "switches.png")[..., :3] * 255).round().astype(int)
    rows, columns = np.where((image == np.array(BLUE)).all(axis=-1))
    assert len(rows) and pixels(tmp_path / "switches.png", ORANGE) == 0
    marks = rows < image.shape[0] * 0.9  # without the legend
    assert rows[marks].max() < image.shape[0] / 4
    assert columns[marks].min() > image.shape[1] / 2  # generation 5 of 0 to 6


@pytest.mark.parametrize(("kinds", "width"), [(("attention", "mlp"), 1), (("block",), 1), (("pair",), 2)])
def test_dropping_has_two_labels(kinds: tuple[str, ...], width: int, tmp_path: Path) -> None:
    space = drop_space(kinds, width=width)
    assert words(space) == ("kept again", "dropped")
    lineage_figures(drop_records(space), space, tmp_path)
    assert pixels(tmp_path / "switches.png", BLUE) > 50
    assert pixels(tmp_path / "switches.png", ORANGE) > 50
    svg = (tmp_path / "switches.svg").read_text()
    assert f"<!-- {width} {kinds[0]} -->" in svg  # few units: every row has its name
    assert "kept again" in svg
    assert "share of modules dropped" in (tmp_path / "lineage.svg").read_text()


def test_blue_has_gained_whatever_is_measured(run: Any, tmp_path: Path) -> None:
    """With bits more is a gain, with sparsity less is."""
    space = drop_space(("block",))
    before, after = [0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]
    records = [{"generation": 0, "genome": before}, {"generation": 1, "genome": after, "accepted": True}]
    lineage(records, space, tmp_path)
    image = (imread(tmp_path / "lineage.png")[..., :3] * 255).round().astype(int)
    dark_blue = np.where((abs(image - np.array((5, 48, 97))) < 3).all(axis=-1))[0]
    dark_red = np.where((abs(image - np.array((103, 0, 31))) < 3).all(axis=-1))[0]
    assert np.median(dark_blue) < np.median(dark_red)  # block 1 was kept again, block 5 dropped


@pytest.mark.parametrize("figures", ["convergence", "lineage"])
def test_what_has_many_points_is_a_picture_in_an_svg(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figures: str
) -> None:
    def drawn(folder: Path) -> list[Path]:
        return convergence(run.records, folder) if figures == "convergence" else lineage_figures(run.records, run.space, folder)

    few = drawn(tmp_path / "few")
    monkeypatch.setattr(drawing, "_MOST_POINTS", 10)
    for before, after in zip(few, drawn(tmp_path / "many"), strict=True):
        if before.suffix == ".svg":
            pictures = [path.read_text().count("<image") for path in (before, after)]
            assert pictures[1] > pictures[0] == (before.stem == "lineage"), before.stem  # whose bar of colours is one
        else:
            assert before.read_bytes() == after.read_bytes()


def test_parts_of_a_search(run: Any, tmp_path: Path) -> None:
    assert lineage_figures([], run.space, tmp_path) == []
    assert lineage_figures(run.records[:1], run.space, tmp_path) == []
    assert not tmp_path.joinpath("selection.png").exists()
    nothing = [{**record, "accepted": False, "switches": []} for record in run.records[:4]]
    assert [path.stem for path in lineage_figures(nothing, run.space, tmp_path)] == ["selection", "selection"]
    bare = [{"generation": 1}, {"generation": 2, "fitness": None, "parent_fitness": None, "stages": None}]
    assert len(selection(bare, tmp_path, fitness="perplexity")) == 2


def test_the_same_data_give_the_same_files(run: Any, tmp_path: Path) -> None:
    first, second = (lineage_figures(run.records, run.space, tmp_path / name) for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
