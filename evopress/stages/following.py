"""A process that torchrun has started beside the first: it opens the same model and text, and does its share of the work."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evopress.data.opening import GivenText
from evopress.evaluation.zero_shot import answering
from evopress.levels.store import LevelDatabase
from evopress.models.blocks import bytes_of
from evopress.models.loading import pick_device
from evopress.ranks import collective, follow, on_all_ranks, processes
from evopress.resources import Room, rooms
from evopress.settings import RunSettings
from evopress.stages.baselines import make_fitness
from evopress.workspace import Workspace

logger = logging.getLogger(__name__)


def open_for_all(workspace: Workspace) -> None:
    """Let the other processes of a run, if there are any, open what this one has opened.

    Raises: EvoPressError if one of them cannot.
    """
    if processes() > 1:
        logger.info("%d processes share the work; this one decides and writes", processes())
        settings, text = workspace.settings, workspace.text
        texts = {name: tokens.clone() for name, tokens in workspace.texts(settings.stages).items()}  # of a part all would be sent
        _open(_Opening(settings, workspace.run_dir, text.name, text.leading_ids, texts))


def model_bytes_there(workspace: Workspace) -> int:
    """Return the bytes of the model that lie, or will lie, on a compute device that is not the host."""
    if workspace.device.type == "cpu":
        return 0
    inside = sum(map(bytes_of, workspace.blocks.blocks)) if workspace.settings.model.offload else 0
    return bytes_of(workspace.pretrained.model) - inside


def rooms_of(workspace: Workspace) -> list[Room]:
    """Return what each process of a run finds, before the others open it, and what of the model it has yet to load.

    Raises: EvoPressError if one of them finds no device.
    """
    size, there = bytes_of(workspace.pretrained.model), model_bytes_there(workspace)
    found = rooms(_Here(workspace.settings.model.device, workspace.device))
    opened = 0 if workspace.model_source.is_outline else 1
    loading = [replace(room, to_load=size - there, to_load_there=there) for room in found[opened:]]
    return [*found[:opened], *loading]


@dataclass(frozen=True)
class _Here:
    """Where a process will compute."""

    name: str
    """As the settings have it."""
    taken: torch.device | None = None

    @property
    def known_as(self) -> tuple[Any, ...]:
        return "here", self.name

    @property
    def device(self) -> torch.device:
        return self.taken or pick_device(self.name)


def follow_run() -> None:
    """Do this process's share of the runs that the first one leads, until it ends.

    Raises: LostError if it, or another, ends before.
    """
    follow(_Opened().find)


@dataclass(frozen=True)
class _Opening:
    """All that a process needs to open a run."""

    settings: RunSettings
    run_dir: Path
    text: str
    leading_ids: tuple[int, ...]
    texts: Mapping[str, Tensor]
    """As `Workspace.texts` returns them."""

    @property
    def known_as(self) -> tuple[Any, ...]:
        return "run", self

    def open_run(self) -> None:
        """Do nothing: the first process has opened it."""


class _Opened:
    """What this process has opened of the run that it follows."""

    known_as = None

    def __init__(self) -> None:
        self._opening: _Opening | None = None
        self._main: Workspace | None = None
        self._other: tuple[tuple[Any, ...], Workspace] | None = None

    def find(self, key: tuple[Any, ...]) -> Any:
        """Return what this process has of something that is `Known` by a key."""
        kind, *rest = key
        if kind in ("here", "run"):
            self._main = self._other = None  # before another model is opened
        if kind == "here":
            return _Here(*rest)
        if kind == "run":
            self._opening = rest[0]
            return self
        assert self._main is not None, "no run has been opened"
        if kind == "blocks":
            return self._main.blocks
        further, refined, *more = rest
        workspace = self._with_levels(further, refined)
        if kind == "fitness":
            return make_fitness(workspace, np.random.default_rng(0), *more)  # the first process draws
        if kind == "tasks":
            return answering(workspace.live, workspace.pretrained.tokenizer, *more)
        return workspace.evaluator if kind == "evaluator" else workspace

    def open_run(self) -> None:
        """Open the model of the run that comes."""
        opening = self._opening
        assert opening is not None
        if opening.settings.threads is not None:
            torch.set_num_threads(opening.settings.threads)
        texts, held_out = opening.texts, "held-out text "
        text = GivenText(texts["calibration text"], texts.get("search text"), texts.get("refine text"))
        text.name, text.leading_ids = opening.text, opening.leading_ids
        text.evaluation = {name.removeprefix(held_out): texts[name] for name in texts if name.startswith(held_out)}
        self._main = Workspace(opening.settings, opening.run_dir, text=text)
        _ = self._main.blocks

    def _with_levels(self, further: tuple[str, ...], refined: Path | None) -> Workspace:
        """Return a workspace that has these levels beside the run's own."""
        assert self._main is not None
        if not further and refined is None:
            return self._main
        if self._other is None or self._other[0] != (further, refined):
            self._other = None
            other = Workspace(self._main.settings, self._main.run_dir, beside=self._main)
            other.add_levels(further)
            if refined is not None:
                other.add_refined(LevelDatabase.open(refined))
            self._other = (further, refined), other
        return self._other[1]


@collective
def _open(run: _Opening) -> None:
    on_all_ranks(run.open_run)
