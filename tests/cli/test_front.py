"""Several budgets in one run: a genome each, the front, picking one, and runs that were cut off."""

from __future__ import annotations

import csv
import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

import evopress.fitness.minibatch as minibatch_fitness
import evopress.pipeline as pipeline
import evopress.stages.search as search_stage
from evopress import config as configuration
from evopress.command_line import refused, unused
from evopress.compress.sparse import kept_at
from evopress.errors import EvoPressError
from evopress.finished import FINISHED, settings_digest
from evopress.launching.resume import with_resumed
from evopress.levels import build, compressing
from evopress.levels.store import LevelDatabase
from evopress.models.opening import fitted
from evopress.reporting.front import best_baseline, front_rows, front_words
from evopress.run_folder import command_of, keep_overrides, looks_aside, second_pass_of, without_options_of_others
from evopress.settings import RunSettings

NAMES = ["4", "2.5"]
SEARCH = ["database", "search"]


def settings_of(*overrides: str) -> RunSettings:
    configuration.register()
    with initialize_config_dir(version_base="1.3", config_dir=str(configuration.config_folder())):
        config = compose("config", overrides=[*overrides, "+debug=tiny", "evaluation.every=0"])
    return fitted(configuration.to_settings(config))


def run(settings: RunSettings, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    pipeline.run(settings, folder, config={"bits": 3.0}, command="", environment={})


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def genomes(folder: Path) -> dict[str, Any]:
    return {path.parent.name: read(path)["units"] for path in sorted(folder.glob("points/*/genome.json"))}


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def paths(cache: Path) -> list[str]:
    return [f"paths.cache={cache}"]


@pytest.fixture(scope="module")
def asked(paths: list[str]) -> RunSettings:
    guided = ["search/strategy=guided", "search.strategy.rounds=2", "search.strategy.generations_after=1"]
    return settings_of("+method=quant", "budgets=[2.5,4]", "baselines.names=[uniform,dp]", *guided, *paths)


@pytest.fixture(scope="module")
def front(asked: RunSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A front of two budgets with all its stages."""
    folder = tmp_path_factory.mktemp("front")
    run(asked, folder)
    return folder


@pytest.fixture
def copied(front: Path, tmp_path: Path) -> Path:
    shutil.copytree(front, tmp_path / "run")
    return tmp_path / "run"


def test_every_budget_has_a_genome_within_it_begun_from_the_one_before(front: Path) -> None:
    result = read(front / "result.json")
    rows = {row["name"]: row for row in result["rows"]}
    for name in NAMES:
        assert rows[f"evopress@{name}"]["bits_per_weight"] <= float(name) + 1e-9
        first = json.loads((front / "points" / name / "metrics.jsonl").read_text().splitlines()[0])
        assert (first["fitness"] is None) is (name == "4"), "the other chooses between its own start and the neighbour's"
    assert [point["budget"] for point in result["front"]] == NAMES
    assert result["search"]["tokens"] == sum(point["tokens"] for point in result["front"])
    assert {"dense", "uniform_4", "uniform_2", "dp@4", "dp@2.5"} <= set(rows) and "uniform_4@2.5" not in rows


def test_the_front_is_a_table_a_figure_and_a_page(front: Path) -> None:
    lines = list(csv.DictReader((front / "front.csv").open()))
    assert [line["budget"] for line in lines] == NAMES
    sizes, kls = ([float(line[key]) for line in lines] for key in ("size MB if packed", "held-out KL python_docs"))
    assert sizes == sorted(sizes, reverse=True) and kls == sorted(kls)
    assert all((front / line["genome"]).is_file() and float(line["ppl python_docs"]) > 1 for line in lines)
    page = (front / "report.html").read_text()
    assert 'alt="front"' in page and "pick=2.5" in page and "EvoPress at 2.5" in page
    assert "At 2.5 it is" in (front / "results.md").read_text()


def test_a_point_is_picked_and_the_front_stays(asked: RunSettings, copied: Path) -> None:
    before = contents(copied)
    run(replace(asked, pick="2.50", stages=["export"]), copied)
    point = copied / "points" / "2.5"
    assert read(point / "checkpoint" / "evopress.json")["bits_per_weight"] <= 2.5 and list(point.glob("checkpoint/*.safetensors"))
    assert read(point / "finished.json")["stages"] == ["export"]
    for changed, sentence in (
        ({"pick": 3.5}, r"pick=3.5 was not searched in .* \(2.5, 4\)"),
        ({"pick": "abc"}, "pick=abc is no budget"),
        ({"stages": ["export"]}, "needs one genome"),
        ({"pick": 3, "budgets": [], "bits": 3.0}, "chooses among the budgets of an earlier run"),
    ):
        with pytest.raises(EvoPressError, match=sentence):
            run(replace(asked, **changed), copied)
    after = contents(copied)
    assert {path: after[path] for path in before} == before, "what the run had is as it was"
    assert looks_aside(copied, ["pick=2.5"]), "and its overrides stay those that it has"


def test_what_makes_a_run_again_is_its_own_command(tmp_path: Path) -> None:
    own = ["+method=quant", "budgets=[2.5,3]", "stages=[database,search]"]
    assert command_of(tmp_path, own) == "python -m evopress +method=quant 'budgets=[2.5,3]' 'stages=[database,search]'"
    keep_overrides(tmp_path, own)
    later = [*own[:-1], "stages=[report]", f"resume={tmp_path}"]
    assert command_of(tmp_path, later) == command_of(tmp_path, own)
    picked = [*own, "pick=2.5", f"resume={tmp_path}"]
    assert command_of(tmp_path, picked) == f"{command_of(tmp_path, own)} && python -m evopress resume=RUN_FOLDER pick=2.5"
    keep_overrides(tmp_path, ["+method=quant"])
    assert command_of(tmp_path, ["+method=quant", "stages=[report]", f"resume={tmp_path}"]) == "python -m evopress +method=quant"


@pytest.mark.parametrize(
    ("own", "by_default", "later", "follows"),
    [
        (["bits=3"], False, ["stages=[refine,export]"], "resume=RUN_FOLDER 'stages=[refine,evaluate,export,report]'"),
        (["bits=3"], False, ["stages=[export]"], "resume=RUN_FOLDER 'stages=[refine,evaluate,export,report]'"),
        (["bits=3"], True, ["stages=[export]"], ""),
        (["bits=3", "stages=[search,refine]"], False, ["stages=[export]"], ""),
        (["bits=3", "stages=[search]"], True, ["stages=[refine]"], "resume=RUN_FOLDER 'stages=[refine,evaluate,export,report]'"),
        (["budgets=[2,3]"], False, ["pick=2"], "resume=RUN_FOLDER pick=2 'stages=[refine,evaluate,export,report]'"),
        (["stages=[search,refine]"], False, [], ""),
    ],
)
def test_a_second_pass_that_was_named_later_follows_the_command(
    own: list[str], by_default: bool, later: list[str], follows: str, tmp_path: Path
) -> None:
    keep_overrides(tmp_path, own)
    overrides = [*own, *later, f"resume={tmp_path}"] if later else own
    expected = f" && python -m evopress {follows}" if follows else ""
    assert second_pass_of(tmp_path, overrides, by_default=by_default) == expected


def test_options_of_formats_that_a_later_command_does_not_name_are_left_behind() -> None:
    kept = ["bits=3", "+export_options.mlx.scales=float32", "++export_options.my-own.a=1", "export_options.gguf={type: Q4_K}"]
    assert without_options_of_others(kept, "[gguf]") == ["bits=3", "export_options.gguf={type: Q4_K}"]
    assert without_options_of_others(kept, "[mlx,my-own]") == kept[:3]


def test_a_front_that_is_killed_again_and_again_ends_with_the_same_genomes(
    asked: RunSettings, front: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, made, begun = 0, search_stage.make_fitness, []

    def stop() -> None:
        nonlocal count
        count += 1
        if count % 3 == 0:
            raise KeyboardInterrupt

    def counting(workspace: Any, *rest: Any) -> Any:
        begun.append(workspace.run_dir.name)
        return made(workspace, *rest)

    monkeypatch.setattr(search_stage, "stop_if_asked", stop)
    monkeypatch.setattr(search_stage, "make_fitness", counting)
    kills = 0
    while kills < 9:
        try:
            run(replace(asked, stages=SEARCH), tmp_path / "run")
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills >= 2 and genomes(tmp_path / "run") == genomes(front)
    for name in NAMES:
        there, here = ((folder / "points" / name / "metrics.jsonl").read_text() for folder in (front, tmp_path / "run"))
        assert [json.loads(line)["genome"] for line in here.splitlines()] == [
            json.loads(line)["genome"] for line in there.splitlines()
        ]
    assert len(set(begun)) == 2 and begun == sorted(begun, key=NAMES.index), "none is begun again once the next has begun"


def test_a_further_budget_is_searched_alone_and_other_settings_are_refused(asked: RunSettings, copied: Path) -> None:
    with pytest.raises(EvoPressError, match=r"had other settings \(seed 0 there, 1 here\)"):
        run(replace(asked, seed=1, stages=SEARCH), copied)
    before = genomes(copied)
    run(replace(asked, budgets=[4, 2.5, 3.5], stages=SEARCH), copied)
    after = genomes(copied)
    assert sorted(after) == ["2.5", "3.5", "4"] and {name: after[name] for name in before} == before


@pytest.mark.parametrize("given", ["bits=3", "sparsity=0.5"])
def test_one_target_means_nothing_to_several_budgets_that_are_resumed(given: str, tmp_path: Path) -> None:
    keep_overrides(tmp_path, ["+method=quant", "bits=2.5", "budgets=[4,2.5]"])
    with pytest.raises(
        EvoPressError, match=rf"^{given} cannot be set for the run in .*, which has budgets=\[4,2\.5\]: give further"
    ):
        with_resumed([f"resume={tmp_path}", given], tmp_path)
    assert "budgets=null" in with_resumed([f"resume={tmp_path}", given, "budgets=null"], tmp_path)
    assert "budgets=[3]" in with_resumed([f"resume={tmp_path}", "budgets=[3]"], tmp_path)


def test_a_run_that_was_killed_goes_on_with_its_own_stages_and_a_finished_one_with_all(tmp_path: Path) -> None:
    keep_overrides(tmp_path, ["+method=quant", "bits=2.5", "stages=[search,report]"])
    assert "stages=[search,report]" in with_resumed([f"resume={tmp_path}"], tmp_path)
    given = with_resumed([f"resume={tmp_path}", "stages=[export]"], tmp_path)
    assert [each for each in given if each.startswith("stages=")] == ["stages=[export]"]
    (tmp_path / FINISHED).write_text('{"schema": 1, "stages": ["report"]}')
    assert "stages=[search,report]" in with_resumed([f"resume={tmp_path}"], tmp_path), "a look at one that was killed is no end"
    (tmp_path / FINISHED).write_text('{"schema": 1, "stages": ["search", "report"]}')
    assert not any(each.startswith("stages=") for each in with_resumed([f"resume={tmp_path}"], tmp_path))


def test_a_single_target_does_not_take_the_place_of_several_budgets(asked: RunSettings, copied: Path) -> None:
    before = contents(copied)
    with pytest.raises(EvoPressError, match=r"the run in .* has several budgets: resume it with its own budgets"):
        run(replace(asked, budgets=[], bits=3.0), copied)
    assert contents(copied) == before


def test_what_a_search_makes_no_use_of_is_said() -> None:
    (sentence,) = unused(["bits=3", "search.generations=60"], strategy="guided")
    assert sentence.startswith("search.generations=60 has no effect with search/strategy=guided: set search")
    assert not list(unused(["bits=3", "search.generations=60"], strategy="evolution"))


@pytest.mark.parametrize("instead", ["max_kl=0.1", "min_agreement=0.9", "size=60MB"])
def test_bits_mean_nothing_beside_what_takes_their_place(instead: str, tmp_path: Path) -> None:
    keep_overrides(tmp_path, ["+method=quant", instead])
    with pytest.raises(EvoPressError, match=rf"^bits=3 cannot be set for the run in .*, which has {instead}: leave it out$"):
        with_resumed([f"resume={tmp_path}", "bits=3"], tmp_path)
    key = instead.partition("=")[0]
    assert f"{key}=null" in with_resumed([f"resume={tmp_path}", "bits=3", f"{key}=null"], tmp_path)
    assert refused(["+method=quant", "bits=3", instead], {}) == f"bits=3 and {instead} are both given: leave one of them out"
    assert refused(["+method=quant", "bits=3", instead, f"{key}=null"], {}) is None
    assert refused(["+method=sparsity", "sparsity=0.5", instead], {}) is None, "which pruned levels may lie around"


@pytest.mark.parametrize(
    "overrides",
    [("+method=sparsity", "budgets=[0.5,0.6]"), ("+method=drop", "budgets=[0.25,0.5]", "method.granularity=module")],
    ids=["sparsity", "drop"],
)
def test_other_methods_have_fronts_too(
    overrides: tuple[str, ...], paths: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_folder: Callable[..., Path]
) -> None:
    settings = settings_of(*overrides, f"model.path={tiny_folder(num_blocks=4)}", "search.generations=2", *paths)
    run(replace(settings, stages=SEARCH), tmp_path / "run")
    found = genomes(tmp_path / "run")
    assert len(found) == 2 and len({str(units) for units in found.values()}) == 2


def test_pruned_levels_have_a_uniform_row_at_every_budget(
    paths: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its very sparsity, in every unit, also where budgets are closer than levels; text is walked once for all."""
    settings = settings_of("+method=sparsity", "budgets=[0.6,0.65,0.66]", "baselines.names=[uniform]", *paths)
    run(replace(settings, stages=["database"]), tmp_path / "run")
    monkeypatch.setattr(compressing, "collect_hessians", lambda *a, **k: pytest.fail("Hessians were computed again"))
    monkeypatch.setattr(build, "propagate", lambda *a, **k: pytest.fail("activations were computed again"))
    run(replace(settings, stages=["baselines", "evaluate"]), tmp_path / "run")
    result = read(tmp_path / "run" / "result.json")
    rows = {row["name"]: row for row in result["rows"]}
    assert len(rows) == len(result["rows"])
    uniform = {name: (row["sparsity"], row.get("budget")) for name, row in rows.items() if name.startswith("uniform")}
    assert uniform == {
        "uniform": (pytest.approx(0.65, abs=1e-3), None),  # the levels' centre
        "uniform@0.6": (pytest.approx(0.6, abs=1e-3), "0.6"),
        "uniform@0.66": (pytest.approx(0.66, abs=1e-3), "0.66"),
    }
    (name,) = read(tmp_path / "run" / "points" / "0.6" / "baselines.json")["further"]
    database = LevelDatabase.open(Path(result["database"]["path"]).with_name(name))
    assert [[level.cost for level in unit.levels] for unit in database.space.units] == [
        [kept_at(unit.size, 0.6)] for unit in database.space.units
    ]


def test_sparsities_that_levels_do_not_reach_are_told_what_reaches_them(paths: list[str], tmp_path: Path) -> None:
    """Of two budgets the higher is the middle one; around the mean of both there are levels for both."""
    for centre, *own in (("0.6", "budgets=[0.4,0.6]"), ("0.5", "budgets=[0.3,0.7]", "method.centre=0.5")):
        settings = replace(settings_of("+method=sparsity", *own, "baselines.names=[]", *paths), dry_run=True)
        with pytest.raises(
            EvoPressError, match=rf"set method\.centre \({centre} here, .* nearer to it or a larger method\.step, or"
        ):
            run(settings, tmp_path / "run")
    for own in (("budgets=[0.4,0.6]",), ("budgets=[0.3,0.7]", "method.step=200")):
        settings = settings_of("+method=sparsity", *own, "method.centre=0.5", "baselines.names=[]", *paths)
        run(replace(settings, dry_run=True), tmp_path / "run")


def test_the_smallest_model_that_keeps_a_kl_is_found_by_bisection_and_exported(asked: RunSettings, tmp_path: Path) -> None:
    """Of four budgets two or three are searched; another limit searches only what it lacks."""
    ask = replace(asked, budgets=[4, 3.5, 3, 2.5], max_kl=0.015, stages=[*SEARCH, "evaluate", "export"])
    run(ask, tmp_path / "run")
    told = read(tmp_path / "run" / "front.json")
    kls = {entry["budget"]: entry["kl"] for entry in told["tried"]}
    assert list(kls) == ["4", "3", "3.5"] and told["answer"] == min(name for name, kl in kls.items() if kl <= 0.015)
    assert [entry["keeps"] for entry in told["tried"]] == [kl <= 0.015 for kl in kls.values()]
    assert (tmp_path / "run" / "points" / told["answer"] / "checkpoint").is_dir()
    result = read(tmp_path / "run" / "result.json")
    assert result["kept"]["answer"] == told["answer"] and [point["budget"] for point in result["front"]] == ["4", "3.5", "3"]
    said = front_words(result["rows"], front_rows(result), result["kept"])
    assert f"{told['answer']} is the smallest whose KL is at most 0.015 on search text" in said and "on held-out text" in said
    run(replace(ask, stages=["baselines"]), tmp_path / "run")
    assert [path.parent.name for path in tmp_path.glob("run/points/*/baselines.json")] == [told["answer"]]
    before = contents(tmp_path / "run" / "points")
    for stages in (["export"], ["report"]):
        with pytest.raises(EvoPressError, match=r"was found for max_kl=0.015, not for max_kl=0.001: run the stage search"):
            run(replace(ask, max_kl=0.001, stages=stages), tmp_path / "run")
        with pytest.raises(EvoPressError, match=r"was found for max_kl=0.015, not for min_agreement=0.9: run"):
            run(replace(ask, max_kl=None, min_agreement=0.9, stages=stages), tmp_path / "run")
    assert contents(tmp_path / "run" / "points") == before
    run(replace(ask, max_kl=2 * kls["3"], stages=SEARCH), tmp_path / "run")
    again = read(tmp_path / "run" / "front.json")
    assert again["answer"] in ("3", "2.5") and again["tried"][:2] == [{**each, "keeps": True} for each in told["tried"][:2]]
    after = contents(tmp_path / "run" / "points")
    assert {path: after[path] for path in before if path.name != "genome.json"} == {
        path: data for path, data in before.items() if path.name != "genome.json"
    }


def test_an_answer_at_the_end_of_the_steps_says_that_what_is_most_compressed_was_not_tried(
    asked: RunSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = []
    for budgets in ([], [2.5]):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            run(replace(asked, budgets=budgets, max_kl=100.0, stages=SEARCH), tmp_path / f"run{len(budgets)}")
        said.append(next(line for line in caplog.text.splitlines() if "the smallest of" in line))
    assert said[0].endswith(
        "; no smaller one is tried, and all units at their most compressed level may keep it, too: give budgets to choose among"
    )
    assert said[1].endswith("budgets that keeps max_kl=100: 2.5")


def test_what_no_budget_decides_is_planned_and_said_once(
    asked: RunSettings, paths: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def planned(settings: RunSettings, **changed: Any) -> str:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            run(replace(settings, dry_run=True, **changed), tmp_path / "run")
        return next(line for line in caplog.text.splitlines() if line.startswith("baselines "))

    def tokens(row: str) -> str:
        return re.split(" {2,}", row)[2]

    scored = replace(asked, baselines=replace(asked.baselines, names=["one_at_a_time"]), stages=["baselines"])
    assert tokens(planned(scored, budgets=[4, 3.5, 3, 2.5])) == tokens(planned(scored, budgets=[], bits=3.0)) != "-"
    mixed = replace(scored, baselines=replace(asked.baselines, names=["best_of_random"]), stages=["search", "baselines"])
    assert tokens(planned(mixed, max_kl=0.1)) != tokens(planned(mixed)), "of two budgets that are tried, those of the answer alone"
    names = "baselines.names=[uniform,owl,atp,alphapruning]"
    pruned = planned(settings_of("+method=sparsity", "budgets=[0.5,0.6]", "model.dtype=auto", names, *paths), stages=["baselines"])
    assert "uniform, owl, atp, alphapruning (at most 35 further levels of each weight)  " in pruned, "uniform of 0.5"
    assert caplog.text.count("model.dtype=auto: ") == 1


def test_what_no_budget_keeps_is_one_sentence_before_anything_is_searched(asked: RunSettings, tmp_path: Path) -> None:
    with pytest.raises(EvoPressError, match=r"no front.json in .* run the stage search first"):
        run(replace(asked, budgets=[], max_kl=0.1, stages=["database", "baselines"]), tmp_path / "run")
    with pytest.raises(EvoPressError, match="max_kl=1e-09 is kept by no budget: with every unit at its least compressed level"):
        run(replace(asked, budgets=[], max_kl=1e-9, stages=SEARCH), tmp_path / "run")
    assert not (tmp_path / "run" / "points").exists()


def test_a_later_run_measures_nothing_that_an_earlier_one_has(
    asked: RunSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """To the bit: the records are the same but for the time; what is asked for beyond that is measured."""
    counted, measured = 0, minibatch_fitness.measure_parts

    def counting(*arguments: Any, **options: Any) -> Any:
        nonlocal counted
        counted += 1
        return measured(*arguments, **options)

    monkeypatch.setattr(minibatch_fitness, "measure_parts", counting)
    one = replace(asked, budgets=[], bits=2.75, stages=SEARCH)
    counts, records = [], []
    for number, archive in enumerate((True, True, False)):
        with caplog.at_level(logging.INFO):
            caplog.clear()
            run(replace(one, archive=archive), tmp_path / str(number))
        assert ("evaluations, " in caplog.text and "in the archive" in caplog.text) is (number == 1)
        lines = (tmp_path / str(number) / "metrics.jsonl").read_text().splitlines()
        records.append([{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines])
        counts.append(counted)
        counted = 0
    assert counts[0] > 0 and counts[1] == 0 and counts[2] == counts[0]
    assert records[0] == records[1] == records[2]
    assert settings_digest(one) == settings_digest(replace(one, archive=False)), "it changes no result"


def test_a_point_is_compared_with_what_spends_as_much_of_what_levels_spend() -> None:
    """Bytes have in them what is no unit: of a small model a bit more is a few percent of them."""
    point = {"name": "evopress@4", "budget": "4", "bits_per_weight": 4.0, "bytes": 80_256, "kl": 0.006}
    uniform = {"name": "uniform_3", "bits_per_weight": 3.0, "bytes": 77_952, "kl": 0.031}
    dp = {"name": "dp@4", "budget": "4", "bits_per_weight": 3.95, "bytes": 80_140, "kl": 0.008}
    assert best_baseline([uniform, point], point) is None
    assert best_baseline([uniform, dp, point], point) is dp
    assert best_baseline([dp | {"within_budget": False}, point], point | {"within_budget": True}) is None
    assert best_baseline([uniform, point], point | {"budget": "80kB"}) is uniform, "a size is of all that is stored"
    fewer = {"name": "dp@80kB", "budget": "80kB", "bits_per_weight": 4.3, "bytes": 80_000, "kl": 0.02, "modules_dropped": 6}
    sized = point | {"budget": "80kB", "modules_dropped": 2}
    assert best_baseline([fewer, sized], sized) is fewer, "bytes alone tell"
    joint = [row | {"modules_dropped": 1} for row in (uniform, point)]
    assert best_baseline(joint, joint[1]) is joint[0], "bits are of what stays: bytes tell"
