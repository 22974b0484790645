"""Stage `export`: write a genome in the formats that the settings name; refuse before any work what one of them cannot hold."""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from operator import sub
from pathlib import Path
from typing import Any

from evopress.baselines.uniform import uniform_genomes
from evopress.currencies import num_experts
from evopress.errors import EvoPressError
from evopress.export.checkpoint import FILE_BYTES, parts_together
from evopress.export.exporter import DROPPED, INTEGERS, Bounded, Export, Exporter, Form, Resized, Serves, form_of, write_export
from evopress.export.named import DEQUANTIZED, make_exporters
from evopress.export.rules import refuse_experts, refuse_unfit
from evopress.files import make_folder, shown_path
from evopress.json_files import shown
from evopress.methods.points import any_point, has_points
from evopress.methods.targets import checked_limit
from evopress.models.blocks import bytes_of
from evopress.models.experts import copied_for_export
from evopress.models.loading import DTYPES
from evopress.progress import millions
from evopress.reporting.records import read_genome, read_json, write_genome, write_json
from evopress.reporting.tables import markdown_table
from evopress.resources import Needs
from evopress.settings import RunSettings
from evopress.stages.given import Given, file_of, folder_of, named_genome, take_best_so_far
from evopress.stages.kind import Context
from evopress.stages.needs import Planner
from evopress.stages.refine import refined_levels, summary_of
from evopress.stages.results import exported_found, formats, read_result
from evopress.units import Genome, Level, Space, Unit, is_module, is_of_expert
from evopress.workspace import Workspace

logger = logging.getLogger(__name__)
EXPORTED_BEFORE: dict[str, Any] = {DEQUANTIZED: {}}
"""What this stage of earlier versions wrote, name to options."""
_LICENCE = re.compile(r"^license:[ \t]*['\"]?([\w.+-]+)", re.MULTILINE)
_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---", re.DOTALL)
_MOST_CARD_CHARACTERS = 2**16
_OF_FILES = ("checkpoint_bytes", "exports")
"""What a row says of the files that were written from it."""
_MORE = 1.05
"""Times the bytes that were counted, above which a file's size is told."""


def exporters_of(settings: RunSettings) -> dict[str, Exporter]:
    """Return the exporters that the settings name, none where nothing is exported.

    Raises: EvoPressError if there is none of a name, or it does not take its options.
    """
    return make_exporters(settings.export, settings.export_options) if "export" in settings.stages else {}


def refuse_unknown_models(workspace: Workspace, *, exported: bool = True) -> None:
    """Raise EvoPressError if a format, or the engine's, is not written for models of this kind, whatever their levels.

    Levels and a search by an engine's rules are refused, too, exported now or later. The model's config.json tells it, before the
    weights are loaded.

    Args: exported: the stage `export` writes something now; of several budgets it does not.
    """
    config, engine = workspace.model_source.config, workspace.engine
    if engine is not None and {"database", "search"} & set(workspace.settings.stages):
        (exporter,) = make_exporters(engine.formats[:1], {}).values()
        try:
            exporter.check(config, ())
        except EvoPressError as error:
            raise EvoPressError(f"engine={engine.name}: {error} and engine=none") from error
    for exporter in exporters_of(workspace.settings).values() if exported else ():
        exporter.check(config, ())


def refuse_resized_files(workspace: Workspace) -> None:
    """Raise EvoPressError if a search for a size counts by an engine's rules, and an option gives the engine's file other bits.

    An option is what is done with what was found, and may be given by a later command alone, so that no search counts it.
    """
    settings, engine = workspace.settings, workspace.engine
    target = _in_bytes(settings)
    if engine is None or target is None or not {"baselines", "search"} & set(settings.stages):
        return
    for name, exporter in exporters_of(settings).items():
        if name in engine.formats and (option := _resized_by(workspace, name, exporter)) is not None:
            raise EvoPressError(
                f"{target}: sizes count what the file of engine={engine.name} takes without {option}, which gives it other bits; "
                "leave the option out, or export with it once the search is done (resume=RUN 'stages=[export]')"
            )


def _in_bytes(settings: RunSettings) -> str | None:
    """Return the setting that asks for a size, as it was given; None: none does."""
    if (any_point(settings) if has_points(settings) else settings).size is not None:
        given = (f"{key}={value}" for key in ("size", "budgets", "max_kl", "min_agreement") if (value := getattr(settings, key)))
        return next(given)
    for entry in settings.limits:
        if (currency := checked_limit(entry)[0].name) in ("bytes", "read"):
            return f"limits with currency: {currency}"
    return None


def _resized_by(workspace: Workspace, name: str, exporter: Exporter) -> str | None:
    """Return the option by which a format's file has other bits than its engine's rules count; None: it is as counted."""
    option = exporter.resized_by(DTYPES[workspace.dtype]) if isinstance(exporter, Resized) else None
    return None if option is None else f"export_options.{name}.{option}"


def refuse_unfit_formats(workspace: Workspace, *, exported: bool = True) -> None:
    """Raise EvoPressError if a format, or the engine, cannot hold what may be exported: the genome if it is known, else any.

    Levels and a search by an engine's rules are refused where the engine's format is not written for experts, exported now or
    later. Builds nothing; the model is loaded for it.

    Args: exported: the stage `export` writes something now; of several budgets it does not.
    """
    exporters, engine = exporters_of(workspace.settings) if exported else {}, workspace.engine
    if not set(exporters) - {DEQUANTIZED} and engine is None:
        return
    space, _ = workspace.databases.plan()
    genome = _known_genome(workspace, space)
    forms = list(_all_forms(workspace, space)) if genome is None else forms_of(workspace, space, genome)
    if engine is not None:
        if {"database", "search"} & set(workspace.settings.stages):
            refuse_experts(forms, asked=f"engine={engine.name}", otherwise="use engine=none")
        refuse_unfit(engine, forms, asked=f"engine={engine.name}", otherwise="use engine=none")
    for exporter in exporters.values():
        exporter.check(workspace.model_source.config, forms)


def _known_genome(workspace: Workspace, space: Space) -> Genome | None:
    """Return the genome that will be exported; None: it is not known yet."""
    given, found = workspace.settings.genome, workspace.run_dir / "genome.json"
    if given is None:
        return read_genome(found, space) if found.exists() and "search" not in workspace.settings.stages else None
    if (path := file_of(given, "genome", workspace.run_dir)) is not None:
        return read_genome(path, space)
    if workspace.method.weights is None:
        return None
    return uniform_genomes(space, workspace.method.uniform_name).get(given)


def forms_of(workspace: Workspace, space: Space, genome: Genome) -> tuple[Form, ...]:
    """Return how every weight is stored at its level of a genome; nothing of what lies in a dropped module is."""
    describe, whole, genome = _described(workspace, space), space.whole, space.unfold(genome)
    forms = [describe(unit, unit.levels[level]) for unit, level in zip(whole.units, genome, strict=True)]
    return tuple(replace(form, kind=DROPPED) if whole.is_gone(genome, index) else form for index, form in enumerate(forms))


def _all_forms(workspace: Workspace, space: Space) -> Iterator[Form]:
    describe = _described(workspace, space)
    return (describe(unit, level) for unit in space.whole.units for level in unit.levels)


def _described(workspace: Workspace, space: Space) -> Any:
    """Return what tells a weight's form at a level."""
    blocks = workspace.blocks
    columns = {name: slot.weight.shape[1] for part in blocks.parts for name, slot in blocks.slots(part).items()}
    compressor = {} if workspace.method.weights is None else workspace.databases.compressor.settings()

    def describe(unit: Unit, level: Level) -> Form:
        form = replace(form_of(unit, level, 0 if is_module(unit) else columns[unit.name], compressor), of_expert=is_of_expert(unit))
        by = space.units[space.places[unit.name]].name
        return form if by == unit.name else replace(form, tied=by)

    return describe


def _packed_bytes(planner: Planner, exporter: Exporter) -> int:
    """Return the bytes that a packed format takes, at most: what is no unit as it is, and the budget with all metadata."""
    space, budget = planner.space, planner.budget
    written = _written_bits(planner, exporter)
    most = sum(map(max, written))
    if space.words.name in ("bits", "bytes"):
        most = min(most, budget.total + sum(max(map(sub, *each)) for each in zip(written, space.prices, strict=True)))
    return planner.workspace.rest_of(space).bits // 8 + -(-most // 8)  # `other_bytes` would build the level database


def _written_bits(planner: Planner, exporter: Exporter) -> list[list[int]]:
    """Return the bits that each unit takes in a file at each of its levels, at most."""
    space = planner.space
    if not isinstance(exporter, Bounded):
        return [[level.stored_bits for level in unit.levels] for unit in space.units]
    describe, whole = _described(planner.workspace, space), space.whole
    members = space.members or tuple((index,) for index in range(len(space)))

    def bits_of(unit: Unit, level: Level) -> int:
        form = describe(unit, level)
        return exporter.most_bits(form) if form.kind == INTEGERS else level.stored_bits

    units = ([whole.units[index] for index in indices] for indices in members)
    return [[sum(bits_of(unit, unit.levels[level]) for unit in of) for level in range(len(of[0].levels))] for of in units]


def what_is_exported(
    workspace: Workspace, genome: Genome, *, files: tuple[Path, ...], told: Mapping[str, Any], command: str = ""
) -> Export:
    """Return the model at a genome of all its levels, with what goes beside its weights.

    Args:
        files: copied into the folder: the genome.
        told: what its provenance says beside the model and the levels.
    """
    database, pretrained, space = workspace.database, workspace.pretrained, workspace.levels.space
    return Export(
        live=workspace.untied_live,
        model=pretrained.model,
        tokenizer=pretrained.tokenizer,
        genome=space.unfold(genome),
        forms=forms_of(workspace, space, genome),
        base=pretrained.name,
        licence=licence_of(pretrained.folder),
        command=command,
        files=files,
        provenance={
            "schema": 1,
            "made_by": "evopress",
            **({"command": command} if command else {}),
            "base_model": pretrained.name,
            "base_model_digest": pretrained.digest,
            "level_database": database.fingerprint,
            "recipe": dict(database.recipe),
            **told,
        },
    )


def export_needs(planner: Planner) -> Needs:
    """Return what the stage `export` takes."""
    workspace = planner.workspace
    size = bytes_of(workspace.pretrained.model)
    less = "leave export out of stages, or use a machine with more memory"
    exporters = exporters_of(planner.settings)
    names = list(exporters)
    written = sum(size if name == DEQUANTIZED else _packed_bytes(planner, exporter) for name, exporter in exporters.items())
    what = ", ".join("checkpoint" if name == DEQUANTIZED else name for name in names)
    needs = Needs("export", what, disk={workspace.run_dir: written}, alone=True, less_memory=less)
    if DEQUANTIZED not in names:  # others read a weight at a time
        planner.hold_written(needs, (), beside=0, file_bytes=0)
        return needs
    blocks = workspace.blocks
    outside = size - sum(map(bytes_of, blocks.blocks))
    dropping = any(map(num_experts, planner.space.units))
    kept = 1.0 - (planner.settings.sparsity or 0.0) if dropping and planner.modules else 1.0
    files = parts_together(blocks, FILE_BYTES)
    for parts in files:
        held = [blocks.blocks[part] for part in parts if part < len(blocks.blocks)]
        copied = sum(copied_for_export(block, levels=not planner.modules, kept=kept, fewer=dropping) for block in held)
        file_bytes = size if len(files) == 1 else sum(map(bytes_of, held))
        planner.hold_written(needs, parts, beside=copied, file_bytes=file_bytes or outside)
    return needs


def export(workspace: Workspace, context: Context) -> None:
    """Stage `export`: write a genome in every format that `export` names.

    It is the found one, refined where it has been; the best so far of a search that was cut off; or the one that is given.
    """
    run_dir, database = workspace.run_dir, workspace.database
    take_best_so_far(workspace)
    refuse_nothing_to_export(workspace)
    if (given := named_genome(workspace)) is not None:
        files, genome, space, refined = _write_given(workspace, given), given.genome, given.space, None
    else:
        files, space = run_dir, database.space
        genome = read_genome(run_dir / "genome.json", space, database=database.fingerprint)
        refined = refined_levels(workspace, genome)
    written = genome
    if refined is not None:
        written, _ = workspace.add_refined(refined)
    left_out = workspace.pretrained.left_out
    what = what_is_exported(
        workspace,
        written,
        files=(files / "genome.json", files / "genome.txt"),
        command=context.command_of(refined=refined is not None),
        told={
            **({} if given is None else {"genome": given.name}),
            **workspace.method.costs(space, genome),
            **({"left_out": list(left_out)} if left_out else {}),
            **({} if refined is None else {"refined": {"fingerprint": refined.fingerprint, **summary_of(refined)}}),
        },
    )
    exporters = exporters_of(workspace.settings)
    for exporter in exporters.values():
        exporter.check(workspace.model_source.config, what.forms)
    row = _row(workspace, space, genome, name=given.name if given else "evopress" if refined is None else "evopress_refined")
    gone = f" (without the further head, {len(left_out)} tensors that begin with {left_out[0]})" if left_out else ""
    for name, exporter in exporters.items():
        if name == DEQUANTIZED:
            logger.info("checkpoint: %s%s", write_export(exporter, files / "checkpoint", what), gone)
            continue
        size = exporter.num_bytes(what)
        if size is not None and (not isinstance(size, Integral) or size < 0):
            raise EvoPressError(
                f"the exporter {name} says that its weight file takes {shown(size)} bytes, expected a whole number, or None where "
                "that is not known: fix its num_bytes, or leave it out of export"
            )
        sizes: dict[str, int] = {} if size is None else {"bytes": int(size)}
        told = {"format": name, "options": dict(workspace.settings.export_options.get(name, {})), **sizes}
        in_table = {**row, "exports": {name: sizes}} if sizes else row
        folder = write_export(
            exporter,
            files / "exports" / name,
            replace(what, table=markdown_table([in_table]), provenance={**what.provenance, "export": told}),
        )
        logger.info("%s: %s%s%s", name, folder, f", {millions(size)} MB of weights" if size else "", gone)
        if size:
            _tell_larger(workspace, name, exporter, row, size=size)
    result = read_result(run_dir)
    if result.get("rows"):
        add_sizes(result["rows"], workspace)
    if own := _sizes(run_dir):
        result["exports"] = own
    if result.keys() - {"schema"}:
        write_json(run_dir / "result.json", result)


def _tell_larger(workspace: Workspace, name: str, exporter: Exporter, row: Mapping[str, Any], *, size: int) -> None:
    """Warn of a file that is larger than was counted, where an engine's rules counted it, or a size was asked for."""
    counted, engine, target = row.get("bytes"), workspace.engine, _in_bytes(workspace.settings)
    if not counted or size <= _MORE * counted or (engine is None and target is None):
        return
    why = []
    if (option := _resized_by(workspace, name, exporter)) is not None:
        why.append(f"{option} is not counted")
    if engine is None or name not in engine.formats:
        why.append(f"engine={workspace.settings.engine} does not count this format's bits")
    if row.get("modules_dropped"):
        why.append("attention or MLP modules dropped alone are counted as nothing, but stored as zeros")
    logger.warning(
        "%s has %s MB of weights where %s were counted: %s%s",
        name,
        millions(size),
        millions(counted),
        ", and ".join(why) or "a file's header is not counted, which is large where weights are tiny",
        "" if target is None else "; lower the size",
    )


def _row(workspace: Workspace, space: Space, genome: Genome, *, name: str) -> dict[str, Any]:
    """Return a genome's row: as it was measured, or else what it takes; without what formats that are there already take."""
    found = next((row for row in read_result(workspace.run_dir).get("rows", []) if row["name"] == name), None)
    if found is not None:
        return {key: value for key, value in found.items() if key not in _OF_FILES}
    size = workspace.other_bytes + (space.stored_bits(genome) + 7) // 8
    return {"name": name, **workspace.method.costs(space, genome), "bytes": size}


def add_sizes(rows: Sequence[dict[str, Any]], workspace: Workspace) -> None:
    """Put the bytes of what was exported into the rows that it was written from: the checkpoint's weight files, other formats'.

    What rows say of files that are there no more, or hold another row's weights now, goes.
    """
    run_dir = workspace.run_dir
    by_name = {row["name"]: row for row in rows}
    for row in rows:
        for key in _OF_FILES:
            row.pop(key, None)
        if sizes := _sizes(run_dir / "genomes" / folder_of(row["name"])):
            row["exports"] = sizes
    for name, folder in exported_found(run_dir):
        if name not in by_name:
            continue
        row = by_name[name]
        if folder.name == "checkpoint":
            row["checkpoint_bytes"] = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        else:
            row.setdefault("exports", {})[folder.name] = {"bytes": _size(folder)}


def served(workspace: Workspace, files: Path) -> Iterator[str]:
    """Yield a line for each packed format that a run has written: its true size, and the command that serves it.

    Args: files: the folder that `exports` lies in.
    """
    for name, exporter in exporters_of(workspace.settings).items():
        folder = files / "exports" / name
        if not isinstance(exporter, Serves) or not folder.is_dir():
            continue
        yield f"{name}, {millions(_size(folder))} MB: {exporter.serve(shlex.quote(shown_path(folder)), workspace.blocks.dtype)}"


def _sizes(files: Path) -> dict[str, Any]:
    """Return the bytes of what lies in a folder's `exports`, by format."""
    return {folder.name: {"bytes": _size(folder)} for folder in formats(files)}


def _size(folder: Path) -> int:
    """Return the bytes of an exported folder's weights, as its exporter said, or else of all that is in it."""
    try:
        return int(read_json(folder / "evopress.json")["export"]["bytes"])
    except (EvoPressError, OSError, KeyError, TypeError, ValueError):
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def licence_of(folder: Path) -> str | None:
    """Return the licence that a model's folder names, in our provenance or at the head of its model card; None: neither."""
    if not (folder / "config.json").is_file():  # of a model that was made, not loaded
        return None
    try:
        stated = read_json(folder / "provenance.json").get("license") if (folder / "provenance.json").is_file() else None
        if isinstance(stated, str):
            return stated
        with (folder / "README.md").open(encoding="utf-8", errors="replace") as file:
            head = _FRONT_MATTER.match(file.read(_MOST_CARD_CHARACTERS))
    except (EvoPressError, OSError, AttributeError):
        return None
    found = _LICENCE.search(head[1]) if head else None
    return found[1] if found else None


def refuse_nothing_to_export(workspace: Workspace) -> None:
    """Raise EvoPressError if no genome is given and no search has left one, or its best so far, in the folder."""
    run_dir = workspace.run_dir
    if workspace.settings.genome is None and not any((run_dir / name).exists() for name in ("genome.json", "state.json")):
        raise EvoPressError(
            f"there is no genome.json in {run_dir} to export: run the stage search first, at least its first generation, or "
            "give one with genome=FILE"
        )


def _write_given(workspace: Workspace, given: Given) -> Path:
    """Write a given genome in our formats, and return its folder; a search's own genome and checkpoint stay."""
    folder = make_folder(workspace.run_dir / "genomes" / given.folder)
    write_genome(
        folder / "genome.json",
        folder / "genome.txt",
        space=given.space,
        genome=given.genome,
        database=workspace.database.fingerprint,
        budget=workspace.budget,
    )
    return folder


def exports_asked(settings: RunSettings) -> Mapping[str, Any]:
    """Return what is exported, name to options, as `finished.json` keeps it."""
    return {name: dict(settings.export_options.get(name, {})) for name in sorted(settings.export)}
