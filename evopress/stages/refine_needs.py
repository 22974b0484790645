"""What the stage `refine` will take, from shapes and files."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from evopress.compress.gptq import metadata_bits
from evopress.data.tokens import tokens_digest
from evopress.errors import EvoPressError
from evopress.fitness.scales import STEP_TOKENS, held_bytes, written_bytes
from evopress.levels.passage import held_on_host, stay_on_device
from evopress.levels.plan import CORRECTED_FORWARDS, batch_of, compressing_share, part_bytes
from evopress.levels.store import MANIFEST
from evopress.progress import counted
from evopress.ranks import largest_shard
from evopress.reporting.records import read_json
from evopress.resources import Needs
from evopress.search.strategy import Asks
from evopress.stages.needs import Planner
from evopress.stages.refine import REFINED, made_otherwise
from evopress.units import Unit


def refine_needs(planner: Planner) -> Needs:
    """Return what the stage `refine` takes.

    Calibration text goes through each block, more often where weights are corrected, and candidates through what comes after it.
    """
    workspace, level_db, n = planner.workspace, planner.settings.level_db, planner.num_blocks
    if not workspace.refines:
        return planner.needs("refine", "nothing: modules are dropped")
    if (steps := _refined_before(planner)) is not None:
        return planner.needs("refine", f"done: {steps} blocks")
    calibration, judging = workspace.calibration_tokens, workspace.refine_tokens
    tokens, (_, judged) = largest_shard(len(calibration)) * calibration.shape[1], planner.mine(1, judging.numel())
    corrected = planner.settings.refine.correction > 0
    forwards = 2.0 + (CORRECTED_FORWARDS if corrected else 0)  # of the calibration text through each block
    suffixes = n + n * (n + 1) // 2 + n  # the genome as it was found, the candidates, the blocks that are settled
    walking = 2 if corrected else 1  # activations of all the text
    epochs = planner.settings.refine.scale_epochs
    scales = _most_scales(planner) if epochs else 0
    in_memory = level_db.activations == "memory"
    needs = planner.needs(
        "refine",
        f"{counted(n, 'block')} anew" + (", scales learned" if scales else ""),
        disk={
            workspace.run_dir: (2 if epochs else 1) * _stored_bytes(planner)
            + written_bytes(scales)
            + (0 if in_memory else walking * planner.states(calibration.numel()))
        },
        less_memory="use fewer calibration tokens (data.calibration_tokens), level_db.activations=disk, or leave refine out of "
        "stages",
    )
    parts = _of_one_level(planner)
    compressing = compressing_share(workspace.blocks, parts[0], corrects=corrected) / max(
        len(unit.levels) for unit in planner.space.units
    )
    planner.add(
        needs,
        tokens + (n + 2) * judged,
        forwards * n * tokens + (n + suffixes) * judged,
        lambda speed: (
            n * (tokens * (speed.hessians + (forwards - 1) * speed.block) + speed.compress * compressing)
            + judged * ((n + suffixes) * speed.block + (n + 1) * (speed.head + speed.reference))
        ),
    )
    planner.hold(needs, 1, min(planner.settings.fitness.max_tokens_in_flight, judged))
    batch = batch_of(calibration, level_db.batch_tokens)
    held = planner.states(judging.numel() + 2 * judged)  # base, states twice
    activations = planner.states(walking * tokens) if in_memory else 0
    beside = stay_on_device(activations, workspace.blocks.device)
    held += 0 if beside else held_on_host(activations, workspace.blocks.device)
    compressor, length = workspace.databases.compressor, calibration.shape[1]
    text: dict[str, Any] = {"batch": batch, "length": length, "corrects": corrected, "settled": lambda unit: unit.levels[0]}
    working = max(part_bytes(workspace.blocks, units, compressor, **text) for units in parts)
    kept = planner.levels_kept * (1 if planner.space.untied is None else 2)  # the search's, and those of weights that are not tied
    planner.put(needs, kept + working + (activations if beside else 0), host=held)
    if scales:
        planner.base(needs)
        step = max(STEP_TOKENS, length)
        times = math.ceil(epochs * workspace.search_tokens.numel() / step)
        asks = Asks("refine.scale_epochs", step, times=times, attribution=True)
        planner.attribute(needs, asks, shared_by=largest_shard, beside=held_bytes(scales))
    return needs


def _of_one_level(planner: Planner) -> list[list[Unit]]:
    """Return the weights that are made anew, with one level each, by the part that they are in; the embedding stays as it is."""
    units = [replace(unit, levels=unit.levels[:1]) for unit in planner.space.whole.units]
    blocks = planner.workspace.blocks
    parts = ([unit for unit in units if unit.block == part] for part in blocks.parts if part != blocks.embedding_part)
    return [those for those in parts if those]


def _most_scales(planner: Planner) -> int:
    """Return how many scales can be learned, at most: those of the blocks' weights, each at the level that has most."""
    units = (unit for unit in planner.space.whole.units if not unit.is_outside)
    return sum(max(map(metadata_bits, unit.levels)) // 32 for unit in units)


def _refined_before(planner: Planner) -> int | None:
    """Return the blocks of refined levels that are there, whole by their names; None if the stage has to work."""
    folder = planner.workspace.run_dir
    if planner.asks:
        return None
    for path in (folder / REFINED).glob(f"*/{MANIFEST}"):
        try:
            recipe, files = (read_json(path)[key] for key in ("recipe", "files"))
            genome = [unit["level"] for unit in read_json(folder / "genome.json")["units"]]
            same = recipe["genome"] == genome and made_otherwise(planner.workspace, recipe) is None
            if same and recipe["decided_by"] == tokens_digest(planner.workspace.refine_tokens):
                return sum(file["block"] < planner.num_blocks for file in files)
        except (EvoPressError, KeyError, TypeError, ValueError):
            continue  # the stage says what is wrong with it
    return None


def _stored_bytes(planner: Planner) -> int:
    """Return the bytes that a genome's levels take at the budget: between those of the least and the most."""
    space, least, most = planner.space, planner.space.least_cost, planner.space.greatest_cost
    share = (planner.budget.total - least) / max(most - least, 1)
    ends = [sum(unit.levels[i].stored_bits for unit in space.units) for i in (-1, 0)]
    return math.ceil((ends[0] + share * (ends[1] - ends[0])) / 8)
