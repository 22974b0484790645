"""A run from its command to its folder: what it leaves, that it repeats, goes on, and is told in full."""

from __future__ import annotations

import csv
import itertools
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from evopress.data.python_docs import PythonDocs
from evopress.data.tokens import token_sequences
from evopress.fitness.archive import ARCHIVE
from evopress.fitness.minibatch import MinibatchFitness
from evopress.reporting import records as written
from evopress.reporting.tables import MEANS
from evopress.stages import evaluate, one_budget, search

SEARCH = "stages=[database,search]"


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def records(folder: Path, *, without: tuple[str, ...] = ("seconds",)) -> list[dict[str, Any]]:
    """Read a run's generations without what depends on the clock."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in without} for line in lines]


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in read(folder / "result.json")["rows"]}


# What a run leaves


def test_run_folder_has_what_is_documented(finished: Any) -> None:
    files = {str(path.relative_to(finished.folder)) for path in finished.folder.rglob("*") if path.is_file()}
    assert files >= {
        *(".hydra/config.yaml", ".hydra/overrides.yaml", "environment.json", "evopress.log"),
        *(
            "metrics.jsonl",
            "baselines.json",
            "genome.json",
            "genome.txt",
            "result.json",
            "results.csv",
            "results.md",
            "report.html",
        ),
        *(f"figures/{name}.{suffix}" for name in ("convergence", "level_heatmap", "level_profile") for suffix in ("png", "svg")),
        *(f"checkpoint/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json", "genome.json", "evopress.json")),
    }
    assert not [name for name in files if "tmp" in name.lower()], "temporary files were left behind"
    for path in finished.folder.rglob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_environment_and_config_are_recorded(finished: Any) -> None:
    environment = read(finished.folder / "environment.json")
    assert {"python", "machine", "git_revision", "evopress", "torch", "transformers", "hydra-core"} <= set(environment)
    assert environment["torch"] == torch.__version__
    config = (finished.folder / ".hydra" / "config.yaml").read_text(encoding="utf-8")
    assert "bits: 3.5" in config
    assert "seed: 0" in config


def test_one_record_per_generation(finished: Any) -> None:
    found = records(finished.folder, without=())
    assert [record["generation"] for record in found] == [0, 1, 2, 3]
    for record in found:
        assert set(record) - {"held_out"} == {
            *("schema", "generation", "genome", "fitness", "accepted", "parent_fitness", "stages", "switches"),
            *("tokens", "evaluations", "cost", "seconds"),
        }
        for stage in record["stages"]:
            assert set(stage) == {"tokens", "num_candidates", "fitnesses", "survivors"}
            assert len(stage["fitnesses"]) == stage["num_candidates"]
    assert [[stage["tokens"] for stage in record["stages"]] for record in found] == [[128], [64, 128], [64, 128], [64, 128]]
    assert ["held_out" in record for record in found] == [True, False, True, True]  # every: 2, and the last
    assert all(set(r["held_out"]) == {"perplexity", "num_tokens", *MEANS} for r in found if "held_out" in r)
    assert [record["tokens"] for record in found] == [4 * 128 + n * (4 * 64 + (2 + 1) * 128) for n in range(4)]
    assert [r["seconds"] for r in found] == sorted(r["seconds"] for r in found)
    for before, after in itertools.pairwise(found):
        changed = [[i, a, b] for i, (a, b) in enumerate(zip(before["genome"], after["genome"], strict=True)) if a != b]
        assert after["switches"] == changed
        assert after["accepted"] == bool(changed)
        assert after["fitness"] <= after["parent_fitness"]


def test_genome_files(finished: Any) -> None:
    genome = read(finished.folder / "genome.json")
    assert set(genome) == {"schema", "method", "database", "units", "budget", "cost"}
    assert (genome["schema"], genome["method"], len(genome["units"])) == (1, "quant", 14)
    for unit in genome["units"]:
        assert set(unit) == {"name", "level", "label", "cost"}
        assert unit["label"] == f"{6 - unit['level']} bits"
    assert genome["cost"] == sum(unit["cost"] for unit in genome["units"]) <= genome["budget"]
    lines = (finished.folder / "genome.txt").read_text(encoding="utf-8").splitlines()
    assert lines == [f"{unit['name']}: {6 - unit['level']}" for unit in genome["units"]]
    assert records(finished.folder)[-1]["genome"] == [unit["level"] for unit in genome["units"]]
    manifest = read(Path(read(finished.folder / "result.json")["database"]["path"]) / "manifest.json")
    assert genome["database"] == manifest["fingerprint"]
    weights = sum(unit["size"] for unit in manifest["units"])
    assert genome["budget"] == math.floor(3.5 * weights)


def test_result(finished: Any) -> None:
    result = read(finished.folder / "result.json")
    assert set(result) == {"schema", "rows", "search", "database", "memory"}
    assert list(rows(finished.folder)) == ["dense", "uniform_4", "uniform_3", "best_of_4", "dp", "evopress"]
    for row in result["rows"]:
        assert set(row) >= {
            "name",
            "bits_per_weight",
            "bits_per_weight_with_metadata",
            "bytes",
            "kl",
            "perplexity",
            *MEANS,
        }
        assert set(row["perplexity"]) == {"python_docs"}
    dense, found, least = (rows(finished.folder)[name] for name in ("dense", "evopress", "uniform_3"))
    assert (dense["kl"], dense["top1_agreement"], dense["bits_per_weight"]) == (0.0, 1.0, 32.0)
    assert found["bits_per_weight"] <= 3.5
    assert found["bits_per_weight_with_metadata"] == found["bits_per_weight"] + (16 + 16) / 16  # scale and zero per group of 16
    assert least["bytes"] < found["bytes"] < dense["bytes"]
    assert 0 < found["kl"] < 1
    assert 0 < found["top1_agreement"] < 1
    last = records(finished.folder, without=())[-1]
    assert result["search"] == {"generations": 3, **{key: last[key] for key in ("tokens", "seconds", "evaluations")}}
    assert set(result["database"]) == {"path", "bytes", "seconds", "reused"}
    assert result["memory"]["peak_rss_bytes"] > 1e7


def test_tables_and_report_tell_the_same(finished: Any) -> None:
    with open(finished.folder / "results.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["name"] for row in table] == list(rows(finished.folder))
    assert float(table[-1]["held-out KL python_docs"]) == rows(finished.folder)["evopress"]["kl"]
    markdown = (finished.folder / "results.md").read_text(encoding="utf-8")
    html = (finished.folder / "report.html").read_text(encoding="utf-8")
    for text in (markdown, html, finished.outcome.text):
        for name in ("dense", "uniform 3", "best of 4", "DP", "EvoPress"):
            assert name in text
    assert 'src="http' not in html
    assert 'href="http' not in html, "the report must be self-contained"
    assert "scale mini" in finished.outcome.text
    assert "scale=paper" in finished.outcome.text


def test_all_that_is_drawn_is_of_one_text(finished: Any, tiny: Callable[..., Any], tmp_path: Path) -> None:
    """The curve and the baselines beside it are on the same held-out tokens; on all of them, the last point is the table's."""
    search = [record["held_out"] for record in records(finished.folder) if "held_out" in record]
    assert {held_out["num_tokens"] for held_out in search} == {2 * 63}  # +debug=tiny asks for 128 tokens
    for row in read(finished.folder / "result.json")["rows"]:
        assert row["tokens_by_data_set"] == {"python_docs": 16 * 63}
        kept = row["by_sequence"]["python_docs"]
        assert {name: len(values) for name, values in kept.items()} == dict.fromkeys((*MEANS, "nll"), 16)
        assert sum(kept["kl"]) / 16 == pytest.approx(row["kl"], abs=1e-9)
        part = row["held_out_in_search"]
        assert (part["kl"], part["num_tokens"]) == (pytest.approx(sum(kept["kl"][:2]) / 2, abs=1e-9), 2 * 63)
    assert search[-1]["kl"] == pytest.approx(rows(finished.folder)["evopress"]["held_out_in_search"]["kl"], rel=1e-4)
    assert search[-1]["kl"] != pytest.approx(rows(finished.folder)["evopress"]["kl"], rel=1e-4)

    outcome = tiny(
        "evaluation.every_tokens=null", "baselines.names=[uniform]", "stages=[database,baselines,search,evaluate,report]"
    )
    assert outcome.code == 0, outcome.text
    (*_, last), row = (record.get("held_out") for record in records(tmp_path / "run")), rows(tmp_path / "run")["evopress"]
    assert last["num_tokens"] == 16 * 63
    assert last["kl"] == pytest.approx(row["kl_by_data_set"]["python_docs"], rel=1e-4)
    assert row["held_out_in_search"]["kl"] == row["kl_by_data_set"]["python_docs"] == row["kl"]
    assert "all 1,008 held-out tokens" in (tmp_path / "run" / "figures" / "convergence.svg").read_text(encoding="utf-8")


def test_sizes_are_of_files_that_exist(finished: Any) -> None:
    found = rows(finished.folder)
    weights = finished.folder / "checkpoint" / "model.safetensors"
    assert found["evopress"]["checkpoint_bytes"] == weights.stat().st_size > found["evopress"]["bytes"]
    assert not any("checkpoint_bytes" in row for name, row in found.items() if name != "evopress")
    header = (finished.folder / "results.md").read_text(encoding="utf-8").splitlines()[0]
    assert "| size MB if packed | checkpoint MB |" in header
    assert "size MB if packed" in (finished.folder / "results.csv").read_text(encoding="utf-8").splitlines()[0]


@pytest.mark.parametrize("refused", [("stages=[export]",), ("bits=1.5",), ("stages=[search]", "search.starts=[owl]")])
def test_a_refused_run_starts_nothing_at_a_tracker(refused: tuple[str, ...], tiny: Callable[..., Any], tmp_path: Path) -> None:
    """Before any stage, each for a reason of its own."""
    outcome = tiny("tracker=wandb", "tracker.mode=offline", *refused)
    assert outcome.code == 1, outcome.text
    assert len(outcome.errors) == 1, outcome.text
    assert not (tmp_path / "run" / "wandb").exists()


def test_checkpoint_gives_the_reported_perplexity(finished: Any, cache: Path) -> None:
    folder = finished.folder / "checkpoint"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = token_sequences(PythonDocs(), "evaluation", tokenizer, sequence_length=64, num_tokens=1024)
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].float()
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert math.exp(nll) == pytest.approx(rows(finished.folder)["evopress"]["perplexity"]["python_docs"], rel=1e-4)
    assert math.exp(nll) != pytest.approx(rows(finished.folder)["dense"]["perplexity"]["python_docs"], rel=1e-4)

    dense = AutoModelForCausalLM.from_pretrained(cache / "models" / "tiny-llama")
    with torch.no_grad():
        logp, logq = torch.log_softmax(dense(ids).logits[:, :-1], -1), torch.log_softmax(logits, -1)
    kl = (logp.exp() * (logp - logq)).sum(-1).mean().item()
    assert kl == pytest.approx(rows(finished.folder)["evopress"]["kl"], rel=1e-3)
    provenance = read(folder / "evopress.json")
    assert provenance["level_database"] == read(folder / "genome.json")["database"]
    assert "+method=quant" in provenance["command"]


# Reuse and repetition


def test_other_bits_reuse_the_database(finished: Any, tiny: Callable[..., Any], tmp_path: Path) -> None:
    first = read(finished.folder / "result.json")["database"]

    def blocks() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in Path(first["path"]).iterdir() if not path.name.startswith(ARCHIVE)}

    before = blocks()
    outcome = tiny("bits=3", SEARCH)
    assert outcome.code == 0, outcome.text
    second = read(tmp_path / "run" / "result.json")["database"]
    assert second["reused"] is True
    assert second["path"] == first["path"]
    assert "level database: reused" in outcome.text
    assert blocks() == before
    # 3 bits is a level: the search starts from it, and generation 0 needs no evaluation.
    found = records(tmp_path / "run")
    assert found[0]["genome"] == [3] * 14
    assert (found[0]["fitness"], found[0]["tokens"], len(found)) == (None, 0, 4)


@pytest.mark.parametrize(("every", "num_measured"), [(2, 3), (0, 0), (1, 4)])
def test_equal_seeds_give_equal_searches(
    every: int, num_measured: int, finished: Any, tiny: Callable[..., Any], tmp_path: Path
) -> None:
    """Baselines, evaluation, export and measuring on the way draw nothing of the search's."""
    outcome = tiny(SEARCH, f"evaluation.every={every}")
    assert outcome.code == 0, outcome.text
    without = ("seconds", "held_out")
    assert records(tmp_path / "run", without=without) == records(finished.folder, without=without)
    assert (tmp_path / "run" / "genome.json").read_bytes() == (finished.folder / "genome.json").read_bytes()
    if every == 2:
        assert records(tmp_path / "run") == records(finished.folder)
    assert sum("held_out" in record for record in records(tmp_path / "run")) == num_measured


def test_other_seeds_give_other_searches(finished: Any, tiny: Callable[..., Any], tmp_path: Path) -> None:
    assert tiny(SEARCH, "seed=1").code == 0
    mine, other = records(tmp_path / "run"), records(finished.folder)
    assert mine[0]["stages"] != other[0]["stages"]
    assert mine[1]["stages"] != other[1]["stages"]


# Going on


def interrupt_at(call: int, patch: pytest.MonkeyPatch, *, before_state: bool) -> None:
    """Press Ctrl-C at the n-th minibatch, or once the n-th record is written but the search's state is not."""
    target, name = (search, "append_record") if before_state else (MinibatchFitness, "__call__")
    original, calls = getattr(target, name), 0

    def interrupted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if before_state:
            original(*args, **options)
        if calls == call:
            raise KeyboardInterrupt
        return None if before_state else original(*args, **options)

    patch.setattr(target, name, interrupted)


def test_an_interrupted_evaluation_goes_on_to_the_same_end(
    finished: Any, evopress: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (f"Words of another kind, the {i}th of them, which are their own." for i in range(400))
    (tmp_path / "other.txt").write_text("\n\n".join(words))
    run, whole = (shutil.copytree(finished.folder, tmp_path / name) for name in ("run", "whole"))
    both = ("stages=[evaluate,report]", f"+evaluation.files.other={tmp_path / 'other.txt'}")
    assert evopress(f"resume={whole}", *both).code == 0
    asked, measure = [], evaluate.scores_by_data_set

    def counted(evaluator: Any, genomes: Any, data_sets: Any, **sizes: Any) -> Any:
        asked.append(*data_sets)
        if asked.count("other") == 1 and asked[-1] == "other":
            raise KeyboardInterrupt
        return measure(evaluator, genomes, data_sets, **sizes)

    monkeypatch.setattr(evaluate, "scores_by_data_set", counted)
    assert evopress(f"resume={run}", *both).code == 130
    lines = (run / "measured.jsonl").read_text().splitlines()
    assert asked == ["python_docs", "other"] and len(lines) == 1
    (run / "measured.jsonl").write_text(f"{lines[0]}\n{lines[0].replace('e', 'f', 1)}\n" + lines[0][:40])  # of a disk that failed
    outcome = evopress(f"resume={run}", *both)
    assert outcome.code == 0 and "evaluation: resuming from" in outcome.text, outcome.text
    assert asked == ["python_docs", "other", "other"]
    assert rows(run) == rows(whole) and not (run / "measured.jsonl").exists()
    for name in ("results.csv", "results.md"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    assert evopress(f"resume={run}", *both).code == 0 and len(asked) == 5, "what is asked for again is measured again"


@pytest.mark.parametrize(
    ("call", "before_state", "num_records"),
    [(1, False, 0), (5, False, 2), (1, True, 1), (3, True, 3), (4, True, 4)],
    ids=["generation 0", "between the stages of 2", "after record 0", "after record 2", "after the last record"],
)
def test_an_interrupted_search_goes_on_to_the_same_end(
    call: int, before_state: bool, num_records: int, finished: Any, tiny: Callable[..., Any], evopress: Callable[..., Any],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with monkeypatch.context() as patch:
        interrupt_at(call, patch, before_state=before_state)
        outcome = tiny(SEARCH)
    assert outcome.code == 130
    assert "Traceback" not in outcome.text
    assert outcome.errors == ["error: interrupted; resume with: python -m evopress resume=run"]
    assert not (tmp_path / "run" / "genome.json").exists()
    if num_records:
        assert len(records(tmp_path / "run")) == num_records
    outcome = evopress("resume=run", SEARCH)
    assert outcome.code == 0, outcome.text
    assert ("resuming at generation" in outcome.text) == (num_records > before_state)
    assert records(tmp_path / "run") == records(finished.folder)
    assert (tmp_path / "run" / "genome.json").read_bytes() == (finished.folder / "genome.json").read_bytes()
    seconds = [record["seconds"] for record in records(tmp_path / "run", without=())]
    assert seconds == sorted(seconds)


def test_an_interrupted_run_does_its_later_stages_when_it_goes_on(
    finished: Any, tiny: Callable[..., Any], evopress: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(one_budget, "evaluate", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert tiny().code == 130
    outcome = evopress("resume=run")
    assert outcome.code == 0, outcome.text
    assert "baselines: already found" in outcome.text
    found, expected = rows(tmp_path / "run"), rows(finished.folder)
    for name, row in found.items():
        assert (row.pop("seconds_spent", 0) > 0) == (expected[name].pop("seconds_spent", 0) > 0)  # a time of its own
        assert row == expected[name]
    assert (tmp_path / "run" / "report.html").exists()


def test_the_searchs_time_is_without_what_only_shows_it(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(search._HeldOut):
        def __call__(self, genome: Any) -> dict[str, Any]:
            time.sleep(1)
            return super().__call__(genome)

    monkeypatch.setattr(search, "_HeldOut", Slow)
    assert tiny(SEARCH, "search.generations=2", "evaluation.every=1").code == 0
    generations = records(tmp_path / "run", without=())
    assert all("held_out" in record for record in generations)
    assert generations[-1]["seconds"] - generations[0]["seconds"] < 2


def test_more_generations_go_on_from_the_last(
    finished: Any, tiny: Callable[..., Any], evopress: Callable[..., Any], tmp_path: Path
) -> None:
    assert tiny(SEARCH, "search.generations=1", "evaluation.every=0").code == 0
    assert evopress("resume=run", SEARCH, "search.generations=3").code == 0
    without = ("seconds", "held_out")
    assert records(tmp_path / "run", without=without) == records(finished.folder, without=without)
    assert evopress("resume=run", SEARCH).code == 0  # finished: nothing to do, and the settings of the last time hold
    assert len(records(tmp_path / "run")) == 4


def test_records_that_cannot_be_read_cost_no_genome(
    finished: Any, tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(written, "MAX_RECORDS_BYTES", 100)
    outcome = tiny(SEARCH)
    assert outcome.code == 1 and "metrics.jsonl is larger than" in outcome.errors[0], outcome.text
    assert (tmp_path / "run" / "genome.json").read_bytes() == (finished.folder / "genome.json").read_bytes()


def test_stages_alone_on_an_earlier_run(finished: Any, evopress: Callable[..., Any], tmp_path: Path) -> None:
    folder = shutil.copytree(finished.folder, tmp_path / "earlier")
    before = {name: (folder / name).read_bytes() for name in ("genome.json", "metrics.jsonl", "baselines.json", "results.csv")}
    expected = rows(folder)
    for name in ("report.html", "results.csv", "results.md"):
        (folder / name).unlink()
    shutil.rmtree(folder / "figures")
    outcome = evopress("resume=earlier", "stages=[evaluate,report]")
    assert outcome.code == 0, outcome.text
    assert "generation " not in outcome.text
    assert rows(folder) == expected
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert (folder / "report.html").exists()
    names = {path.name for path in (finished.folder / "figures").iterdir()}
    assert {path.name for path in (folder / "figures").iterdir()} == names
    stems = {"convergence", "level_heatmap", "level_profile", "switches", "selection", "lineage"}
    assert names == {f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")}
    assert set(read(folder / "result.json")) == {"schema", "rows", "search", "database", "memory"}


def test_more_data_sets_on_an_earlier_run(finished: Any, evopress: Callable[..., Any], tmp_path: Path) -> None:
    folder = shutil.copytree(finished.folder, tmp_path / "earlier")
    (tmp_path / "other.txt").write_text("All happy families are alike; each unhappy family is so in its way.\n\n" * 60)
    outcome = evopress("resume=earlier", "stages=[evaluate,report]", "+evaluation.files.other=other.txt")
    assert outcome.code == 0, outcome.text
    row, before = rows(folder)["evopress"], rows(finished.folder)["evopress"]
    assert set(row["perplexity"]) == {"python_docs", "other"}
    assert row["perplexity"]["python_docs"] == before["perplexity"]["python_docs"]
    assert "ppl other" in (folder / "results.csv").read_text(encoding="utf-8")


# Choices


CHOICES = {
    # to the range of the fitness
    "fitness=perplexity": (100, 1000),
    "fitness=topk_kl fitness.k=5": (1e-6, 0.1),
    "search.exchange=any": (1e-6, 0.1),
    "search.exchange=none": (1e-6, 0.1),
    "search.exchange=name": (1e-6, 0.1),
    "search.distribution=constant search.max_switches=1": (1e-6, 0.1),
    "level_db.activations=disk method.propagate_bits=null level_db.root=levels": (1e-6, 0.1),
    "model.group_size=null model.dtype=bfloat16": (1e-6, 1),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_choices_of_the_search(choice: str, tiny: Callable[..., Any], tmp_path: Path) -> None:
    outcome = tiny(SEARCH, "evaluation.every=0", *choice.split())
    assert outcome.code == 0, outcome.text
    least, most = CHOICES[choice]
    found = records(tmp_path / "run")
    assert len(found) == 4
    assert all(least < record["fitness"] < most for record in found), [record["fitness"] for record in found]
    genome = read(tmp_path / "run" / "genome.json")
    assert all(record["cost"] <= genome["budget"] for record in found)


def test_the_plain_evaluator_finds_the_same(finished: Any, tiny: Callable[..., Any], tmp_path: Path) -> None:
    outcome = tiny(SEARCH, "fitness.evaluator=plain", "evaluation.every=0")
    assert outcome.code == 0, outcome.text
    for mine, other in zip(records(tmp_path / "run"), records(finished.folder), strict=True):
        assert mine["genome"] == other["genome"]
        assert mine["fitness"] == pytest.approx(other["fitness"], rel=1e-4)


def test_super_fast_search(evopress: Callable[..., Any], tmp_path: Path) -> None:
    outcome = evopress(
        *("+method=quant", "bits=3.5", "model=tiny", "tracker=none", "search=super_fast", "search.generations=2"),
        *(
            "search/strategy=evolution",
            "threads=1",
            "data.calibration_tokens=1024",
            SEARCH,
            "hydra.run.dir=run",
            "evaluation.every=0",
        ),
    )
    assert outcome.code == 0, outcome.text
    assert [[stage["tokens"] for stage in record["stages"]] for record in records(tmp_path / "run")[1:]] == [[256, 2048]] * 2
    assert [record["stages"][1]["num_candidates"] for record in records(tmp_path / "run")[1:]] == [2, 2]  # one, and the parent


def test_local_text_calibrates_and_evaluates(tiny: Callable[..., Any], tmp_path: Path) -> None:
    """Issue 2, item 6: the same run on files of one's own, in two formats, with further held-out files."""
    prose = [f"In the year {year} the harvest was {'good' if year % 3 else 'poor'} and the ships came late." for year in range(100)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": line}) + "\n" for line in prose), encoding="utf-8")
    (tmp_path / "b.txt").write_text("\n\n".join(line.upper() for line in prose), encoding="utf-8")
    (tmp_path / "wiki.txt").write_text("".join(f" = {line} = \n \n {line} Also in winter . \n" for line in prose), encoding="utf-8")
    outcome = tiny(
        *("data=text", "data.calibration=[a.jsonl]", "data.evaluation=[b.txt]", "data.field=body"),
        *("+evaluation.files.wiki=wiki.txt", "evaluation.wikitext=[wiki]", "data.search_tokens=1024", "data.evaluation_tokens=512"),
        "stages=[database,search,evaluate]",
    )
    assert outcome.code == 0, outcome.text
    found = rows(tmp_path / "run")
    assert list(found) == ["dense", "evopress"]
    assert set(found["evopress"]["perplexity"]) == {"text", "wiki"}
    assert found["evopress"]["kl"] == pytest.approx(sum(found["evopress"]["kl_by_data_set"].values()) / 2)  # as many tokens of each
    recipe = read(Path(read(tmp_path / "run" / "result.json")["database"]["path"]) / "manifest.json")["recipe"]
    assert recipe["data"]["source"] == "text"


@pytest.mark.parametrize("model_type", ["opt", "phi3", "gemma2"])
def test_a_model_of_ones_own(model_type: str, tiny: Callable[..., Any], tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder(model_type), tmp_path / "my model")
    outcome = tiny(
        f"model.path='{folder}'", "stages=[database,search,evaluate,export]", "search.generations=1", "evaluation.every=0"
    )
    assert outcome.code == 0, outcome.text
    result = read(tmp_path / "run" / "result.json")
    assert Path(result["database"]["path"]).parent.name == "my-model"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint").config.model_type == model_type


# Tracking


def test_tracking_offline_leaves_a_wandb_folder(tiny: Callable[..., Any], tmp_path: Path) -> None:
    outcome = tiny(
        "tracker=wandb", "tracker.mode=offline", "tracker.group=g", "stages=[database,search,report]", "evaluation.every=0"
    )
    assert outcome.code == 0, outcome.text
    (run,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert list(run.glob("*.wandb"))
    assert "failed" not in outcome.text


def test_without_a_key_a_run_is_tracked_offline(tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    asked: dict[str, Any] = {}

    def refuse(**options: Any) -> None:
        asked.update(options)
        raise RuntimeError("the service is down")

    monkeypatch.setattr(wandb, "init", refuse)
    outcome = tiny(
        "tracker=wandb", "tracker.group=table3", "tracker.run_name=mine", "tracker.tags=[a]", SEARCH, "evaluation.every=0"
    )
    assert outcome.code == 0, outcome.text
    assert "the run goes on without it" in outcome.text
    assert (asked["mode"], asked["group"], asked["name"], asked["tags"]) == (
        "offline",
        "table3",
        "mine",
        ["quant", "bits=3.5", "a"],
    )
    assert asked["config"]["bits"] == 3.5


# Sweeps


def test_a_sweep_goes_on_after_a_job_that_fails(evopress: Callable[..., Any], cache: Path, tmp_path: Path) -> None:
    outcome = evopress(
        "-m", "+method=quant", "bits=9,3.5,3", "+debug=tiny", "search/strategy=evolution", SEARCH, "evaluation.every=0"
    )
    assert outcome.code == 1
    assert "Traceback" not in outcome.text
    (sentence,) = outcome.errors
    assert "bits=9" in sentence
    (sweep,) = (tmp_path / "multirun").glob("*/*")
    jobs = {
        bits: sweep / f"bits={bits},debug=tiny,evaluation.every=0,method=quant,search.strategy=evolution" for bits in ("3", "3.5")
    }  # 9 is refused
    assert sorted(sweep.iterdir()) == [sweep / ".failed", *jobs.values(), sweep / "jobs.csv", sweep / "multirun.yaml"]
    for bits in ("3.5", "3"):
        assert f"- bits={bits}" in (jobs[bits] / ".hydra" / "overrides.yaml").read_text(encoding="utf-8")
        assert len(records(jobs[bits])) == 4
        assert (jobs[bits] / "genome.json").exists()
    assert evopress(f"resume={jobs['3.5']}", "stages=[evaluate]").code == 0
    assert list(rows(jobs["3.5"])) == ["dense", "evopress"]


def test_a_sweep_over_seeds(evopress: Callable[..., Any], finished: Any, tmp_path: Path) -> None:
    outcome = evopress(
        "-m", "+method=quant", "bits=3.5", "+debug=tiny", "search/strategy=evolution", "seed=0,1", SEARCH, "hydra.sweep.dir=sweep"
    )
    assert outcome.code == 0, outcome.text
    jobs = [tmp_path / "sweep" / f"bits=3.5,debug=tiny,method=quant,search.strategy=evolution,seed={seed}" for seed in (0, 1)]
    assert records(jobs[0]) == records(finished.folder)  # a job is the run of its own, whatever ran before it
    assert records(jobs[1]) != records(finished.folder)


def test_a_checkpoint_is_said_to_lack_a_further_head(
    tiny: Callable[..., Any], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_folder(), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    further = {f"mtp.{i}.weight": torch.ones(4, 4) for i in range(2)}
    save_file(weights | further, folder / "model.safetensors", metadata={"format": "pt"})
    outcome = tiny(f"model.path={folder}", "stages=[search,export]")
    assert outcome.code == 0, outcome.text
    assert "further head (mtp.0.weight and 1 more tensors)" in outcome.text
    assert "without the further head" in outcome.text
    assert read(tmp_path / "run" / "checkpoint" / "evopress.json")["left_out"] == ["mtp.0.weight", "mtp.1.weight"]
