"""What a run says before it works, what it refuses then, and `dry_run=true`, which stops there."""

from __future__ import annotations

import errno
import json
import re
import shutil
import tempfile
from collections import namedtuple
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from evopress import ranks, resources
from evopress.compress.compressor import free_bytes, free_now, sweep_bytes, to_come
from evopress.errors import EvoPressError
from evopress.evaluation.tasks import Asked
from evopress.finished import FINISHED
from evopress.fitness.measures import KLDivergence
from evopress.fitness.plain import PlainEvaluator
from evopress.fitness.population import PopulationEvaluator, evaluation_bytes, measure_sums
from evopress.levels import build
from evopress.levels.live import decoding_bytes
from evopress.levels.plan import BuildNeeds
from evopress.methods.method import Rest
from evopress.progress import duration
from evopress.search.strategy import Asks
from evopress.stages import evaluate, preflight, probe
from evopress.stages import needs as needs_of_stages
from evopress.stages.evaluate import evaluate_needs
from evopress.stages.exports import export_needs
from evopress.stages.needs import Planner
from evopress.units import Budget, Level, Space, Unit
from experiments.benchmark.alive import BOTH, Alive
from tests.cli.conftest import TINY

METHODS = {
    "quant": ("+method=quant", "bits=3.5"),
    "sparsity": ("+method=sparsity", "sparsity=0.5"),
    "drop": ("+method=drop", "sparsity=0.5", "baselines.names=[shortgpt,shortened_llama,exhaustive,best_of_random]"),
}
DRY = "dry_run=true"
DiskUsage = namedtuple("DiskUsage", "total used free")
Memory = namedtuple("Memory", "available")


def rows(text: str) -> dict[str, list[str]]:
    """Return the table of what a run will take, stage to cells."""
    lines = text[text.index("what this run will take") :].splitlines()[1:]
    table = [re.split(r"  +", line.strip()) for line in lines[: next(i for i, x in enumerate(lines) if x.startswith("available"))]]
    assert table[0] == ["stage", "to do", "tokens", "blocks x tokens", "disk", "memory", "time"]
    return {cells[0]: cells[1:] for cells in table[1:]}


def contents(folder: Path) -> dict[str, bytes]:
    """Return everything in a run folder but its log."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("evopress.log", ".lock")
    }


@pytest.mark.parametrize("method", METHODS)
def test_a_dry_run_says_what_every_stage_takes_and_leaves_nothing(
    method: str, evopress: Callable[..., Any], tmp_path: Path
) -> None:
    outcome = evopress(
        *METHODS[method],
        "+debug=tiny",
        "search/strategy=evolution",
        DRY,
        "hydra.run.dir=run",
        f"level_db.root={tmp_path / 'levels'}",
    )
    assert outcome.code == 0, outcome.text
    table = rows(outcome.text)
    assert list(table) == ["database", "baselines", "search", "evaluate", "export", "report", "all"]
    assert table["database"][0] == ("no weights to store" if method == "drop" else "2 of 2 blocks to build")
    assert "too small for a probe" in outcome.text
    assert {name.split("/")[0] for name in contents(tmp_path / "run")} == {".hydra", "environment.json"}
    assert not list((tmp_path / "levels").rglob("*"))


@pytest.mark.parametrize(
    ("name", "model_type", "engine"),
    [("mlx", "llama", "none"), ("gguf", "llama", "none"), ("compressed_tensors", "opt", "vllm"), ("gptq", "opt", "none")],
)
def test_what_a_packed_format_takes_is_said_and_refused_before_levels_are_built(
    name: str,
    model_type: str,
    engine: str,
    evopress: Callable[..., Any],
    tiny_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = ("+method=quant", "bits=3.5", "+debug=tiny", f"export=[{name}]", f"engine={engine}", "model.group_size=32")
    asked = (*asked, f"model.path={tiny_folder(model_type)}", f"level_db.root={tmp_path / 'levels'}")
    monkeypatch.setattr("evopress.databases.ensure_database", lambda *a, **k: pytest.fail("levels were built"))
    outcome = evopress(*asked, DRY)
    assert outcome.code == 0 and rows(outcome.text)["export"][0] == name, outcome.text
    assert rows(outcome.text)["database"][0] == "2 of 2 blocks to build"
    assert not list((tmp_path / "levels").rglob("*"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: DiskUsage(10**9, 10**9, 100_000))
    refused(evopress(*asked, "hydra.run.dir=run"), "this run needs", "100 kB free", "leave")
    assert not list((tmp_path / "levels").rglob("*"))


def test_what_is_said_is_what_is_done(finished: Any, tiny: Callable[..., Any]) -> None:
    """Candidate tokens exactly; blocks times tokens exactly where nothing is shared."""
    with (finished.folder / "metrics.jsonl").open(encoding="utf-8") as file:
        tokens = json.loads(file.readlines()[-1])["tokens"]
    base = 2048  # the dense model on the search text
    outcome = tiny(DRY, "stages=[search]", "evaluation.every=0", "fitness.evaluator=plain", "seed=1")
    assert rows(outcome.text)["search"][1:3] == [f"{(base + tokens) / 1e3:.3g} k", f"{2 * (base + tokens) / 1e3:.3g} k"]


@pytest.mark.parametrize("bits", [3.0, 3.5])  # the first is a level, from which a search begins where it is given nothing
def test_genomes_to_start_from_are_counted(bits: float, tiny: Callable[..., Any], tmp_path: Path) -> None:
    asked = (
        f"bits={bits}",
        "search/strategy=evolution",
        "search.starts=[dp]",
        "baselines.names=[dp]",
        "stages=[baselines,search]",
    )
    plain = ("evaluation.every=0", "fitness.evaluator=plain", "seed=2")
    said = rows(tiny(DRY, *asked, *plain, folder=tmp_path / "dry").text)["search"][1]
    outcome = tiny(*asked, *plain)
    assert outcome.code == 0, outcome.text
    tokens = json.loads((tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])["tokens"]
    assert said == f"{(2048 + tokens) / 1e3:.3g} k"


def test_a_search_holds_one_genome_where_it_goes_back(tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """And rounds of second order count five for each token, and proposals as any round has them."""
    held: set[tuple[int, int]] = set()
    hold = Planner.hold

    def watched(self: Planner, needs: Any, candidates: int, tokens: int, **more: Any) -> None:
        held.add((candidates, tokens))
        hold(self, needs, candidates, tokens, **more)

    monkeypatch.setattr(Planner, "hold", watched)
    asked = ("bits=3", "search/strategy=guided", "stages=[search]", "baselines.names=[]", "evaluation.every=0", DRY)
    plain = rows(tiny(*asked).text)["search"][1]
    assert plain == f"{(2048 + 5 * (3 * 512 + 6 * 128)) / 1e3:.3g} k"
    assert held >= {(1, 512), (6, 128)} and all(tokens != 512 for candidates, tokens in held if candidates > 1)
    started = rows(tiny(*asked, "search.starts=[dp]", "baselines.names=[dp]").text)["search"][1]
    assert started == f"{(2048 + 2 * 128 + 5 * (3 * 512 + 6 * 128)) / 1e3:.3g} k", "the uniform genome and that one"
    held.clear()
    more = rows(tiny(*asked, "search.strategy.second_order_rounds=2").text)["search"][1]
    assert more == f"{(2048 + 5 * (3 * 512 + 6 * 128) + 2 * (5 * 1024 + 6 * 128)) / 1e3:.3g} k"
    assert held >= {(1, 512), (1, 1024), (6, 128)}


def test_levels_that_baselines_build_are_counted(
    sparse: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two blocks whose levels take an hour each; a level that a baseline adds takes as long as one of the run's."""
    probed: list[Any] = []

    def measured(blocks: Any, ids: Any, measure: Any, compressor: Any, **options: Any) -> probe.Speed:
        probed.append(compressor)
        return probe.Speed(0.0, 0.0, 0.0, 0.0, 0.0 if compressor is None else 3600.0, {}, 0.0)

    monkeypatch.setattr(preflight, "measure_speed", measured)
    root = f"level_db.root={tmp_path / 'levels'}"
    asked = ("baselines.names=[uniform,atp]", root)
    both = rows(sparse(*asked, "stages=[database,baselines]", DRY).text)
    assert both["database"][-1] == duration(7200)
    outcome = sparse(*asked, "stages=[database]")
    assert outcome.code == 0, outcome.text
    (manifest,) = (json.loads(path.read_text(encoding="utf-8")) for path in (tmp_path / "levels").rglob("sparsity-*/manifest.json"))
    own = sum(unit["size"] * len(unit["levels"]) for unit in manifest["units"]) / sum(unit["size"] for unit in manifest["units"])
    outcome = sparse(*asked, "stages=[baselines]")
    assert outcome.code == 0, outcome.text
    alone = rows(outcome.text)["baselines"]
    assert alone == both["baselines"] and alone[0] == "uniform, atp (at most 9 further levels of each weight)"
    assert alone[-1] == duration(2 * 3600 * 9 / own) and probed[-1] is not None
    stored = sum(path.stat().st_size for path in (tmp_path / "levels").rglob("atp-*/*.safetensors"))
    number, unit = alone[3].split()
    assert 0.8 < float(number) * {"kB": 1e3, "MB": 1e6}[unit] / stored < 1.1
    assert rows(sparse(*asked, "stages=[baselines]", DRY).text)["baselines"][0] == "found before" and probed[-1] is None


def test_fisher_scores_count_the_products_of_all_levels(tiny: Callable[..., Any]) -> None:
    asked = ("bits=3.5", "stages=[baselines]", DRY)
    told = {
        name: rows(tiny(*asked, f"baselines.names=[{name}]", f"+baselines.options.{name}.tokens=512").text)["baselines"]
        for name in ("fisher", "first_order")
    }
    num_levels = 5
    base = 2048  # tokens of the dense model on the search text
    assert told["fisher"][1:3] == [f"{(base + 3 * 512) / 1e3:.3g} k", f"{2 * (base + (3 + num_levels) * 512) / 1e3:.3g} k"]
    each = num_levels * 512  # every level has a pass of its own
    assert told["first_order"][1:3] == [f"{(base + 3 * each) / 1e3:.3g} k", f"{2 * (base + 4 * each) / 1e3:.3g} k"]


def test_scores_go_back_once_where_modules_can_be_dropped_too(evopress: Callable[..., Any]) -> None:
    method = ("+method=joint", "size=16bpw", "method.include=[blocks]", "+debug=tiny", "hydra.run.dir=run")
    fisher = ("baselines.names=[fisher]", "+baselines.options.fisher.tokens=512", "stages=[baselines]")
    outcome = evopress(*method, *fisher, DRY)
    assert outcome.code == 0, outcome.text
    assert rows(outcome.text)["baselines"][1] == f"{(2048 + 3 * 512) / 1e3:.3g} k"


def test_baselines_are_found_again_with_an_option_that_they_did_not_have(tiny: Callable[..., Any], tmp_path: Path) -> None:
    fisher = ("bits=3.5", "baselines.names=[fisher]", "stages=[database,baselines]")
    assert tiny(*fisher).code == 0
    (path,) = tmp_path.rglob("baselines.json")
    spent = json.loads(path.read_text(encoding="utf-8"))["spent"]["fisher"]["tokens"]
    assert tiny(*fisher).code == 0
    outcome = tiny(*fisher, "+baselines.options.fisher.tokens=512")
    assert outcome.code == 0 and "they are found again" in outcome.text
    assert json.loads(path.read_text(encoding="utf-8"))["spent"]["fisher"]["tokens"] == 3 * 512 < spent


def test_what_is_there_counts_as_done(finished: Any, evopress: Callable[..., Any], tmp_path: Path) -> None:
    folder = shutil.copytree(finished.folder, tmp_path / "earlier")
    before = contents(folder)
    outcome = evopress("resume=earlier", DRY)
    assert outcome.code == 0, outcome.text
    table = rows(outcome.text)
    assert [table[stage][0] for stage in ("database", "baselines", "search")] == [
        *("reused, 2 blocks", "found before", "done: 3 generations")
    ]
    assert [table[stage][1:5] for stage in ("database", "baselines", "search")] == [["-"] * 4] * 3
    assert contents(folder) == before  # finished.json and the run's own settings too
    prolonged = rows(evopress("resume=earlier", "search.generations=5", DRY).text)
    assert prolonged["search"][0] == "2 of 5 generations"
    others = rows(evopress("resume=earlier", "baselines.num_random=5", DRY).text)
    assert others["baselines"][0].startswith("uniform, best_of_random") and others["baselines"][1] != "-"  # found again
    alone = rows(evopress("resume=earlier", "stages=[evaluate]", DRY).text)
    assert list(alone) == ["evaluate"]
    assert alone["evaluate"][0].startswith("6 models on python_docs")  # dense, two uniform, best of 4, dp, evopress
    assert contents(folder) == before


def test_a_database_that_a_stage_needs_and_nobody_asked_for_is_counted(tiny: Callable[..., Any], tmp_path: Path) -> None:
    root = f"level_db.root={tmp_path / 'levels'}"
    table = rows(tiny("stages=[evaluate]", root, DRY).text)
    assert list(table) == ["database", "evaluate", "all"]
    assert table["database"][0] == "2 of 2 blocks to build, first"


def test_a_part_of_a_database_is_counted(tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = f"level_db.root={tmp_path / 'levels'}"

    write = build._write

    def killed(*arguments: Any) -> None:
        write(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "_write", killed)
        assert tiny("stages=[database]", root).code == 130
    assert rows(tiny("stages=[database]", root, DRY).text)["database"][0] == "1 of 2 blocks to build"
    assert len(list((tmp_path / "levels").rglob("block-*.safetensors"))) == 1


def test_a_run_goes_on_in_the_folder_of_a_dry_one(tiny: Callable[..., Any], evopress: Callable[..., Any], tmp_path: Path) -> None:
    assert tiny(DRY).code == 0
    outcome = evopress("resume=run", "stages=[database]")
    assert outcome.code == 0, outcome.text
    assert json.loads((tmp_path / "run" / FINISHED).read_text(encoding="utf-8"))["stages"] == ["database"]
    assert "database took" in outcome.text


def test_a_dry_sweep_is_not_taken_for_a_finished_one(evopress: Callable[..., Any], tmp_path: Path) -> None:
    sweep = (
        "-m",
        *METHODS["quant"],
        "+debug=tiny",
        "search/strategy=evolution",
        "seed=0,1",
        "stages=[database]",
        "hydra.sweep.dir=sweep",
    )
    outcome = evopress(*sweep, DRY)
    assert outcome.code == 0, outcome.text
    assert outcome.text.count("what this run will take") == 2
    assert not list((tmp_path / "sweep").rglob(FINISHED))
    outcome = evopress(*sweep)
    assert outcome.code == 0 and "not run again" not in outcome.text
    assert len(list((tmp_path / "sweep").rglob(FINISHED))) == 2
    assert evopress(*sweep).text.count("not run again") == 2  # dry_run is no setting that makes it another run


def test_every_stage_says_how_long_it_took(finished: Any) -> None:
    for stage in ("database", "baselines", "search", "evaluate", "export", "report"):
        assert re.search(rf"{stage} took \d+ s$", finished.outcome.text, re.MULTILINE), stage


@pytest.mark.parametrize("method", METHODS)
def test_times_are_estimated_from_a_probe(
    method: str, evopress: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "LEAST_PARAMETERS", 0)
    speeds = []
    measure = preflight.measure_speed
    monkeypatch.setattr(preflight, "measure_speed", lambda *args, **options: speeds.append(measure(*args, **options)) or speeds[-1])
    stages = "stages=[search,evaluate]"
    outcome = evopress(
        *METHODS[method],
        "+debug=tiny",
        "search/strategy=evolution",
        stages,
        "hydra.run.dir=run",
        f"level_db.root={tmp_path / 'levels'}",
    )
    assert outcome.code == 0, outcome.text
    (speed,) = speeds
    assert min(speed.block, speed.head, speed.reference) > 0
    assert (speed.compress > 0) == (method != "drop")
    table = rows(outcome.text)
    assert all(re.fullmatch(r"\d+ s", cells[-1]) for cells in table.values())
    assert "estimates from a probe of" in outcome.text
    assert re.search(r"search took \d+ s, \d+ s had been expected", outcome.text)


def test_a_probe_leaves_the_search_as_it_is(finished: Any, tiny: Callable[..., Any], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(probe, "LEAST_PARAMETERS", 0)
    assert tiny("stages=[database,search]").code == 0
    assert (tmp_path / "run" / "genome.json").read_bytes() == (finished.folder / "genome.json").read_bytes()


def refused(outcome: Any, *parts: str) -> None:
    """Check that the program ended with one sentence that has these parts."""
    assert outcome.code == 1, outcome.text
    (sentence,) = outcome.errors
    assert all(part in sentence for part in parts), sentence


def test_what_is_there_may_be_shared_to_be_read_alone(
    finished: Any, cache: Path, evopress: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group's levels and tokens, in folders that another user owns; what has yet to be built there is refused before it is."""
    shared, made = shutil.copytree(cache, tmp_path / "shared"), tempfile.TemporaryFile

    def probe(dir: Path, **options: Any) -> Any:
        if Path(dir).is_relative_to(shared):
            raise OSError(errno.EROFS, "Read-only file system")
        return made(dir=dir, **options)

    monkeypatch.setattr("evopress.files.tempfile.TemporaryFile", probe)
    monkeypatch.setattr("evopress.levels.build._build", lambda *_: pytest.fail("built"))
    asked = (*TINY, f"paths.cache={shared}", "stages=[database,search,evaluate]", "bits=3.25")
    outcome = evopress(*asked, f"hydra.run.dir={tmp_path / 'run'}")
    assert outcome.code == 0, outcome.text
    again = evopress(*asked, f"hydra.run.dir={tmp_path / 'other'}", "method.levels=[6,4,3]")
    refused(again, "cannot be written (Read-only file system)", "choose a folder")
    assert "damaged" not in again.text
    for manifest in shared.glob("levels/tiny/quant-*/manifest.json"):  # of other tests' levels, too
        manifest.write_text(manifest.read_text(encoding="utf-8").replace("quant", "quart", 1), encoding="utf-8")
    damaged = evopress(*asked, f"hydra.run.dir={tmp_path / 'other'}")
    refused(damaged, "manifest.json is damaged", "and it cannot be built again", "cannot be written (Read-only file system)")
    assert not (tmp_path / "other").exists()


def test_too_little_disk_is_refused_before_anything_is_touched(
    finished: Any, evopress: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(finished.folder, tmp_path / "earlier")
    before = contents(folder)
    monkeypatch.setattr("shutil.disk_usage", lambda path: DiskUsage(10**9, 10**9, 100_000))
    refused(evopress("resume=earlier", "seed=0"), "needs 4.33 MB of disk (export 140 kB, report 4.19 MB)", "100 kB free", "earlier")
    assert contents(folder) == before
    refused(evopress("resume=earlier", "stages=[export]"), "the stage export needs 140 kB of disk but")
    assert evopress("resume=earlier", "stages=[evaluate]", DRY).code == 0


def test_too_little_memory_is_refused_before_anything_is_touched(
    finished: Any, tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: Memory(1_000_000))
    refused(
        tiny("stages=[search]"), "the stage search needs about 1.", "of memory but 1 MB are free", "fitness.max_tokens_in_flight"
    )
    assert set(contents(tmp_path / "run")) <= {
        "environment.json",
        *(f".hydra/{n}" for n in ("config.yaml", "hydra.yaml", "overrides.yaml", "overrides.json")),
    }
    refused(
        tiny(f"level_db.root={tmp_path / 'levels'}"),
        "building the level database needs about",
        "of memory but 1 MB are free: use fewer",
    )
    assert not list((tmp_path / "levels").rglob("*.safetensors"))


def test_a_model_that_memory_cannot_hold_is_not_loaded(tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: Memory(1000))
    monkeypatch.setattr("evopress.models.opening.load_pretrained", None)
    refused(tiny(), "the model takes ", " of the host's memory, of which 1 kB are free")


@pytest.mark.parametrize("offload", [False, True])
def test_a_model_that_a_gpu_cannot_hold_is_not_loaded(offload: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "free_now", lambda device: 24 * GB)
    monkeypatch.setattr("psutil.virtual_memory", lambda: Memory(200 * GB))
    with nullcontext() if offload else pytest.raises(EvoPressError, match=r"^the model takes 141 GB on cuda:0, .* 24 GB are free"):
        resources.check_model(141 * GB, torch.device("cuda:0"), offload=offload)


def test_what_a_model_will_take_of_a_gpu_is_not_free_for_what_is_planned_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    there = torch.device("cuda:0")
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (20 * GB, 24 * GB))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 0)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 0)
    with to_come(there, 16 * GB):
        assert (free_bytes(there), free_now(there), sweep_bytes(there), resources.room_on(there).device) == (
            4 * GB,
            20 * GB,
            GB,
            20 * GB,
        )
    assert free_bytes(there) == 20 * GB


def test_what_would_take_less_of_a_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: DiskUsage(10**12, 10**12, 10**9))
    levels = tuple(Level(label, kept, label, 16 * kept, "sparsity") for label, kept in (("0%", 10**9), ("50%", 5 * 10**8)))
    build = BuildNeeds((Unit("a", 0, "q_proj", 10**9, levels),), 1, disk_bytes=5 * 10**9, hessian_bytes=3 * 10**9)
    database, export_ = build.in_folder(tmp_path), resources.Needs("export", "", disk={tmp_path: 10**8})
    less = r"fewer levels \(method\.num_levels\), keep no Hessians \(3 GB; level_db\.keep_hessians=false\) or use another .*root"
    with pytest.raises(EvoPressError, match=rf"^this run needs 5\.1 GB .*: free some space, store {less}, or leave stages out"):
        resources.check_room([export_, database], [resources.Room("here", 10**12)])
    with pytest.raises(EvoPressError, match=rf"^building the level database needs 5 GB .*: free some space, store {less}$"):
        resources.check_room([database], [resources.Room("here", 10**12)])


def test_what_a_device_lacks_is_refused(tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for a GPU: the stage's needs are put on a device, whose free memory is made up."""
    put = Planner.put
    device = namedtuple("device", "type")("cuda")

    def on_device(self: Any, needs: Any, size: int, *, host: int = 0) -> None:
        self.workspace.device = device
        put(self, needs, size, host=host)

    monkeypatch.setattr(Planner, "put", on_device)
    monkeypatch.setattr(resources, "free_now", lambda device: 1000)
    refused(tiny("stages=[evaluate]"), "the stage evaluate needs about", "but 1 kB are free", "model.offload=true")


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the run's device be one that torch always has, as a GPU stands beside the host: nothing is computed on it."""
    monkeypatch.setattr("evopress.workspace.pick_device", lambda name: torch.device("meta"))


@pytest.mark.usefixtures("elsewhere")
def test_the_plain_evaluator_does_not_go_with_offload(tiny: Callable[..., Any]) -> None:
    arguments = ("fitness.evaluator=plain", "model.offload=true")
    refused(tiny(*arguments, DRY), "fitness.evaluator=plain needs the whole model", "model.offload=true", "leave one of them out")


def test_on_a_host_the_plain_evaluator_goes_with_offload(tiny: Callable[..., Any]) -> None:
    assert tiny("fitness.evaluator=plain", "model.offload=true", DRY).code == 0  # there is nowhere to move the blocks from


GB = 10**9
SIZE = 50_000_000
DECODING = decoding_bytes(SIZE, torch.bfloat16)
WHOLE = 7 * GB + DECODING
"""Of a model's decoded units, and one that is being decoded."""
FILE = 7 * GB // 2 + DECODING
"""Of one of its two blocks, which are larger together than a file."""


def planner(
    device: str,
    *,
    offload: bool = False,
    evaluator: str = "population",
    tasks: tuple[str, ...] = (),
    export: tuple[str, ...] = ("dequantized",),
    budget: Budget | None = None,
) -> Any:
    """Return a planner for a run of a model of 7 GB of units, on a device that is made up."""
    space = Space("quant", tuple(Unit(f"u{i}", i % 2, "u", SIZE, (Level("4", 4 * SIZE, "4", 4 * SIZE),)) for i in range(70)))
    layers = [nn.Linear(35_000, SIZE // 1000, bias=False, device="meta", dtype=torch.bfloat16) for _ in range(2)]
    model = nn.Sequential(*layers, nn.Linear(1000, 1, bias=False, dtype=torch.bfloat16))
    model.config = SimpleNamespace(intermediate_size=4096)
    blocks = SimpleNamespace(
        blocks=layers,
        parts=range(2),
        dtype=torch.bfloat16,
        offload=offload,
        hidden_size=1024,
        head_part=None,
        model=model,
        head=lambda: SimpleNamespace(weight=torch.empty(32_000, 0)),
        device=torch.device("cpu"),
        forward_bytes=lambda tokens, length: 0,
        carried_bytes=lambda index: 0,
        slots=lambda part: {f"u{i}": SimpleNamespace(weight=torch.empty(50, 10**6, device="meta")) for i in range(part, 70, 2)},
    )
    tokens = torch.empty(0, 1024, dtype=torch.int64)
    workspace = SimpleNamespace(
        blocks=blocks,
        device=SimpleNamespace(type=device),
        run_dir=Path("run"),
        search_tokens=tokens,
        evaluation_data={"text": torch.empty(4, 1024)},
        pretrained=SimpleNamespace(model=model),
        settings=SimpleNamespace(
            stages=["evaluate", "export"],
            fitness=SimpleNamespace(evaluator=evaluator, max_tokens_in_flight=4096, chunk_tokens=256),
            level_db=SimpleNamespace(cache_bytes=0),
            evaluation=SimpleNamespace(tasks=list(tasks)),
            baselines=SimpleNamespace(names=[]),
            sparsity=None,
            genome=None,
            export=list(export),
            export_options={},
        ),
        method=SimpleNamespace(weights=object()),
        databases=SimpleNamespace(compressor=SimpleNamespace(settings=dict)),
        model_source=SimpleNamespace(is_outline=True),
        refines=True,
        rest_of=lambda space: Rest(bits=8000),
    )
    return Planner(workspace, space, budget, None, None, None, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("device", "offload", "memory", "on_device"),
    [("cpu", False, FILE, 0), ("cuda", False, 7 * GB // 2, 7 * GB // 2 + DECODING), ("cuda", True, FILE, 0)],
)
def test_the_export_decodes_the_blocks_of_one_file_on_the_host(device: str, offload: bool, memory: int, on_device: int) -> None:
    needs = export_needs(planner(device, offload=offload))
    assert (needs.memory, needs.device) == (memory, on_device)  # on a GPU beside the decoded levels of a block, which stay


def test_packed_formats_decode_nothing() -> None:
    least = Budget(70 * 4 * SIZE, 4.0, "bits per weight")
    assert export_needs(planner("cpu", export=("mlx", "gguf"), budget=least)).memory == DECODING


def test_an_export_takes_what_its_formats_do() -> None:
    least = Budget(70 * 4 * SIZE, 4.0, "bits per weight")
    of_format = [
        export_needs(planner("cpu", export=export, budget=least)).disk[Path("run")]
        for export in (("dequantized",), ("mlx",), ("dequantized", "mlx", "gguf"))
    ]
    assert of_format == [7 * GB + 2000, 1000 + 35 * SIZE, 7 * GB + 2000 + 2 * (1000 + 35 * SIZE)]


def test_zero_shot_tasks_and_the_plain_evaluator_decode_the_whole_model() -> None:
    less = evaluate_needs(planner("cuda"))
    assert 3.5 * GB < less.device < 4 * GB and less.memory == 0  # a block's
    assert evaluate_needs(planner("cuda", tasks=("piqa",))).device == WHOLE
    offloaded = evaluate_needs(planner("cuda", offload=True, tasks=("piqa",)))
    assert (offloaded.memory, offloaded.device) == (0, less.device)  # a block's, one after the other
    assert evaluate_needs(planner("cuda", evaluator="plain")).device > 7 * GB


def test_an_attribution_has_the_block_that_is_carried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs_of_stages, "backward_bytes", lambda *args, **settings: 1000)

    def on_device(offload: bool) -> int:
        asking = planner("cuda", offload=offload)
        asking.workspace.search_tokens = torch.empty(8, 1024, dtype=torch.int64)
        asking.workspace.method.modules = None
        asking.workspace.blocks.carried_bytes = lambda index: (500, 700)[index] * offload
        found = asking.needs("search", "")
        asking.attribute(found, Asks("", 4096))
        return found.device

    assert on_device(True) == on_device(False) + 700


def test_what_a_pass_back_takes_goes_by_who_shares_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs_of_stages, "backward_bytes", lambda *args, **settings: 1000)
    monkeypatch.setattr(ranks, "_world", ranks._World(rank=0, size=2))
    asking = planner("cpu")
    asking.workspace.search_tokens = torch.empty(16, 1024, dtype=torch.int64)

    def of(shared_by: Callable[[int], int], **beside: int) -> Any:
        found = asking.needs("refine", "")
        asking.attribute(found, Asks("", 8192), shared_by=shared_by, **beside)
        return found

    shared = of(ranks.largest_shard)
    assert of(lambda rows: rows).tokens == 2 * shared.tokens
    assert of(ranks.largest_shard, beside=123).memory == shared.memory + 123


@pytest.mark.parametrize("offload", [False, True])
def test_zero_shot_questions_are_counted_and_have_all_logits_of_a_batch(offload: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asking = planner("cuda", offload=offload, tasks=("piqa",))
    asking.workspace.model_source.is_outline = False
    asking.workspace.tokenizer = None
    for key, value in (("task_limit", None), ("task_batch_size", 8)):
        setattr(asking.settings.evaluation, key, value)
    asking.settings.model = SimpleNamespace(bos="auto")
    monkeypatch.setattr(evaluate, "_tasks", lambda workspace: {})
    monkeypatch.setattr(evaluate, "count_asked", lambda tasks, tokenizer, **settings: Asked(10_000, 1_000_000))
    needs, without = evaluate_needs(asking), evaluate_needs(planner("cuda", offload=offload))
    models = 1 + evaluate._num_genomes(asking)
    assert needs.tokens == without.tokens + models * 10_000
    blocks = asking.workspace.blocks
    logits = 2 * 8 * 1_000_000 * blocks.head().weight.shape[0] * blocks.dtype.itemsize
    assert needs.device - logits == 7 * GB // 2 if offload else 0.9 * WHOLE < needs.device - logits <= WHOLE


@pytest.mark.parametrize("evaluator", ["population", "plain"])
@pytest.mark.parametrize("candidates", [1, 4])
def test_the_states_that_are_counted_are_those_that_are_held(
    candidates: int, evaluator: str, live_model: Callable[..., Any], tokens: Callable[..., Any]
) -> None:
    """Counts every tensor that is alive, at each operation."""
    live, ids = live_model(num_blocks=1), tokens(24, 64)
    made = {"population": PopulationEvaluator, "plain": PlainEvaluator}[evaluator](live, max_tokens_in_flight=64)
    live.blocks.prepare(64)
    genomes = [(i % 3, i // 3, *[0] * (len(live.space) - 2)) for i in range(candidates)]  # they part in the first block
    base = torch.zeros(*ids.shape, live.blocks.hidden_size)
    made.final_states(genomes, ids[:1])  # levels that are decoded are kept, and counted apart
    with Alive() as alive:
        measure_sums(made, genomes, ids, base, KLDivergence(), chunk_tokens=64)
    said = evaluation_bytes(
        live.blocks, candidates, ids.numel(), 64, max_tokens_in_flight=64, chunk_tokens=64, plain=evaluator == "plain"
    )
    assert 0.8 < said / alive.peak[BOTH] < 1.2


BROKEN = {
    "a block that is called by keyword": TypeError("stop() missing 1 required positional argument: 'hidden'"),
    "a part that is not there": AttributeError("'NoneType' object has no attribute 'weight'"),
    "shapes that do not fit": RuntimeError("The size of tensor a (24) must match\nthe size of tensor b (12)"),
    "an error without words": AssertionError(),
}


@pytest.mark.parametrize(("case", "where"), [*zip(BROKEN, ("embed", "head", "run", "finish"), strict=True)])
def test_whatever_the_self_check_meets_is_one_sentence(
    case: str, where: str, tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise BROKEN[case]

    monkeypatch.setattr(f"evopress.models.blocks.BlockModel.{where}", broken)
    words = ": " if str(BROKEN[case]) else "): "
    refused(tiny(DRY), f"block by block failed ({type(BROKEN[case]).__name__}{words}", "use fitness.evaluator=plain")


def test_too_little_memory_for_the_self_check_is_told_as_that(tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("evopress.models.blocks.BlockModel.embed", broken)
    refused(tiny(DRY), "out of memory (CUDA out of memory")


def test_a_budget_that_leaves_no_switch_is_refused_before_the_database(evopress: Callable[..., Any], tmp_path: Path) -> None:
    arguments = (
        "+method=drop",
        "sparsity=0.5",
        "+debug=tiny",
        "search/strategy=evolution",
        "method.exclude=[0]",
        f"level_db.root={tmp_path / 'levels'}",
    )
    refused(evopress(*arguments), "method.exclude leaves 1 attention units and 1 mlp units", "no other genome: exclude fewer")
    assert not list((tmp_path / "levels").rglob("manifest.json"))
    outcome = evopress(*arguments, "stages=[database]")
    assert outcome.code == 0, outcome.text  # nothing is to be searched


@pytest.mark.parametrize("limit", [[], ["max_kl=0.1"]])
def test_one_of_several_budgets_that_leaves_no_switch_is_named_as_it_was_typed(
    limit: list[str], evopress: Callable[..., Any], tmp_path: Path
) -> None:
    """A bisection may search any that are given."""
    own = ("+method=quant", "+debug=tiny", "search/strategy=evolution", f"level_db.root={tmp_path / 'levels'}")
    stuck = "budgets=[5.9,5.5,5,2.002,4.5,4,3.5,3,2.001]"
    refused(evopress(*own, stuck, *limit), "error: budget 2.002: exchange", "found no other genome", "choose a target")
    assert not list(tmp_path.rglob("manifest.json"))


@pytest.fixture
def wide(tiny_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint whose activations are more than float16 holds, and less than bfloat16 does."""
    folder = tmp_path / "wide"
    shutil.copytree(tiny_folder(), folder)
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if "layers.1.mlp.gate" in name or "layers.1.mlp.up" in name:
            weights[name] *= 2000.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("evaluator", ["population", "plain"])
def test_float16_that_overflows_is_refused_with_the_advice_to_use_bfloat16(
    evaluator: str, wide: Path, tiny: Callable[..., Any], tmp_path: Path
) -> None:
    arguments = (
        f"model.path={wide}",
        f"fitness.evaluator={evaluator}",
        f"level_db.root={tmp_path / 'levels'}",
        "stages=[database]",
    )
    where = "first the output of model.layers.1" if evaluator == "population" else "logits are not finite"
    refused(tiny(*arguments, "model.dtype=float16"), where, "use model.dtype=bfloat16")
    assert not list((tmp_path / "levels").rglob("*"))
    outcome = tiny(*arguments, "model.dtype=bfloat16")
    assert outcome.code == 0, outcome.text


def test_a_model_without_a_yaml_says_what_was_taken_from_it(
    evopress: Callable[..., Any], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    amounts = [f"data.{split}_tokens=2048" for split in ("calibration", "search", "evaluation")]
    model = ("model=local", f"model.path={tiny_folder()}", "model.dtype=float32", "model.device=cpu", *amounts)
    outcome = evopress("+method=quant", "bits=3.5", "+debug=tiny", "search/strategy=evolution", *model, DRY, "hydra.run.dir=run")
    assert outcome.code == 0, outcome.text
    assert "derived from the model: model.sequence_length=512, model.group_size=32, method.group_size=32" in outcome.text


@pytest.mark.parametrize(
    ("limit", "sentence"),
    [
        ("{currency: bytes, total: 70kB}", r"limits has \d+ bytes, but at their most compressed levels the units take \d+ "),
        ("{currency: bits, total: 2.5}", "limits has 2.5 bits, expected a whole number: limits are totals"),
        ("{currency: bits, total: 3}", "limits has 3 bits, but at their most compressed levels the units take 36864 in"),
        ("{currency: modules, total: 3}", "limits has 3 modules, which no level of this run counts towards: leave it out"),
    ],
)
def test_limits_that_nothing_keeps_are_refused_before_any_work(limit: str, sentence: str, tiny: Callable[..., Any]) -> None:
    outcome = tiny("search.exchange=fit", f"limits=[{limit}]", "dry_run=true")
    assert outcome.code == 1 and re.search(sentence, outcome.errors[0]), outcome.text


def test_evolution_after_the_rounds_must_keep_the_limits_too(evopress: Callable[..., Any]) -> None:
    limit = "limits=[{currency: bytes, total: 84kB}]"
    given = ("+method=quant", "bits=3.5", "+debug=tiny", limit, "dry_run=true")
    assert evopress(*given).code == 0
    outcome = evopress(*given, "search.strategy.generations_after=2")
    assert outcome.code == 1 and "search.exchange=size keeps one total" in outcome.errors[0]
