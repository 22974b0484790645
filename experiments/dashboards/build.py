"""Turn the sections into a W&B report and a W&B workspace, without a network; needs the extra `dashboards`."""

from __future__ import annotations

import json
from importlib import import_module
from types import ModuleType
from typing import Any

from evopress.errors import EvoPressError
from experiments.dashboards.panels import SECTIONS, Bars, Images, Lines, Panel, Section

TITLE = "EvoPress"
_HALF, _THIRD, _HEIGHT = 12, 8, 8
"""Widths and height of a panel in a report, whose width is 24."""


def build_report(entity: str, project: str) -> Any:
    """Return the report: every section, those of a table with the runs of that table alone."""
    wr = _reports()
    blocks: list[Any] = [wr.TableOfContents()]
    for section in SECTIONS:
        blocks += [wr.H2(text=section.title), wr.P(text=section.text), _grid(wr, section)]
    description = "Searches of a project: convergence, results, levels, lineage, cost, and the paper's Tables 4 to 6."
    return wr.Report(entity=entity, project=project, title=TITLE, description=description, blocks=blocks, width="fluid")


def build_workspace(entity: str, project: str) -> Any:
    """Return the workspace: the sections about all runs, grouped by sweep."""
    wr, ws = _reports(), _module("wandb_workspaces.workspaces")
    sections = [
        ws.Section(name=section.title, panels=[_panel(wr, panel) for panel in section.panels], is_open=index < 2)
        for index, section in enumerate(section for section in SECTIONS if section.tag is None)
    ]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=TITLE,
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis="generation"),
        runset_settings=ws.RunsetSettings(groupby=[ws.Metric("Group")]),
    )


def specification(dashboard: Any) -> dict[str, Any]:
    """Return what would be sent of a report or a workspace, as JSON reads it, after seeing that it reads back the same.

    Raises: EvoPressError if it does not.
    """
    model = dashboard._to_model()  # what its save() sends; there is no public name for it
    text = model.model_dump_json(by_alias=True, exclude_none=True)
    again = type(model).model_validate_json(text).model_dump_json(by_alias=True, exclude_none=True)
    if _filled(json.loads(again)) != _filled(json.loads(text)):
        raise EvoPressError(f"the {type(dashboard).__name__.lower()} does not read back as it was written: update wandb-workspaces")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def _filled(value: Any) -> Any:
    """Return JSON without its empty lists and objects: reading adds some."""
    if isinstance(value, dict):
        return {key: kept for key, item in value.items() if (kept := _filled(item)) not in ({}, [])}
    return [_filled(item) for item in value] if isinstance(value, list) else value


def _grid(wr: ModuleType, section: Section) -> Any:
    """Return a section's panels over its runs."""
    expr = _module("wandb_workspaces.expr")
    filters = "" if section.tag is None else expr.And(expr.Tags().isin([section.tag]))
    groupby = [f"config.{key}" for key in section.by] or ["group"]  # of the runs, and so of the panels
    runset = wr.Runset(name=section.tag or "all runs", filters=filters, groupby=groupby)
    columns = 3 if len(section.panels) % 3 == 0 else 2
    width = _THIRD if columns == 3 else _HALF
    panels = []
    for index, panel in enumerate(section.panels):
        place = wr.Layout(x=index % columns * width, y=index // columns * _HEIGHT, w=width, h=_HEIGHT)
        panels.append(_panel(wr, panel, layout=place))
    return wr.PanelGrid(runsets=[runset], panels=panels)


def _panel(wr: ModuleType, panel: Panel, **place: Any) -> Any:
    """Return one panel as wandb-workspaces has it."""
    if isinstance(panel, Lines):
        return wr.LinePlot(
            title=panel.title,
            x=panel.x,
            y=list(panel.y),
            metric_regex=panel.pattern,
            log_y=panel.log_y or None,
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
            **place,
        )
    if isinstance(panel, Bars):
        metrics = list(panel.metrics)
        return wr.BarPlot(title=panel.title, metrics=metrics, groupby_aggfunc="mean", groupby_rangefunc="stderr", **place)
    if isinstance(panel, Images):
        return wr.MediaBrowser(title=panel.title, media_keys=list(panel.keys), num_columns=1, **place)
    return wr.WeavePanelSummaryTable(table_name=panel.table, **place)


def _reports() -> ModuleType:
    return _module("wandb_workspaces.reports.v2")


def _module(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise EvoPressError("dashboards need wandb-workspaces: install it with pip install -e '.[dashboards]'") from error
