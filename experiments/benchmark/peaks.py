"""Compare the memory that a run says it will take with what it takes: bytes of all tensors alive, counted at each operation.

    python -m experiments.benchmark.peaks            # small random models that run, and Llama-3-8B's and -70B's shapes

Small models run whole on this CPU, stage by stage. Of the large ones no number is computed: their weights are shapes on torch's
meta device, through which the same functions walk. Columns are not swept one by one there, but what a sweep holds is. Memory is
beside the model's. Prints a table of Markdown.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PretrainedConfig

from evopress import pipeline
from evopress.compress import gptq
from evopress.compress.gptq import GPTQ
from evopress.evaluation.heldout import measure_held_out
from evopress.fitness.measures import KLDivergence
from evopress.fitness.population import PopulationEvaluator, measure_sums
from evopress.levels import build, codec
from evopress.levels.live import LiveModel
from evopress.levels.plan import BuildSettings, plan_space
from evopress.models.blocks import BlockModel
from evopress.models.opening import fitted
from evopress.models.outline import find_family
from evopress.models.tiny import byte_tokenizer
from evopress.stages import preflight
from evopress.stages.preflight import Plan
from experiments.benchmark.alive import BOTH, DEVICE, HOST, Alive
from experiments.scripts import in_one_sentence

STAGES = ("database", "search", "evaluate", "export")
LARGE = {
    "Llama-3-8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "vocab_size": 128_256},
    "Llama-3-70B": {"hidden_size": 8192, "intermediate_size": 28_672, "num_attention_heads": 64, "vocab_size": 128_256},
}
SMALL = {
    "256 wide": {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "vocab_size": 1024},
    "384 wide": {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6, "vocab_size": 2048},
}
QUANT = ("+method=quant", "bits=3", "method.recipe=paper")
SPARSITY = ("+method=sparsity", "sparsity=0.5", "search.initial_tokens={tokens}")
METHODS = {
    "quant": QUANT,
    "SparseGPT": (*SPARSITY, "method.recipe=paper"),
    "ALPS": SPARSITY,
    "GGUF": ("+method=gguf", "bits=5", "method.levels=[Q8_0,Q4_K,Q2_K]"),
    "drop": ("+method=drop", "sparsity=0.5"),
    "experts": ("+method=experts", "sparsity=0.5"),
    "corrected, refined": (*QUANT, "method.propagate_bits=3", "method.correction=0.5"),
    "quantized experts": QUANT,
}
"""The settings of levels by their name in the table."""
COMMON = (
    "data=python_docs",
    "search/strategy=evolution",
    "search.num_offspring={candidates}",
    "search.survivors=[1]",
    "search.tokens=[{tokens}]",
    "search.generations=1",
    "baselines.names=[]",
    "fitness.max_tokens_in_flight={in_flight}",
    "level_db.cache_bytes={cache_bytes}",
    "evaluation.every=0",
    "tracker=none",
    "model.builtin=null",
    "model.sequence_length={length}",
    "model.dtype={dtype}",
    "model.device=cpu",
    "data.calibration_tokens={calibration}",
    "data.search_tokens={tokens}",
    "data.evaluation_tokens={tokens}",
    "stages=[{stages}]",
)


@dataclass(frozen=True)
class Case:
    """What is compared."""

    model: str
    shape: Mapping[str, int]
    dtype: str = "bfloat16"
    length: int = 2048
    calibration: int = 32_768
    candidates: int = 8
    tokens: int = 8192
    in_flight: int = 4096
    cache_bytes: str = "null"
    method: tuple[str, ...] = QUANT
    """The settings of its levels."""
    measured: tuple[str, ...] = STAGES
    """The stages of the run."""
    blocks: int = 2
    """Memory beside the model's grows with them in the export alone, and with what the cache of levels may hold."""

    @property
    def config(self) -> PretrainedConfig:
        """Of the model."""
        return (MixtralConfig if "num_local_experts" in self.shape else LlamaConfig)(
            **self.shape,
            num_hidden_layers=self.blocks,
            num_key_value_heads=max(self.shape["num_attention_heads"] // 4, 2),
            max_position_embeddings=8192,
            tie_word_embeddings=False,
            dtype=self.dtype,
        )

    def overrides(self, folder: Path) -> list[str]:
        """Return the settings of the run."""
        given = [text.format(**vars(self) | {"stages": ",".join(self.measured)}) for text in (*self.method, *COMMON)]
        return [*given, f"model.path={folder / 'model'}", f"level_db.root={folder / 'levels'}"]


CASES = (
    *(Case(name, shape) for name, shape in LARGE.items()),
    # As large models' does, the cache holds a part of the levels: those of one genome.
    Case("256 wide", SMALL["256 wide"], "float32", 256, 8192, 4, 2048, 1024, "6291456"),
    Case("256 wide", SMALL["256 wide"], "bfloat16", 256, 8192, 4, 2048, 1024, "3145728"),
    Case("384 wide", SMALL["384 wide"], "float32", 256, 8192, 4, 2048, 1024, "12582912"),
)
_MORE = ("database", "search", "refine", "evaluate", "export")
_EXPERTS = {"experts": 8, "quantized experts": 4}
"""Of a layer; with fewer there are not as many ways to drop half of them as a search begins with."""
_OTHER = {
    name: {**SMALL["256 wide"], **({"num_local_experts": _EXPERTS[name]} if name in _EXPERTS else {})}
    for name in METHODS
    if name != "quant"
}
OTHERS = {
    name: Case("256 wide", shape, "float32", 256, 4096, 2, 1024, 512, "6291456", METHODS[name], _MORE)
    for name, shape in _OTHER.items()
}
"""Small models with levels of other methods, by their name."""


def planned(case: Case, folder: Path, *further: str) -> dict[str, dict[str, int]]:
    """Return the bytes of memory that a dry run says of each stage, by where they lie, with a model's config.json alone.

    Args: further: settings of the run.
    """
    case.config.save_pretrained(folder / "model")
    (folder / "model" / "config.json").write_text(json.dumps({**case.config.to_dict(), "architectures": ["LlamaForCausalLM"]}))
    plan = _run([*case.overrides(folder), "dry_run=true", *further], folder)
    return {needs.stage: {HOST: needs.memory, DEVICE: needs.device} for needs in plan.stages if needs.stage in case.measured}


def counted_in_run(case: Case, folder: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Run a small model, and return the bytes that its plan says of each stage and those that were counted."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(case.config, dtype=getattr(torch, case.dtype))
    model.save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    counted: dict[str, int] = {}
    with Alive() as alive:
        model_bytes = 0

        @contextmanager
        def timed(plan: Plan, stage: str) -> Iterator[None]:
            nonlocal model_bytes
            if not counted:
                model_bytes = sum(alive.now.values())
            alive.begin()
            yield
            counted[stage] = alive.peak[BOTH] - model_bytes

        with mock.patch.object(Plan, "timed", timed):
            plan = _run(case.overrides(folder), folder)
    return {needs.stage: needs.memory for needs in plan.stages if needs.stage in case.measured}, counted


def _run(overrides: list[str], folder: Path) -> Plan:
    """Run, and return the plan that was made before."""
    from experiments.composed import settings_of  # needs Hydra, which the other parts do not

    (folder / "run").mkdir()
    plans: list[Plan] = []
    made = preflight.preflight

    def noted(*args: Any, **options: Any) -> Plan:
        plans.append(made(*args, **options))
        return plans[-1]

    no_probe = mock.patch.object(preflight, "_probe", return_value=None)  # times are not of interest
    with no_probe, mock.patch.object(pipeline, "preflight", noted):
        pipeline.run(fitted(settings_of(overrides)), folder / "run", config={}, command="", environment={})
    return plans[-1]


def counted(case: Case, *, copied: bool = False, offload: bool = False) -> dict[str, dict[str, int]]:
    """Return the bytes of memory that each stage takes of a model of shapes alone, beside the model, by where they lie.

    Args:
        copied: what is written is copied to the host first, from a device that is another.
        offload: the blocks lie on the host.
    """
    export, peaks = partial(_export, copied=copied), {}
    works: tuple[Callable[..., None], ...] = (_database, _search, _evaluate, export)
    with _without_columns():
        for stage, work in zip(STAGES, works, strict=True):
            blocks = _blocks(case if stage != "database" else replace(case, blocks=1), offload=offload)  # one by one
            with Alive(shapes=True) as alive, torch.no_grad():
                for tensor in (each for block in blocks.blocks for each in block.parameters() if offload):
                    alive.put(tensor, HOST)
                blocks.prepare(case.length)
                alive.begin()
                before = dict(alive.peak)
                work(case, blocks, alive)
                peaks[stage] = {place: size - before[place] for place, size in alive.peak.items()}
    return peaks


def _blocks(case: Case, *, offload: bool) -> BlockModel:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(case.config, dtype=getattr(torch, case.dtype), attn_implementation="sdpa")
    return BlockModel(model.eval(), find_family(case.config.to_dict()), device="meta", offload=offload)


def _ids(case: Case, tokens: int) -> Tensor:
    return torch.zeros(tokens // case.length, case.length, dtype=torch.int64)


def _database(case: Case, blocks: BlockModel, alive: Alive) -> None:
    settings = BuildSettings(root=Path("unused"), method="quant", model_name="shapes", recipe={}, propagate=None)
    build._walk(blocks, settings, _ids(case, case.calibration), GPTQ(), {}, list(blocks.parts))


def _live(case: Case, blocks: BlockModel, alive: Alive) -> LiveModel:
    levels: Any = _Levels(blocks, alive)
    return LiveModel(blocks, levels, cache_bytes=None if case.cache_bytes == "null" else int(case.cache_bytes))


def _search(case: Case, blocks: BlockModel, alive: Alive) -> None:
    live = _live(case, blocks, alive)
    count = len(live.space.units)
    genomes = [tuple(2 if unit == each else 3 for unit in range(count)) for each in range(case.candidates)]
    ids = _ids(case, case.tokens)
    text = torch.zeros(len(ids), case.length, blocks.hidden_size, dtype=blocks.dtype)  # the base of all, here as many
    evaluator = PopulationEvaluator(live, max_tokens_in_flight=case.in_flight)
    measure_sums(evaluator, genomes, ids, text[list(range(len(ids)))], KLDivergence())


def _evaluate(case: Case, blocks: BlockModel, alive: Alive) -> None:
    text = torch.zeros(case.tokens, blocks.hidden_size, dtype=blocks.dtype)  # of the search, still there
    live = _live(case, blocks, alive)
    evaluator = PopulationEvaluator(live, max_tokens_in_flight=case.in_flight)
    measure_held_out(evaluator, [(3,) * len(live.space.units)], _ids(case, case.tokens), batch_tokens=case.in_flight)
    del text


def _export(case: Case, blocks: BlockModel, alive: Alive, *, copied: bool) -> None:
    text = torch.zeros(case.tokens, blocks.hidden_size, dtype=blocks.dtype)  # of the search, still there
    live, alive.of_meta = _live(case, blocks, alive), HOST if blocks.offload else DEVICE
    with live.written((3,) * len(live.space.units), on_host=copied):
        _ = [each.cpu() for each in blocks.model.parameters() if copied]
    del text


class _Levels:
    """Levels of shapes alone, unpacked as they are."""

    folder = Path("unused")

    def __init__(self, blocks: BlockModel, alive: Alive) -> None:
        self.alive = alive
        self.slots = {name: slot for part in blocks.parts for name, slot in blocks.slots(part).items()}
        self.space = plan_space(blocks, GPTQ(), method="quant")
        self.shapes = {name: list(slot.weight.shape) for name, slot in self.slots.items()}
        self.dtype = str(blocks.dtype).removeprefix("torch.")

    def read(self, unit: int, level: int, device: Any) -> Any:
        """See `LevelSource`."""
        of = self.space.units[unit]
        rows, columns = self.shapes[of.name]
        bits = int(of.levels[level].key)
        groups = (rows, columns // 128)
        device = "cpu" if self.alive.place(self.slots[of.name].weight) == HOST else "meta"
        tensors = {
            "codes": torch.empty(of.size * bits // 8, dtype=torch.uint8, device=device),
            "scales": torch.empty(groups, dtype=torch.float16, device=device),
            "zeros": torch.empty(groups, dtype=torch.int16, device=device),
        }
        return codec.CODECS["packed_integers"].decode(tensors, {"bits": bits, "shape": [rows, columns], "dtype": self.dtype})


@contextmanager
def _without_columns() -> Iterator[None]:
    """Let sweeps hold what they hold and go over no column, and let levels be packed and not written."""

    def sweep(Wt: Tensor, U: Tensor, maxq: Tensor, group_size: int, fit: Any, *, block_size: int = 128) -> tuple[Tensor, ...]:
        columns, rows = Wt.shape
        scales = torch.empty(columns // group_size, rows, device=Wt.device)
        errors = [torch.empty(width, rows, device=Wt.device) for width in (block_size, 16)]
        spread = U / U.diagonal().unsqueeze(1)
        del errors, spread
        return torch.empty(columns, rows, dtype=torch.uint8, device=Wt.device), scales, torch.empty_like(scales)

    with ExitStack() as stack:
        for where, name, instead in (
            (gptq, "sweep", sweep),
            (codec, "pack_bits", codec.pack_words),
            (build, "append", lambda *entry: None),
            (build, "write_block", lambda folder, index, *parts: {"block": index}),
        ):
            stack.enter_context(mock.patch.object(where, name, instead))
        yield


def compared(cases: Iterable[Case]) -> Iterator[tuple[Case, dict[str, int], dict[str, int]]]:
    """Yield what is said and what is counted of each stage, in bytes, for each case."""
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            if case.model in LARGE:
                said, found = planned(case, Path(folder)), counted(case)
                yield case, {stage: said[stage][HOST] for stage in said}, {stage: found[stage][BOTH] for stage in found}
            else:
                yield case, *counted_in_run(case, Path(folder))


@in_one_sentence()
def main() -> None:
    """Print the tables."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for cases, stages in (({f"{case.model}, {case.dtype}": case for case in CASES}, STAGES), (OTHERS, _MORE)):
        print("| | " + " | ".join(f"{stage}: said | counted | ratio" for stage in stages) + " |")
        print("|---|" + "---:|---:|---:|" * len(stages))
        for name, (_, said, found) in zip(cases, compared(cases.values()), strict=True):
            print(f"| {name} | {' | '.join(_cells(said[s], found[s]) for s in stages)} |", flush=True)


def _cells(said: int, found: int) -> str:
    return f"{_shown(said)} | {_shown(found)} | {said / found:.2f}" if said and found else " | | "


def _shown(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


if __name__ == "__main__":
    main()
