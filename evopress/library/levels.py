"""Build a model's levels, or find them again, with the target that a search of them has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from evopress.data.opening import GivenText
from evopress.errors import EvoPressError
from evopress.library.given import check_is, checked, folder_of, make_settings
from evopress.library.models import Model, Text, alone
from evopress.settings import (
    AUTO,
    METHODS,
    DataSettings,
    EvaluationSettings,
    LevelDatabaseSettings,
    PathsSettings,
    QuantSettings,
    RunSettings,
)
from evopress.stages.exports import refuse_unfit_formats
from evopress.units import Space
from evopress.workspace import Workspace


@dataclass(frozen=True)
class Levels:
    """A model's level database, with the target that a search of it has."""

    model: Model
    settings: RunSettings
    workspace: Workspace
    folder: Path
    """Where the levels lie."""
    kept: Any = None
    """What removes a temporary folder when nothing needs it any more."""

    @property
    def space(self) -> Space:
        """Units and levels: what a genome is a point of."""
        return self.workspace.database.space


@alone
def build_levels(
    model: Model,
    text: Text,
    *,
    method: str = "quant",
    bits: float | None = None,
    sparsity: float | None = None,
    size: str | None = None,
    limits: Sequence[Mapping[str, Any]] = (),
    engine: str = "none",
    folder: str | Path | None = None,
    **settings: Any,
) -> Levels:
    """Build the levels of a model, or reuse those in the folder.

    Args:
        text: for calibration.
        method: quant, gguf, sparsity, drop, experts or joint.
        bits: average bits per weight asked for (quant, gguf).
        sparsity: share of weights or modules to remove (sparsity, drop, experts).
        size: of all weights, "60MB" or "2.25bpw" (quant, gguf, joint).
        limits: further ones, such as [{"currency": "bytes", "total": "60MB"}]; see docs/methods.md.
        engine: what will run the model, by whose rules it is searched: none, mlx, vllm, gptqmodel or llama_cpp.
        folder: where levels are kept; None: in a temporary folder, as long as the result lives.
        settings: the method's own, such as levels=[4, 3, 2] or recipe="paper"; see docs/methods.md.

    Raises: EvoPressError if a setting is unknown, out of range or does not fit the model, or the target cannot be met.
    """
    check_is(model, Model, "load_model")
    model.check()
    if not isinstance(method, str) or method not in METHODS:
        raise EvoPressError(f"method={method} is unknown: choose one of {', '.join(METHODS)}")
    if issubclass(METHODS[method], QuantSettings):
        settings |= {"group_size": model.settings.group_size} if settings.get("group_size", AUTO) == AUTO else {}
    if bits is not None and size is not None:
        raise EvoPressError(f"bits={bits} and size={size} are both given: leave one of them out")
    calibration = model.sequences(text)
    root, kept = folder_of(folder)
    target = checked(
        RunSettings, {"bits": bits, "sparsity": sparsity, "size": size, "limits": limits, "engine": engine}, what="the target"
    )
    run = RunSettings(
        model=replace(model.settings, sequence_length=calibration.shape[1]),
        data=text_settings(calibration, calibration),
        method=make_settings(METHODS[method], settings, what=f"method {method}"),
        level_db=LevelDatabaseSettings(root=str(root)),
        evaluation=EvaluationSettings(every=0),
        paths=PathsSettings(cache=str(root)),
        **target,
        stages=["database"],
    )
    workspace = Workspace(run, root, model=model.source, text=GivenText(calibration))
    refuse_unfit_formats(workspace)
    space, _ = workspace.databases.plan()
    workspace.budget_of(space).check(space)
    _ = workspace.database, workspace.budget
    return Levels(model, run, workspace, root, kept)


def check_levels(levels: Any) -> None:
    """Raise EvoPressError unless these are levels, and of a model as it is now."""
    check_is(levels, Levels, "build_levels")
    levels.model.check()


def text_settings(calibration: Tensor, search: Tensor) -> DataSettings:
    """Return the settings that say how much text there is."""
    return DataSettings(
        source="given",
        calibration_tokens=calibration.numel(),
        search_tokens=search.numel(),
        evaluation_tokens=search.numel(),
    )
