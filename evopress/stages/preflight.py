"""Say what a run will take before it takes it, and refuse it where the machine has less: tokens, forwards, disk, memory, time.

What a stage takes is counted beside its work; times rest on the second or two of measuring in `probe.py`.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from evopress.baselines.exhaustive import count_to_measure
from evopress.compress.compressor import Compressor, to_come
from evopress.errors import EvoPressError
from evopress.fitness.measures import unfused
from evopress.levels.store import told_of
from evopress.methods.points import at_budget, has_limit
from evopress.models.blocks import BlockModel
from evopress.models.first_block import first_block
from evopress.progress import amount, duration, in_bytes
from evopress.resources import Needs, Room, by_machine, check_room, disks, room_on
from evopress.search.evolution import SearchSettings
from evopress.search.strategy import Searching
from evopress.settings import STAGES
from evopress.stages.baselines import baselines_needs, database_needs, further_levels
from evopress.stages.evaluate import evaluate_needs
from evopress.stages.exports import export_needs
from evopress.stages.following import model_bytes_there, rooms_of
from evopress.stages.given import check_levels, check_starts
from evopress.stages.needs import Planner, planned_for
from evopress.stages.point_run import PointRun
from evopress.stages.probe import Speed, measure_speed
from evopress.stages.refine_needs import refine_needs
from evopress.stages.report import report_needs
from evopress.stages.search import search_needs
from evopress.stages.searchable import check_asks
from evopress.units import BLOCKS, Space
from evopress.workspace import Workspace

logger = logging.getLogger(__name__)
_FEW_TOKENS = 16
_NEEDS: dict[str, Callable[[Planner], Needs]] = {
    "database": database_needs,
    "baselines": baselines_needs,
    "search": search_needs,
    "refine": refine_needs,
    "evaluate": evaluate_needs,
    "export": export_needs,
    "report": report_needs,
}
"""What each stage says it takes."""


@dataclass(frozen=True)
class Plan:
    """What the stages of a run will take."""

    stages: tuple[Needs, ...]
    speed: Speed | None
    built_first: bool = False
    """The first stage that was asked for builds the level database, which is a row of its own."""

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Say after a stage how long it took, and what had been expected."""
        started = time.monotonic()
        yield
        rows = {needs.stage: needs.seconds for needs in self.stages}
        expected = rows.get(stage)
        if self.built_first and stage == self.stages[1].stage and expected is not None:
            expected += rows["database"] or 0.0
        said = "" if expected is None else f", {duration(expected)} had been expected"
        logger.info("%s took %s%s", stage, duration(time.monotonic() - started), said)


def preflight(workspace: Workspace, searching: Searching, runs: Sequence[PointRun], *, once: Collection[str]) -> Plan:
    """Print what the run's stages will take, and check it against what there is; changes nothing but the model's place.

    Args:
        searching: the search's numbers.
        runs: of one budget each: the run itself, or those that it has of several budgets.
        once: stages that are done once for all of them.

    Raises: EvoPressError if the disk, the memory or the device has too little, the budget leaves nothing to search or a start of
        the search exceeds it, or the model's numbers are not finite.
    """
    with to_come(workspace.device, model_bytes_there(workspace) if workspace.model_source.is_outline else 0):
        return _checked(workspace, searching, runs, once)


def _checked(workspace: Workspace, searching: Searching, planned: Sequence[PointRun], once: Collection[str]) -> Plan:
    """Do it; what a model whose weights are not there will take of a GPU counts as taken."""
    space, build = workspace.databases.plan()
    runs, asked = [], []
    for point in planned:
        run, baselines = point.workspace, point.workspace.settings.baselines
        check_levels(run.settings, space, run.run_dir)
        with at_budget(point.name):
            budget = run.budget_of(space)
            budget.check(space)
            if "baselines" in run.settings.stages and "exhaustive" in baselines.names:
                count_to_measure(space, budget, limit=baselines.exhaustive_limit)
            if workspace.settings.budgets or not has_limit(workspace.settings):  # of others none need be searched
                check_starts(run, space, budget)
            asked.append(check_asks(run, point.searching, space, budget))
        runs.append((run, point.searching, budget))
    _check_finite(workspace)
    if any(asked) and searching.num_generations and isinstance(searching, SearchSettings):
        _say_what_stays(space, workspace.settings.search.exchange)
    compresses = build is not None and (
        build.units
        or "refine" in workspace.settings.stages
        or any(further_levels(run, planned_for(run, space, budget)) for run, _, budget in runs)
    )
    speed = _probe(workspace, workspace.databases.compressor if compresses else None)
    asked_for = runs[0][0].settings.stages
    built_first = bool("database" not in asked_for and build is not None and build.units)
    stages = [stage for stage in STAGES if stage in asked_for or (stage == "database" and built_first)]
    taken: list[list[Needs]] = []
    planner = None
    for (run, numbers, budget), asks in zip(runs, asked, strict=True):
        planner = Planner(run, space, budget, build, numbers, asks, speed, after=planner)
        taken.append([_NEEDS[stage](planner) for stage in stages])
    plan = Plan(together(taken, once=once), speed, built_first)
    found = rooms_of(workspace)
    each = f" in each of {len(found)} processes (disk: in all)" if len(found) > 1 else ""
    logger.info("what this run will take%s, in addition to the model:\n%s", each, plan_table(plan, workspace, found))
    try:
        with told_of(build.damage if build is not None else None):
            check_room(plan.stages, found, offload=workspace.settings.model.offload)
    except EvoPressError as error:
        if not workspace.model_source.is_outline:
            raise
        logger.warning("on this machine the run would be refused: %s", error)
    return plan


def together(runs: Sequence[Sequence[Needs]], *, once: Collection[str]) -> tuple[Needs, ...]:
    """Add up what the same stages of several runs take, which are evaluated all at once.

    Args: once: stages that are done once for all of them.
    """
    if len(runs) == 1:
        return tuple(runs[0])
    return tuple(
        same[0]
        if same[0].stage in once
        else _added(same, same[0].stage, f"{len(runs)} budgets: {same[0].what}", at_once=same[0].stage == "evaluate")
        for same in zip(*runs, strict=True)
    )


def _added(all_of: Sequence[Needs], stage: str, what: str, *, at_once: bool = False) -> Needs:
    """Add up what is done one after the other, or all at once."""
    disk: Counter[Path] = Counter()
    for needs in all_of:
        disk.update(needs.disk)
    seconds = [needs.seconds for needs in all_of if needs.seconds is not None]
    peak = sum if at_once else max
    return replace(
        all_of[0],
        stage=stage,
        what=what,
        tokens=sum(needs.tokens for needs in all_of),
        block_tokens=sum(needs.block_tokens for needs in all_of),
        disk=dict(disk),
        memory=peak([needs.memory for needs in all_of]),
        device=peak([needs.device for needs in all_of]),
        seconds=sum(seconds) if seconds else None,
    )


def _say_what_stays(space: Space, exchange: str) -> None:
    """Say which of head and embedding a search by size cannot move: they are larger than anything that they could trade with."""
    sizes = Counter(unit.size for unit in space.units)
    for unit in space.units:
        if exchange == "size" and unit.is_outside and sizes[unit.size] == 1:
            logger.info(
                "search: no other unit has the size of %s, so exchanges of equal size cannot change its level: use "
                "search.exchange=any, or search.starts=[dp] for a better start",
                unit.name,
            )


def _check_finite(workspace: Workspace) -> None:
    """Raise EvoPressError if the model's logits are not finite; where blocks are called alone, `self_check` has seen to it."""
    blocks = workspace.blocks
    if workspace.settings.fitness.evaluator == "population" or blocks.offload or workspace.model_source.is_outline:
        return
    with torch.no_grad():
        logits = blocks.model(input_ids=workspace.calibration_tokens[:1, :24].to(blocks.device), use_cache=False).logits
    if not bool(torch.isfinite(logits).all()):
        raise EvoPressError(f"the model's logits are not finite in {blocks.dtype}: {blocks.advice}")


def _probe(workspace: Workspace, compressor: Compressor | None) -> Speed | None:
    settings, ids, blocks = workspace.settings.fitness, workspace.calibration_tokens, workspace.blocks
    if workspace.model_source.is_outline:
        first = _first_block(workspace)
        if first is None:
            return None
        blocks = first
        if workspace.device.type == "cpu":  # which fewer tokens keep as busy
            ids = ids[:, :_FEW_TOKENS]
    return measure_speed(
        blocks,
        ids,
        unfused(workspace.measure),
        compressor,
        chunk_tokens=settings.chunk_tokens,
    )


def _first_block(workspace: Workspace) -> BlockModel | None:
    """Return what stands for a model whose weights are not there; None if the machine has no room for it, or it cannot run."""
    device, blocks = workspace.device, workspace.blocks
    room = room_on(device)
    try:
        return first_block(
            workspace.model_source.config,
            dtype=blocks.dtype,
            device=device,
            include=(BLOCKS,) if workspace.method.weights is None else workspace.method.weights.include,
            most_bytes=(room.memory if room.device is None else room.device) // 4,
        )
    except EvoPressError as error:
        logger.warning("%s", error)
        return None


def plan_table(plan: Plan, workspace: Workspace, found: Sequence[Room]) -> str:
    """Lay a plan out, with what there is and what the times rest on."""
    device = workspace.device.type != "cpu"

    def cells(needs: Needs) -> list[str]:
        sizes = [sum(needs.disk.values()), needs.memory, *([needs.device] if device else [])]
        numbers = [amount(needs.tokens), amount(needs.block_tokens), *map(in_bytes, sizes)]
        time_ = "-" if needs.seconds is None else duration(needs.seconds)
        return [needs.stage, needs.what, *("-" if number in ("0", "0 B") else number for number in numbers), time_]

    head = ["stage", "to do", "tokens", "blocks x tokens", "disk", "memory", *(["device"] if device else []), "time"]
    rows = [head, *map(cells, plan.stages)]
    if len(plan.stages) > 1:
        rows.append(cells(_added(plan.stages, "all", "")))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    there = [f"{in_bytes(min(found[number].memory for number in those))} {words}" for words, those in by_machine(found).items()]
    there += [f"{in_bytes(room.device)} on {room.where}" for room in found if room.device is not None]
    folders = [workspace.run_dir, workspace.databases.root, workspace.cache]
    there += [f"{in_bytes(free)} of disk for {' and '.join(map(str, those))}" for those, free in disks(folders)]
    lines.append(f"available: {', '.join(there)}")
    if plan.speed is None:
        why = (
            "a block of it cannot be run here"
            if workspace.model_source.is_outline
            else "the model is too small for a probe to tell"
        )
        lines.append(f"times: not estimated, {why}")
    else:
        lines.append(
            f"times: estimates from a probe of {plan.speed.seconds:.1f} s ({plan.speed.block * 1e6:.3g} us per token and block, "
            f"{plan.speed.head * 1e6:.3g} us per token for logits and measure); loading levels, export and report are not in them"
        )
    return "\n".join(line.rstrip() for line in lines)
