"""Tables of sweeps: what is collected, what is missing, and what may be said about differences."""

from __future__ import annotations

import csv
import errno
import json
import math
from pathlib import Path
from typing import Any

import pytest
from in_process import run_script
from omegaconf import OmegaConf

from evopress.config import config_folder
from evopress.errors import EvoPressError
from experiments import tables
from experiments.specs import SPECS, Spec, by_axis
from experiments.sweeps import describe, expected_jobs, read_sweep
from experiments.tables import Difference, Table, make_table

EXPERIMENTS = Path(tables.__file__).parent
CONFIG = {
    "model": {"name": "toy", "path": None},
    "scale": {"name": "mini"},
    "data": {"source": "python_docs"},
    "method": {"name": "sparsity"},
    "search": {"num_offspring": 16},
    "tracker": {"name": "none"},
}


def write_job(root: Path, folder: str, overrides: list[str], rows: list[dict[str, Any]] | None, **config: Any) -> Path:
    """Write a job folder with made-up results; None: it has not been evaluated."""
    job = root / folder
    (job / ".hydra").mkdir(parents=True)
    (job / ".hydra" / "overrides.yaml").write_text(OmegaConf.to_yaml(overrides), encoding="utf-8")
    (job / ".hydra" / "config.yaml").write_text(OmegaConf.to_yaml(CONFIG | config), encoding="utf-8")
    (job / "environment.json").write_text(json.dumps({"git_revision": "abc", "machine": "a machine"}), encoding="utf-8")
    result: dict[str, Any] = {"schema": 1, "database": {"path": "x"}}
    if rows is not None:
        result |= {"rows": rows, "search": {"seconds": 12.0, "tokens": 100}}
    (job / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return job


def row(name: str, kl: float, ppl: float, *, kept: int = 300) -> dict[str, Any]:
    return {"name": name, "sparsity": 0.7, "weights_kept": kept, "kl": kl, "perplexity": {"python_docs": ppl}}


DENSE = {"name": "dense", "sparsity": 0.0, "kl": 0.0, "perplexity": {"python_docs": 10.0}}


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Three seeds of table 2: OWL about as good as EvoPress by KL, uniform clearly worse."""
    root = tmp_path / "multirun"
    for seed, (owl, ours) in enumerate([(0.50, 0.49), (0.50, 0.52), (0.50, 0.50)]):
        rows = [DENSE, row("uniform", 1.0, 30.0), row("owl", owl, 20.0 + seed), row("evopress", ours, 15.0)]
        overrides = ["sparsity=0.7", f"seed={seed}", "+experiment=table2_sparsity"]
        write_job(root / "table2_sparsity", f"sparsity-0.7_seed-{seed}", overrides, rows, sparsity=0.7, seed=seed)
    return root


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("README.md", "paper.csv"):
        (folder / name).write_bytes((EXPERIMENTS / "table2_sparsity" / name).read_bytes())
    return folder


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def line_of(text: str, start: str, nth: int = 0) -> list[str]:
    """Return the cells of the nth table line that begins with a cell."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in lines[nth].strip("|").split("|")]


# What may be said


@pytest.mark.parametrize(
    ("ours", "theirs", "best", "verdict"),
    [
        ([1.0, 1.1, 1.2], [2.0, 2.1, 2.2], min, "better"),
        ([2.0, 2.1, 2.2], [1.0, 1.1, 1.2], min, "worse"),
        ([2.0, 2.1, 2.2], [1.0, 1.1, 1.2], max, "better"),
        ([1.0, 2.0, 3.0], [1.1, 1.8, 3.1], min, "tie"),
        ([1.0, 1.0], [1.0, 1.0], min, "tie"),
        ([1.5, 1.5], [1.0, 1.0], min, "alike on all seeds"),
        ([1.0], [2.0], min, "one seed"),
        ([], [2.0], min, ""),
    ],
)
def test_verdicts(ours: list[float], theirs: list[float], best: Any, verdict: str) -> None:
    difference = Difference.of({str(i): x for i, x in enumerate(ours)}, {str(i): x for i, x in enumerate(theirs)})
    assert difference.verdict(best) == verdict


def test_differences_are_paired_by_seed() -> None:
    """Seeds differ much and the methods little: only pairs show which is better."""
    ours = {"0": 1.0, "1": 5.0, "2": 9.0, "7": 100.0}
    difference = Difference.of(ours, {"2": 9.3, "0": 1.2, "1": 5.1})
    assert difference.num_pairs == 3
    assert difference.mean == pytest.approx(-0.2)
    assert difference.standard_error == pytest.approx(0.1 / math.sqrt(3))
    assert difference.verdict(min) == "better"


# What is collected


def test_a_whole_sweep(sweep: Path, out: Path) -> None:
    found = make_table("table2_sparsity", root=sweep, out=out)
    assert (len(found.jobs), found.missing, found.unfinished) == (3, (), ())
    text = (out / "table.md").read_text(encoding="utf-8")
    assert text.startswith("# Table 2: 70% unstructured sparsity\n")
    assert "Missing" not in text
    assert "Model toy, scale mini, text python_docs, seeds 0, 1, 2; a search took 12 s on average" in text
    headers = line_of(text, "method")
    assert headers == [
        *("method", "sparsity", "weights kept", "held-out KL", "ppl python_docs"),
        *("held-out KL: difference to EvoPress", "seeds"),
    ]
    assert line_of(text, "dense")[4:] == ["10.00", "", "3"]
    assert line_of(text, "uniform")[2:] == ["300", "1.000", "30.00", "0.497 ± 0.0088 (worse)", "3"]
    assert line_of(text, "OWL")[3:] == ["0.5000", "21.00 (20.00..22.00)", "-0.00333 ± 0.0088 (tie)", "3"]
    assert line_of(text, "EvoPress")[3:] == ["0.5033 (0.4900..0.5200)", "15.00", "", "3"]
    assert "- Ours, by held-out KL: OWL ≈ EvoPress < uniform.\n" in text
    assert "- Ours, by ppl python_docs: EvoPress < OWL < uniform.\n" in text
    assert "- The paper: EvoPress < OWL < uniform in 8 of 8 columns.\n" in text

    results = {(r["method"], r["measure"]): r for r in read_csv(out / "results.csv")}
    owl = results["owl", "ppl python_docs"]
    assert (owl["sparsity"], owl["seeds"], owl["mean"], owl["std"], owl["min"], owl["max"]) == ("0.7", "3", "21", "1", "20", "22")
    assert (owl["difference"], owl["verdict"]) == ("6", "worse")
    assert (results["evopress", "search tokens"]["mean"], results["evopress", "search seconds"]["mean"]) == ("100", "12")
    assert results["dense", "held-out KL"]["verdict"] == results["evopress", "held-out KL"]["verdict"] == ""
    runs = [r["value"] for r in read_csv(out / "runs.csv") if (r["method"], r["measure"]) == ("evopress", "held-out KL")]
    assert runs == ["0.49", "0.52", "0.5"]


def test_the_papers_numbers_stand_beside_ours(sweep: Path, out: Path) -> None:
    make_table("table2_sparsity", root=sweep, out=out)
    text = (out / "table.md").read_text(encoding="utf-8")
    headers, owl, ours = line_of(text, "method", 1), line_of(text, "OWL", 1), line_of(text, "EvoPress", 1)
    assert headers[1:4] == ["ours: ppl python_docs", "Mistral-7B-v0.3 wikitext2", "Mistral-7B-v0.3 c4"]
    assert owl[1:4] == ["21.00 (×1.40)", "17.22 (×1.19)", "21.66 (×1.32)"]
    assert ours[1:4] == ["15.00", "14.42", "16.46"]


def test_the_readme_is_filled_between_its_marks_again_and_again(sweep: Path, out: Path) -> None:
    before = (out / "README.md").read_text(encoding="utf-8")
    make_table("table2_sparsity", root=sweep, out=out)
    once = (out / "README.md").read_text(encoding="utf-8")
    make_table("table2_sparsity", root=sweep, out=out)
    assert (out / "README.md").read_text(encoding="utf-8") == once
    assert once.count("| EvoPress |") == 2
    for text in (before, once):
        assert text.partition("<!-- results -->")[0] == before.partition("<!-- results -->")[0]
        assert text.partition("<!-- end of results -->")[2] == before.partition("<!-- end of results -->")[2]
    (out / "README.md").write_text("no marks here", encoding="utf-8")
    make_table("table2_sparsity", root=sweep, out=out)
    assert (out / "README.md").read_text(encoding="utf-8") == "no marks here"


def test_a_half_finished_sweep_says_what_is_missing(sweep: Path, out: Path) -> None:
    folder = sweep / "table2_sparsity"
    (folder / "sparsity-0.7_seed-1" / "result.json").unlink()
    (folder / "sparsity-0.7_seed-2" / "result.json").write_text("{", encoding="utf-8")
    write_job(folder, "sparsity-0.7_seed-3", ["sparsity=0.7", "seed=3"], None)
    found = make_table("table2_sparsity", root=sweep, out=out)
    assert [describe(axes) for axes in found.missing] == ["sparsity=0.7 seed=1", "sparsity=0.7 seed=2"]
    reasons = {path.name[-1]: reason for path, reason in found.unfinished}
    assert reasons["1"] == reasons["3"] == "not evaluated yet"
    assert "not valid JSON" in reasons["2"]
    text = (out / "table.md").read_text(encoding="utf-8")
    assert "Missing: sparsity=0.7 seed=1; sparsity=0.7 seed=2." in text
    assert line_of(text, "OWL")[-2:] == ["0.0100 (one seed)", "1"]
    assert "- Ours, by held-out KL: EvoPress ? OWL ? uniform.\n" in text  # one seed decides nothing


def test_more_seeds_than_the_experiment_asks_for_are_used(sweep: Path, out: Path) -> None:
    rows = [DENSE, row("uniform", 1.0, 30.0), row("owl", 0.5, 20.0), row("evopress", 0.5, 15.0)]
    write_job(sweep / "table2_sparsity", "later/0", ["sparsity=0.70", "seed=9"], rows)
    found = make_table("table2_sparsity", root=sweep, out=out)
    assert len(found.jobs) == 4
    assert "seeds 0, 1, 2, 9" in (out / "table.md").read_text(encoding="utf-8")
    assert len(Table(found.jobs, SPECS["table2_sparsity"]).groups) == 1  # 0.70 is 0.7


def test_nothing_finished_is_one_sentence(tmp_path: Path, out: Path) -> None:
    with pytest.raises(EvoPressError, match=r"no finished job .*\+experiment=table2_sparsity first"):
        make_table("table2_sparsity", root=tmp_path / "nowhere", out=out)
    assert not (out / "table.md").exists()


def test_two_folders_of_one_job_are_refused(sweep: Path, out: Path) -> None:
    write_job(sweep / "table2_sparsity", "again", ["sparsity=0.7", "seed=1"], [DENSE])
    with pytest.raises(EvoPressError, match=r"again and .*seed-1 are the same job \(sparsity=0.7 seed=1\)"):
        make_table("table2_sparsity", root=sweep, out=out)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model": {"name": "other", "path": None}}, r"model\.name is toy in .* and other in"),
        ({"search": {"num_offspring": 8}}, r"search\.num_offspring is 16"),
        ({"tracker": {"name": "wandb"}}, None),
        ({"stages": ["evaluate"]}, None),
        ({"evaluation": {"every": 0, "every_tokens": 512}}, None),
        ({"evaluation": {"field": "text"}}, None),  # which earlier versions did not ask about, and did
        ({"evaluation": {"field": "body"}}, r"evaluation\.field is text in .* and body in"),
        ({"archive": True, "export": ["mlx"], "export_options": {"mlx": {}}, "level_db": {"root": "there"}}, None),
        ({"refine": {"tokens": 64, "correction": 0.5}}, None),  # which nobody has asked for
        ({"search": {"num_offspring": 16, "strategy": {"name": "evolution"}, "least": {"tokens": []}}}, None),
        (
            {"search": {"num_offspring": 16, "strategy": {"name": "guided", "changes": [8]}}},
            r"search\.strategy\.name is evolution in .* and guided in",
        ),
        ({"scale": {"name": "mini", "offspring": 0.25}, "search": {"num_offspring": "${scaled:64,${scale.offspring}}"}}, None),
        (
            {"scale": {"name": "mini", "offspring": 0.5}, "search": {"num_offspring": "${scaled:64,${scale.offspring}}"}},
            r"search\.num_offspring is 16 in .* and 32 in",
        ),
    ],
)
def test_jobs_of_different_settings_are_not_mixed(change: dict[str, Any], sentence: str | None, sweep: Path, out: Path) -> None:
    rows = [DENSE, row("evopress", 0.5, 15.0)]
    write_job(sweep / "table2_sparsity", "z", ["sparsity=0.7", "seed=5"], rows, **change)
    if sentence is None:
        assert len(make_table("table2_sparsity", root=sweep, out=out).jobs) == 4
    else:
        with pytest.raises(EvoPressError, match=f"not of one table: {sentence}"):
            make_table("table2_sparsity", root=sweep, out=out)


def test_refined_jobs_are_refined_alike(sweep: Path, out: Path) -> None:
    for seed, correction in ((5, 0.5), (6, 0.0)):
        settings = {"stages": ["search", "refine"], "refine": {"tokens": 64, "correction": correction}}
        rows = [DENSE, row("evopress", 0.5, 15.0)]
        write_job(sweep / "table2_sparsity", f"z{seed}", ["sparsity=0.7", f"seed={seed}"], rows, **settings)
    with pytest.raises(EvoPressError, match=r"not of one table: refine\.correction is 0.5 in .* and 0.0 in"):
        make_table("table2_sparsity", root=sweep, out=out)


# Other tables


def test_groups_are_tables_of_their_own(tmp_path: Path) -> None:
    for sparsity in ("0.6", "0.5"):
        for seed in range(2):
            rows = [DENSE, row("uniform", 1.0, 30.0), row("evopress", 0.5, 8.0)]
            write_job(tmp_path / "table14_15_sparsity", f"{sparsity}-{seed}", [f"sparsity={sparsity}", f"seed={seed}"], rows)
    out = tmp_path / "out"
    out.mkdir()
    (out / "paper.csv").write_bytes((EXPERIMENTS / "table14_15_sparsity" / "paper.csv").read_bytes())
    found = make_table("table14_15_sparsity", root=tmp_path, out=out)
    assert [describe(axes) for axes in found.missing] == ["sparsity=0.5 seed=2", "sparsity=0.6 seed=2"]
    text = (out / "table.md").read_text(encoding="utf-8")
    assert text.index("**sparsity=0.5**") < text.index("**sparsity=0.6**")
    assert [line_of(text, "EvoPress", nth)[2] for nth in (1, 3)] == ["5.49", "7.08"]  # the paper's, of that sparsity
    assert not (out / "README.md").exists()


def test_variants_may_be_what_was_swept(tmp_path: Path) -> None:
    """As in the paper's Table 6: EvoPress's row of jobs with different numbers of offspring."""
    for count, kl in (("16", 0.5), ("4", 0.7)):
        for seed in range(3):
            rows = [row("uniform", 1.0, 30.0), row("evopress", kl + seed * kl / 10, 8.0)]
            write_job(
                tmp_path,
                f"{count}-{seed}",
                [f"search.num_offspring={count}", f"seed={seed}"],
                rows,
                search={"num_offspring": count},
            )
    expected = [{"search.num_offspring": count, "seed": str(seed)} for count in ("4", "16") for seed in range(3)]
    table = Table(read_sweep(tmp_path, expected).jobs, Spec("Table 6", variant=by_axis("search.num_offspring"), reference="16"))
    assert table.groups == [()]
    assert table.variants(()) == ["4", "16"]  # as they are asked for, not as the folders are named
    assert table.difference((), "4", "16", "held-out KL").mean == pytest.approx(0.22)
    assert table.order((), "held-out KL") == "16 < 4"


def write_constants(root: Path, sequences: dict[str, list[float]] | None, **more: Any) -> Table:
    """Return the table of two seeds that change nothing in two baselines."""
    for seed in range(2):
        rows = [row("uniform", 2.0, 30.0), row("owl", 2.1, 31.0) | more, row("evopress", 1.0 + seed / 10, 20.0 + seed)]
        for each in rows:
            each["kl_by_data_set"] = {"docs": each["kl"]}
            if sequences is not None:
                each["by_sequence"] = {"docs": {"kl": sequences[each["name"]]}}
        write_job(root, f"{seed}", [f"seed={seed}"], rows)
    return Table(read_sweep(root, [{"seed": f"{seed}"} for seed in range(2)]).jobs, Spec("Any"))


def test_rows_that_no_seed_changes_are_paired_by_sequence(tmp_path: Path) -> None:
    """Two numbers that are the same on every seed are one pair, however often they are there."""
    unknown = write_constants(tmp_path / "a", None)
    assert unknown.has_constants and unknown.order((), "held-out KL docs") == "EvoPress < uniform ? OWL"
    ours = [1.0, 1.1, 1.05]
    near = write_constants(tmp_path / "b", {"uniform": [1.0, 2.0, 3.0], "owl": [1.4, 1.7, 3.2], "evopress": ours})
    assert near.order((), "held-out KL docs") == "EvoPress < uniform ≈ OWL"
    clear = write_constants(tmp_path / "c", {"uniform": [1.0, 2.0, 3.0], "owl": [1.11, 2.1, 3.09], "evopress": ours})
    assert clear.order((), "held-out KL docs") == "EvoPress < uniform < OWL"
    found = clear.difference((), "owl", "uniform", "held-out KL docs")
    assert found.mean == pytest.approx(0.1) and found.num_pairs == 3
    assert found.standard_error == pytest.approx(0.1 * (0.01 / 3**0.5) / 0.1)


def test_what_spends_more_than_the_budget_is_not_compared(tmp_path: Path) -> None:
    table = write_constants(tmp_path, None, within_budget=False)
    assert table.variants(()) == ["owl", "uniform", "evopress"] and table.order((), "held-out KL docs") == "EvoPress < uniform"
    assert line_of(table.markdown(()), "OWL (a larger budget)")[-2:] == ["", "2"]
    assert "verdict" not in next(each for each in table.summary() if each["method"] == "owl")


def write_table_5(root: Path, stages: list[int], *, typed: bool = True, earlier: bool = False, **search: Any) -> None:
    """Write three seeds of first stages with so many tokens each, as this version or an earlier one writes them."""
    for index, tokens in enumerate(stages):
        for seed in range(3):
            axis = f"search/first_stage={tokens}_tokens" if earlier else f"search.paper.tokens=[{tokens},8192]"
            config: dict[str, Any] = {
                "num_offspring": 16,
                "tokens": [tokens // 8, 1024],
                "paper": {"tokens": [tokens, 8192]},
                **search,
            }
            if earlier:  # unresolved, and a config group
                config |= {"tokens": [f"${{scaled:{tokens},${{scale.tokens}},8}}", 1024]}
                del config["paper"]
            job = write_job(
                root / "table5",
                f"{tokens}_tokens-{seed}",
                [axis] * typed + [f"seed={seed}", "+experiment=table5"],
                [DENSE, row("evopress", 0.5 + index / 10 + seed * (index + 1) / 100, 8.0 + index)],
                scale={"name": "mini", "tokens": 0.125},
                search=config,
            )
            choices = {"hydra": {"runtime": {"choices": {"search/first_stage": f"{tokens}_tokens"} if earlier else {}}}}
            (job / ".hydra" / "hydra.yaml").write_text(OmegaConf.to_yaml(choices), encoding="utf-8")


@pytest.mark.parametrize("typed", [True, False])
@pytest.mark.parametrize("earlier", [True, False])
def test_an_axis_may_be_a_list_that_decides_another(earlier: bool, typed: bool, tmp_path: Path) -> None:
    """Table 5: rows by the paper's tokens, with the numbers that they came to, which may differ between jobs."""
    write_table_5(tmp_path, [64, 512, 1024], typed=typed, earlier=earlier)
    out = tmp_path / "out"
    out.mkdir()
    (out / "paper.csv").write_bytes((EXPERIMENTS / "table5" / "paper.csv").read_bytes())
    found = make_table("table5", root=tmp_path, out=out)
    assert {axes["search.paper.tokens"] for axes in found.missing} == {"[256,8192]", "[128,8192]"}
    text = (out / "table.md").read_text(encoding="utf-8")
    assert line_of(text, "method")[:3] == ["method", "search.num_offspring", "search.tokens"]
    names = ["dense", "1024 tokens", "512 tokens", "64 tokens"]  # in the experiment's order
    assert [line.split(" | ")[0].strip("| ") for line in text.splitlines() if line.startswith("| ")][2:6] == names
    assert line_of(text, "512 tokens")[1:3] == ["16", "[64, 1024]"]
    assert line_of(text, "dense")[1:3] == ["", ""]
    assert "better" in line_of(text, "64 tokens")[-2] and line_of(text, "512 tokens")[-2] == ""
    assert line_of(text, "1024 tokens", 1)[2:] == ["16.22 (×1.02)", "17.93 (×0.98)", "12.26 (×0.99)"]
    assert "- Ours, by held-out KL: 64 tokens < 512 tokens < 1024 tokens.\n" in text


def test_what_an_axis_does_not_decide_must_be_alike(tmp_path: Path) -> None:
    write_table_5(tmp_path, [512])
    write_table_5(tmp_path, [64], num_offspring=8)
    with pytest.raises(EvoPressError, match=r"search\.num_offspring is 16 in .*512_tokens-0 and 8 in .*64_tokens-0"):
        make_table("table5", root=tmp_path, out=tmp_path / "out")


def test_a_job_that_does_not_say_its_option_is_left_out(tmp_path: Path) -> None:
    write_table_5(tmp_path, [512], typed=False, earlier=True)
    (tmp_path / "table5" / "512_tokens-1" / ".hydra" / "hydra.yaml").unlink()
    found = read_sweep(tmp_path / "table5", expected_jobs("table5"))
    assert len(found.jobs) == 2
    ((folder, reason),) = found.unfinished
    assert folder.name == "512_tokens-1" and "does not say which search.paper.tokens it is" in reason


def write_table_4(root: Path, *, earlier: bool) -> None:
    """Write a whole sweep of Table 4: seven rows in an earlier version, and a point without a row now."""
    for job in expected_jobs("table4"):
        name = f"{job['search.distribution']}_{job['search.max_switches']}"
        if earlier and name == "min_uniform_1":
            continue
        axis = [f"search/mutation={name}"] if earlier else [f"{key}={value}" for key, value in job.items() if key != "seed"]
        write_job(root / "table4", f"{name}_seed-{job['seed']}", [*axis, f"seed={job['seed']}"], [DENSE, row("evopress", 0.5, 8.0)])


@pytest.mark.parametrize("earlier", [True, False])
def test_table_4_has_seven_rows(earlier: bool, tmp_path: Path) -> None:
    write_table_4(tmp_path, earlier=earlier)
    found = make_table("table4", root=tmp_path, out=tmp_path)
    rows = [line.split(" | ")[0].strip("| ") for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| ")]
    assert rows == [
        *("method", "---", "dense", "min uniform 3", "min uniform 7", "min uniform 15"),
        *("constant 1", "constant 3", "constant 7", "constant 15"),
    ]
    assert not found.missing and not found.unfinished


def test_an_axis_that_was_not_typed_is_read_from_the_config(tmp_path: Path) -> None:
    """A job that was run alone, at the experiment's own sparsity."""
    write_job(tmp_path, "alone", ["+experiment=table2_sparsity", "seed=4"], [DENSE], sparsity=0.7)
    (job,) = read_sweep(tmp_path, expected_jobs("table2_sparsity")).jobs
    assert job.axes == {"sparsity": "0.7", "seed": "4"}


# What there is


def test_expected_jobs_are_those_of_the_sweep() -> None:
    assert [describe(job) for job in expected_jobs("table2_sparsity")] == [f"sparsity=0.7 seed={seed}" for seed in range(3)]
    assert len(expected_jobs("table14_15_sparsity")) == 6


@pytest.mark.parametrize("name", sorted(name for name in SPECS if not SPECS[name].twin_of))
def test_every_table_has_its_experiment_its_claim_and_the_papers_numbers(name: str) -> None:
    assert (config_folder() / "experiment" / f"{name}.yaml").is_file()
    readme = (EXPERIMENTS / name / "README.md").read_text(encoding="utf-8")
    assert readme.count("<!-- results -->") == readme.count("<!-- end of results -->") == 1
    for part in ("**Claim.**", "**Command.**", f"python -m evopress +experiment={name}", f"python -m experiments.tables {name}"):
        assert part in readme
    spec, jobs = SPECS[name], expected_jobs(name)
    assert set(spec.group) <= set(jobs[0])
    path = EXPERIMENTS / name / "paper.csv"
    if path.is_file():
        rows = read_csv(path)
        assert {*spec.group, "model", "method"} <= set(rows[0])
        for key in spec.group:
            assert {float(r[key]) for r in rows} == {float(job[key]) for job in jobs}
        for r in rows:
            numbers = [value for key, value in r.items() if key not in ("model", "method", *spec.group)]
            assert all(float(value) > 0 for value in numbers if value) and any(numbers)  # the paper's table may have a gap
        of_model: dict[tuple[str, ...], set[str]] = {}
        for r in rows:
            of_model.setdefault((r["model"], *(r[key] for key in spec.group)), set()).add(r["method"])
        assert all(spec.reference in methods for methods in of_model.values())


def test_the_command_line(sweep: Path, tmp_path: Path) -> None:
    (sweep / "table2_sparsity" / "sparsity-0.7_seed-2" / "result.json").unlink()
    done = run_script("experiments.tables", "table2_sparsity", "--root", str(sweep), "--out", str(tmp_path / "mine"))
    assert done.code == 0, done.text
    assert "missing: sparsity=0.7 seed=2" in done.text
    assert "| EvoPress |" in done.text
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {"results.csv", "runs.csv", "table.md"}


def test_a_csv_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table" / "results.csv"
    tables.write_csv(path, [{"a": 1, "b": 0.5}, {"a": 2, "c": math.nan}])
    assert path.read_text(encoding="utf-8") == "a,b,c\n1,0.5,\n2,,\n"

    def full(path: Path, data: bytes) -> None:
        path.open("wb").write(data[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("evopress.files._fill", full)
    with pytest.raises(EvoPressError, match="the disk is full while writing"):
        tables.write_csv(path, [{"a": 3}])
    assert path.read_text(encoding="utf-8").startswith("a,b,c\n") and list(path.parent.iterdir()) == [path]
