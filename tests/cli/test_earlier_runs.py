"""A run folder of an earlier version goes on with the defaults that it began with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from evopress.reporting.records import write_json

DEFAULTS = ("method.recipe=paper", "data.calibration_tokens=512")
"""Of earlier versions, but for the amount of text."""


def test_an_earlier_run_keeps_its_recipe(tiny: Callable[..., Any], evopress: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert tiny(*DEFAULTS).code == 0
    database = json.loads((folder / "genome.json").read_text())["database"]
    config = OmegaConf.load(folder / ".hydra" / "config.yaml")
    del config.model["bos"], config.method["recipe"]  # which no setting said
    OmegaConf.save(config, folder / ".hydra" / "config.yaml")
    kept = json.loads((folder / ".hydra" / "overrides.json").read_text())
    kept["overrides"] = [override for override in kept["overrides"] if override not in DEFAULTS]
    write_json(folder / ".hydra" / "overrides.json", kept)
    again = evopress(f"resume={folder}", "stages=[database,search,report]")
    assert again.code == 0, again.text
    assert "reused" in again.text
    assert json.loads((folder / "genome.json").read_text())["database"] == database
    refused = evopress(f"resume={folder}", "stages=[search,report]", "method.recipe=best")
    assert refused.code == 1 and "level database" in refused.errors[0]


def test_an_earlier_run_may_name_points_of_a_sweep_as_options(
    tiny: Callable[..., Any], evopress: Callable[..., Any], tmp_path: Path
) -> None:
    """`search/mutation=constant_7` in its overrides, where a version of today has two values."""
    folder, point = tmp_path / "run", ("search.distribution=constant", "search.max_switches=7")
    stages = "stages=[database,search]"
    assert tiny(*point, stages).code == 0
    kept = json.loads((folder / ".hydra" / "overrides.json").read_text())
    kept["overrides"] = ["search/mutation=constant_7", *(override for override in kept["overrides"] if override not in point)]
    write_json(folder / ".hydra" / "overrides.json", kept)
    again = evopress(f"resume={folder}", stages)
    assert again.code == 0, again.text
    config = OmegaConf.load(folder / ".hydra" / "config.yaml")
    assert (config.search.distribution, config.search.max_switches) == ("constant", 7)
    refused = evopress(f"resume={folder}", stages, "search.max_switches=3")
    assert refused.code == 1 and "max_switches" in refused.errors[0]


def test_an_earlier_run_keeps_its_exchange(tiny: Callable[..., Any], evopress: Callable[..., Any], tmp_path: Path) -> None:
    """Of search=super_fast, which trades between sizes now; who types another is told what to type."""
    folder, exchange, stages = tmp_path / "run", "search.exchange=size", "stages=[database,search]"
    assert tiny("search=super_fast", "search/strategy=evolution", exchange, stages).code == 0
    kept = json.loads((folder / ".hydra" / "overrides.json").read_text())
    kept["overrides"].remove(exchange)
    write_json(folder / ".hydra" / "overrides.json", kept)
    again = evopress(f"resume={folder}", stages)
    assert again.code == 0, again.text
    refused = evopress(f"resume={folder}", stages, "search.exchange=any")
    assert refused.code == 1 and "resume it with its own (search.exchange=size), or" in refused.errors[0]
