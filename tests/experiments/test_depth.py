"""The paper's tables and figures on depth pruning: what their scripts compute, and each of them once on a tiny model."""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_process import invoke
from transformers import AutoModelForCausalLM

from evopress.baselines.block_importance import measure_spans
from evopress.errors import EvoPressError
from evopress.models.blocks import BlockModel
from evopress.models.tiny import make_tiny
from evopress.units import Genome
from experiments import depth
from experiments.convergence import X_AXES, Point
from experiments.drop_speed import run as drop_speed
from experiments.figure1 import run as figure1
from experiments.figure5 import run as figure5
from experiments.figure6 import run as figure6
from experiments.figure7 import run as figure7
from experiments.sweeps import Job
from experiments.table1 import run as table1
from experiments.table13 import run as table13

EXPERIMENTS = Path(depth.__file__).parent
SCRIPTS = ("drop_speed", "figure1", "figure5", "figure6", "figure7", "table1", "table13")
NUM_BLOCKS = 8


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny model of eight blocks, the cache and the runs of these tests lie."""
    folder = tmp_path_factory.mktemp("depth")
    make_tiny(folder / "tiny", num_blocks=NUM_BLOCKS)
    return folder


@pytest.fixture
def options(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a script that loads a model is told here; it writes to tmp_path."""
    monkeypatch.setenv("EVOPRESS_CACHE", str(home / "cache"))
    monkeypatch.setattr("evopress.machine.keep_freed_memory", lambda: None)  # a setting of the whole process
    length = ("--sequence-length", "32")
    return ["--model-path", str(home / "tiny"), "--dtype", "float32", *length, "--out", str(tmp_path)]


@pytest.fixture
def model(options: list[str]) -> depth.DepthModel:
    """The tiny model, as scripts load it."""
    parser = argparse.ArgumentParser()
    depth.model_options(parser, out=Path())
    return depth.load(parser.parse_args(options))


def sweep(home: Path, experiment: str, *overrides: str) -> Path:
    """Run a small part of an experiment on the tiny model; return the folder of sweeps."""
    tiny = [
        *("model=local", f"model.path={home / 'tiny'}", "model.name=tiny8", "model.dtype=float32", "model.sequence_length=32"),
        *("scale.calibration_tokens=512", "scale.search_tokens=512", "scale.evaluation_tokens=512"),
        *("tracker=none", "threads=1", f"paths.cache={home / 'cache'}", "stages=[database,baselines,search,evaluate]"),
        f"hydra.sweep.dir={home / 'multirun' / experiment}",
    ]
    done = invoke(f"+experiment={experiment}", *tiny, *overrides, cache=home / "cache", cwd=home)
    assert done.code == 0, done.text[-3000:]
    return home / "multirun"


@pytest.fixture(scope="module")
def depth_sweep(home: Path) -> Path:
    """Four jobs of Tables 9 to 12: 25 and 50%, modules and blocks."""
    return sweep(
        home,
        "table9_12",
        *("hydra.sweeper.params.seed=0", "hydra.sweeper.params.sparsity='0.25,0.5'"),
        *("search.generations=2", "search.num_offspring=3", "search.tokens=[64,128]", "search.initial_candidates=4"),
        *("search.initial_tokens=64", "baselines.importance_tokens=128", "evaluation.every=1", "evaluation.every_tokens=128"),
    )


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def line_of(text: str, start: str, nth: int = 0) -> list[str]:
    """Return the cells of the nth table line that begins with a cell."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in lines[nth].strip("|").split("|")]


def written(folder: Path, picture: str | None) -> str:
    """Check that a script left its files, and return its table."""
    expected = {"results.csv", "table.md"} | ({f"{picture}.png", f"{picture}.svg"} if picture else set())
    assert {path.name for path in folder.iterdir()} == expected
    return (folder / "table.md").read_text(encoding="utf-8")


# What they share


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_experiment_says_what_it_claims_and_shows(name: str) -> None:
    readme = (EXPERIMENTS / name / "README.md").read_text(encoding="utf-8")
    assert readme.count("<!-- results -->") == readme.count("<!-- end of results -->") == 1
    for part in ("**Claim.**", "**Command.**", f"python -m experiments.{name}.run", "**Result.**", "**What it shows.**"):
        assert part in readme
    if name != "table13":
        assert f"]({name}.png)" in readme


def test_scripts_start_without_torch() -> None:
    imports = ", ".join(f"experiments.{name}.run" for name in SCRIPTS)
    code = f"import sys, {imports}; print([m for m in ('torch', 'transformers', 'matplotlib', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=EXPERIMENTS.parent, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_perplexity_is_that_of_the_model_without_those_blocks(model: depth.DepthModel, home: Path) -> None:
    tokens = model.tokens("search", 256)
    whole = AutoModelForCausalLM.from_pretrained(home / "tiny", dtype=torch.float32)
    expected = []
    for gone in ((), (2, 5)):
        layers = [layer for index, layer in enumerate(whole.model.layers) if index not in gone]
        short = AutoModelForCausalLM.from_pretrained(home / "tiny", dtype=torch.float32)
        short.model.layers = torch.nn.ModuleList(layers)
        with torch.no_grad():
            losses = [short(input_ids=row[None], labels=row[None], use_cache=False).loss.item() for row in tokens]
        expected.append(math.exp(sum(losses) / len(losses)))
    genomes: list[Genome | None] = [None, tuple(int(block in (2, 5)) for block in range(NUM_BLOCKS))]
    assert depth.perplexities(model.evaluator("block"), genomes, tokens) == pytest.approx(expected, rel=1e-4)


def test_perplexities_do_not_depend_on_the_batch(model: depth.DepthModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, evaluator = model.tokens("search", 160), model.evaluator("module")
    genomes = [(0,) * 16, (1, 0) * 8]
    together = depth.perplexities(evaluator, genomes, tokens)
    monkeypatch.setattr(depth, "BATCH_TOKENS", 64)
    assert depth.perplexities(evaluator, genomes, tokens) == pytest.approx(together, rel=1e-5)
    assert len(set(together)) == 2


def test_a_users_error_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise EvoPressError("it is wrong: do it right")

    with pytest.raises(SystemExit) as stop:
        depth.run(fails)
    assert stop.value.code == 1
    assert capsys.readouterr().err == "error: it is wrong: do it right\n"


@pytest.mark.parametrize(
    ("main", "arguments", "sentence"),
    [
        (table1.main, ["--trials", "0"], r"--trials 0 is out of range"),
        (table1.main, ["--sparsity", "1.5"], r"sparsity=1\.5 is out of range"),
        (table1.main, ["--sparsity", "0.01"], r"sparsity=0\.01 drops 0 of 8 blocks"),
        (table1.main, ["--tokens", "8"], r"8 search tokens do not fill one sequence of 32"),
        (figure7.main, ["--sparsity", "0.9"], r"7 of 8 blocks cannot be removed while the first and last 2 stay"),
        (figure7.main, ["--sequence-length", "1"], r"--sequence-length 1 is out of range"),
        (drop_speed.main, ["--offspring", "1"], r"--offspring 1 is out of range"),
        (drop_speed.main, ["--sparsity", "0", "1"], r"sparsity=1 is out of range"),
    ],
)
def test_bad_input_is_refused(main: Callable[[list[str]], None], arguments: list[str], sentence: str, options: list[str]) -> None:
    with pytest.raises(EvoPressError, match=sentence):
        main([*options, *arguments])


@pytest.mark.parametrize("script", [figure1, figure5, figure6])
def test_without_a_sweep_they_say_which(script: Any, tmp_path: Path) -> None:
    with pytest.raises(EvoPressError, match=r"run python -m evopress \+experiment="):
        script.main(["--root", str(tmp_path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


# Figure 1


def search(genomes: list[Genome], optimum: Genome, landscape: dict[Genome, float] | None = None) -> figure1.Search:
    fitnesses = tuple((landscape or {}).get(genome, 1.0) for genome in genomes)
    evaluations = tuple(16 + 9 * generation for generation in range(len(genomes)))
    return figure1.Search("0.5", "0", optimum, tuple(genomes), fitnesses, evaluations, landscape or {})


def test_distance_counts_pairs() -> None:
    assert figure1.distance((1, 1, 0, 0), (1, 1, 0, 0)) == 0
    assert figure1.distance((1, 1, 0, 0), (1, 0, 0, 1)) == 1
    assert figure1.distance((1, 1, 0, 0), (0, 0, 1, 1)) == 2


def test_a_search_that_reaches_the_optimum_and_one_that_does_not() -> None:
    best, near, far = (1, 1, 0, 0), (1, 0, 1, 0), (0, 0, 1, 1)
    landscape = {best: 1.0, near: 1.5, (1, 0, 0, 1): 1.2, far: 3.0}
    first = search([far, near, best, best], best, landscape)
    assert (first.distances, first.reached, first.rank) == ([2, 1, 0, 0], 2, 1)
    second = replace(search([far, near, near, near], best, landscape), seed="1")
    assert (second.reached, second.rank) == (None, 3)
    text = figure1.table([first, second])
    assert "2 of 4 pairs, 4 genomes" in text
    assert "reached by 1 of 2 searches, in generation 2 at the median (2 to 2)" in text
    assert line_of(text, "0") == ["0", "2", "34", "0", "1", "1.000", "1.000"]
    assert line_of(text, "1") == ["1", "never", "", "1", "3", "1.500", "1.500"]
    assert search([far], best).rank is None


def test_the_landscape_is_that_of_the_same_target_and_text(tmp_path: Path) -> None:
    best, other = (1, 0, 0), (0, 1, 0)

    def write(name: str, measured: dict[str, float | None]) -> None:
        record = {"schema": 1, "genomes": list(measured), "fitnesses": list(measured.values())}
        (tmp_path / f"exhaustive-{name}.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")

    assert figure1.read_landscape(tmp_path, best, {best: 2.0}) == {}
    write("a", {"110": 1.0, "101": 2.0})  # another target
    write("b", {"100": 5.0, "010": 6.0, "001": 7.0})  # other text
    write("c", {"100": 4.0, "010": 2.0})  # another optimum
    write("d", {"100": 2.0, "010": 2.5, "001": None})
    found = figure1.read_landscape(tmp_path, best, {best: 2.001, other: 2.5})
    assert found == {best: 2.0, other: 2.5}
    assert figure1.read_landscape(tmp_path, best, {best: 9.0}) == {}


def test_figure_1_end_to_end(home: Path, tmp_path: Path) -> None:
    root = sweep(
        home,
        "figure1",
        *("hydra.sweeper.params.seed='0,1'", "hydra.sweeper.params.sparsity=0.5"),
        *("data.search_tokens=64", "data.evaluation_tokens=64"),
        *("search.generations=6", "search.num_offspring=3", "search.initial_candidates=2"),
    )
    figure1.main(["--root", str(root), "--out", str(tmp_path)])
    text = written(tmp_path, "figure1")
    assert (
        "**sparsity=0.5: 2 of 4 pairs, 6 genomes.** The optimum was reached by 2 of 2 searches" in text
    )  # six genomes are soon seen
    assert "Missing: sparsity=0.27 seed=0" in text
    rows = read_csv(tmp_path / "results.csv")
    assert len(rows) == 2 * 7
    assert [row["evaluations"] for row in rows[:3]] == ["2", "6", "10"]
    last = [row for row in rows if row["generation"] == "6"]
    assert {row["hamming_distance"] for row in last} == {"0"}
    fitnesses = [float(row["fitness"]) for row in rows if row["seed"] == "0"]
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(fitnesses))  # the same tokens every time
    files = list((home / "cache").glob("levels/*/drop-*/exhaustive-*.jsonl"))
    assert len(files) == 1  # measured once for both seeds
    assert len(figure1.read_landscape(files[0].parent, figure1_optimum(root), {figure1_optimum(root): fitnesses[-1]})) == 6


def figure1_optimum(root: Path) -> Genome:
    path = root / "figure1" / "sparsity-0.5_seed-0" / "baselines.json"
    return tuple(json.loads(path.read_text(encoding="utf-8"))["genomes"]["exhaustive"])


# Table 1


def test_supersets_drop_one_module_more() -> None:
    assert table1.supersets((0, 1, 0)) == [(1, 1, 0), (0, 1, 1)]
    assert table1.supersets((1, 1)) == []


def test_ratios_and_their_tally() -> None:
    better, worse = table1.Pair((0, 0, 1), (0, 1, 1), 10.0, 8.0), table1.Pair((0, 0, 1), (1, 0, 1), 10.0, 30.0)
    other = table1.Pair((1, 0, 0), (1, 1, 0), 20.0, 22.0)
    overflow = table1.Pair((1, 0, 0), (1, 0, 1), math.inf, 5.0)
    assert (better.ratio, overflow.ratio) == (0.8, math.inf)
    assert table1.tally(0.25, [[better, worse], [other, overflow]]) == table1.Tally(0.25, 2, 4, 1, 1, 0.8)
    assert table1.select([[worse, better], [other, overflow], []], 3) == [better, other]


def test_b_grows_only_while_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Perplexity falls until three modules are gone, and rises after."""
    monkeypatch.setattr(
        table1, "perplexities", lambda evaluator, genomes, tokens: [10 + abs(3 - sum(g)) + g[0] / 2 for g in genomes]
    )
    start = table1.Pair((0, 1, 0, 0, 0), (0, 1, 1, 0, 0), 12.0, 11.0)
    assert table1.climb(None, None, start, steps=5) == replace(start, more=(0, 1, 1, 1, 0), more_perplexity=10.0)
    assert table1.climb(None, None, start, steps=0) == start
    full = table1.Pair((0, 1), (1, 1), 3.0, 2.0)
    assert table1.climb(None, None, full, steps=5) == full


def test_table_1_end_to_end(options: list[str], tmp_path: Path) -> None:
    sizes = ("--tokens", "64", "--held-out-tokens", "96", "--trials", "2", "--pairs", "2", "--steps", "1")
    table1.main([*options, *sizes, "--sparsity", "0.25", "0.5"])
    text = written(tmp_path, "table1")
    assert "Model tiny, float32 on cpu" in text
    assert line_of(text, "25%")[:3] == ["25%", "2", "24"]  # two sets, with each of the 12 modules that are left
    assert line_of(text, "50%")[:3] == ["50%", "2", "16"]
    rows = read_csv(tmp_path / "results.csv")
    assert [row["set"] for row in rows] == ["dense", "A1", "B1", "A2", "B2"]
    for smaller, larger in ((rows[1], rows[2]), (rows[3], rows[4])):
        assert set(smaller["dropped"].split()) < set(larger["dropped"].split())
        assert int(larger["modules_dropped"]) == len(larger["dropped"].split())
    first, second = (
        float(b["search_perplexity"]) / float(a["search_perplexity"]) for a, b in ((rows[1], rows[2]), (rows[3], rows[4]))
    )
    lowest = min(float(line_of(text, share)[5]) for share in ("25%", "50%"))
    assert first <= lowest + 1e-3  # the best of all, or better where B grew
    assert second < 2
    assert float(rows[0]["kl"]) == pytest.approx(0, abs=1e-6)
    again = tmp_path / "again"
    table1.main([*options, *sizes, "--sparsity", "0.25", "0.5", "--out", str(again)])
    assert read_csv(again / "results.csv") == rows


# Figure 7


def test_squared_errors_are_what_they_say(model: depth.DepthModel) -> None:
    tokens = model.tokens("calibration", 96)
    with torch.no_grad():
        states = model.blocks.embed(tokens)
        expected: tuple[list[float], list[float]] = ([], [])
        for index in range(NUM_BLOCKS):
            after = model.blocks.run(index, states)
            pairs = list(zip(states.reshape(-1, 32), after.reshape(-1, 32), strict=True))
            expected[0].append(sum(float(((y - x) ** 2).sum()) for x, y in pairs) / len(pairs))
            expected[1].append(sum(float(((y / y.norm() - x / x.norm()) ** 2).sum()) for x, y in pairs) / len(pairs))
            states = after
    plain, normalized = figure7.squared_errors(model.blocks, tokens)
    assert plain == pytest.approx(expected[0], rel=1e-4)
    assert normalized == pytest.approx(expected[1], rel=1e-4)
    scores = figure7.score_blocks(model.blocks, tokens)
    cosine = measure_spans(model.blocks, tokens, [(i, i + 1) for i in range(NUM_BLOCKS)])["cosine_similarity"]
    assert scores["cosine_similarity"] == pytest.approx(cosine)
    assert normalized == pytest.approx([2 - 2 * value for value in cosine], abs=1e-4)  # why both correlate equally


def test_scores_do_not_depend_on_the_batch(tiny_blocks: Callable[..., BlockModel], monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, tokens = tiny_blocks(num_blocks=3), torch.arange(96).reshape(6, 16)
    whole = figure7.squared_errors(blocks, tokens)
    monkeypatch.setattr(figure7, "BATCH_TOKENS", 32)
    for one, other in zip(whole, figure7.squared_errors(blocks, tokens), strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_random_subsets_leave_the_ends_alone() -> None:
    rng = np.random.default_rng(0)
    subsets = figure7.random_subsets(12, 3, 40, rng)
    assert len(set(subsets)) == len(subsets) == 40
    assert all(len(set(subset)) == 3 and set(subset) <= set(range(2, 10)) for subset in subsets)
    assert {block for subset in subsets for block in subset} == set(range(2, 10))
    assert len(figure7.random_subsets(8, 4, 40, rng)) == 1  # there is one alone
    with pytest.raises(EvoPressError, match="5 of 8 blocks cannot be removed"):
        figure7.random_subsets(8, 5, 40, rng)


def test_correlations() -> None:
    scores = [0.0, 1.0, 2.0, 3.0]

    def removals(*perplexities: float) -> list[figure7.Removal]:
        return [figure7.Removal(0.25, (block,), perplexity) for block, perplexity in enumerate(perplexities)]

    exact = figure7.correlate(scores, removals(*(math.exp(2 - score) for score in scores)))
    assert (exact.pearson, exact.spearman, exact.num_subsets) == (pytest.approx(-1), pytest.approx(-1), 4)
    curved = figure7.correlate(scores, removals(1.0, 2.0, 3.0, math.inf))
    assert curved.num_subsets == 3
    assert curved.spearman == pytest.approx(1)
    assert curved.pearson < 1
    assert math.isnan(figure7.correlate(scores, removals(5.0, 5.0, 5.0, 5.0)).pearson)
    assert math.isnan(figure7.correlate(scores, removals(5.0, math.inf, math.inf, 7.0)).spearman)
    low, high = figure7.Correlation(0.5, 0.5, 67).interval
    assert (low, high) == (pytest.approx(0.296, abs=1e-3), pytest.approx(0.661, abs=1e-3))  # atanh 0.5 ± 1.96 / 8
    assert figure7.mean_score([1.0, 2.0, 6.0], (0, 2)) == 3.5


def test_figure_7_end_to_end(options: list[str], tmp_path: Path) -> None:
    figure7.main([*options, "--tokens", "64", "--score-tokens", "64", "--subsets", "5", "--sparsity", "0.125", "0.25"])
    text = written(tmp_path, "figure7")
    rows = read_csv(tmp_path / "results.csv")
    assert [row["sparsity"] for row in rows] == ["0.125"] * 4 + ["0.25"] * 5  # one of the four inner blocks, or two
    assert {row["blocks"] for row in rows[:4]} == {"2", "3", "4", "5"}
    assert all(float(row["perplexity"]) > 1 for row in rows)
    assert line_of(text, "12.5%", 0)[1:3] == ["1", "cosine similarity"]
    cosine, normalized = (float(line_of(text, "25%", nth)[3].split()[0]) for nth in (0, 2))
    assert cosine == pytest.approx(-normalized, abs=2e-3)


# Table 13


def test_the_papers_orders_are_complete() -> None:
    orders = table13.read_paper(EXPERIMENTS / "table13" / "paper.csv")
    assert len({order.model for order in orders}) == 4
    assert len(orders) == 4 * 3
    assert all(len(order.blocks) == len(set(order.blocks)) == 16 and max(order.blocks) < 32 for order in orders)
    assert orders[0].depth(2) == 25.5 / 31
    assert table13.shared(orders[0], orders[1], 8) == 8  # ShortGPT and Weight Subcloning differ in the order alone
    assert table13.shared(orders[0], orders[2], 8) == 0


def test_table_13_of_a_run(depth_sweep: Path, tmp_path: Path) -> None:
    folder = depth_sweep / "table9_12" / "sparsity-0.25_module_seed-0"
    table13.main(["--run", str(folder), "--count", "4", "--out", str(tmp_path)])
    text = written(tmp_path, None)
    orders = json.loads((folder / "baselines.json").read_text(encoding="utf-8"))["orders"]
    methods = ("shortgpt", "weight_subcloning", "shortened_llama", "shortened_llama_kl", "l2", "l2_normalized")
    assert set(orders) == set(methods)
    mine = [line for line in text.splitlines() if line.startswith("| tiny8 |")]
    assert len(mine) == len(methods)
    assert f"| ShortGPT | {', '.join(f'{block:02d}' for block in orders['shortgpt'][:4])} |" in mine[0]
    assert text.count("Shortened Llama |") == 1 + 4
    (row,) = [row for row in read_csv(tmp_path / "results.csv") if (row["model"], row["method"]) == ("tiny8", "l2")]
    assert (row["order"], row["num_blocks"]) == (" ".join(map(str, orders["l2"])), "8")


def test_table_13_without_orders(tmp_path: Path) -> None:
    with pytest.raises(EvoPressError, match=r"has no baselines\.json: run python -m evopress \+method=drop"):
        table13.main(["--run", str(tmp_path), "--out", str(tmp_path / "out")])
    (tmp_path / "baselines.json").write_text('{"genomes": {}, "orders": {}}', encoding="utf-8")
    with pytest.raises(EvoPressError, match="has no removal orders"):
        table13.main(["--run", str(tmp_path), "--out", str(tmp_path / "out")])


# Figure 6


def job_of(folder: Path, dropped: set[tuple[int, str]], shortgpt: set[int], *, seed: str = "0", num_blocks: int = 4) -> Job:
    """Write the genome and the baselines of a made-up job."""
    folder.mkdir(parents=True)
    modules = [(block, kind) for block in range(num_blocks) for kind in figure6.KINDS]
    units = [
        {"name": f"model.layers.{block}.{kind}", "label": "drop" if (block, kind) in dropped else "keep"} for block, kind in modules
    ]
    (folder / "genome.json").write_text(json.dumps({"units": units}), encoding="utf-8")
    genome = [int(block in shortgpt) for block, _ in modules]
    (folder / "baselines.json").write_text(json.dumps({"genomes": {"shortgpt": genome} if shortgpt else {}}), encoding="utf-8")
    return Job(folder, {"sparsity": "0.25", "seed": seed, "method.granularity": "module"}, {}, {}, {})


def test_what_searches_drop(tmp_path: Path) -> None:
    one = figure6.read_found(job_of(tmp_path / "0", {(1, "attention"), (2, "mlp")}, {2}))
    two = figure6.read_found(job_of(tmp_path / "1", {(3, "attention"), (2, "mlp")}, {2}, seed="1"))
    assert one.dropped == {(1, "attention"), (2, "mlp")}
    assert one.shortgpt == {(2, "attention"), (2, "mlp")}
    assert figure6.share([one.dropped, two.dropped], (2, "mlp")) == 1
    assert figure6.share([one.dropped, two.dropped], (3, "attention")) == 0.5
    cells = dict(zip(figure6.HEADERS, figure6.summarize([one, two]), strict=True))
    assert cells == {
        "sparsity": "25%",
        "seeds": "2",
        "modules dropped": "2",
        "dropped by every seed": "MLP 2",
        "shared by two seeds": "50%",
        "shared with ShortGPT": "50%",
        "whole blocks": "0.0",
        "in the first 2 blocks": "0.5",
        "in the last block": "0.5",
    }
    alone = figure6.read_found(job_of(tmp_path / "2", {(0, "attention"), (0, "mlp")}, set()))
    cells = dict(zip(figure6.HEADERS, figure6.summarize([alone]), strict=True))
    assert (cells["dropped by every seed"], cells["whole blocks"]) == ("attention 0; MLP 0", "1.0")
    assert cells["shared by two seeds"] == cells["shared with ShortGPT"] == ""
    figure6.draw({"0.25": [one, two], "0.5": [alone]}, tmp_path / "out")  # with ShortGPT's row and without
    assert (tmp_path / "out" / "figure6.png").stat().st_size > 5000


def test_units_that_are_no_modules_are_refused(tmp_path: Path) -> None:
    job = job_of(tmp_path / "0", set(), set())
    (job.folder / "genome.json").write_text('{"units": [{"name": "model.layers.0", "label": "drop"}]}', encoding="utf-8")
    with pytest.raises(EvoPressError, match=r"expected method\.granularity=module"):
        figure6.read_found(job)


def test_figure_6_end_to_end(depth_sweep: Path, tmp_path: Path) -> None:
    figure6.main(["--root", str(depth_sweep), "--out", str(tmp_path)])
    text = written(tmp_path, "figure6")
    assert line_of(text, "25%")[1:3] == ["1", "4"]
    assert line_of(text, "50%")[1:3] == ["1", "8"]
    assert "Missing: " in text and "block" not in text.split("Missing: ")[1].splitlines()[0]
    rows = read_csv(tmp_path / "results.csv")
    assert len(rows) == 2 * 2 * NUM_BLOCKS
    for kind in figure6.KINDS:  # as many of each, by the search and by ShortGPT
        for column in ("dropped", "shortgpt"):
            assert sum(float(r[column]) for r in rows if (r["sparsity"], r["module"]) == ("0.25", kind)) == 2


# Figure 5


def test_when_a_search_overtakes() -> None:
    points = [(0.0, 5.0, 4.0, 6.0), (10.0, 3.0, 2.9, 3.1), (20.0, 2.0, 2.0, 2.0)]
    assert figure5.overtakes(points, 3.5) == 10.0
    assert figure5.overtakes(points, 6.0) == 0.0
    assert figure5.overtakes(points, 2.0) is None
    assert figure5.overtakes([], 2.0) is None


def panel_of(**kl: float | tuple[float, ...]) -> figure5.Panel:
    """Return a panel of variants' KL divergences on three seeds, those of the searches reached at once."""
    seeds = {name: dict(zip("012", of if isinstance(of, tuple) else (of,) * 3, strict=True)) for name, of in kl.items()}
    searches = {
        name: {seed: [Point(dict.fromkeys(X_AXES, 7.0), {figure5.KL: value})] for seed, value in of.items()}
        for name, of in seeds.items()
        if name in figure5.SEARCHES
    }
    return figure5.Panel("0.25", searches, {name: {figure5.KL: of} for name, of in seeds.items()})


def test_baselines_come_best_first_and_searches_apart() -> None:
    panel = panel_of(dense=0.0, shortgpt=3.0, evopress=1.0, evopress_blocks=1.5, shortened_llama=2.0)
    assert panel.baselines(figure5.KL) == {"shortened_llama": 2.0, "shortgpt": 3.0}
    assert panel.baselines("ppl x") == {}


def test_a_search_whose_seeds_do_not_tell_ties_with_the_best_baseline() -> None:
    """Its mean is above; the ends of three seeds are both sides of it."""
    panel = panel_of(sliding_window=0.98, evopress=(1.0, 1.1, 0.96), evopress_blocks=(1.05, 1.06, 1.05))
    modules, blocks = (line for line in figure5.table([panel]).splitlines() if line.startswith("| 25%"))
    assert "| never | never | 1.020 | 0.0400 ± 0.042 (tie) | 3 |" in modules
    assert "| never | never | 1.053 | 0.0733 ± 0.0033 (worse) | 3 |" in blocks
    found = panel_of(sliding_window=0.98, evopress=(0.8, 0.81, 0.79))
    assert "| 7 | 7 s | 0.8000 | -0.180 ± 0.0058 (better) | 3 |" in figure5.table([found])
    assert "| 25% | EvoPress |  |  | never | never | 0.8000 |  | 3 |" in figure5.table([panel_of(evopress=0.8)])


def test_figure_5_end_to_end(depth_sweep: Path, tmp_path: Path) -> None:
    figure5.main(["--root", str(depth_sweep), "--out", str(tmp_path)])
    text = written(tmp_path, "figure5")
    for share in ("25%", "50%"):
        assert [line_of(text, share, nth)[1] for nth in range(2)] == ["EvoPress", "EvoPress (Attn.+MLP)"]
    rows = read_csv(tmp_path / "results.csv")
    assert {row["sparsity"] for row in rows} == {"0.25", "0.5"}
    assert [row["generation"] for row in rows if (row["sparsity"], row["search"]) == ("0.5", "evopress")] == ["0", "1", "2"]
    folder = depth_sweep / "table9_12" / "sparsity-0.5_module_seed-0"
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    kls = {row["name"]: row["held_out_in_search"]["kl"] for row in result["rows"] if row["name"] not in ("dense", "evopress")}
    best = min(kls, key=kls.__getitem__)
    assert float(line_of(text, "50%")[3]) == pytest.approx(kls[best], rel=1e-3)
    half = tmp_path / "half"
    figure5.main(["--root", str(depth_sweep), "--out", str(half), "--sparsity", "0.5"])
    assert {row["sparsity"] for row in read_csv(half / "results.csv")} == {"0.5"}


# Speed


def test_what_is_measured() -> None:
    settings = drop_speed.all_settings([0, 0.5], 8)
    assert [(s.granularity, s.num_candidates, s.sparsity) for s in settings] == [
        *(("module", 1, 0), ("module", 1, 0.5), ("module", 8, 0.5)),
        *(("block", 1, 0), ("block", 1, 0.5), ("block", 8, 0.5)),
    ]


def test_speeds_are_medians() -> None:
    setting = drop_speed.Setting("block", 0.5, 1)
    samples = [drop_speed.Sample(block, 0.001, 15.0) for block in (0.001, 0.009, 0.003)]
    speed = drop_speed.Speed.of(setting, samples)
    assert (speed.tokens_per_second, speed.least, speed.most) == (pytest.approx(250), pytest.approx(100), pytest.approx(500))
    assert (speed.block_seconds, speed.head_seconds, speed.head_share) == (pytest.approx(3), pytest.approx(1), pytest.approx(0.25))
    assert (speed.blocks_run, speed.num_samples) == (15.0, 3)


def test_genomes_are_of_their_setting(model: depth.DepthModel) -> None:
    rng = np.random.default_rng(0)
    assert drop_speed.draw_genomes(model, drop_speed.Setting("block", 0, 1), rng) == [(0,) * NUM_BLOCKS]
    (genome,) = drop_speed.draw_genomes(model, drop_speed.Setting("module", 0.25, 1), rng)
    assert (sum(genome[::2]), sum(genome[1::2])) == (2, 2)
    children = drop_speed.draw_genomes(model, drop_speed.Setting("block", 0.5, 5), rng)
    assert len(set(children)) == 5
    assert {sum(child) for child in children} == {4}


def test_dropped_blocks_are_not_run_and_shared_ones_once(model: depth.DepthModel) -> None:
    from evopress.fitness.measures import KLDivergence
    from evopress.fitness.minibatch import base_states

    tokens, evaluator = model.tokens("search", 64), model.evaluator("block")
    base = base_states(evaluator, tokens, batch_tokens=64)
    half = (0, 1, 0, 1, 0, 1, 0, 1)
    sample = drop_speed.measure(evaluator, [half], tokens, base, KLDivergence())
    assert sample.blocks_run == 4
    assert sample.block_seconds > 0 and sample.head_seconds > 0
    late = (0, 1, 0, 1, 0, 1, 1, 0)  # differs in the last two blocks: 3 shared, one more each
    assert drop_speed.measure(evaluator, [half, late], tokens, base, KLDivergence()).blocks_run == 2.5


def test_drop_speed_end_to_end(options: list[str], tmp_path: Path) -> None:
    drop_speed.main([*options, "--tokens", "64", "--sparsity", "0", "0.25", "0.5", "--repeats", "2", "--offspring", "3"])
    text = written(tmp_path, "drop_speed")
    rows = {(r["granularity"], r["candidates"], r["sparsity"]): r for r in read_csv(tmp_path / "results.csv")}
    assert len(rows) == 2 * (3 + 2)
    assert all(row["samples"] == "2" and float(row["tokens_per_second"]) > 0 for row in rows.values())
    run = [float(rows["block", "1", sparsity]["blocks_run"]) for sparsity in ("0", "0.25", "0.5")]
    assert run == [8, 6, 4]
    assert float(rows["block", "3", "0.5"]["blocks_run"]) < 4  # prefixes are shared
    assert line_of(text, "modules")[4] == "1.00"
