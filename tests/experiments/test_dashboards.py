"""Dashboards: built and validated offline, and every panel shows something that a run really logs."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from in_process import run_script, sketch
from omegaconf import OmegaConf

from evopress import config as configuration
from evopress import pipeline
from evopress.errors import EvoPressError
from evopress.reporting import drawing
from evopress.reporting.metrics import AXES
from experiments.dashboards import build
from experiments.dashboards.__main__ import create, main
from experiments.dashboards.panels import SECTIONS, Lines, names

pytestmark = pytest.mark.filterwarnings("ignore:Pydantic V1 style:DeprecationWarning")  # inside wandb-workspaces
needs_workspaces = pytest.mark.skipif(find_spec("wandb_workspaces") is None, reason="wandb-workspaces is not installed")


class Recorder:
    """A tracker that keeps the names of what it is told."""

    def __init__(self) -> None:
        self.metrics: set[str] = set()
        self.tables: set[str] = set()
        self.figures: set[str] = set()

    def start(self, **options: Any) -> None:
        pass

    def log(self, metrics: Mapping[str, float], *, generation: int) -> None:
        self.metrics |= {"generation", *metrics}

    def lines(self, values: Mapping[str, float], *, axes: Sequence[Mapping[str, float]]) -> None:
        assert all(set(place) == set(AXES) for place in axes)
        self.metrics |= set(values)

    def summarize(self, values: Mapping[str, float]) -> None:
        self.metrics |= set(values)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        assert all(len(row) == len(columns) for row in rows)
        self.tables.add(name)

    def figure(self, name: str, path: Path) -> None:
        assert path.is_file()
        self.figures.add(name)

    def artifact(self, name: str, type: str, paths: Sequence[Path]) -> None:
        pass

    def finish(self) -> None:
        pass


def tracked(folder: Path, *overrides: str) -> Recorder:
    """Run the program on the tiny model and return what its tracker was told."""
    configuration.register()
    with initialize_config_dir(version_base="1.3", config_dir=str(configuration.config_folder())):
        config = compose(
            "config", overrides=[*overrides, "+debug=tiny", "search/strategy=evolution", f"paths.cache={folder / 'cache'}"]
        )
    recorder = Recorder()
    (folder / "run").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "make_tracker", lambda settings: recorder)
        patch.setattr(drawing, "_render", sketch)
        plain = configuration.plain_dict(config)
        pipeline.run(configuration.to_settings(config), folder / "run", config=plain, command="", environment={})
    return recorder


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Recorder:
    """What a quantization and a depth-pruning run log together."""
    runs = [("+method=quant", "bits=3.5"), ("+method=drop", "sparsity=0.5")]
    first, second = (tracked(tmp_path_factory.mktemp("run"), *run) for run in runs)
    for kind in ("metrics", "tables", "figures"):
        getattr(first, kind).update(getattr(second, kind))
    return first


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.title)
def test_every_panel_shows_what_runs_log(section: Any, logged: Recorder) -> None:
    for kind, name in names(section):
        if kind == "pattern":
            assert any(re.fullmatch(name, metric) for metric in logged.metrics), name
        else:
            assert name in {"metric": logged.metrics, "figure": logged.figures, "table": logged.tables}[kind], name


def test_axes_are_axes() -> None:
    panels = [panel for section in SECTIONS for panel in section.panels if isinstance(panel, Lines)]
    assert {panel.x for panel in panels} == set(AXES)
    assert all(panel.y or panel.pattern for panel in panels)
    held_out = {panel.x for panel in panels if panel.pattern == "(held_out|baseline/[^/]+)/kl"}
    perplexity = {panel.x for panel in panels if panel.pattern == "(held_out|baseline/[^/]+)/ppl_.*"}
    assert held_out == perplexity == set(AXES)


def test_tables_are_experiments_and_compare_their_settings() -> None:
    configuration.register()
    tagged = [section for section in SECTIONS if section.tag]
    assert [section.tag for section in tagged] == ["table4", "table5", "table6"]
    with initialize_config_dir(version_base="1.3", config_dir=str(configuration.config_folder())):
        for section in tagged:
            config = compose("config", overrides=[f"+experiment={section.tag}"])
            for key in section.by:
                assert OmegaConf.select(config, key) is not None, key


@needs_workspaces
def test_the_report_is_valid_and_complete() -> None:
    found = build.specification(build.build_report("entity", "project"))
    grids = [block for block in found["spec"]["blocks"] if block["type"] == "panel-grid"]
    assert len(grids) == len(SECTIONS)
    for grid, section in zip(grids, SECTIONS, strict=True):
        (runset,) = grid["metadata"]["runSets"]
        keys = [key["name"].replace(".value", "", 1) for key in runset["grouping"]]
        assert keys == (list(section.by) or ["group"])
        assert json.dumps(section.tag) in json.dumps(runset["filters"]) if section.tag else runset["name"] == "all runs"
        panels = grid["metadata"]["panelBankSectionConfig"]["panels"]
        text = json.dumps(panels)
        assert len(panels) == len(section.panels)
        for kind, name in names(section):
            assert json.dumps(name) in text, (kind, name)
        places = [panel["layout"] for panel in panels]
        assert all(place["x"] + place["w"] <= 24 for place in places)
        assert len({(place["x"], place["y"]) for place in places}) == len(places)


@needs_workspaces
def test_the_workspace_is_valid_and_grouped_by_sweep() -> None:
    found = build.specification(build.build_workspace("entity", "project"))
    assert (found["entity"], found["project"]) == ("entity", "project")
    section = found["spec"]["section"]
    assert [each["name"] for each in section["panelBankConfig"]["sections"]] == [s.title for s in SECTIONS if s.tag is None]
    (runset,) = section["runSets"]
    assert runset["grouping"] == [{"section": "run", "name": "group"}]
    assert section["settings"]["xAxis"] == "generation"


@needs_workspaces
def test_a_specification_that_does_not_read_back_is_refused() -> None:
    class Broken:
        def _to_model(self) -> Any:
            model = build.build_workspace("entity", "project")._to_model()
            model.spec.section.panel_bank_config.sections[0].panels[0].config.chart_title = 3  # not validated on assignment
            return model

    with pytest.raises((EvoPressError, ValueError)):
        build.specification(Broken())


@needs_workspaces
def test_a_dry_run_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    create("entity", "project", dry_run=True)
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"report", "workspace"}
    create("entity", "project", only="workspace", dry_run=True)
    assert list(json.loads(capsys.readouterr().out)) == ["workspace"]


@needs_workspaces
def test_without_a_key_nothing_is_created(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    create("entity", "project")
    assert capsys.readouterr().out.startswith("valid: report and workspace; nothing was created")


@needs_workspaces
def test_with_a_key_both_are_saved_and_a_refusal_is_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    saved: list[Any] = []
    monkeypatch.setenv("WANDB_API_KEY", "k")
    for kind in (wr.Report, ws.Workspace):
        monkeypatch.setattr(kind, "save", lambda self: saved.append(self))
        monkeypatch.setattr(kind, "url", property(lambda self: "https://example.org/it"))
    create("entity", "project")
    assert [type(each).__name__ for each in saved] == ["Report", "Workspace"]
    assert capsys.readouterr().out.splitlines() == ["report: https://example.org/it", "workspace: https://example.org/it"]

    def refuse(self: Any) -> None:
        raise RuntimeError("permission denied\nwith details")

    monkeypatch.setattr(wr.Report, "save", refuse)
    with pytest.raises(EvoPressError, match=r"the report could not be saved to entity/project \(permission denied\)"):
        create("entity", "project")


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    with pytest.raises(EvoPressError, match=r"pip install -e '\.\[dashboards\]'"):
        build.build_report("entity", "project")


def test_the_command_line_asks_for_an_entity() -> None:
    done = run_script("experiments.dashboards.__main__")
    assert done.code == 2
    assert "--entity" in done.text


@needs_workspaces
@pytest.mark.parametrize(("given", "project"), [([], "mine"), (["--project", "other"], "other")])
def test_the_project_is_the_one_that_wandb_is_set_to(
    given: list[str], project: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SimpleNamespace(settings=SimpleNamespace(project="mine"))
    monkeypatch.setattr("wandb.setup", lambda: settings)
    monkeypatch.setattr(sys, "argv", ["dashboards", "--entity", "me", "--dry-run", "--only", "workspace", *given])
    main()
    assert f'"project": "{project}"' in capsys.readouterr().out
