"""The page of a sweep: its table, curves, jobs and cost on one page, also of a half-finished one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from in_process import run_script
from omegaconf import OmegaConf

from evopress.errors import EvoPressError
from experiments.sweep_report import make_report

CONFIG = {
    "model": {"name": "toy", "path": None},
    "scale": {"name": "mini"},
    "data": {"source": "python_docs"},
    "method": {"name": "sparsity"},
    "search": {"num_offspring": 16},
    "tracker": {"name": "none"},
}
EVIL = "<script>alert(1)</script>"


def write_job(root: Path, seed: int, *, finished: bool = True, measured: bool = True) -> Path:
    """Write a made-up job of table 2's sweep."""
    job = root / "table2_sparsity" / f"sparsity-0.7_seed-{seed}"
    (job / ".hydra").mkdir(parents=True)
    overrides = ["sparsity=0.7", f"seed={seed}", "+experiment=table2_sparsity"]
    (job / ".hydra" / "overrides.yaml").write_text(OmegaConf.to_yaml(overrides), encoding="utf-8")
    (job / ".hydra" / "config.yaml").write_text(OmegaConf.to_yaml({**CONFIG, "sparsity": 0.7, "seed": seed}), encoding="utf-8")
    (job / "environment.json").write_text(json.dumps({"machine": EVIL, "python": f"3.{11 + seed % 2}"}), encoding="utf-8")

    def row(name: str, kl: float) -> dict[str, Any]:
        return {"name": name, "sparsity": 0.7, "kl": kl, "perplexity": {"python_docs": 10 + kl}}

    result: dict[str, Any] = {"schema": 1, "memory": {"peak_rss_bytes": 2_500_000_000}}
    if finished:
        result["rows"] = [row("dense", 0.0), row("uniform", 2.0), row("owl", 1.5), row("evopress", 1.0 + seed / 100)]
        result["search"] = {"generations": 2, "tokens": 1000, "seconds": 60.0 + seed, "evaluations": 30}
    (job / "result.json").write_text(json.dumps(result), encoding="utf-8")
    lines = []
    for generation in range(3):
        record: dict[str, Any] = {"generation": generation, "tokens": 500 * generation, "seconds": 30.0 * generation}
        if measured:
            record["held_out"] = {"kl": 2.0 - generation / 2 + seed / 100, "perplexity": {"python_docs": 12.0 - generation}}
        lines.append(json.dumps(record) + "\n")
    (job / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    return job


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three seeds; seed 0 has a report and a heat map of its own."""
    root = tmp_path / "multirun"
    jobs = [write_job(root, seed) for seed in range(3)]
    (jobs[0] / "report.html").write_text("a report")
    (jobs[0] / "figures").mkdir()
    for name in ("level_heatmap", "lineage"):
        (jobs[0] / "figures" / f"{name}.png").write_bytes(b"not looked at")
    return root


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "experiments" / "table2_sparsity"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(
        f"# Table 2\n\n**Claim.** EvoPress is better, see [`table.md`](table.md). {EVIL}\n\n"
        "<!-- results -->\n<!-- end of results -->\n\n![Convergence](convergence.png)\n\n**What it shows.** It is.\n"
    )
    return folder


def sections(page: str) -> dict[str, str]:
    return dict(re.findall(r"<section><h2>(.*?)</h2>\n(.*?)</section>", page, re.DOTALL))


def test_a_whole_sweep(root: Path, out: Path) -> None:
    sweep, path = make_report("table2_sparsity", root=root, out=out)
    assert (len(sweep.jobs), path) == (3, out / "report.html")
    found = sections(path.read_text())
    assert list(found) == [
        "What was asked",
        "What was found",
        "Convergence",
        "Where the budget went, and how",
        "Jobs",
        "What it cost",
        "Run it again",
        "Environment",
    ]
    assert "<b>Claim.</b> EvoPress is better, see <a href=" in found["What was asked"]
    assert "What it shows" not in found["What was asked"] and "<b>What it shows.</b> It is." in found["What was found"]
    table = [re.findall("<t[dh]>(.*?)</t[dh]>", row) for row in re.findall("<tr>(.*?)</tr>", found["What was found"])]
    kl = table[0].index("held-out KL")
    assert {row[0]: row[kl] for row in table[1:5]} == {
        "dense": "0",
        "uniform": "2.000",
        "OWL": "1.500",
        "EvoPress": "1.010 (1.000..1.020)",
    }
    assert "data:image/svg+xml;base64," in found["Convergence"]
    assert found["Where the budget went, and how"].count("<img") == 2
    assert "sparsity=0.7 seed=0" in found["Where the budget went, and how"]
    assert "<dd>3 min 3 s</dd>" in found["What it cost"]  # 60 + 61 + 62 seconds
    assert "<td>EvoPress</td><td>3</td><td>30</td><td>1,000</td><td>1 min 1 s</td>" in found["What it cost"]
    assert "<dd>2.5 GB</dd>" in found["What it cost"]
    assert "+experiment=table2_sparsity" in found["Run it again"]
    assert "<dd>3.11, 3.12</dd>" in found["Environment"]


def test_the_page_holds_all_it_shows_and_links_to_the_jobs(root: Path, out: Path) -> None:
    _, path = make_report("table2_sparsity", root=root, out=out)
    page = path.read_text()
    assert "<script" not in page and EVIL.replace("<", "&lt;").replace(">", "&gt;") in page
    assert all(source.startswith("data:image/") for source in re.findall(r'src="([^"]*)', page))
    links = re.findall(r'href="([^"]*)"', page)
    assert "../../multirun/table2_sparsity/sparsity-0.7_seed-0/report.html" in links
    for link in links:
        assert (out / link).is_file(), link
    assert sections(page)["Jobs"].count("<td>none</td>") == 2  # jobs without a report of their own


def test_kl_and_perplexity_of_several_texts_are_of_the_runs_own(root: Path, out: Path) -> None:
    for path in (root / "table2_sparsity").glob("*/result.json"):
        result = json.loads(path.read_text())
        for row in result["rows"]:
            row |= {"kl_by_data_set": {"python_docs": row["kl"], "wiki": 9.0}, "kl": (row["kl"] + 9.0) / 2}
            row["perplexity"]["wiki"] = 99.0
        path.write_text(json.dumps(result))
    _, path = make_report("table2_sparsity", root=root, out=out)
    assert "<td>sparsity=0.7 seed=1</td><td>1.010</td><td>11.01</td>" in sections(path.read_text())["Jobs"]


def test_a_half_finished_sweep_says_what_is_missing(root: Path, out: Path) -> None:
    job = root / "table2_sparsity" / "sparsity-0.7_seed-2"
    (job / "result.json").write_text("{}")
    sweep, path = make_report("table2_sparsity", root=root, out=out)
    assert len(sweep.jobs) == 2
    missing = sections(path.read_text())["What is missing"]
    assert "2 of 3 jobs have finished" in missing
    assert "not finished: sparsity=0.7 seed=2" in missing
    assert "left out: sparsity-0.7_seed-2: not evaluated yet" in missing


def test_without_measurements_on_the_way_there_are_no_curves(tmp_path: Path, out: Path) -> None:
    root = tmp_path / "other"
    for seed in range(3):
        write_job(root, seed, measured=False)
    page = make_report("table2_sparsity", root=root, out=out)[1].read_text()
    assert "no finished search" in sections(page)["Convergence"]
    assert "<img" not in page


def test_a_sweep_without_results_is_refused(tmp_path: Path, out: Path) -> None:
    with pytest.raises(EvoPressError, match="no finished job lies in"):
        make_report("table2_sparsity", root=tmp_path / "nothing", out=out)


def test_the_command_line(root: Path, out: Path) -> None:
    done = run_script("experiments.sweep_report", "table2_sparsity", "--root", str(root), "--out", str(out))
    assert (done.code, done.text.splitlines()) == (0, [str(out / "report.html")])
    done = run_script("experiments.sweep_report", "table2_sparsity", "--root", str(root / "nowhere"), "--out", str(out))
    assert done.code == 1
    assert done.text.startswith("error: no finished job lies in")
