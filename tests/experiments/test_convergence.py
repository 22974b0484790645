"""Convergence of sweeps: what is measured is drawn, mean and range over seeds, at what all of them have reached."""

from __future__ import annotations

import csv
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from in_process import run_script
from matplotlib.image import imread
from omegaconf import OmegaConf

from evopress.errors import EvoPressError
from evopress.finished import settings_digest
from experiments import convergence
from experiments.composed import settings_of
from experiments.convergence import KL, Point, band, curves, make_figures, on_curves_text, text_of
from experiments.specs import SPECS
from experiments.sweeps import expected_jobs, read_sweep

CONFIG = {"model": {"name": "toy", "path": None}, "scale": {"name": "mini"}, "data": {"source": "python_docs"}, "search": {}}


@pytest.fixture(autouse=True)
def warnings_are_errors() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


TOKENS = 1000


def measures(kl: float, tokens: int | None = TOKENS) -> dict[str, Any]:
    found: dict[str, Any] = {"kl": kl, "perplexity": {"docs": 10 * kl}, "top1_agreement": 0.5}
    return found if tokens is None else {**found, "num_tokens": tokens}


def write_search(
    root: Path,
    axes: dict[str, Any],
    kls: list[float | None],
    *,
    pace: float = 1.0,
    finished: bool = True,
    tokens: int | None = TOKENS,
) -> Path:
    """Write a run folder whose search measured these held-out KLs, one a generation; None: it did not measure there.

    The table's rows are of another text; on that of the search, uniform_3 has 2.5 and the search what it ended with.
    """
    job = root / "_".join(f"{key.replace('/', '.')}-{value}" for key, value in axes.items())
    (job / ".hydra").mkdir(parents=True)
    (job / ".hydra" / "overrides.yaml").write_text(OmegaConf.to_yaml([f"{k}={v}" for k, v in axes.items()]), encoding="utf-8")
    (job / ".hydra" / "config.yaml").write_text(OmegaConf.to_yaml(CONFIG), encoding="utf-8")
    lines = []
    for generation, kl in enumerate(kls):
        record: dict[str, Any] = {"generation": generation, "tokens": 1000 * generation, "seconds": pace * generation}
        if kl is not None:
            record["held_out"] = measures(kl, tokens)
        lines.append(json.dumps(record) + "\n")
    (job / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    rows = [
        {"name": "dense", "kl": 0.0, "perplexity": {"docs": 5.0}},
        {"name": "uniform_3", "kl": 3.0, "perplexity": {"docs": 30.0}, "held_out_in_search": measures(2.5)},
        {"name": "evopress", "kl": 1.0, "perplexity": {"docs": 12.0}, "held_out_in_search": measures(kls[-1] or 1.0)},
    ]
    (job / "result.json").write_text(json.dumps({"schema": 1, "rows": rows if finished else []}), encoding="utf-8")
    return job


def table_7(root: Path) -> None:
    """Two widths, two fitness functions, two seeds."""
    for bits in ("3.0", "4.0"):
        for name, end in (("perplexity", 1.5), ("kl", 1.0)):
            for seed in (0, 1):
                axes = {"bits": bits, "fitness.name": name, "seed": seed}
                write_search(root / "table7", axes, [4.0 + seed, None, 2.0 + seed, end + seed], pace=1.0 + seed)


def points(*pairs: tuple[float, float]) -> list[Point]:
    return [Point({"generation": x, "tokens": 10 * x, "seconds": x / 2}, {KL: y}) for x, y in pairs]


# Mean and range


def test_the_band_is_mean_and_range_over_seeds() -> None:
    curve = {"0": points((0, 4.0), (10, 2.0)), "1": points((0, 6.0), (10, 3.0)), "2": points((0, 5.0), (10, 1.0))}
    assert band(curve, "generation", KL) == [(0, 5.0, 4.0, 6.0), (10, 2.0, 1.0, 3.0)]
    assert [point[0] for point in band(curve, "tokens", KL)] == [0, 100]
    assert band(curve, "generation", "ppl docs") == []


def test_between_measurements_a_curve_is_a_straight_line() -> None:
    """Seconds never agree between seeds: every measured time is a point from where all have begun; who has ended stays."""
    curve = {"0": points((0, 4.0), (10, 2.0), (30, 1.0)), "1": points((2, 5.0), (12, 3.0))}
    found = band(curve, "generation", KL)
    assert [place for place, *_ in found] == [2, 10, 12, 30]
    assert found[-1] == (30, 2.0, 1.0, 3.0), "the mean of the ends"
    first, second, third, _ = (dict(zip(("mean", "least", "most"), values, strict=True)) for _, *values in found)
    assert (first["least"], first["most"]) == (pytest.approx(3.6), 5.0)
    assert (second["least"], second["most"]) == (2.0, pytest.approx(3.4))
    assert third["mean"] == pytest.approx((2.0 - 0.1 + 3.0) / 2)


def test_one_seed_is_its_own_band() -> None:
    assert band({"0": points((0, 4.0), (5, 2.0))}, "generation", KL) == [(0, 4.0, 4.0, 4.0), (5, 2.0, 2.0, 2.0)]
    assert band({"0": points((3, 4.0))}, "generation", KL) == [(3, 4.0, 4.0, 4.0)]


# What is read


def test_curves_are_those_of_the_tables_variants(tmp_path: Path) -> None:
    table_7(tmp_path)
    sweep = read_sweep(tmp_path / "table7", expected_jobs("table7"))
    found = curves(sweep, SPECS["table7"])
    assert list(found) == [("3.0",), ("4.0",)]
    assert list(found["3.0",]) == ["EvoPress (PPL)", "EvoPress (KL)"]
    curve = found["3.0",]["EvoPress (KL)"]
    assert list(curve) == ["0", "1"]
    assert [(point.x["generation"], point.values) for point in curve["1"]] == [
        (0, {KL: 5.0, "ppl docs": 50.0}),
        (2, {KL: 3.0, "ppl docs": 30.0}),
        (3, {KL: 2.0, "ppl docs": 20.0}),
    ]


def test_figures_and_measurements_of_a_sweep(tmp_path: Path) -> None:
    table_7(tmp_path)
    out = tmp_path / "out"
    sweep, paths = make_figures("table7", root=tmp_path, out=out)
    names = ["convergence.csv", *(f"convergence_bits-{bits}.{suffix}" for bits in ("3.0", "4.0") for suffix in ("png", "svg"))]
    assert [path.name for path in paths] == names
    assert len(sweep.jobs) == 8 and len(sweep.missing) == 4  # the third seed
    with paths[0].open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 * 3
    first = {"bits": "3.0", "method": "EvoPress (PPL)", "seed": "0", "generation": "0", "tokens": "0", "seconds": "0"}
    assert rows[0] == first | {KL: "4", "ppl docs": "40"}
    image = imread(paths[1])
    drawn = (image[..., :3] * 255).round().astype(int)
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)):  # both variants, and uniform
        assert (drawn == colour).all(axis=-1).any()
    text = paths[2].read_text(encoding="utf-8")
    assert "Table 7" in text and "bits=3.0" in text and "<!-- uniform -->" in text
    assert "the first 1,000 held-out tokens" in text
    assert "candidate tokens" in text and "seconds" not in text and "no time: Table 3 has some of these searches" in text
    again = make_figures("table7", root=tmp_path, out=tmp_path / "again")[1]
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths]


def test_experiments_that_share_searches_say_so() -> None:
    """Of two that have the same search the second takes no time for it."""
    assert {name for name, spec in SPECS.items() if spec.shares} == {"table5", "table6", "table7", "table7_best"}
    assert all(spec.shares in SPECS for spec in SPECS.values() if spec.shares)
    three, seven = (settings_of([f"+experiment={name}", "bits=3", "seed=0", "baselines.names=[]"]) for name in ("table3", "table7"))
    assert settings_digest(three) == settings_digest(seven)


def test_lines_are_of_the_curves_text(tmp_path: Path) -> None:
    """The table's rows are on all held-out text; what is drawn beside the curves is on the curves' own."""
    for name in ("kl", "perplexity"):
        write_search(tmp_path / "figure3", {"fitness.name": name, "seed": 0}, [4.0, 2.0])
    jobs = read_sweep(tmp_path / "figure3", expected_jobs("figure3")).jobs
    values = on_curves_text(jobs, SPECS["figure3"])[()]
    assert values["uniform"] == {KL: {"0": 2.5}, "ppl docs": {"0": 25.0}, "top-1 agreement": {"0": 0.5}}
    assert values["EvoPress (KL)"][KL] == {"0": 2.0}
    early = write_search(tmp_path / "early" / "figure3", {"fitness.name": "kl", "seed": 0}, [4.0, 2.0], tokens=None)
    jobs = read_sweep(early.parent, expected_jobs("figure3")).jobs
    assert on_curves_text(jobs, SPECS["figure3"]) == {}  # nobody can tell what text it was
    drawn = make_figures("figure3", root=early.parent.parent, out=tmp_path / "out")[1]
    assert "<!-- uniform -->" not in drawn[2].read_text(encoding="utf-8")


def test_searches_that_were_measured_on_another_text_are_not_averaged_in(tmp_path: Path) -> None:
    for seed, tokens in ((0, TOKENS), (1, 4 * TOKENS), (2, TOKENS)):
        job = write_search(
            tmp_path / "table4", {"search.distribution": "constant", "search.max_switches": 1, "seed": seed}, [4.0, 2.0]
        )
        record = {"generation": 1, "tokens": 1000, "seconds": 1.0, "held_out": measures(1.0 + seed, tokens)}
        (job / "metrics.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
        result = json.loads((job / "result.json").read_text(encoding="utf-8"))
        for row in result["rows"][1:]:
            row["held_out_in_search"] = measures(2.5 + seed, tokens)
        (job / "result.json").write_text(json.dumps(result), encoding="utf-8")
    sweep = read_sweep(tmp_path / "table4", expected_jobs("table4"))
    assert list(curves(sweep, SPECS["table4"])[()]["constant_1"]) == ["0", "2"]
    assert on_curves_text(sweep.jobs, SPECS["table4"])[()]["constant_1"][KL] == {"0": 2.5, "2": 4.5}
    assert text_of(sweep.jobs) == "the first 1,000 held-out tokens; without 1 job on another text"


def test_a_half_finished_sweep_gives_what_there_is(tmp_path: Path) -> None:
    root = tmp_path / "table4"
    write_search(root, {"search.distribution": "constant", "search.max_switches": 1, "seed": 0}, [4.0, 2.0])
    write_search(root, {"search.distribution": "constant", "search.max_switches": 1, "seed": 1}, [5.0, 3.0], finished=False)
    write_search(root, {"search/mutation": "constant_3", "seed": 0}, [None, None])  # as earlier versions wrote it
    sweep, paths = make_figures("table4", root=tmp_path, out=tmp_path / "out")
    assert list(curves(sweep, SPECS["table4"])[()]) == ["constant_1"]
    assert [path.name for path in paths] == ["convergence.csv", "convergence.png", "convergence.svg"]
    assert "1 seed; the first" in paths[2].read_text(encoding="utf-8")
    assert len(sweep.unfinished) == 1


def test_nothing_measured_is_one_sentence(tmp_path: Path) -> None:
    write_search(tmp_path / "table4", {"search/mutation": "constant_1", "seed": 0}, [None])
    for name in ("table4", "table5"):
        with pytest.raises(EvoPressError, match=rf"no finished search .*\+experiment={name} first"):
            make_figures(name, root=tmp_path, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_full_search_stands_beside_the_super_fast_one(tmp_path: Path) -> None:
    """Figure 3: curves of two sweeps; without the second the first is drawn alone."""
    for name in ("kl", "perplexity"):
        write_search(tmp_path / "figure3", {"fitness.name": name, "seed": 0}, [4.0, 2.0])
    alone = make_figures("figure3", root=tmp_path, out=tmp_path / "alone")[1]
    assert "full search" not in alone[2].read_text(encoding="utf-8")
    write_search(tmp_path / "table2_sparsity", {"sparsity": "0.7", "seed": 0}, [4.0, 1.0])
    both = make_figures("figure3", root=tmp_path, out=tmp_path / "both")[1]
    assert "full search" in both[2].read_text(encoding="utf-8")
    assert "seconds" in both[2].read_text(encoding="utf-8")
    assert "full search,0,1,1000,1,1,10" in both[0].read_text(encoding="utf-8")


def test_companions_are_experiments() -> None:
    for experiment, (_, other, variant) in convergence.COMPANIONS.items():
        assert {experiment, other} <= set(SPECS)
        assert SPECS[other].variant(expected_jobs(other)[0], variant) == variant


def test_the_command_line(tmp_path: Path) -> None:
    write_search(tmp_path / "figure3", {"fitness.name": "kl", "seed": 0}, [4.0, 2.0])
    given = ("--root", str(tmp_path), "--out", str(tmp_path / "out"))
    done = run_script("experiments.convergence", "figure3", *given)
    assert done.code == 0, done.text
    assert "missing: fitness.name=kl seed=1" in done.text
    assert "not drawn: full search, which is of table2_sparsity" in done.text
    assert (tmp_path / "out" / "convergence.png").exists()
    done = run_script("experiments.convergence", "table6", *given)
    assert done.code == 1
    assert done.text.startswith("error: no finished search") and "Traceback" not in done.text
