"""What becomes of a genome: a second pass over its weights, its measures on held-out text, and the model as files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from evopress.data.opening import GivenText
from evopress.errors import EvoPressError
from evopress.evaluation.heldout import Scores, measure_held_out
from evopress.export.exporter import write_export
from evopress.export.named import DEQUANTIZED, make_exporters
from evopress.files import make_folder
from evopress.levels.store import LevelDatabase
from evopress.library.given import folder_of, make_settings, path_of
from evopress.library.levels import Levels, check_levels
from evopress.library.models import Text, alone
from evopress.library.searches import Found
from evopress.reporting.records import read_genome, write_genome
from evopress.settings import RefineSettings
from evopress.stages.exports import forms_of, what_is_exported
from evopress.stages.refine import refine_genome, summary_of, why_nothing
from evopress.units import Genome
from evopress.workspace import Workspace


@dataclass(frozen=True)
class Refined:
    """A genome with its units compressed anew: `evaluate` and `export` take it in the genome's place."""

    genome: Genome
    """As it was given, of `levels.space`."""
    blocks_kept: int
    """Blocks whose new weights stay; in the others the levels' weights are as good or better."""
    kl_before: float | None
    """KL divergence on the text that decided, before the first block; None where there was nothing to compress anew."""
    kl_after: float | None
    """The same, after the last one."""
    workspace: Workspace = field(repr=False)
    refined: LevelDatabase | None = field(repr=False)
    """Weights made anew; None: every unit of the genome is its dense weight."""
    kept: Any = field(default=None, repr=False)


@alone
def refine(
    levels: Levels,
    genome: Genome | Found | str | Path,
    text: Text,
    *,
    correction: float = RefineSettings.correction,
    scale_text: Text | None = None,
    scale_epochs: int = 2,
    folder: str | Path | None = None,
) -> Refined:
    """Compress every unit of a genome anew at its level, for what enters it in the compressed model: the stage `refine` of a run.

    The calibration text is that of the levels.

    Args:
        text: search text that the search has not seen: the KL divergence on it decides, block by block, whether new weights stay.
        correction: share of what the compressed model's inputs have lost that new weights make good, from 0 to 1.
        scale_text: text that scales of quantized weights are learned on, such as the search's; None: they stay as they are fitted.
        scale_epochs: times that it is gone through.
        folder: where the weights are kept, and gone on with after an interruption; None: a temporary one.

    Raises: EvoPressError if the genome does not fit the levels, or their method has nothing to refine.
    """
    check_levels(levels)
    given, workspace = genome_of(levels, genome), levels.workspace
    if not workspace.refines:
        raise EvoPressError(f"{why_nothing(workspace)}: leave refine out")
    tokens = levels.model.sequences(text)
    learned_on = None if scale_text is None else levels.model.sequences(scale_text)
    asked = {"tokens": tokens.numel(), "correction": correction, "scale_epochs": 0 if learned_on is None else scale_epochs}
    settings = make_settings(RefineSettings, asked, what="refine")
    run_dir, kept = folder_of(folder)
    make_folder(run_dir)
    refining = Workspace(
        replace(levels.settings, refine=settings),
        run_dir,
        model=levels.model.source,
        text=GivenText(workspace.calibration_tokens, search=learned_on, after_search=tokens),
        blocks=workspace.blocks,
    )
    refined = refine_genome(refining, refining.database.space.unfold(given))
    told: dict[str, Any] = {"kept": 0, "kl_before": None, "kl_after": None} if refined is None else summary_of(refined)
    return Refined(given, told["kept"], told["kl_before"], told["kl_after"], refining, refined, kept)


@alone
def evaluate(levels: Levels, text: Text, genome: Genome | Found | Refined | str | Path | None = None) -> Scores:
    """Measure a genome, or the dense model, on held-out text: KL divergence to the dense model, perplexity, top-1 agreement.

    Raises: EvoPressError if the genome does not fit the levels, or there is too little text.
    """
    check_levels(levels)
    fitness = levels.settings.fitness
    workspace, measured = (levels.workspace, None) if genome is None else _placed(levels, genome)
    (scores,) = measure_held_out(
        workspace.evaluator,
        [measured],
        levels.model.sequences(text),
        batch_tokens=fitness.max_tokens_in_flight,
        chunk_tokens=fitness.chunk_tokens,
    )
    return scores


@alone
def export(
    levels: Levels, genome: Genome | Found | Refined | str | Path, folder: str | Path, *, format: str = DEQUANTIZED, **options: Any
) -> Path:
    """Write the model at a genome, replacing an older export; return the folder.

    Args:
        format: dequantized, a checkpoint that transformers loads; mlx; gguf; compressed_tensors; gptq; others' (docs/exports.md).
        options: the format's own, such as scales="float32".

    Raises: EvoPressError if the genome does not fit the levels or the format, or the folder cannot be written or holds no export.
    """
    if not isinstance(format, str):
        raise EvoPressError(f"format={format!r} is no name: give one, such as format='mlx'")
    folder = path_of(folder)
    is_empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not is_empty and not (folder / "evopress.json").is_file():
        raise EvoPressError(f"{folder} exists and is not an export of evopress, so it is not overwritten: give another folder")
    check_levels(levels)
    workspace, written = _placed(levels, genome)
    found, space = genome_of(levels, genome), levels.space
    exporter = make_exporters([format], {format: options})[format]
    exporter.check(workspace.model_source.config, forms_of(workspace, workspace.levels.space, written))
    with tempfile.TemporaryDirectory(prefix="evopress-") as scratch:
        files = (Path(scratch, "genome.json"), Path(scratch, "genome.txt"))
        write_genome(*files, space=space, genome=found, database=workspace.database.fingerprint, budget=workspace.budget)
        told = {} if format == DEQUANTIZED else {"export": {"format": format, "options": options}}
        if isinstance(genome, Refined) and genome.refined is not None:
            told["refined"] = {"fingerprint": genome.refined.fingerprint, **summary_of(genome.refined)}
        what = what_is_exported(workspace, written, files=files, told={**workspace.method.costs(space, found), **told})
        return write_export(exporter, folder, what)


def _placed(levels: Levels, genome: Genome | Found | Refined | str | Path) -> tuple[Workspace, Genome]:
    """Return a genome of all levels that a workspace has, and that workspace."""
    found = genome_of(levels, genome)
    if isinstance(genome, Refined) and genome.refined is not None:
        return genome.workspace, genome.workspace.add_refined(genome.refined)[0]
    return levels.workspace, found


def genome_of(levels: Levels, genome: Genome | Found | Refined | str | Path) -> Genome:
    if isinstance(genome, Refined) and genome.workspace.database.fingerprint != levels.workspace.database.fingerprint:
        raise EvoPressError("what was refined are other levels than these: give those that were refined, or refine these")
    if isinstance(genome, Found) and genome.database not in ("", levels.workspace.database.fingerprint):
        raise EvoPressError("the search was on other levels than these: give those that were searched, or search these")
    if isinstance(genome, str | Path):
        return levels.space.check(read_genome(genome, levels.space))
    given = genome.genome if isinstance(genome, Found | Refined) else genome
    if not isinstance(given, Iterable):
        raise EvoPressError(f"the genome is a {type(given).__name__}: give a level for each unit, or what a search found")
    return levels.space.check(tuple(given))
