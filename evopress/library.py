"""EvoPress as a library: a loaded model and text go in, a genome, numbers and a checkpoint come out.

    model = evopress.load_model("/models/mine")
    levels = evopress.build_levels(model, calibration, bits=2.5)
    found = evopress.search(levels, text, generations=50)
    print(evopress.evaluate(levels, held_out, found))
    evopress.export(levels, found, "checkpoint")

The parts are those of a run (`python -m evopress`), and equal settings and text give the same genome.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import wraps
from inspect import signature
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from types import UnionType
from typing import Any, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evopress.data.opening import GivenText
from evopress.data.special_tokens import check_embedded
from evopress.data.tokens import END_OF_TEXT, sequences_of
from evopress.errors import EvoPressError
from evopress.evaluation.heldout import Scores, measure_held_out
from evopress.export.exporter import write_export
from evopress.export.named import DEQUANTIZED, make_exporters
from evopress.files import given_path, make_folder, open_folder
from evopress.levels.store import LevelDatabase
from evopress.machine import exactly
from evopress.models.alone import lock_of
from evopress.models.loading import DTYPES, pick_device, take_model
from evopress.models.opening import ModelSource, greatest_group, longest_sequence, pick_dtype
from evopress.reporting.generations import read_generations
from evopress.reporting.records import read_genome, write_genome
from evopress.reporting.tracker import NullTracker
from evopress.resources import check_model
from evopress.search.strategies import settings_class
from evopress.settings import (
    AUTO,
    METHODS,
    BaselinesSettings,
    DataSettings,
    EvaluationSettings,
    FitnessSettings,
    LevelDatabaseSettings,
    ModelSettings,
    PathsSettings,
    QuantSettings,
    RefineSettings,
    RunSettings,
    SearchConfig,
)
from evopress.stages.baselines import find_baselines as run_the_baselines
from evopress.stages.baselines import stored_baselines, with_further_levels
from evopress.stages.checks import check_baselines, check_names, check_strategy, check_tokens, searching_of
from evopress.stages.earlier import refuse_other_settings
from evopress.stages.exports import forms_of, refuse_unfit_formats, what_is_exported
from evopress.stages.refine import refine_genome, summary_of, why_nothing
from evopress.stages.search import search as run_the_search
from evopress.units import Genome, Space
from evopress.workspace import Workspace

BUILTIN = ("smollm2_135m", "tiny")
_SAMPLED = 256
"""Numbers of each tensor that tell whether it has changed."""
_SEPARATORS = {"smollm2_135m": "<|endoftext|>"}
"""As the models' configs have them."""
_EXCHANGES = {"drop": "name", "joint": "fit", "quant": "size", "sparsity": "any"}
"""As the methods' configs choose: attention for attention, whatever fits the size, steps of as many weights in any unit."""
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Text = Sequence[str] | Tensor
"""Documents, or token ids int64 [N, L], which are taken as they are."""


@dataclass(frozen=True)
class Model:
    """A model with its tokenizer, and how it is to be read."""

    source: ModelSource
    settings: ModelSettings
    sample: str | None = field(default=None, repr=False)
    """Digest of some of a loaded model's weights, which tells whether they are what they were; None: it is loaded here."""

    def check(self) -> None:
        """Put it into evaluation mode, which a trainer may have ended.

        Raises: EvoPressError if a model that was given has been changed since, or cast: what is kept of it would not fit.
        """
        if self.source.is_loaded:
            self.source.pretrained.model.eval()
        if self.sample is not None and self.sample != _sample(self.source.pretrained.model):
            raise EvoPressError("the model's weights have changed since load_model: call load_model and build_levels again")

    @property
    def lock(self) -> Any:
        """Held by whoever works with the network, which every `Model` of it shares."""
        return lock_of(self.source if self.sample is None else self.source.pretrained.model)

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model."""
        with self.lock:
            network = self.source.pretrained.model
            lock_of(network, same_as=self.source)
            return network

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        return self.source.tokenizer

    def sequences(self, text: Text) -> Tensor:
        """Return text as token ids int64 [N, L], all sequences that it fills.

        Raises: EvoPressError if it fills none, or has a token that the model lacks.
        """
        settings = self.settings
        if isinstance(text, str):
            raise EvoPressError("the text is one string: give a list of documents, or token ids")
        if isinstance(text, Mapping) or not isinstance(text, Iterable):
            raise EvoPressError(f"the text is a {type(text).__name__}: give a list of documents, or token ids")
        if isinstance(text, Tensor):
            if text.is_meta or text.layout != torch.strided:
                raise EvoPressError(
                    f"the token ids are on {text.device}, {text.layout}: give a plain tensor in memory, int64 [sequences, tokens]"
                )
            if text.dim() != 2 or text.dtype != torch.int64 or not len(text) or text.shape[1] < 2:
                raise EvoPressError(
                    f"the token ids are {text.dtype} {list(text.shape)}: give int64 [sequences, tokens], at least 2 tokens each"
                )
            if (least := int(text.min())) < 0:
                raise EvoPressError(f"the token ids have {least}: give ids of the model's tokenizer, 0 or more")
            sequences = text.cpu()
        else:
            documents = list(text)
            if other := next((type(each).__name__ for each in documents if not isinstance(each, str)), None):
                raise EvoPressError(
                    f"the text has a {other} among its documents: give strings, or token ids, one int64 tensor [sequences, tokens]"
                )
            if any("\ud800" <= letter <= "\udfff" for document in documents for letter in set(document)):
                raise EvoPressError("the text has an unpaired surrogate: fix the document or leave it out")
            sequences = sequences_of(
                documents,
                self.tokenizer,
                sequence_length=settings.sequence_length,
                separator=settings.separator,
                bos=settings.bos,
            )
        self.source.check(length=sequences.shape[1])
        if (rows := self.source.embedding_rows) is not None:
            check_embedded(sequences, self.tokenizer, num_rows=rows, what="the text", separator=settings.separator)
        return sequences


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


@dataclass(frozen=True)
class Found:
    """What a search found."""

    genome: Genome
    fitness: float
    """On the last minibatch of the last generation that measured it; NaN if none did. Lower is better."""
    folder: Path
    """Its run folder: genome.json, metrics.jsonl, and what a search needs to go on."""
    records: list[dict[str, Any]] = field(repr=False)
    """One per generation, as in metrics.jsonl."""
    kept: Any = field(default=None, repr=False)
    database: str = field(default="", repr=False)
    """Fingerprint of the levels that the genome counts."""


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


def _alone(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let a function that works with a network compute exactly, and wait until no other thread works with that network."""
    (first, *_) = signature(function).parameters

    @wraps(function)
    def alone(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        given: Any = args[0] if args else kwargs.get(first)
        model = given.model if isinstance(given, Levels) else given
        with model.lock if isinstance(model, Model) else nullcontext(), exactly():
            return function(*args, **kwargs)

    return alone


def load_model(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dtype: str = AUTO,
    device: str = AUTO,
    sequence_length: int | str = AUTO,
    separator: str | None = END_OF_TEXT,
    bos: str = AUTO,
    offload: bool = False,
    cache: str | Path = "~/.cache/evopress",
) -> Model:
    """Take a model: one that transformers has loaded, or the folder or hub id of one.

    A loaded model stays where it is, in its dtype. It is put into evaluation mode, and its parameters ask for no gradients any
    more. What a search or an evaluation changes in it is taken back.

    Args:
        model: the model, a folder, a hub id, or "smollm2_135m".
        tokenizer: of a loaded model.
        dtype: of a model that is loaded here: float32, bfloat16 or float16; auto: bfloat16 where the machine multiplies it.
        device: auto, cpu, cuda or cuda:N, for a model that is loaded here.
        sequence_length: tokens per sequence of text; auto: 4096, or as many as the model has positions for.
        separator: token between documents; "eos": the tokenizer's end of text, for "smollm2_135m" the one that it was trained
            with, as in a run; None: nothing.
        bos: what sequences begin with: auto: what the tokenizer puts before a text; true, false.
        offload: keep blocks in host memory and move one at a time to the device.
        cache: folder for models that are converted.

    Raises: EvoPressError if there is no such model, no blocks of linear layers are found in it, or it brings what is given beside
        it.
    """
    given: dict[str, Any] = {"separator": separator, "offload": offload, "sequence_length": sequence_length}
    given = {**_checked(ModelSettings, {**given, "dtype": dtype}, what="load_model"), "bos": bos}
    del given["dtype"]
    _refuse_other_models(model)
    if isinstance(model, PreTrainedModel):
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise EvoPressError("the model has no tokenizer: give load_model(model, tokenizer)")
        if any(parameter.is_meta for parameter in model.parameters()):
            raise EvoPressError("the model has weights without memory (on the device meta): load it whole, or give its folder")
        names = {value: key for key, value in DTYPES.items()}
        if model.dtype not in names:
            raise EvoPressError(f"the model is {model.dtype}: load it as one of {', '.join(DTYPES)}")
        if dtype not in (AUTO, names[model.dtype]) or str(device) not in (AUTO, model.device.type, str(model.device)):
            raise EvoPressError(
                f"dtype={dtype} and device={device} apply to a model that is loaded by name or path, but this one is already "
                f"{names[model.dtype]} on {model.device}: leave them out, or convert it yourself"
            )
        with lock_of(model):
            pretrained = take_model(model, tokenizer, name=str(model.config.name_or_path or model.config.model_type))
        settings = ModelSettings(**given, dtype=names[model.dtype], device=str(model.device), group_size=None)
        source = ModelSource.of(pretrained, settings)
    else:
        if tokenizer is not None:
            raise EvoPressError("a tokenizer is given beside the name of a model, whose own is loaded: leave it out, or load both")
        where: dict[str, Any] = (
            {"builtin": str(model)} if str(model) in BUILTIN and not Path(model).exists() else {"path": str(model)}
        )
        if "builtin" in where and separator == END_OF_TEXT:
            given["separator"] = _SEPARATORS.get(str(model), separator)
            open_folder(given_path(cache, "cache"))
        device = str(pick_device(str(device)))
        dtype = pick_dtype(dtype, torch.device(device))
        settings = ModelSettings(**given, **where, dtype=dtype, device=device, group_size=None)
        source = ModelSource(
            settings,
            cache=given_path(cache, "cache"),
            device=torch.device(device),
            dtype=dtype,
            may_load=lambda size: check_model(size, torch.device(device), offload=settings.offload),
        )
    if settings.sequence_length == AUTO:
        settings = replace(settings, sequence_length=longest_sequence(source.config))
    settings.group_size = greatest_group(shape[1] for shape in (source.linear_shapes() or {}).values())
    return Model(source, settings, _sample(model) if isinstance(model, PreTrainedModel) else None)


@_alone
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
    _check_is(model, Model, "load_model")
    model.check()
    if not isinstance(method, str) or method not in METHODS:
        raise EvoPressError(f"method={method} is unknown: choose one of {', '.join(METHODS)}")
    if issubclass(METHODS[method], QuantSettings):
        settings |= {"group_size": model.settings.group_size} if settings.get("group_size", AUTO) == AUTO else {}
    if bits is not None and size is not None:
        raise EvoPressError(f"bits={bits} and size={size} are both given: leave one of them out")
    calibration = model.sequences(text)
    root, kept = _folder(folder)
    target = _checked(
        RunSettings, {"bits": bits, "sparsity": sparsity, "size": size, "limits": limits, "engine": engine}, what="the target"
    )
    run = RunSettings(
        model=replace(model.settings, sequence_length=calibration.shape[1]),
        data=_data(calibration, calibration),
        method=_made(METHODS[method], settings, what=f"method {method}"),
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


@_alone
def search(
    levels: Levels,
    text: Text,
    *,
    fitness: str = "kl",
    seed: int = 0,
    folder: str | Path | None = None,
    **settings: Any,
) -> Found:
    """Search the levels for the genome that keeps the target and is closest to the dense model.

    Args:
        text: what minibatches are drawn from.
        fitness: kl, topk_kl or perplexity.
        seed: of every generator.
        folder: run folder, in which a search that was interrupted goes on; None: a temporary one.
        settings: the search's own: generations=50, num_offspring=16, survivors=[4, 1], tokens=[2048, 16384], starts=["dp"] and
            what else `SearchConfig` has. strategy: a name, "evolution" (the default) or "guided"; or that with numbers of its own,
            {"name": "guided", "rounds": 3}.

    Raises: EvoPressError if a setting is unknown or out of range, there is too little text, or the folder has another search.
    """
    _check_levels(levels)
    settings.setdefault("exchange", "fit" if levels.settings.limits else _exchange_of(levels.settings.method))
    settings["strategy"] = _strategy(settings.get("strategy"))
    tokens = levels.model.sequences(text)
    asked = _made(SearchConfig, settings, what="search")
    run = _asking(levels, tokens, what="search", fitness=fitness, seed=seed, search=asked, stages=["database", "search"])
    check_strategy(run)
    check_tokens(run)
    run_dir, kept = _folder(folder)
    make_folder(run_dir)
    workspace = _with_text(levels, run, run_dir, tokens)
    numbers = searching_of(workspace)
    refuse_other_settings(workspace, numbers)
    run_the_search(workspace, numbers, NullTracker())
    space = workspace.database.space
    records = read_generations(run_dir / "metrics.jsonl", space)
    measured = [float(each["fitness"]) for each in records if each["fitness"] is not None]
    genome = read_genome(run_dir / "genome.json", space, database=workspace.database.fingerprint)
    fingerprint = workspace.database.fingerprint
    return Found(genome, measured[-1] if measured else math.nan, run_dir, records, kept, fingerprint)


@_alone
def find_baselines(
    levels: Levels,
    text: Text,
    names: Sequence[str],
    *,
    fitness: str = "kl",
    seed: int = 0,
    folder: str | Path | None = None,
    **settings: Any,
) -> dict[str, Genome]:
    """Find the genomes that a search is compared with, at the levels' target: the stage `baselines` of a run.

    Args:
        text: search text.
        names: uniform, dp, fisher and what else docs/methods.md has; those with levels of their own (owl, atp, alphapruning) aside.
        fitness: kl, topk_kl or perplexity.
        seed: of every generator.
        folder: where they are kept, and found again; None: a temporary one.
        settings: the baselines' own: num_random=32, importance_tokens=131072, options={"fisher": {"tokens": 4096}} and what else
            `BaselinesSettings` has.

    Returns: genomes by the names that rows of a run have. The uniform one next above the target is among them.

    Raises: EvoPressError if there is no such baseline for the method, a setting is unknown or out of range, or there is too little
        text.
    """
    _check_levels(levels)
    tokens = levels.model.sequences(text)
    asked = _made(BaselinesSettings, {**settings, "names": names}, what="find_baselines")
    stages = ["database", "baselines"]
    run = _asking(levels, tokens, what="find_baselines", fitness=fitness, seed=seed, baselines=asked, stages=stages)
    check_names(run)
    check_baselines(run)
    run_dir, _kept = _folder(folder)
    make_folder(run_dir)
    workspace = _with_text(levels, run, run_dir, tokens)
    if further := ",".join(with_further_levels(workspace)):
        raise EvoPressError(
            f"baselines compress weights anew, to levels that these lack: leave {further} out, or take the command, "
            f"python -m evopress +method={run.method.name} baselines.names=[{further}]"
        )
    run_the_baselines(workspace)
    return stored_baselines(workspace)[0]


@_alone
def refine(
    levels: Levels,
    genome: Genome | Found | str | Path,
    text: Text,
    *,
    correction: float = RefineSettings.correction,
    folder: str | Path | None = None,
) -> Refined:
    """Compress every unit of a genome anew at its level, for what enters it in the compressed model: the stage `refine` of a run.

    The calibration text is that of the levels.

    Args:
        text: search text that the search has not seen: the KL divergence on it decides, block by block, whether new weights stay.
        correction: share of what the compressed model's inputs have lost that new weights make good, from 0 to 1.
        folder: where the weights are kept, and gone on with after an interruption; None: a temporary one.

    Raises: EvoPressError if the genome does not fit the levels, or their method has nothing to refine.
    """
    _check_levels(levels)
    given, workspace = _genome(levels, genome), levels.workspace
    if not workspace.refines:
        raise EvoPressError(f"{why_nothing(workspace)}: leave refine out")
    tokens = levels.model.sequences(text)
    settings = _made(RefineSettings, {"tokens": tokens.numel(), "correction": correction}, what="refine")
    run_dir, kept = _folder(folder)
    make_folder(run_dir)
    refining = Workspace(
        replace(levels.settings, refine=settings),
        run_dir,
        model=levels.model.source,
        text=GivenText(workspace.calibration_tokens, after_search=tokens),
        blocks=workspace.blocks,
    )
    refined = refine_genome(refining, refining.database.space.unfold(given))
    told: dict[str, Any] = {"kept": 0, "kl_before": None, "kl_after": None} if refined is None else summary_of(refined)
    return Refined(given, told["kept"], told["kl_before"], told["kl_after"], refining, refined, kept)


@_alone
def evaluate(levels: Levels, text: Text, genome: Genome | Found | Refined | str | Path | None = None) -> Scores:
    """Measure a genome, or the dense model, on held-out text: KL divergence to the dense model, perplexity, top-1 agreement.

    Raises: EvoPressError if the genome does not fit the levels, or there is too little text.
    """
    _check_levels(levels)
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


@_alone
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
    folder = _path(folder)
    is_empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not is_empty and not (folder / "evopress.json").is_file():
        raise EvoPressError(f"{folder} exists and is not an export of evopress, so it is not overwritten: give another folder")
    _check_levels(levels)
    workspace, written = _placed(levels, genome)
    found, space = _genome(levels, genome), levels.space
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


def _sample(model: PreTrainedModel) -> str:
    """Return a digest of dtypes, shapes and a few numbers of every tensor: much faster than one of all."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(flat.numel() // _SAMPLED, 1)].contiguous().cpu()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(some.view(torch.uint8).numpy().tobytes() if some.numel() else b"")
    return digest.hexdigest()


def _check_is(value: Any, kind: type, how: str) -> None:
    """Raise EvoPressError unless a value is what another function here returns."""
    if not isinstance(value, kind):
        raise EvoPressError(f"{type(value).__name__} given where {kind.__name__} is expected: give what {how} returns")


def _check_levels(levels: Any) -> None:
    """Raise EvoPressError unless these are levels, and of a model as it is now."""
    _check_is(levels, Levels, "build_levels")
    levels.model.check()


def _path(folder: Any) -> Path:
    """Return a folder that is given; raise EvoPressError if it is none."""
    if not isinstance(folder, str | PathLike):
        raise EvoPressError(f"the folder is {folder!r:.100}: give its path")
    return given_path(Path(folder), "folder")


def _asking(levels: Levels, tokens: Tensor, *, what: str, fitness: str, seed: int, **further: Any) -> RunSettings:
    """Return the settings of a run that asks for more of levels, on given search text.

    Args: what: asks, for a sentence about the seed.
    """
    return replace(
        levels.settings,
        model=replace(levels.model.settings, sequence_length=tokens.shape[1]),
        data=_data(levels.workspace.calibration_tokens, tokens),
        fitness=_made(FitnessSettings, {"name": fitness}, what="fitness"),
        seed=_checked(RunSettings, {"seed": seed}, what=what)["seed"],
        **further,
    )


def _with_text(levels: Levels, run: RunSettings, run_dir: Path, tokens: Tensor) -> Workspace:
    """Return a run on the levels' model and calibration text, with search text."""
    text = GivenText(levels.workspace.calibration_tokens, tokens)
    return Workspace(run, run_dir, model=levels.model.source, text=text, blocks=levels.workspace.blocks)


def _folder(given: Any) -> tuple[Path, Any]:
    """Return the folder that is given, or a temporary one and what removes that when nothing needs it any more."""
    if given is not None:
        return _path(given), None
    kept = tempfile.TemporaryDirectory(prefix="evopress-")
    return Path(kept.name), kept


def _refuse_other_models(model: Any) -> None:
    """Raise EvoPressError unless a model is one of transformers' that computes logits, as it is, or what names one."""
    if isinstance(model, str | PathLike):
        return
    kind = type(model).__name__
    inside = {
        "merge_and_unload": "what the PeftModel's merge_and_unload() returns",
        "_orig_mod": "its _orig_mod",
        "module": "its module",
        "model": "its model",
    }
    if not isinstance(model, PreTrainedModel):
        found = next((inside[name] for name in inside if getattr(model, name, None) is not None), None)
        raise EvoPressError(f"the model is a {kind}: give {found or 'a model of transformers, a folder or a hub id'}")
    if found := next((name for name, each in model.named_modules() if type(each).__module__.startswith("peft.")), None):
        raise EvoPressError(f"the model contains a peft adapter, {found}: give {inside['merge_and_unload']}")
    if model.get_output_embeddings() is None:
        raise EvoPressError(f"the model is a {kind}, which has no head over tokens: load it with AutoModelForCausalLM")


def _placed(levels: Levels, genome: Genome | Found | Refined | str | Path) -> tuple[Workspace, Genome]:
    """Return a genome of all levels that a workspace has, and that workspace."""
    found = _genome(levels, genome)
    if isinstance(genome, Refined) and genome.refined is not None:
        return genome.workspace, genome.workspace.add_refined(genome.refined)[0]
    return levels.workspace, found


def _genome(levels: Levels, genome: Genome | Found | Refined | str | Path) -> Genome:
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


def _data(calibration: Tensor, search: Tensor) -> DataSettings:
    """Return the settings that say how much text there is."""
    return DataSettings(
        source="given",
        calibration_tokens=calibration.numel(),
        search_tokens=search.numel(),
        evaluation_tokens=search.numel(),
    )


def _exchange_of(method: Any) -> str:
    return "fit" if getattr(method, "grid", None) == "gguf" else _EXCHANGES[method.name]


def _strategy(given: Any) -> Any:
    """Return the settings of a strategy that is given by its name, or by a dict of that and its numbers; others as they are.

    Raises: EvoPressError if there is no such strategy, or it has no such number.
    """
    told = {"name": given} if isinstance(given, str) else given
    if not isinstance(told, dict) or not isinstance(told.get("name"), str):
        return given
    numbers = {key: value for key, value in told.items() if key != "name"}
    return _made(settings_class(told["name"], key="strategy"), numbers, what=f"strategy {told['name']}")


def _made(schema: type, settings: dict[str, Any], *, what: str) -> Any:
    """Make a dataclass of settings; sequences may be tuples.

    Raises: EvoPressError for a setting that it has not, or a value of another type.
    """
    known = [name for name in signature(schema).parameters if name != "name" or schema is FitnessSettings]
    if unknown := [key for key in settings if key not in known]:
        raise EvoPressError(f"{what} has no setting {unknown[0]}: choose among {', '.join(known)}")
    return schema(**_checked(schema, settings, what=what))


def _checked(schema: type, settings: Mapping[str, Any], *, what: str) -> dict[str, Any]:
    """Return settings with Python's own numbers and lists.

    Raises: EvoPressError if a value is not of the type that a dataclass of settings gives its name.
    """
    types, settings = get_type_hints(schema), {key: _plain(value) for key, value in settings.items()}
    for key, value in settings.items():
        if not _is_of(value, types[key]):
            expected = types[key].__name__ if type(types[key]) is type else types[key]
            raise EvoPressError(f"{what} takes no {key}={value!r}: expected {expected}")
    return settings


def _plain(value: Any) -> Any:
    """Return a number of another library, such as numpy's, as Python's, and a tuple as a list; also those in lists and dicts."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, Real) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {int(key) if isinstance(key, Integral) else key: _plain(each) for key, each in value.items()}
    return value


def _is_of(value: Any, hint: Any) -> bool:
    if isinstance(hint, UnionType) or get_origin(hint) is Union:
        return any(_is_of(value, each) for each in get_args(hint))
    if hint is Any:
        return True
    if hint in (int, float):
        return isinstance(value, Real if hint is float else Integral) and not isinstance(value, bool)
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if not isinstance(value, kind) or not parts:
        return isinstance(value, kind)
    if kind is dict:
        return all(_is_of(key, parts[0]) and _is_of(each, parts[1]) for key, each in value.items())
    return kind is not list or all(_is_of(each, parts[0]) for each in value)
